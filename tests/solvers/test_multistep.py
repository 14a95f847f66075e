"""Adams-Bashforth in any variable and the pseudo numerical methods: formulas, what is exact, one step's order."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from solvers import (
    DDIM,
    EDM,
    FLOW,
    IPNDM,
    ODE,
    PLMS,
    PNDM,
    RK4,
    SOLVERS,
    VP_LAM,
    AdamsBashforth,
    BrownianMotion,
    DEISrhoAB,
    DiffusionProblem,
    GradientEstimation,
    IPNDMv,
    OnPath,
    Prediction,
    PseudoRungeKutta,
    dense,
    integrate,
)
from solvers.certify import exact, measured_order, starts, uneven
from solvers.grids import logsnr

Problems = dict[str, DiffusionProblem]


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# --- Adams-Bashforth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5])
def test_adams_bashforth_is_exact_for_polynomials_on_any_steps(p: int) -> None:
    """dx/dt = t^k for k < p, from p exact slopes; and not for t^p."""
    ts = torch.cumsum(numbers(0.1, 0.3, 0.05, 0.2, 0.07, 0.15), 0)
    for k in range(p + 1):
        ode = ODE(lambda x, t, k=k: t**k * torch.ones_like(x))
        method, x = AdamsBashforth(p), torch.zeros(1, 1, dtype=torch.float64)
        state = method.init(ode, x, ts)
        for i in range(5):
            x = torch.full_like(x, float(ts[i]) ** (k + 1) / (k + 1))
            x, state = method.step(ode, x, ts[i], ts[i + 1], state, None)  # type: ignore[arg-type]
        error = abs(float(x) - float(ts[5]) ** (k + 1) / (k + 1))
        assert (error < 1e-14) == (k < p), (k, error)


@pytest.mark.parametrize(("p", "constants"), [(2, (3 / 2, -1 / 2)), (3, (23 / 12, -16 / 12, 5 / 12))])
def test_on_equal_steps_the_weights_are_the_textbooks(p: int, constants: tuple[float, ...]) -> None:
    t = 0.7 - 0.1 * torch.arange(p, dtype=torch.float64)
    assert AdamsBashforth.weights(t, torch.tensor(0.8, dtype=torch.float64)).tolist() == pytest.approx(
        [0.1 * c for c in constants], abs=1e-14
    )


@pytest.mark.parametrize("p", [1, 2, 4])
def test_in_rho_it_is_lms_and_deis(p: int, problems: Problems) -> None:
    for name, problem in problems.items():
        x, ts = starts(problem, 4), uneven(problem.path, 12)
        ours = integrate(OnPath(AdamsBashforth(p), EDM), problem, x, ts).x
        assert gap(ours, integrate(DEISrhoAB(p - 1), problem, x, ts).x) < 1e-11, name


def test_v_adams_is_exact_where_the_flow_is_straight(paths: dict[str, Any]) -> None:
    """A point: x0 and eps - x0 do not change along the way, whatever the grid and the path."""
    point = numbers(0.3, -0.8)
    for path in paths.values():
        problem = DiffusionProblem(
            path, lambda x, t, path=path: Prediction(point + 0 * x, (x - path.alpha(t) * point) / path.sigma(t))
        )
        x = starts(problem, 3)
        ts = uneven(path, 5)
        eps = (x - path.alpha(ts[0]) * point) / path.sigma(ts[0])
        done = integrate(OnPath(AdamsBashforth(3), FLOW), problem, x, ts).x
        assert gap(done, path.alpha(ts[-1]) * point + path.sigma(ts[-1]) * eps) < 1e-12


@pytest.mark.parametrize("coordinates", [None, EDM, FLOW, VP_LAM], ids=["t", "rho", "flow time", "lam"])
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_one_step_with_exact_history_errs_by_one_order_more(p: int, coordinates: Any, problems: Problems) -> None:
    """Local truncation order p + 1: states and slopes before the step are those of the exact solution."""
    problem = problems["vp"]
    path, x = problem.path, starts(problem, 8)
    solver = AdamsBashforth(p) if coordinates is None else OnPath(AdamsBashforth(p), coordinates)

    def at(t: Tensor) -> Tensor:
        class Until:
            t_min = float(t)

            def __getattr__(self, name: str) -> Any:
                return getattr(path, name)

        return exact(DiffusionProblem(Until(), problem.predict), x)

    errors = []
    for h in (0.1, 0.05):
        lam = numbers(*[0.3 - h * w for w in (2.9, 2.1, 0.8, 0.0, -1.0)])
        ts = path.time(2 * lam)
        state = solver.init(problem, x, ts)
        states = [at(t) for t in ts]
        for i in range(4):
            stepped, state = solver.step(problem, states[i], ts[i], ts[i + 1], state, None)  # type: ignore[arg-type]
        errors.append(gap(stepped, states[4]))
    assert math.log2(errors[0] / errors[1]) > p + 1 - 0.4, errors


def test_a_step_that_another_took_is_remembered_as_the_slope_it_was(problems: Problems) -> None:
    for problem in problems.values():
        x, ts = starts(problem, 3), uneven(problem.path, 6)
        solver = AdamsBashforth(2)
        state = solver.observe(solver.init(problem, x, ts), problem.path.logsnr(ts[1]) / 2, problem.predict(x, ts[1]))
        assert gap(state.seen[0].velocity, problem.velocity(x, ts[1])) < 1e-9 * float(x.abs().max())
        assert float(state.seen[0].t) == pytest.approx(float(ts[1]), rel=1e-12)
    state = solver.init(ODE(lambda x, t: x), x, ts)
    with pytest.raises(TypeError, match="makes no predictions"):
        solver.observe(state, ts[0], Prediction(x, x))


def test_planned_weights_are_those_of_the_steps(problems: Problems) -> None:
    problem, solver = problems["flow"], AdamsBashforth(3)
    x, ts = starts(problem, 2), uneven(problem.path, 9)
    for forget in (False, True):
        state, y = solver.init(problem, x, ts), x
        state = state._replace(planned=lambda key: None) if forget else state
        for t, s in pairwise(ts):
            assert forget or state.planned((s.item(), *[k.item() for k in (t, *[o.t for o in state.seen[:2]])]))
            y, state = solver.step(problem, y, t, s, state, None)  # type: ignore[arg-type]
        assert gap(y, integrate(solver, problem, x, ts).x) < 1e-13


def test_dense_output(problems: Problems) -> None:
    """The polynomial of the velocities says the state in between."""
    problem = problems["vp"]
    x, ts = starts(problem), logsnr(problem.path, 80)
    fine = integrate(RK4(), problem, x, logsnr(problem.path, 400), save="all")
    output = dense(AdamsBashforth(3), problem, x, ts)
    assert fine.xs is not None
    assert gap(output(fine.ts[1::7]), fine.xs[1::7]) < 2e-3


# --- Gradient estimation ----------------------------------------------------------------------------------------------


def test_gradient_estimation_in_its_papers_own_notation(problems: Problems) -> None:
    """x_(t-1) = x_t + (sigma_(t-1) - sigma_t) (gamma eps_t + (1 - gamma) eps_(t+1)), on alpha = 1."""
    problem = problems["ve"]
    x, ts = starts(problem, 3), uneven(problem.path, 7)
    y, before = x, None
    for t, s in pairwise(ts):
        eps = problem.predict(y, t).eps
        mean = eps if before is None else 2 * eps - before
        y, before = y + (problem.path.sigma(s) - problem.path.sigma(t)) * mean, eps
    assert gap(y, integrate(GradientEstimation(), problem, x, ts).x) < 1e-12
    ddim = integrate(DDIM(), problem, x, ts).x
    assert gap(integrate(GradientEstimation(1.0), problem, x, ts).x, ddim) < 1e-12


# --- Pseudo numerical methods -----------------------------------------------------------------------------------------


def _transfer(path: Any, x: Tensor, e: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Liu et al. 2022, eq. 11, with alpha-bar = alpha^2: DDIM with e in the place of eps."""
    x0 = (x - path.sigma(t) * e) / path.alpha(t)
    return path.alpha(s) * x0 + path.sigma(s) * e


def _pndm(problem: DiffusionProblem, x: Tensor, ts: Tensor, start: str) -> Tensor:
    """The authors' algorithm, written down plainly."""
    path, seen = problem.path, []
    for i, (t, s) in enumerate(pairwise(ts)):
        e1 = problem.predict(x, t).eps
        seen.append(e1)
        if start == "prk" and i < 3:
            m = (t + s) / 2
            e2 = problem.predict(_transfer(path, x, e1, t, m), m).eps
            e3 = problem.predict(_transfer(path, x, e2, t, m), m).eps
            e4 = problem.predict(_transfer(path, x, e3, t, s), s).eps
            e = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        elif start == "heun" and i == 0:
            e = (e1 + problem.predict(_transfer(path, x, e1, t, s), s).eps) / 2
        elif len(seen) == 1:
            e = e1
        elif len(seen) == 2:
            e = (3 * seen[-1] - seen[-2]) / 2
        elif len(seen) == 3:
            e = (23 * seen[-1] - 16 * seen[-2] + 5 * seen[-3]) / 12
        else:
            e = (55 * seen[-1] - 59 * seen[-2] + 37 * seen[-3] - 9 * seen[-4]) / 24
        x = _transfer(path, x, e, t, s)
    return x


@pytest.mark.parametrize(("solver", "start"), [(PNDM(), "prk"), (PLMS(), "heun"), (IPNDM(), "none")], ids=repr)
def test_pndm_is_the_papers_algorithm(solver: Any, start: str, path: Any, problems: Problems) -> None:
    problem = next(problem for problem in problems.values() if problem.path is path)
    x, ts = starts(problem, 3), uneven(path, 8)
    done = integrate(solver, problem, x, ts)
    assert gap(done.x, _pndm(problem, x, ts, start)) < 1e-11
    assert done.nfe == solver.nfe(8) == 8 + {"prk": 9, "heun": 1, "none": 0}[start]


class InRho:
    """Uniform in rho = sigma / alpha, where the constants belong."""

    def __call__(self, path: Any, n: int) -> Tensor:
        ends = (-path.logsnr(numbers(path.t_max, path.t_min)) / 2).exp()
        ts = path.time(-2 * torch.lerp(ends[0], ends[1], torch.linspace(0, 1, n + 1, dtype=torch.float64)).log())
        ts[0], ts[-1] = path.t_max, path.t_min
        return ts


def test_the_constants_are_of_order_four_on_equal_steps_in_rho(mixture: Any) -> None:
    from sdegen.paths import VE

    problem = mixture.problem(VE(0.2, 4.0))
    for solver, grid, least, most in (
        (PNDM(), InRho(), 3.6, 4.6),
        (PNDM(), logsnr, 1.7, 2.3),
        (PNDM(), uneven, 0.7, 1.3),
    ):
        measured = measured_order(solver, problem, starts(problem), grid, steps=(80, 160))
        assert least < measured.slope < most, (grid, measured)


def test_ipndm_v_as_coded_and_as_meant(problems: Problems, answers: dict[str, Tensor]) -> None:
    problem = problems["vp"]
    x, ts = starts(problem), uneven(problem.path, 10)
    meant = integrate(IPNDMv(corrected=True), problem, x, ts).x
    assert gap(meant, integrate(DEISrhoAB(3), problem, x, ts).x) < 1e-13
    assert gap(integrate(IPNDMv(), problem, x, ts).x, meant) > 1e-4
    even = InRho()(problem.path, 10)
    assert gap(*(integrate(IPNDMv(corrected=c), problem, x, even).x for c in (False, True))) < 1e-9
    for r in (2, 3):
        coded, fixed = (
            measured_order(IPNDMv(r, corrected=c), problem, x, uneven, steps=(160, 320), answer=answers["vp"])
            for c in (False, True)
        )
        assert 1.6 < coded.slope < 2.3, coded
        assert fixed.slope > r + 0.7, fixed


def test_ipndm_v_has_the_coefficients_of_its_code() -> None:
    """The formula of diff-sampler's sampler of order 3, with its parenthesis where it is."""
    rho = numbers(2.0, 1.4, 1.1, 0.7)  # previous, previous, now, next
    h2, h1, h = (rho[i + 1] - rho[i] for i in range(3))
    second = (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
    coded = torch.stack([(2 + h / h1) / 2 + second, -(h / h1) / 2 - (1 + h1 / h2) * second, second * h1 / h2])
    lam = -rho.log()
    weights = IPNDMv(2).weights(None, lam[:3].flip(0), lam[3])  # type: ignore[arg-type]
    # new w_j = alpha_s (rho_s - rho_t) c_j with new = -sigma_s
    assert torch.allclose(-rho[3] * weights, h * coded, atol=1e-13)


def test_the_pseudo_runge_kutta_step_has_the_middle_of_t(problems: Problems) -> None:
    asked: list[float] = []
    problem = problems["flow"]

    def predict(x: Tensor, t: Tensor) -> Prediction:
        asked.append(float(t))
        return problem.predict(x, t)

    x = starts(problem, 2)
    integrate(PseudoRungeKutta(), DiffusionProblem(problem.path, predict), x, numbers(0.9, 0.5))
    assert asked == pytest.approx([0.9, 0.7, 0.7, 0.5])


def test_bad_settings_are_refused_in_one_line() -> None:
    for make, words in (
        (lambda: AdamsBashforth(0), "1 to 8"),
        (lambda: IPNDM(5), "1 to 4"),
        (lambda: IPNDMv(4), "1 to 4"),
        (lambda: GradientEstimation(0.0), "gamma is positive"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_nodes_that_nearly_meet_amplify_the_rounding_of_what_remembers(problems: dict[str, DiffusionProblem]) -> None:
    """float32 against float64, with a step of 1e-6 among twenty: differences of predictions are divided by it."""
    problem = problems["vp"]
    x, even = starts(problem).float(), logsnr(problem.path, 20)
    near = torch.cat([even[:11], even[10:11] - 1e-6, even[11:]])

    def rounding(name: str, ts: Tensor) -> float:
        noise = BrownianMotion(x.double(), 0)
        coarse, fine = (integrate(SOLVERS[name], problem, y, ts, noise=noise).x for y in (x, x.double()))
        return float((coarse - fine).abs().max())

    for name in ("ddim", "heun"):
        assert rounding(name, near) < 3 * rounding(name, even), name
    for name in ("dpmpp_2m", "unipc_3", "sa_solver"):
        assert 1e-5 < rounding(name, near) < 1e-2, name
        assert rounding(name, even) < 3e-6, name
