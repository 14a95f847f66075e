"""Grids along a trajectory's geometry: the least cost of all ways, and what it is worth."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch

from sdegen.oracles import oracle
from sdegen.paths import VP
from solvers import DiffusionProblem, Prediction, gits, prior, solve
from solvers.gits import _costs
from solvers.grids import karras, logsnr


def test_it_is_the_cheapest_of_all_ways(vp: Any, mixture: Any) -> None:
    problem = mixture.problem(vp)
    x = prior(vp, (16, 2), seed=0, dtype=torch.float64)
    fine = karras(vp, 9)
    cost = _costs(problem, x, fine)
    assert bool((cost.diagonal(1) < 1e-12).all())  # the solution is made of steps of Euler
    for n, gamma in ((1, 1.0), (3, 1.0), (4, 1.3), (9, 1.15)):

        def price(way: tuple[int, ...], gamma: float = gamma) -> float:
            return sum(gamma**k * float(cost[i, j]) for k, (i, j) in enumerate(pairwise(way)))

        best = min(((0, *inside, 9) for inside in combinations(range(1, 9), n - 1)), key=price)
        found = gits(problem, x, n, fine=9, gamma=gamma)
        assert torch.equal(found, fine[list(best)])


def test_where_nothing_bends_the_steps_do_not_matter_and_where_it_bends_they_are_short(vp: Any) -> None:
    """eps jumps at logsnr 0, from one constant to another: a step should end there."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        eps = torch.full_like(x, 1.0 if float(vp.logsnr(t)) < 0 else -1.0)
        return Prediction((x - float(vp.sigma(t)) * eps) / float(vp.alpha(t)), eps)

    ts = gits(DiffusionProblem(vp, predict), torch.ones(2, 3, dtype=torch.float64), 2, fine=200)
    assert float(vp.logsnr(ts[1])) == pytest.approx(0, abs=0.3)


@pytest.mark.parametrize(("name", "n"), [("mixture2d", 6), ("mixture2d", 10), ("mixture16", 10)])
def test_it_beats_uniform_logsnr_on_noises_it_has_not_seen(name: str, n: int) -> None:
    exact, path = oracle(name), VP()
    problem, shape = exact.problem(path), exact.event_shape
    ts = gits(problem, prior(path, (32, *shape), seed=0, dtype=torch.float64), n)
    x = prior(path, (128, *shape), seed=1, dtype=torch.float64)
    answer = solve(problem, x, solver="dpmpp_3s", steps=100).x

    def error(ts: torch.Tensor) -> float:
        return float((solve(problem, x, solver="ddim", ts=ts).x - answer).flatten(1).norm(dim=1).mean())

    assert error(ts) < error(logsnr(path, n)) / 1.3


@pytest.mark.parametrize(
    ("wrong", "words"), [({"n": 0}, "got n=0"), ({"n": 9}, "of 8 fine"), ({"gamma": 0.0}, "gamma")]
)
def test_what_makes_no_grid_is_refused(wrong: dict[str, Any], words: str, vp: Any, mixture: Any) -> None:
    with pytest.raises(ValueError, match=words):
        gits(mixture.problem(vp), torch.ones(2, 2), **({"n": 3, "fine": 8} | wrong))
