"""Combinators: the parts are what they were, and the whole has the order that it says."""

from __future__ import annotations

from copy import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdegen.paths import VP as MakeVP
from sdegen.paths import Flow, LinearLogSNR
from solvers import (
    DDIM,
    EDM,
    FLOW,
    RK4,
    SOLVERS,
    VP_LAM,
    AdamsBashforth,
    Ancestral,
    BrownianMotion,
    Chord,
    Circle,
    DiffusionProblem,
    Euler,
    FinalStep,
    Heun,
    InScaling,
    Midpoint,
    OnPath,
    Prediction,
    Ray,
    Solver,
    Warmup,
    integrate,
)
from solvers.certify import certify, contract, gaussian, starts, uneven
from solvers.grids import karras, logsnr

COMBINED = [
    Warmup(Heun(), SOLVERS["dpmpp_2m"]),
    Warmup(Ancestral(), DDIM(), steps=3),
    Warmup(Euler(), RK4()),
    FinalStep(Heun(), Euler()),
    FinalStep(OnPath(Heun(), EDM), DDIM()),
    FinalStep(Ancestral(), DDIM()),
    OnPath(RK4(), VP_LAM),
    OnPath(SOLVERS["dpmpp_2m"], FLOW),
    OnPath(Ancestral(), EDM),
    InScaling(Heun(), Ray()),
    InScaling(RK4(), Chord()),
    OnPath(Warmup(Midpoint(), SOLVERS["dpmpp_2m"]), EDM),
]


@pytest.mark.parametrize("solver", COMBINED, ids=repr)
def test_a_combination_holds_what_it_declares(solver: Solver, vp) -> None:
    failed = [str(check) for check in contract(solver, vp) if not check.passed]
    assert not failed, "\n".join(failed)


def test_a_start_of_low_order_costs_order(problems: dict[str, DiffusionProblem], answers: dict[str, Tensor]) -> None:
    """Euler's first step leaves RK4 at order 2. It declares 2, and not more than 2 is there."""
    solver = Warmup(Euler(), RK4())
    assert solver.order == 2
    certificate = certify(solver, {"ve": problems["ve"]}, grids=["uneven"], answers=answers)
    assert certificate.passed, f"\n{certificate}"


def test_a_last_step_of_lower_order_costs_none_when_it_is_one_lower(
    problems: dict[str, DiffusionProblem], answers: dict[str, Tensor]
) -> None:
    solver = FinalStep(Heun(), Euler())
    assert (solver.order, solver.nfe(10), solver.nfe(1)) == (2, 19, 1)
    certificate = certify(solver, {"flow": problems["flow"]}, answers=answers)
    assert certificate.passed, f"\n{certificate}"


def test_a_warm_up_costs_no_second_look(vp) -> None:
    """The multistep method is handed what its start predicted: the second step extrapolates from the first."""
    problem = gaussian(vp)
    x, ts = starts(problem), logsnr(vp, 6)
    warm = integrate(Warmup(DDIM(), SOLVERS["dpmpp_2m"]), problem, x, ts)
    plain = integrate(SOLVERS["dpmpp_2m"], problem, x, ts)
    assert warm.nfe == plain.nfe == 6
    assert torch.allclose(warm.x, plain.x, atol=1e-14), "its own start is DDIM"
    assert integrate(Warmup(RK4(), SOLVERS["dpmpp_2m"], steps=2), problem, x, ts).nfe == 2 * 4 + 4


def test_edm_is_heun_on_the_ray(vp) -> None:
    """Karras et al. 2022, algorithm 1 with s = 1 and sigma(t) = t, written out."""
    problem = gaussian(vp)
    x, ts = starts(problem), karras(vp, 12)
    y = x / vp.alpha(ts[0])
    sigmas = (-vp.logsnr(ts) / 2).exp()

    def slope(y: Tensor, i: int) -> Tensor:
        return (y - problem.predict(vp.alpha(ts[i]) * y, ts[i]).x0) / sigmas[i]

    for i in range(12):
        d = slope(y, i)
        ahead = y + (sigmas[i + 1] - sigmas[i]) * d
        y = y + (sigmas[i + 1] - sigmas[i]) * (d + slope(ahead, i + 1)) / 2
    ours = integrate(SOLVERS["edm_heun"], problem, x, ts).x
    assert torch.allclose(ours, vp.alpha(ts[-1]) * y, atol=1e-12)
    assert SOLVERS["edm_heun"].grid == "karras"


def test_a_flow_step_is_a_straight_line() -> None:
    """Euler in flow coordinates is DDIM; x_s = x + (s - t)(eps - x0) on the flow path itself."""
    path = Flow(t_min=0.02, t_max=0.98)
    problem = gaussian(path)
    x, ts = starts(problem), logsnr(path, 7)
    by_hand = x
    for t, s in zip(ts[:-1], ts[1:], strict=True):  # noqa: RUF007
        x0, eps = problem.predict(by_hand, t)
        by_hand = by_hand + (s - t) * (eps - x0)
    for solver in (OnPath(Euler(), FLOW), Euler(), DDIM()):
        assert torch.allclose(integrate(solver, problem, x, ts).x, by_hand, atol=1e-12)


def test_coordinates_that_are_the_problems_own_change_nothing() -> None:
    path = MakeVP(LinearLogSNR(8, -8))
    problem = gaussian(path)
    x, ts = starts(problem), logsnr(path, 9)
    assert torch.allclose(
        integrate(InScaling(Heun(), Circle()), problem, x, ts).x, integrate(Heun(), problem, x, ts).x, atol=1e-12
    )


COMBINING = [Euler(), Midpoint(), RK4(), AdamsBashforth(3), Warmup(RK4(), AdamsBashforth(4), steps=2)]


@pytest.mark.parametrize("coordinates", [EDM, FLOW, VP_LAM], ids=repr)
@pytest.mark.parametrize("solver", COMBINING, ids=repr)
def test_another_curve_in_the_coefficients_is_that_curve(solver: Solver, coordinates, vp) -> None:
    """The same method, made to be handed states of the other curve."""
    problem, plain = gaussian(vp), copy(solver)
    assert solver.combines
    plain.declare(combines=False)
    for ts in (uneven(vp, 12), uneven(vp, 12).flip(0)):
        x = starts(problem)
        folded, scaled = (integrate(OnPath(one, coordinates), problem, x, ts) for one in (solver, plain))
        assert torch.allclose(folded.x, scaled.x, rtol=1e-10, atol=1e-10)
        assert folded.nfe == scaled.nfe


class Passes(TorchDispatchMode):
    """Counts operations that make or change a whole state."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += isinstance(out, Tensor) and out.shape == self.shape
        return out


@pytest.mark.parametrize(
    ("solver", "passes"),
    [
        (Euler(), 2),
        (OnPath(Euler(), FLOW), 2),  # a x + b eps, in the coordinates of the problem
        (OnPath(Euler(), EDM), 2),
        (OnPath(Heun(), EDM), 2 + 3),  # a stage, and the step: x and two eps
        (OnPath(Heun(), FLOW), 2 + 4),  # and the stage, which has a velocity of its own
        (InScaling(Euler(), Ray()), 2),
        (OnPath(DDIM(), FLOW), 2 + 3),  # it does not combine: there, for the network, and back
    ],
    ids=repr,
)
def test_another_curve_costs_no_pass_over_the_state(solver: Solver, passes: int, vp) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    known = Prediction(torch.ones(2, 3), torch.zeros(2, 3))
    problem = DiffusionProblem(vp, lambda x, t: Prediction(known.x0[:], known.eps[:]))
    counts = []
    for steps in (5, 15):
        with Passes(x.shape) as counted:
            integrate(solver, problem, x, logsnr(vp, steps))
        counts.append(counted.count)
    views = 2 * solver.nfe_per_step
    assert (counts[1] - counts[0]) / 10 == passes + views


def test_what_sees_no_curve_may_run_on_any(vp) -> None:
    problem = gaussian(vp)
    x, ts = starts(problem), logsnr(vp, 9)
    for name in ("ddim", "dpmpp_2m", "ancestral"):
        plain, moved = (
            integrate(solver, problem, x, ts, noise=BrownianMotion(x, 0)).x
            for solver in (SOLVERS[name], OnPath(SOLVERS[name], EDM))
        )
        assert torch.allclose(plain, moved, atol=1e-11), name


def test_tolerance_reaches_the_method_inside() -> None:
    assert SOLVERS["dopri5_lam"].with_tolerance(1e-9).solver.rtol == 1e-9
    with pytest.raises(ValueError, match="fixed steps"):
        OnPath(Heun(), EDM).with_tolerance(1e-3)


def test_a_warm_up_has_steps() -> None:
    with pytest.raises(ValueError, match="at least one step, got 0"):
        Warmup(Euler(), Heun(), steps=0)
