"""What is asked of a predictor and kept of its answers: type, dtype, the prediction of every step, batches of none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from solvers import (
    EDM,
    ODE,
    SOLVERS,
    DiffusionProblem,
    Heun,
    OnPath,
    Prediction,
    dense,
    picard,
    prior,
    replay,
    round_trip,
    solve,
    trace,
)
from solvers.certify import gaussian
from solvers.grids import logsnr

MOVES_FIRST = {"edm_churn", "annealed_langevin"}


@pytest.fixture
def problem(vp: Any) -> DiffusionProblem:
    return gaussian(vp)


@pytest.fixture
def x(vp: Any) -> Tensor:
    return prior(vp, (3, 2), seed=0)


# --- Kept -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_the_first_prediction_of_every_step_is_beside_its_state(name: str, problem: Any, x: Tensor) -> None:
    ts = logsnr(problem.path, 4)
    done = solve(problem, x.double(), solver=name, ts=ts, seed=0, save="all")
    assert done.xs is not None
    assert done.predictions is not None
    assert done.predictions.x0.shape == done.predictions.eps.shape == (4, 3, 2)
    at_node = [
        all(torch.allclose(part[i], whole, atol=1e-7) for part, whole in zip(done.predictions, asked, strict=True))
        for i, asked in enumerate(map(problem.predict, done.xs, ts[:-1]))
    ]
    assert all(at_node) == (name not in MOVES_FIRST)
    assert bool(done.predictions.x0.isfinite().all())


def test_predictions_are_kept_where_states_are(problem: Any, x: Tensor) -> None:
    assert solve(problem, x, solver="heun", steps=3).predictions is None
    assert solve(ODE(lambda x, t: -x), x, solver="heun", steps=3, save="all").predictions is None
    denoised = solve(problem, x, solver="ddim", steps=3, save="all", end="denoise")
    assert denoised.predictions is not None
    assert len(denoised.predictions.x0) == 3  # that of the end is the result


def test_a_step_that_predicts_nothing_has_none(problem: Any, x: Tensor) -> None:
    class Lazy(Heun):
        def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Any) -> tuple[Tensor, None]:
            return super().step(problem, x, t, s, state, noise) if t > 0.5 else (x, None)

    done = solve(problem, x, solver=Lazy(), ts=torch.tensor([1.0, 0.6, 0.4, 0.2]), save="all")
    assert done.predictions is not None
    assert done.predictions.eps.isnan().flatten(1).all(1).tolist() == [False, False, True]


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (lambda x: x, r"one tensor of shape \(3, 2\)"),
        (lambda x: (x, x), r"tuple\(Tensor, Tensor\)"),
        (lambda x: Prediction(x, None), r"Prediction\(Tensor, NoneType\)"),
        (lambda x: None, "NoneType"),
    ],
    ids=["tensor", "pair", "half", "nothing"],
)
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "dopri54", "dopri5"])
def test_what_predict_returns_is_said_in_one_line(name: str, answer: Any, what: str, vp: Any, x: Tensor) -> None:
    problem = DiffusionProblem(vp, lambda x, t: answer(x))
    line = (
        rf"^{name}: step 1, t = 1: predict returns Prediction\(x0, eps\), two tensors of the state's shape, got {what}$"
    )
    with pytest.raises(TypeError, match=line):
        solve(problem, x, solver=name, ts=logsnr(vp, 2))


def test_what_a_velocity_returns_is_said_in_one_line(x: Tensor) -> None:
    def wrong(x: Tensor, t: Tensor) -> Any:
        return Prediction(x, x)

    with pytest.raises(TypeError, match=r"^heun: step 1, .*: a velocity returns one tensor of the state's shape, got"):
        solve(ODE(wrong), x, solver="heun", steps=2)


def test_a_message_has_the_short_name_of_a_solver() -> None:
    assert all(str(solver) == name for name, solver in SOLVERS.items())
    assert f"{OnPath(Heun(), EDM)}" == "OnPath(solver=Heun(), path=EDM, grid='vp_quadratic')"


# --- dtypes -----------------------------------------------------------------------------------------------------------

SEVERAL = [
    "ddim", "ancestral", "euler", "heun", "dpmpp_2m", "dpmpp_3m", "unipc_3", "edm_heun", "deis_tab2", "sde_dpmpp_2m",
    "seeds_3", "sa_solver", "er_sde_3", "restart", "pc_langevin", "plms", "dopri54", "adaptive_dpm_23", "gotta_go_fast",
    "dopri5", "rk45", "torchsde_srk",
]  # fmt: skip


@pytest.mark.parametrize("predicted", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SEVERAL)
def test_the_state_keeps_its_dtype_whatever_is_predicted(name: str, predicted: Any, problem: Any, x: Tensor) -> None:
    def predict(x: Tensor, t: Tensor) -> Prediction:
        assert x.dtype == torch.float32
        return Prediction(*(part.to(predicted) for part in problem.predict(x, t)))

    ts = logsnr(problem.path, 3)
    tol = {"tol": 0.1} if SOLVERS[name].nfe_per_step == 0 else {"ts": ts}  # half precision has no more digits
    done = solve(DiffusionProblem(problem.path, predict), x, solver=name, seed=0, save="all", **tol)
    assert done.xs is not None
    assert done.predictions is not None
    assert {done.x.dtype, done.xs.dtype, *(part.dtype for part in done.predictions)} == {torch.float32}
    if predicted == torch.float64:
        assert torch.allclose(done.x, solve(problem, x, solver=name, seed=0, **tol).x, atol=1e-3)


def test_a_network_under_autocast_is_a_predictor(problem: Any, x: Tensor) -> None:
    network = torch.nn.Linear(2, 2)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        with torch.autocast("cpu", torch.bfloat16):
            eps = network(x)
        assert eps.dtype == torch.bfloat16
        return Prediction(eps, eps)

    done = solve(DiffusionProblem(problem.path, predict), x, solver="dpmpp_2m", steps=3)
    assert done.x.dtype == torch.float32


# --- Nobody -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_a_batch_of_none_stays_one(name: str, problem: Any, x: Tensor) -> None:
    nobody = x[:0]
    done = solve(problem, nobody, solver=name, ts=logsnr(problem.path, 4), seed=0, save="all", end="denoise")
    assert done.x.shape == (0, 2)
    assert done.nfe == 0
    assert done.xs is not None
    assert done.predictions is not None
    assert done.xs.shape == (5, 0, 2)
    assert done.predictions.x0.shape == (4, 0, 2)


def test_a_batch_of_none_stays_one_around_the_loop_too(problem: Any, x: Tensor) -> None:
    nobody, ts = x[:0], logsnr(problem.path, 4)
    assert picard("ddim", problem, nobody, ts).trajectory.x.shape == (0, 2)
    assert replay(trace("ddim", problem.path, ts), problem.predict, nobody).shape == (0, 2)
    assert dense("ddim", problem, nobody, ts)(torch.tensor([0.3, 0.7])).shape == (2, 0, 2)
    assert round_trip(problem, nobody, solver="ddim", steps=4).decoded.x.shape == (0, 2)
