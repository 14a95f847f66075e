"""Grids that were found by measuring: better where it counts, never worse where it was looked."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from sdegen.oracles import GaussianOracle, oracle
from sdegen.paths import VP
from solvers import (
    GRIDS,
    SOLVERS,
    DiffusionProblem,
    OptimizedGrid,
    Prediction,
    check_grid,
    optimize_grid,
    prior,
    solve,
)
from solvers.certify import exact
from solvers.grid_search import Part, Search
from solvers.optimize import distances, gain_interval

SMALL = {"starts": 1, "iterations": 6, "candidates": 20}


@pytest.fixture(scope="module")
def problem() -> DiffusionProblem:
    return oracle("mixture2d").problem(VP())


@pytest.fixture(scope="module")
def start(problem: DiffusionProblem) -> torch.Tensor:
    return prior(problem.path, (96, 2), seed=0, dtype=torch.float64)


@pytest.fixture(scope="module")
def found(problem: DiffusionProblem, start: torch.Tensor) -> OptimizedGrid:
    return optimize_grid(problem, "exp_adams_3", 6, x=start, **SMALL)


def test_it_is_a_grid_that_is_better(found: OptimizedGrid, problem: DiffusionProblem) -> None:
    check_grid(found.ts, problem.t_min, problem.t_max)
    assert (float(found.ts[0]), float(found.ts[-1])) == (problem.t_max, problem.t_min)
    assert found.steps == 6
    assert found.fitted
    assert found.gain > 1.5
    assert "gain" in str(found)


def test_the_error_is_that_of_noises_it_has_not_seen(
    found: OptimizedGrid, problem: DiffusionProblem, start: torch.Tensor
) -> None:
    """Measured again, with another reference: a library's solution to rounding."""
    held_out = start[72:]
    truth = exact(problem, held_out)

    def apart(grid: object) -> torch.Tensor:
        x = solve(problem, held_out, solver="exp_adams_3", steps=6, grid=grid).x  # type: ignore[arg-type]
        return (x - truth).square().mean(1).sqrt()

    assert float(apart(found).mean()) == pytest.approx(found.error, rel=1e-2)
    for name, reported in found.presets.items():
        assert float(apart(name).mean()) == pytest.approx(reported, rel=1e-2)
    least = min(float(apart(name).square().mean().sqrt()) for name in found.presets)
    assert found.gain_in("rms") == pytest.approx(least / float(apart(found).square().mean().sqrt()), rel=1e-2)
    low, high = found.interval
    assert 0.5 < low / found.gain < 1 < high / found.gain < 2


def test_other_noises_confirm_it(found: OptimizedGrid, problem: DiffusionProblem) -> None:
    x = prior(problem.path, (256, 2), seed=99, dtype=torch.float64)
    truth = exact(problem, x)
    errors = {
        name: float(distances(solve(problem, x, solver="exp_adams_3", steps=6, grid=grid).x, truth).mean())
        for name, grid in {"found": found, **{name: GRIDS[name] for name in found.presets}}.items()
    }
    assert errors["found"] < min(errors[name] for name in found.presets) / 1.5


@pytest.mark.parametrize("measure", ["mean", "rms"])
def test_with_few_steps_it_is_the_best_grid_there_is(measure: str, problem: DiffusionProblem) -> None:
    """Against all pairs of inner nodes, on the noises that it was fitted to; presets are far off."""
    x = prior(problem.path, (400, 2), seed=5, dtype=torch.float64)
    truth = solve(problem, x, solver="exp_adams_4", steps=100).x
    found = optimize_grid(
        problem, "gradient_estimation", 3, x=x, target=truth, measure=measure, starts=2, iterations=4, candidates=60
    )

    def error(ts: torch.Tensor) -> float:
        d = distances(solve(problem, x[:200], solver="gradient_estimation", ts=ts).x, truth[:200])
        return float(d.mean() if measure == "mean" else d.square().mean().sqrt())

    brute = min(error(ts) for ts in all_of_three_steps(problem))
    assert error(found.ts) < 1.01 * brute
    assert error(found.ts) < 0.8 * min(error(GRIDS[name](problem.path, 3)) for name in found.presets)


def all_of_three_steps(problem: DiffusionProblem, count: int = 25) -> list[torch.Tensor]:
    """Every pair of inner nodes among ``count``, equally spaced in lam."""
    ends = torch.tensor([problem.t_max, problem.t_min], dtype=torch.float64)
    inner = torch.combinations(problem.path.time(2 * torch.linspace(-2, 4, count, dtype=torch.float64)))
    return [torch.cat([ends[:1], nodes, ends[1:]]) for nodes in inner]


def test_without_derivatives_every_valley_is_found_once(problem: DiffusionProblem) -> None:
    """A step function of the grid, whose derivatives are zero or nothing: how many samples are off by more than 0.2."""
    x = prior(problem.path, (60, 2), seed=5, dtype=torch.float64)
    part = Part(x, solve(problem, x, solver="exp_adams_4", steps=100).x, None)

    class Counting(Search):
        def cost(self, e: torch.Tensor) -> float:
            return float((e.square().mean(1).sqrt() > 0.2).double().mean())

    search = Counting(problem, SOLVERS["gradient_estimation"], 3, 1.0)
    grids = {name: GRIDS[name](problem.path, 3) for name in ("uniform", "karras", "logsnr")}
    scanned = search.scan(grids, 3, part, seed=0)
    assert [one.cost for one in scanned] == sorted(one.cost for one in scanned)
    assert {one.origin for one in scanned} == {*grids, "mixture"}
    found = search.valleys(scanned, part)
    brute = min(search.cost(search.residual(ts, part)) for ts in all_of_three_steps(problem))
    assert found[0].cost < brute + 1.5 / 60, "within one sample"
    assert found[0].cost < 0.8 * scanned[0].cost
    lams = [problem.path.logsnr(one.ts) / 2 for one in found]
    assert all(float((a - b).abs().max()) > 0.1 for a, b in combinations(lams, 2))
    assert len(search.valleys([found[0]] * 3, part)) == 1


def test_one_sample_in_another_mode_decides_the_rms_and_not_the_mean(problem: DiffusionProblem) -> None:
    """The target of one sample is moved away: the fit to the mean hardly minds, that to the root mean square does."""
    x = prior(problem.path, (128, 2), seed=6, dtype=torch.float64)
    truth = solve(problem, x, solver="exp_adams_4", steps=100).x
    moved = truth.clone()
    moved[3] += 4.0

    def error(measure: str) -> float:
        ts = optimize_grid(problem, "dpmpp_2m", 6, x=x, target=moved, measure=measure, starts=1, candidates=0).ts
        return float(distances(solve(problem, x[64:], solver="dpmpp_2m", ts=ts).x, truth[64:]).mean())

    assert error("mean") < 0.9 * error("rms")


def test_an_interval_of_a_gain_covers_it() -> None:
    """Of 60 pairs of samples with a known ratio of means, 90 % intervals hold it in nearly nine of ten."""
    draw = torch.Generator().manual_seed(0)
    held = 0
    for seed in range(60):
        shared, a, b = torch.rand(3, 200, generator=draw, dtype=torch.float64)
        low, high = gain_interval(shared + a, 3 * (shared + b), draws=200, seed=seed)
        held += low < 3.0 < high
    assert 46 <= held <= 60
    same = torch.rand(50, generator=draw, dtype=torch.float64)
    assert gain_interval(same, 2 * same, "rms", draws=20) == pytest.approx((2.0, 2.0))


def test_where_grids_do_not_matter_nothing_is_gained() -> None:
    """Data that are one point: DDIM is exact on any grid."""
    problem = GaussianOracle([0.3, -0.1], [0.0, 0.0]).problem(VP())
    x = prior(problem.path, (16, 2), seed=0, dtype=torch.float64)
    assert optimize_grid(problem, "ddim", 4, x=x, target=exact(problem, x), **SMALL).error < 1e-10


def test_with_another_number_of_steps_its_nodes_are_in_between(found: OptimizedGrid, problem: DiffusionProblem) -> None:
    torch.testing.assert_close(found(problem.path, 6), found.ts, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found(problem.path, 12)[::2], found.ts, rtol=1e-9, atol=1e-12)


def test_never_worse_than_a_preset_where_it_chose(problem: DiffusionProblem, start: torch.Tensor) -> None:
    """Without a search the best preset itself comes back, and its gain is no more than one."""
    none = optimize_grid(problem, "ddim", 5, x=start, iterations=0)
    assert not none.fitted
    assert torch.equal(none.ts, GRIDS[none.origin](problem.path, 5))
    assert none.gain <= 1.0
    truth = exact(problem, start[48:72])
    some = optimize_grid(problem, "ddim", 6, x=start, **SMALL)

    def error(ts: torch.Tensor) -> float:
        return float(distances(solve(problem, start[48:72], solver="ddim", ts=ts).x, truth).mean())

    assert error(some.ts) <= min(error(GRIDS[name](problem.path, 6)) for name in some.presets) * 1.01


def test_a_black_box_without_gradients_in_float32(problem: DiffusionProblem, start: torch.Tensor) -> None:
    """A predictor that leaves torch: nothing in it could be differentiated."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        x0, eps = problem.predict(x.double(), t)
        return Prediction(*(torch.tensor(part.numpy(), dtype=torch.float32) for part in (x0, eps)))

    box = DiffusionProblem(problem.path, predict)
    found = optimize_grid(box, "exp_adams_3", 6, x=start.float(), **SMALL)
    assert found.gain > 1.5


def test_a_stochastic_solver_on_its_brownian_motion(problem: DiffusionProblem) -> None:
    """Half of its error is a matter of the noise and of no grid, so there is little to gain, but it is reproducible."""
    x = prior(problem.path, (160, 2), seed=0, dtype=torch.float64)

    def search(seed: int, iterations: int) -> OptimizedGrid:
        return optimize_grid(
            problem, "sde_dpmpp_2m", 8, x=x, seed=seed, fine=40, presets=("sqrt_flow", "logsnr"), starts=1,
            iterations=iterations, candidates=2,
        )  # fmt: skip

    found, again = search(3, 2), search(3, 2)
    check_grid(found.ts, problem.t_min, problem.t_max)
    assert torch.equal(found.ts, again.ts)
    assert found.error < 1.2 * min(found.presets.values())
    assert search(4, 0).error != found.error


def test_a_target_that_is_known_is_used(problem: DiffusionProblem, start: torch.Tensor) -> None:
    shifted = exact(problem, start) + 1.0
    found = optimize_grid(problem, "ddim", 3, x=start, target=shifted, iterations=0)
    assert found.error > 0.5


def test_one_step_leaves_nothing_to_choose(problem: DiffusionProblem, start: torch.Tensor) -> None:
    assert optimize_grid(problem, "ddim", 1, x=start).ts.tolist() == [problem.t_max, problem.t_min]


def test_a_budget_is_a_budget(problem: DiffusionProblem, start: torch.Tensor) -> None:
    found = optimize_grid(problem, "heun", 7, x=start, iterations=0)
    assert found.steps == 3
    assert solve(problem, start, solver="heun", ts=found.ts).nfe <= 7


def test_bad_input(problem: DiffusionProblem, start: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="at least 4 samples"):
        optimize_grid(problem, "ddim", 5, x=start[:3])
    with pytest.raises(ValueError, match="shape of x"):
        optimize_grid(problem, "ddim", 5, x=start, target=start[:2])
    with pytest.raises(ValueError, match="unknown measure to fit 'median'; did you mean 'mean'"):
        optimize_grid(problem, "ddim", 5, x=start, measure="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown measure 'max'"):
        gain_interval(start[:, 0], start[:, 0], "max")
    with pytest.raises(ValueError, match="preset"):
        optimize_grid(problem, "ddim", 5, x=start, presets=())
    with pytest.raises(ValueError, match="unknown grid"):
        optimize_grid(problem, "ddim", 5, x=start, presets=("karas",))
    with pytest.raises(ValueError, match="budget"):
        optimize_grid(problem, "heun", 1, x=start)
    with pytest.raises(ValueError, match="controls its own steps"):
        optimize_grid(problem, "dopri5", 10, x=start)
