"""Which round comes next: enough for the target, no more than the budget, and an error that can be believed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sdegen.likelihood import Exact, Hutchinson, LogDensity, Trace, ode_likelihood
from sdegen.likelihood.log_density import Route
from sdegen.likelihood.rounds import Round, Tally
from sdegen.models import VPSDE
from sdegen.oracles import GaussianOracle
from sdegen.paths import VP, LinearLogSNR

PATH = VP(LinearLogSNR(8, -8))


def _found(draws: Sequence[Sequence[float]], variance: float = math.nan, calls: float = 10.0) -> LogDensity:
    """The outcome of a round: log-densities of the draws of each datum."""
    log_p = torch.tensor(draws, dtype=torch.float64)
    n, each = log_p.shape
    zeros = torch.zeros(n, dtype=torch.float64)
    return LogDensity(
        log_prob=log_p.mean(1), log_prior=zeros, log_det=log_p.mean(1), spread=zeros, draws=log_p,
        trace_variance=torch.full((n,), variance, dtype=torch.float64), z=zeros, forward=calls * each,
        vjp=2 * calls * each, spent=None, parts={},
    )  # fmt: skip


def _by_trace(variance: float = 4.0, *, n: int = 64, stays: bool = False) -> Tally:
    """After one solve of n data with two probes."""
    tally = Tally(drawn=False, trace=Hutchinson(2), fixed_steps=not stays)
    tally.add(Round(1, Hutchinson(2)), [_found([[1.0]] * n, variance, 100)])
    return tally


def test_rounds_count_by_their_probes() -> None:
    tally = _by_trace(variance=4.0)
    tally.add(Round(1, Hutchinson(6)), [_found([[2.0]] * 64, 1.0)])
    torch.testing.assert_close(tally.values, torch.full((64,), -(2 * 1.0 + 6 * 2.0) / 8, dtype=torch.float64))
    variance = (2 / 8) ** 2 * 4.0 + (6 / 8) ** 2 * 1.0
    torch.testing.assert_close(tally.variances, torch.full((64,), variance, dtype=torch.float64))
    assert sum(tally.parts.values()) == pytest.approx(float(tally.values.mean()))
    assert (tally.forward, tally.vjp, tally.taken) == (110, 220, 2)


def test_draws_of_one_round_share_the_noise_of_their_traces() -> None:
    tally = Tally(drawn=False, trace=Hutchinson(2), fixed_steps=True)
    tally.add(Round(4, Hutchinson(2)), [_found([[1.0, 2.0, 3.0, 4.0]], 8.0)])
    torch.testing.assert_close(tally.variances, torch.tensor([2.0], dtype=torch.float64))


def test_where_z_0_is_drawn_the_spread_of_the_draws_is_the_noise() -> None:
    tally = Tally(drawn=True, trace=Hutchinson(1), fixed_steps=True)
    tally.add(Round(2, Hutchinson(1)), [_found([[1.0, 3.0]])])
    tally.add(Round(1, Hutchinson(1)), [_found([[5.0]])])
    assert float(tally.values) == pytest.approx(-3)
    assert float(tally.variances) == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    ("draws", "target", "budget", "known", "expected"),
    [
        (2, None, None, False, 2),
        (2, None, 100, False, 12),  # without a target a budget is spent, 8 calls for each draw
        (2, 0.1, 100, False, 2),  # with one, the first round says how many are needed
        (20, 0.1, 100, False, 12),
        (2, None, 100, True, 2),  # where nothing is drawn there is nothing to repeat
    ],
)
def test_the_first_round(draws: int, target: float | None, budget: int | None, known: bool, expected: int) -> None:
    trace: Trace = Exact() if known else Hutchinson(1)
    route = Route.of(PATH, trace, solver="rk4", steps=2)
    tally = Tally(drawn=not known, trace=trace, fixed_steps=True)
    assert tally.first(draws, target, budget, known, route, 10).draws == expected


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, 18 - 2),  # three times the target after two draws: nine times as many in all
        (100, 7),  # 10 went into the solver's error and 20 into the first round, 10 calls for each draw
        (39, None),
    ],
)
def test_draws_that_a_target_takes_and_a_budget_allows(budget: int | None, expected: int | None) -> None:
    tally = Tally(drawn=True, trace=Hutchinson(1), fixed_steps=True)
    n = 64
    tally.spend([_found([[0.0]] * n)], n)  # a check of the solver's error
    tally.add(Round(2, Hutchinson(1)), [_found([[0.0, 6.0]] * n)])
    se = float(tally.variances.sum().sqrt()) / n
    plan = tally.next(se / 3 * 1.0001, budget)
    assert (plan and plan.draws) == expected
    assert bool(tally.note) == (expected is None)
    assert tally.next(se * 1.0001, budget) is None


def test_probes_that_a_target_takes() -> None:
    tally = _by_trace()
    se = float(tally.variances.sum().sqrt()) / 64
    plan = tally.next(se / 3 * 1.0001, None)
    assert plan is not None
    assert (plan.draws, plan.trace.vjps(1)) == (1, 2 * (9 - 1))  # two of eighteen are done
    assert tally.next(se * 1.0001, None) is None
    assert tally.next(se / 3, 205) is not None
    assert tally.next(se / 3, 199) is None
    assert tally.note == f"the target of {se / 3:.3g} nats is not reached with max_nfe=199"


@pytest.mark.parametrize(
    ("stays", "n", "more"),
    [
        (True, 1, 32),  # one degree of freedom, and 31 to go
        (True, 8, 4),  # eight, and 24
        (True, 32, None),
        (False, 1, None),  # a hundred evaluations know their noise
    ],
)
def test_an_error_that_nobody_knows_is_not_believed(stays: bool, n: int, more: int | None) -> None:
    """Two probes of a single datum may agree by chance: their error is zero then."""
    tally = _by_trace(variance=0.0, n=n, stays=stays)
    plan = tally.next(1.0, None)
    assert (plan and plan.trace.vjps(1)) == more


@pytest.mark.parametrize("budget", [{"tol": 1e-1}, {"solver": "euler", "steps": 8}], ids=["stay", "fresh"])
def test_a_target_for_a_single_datum_is_met_with_an_error_that_is_known(budget: dict[str, Any]) -> None:
    """Without a least number of degrees of freedom the z-scores have standard deviations of 1.8 and infinity."""
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.float64, generator=draw)
    truth = GaussianOracle([0.0] * 4, (root @ root.T / 4 + 0.1 * torch.eye(4)).numpy())
    model, x = VPSDE(truth, PATH), truth.sample(1, seed=1)
    common: dict[str, Any] = {"check": 0, "control": None, **budget}
    exact = ode_likelihood(model, x, trace=Exact(), **common).nats
    target = 0.5
    reports = [
        ode_likelihood(model, x, trace=Hutchinson(2, seed), seed=seed, target_se=target, **common) for seed in range(60)
    ]
    z = torch.tensor([(report.nats - exact) / report.estimator_se for report in reports])
    assert float(z.std()) == pytest.approx(1, abs=0.3)  # a standard deviation from 60 has an error of 0.09
    off = torch.tensor([report.nats - exact for report in reports])
    assert float(off.square().mean().sqrt()) < 1.15 * target
