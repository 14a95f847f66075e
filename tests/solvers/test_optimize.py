"""Grids that were found by measuring: better where it counts, never worse where it was looked."""

from __future__ import annotations

import pytest
import torch

from sdegen.oracles import oracle
from sdegen.paths import VP
from solvers import GRIDS, DiffusionProblem, OptimizedGrid, Prediction, check_grid, optimize_grid, prior, solve
from solvers.certify import exact

SMALL = {"starts": 1, "iterations": 6}


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

    def error(grid: object) -> float:
        x = solve(problem, held_out, solver="exp_adams_3", steps=6, grid=grid).x  # type: ignore[arg-type]
        return float((x - truth).square().mean().sqrt())

    assert error(found) == pytest.approx(found.error, rel=1e-2)
    for name, reported in found.presets.items():
        assert error(name) == pytest.approx(reported, rel=1e-2)


def test_other_noises_confirm_it(found: OptimizedGrid, problem: DiffusionProblem) -> None:
    x = prior(problem.path, (64, 2), seed=99, dtype=torch.float64)
    truth = exact(problem, x)
    errors = {
        name: float((solve(problem, x, solver="exp_adams_3", steps=6, grid=grid).x - truth).square().mean().sqrt())
        for name, grid in {"found": found, **{name: GRIDS[name] for name in found.presets}}.items()
    }
    assert errors["found"] == min(errors.values())


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
    some = optimize_grid(problem, "ddim", 5, x=start, **SMALL)

    def error(ts: torch.Tensor) -> float:
        return float((solve(problem, start[48:72], solver="ddim", ts=ts).x - truth).square().mean())

    assert error(some.ts) <= min(error(GRIDS[name](problem.path, 5)) for name in some.presets) * 1.01


def test_a_black_box_without_gradients_in_float32(problem: DiffusionProblem, start: torch.Tensor) -> None:
    """A predictor that leaves torch: nothing in it could be differentiated."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        x0, eps = problem.predict(x.double(), t)
        return Prediction(*(torch.tensor(part.numpy(), dtype=torch.float32) for part in (x0, eps)))

    box = DiffusionProblem(problem.path, predict)
    found = optimize_grid(box, "exp_adams_3", 6, x=start.float(), **SMALL)
    assert found.gain > 1.5


def test_a_stochastic_solver_on_its_brownian_motion(problem: DiffusionProblem, start: torch.Tensor) -> None:
    """Half of its error is a matter of the noise and of no grid, so there is little to gain, but it is reproducible."""
    found, again = (
        optimize_grid(problem, "sde_dpmpp_2m", 10, x=start, seed=3, starts=1, iterations=3, fine=60) for _ in range(2)
    )
    check_grid(found.ts, problem.t_min, problem.t_max)
    assert torch.equal(found.ts, again.ts)
    assert found.error < 1.2 * min(found.presets.values())
    assert optimize_grid(problem, "sde_dpmpp_2m", 10, x=start, seed=4, iterations=0, fine=60).error != found.error


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
    with pytest.raises(ValueError, match="preset"):
        optimize_grid(problem, "ddim", 5, x=start, presets=())
    with pytest.raises(ValueError, match="unknown grid"):
        optimize_grid(problem, "ddim", 5, x=start, presets=("karas",))
    with pytest.raises(ValueError, match="budget"):
        optimize_grid(problem, "heun", 1, x=start)
    with pytest.raises(ValueError, match="controls its own steps"):
        optimize_grid(problem, "dopri5", 10, x=start)
