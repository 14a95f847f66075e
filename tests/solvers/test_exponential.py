"""The deterministic exponential family: weights against quadrature, formulas against the papers', one step's order."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from solvers import (
    DDIM,
    EDM,
    RK4,
    SOLVERS,
    DEISrhoAB,
    DEIStAB,
    DiffusionProblem,
    DPMSolver1,
    DPMSolver2M,
    DPMSolver2S,
    DPMSolver3M,
    DPMSolver3S,
    DPMSolverPP1,
    DPMSolverPP2M,
    DPMSolverPP2S,
    DPMSolverPP3M,
    DPMSolverPP3S,
    ExponentialAdams,
    Heun,
    OnPath,
    Prediction,
    Solver,
    UniC,
    UniP,
    UniPC,
    Warmup,
    dense,
    integrate,
    trace,
)
from solvers.certify import exact, gaussian, measured_order, starts, uneven
from solvers.exponential import FORMS, ExponentialMultistep, interpolating, phi, phis
from solvers.grids import logsnr, uniform

Problems = dict[str, DiffusionProblem]


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# --- Integrals --------------------------------------------------------------------------------------------------------


def test_phi_to_the_last_digits() -> None:
    """Against sixty digits, on both sides of every border between series and recursion."""
    mp = pytest.importorskip("mpmath")
    mp.mp.dps = 60
    zs = [0.0, 1e-300, 1e-9, 0.3, 0.999, 1.0, 2.0, 2.001, 3.0, 4.5, 5.0, 8.0, 8.999, 9.0, 9.1, 20.0, 50.0]
    for z in zs + [-z for z in zs]:
        got = phis(8, torch.tensor(z, dtype=torch.float64))
        for k in range(1, 9):
            true = mp.hyp1f1(1, k + 1, mp.mpf(z)) / mp.factorial(k)
            assert abs(mp.mpf(float(got[k - 1])) - true) < 2e-15 * true, (k, z)
            assert float(phi(k, torch.tensor(z, dtype=torch.float64))) == float(got[k - 1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("h", [0.7, -0.7, 3.0])
def test_moments_are_the_integrals_they_are_said_to_be(form: str, h: float) -> None:
    sign = FORMS[form].sign
    got = FORMS[form].moments(torch.tensor(h, dtype=torch.float64), 6)
    for k in range(6):
        true = quad(lambda u, k=k: (u / h) ** k * math.exp(sign * (h - u)), 0, h, epsabs=1e-14)[0]
        assert float(got[k]) == pytest.approx(true, rel=1e-13)
    assert float(FORMS[form].zeroth(torch.tensor(h, dtype=torch.float64))) == pytest.approx(float(got[0]), rel=1e-14)


def test_weights_of_interpolation_are_exact_for_polynomials() -> None:
    r = numbers(0.0, -0.3, -1.7, -1.9, 1.0)
    w = interpolating(r, 1 / torch.arange(1.0, 6.0, dtype=torch.float64))  # of INT_0^1
    for k in range(5):
        assert float((w * r**k).sum()) == pytest.approx(1 / (k + 1), rel=1e-12)
    assert abs(float((w * r**5).sum()) - 1 / 6) > 1e-3


# --- What is exact ----------------------------------------------------------------------------------------------------


def polynomial(path: Any, form: str, of: Callable[[Tensor], Tensor]) -> DiffusionProblem:
    """A prediction that does not look at the state: P(t) = of(t)."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return FORMS[form].tied(Prediction(*[of(t) + 0 * x] * 2), x, path.alpha(t), path.sigma(t))

    return DiffusionProblem(path, predict)


def _lam(path: Any, t: Tensor) -> Tensor:
    return path.logsnr(t) / 2


EXACT = {
    "x0, lam": (lambda p: ExponentialAdams(p, "x0"), _lam),
    "eps, lam": (lambda p: ExponentialAdams(p, "eps"), _lam),
    "eps, t": (lambda p: DEIStAB(p - 1), lambda path, t: t),
    "eps, rho": (lambda p: DEISrhoAB(p - 1), lambda path, t: torch.exp(-_lam(path, t))),
    "corrected": (lambda p: UniPC(p, "x0"), _lam),
}


@pytest.mark.parametrize("what", EXACT)
@pytest.mark.parametrize("p", [3, 4])
def test_a_method_is_exact_where_its_polynomial_is(what: str, p: int, path: Any) -> None:
    """x0 (or eps) a polynomial of degree p - 1 in the method's variable: every step after the start is exact."""
    make, variable = EXACT[what]
    solver = make(p)
    coefficients = [0.3, -0.8, 0.5, 0.2][:p]
    scale = float(variable(path, numbers(path.t_max)).abs())

    def of(t: Tensor) -> Tensor:
        v = variable(path, t) / scale
        return sum((c * v**k for k, c in enumerate(coefficients)), torch.zeros_like(t))

    form = solver.form
    problem = polynomial(path, form, of)
    ts = uneven(path, 12)
    run = integrate(solver, problem, starts(problem, 2, (1,)), ts, save="all")
    begin = p + (what == "corrected") * (p > 2)  # the start is of lower order
    lam_a, lam_b = (float(_lam(path, ts[i])) for i in (begin, -1))
    sign = FORMS[form].sign

    def integrand(lam: float) -> float:
        t = path.time(torch.tensor(2 * lam, dtype=torch.float64))
        return math.exp(sign * (lam_b - lam)) * float(of(t))

    kept, new = FORMS[form].factors(path, ts[begin], ts[-1])
    expected = kept * run.xs[begin] + new * quad(integrand, lam_a, lam_b, epsabs=1e-13, epsrel=1e-13, limit=200)[0]
    scale = float(run.x.abs().max()) + float(new.abs())
    assert gap(run.x, expected) < 2e-12 * scale * (10 if what == "eps, rho" else 1)


# --- The formulas of the papers, written down once more ---------------------------------------------------------------


def coefficients(path: Any, ts: Tensor) -> tuple[list[float], list[float], list[float]]:
    return path.alpha(ts).tolist(), path.sigma(ts).tolist(), (path.logsnr(ts) / 2).tolist()


def dpm_multistep(order: int, pp: bool, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> Tensor:
    """multistep_dpm_solver_{first, second, third}_update, solver_type "dpmsolver"."""
    al, si, lam = coefficients(problem.path, ts)
    P: list[Tensor] = []
    for i in range(len(ts) - 1):
        pair = problem.predict(x, ts[i])
        P.append(pair.x0 if pp else pair.eps)
        h = lam[i + 1] - lam[i]
        q = min(order, i + 1)
        kept = si[i + 1] / si[i] if pp else al[i + 1] / al[i]
        if pp:
            phi1 = math.expm1(-h)
            phi2, new = phi1 / h + 1, al[i + 1]
            phi3 = phi2 / h - 0.5
        else:
            phi1 = math.expm1(h)
            phi2, new = phi1 / h - 1, si[i + 1]
            phi3 = phi2 / h - 0.5
        x = kept * x - new * phi1 * P[i]
        if q >= 2:
            r0 = (lam[i] - lam[i - 1]) / h
            D1_0 = (P[i] - P[i - 1]) / r0
        if q == 2:
            x = x - 0.5 * new * phi1 * D1_0
        if q == 3:
            r1 = (lam[i - 1] - lam[i - 2]) / h
            D1_1 = (P[i - 1] - P[i - 2]) / r1
            D1 = D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1)
            D2 = (D1_0 - D1_1) / (r0 + r1)
            x = x + new * phi2 * D1 - new * phi3 * D2 if pp else x - new * phi2 * D1 - new * phi3 * D2
    return x


def dpm_singlestep(order: int, pp: bool, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> Tensor:
    """singlestep_dpm_solver_{second, third}_update with r1 = 1/2, and r1, r2 = 1/3, 2/3."""
    path = problem.path

    def scales(t: Tensor) -> tuple[float, float]:
        return float(path.alpha(t)), float(path.sigma(t))

    def ask(x: Tensor, t: Tensor) -> Tensor:
        pair = problem.predict(x, t)
        return pair.x0 if pp else pair.eps

    for t, s in pairwise(ts):
        lam = float(path.logsnr(t)) / 2
        h = float(path.logsnr(s)) / 2 - lam
        a0, s0 = scales(t)
        P0 = ask(x, t)

        def move(target: Tensor, step: float, extra: Tensor | float = 0.0, x=x, P0=P0, a0=a0, s0=s0) -> Tensor:
            a, sg = scales(target)
            if pp:
                return (sg / s0) * x - a * math.expm1(-step) * P0 + a * extra
            return (a / a0) * x - sg * math.expm1(step) * P0 - sg * extra

        if order == 2:
            t1 = path.time(torch.tensor(2 * (lam + h / 2), dtype=torch.float64))
            P1 = ask(move(t1, h / 2), t1)
            x = move(s, h, (-math.expm1(-h) if pp else math.expm1(h)) * (P1 - P0))
        else:
            r1, r2 = 1 / 3, 2 / 3
            t1, t2 = (path.time(torch.tensor(2 * (lam + r * h), dtype=torch.float64)) for r in (r1, r2))
            P1 = ask(move(t1, r1 * h), t1)
            slope = math.expm1(-r2 * h) / (r2 * h) + 1 if pp else math.expm1(r2 * h) / (r2 * h) - 1
            P2 = ask(move(t2, r2 * h, r2 / r1 * slope * (P1 - P0)), t2)
            slope = math.expm1(-h) / h + 1 if pp else math.expm1(h) / h - 1
            x = move(s, h, slope / r2 * (P2 - P0))
    return x


def unipc(p: int, x0: bool, variant: str, problem: DiffusionProblem, x: Tensor, ts: Tensor, corrector: bool) -> Tensor:
    """multistep_uni_pc_bh_update and the vary-coefficient form, predictor and corrector one after the other."""
    al, si, lam = coefficients(problem.path, ts)

    def ask(x: Tensor, t: Tensor) -> Tensor:
        pair = problem.predict(x, t)
        return pair.x0 if x0 else pair.eps

    P = [ask(x, ts[0])]
    for i in range(len(ts) - 1):
        order = min(p, i + 1)
        h = lam[i + 1] - lam[i]
        hh = -h if x0 else h
        B = hh if variant == "bh1" else math.expm1(hh)
        r = [(lam[i - m] - lam[i]) / h for m in range(1, order)] + [1.0]
        D = [(P[i - m] - P[i]) / r[m - 1] for m in range(1, order)]
        # h^k phi_{k+1} k!, from the recursion in quadruple steps: plain floats are enough for these h
        terms, factorial, value = [], 1.0, math.expm1(hh) / hh - 1
        for k in range(1, order + 1):
            terms.append((value, factorial))
            factorial *= k + 1
            value = value / hh - 1 / factorial
        R = np.vander(r, order, increasing=True).T
        b = np.array([v * f / B for v, f in terms])
        kept, scale = (si[i + 1] / si[i], al[i + 1]) if x0 else (al[i + 1] / al[i], si[i + 1])
        base = kept * x - scale * math.expm1(hh) * P[i]

        def corrected(R: Any, b: Any, D: list[Tensor], halves: bool, base=base, scale=scale, B=B) -> Tensor:
            rho = np.array([0.5]) if halves else np.linalg.solve(R, b)
            return base - scale * B * sum((float(c) * d for c, d in zip(rho, D, strict=True)), 0 * base)

        halves = variant != "vary"
        predicted = corrected(R[:-1, :-1], b[:-1], D, halves and order == 2) if D else base
        if i + 1 == len(ts) - 1:
            return predicted
        P.append(ask(predicted, ts[i + 1]))
        x = corrected(R, b, [*D, P[i + 1] - P[i]], halves and order == 1) if corrector else predicted
    raise AssertionError


def deis_rho(r: int, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> Tensor:
    """Adams-Bashforth on dy/drho = eps, its coefficients by quadrature of the Lagrange polynomials."""
    al, si, _ = coefficients(problem.path, ts)
    rho = [s / a for s, a in zip(si, al, strict=True)]
    y, eps = x / al[0], []
    for i in range(len(ts) - 1):
        eps.append(problem.predict(al[i] * y, ts[i]).eps)
        nodes = rho[max(0, i - r) : i + 1]
        for j, node in enumerate(nodes):
            others = nodes[:j] + nodes[j + 1 :]
            lagrange = np.poly1d(others, r=True) / np.prod([node - o for o in others])
            integral = np.polyint(lagrange)
            y = y + (integral(rho[i + 1]) - integral(rho[i])) * eps[max(0, i - r) + j]
    return al[-1] * y


def deis_t(r: int, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> Tensor:
    """tAB: the coefficients C_ij by adaptive quadrature in rho."""
    path = problem.path
    al, si, _ = coefficients(path, ts)
    rho = [s / a for s, a in zip(si, al, strict=True)]
    y, eps = x / al[0], []
    for i in range(len(ts) - 1):
        eps.append(problem.predict(al[i] * y, ts[i]).eps)
        nodes = ts[max(0, i - r) : i + 1].tolist()
        for j, node in enumerate(nodes):

            def basis(rho: float, j=j, node=node, nodes=nodes) -> float:
                t = float(path.time(torch.tensor(-2 * math.log(rho), dtype=torch.float64)))
                return math.prod((t - o) / (node - o) for o in nodes[:j] + nodes[j + 1 :])

            y = y + quad(basis, rho[i], rho[i + 1], epsabs=1e-13, epsrel=1e-11)[0] * eps[max(0, i - r) + j]
    return al[-1] * y


PAPERS: dict[str, tuple[Solver[Any], Callable[..., Tensor]]] = {
    **{f"{s}": (s, lambda *a, pp=pp: dpm_multistep(1, pp, *a)) for s, pp in ((DPMSolver1(), 0), (DPMSolverPP1(), 1))},
    **{f"{s}": (s, lambda *a, pp=pp: dpm_multistep(2, pp, *a)) for s, pp in ((DPMSolver2M(), 0), (DPMSolverPP2M(), 1))},
    **{f"{s}": (s, lambda *a, pp=pp: dpm_multistep(3, pp, *a)) for s, pp in ((DPMSolver3M(), 0), (DPMSolverPP3M(), 1))},
    **{
        f"{s}": (s, lambda *a, pp=pp: dpm_singlestep(2, pp, *a)) for s, pp in ((DPMSolver2S(), 0), (DPMSolverPP2S(), 1))
    },
    **{
        f"{s}": (s, lambda *a, pp=pp: dpm_singlestep(3, pp, *a)) for s, pp in ((DPMSolver3S(), 0), (DPMSolverPP3S(), 1))
    },
    **{
        f"{make(p, form, variant)}": (
            make(p, form, variant),
            lambda *a, p=p, form=form, variant=variant, make=make: unipc(p, form == "x0", variant, *a, make is UniPC),
        )
        for make in (UniP, UniPC)
        for p in (1, 2, 3, 4)
        for form in FORMS
        for variant in ("bh1", "bh2", "vary")
        if p < 3 or variant == "bh2"
    },
    **{f"{DEISrhoAB(r)}": (DEISrhoAB(r), lambda *a, r=r: deis_rho(r, *a)) for r in (0, 1, 2, 3)},
    **{f"{DEIStAB(r)}": (DEIStAB(r), lambda *a, r=r: deis_t(r, *a)) for r in (0, 1, 2, 3)},
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_formulas_are_the_papers(name: str, problems: Problems) -> None:
    solver, paper = PAPERS[name]
    for where, n in (("vp", 9), ("flow", 7)):
        problem = problems[where]
        x, ts = starts(problem, 4), uneven(problem.path, n)
        expected = paper(problem, x, ts)
        assert gap(integrate(solver, problem, x, ts).x, expected) < 1e-10 * float(expected.abs().max()), where


# --- One method under several names -----------------------------------------------------------------------------------

SAME = {
    "DPM-Solver-1 is DDIM": (DPMSolver1(), DDIM()),
    "DPM-Solver++(1S) is DDIM": (DPMSolverPP1(), DDIM()),
    "exponential Adams of order 1 is DDIM": (ExponentialAdams(1), DDIM()),
    "DEIS of degree 0 is DDIM": (DEIStAB(0), DDIM()),
    "UniC-1 on DDIM is UniPC-1": (UniC(DDIM(), 1), UniPC(1)),
    "2M in its taylor variant is exponential Adams": (DPMSolverPP2M(taylor=True), ExponentialAdams(2)),
    "2M in its taylor variant is exponential Adams, eps": (DPMSolver2M(taylor=True), ExponentialAdams(2, "eps")),
    "UniP-2 with bh2 is 2M": (UniP(2), DPMSolverPP2M()),
    "UniP with exact coefficients is exponential Adams": (UniP(4, variant="vary"), ExponentialAdams(4)),
    "the corrected 3M is exponential Adams after a common start": (
        Warmup(DPMSolverPP2S(), DPMSolverPP3M(corrected=True), 2),
        Warmup(DPMSolverPP2S(), ExponentialAdams(3), 2),
    ),
    **{
        f"{pc} is UniC on UniP": (pc, UniC(UniP(pc.p, pc.form, pc.variant), pc.p, pc.form, pc.variant))
        for pc in (UniPC(p, form, v) for p in (1, 2, 3, 4) for form in FORMS for v in ("bh1", "bh2", "vary"))
    },
}


@pytest.mark.parametrize("what", SAME)
def test_one_method_under_two_names(what: str, problems: Problems) -> None:
    problem = problems["vp"]
    x, ts = starts(problem, 4), uneven(problem.path, 15)
    one, other = (integrate(solver, problem, x, ts, save="all").xs for solver in SAME[what])
    assert gap(one, other) < 1e-12


OURS = [name for name, solver in SOLVERS.items() if any(name.startswith(p) for p in ("dpm", "exp_", "uni", "deis"))]
CURVELESS = [name for name in OURS if not SOLVERS[name].stochastic]


@pytest.mark.parametrize("name", CURVELESS)
def test_no_method_of_the_family_sees_the_curve(name: str, problems: Problems) -> None:
    """Equal on VP, VE and flow, given one grid in logsnr; but tAB, which measures in the path's own time."""
    lam, results = torch.linspace(-3.9, 3.9, 12, dtype=torch.float64), []
    y = starts(problems["ve"], 4)
    for problem in problems.values():
        path = problem.path
        ts = path.time(2 * lam)
        results.append(integrate(SOLVERS[name], problem, path.alpha(ts[0]) * y, ts).x / path.alpha(ts[-1]))
    assert gap(results[0], results[1]) < 1e-12
    assert (gap(results[0], results[2]) < 1e-12) != ("tab" in name)


# --- One step with exact history --------------------------------------------------------------------------------------


def one_step_error(solver: ExponentialMultistep, h: float, path: Any) -> float:
    """Error of a step of length h from an exact state with exact history, steps before it of uneven lengths."""
    mean, std = 0.3, 0.5
    problem = gaussian(path, mean, std)
    back = numbers(0.0, 0.7, 1.9, 2.4, 3.9) * h
    here = -0.5  # where no method's leading error changes sign
    ts = path.time(2 * (here - back))
    end = path.time(torch.tensor(2 * (here + h), dtype=torch.float64))

    def on_the_curve(t: Tensor) -> Tensor:  # the solution through mean + 1 deviation
        return path.alpha(t) * mean + ((path.alpha(t) * std) ** 2 + path.sigma(t) ** 2).sqrt()

    state = solver.init(problem, torch.zeros(1, 1), torch.stack([ts[0], end]))
    for t in reversed(ts[1:].unbind()):
        x = on_the_curve(t).reshape(1, 1)
        state = solver.observe(state, path.logsnr(t) / 2, problem.predict(x, t))
    x = on_the_curve(ts[0]).reshape(1, 1)
    return gap(solver.step(problem, x, ts[0], end, state, None)[0], on_the_curve(end).reshape(1, 1))  # type: ignore[arg-type]


LOCAL = {
    **{f"{s}": (s, p + 1) for p in (1, 2, 3, 4) for s in (ExponentialAdams(p, "x0"), ExponentialAdams(p, "eps"))},
    **{f"{s}": (s, 3) for s in (DPMSolver2M(), DPMSolverPP2M(), DPMSolver2M(True), DPMSolverPP2M(True))},
    **{f"{s}": (s, 3) for s in (DPMSolver3M(), DPMSolverPP3M())},  # as published
    **{f"{s}": (s, 4) for s in (DPMSolver3M(corrected=True), DPMSolverPP3M(corrected=True))},
    **{f"{s}": (s, 3) for s in (UniP(2, "x0", v) for v in ("bh1", "bh2", "vary"))},
    **{f"{s}": (s, p + 1) for p in (3, 4) for s in (UniP(p, "x0"), UniP(p, "eps"))},
    **{f"{s}": (s, r + 2) for r in (0, 1, 2, 3) for s in (DEIStAB(r), DEISrhoAB(r))},
}


@pytest.mark.parametrize("name", LOCAL)
def test_local_truncation_with_exact_history(name: str, path: Any) -> None:
    solver, order = LOCAL[name]
    errors = [one_step_error(solver, h, path) for h in ((0.02, 0.01, 0.005) if order < 5 else (0.04, 0.02, 0.01))]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.15), (slopes, errors)


# --- The start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [DPMSolver3M(corrected=True), DEIStAB(2), DEISrhoAB(2)], ids=repr)
def test_a_start_at_order_one_leaves_order_two(solver: Any, problems: Problems, answers: dict[str, Tensor]) -> None:
    """Where the first steps are long in lam the start is seen; with a start of its own order it is not."""
    problem = problems["flow"]
    measure: dict[str, Any] = {"steps": (320, 640), "answer": answers["flow"]}
    risen = measured_order(solver, problem, starts(problem), uniform, **measure)
    warmed = measured_order(Warmup(DPMSolver3S(), solver, 2), problem, starts(problem), uniform, **measure)
    assert risen.slope < 2.6
    assert warmed.slope > 2.8
    assert warmed.errors[-1] < risen.errors[-1] / 1.5


@pytest.mark.parametrize("p", [3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_unipc_of_high_order(p: int, form: str, problems: Problems, answers: dict[str, Tensor]) -> None:
    """UniPC-p is of order p + 1, seen from about 200 steps on."""
    problem = problems["vp"]
    solver = Warmup({3: DPMSolverPP3S(), 4: RK4()}[p], UniPC(p, form), p - 2)
    for grid in (logsnr, uneven)[: 5 - p]:
        measured = measured_order(solver, problem, starts(problem), grid, steps=(160, 320), answer=answers["vp"])
        assert measured.slope > p + 1 - 0.2, (grid, measured)


def test_another_methods_steps_are_not_corrected(problems: Problems, answers: dict[str, Tensor]) -> None:
    """After Heun steps UniPC begins with a prediction, from an x that it did not predict."""
    problem = problems["vp"]
    x, ts = starts(problem, 4), uneven(problem.path, 10)
    whole = integrate(Warmup(Heun(), UniPC(2), 3), problem, x, ts, save="all").xs
    predicted = integrate(Warmup(Heun(), UniP(2), 3), problem, x, ts, save="all").xs
    assert torch.equal(whole[:4], predicted[:4])
    assert gap(whole[4], predicted[4]) < 1e-14
    assert gap(whole[5], predicted[5]) > 1e-4
    same = integrate(Warmup(Heun(), UniC(UniP(2), 2), 3), problem, x, ts, save="all").xs
    assert gap(whole, same) < 1e-12
    slope = measured_order(
        Warmup(Heun(), UniPC(2), 3), problem, starts(problem), uneven, steps=(80, 160), answer=answers["vp"]
    )
    assert slope.slope > 2.8


# --- UniC -------------------------------------------------------------------------------------------------------------

RAISED = {"ddim": (DDIM(), 1), "2s": (DPMSolverPP2S(), 2), "heun": (Heun(), 2), "3s": (DPMSolver3S(), 3)}


@pytest.mark.parametrize("name", RAISED)
@pytest.mark.parametrize("form", FORMS)
def test_a_corrector_raises_the_order_of_any_predictor(
    name: str, form: str, problems: Problems, answers: dict[str, Tensor]
) -> None:
    predictor, p = RAISED[name]
    solver, problem = UniC(predictor, p, form), problems["vp"]
    assert solver.order == predictor.order + 1
    measured = measured_order(solver, problem, starts(problem), uneven, steps=(80, 160), answer=answers["vp"])
    assert measured.slope > solver.order - 0.2, measured
    plain = integrate(predictor, problem, starts(problem), uneven(problem.path, 12))
    assert integrate(solver, problem, starts(problem), uneven(problem.path, 12)).nfe == plain.nfe


def test_a_corrector_of_what_corrects_itself_counts_the_order_without(
    problems: Problems, answers: dict[str, Tensor]
) -> None:
    problem = problems["vp"]
    for predictor, order in ((UniC(DDIM(), 1), 2), (UniPC(1), 2), (UniPC(2), 3), (UniC(DPMSolverPP2S(), 2), 3)):
        solver = UniC(predictor, 2)
        assert solver.order == order
        measured = measured_order(solver, problem, starts(problem), uneven, steps=(320, 640), answer=answers["vp"])
        assert measured.slope == pytest.approx(order, abs=0.2)


def test_unic_refuses_what_it_cannot_correct() -> None:
    for wrong in (SOLVERS["ancestral"], SOLVERS["dopri5"]):
        with pytest.raises(ValueError, match="fixed steps and without noise"):
            UniC(wrong)


# --- Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in OURS if isinstance(SOLVERS[n], ExponentialMultistep | UniC)])
def test_planned_rows_are_the_rows_of_the_steps(name: str, problems: Problems) -> None:
    """On a grid the rows are looked up; forgotten, they are computed step by step, and are the same."""
    solver, problem = SOLVERS[name], problems["flow"]
    if solver.stochastic:
        pytest.skip("has its own rows")
    x, ts = starts(problem, 3), uneven(problem.path, 12)
    nodes = ts.unbind()
    here = problem.at(nodes)
    missed = 0

    def counting(key: tuple[float, ...]) -> Any:
        nonlocal missed
        missed += planned(key) is None
        return planned(key)

    for forget in (False, True):
        state, y = solver.init(here, x, ts), x
        planned = state.planned
        state = state._replace(planned=(lambda key: None) if forget else counting)
        for t, s in pairwise(nodes):
            y, state = solver.step(here, y, t, s, state, None)  # type: ignore[arg-type]
        assert gap(y, integrate(solver, problem, x, ts).x) < 1e-13
    assert missed == 0


@pytest.mark.parametrize("solver", [ExponentialAdams(3), UniPC(2, "eps"), DEIStAB(2)], ids=repr)
def test_other_paths_other_dtypes_and_encoding(solver: Any, problems: Problems) -> None:
    problem = problems["vp"]
    x, ts = starts(problem, 3), uneven(problem.path, 40)
    there = integrate(OnPath(solver, EDM), problem, x, ts)
    if not isinstance(solver, DEIStAB):
        assert gap(there.x, integrate(solver, problem, x, ts).x) < 1e-11
    assert gap(there.x, exact(problem, x)) < 1e-2
    back = integrate(solver, problem, there.x, ts.flip(0)).x
    assert gap(back, x) < 2e-2
    single = integrate(solver, problem, x.float(), ts).x
    assert single.dtype == torch.float32
    assert gap(single.double(), integrate(solver, problem, x, ts).x) < 1e-4


def test_coefficients_have_gradients_in_the_grid(problems: Problems) -> None:
    """For whoever optimises a grid: the derivative of the result by a node, against a difference."""
    problem = problems["vp"]
    solver, x = UniPC(2), starts(problem, 2)

    def run(lam: Tensor) -> Tensor:
        ts = problem.path.time(2 * lam)
        state, y = solver.init(problem, x, ts), x
        for t, s in pairwise(ts.unbind()):
            y, state = solver.step(problem, y, t, s, state, None)  # type: ignore[arg-type]
        return y.sum()

    lam = torch.linspace(-3.5, 3.5, 6, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(run(lam), lam)
    for i in range(6):
        e = 1e-5 * torch.eye(6, dtype=torch.float64)[i]
        numeric = float(run(lam.detach() + e) - run(lam.detach() - e)) / 2e-5
        assert float(slope[i]) == pytest.approx(numeric, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", [n for n in CURVELESS if "dpm_1" not in n])
def test_steps_are_linear_and_have_a_table(name: str, problems: Problems) -> None:
    path = problems["vp"].path
    table = trace(SOLVERS[name], path, uneven(path, 8))
    assert table.nfe == SOLVERS[name].nfe(8)


# --- Dense output -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def between(problems: Problems) -> tuple[Tensor, Tensor]:
    """Times between the nodes, and the exact states there."""
    problem = problems["vp"]
    times = problem.path.time(numbers(-6.1, -2.3, 0.4, 2.9, 5.7))
    x = starts(problem)
    ends = [DiffusionProblem(VPTo(problem.path, float(t)), problem.predict) for t in times]
    return times, torch.stack([exact(end, x) for end in ends])


class VPTo:
    """A path that ends earlier."""

    def __init__(self, path: Any, t_min: float) -> None:
        self.path, self.t_min, self.t_max = path, t_min, path.t_max

    def __getattr__(self, name: str) -> Any:
        return getattr(self.path, name)


DENSE = [DDIM(), DPMSolverPP2M(), ExponentialAdams(3), UniPC(2), DEIStAB(2), UniC(DDIM(), 1)]


@pytest.mark.parametrize("solver", DENSE, ids=repr)
def test_dense_output_is_of_the_methods_order(solver: Any, problems: Problems, between: tuple[Tensor, Tensor]) -> None:
    problem, (times, states) = problems["vp"], between
    errors = []
    for n in (40, 80, 160, 320):
        output = dense(solver, problem, starts(problem), uneven(problem.path, n))
        assert output.trajectory.nfe == n
        errors.append(float((output(times) - states).square().mean().sqrt()))
    slope = math.log2(errors[0] / errors[-1]) / 3  # where in its step a time lies changes with n
    assert slope > solver.order - 0.2, errors


@pytest.mark.parametrize("encode", [False, True])
def test_dense_output_meets_the_nodes(encode: bool, problems: Problems) -> None:
    problem = problems["flow"]
    ts = uneven(problem.path, 10)
    ts = ts.flip(0) if encode else ts
    x = starts(problem, 2)
    for name in ("exp_adams_3", "unipc_2"):
        run = integrate(SOLVERS[name], problem, x, ts, save="all")
        output = dense(name, problem, x, ts)
        assert torch.equal(output(ts), run.xs)
        assert torch.equal(output.trajectory.x, run.x)
        jumps = [gap(output(float(t) + 1e-9), output(float(t) - 1e-9)) for t in ts[1:-1]]
        assert (max(jumps) > 1e-4) == (name == "unipc_2")  # which corrects there
        assert max(jumps) < 1e-7 or name == "unipc_2"


def test_dense_output_says_for_whom_it_is_not(problems: Problems) -> None:
    problem = problems["vp"]
    x, ts = starts(problem, 2), logsnr(problem.path, 5)
    with pytest.raises(ValueError, match="evaluates once per step"):
        dense(Heun(), problem, x, ts)

    class Late(DDIM):
        """One evaluation, at the end of the step: a shorter step would have made it elsewhere."""

        def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Any) -> tuple[Tensor, None]:
            return super().step(problem, x, s, s, state, noise)

    with pytest.raises(ValueError, match=r"looks at 1 places .* at its start"):
        dense(Late(), problem, x, ts)
    with pytest.raises(ValueError, match="draws noise"):
        dense("ancestral", problem, x, ts)
    with pytest.raises(ValueError, match="covers t from"):
        dense("ddim", problem, x, ts)(2.0)


# --- Bad settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ExponentialAdams(0), "1 to 8"),
        (lambda: ExponentialAdams(9), "1 to 8"),
        (lambda: ExponentialAdams(2, "v"), "form 'v'"),
        (lambda: UniPC(2, variant="bh3"), "variant of UniPC 'bh3'"),
        (lambda: UniC(DDIM(), 0), "1 to 8"),
        (lambda: DEIStAB(-1), "1 to 8"),
        (lambda: DPMSolver2S(1.0), "inside the step"),
        (lambda: DPMSolverPP3S(0.5, 0.5), "different"),
    ],
)
def test_bad_settings_are_refused_in_one_line(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_dpm_solver_3_is_of_order_3_for_one_r2_only(problems: Problems, answers: dict[str, Tensor]) -> None:
    assert DPMSolver3S(0.4).order == 3
    other = DPMSolver3S(0.25, 0.5)
    assert other.order == 2
    measured = measured_order(
        other, problems["vp"], starts(problems["vp"]), logsnr, steps=(40, 80), answer=answers["vp"]
    )
    assert measured.slope == pytest.approx(2, abs=0.2)
