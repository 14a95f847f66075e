"""Parallel in time is the sequential solve."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from solvers import DDIM, SOLVERS, Ancestral, BrownianMotion, DiffusionProblem, Heun, Prediction, integrate, picard
from solvers.certify import gaussian, starts, uneven
from solvers.grids import logsnr
from solvers.runge_kutta import RK4, Euler

Problems = dict[str, DiffusionProblem]
ONE_STEP = [
    DDIM(),
    Heun(),
    RK4(),
    Ancestral(),
    DDIM(eta=0.5),
    SOLVERS["dpm_3s"],
    SOLVERS["euler_maruyama"],
    SOLVERS["edm_heun"],
]
WITH_MEMORY = [
    "dpmpp_2m",
    "unipc_2",
    "unic_dpmpp_2s",
    "lms_4",
    "exp_adams_4",
    "pndm",
    "sa_solver",
    "er_sde_3",
    "restart",
]


@pytest.mark.parametrize("solver", ONE_STEP, ids=repr)
@pytest.mark.parametrize("window", [None, 7, 1])
def test_the_result_is_the_sequential_one(solver: Any, window: int | None, path: Any, problems: Problems) -> None:
    problem = next(problem for problem in problems.values() if problem.path is path)
    x, ts = starts(problem, 3), uneven(path, 30)
    noise = BrownianMotion(x, 2) if solver.stochastic else None
    one = integrate(solver, problem, x, ts, noise=noise)
    for tol in (1e-3, 1e-9):
        done = picard(solver, problem, x, ts, tol=tol, window=window, noise=noise)
        assert float((done.trajectory.x - one.x).abs().max()) < 30 * tol
        assert done.trajectory.nfe == done.sweeps * solver.nfe_per_step
        assert done.sweeps <= 30
        assert len(done.residuals) == done.sweeps
        assert all(int(spent) >= one.nfe for spent in done.trajectory.spent)


@pytest.mark.parametrize("name", WITH_MEMORY)
@pytest.mark.parametrize("window", [None, 7])
def test_what_remembers_is_run_so_too(name: str, window: int | None, problems: Problems) -> None:
    solver, problem = SOLVERS[name], problems["vp"]
    x, ts = starts(problem, 3), uneven(problem.path, 20)
    noise = BrownianMotion(x, 2) if solver.stochastic else None
    one = integrate(solver, problem, x, ts, noise=noise)
    done = picard(solver, problem, x, ts, tol=1e-9, window=window, noise=noise)
    assert float((done.trajectory.x - one.x).abs().max()) < 3e-8
    assert done.sweeps <= 20
    assert done.trajectory.spent is not None
    assert int(done.trajectory.spent.min()) >= one.nfe


def test_a_method_with_a_memory_needs_fewer_sweeps_than_steps(problems: Problems) -> None:
    problem = problems["vp"]
    x, ts = starts(problem, 4), logsnr(problem.path, 100)
    done = picard(SOLVERS["dpmpp_2m"], problem, x, ts, tol=1e-4)
    assert done.sweeps < 30
    assert done.trajectory.nfe == done.sweeps
    assert float((done.trajectory.x - integrate(SOLVERS["dpmpp_2m"], problem, x, ts).x).abs().max()) < 1e-3


def test_as_many_sweeps_as_steps_are_exact_and_fewer_are_enough(problems: Problems) -> None:
    problem = problems["vp"]
    x, ts = starts(problem, 4), logsnr(problem.path, 100)
    one = integrate(DDIM(), problem, x, ts).x
    loose, tight = (picard(DDIM(), problem, x, ts, tol=tol) for tol in (1e-2, 1e-8))
    assert loose.sweeps < tight.sweeps < 50
    assert float((tight.trajectory.x - one).abs().max()) < 1e-6
    exact = picard(DDIM(), problem, x, ts, tol=1e-300)
    assert exact.sweeps <= 100
    assert float((exact.trajectory.x - one).abs().max()) < 1e-12


def test_the_window_moves_over_what_has_settled_only(problems: Problems) -> None:
    """The state that begins the next window changed by no more than the tolerance, or is the next one."""
    problem, sweeps = problems["vp"], list[dict[float, Tensor]]()

    def predict(x: Tensor, t: Tensor) -> Prediction:
        sweeps.append({float(t[0]): part for t, part in zip(t.reshape(-1, 2), x.reshape(-1, 2, 2), strict=True)})
        return problem.predict(x, t)

    x, ts = starts(problem, 2), logsnr(problem.path, 40)
    for tol in (1e-2, 1e-5):
        sweeps.clear()
        picard(DDIM(), DiffusionProblem(problem.path, predict), x, ts, tol=tol)
        assert len(sweeps) > 5
        for before, after in pairwise(sweeps):
            (_, second, *_), first = before, next(iter(after))
            t = torch.tensor(first, dtype=torch.float64)
            scale = (problem.path.alpha(t) ** 2 + problem.path.sigma(t) ** 2).sqrt()
            moved = (after[first] - before[first]).square().mean(1).sqrt().max() / scale
            assert first == second or moved <= tol


def test_the_worst_sample_decides(vp: Any) -> None:
    problem, x = gaussian(vp, 0.0, 0.5), torch.zeros(200, 1, dtype=torch.float64)
    x[7], ts = 3.0, logsnr(vp, 40)
    done = picard(DDIM(), problem, x, ts, tol=1e-2)
    assert float((done.trajectory.x - integrate(DDIM(), problem, x, ts).x).abs().max()) < 2e-3


def test_a_narrow_window_is_not_behind(problems: Problems) -> None:
    """What enters the window begins where the window is, and not at the start."""
    problem = problems["vp"]
    x, ts = starts(problem, 3), logsnr(problem.path, 40)
    whole, part = (picard(DDIM(), problem, x, ts, tol=1e-3, window=window).sweeps for window in (None, 8))
    assert part <= whole + 3


def test_a_window_bounds_the_batch(problems: Problems) -> None:
    problem, seen = problems["flow"], set[int]()

    def predict(x: Tensor, t: Tensor) -> Prediction:
        seen.add(len(x))
        assert t.shape == (len(x),)
        return problem.predict(x, t)

    x = starts(problem, 3).float()
    done = picard(Euler(), DiffusionProblem(problem.path, predict), x, logsnr(problem.path, 20), tol=1e-4, window=5)
    assert max(seen) == 15
    assert done.trajectory.x.dtype == torch.float32


def test_who_cannot_be_run_so_is_told(problems: Problems) -> None:
    problem = problems["vp"]
    x, ts = starts(problem, 2), logsnr(problem.path, 5)
    for name in ("dopri54", "dopri5"):
        with pytest.raises(ValueError, match="by methods with fixed steps, not by"):
            picard(SOLVERS[name], problem, x, ts)
    with pytest.raises(ValueError, match="draws noise"):
        picard(Ancestral(), problem, x, ts)
    with pytest.raises(ValueError, match="tol is positive"):
        picard(DDIM(), problem, x, ts, tol=0.0)
