"""Every method of torchdiffeq, scipy and torchsde that applies, in every variable, held to what it declares."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from solvers import (
    EDM,
    FLOW,
    SOLVERS,
    SRA1,
    VP_LAM,
    BrownianMotion,
    DiffusionProblem,
    OnPath,
    Prediction,
    ScipyODE,
    Solver,
    TorchDiffEq,
    TorchSDE,
    integrate,
    solve,
)
from solvers.certify import gaussian, local_order, measured_order, noise_scale, starts, weak_order
from solvers.curves import Coordinates
from solvers.grids import logsnr

Problems = dict[str, DiffusionProblem]

VARIABLES: dict[str, Coordinates | None] = {"t": None, "logsnr": VP_LAM, "sigma / alpha": EDM, "flow time": FLOW}

ADAPTIVE: list[Solver[Any]] = [
    *(TorchDiffEq(method) for method in TorchDiffEq.ADAPTIVE),
    *(ScipyODE(method) for method in ScipyODE.METHODS),
]


def inside(solver: Solver[Any], variable: str) -> Solver[Any]:
    path = VARIABLES[variable]
    return solver if path is None else OnPath(solver, path)


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("solver", ADAPTIVE, ids=lambda s: f"{type(s).__name__}-{s.method}")
def test_every_adaptive_method_follows_its_tolerance_in_every_variable(
    solver: Solver[Any], variable: str, vp: Any
) -> None:
    """Two samples of a Gaussian, whose ODE keeps every state at its number of standard deviations."""
    problem, ends = gaussian(vp, 0.0, 0.5), torch.tensor([vp.t_max, vp.t_min], dtype=torch.float64)
    std = ((0.5 * vp.alpha(ends)) ** 2 + vp.sigma(ends) ** 2).sqrt()
    x = std[0] * torch.tensor([[-1.5], [0.5]], dtype=torch.float64)
    done = solve(problem, x, solver=inside(solver, variable), tol=1e-4)
    assert (done.x - x * std[1] / std[0]).abs().max() < 4e-3
    assert 20 < done.nfe < 2000


@pytest.mark.parametrize("solver", ADAPTIVE, ids=lambda s: f"{type(s).__name__}-{s.method}")
def test_a_prediction_that_is_no_number_is_named_and_not_the_library_s_distress(solver: Solver[Any], vp: Any) -> None:
    whole = gaussian(vp)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        x0, eps = whole.predict(x, t)
        bad = (t < 0.5) & (torch.arange(len(x)) > 0)
        return Prediction(x0, eps.where(~bad[:, None], torch.nan))

    with pytest.raises(FloatingPointError, match=r"prediction in step 1 at t = 0.4.*first bad sample: 1\)") as error:
        solve(DiffusionProblem(vp, predict), starts(whole, 3), solver=solver, tol=1e-3)
    assert solver.method in str(error.value)
    wrong = DiffusionProblem(vp, lambda x, t: Prediction(*(part[:1] for part in whole.predict(x, t))))
    with pytest.raises(ValueError, match=r"step 1, t = 1: the prediction has shape \(1, 2\)"):
        solve(wrong, starts(whole, 3), solver=solver, tol=1e-3)


FIXED: list[Solver[Any]] = [
    *(TorchDiffEq(method) for method in TorchDiffEq.FIXED),
    TorchDiffEq("explicit_adams"),
    TorchDiffEq("implicit_adams", 1e-10, 1e-12),
]


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
@pytest.mark.parametrize("solver", FIXED, ids=lambda s: s.method)
def test_fixed_steps_have_their_order(
    solver: Solver[Any], problems: Problems, answers: dict[str, Tensor], vp: Any
) -> None:
    assert local_order(solver, vp, warm=True).slope == pytest.approx(solver.order + 1, abs=0.25)
    for variable, name in (("t", "vp"), ("flow time", "ve")):
        x = starts(problems[name])
        measured = measured_order(inside(solver, variable), problems[name], x, steps=(20, 40), answer=answers[name])
        assert measured.slope > solver.order - 0.2, f"{variable}: {measured}"


@pytest.mark.parametrize("tol", [1e-3, 1e-5])
def test_fehlberg2_knows_little_of_its_error(tol: float) -> None:
    """dx/dt = -x over one unit of time by the library alone: a hundred times the tolerance, as its pair is."""
    start, ends = torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    odeint = pytest.importorskip("torchdiffeq").odeint
    found = odeint(lambda t, x: -x, start, ends, rtol=tol, atol=tol, method="fehlberg2")[-1]
    assert float(found) - math.exp(-1) > 80 * tol
    assert "fehlberg2" not in {getattr(solver, "method", "") for solver in SOLVERS.values()}
    h = 0.5  # one step of Fehlberg's 1(2) from x = 1, and what it says of it
    second = -(1 - h / 2)
    third = -(1 + h * (-1 / 256 + 255 / 256 * second))
    reached, estimate = 1 + h * (-1 / 512 + 255 / 256 * second + third / 512), h * (third + 1) / 512
    assert reached - math.exp(-h) > 40 * estimate


def test_adams_needs_room_to_start() -> None:
    with pytest.raises(ValueError, match="at least 4 equal steps in a step of the grid, got 3"):
        TorchDiffEq("explicit_adams", parts=3)


SDES = [
    *(TorchSDE(method, path=None) for method in TorchSDE.METHODS),
    *(TorchSDE(method, 0.5, path=path) for method in ("euler", "heun") for path in (EDM, FLOW)),
]


@pytest.mark.parametrize("solver", SDES, ids=lambda s: f"{s.method}-{s.path and type(s.path.clock).__name__}")
def test_every_sde_method_in_every_variable(solver: TorchSDE, path: Any) -> None:
    for measured in weak_order(solver, path, logsnr, steps=(40, 80, 160)):
        assert measured.attains(solver.order), measured
    assert all(scale.right for scale in noise_scale(solver, path))


def test_where_the_noise_is_additive_methods_meet(vp: Any) -> None:
    problem = gaussian(vp)
    x, ts = starts(problem, 3), logsnr(vp, 12)

    def run(method: str) -> Tensor:
        return integrate(TorchSDE(method), problem, x, ts, noise=BrownianMotion(x, 2)).x

    assert torch.allclose(run("log_ode"), run("midpoint"), atol=1e-12)
    assert torch.allclose(run("reversible_heun"), run("heun"), atol=1e-12)
    assert not torch.allclose(run("heun"), run("midpoint"), atol=1e-6)


def test_in_the_clock_of_the_noise_srk_is_sra1(vp: Any) -> None:
    problem = gaussian(vp)
    x, ts = starts(problem, 3), logsnr(vp, 8)
    ours, theirs = (
        integrate(solver, problem, x, ts, noise=BrownianMotion(x, 2)).x
        for solver in (OnPath(SRA1(), VP_LAM), TorchSDE("srk"))
    )
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_half_an_order_more_needs_the_clock_of_the_noise() -> None:
    assert TorchSDE("srk").strong_order == 1.5
    assert TorchSDE("srk", path=EDM).strong_order == 1.0
    assert TorchSDE("srk", path=None).strong_order == 1.0
