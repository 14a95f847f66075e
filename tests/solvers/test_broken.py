"""Solvers that were broken on purpose: the certificate says what is wrong with each.

Every one of them produces samples that look right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from sdegen.paths import GaussianPath
from solvers import (
    DDIM,
    RK4,
    Ancestral,
    DiffusionProblem,
    DPMSolverPP3S,
    Euler,
    EulerMaruyama,
    Heun,
    Noise,
    SDEDPMSolverPP2M,
    Solver,
    Tableau,
    mix,
)
from solvers.certify import Certificate, certify, contract, noise_scale
from solvers.runge_kutta import RungeKutta

Problems = dict[str, DiffusionProblem]
Judge = Callable[[Solver[Any]], Certificate]


@pytest.fixture(scope="module")
def judge(problems: Problems, answers: dict[str, Tensor]) -> Judge:
    return lambda solver: certify(solver, problems, answers=answers)


def failed(certificate: Certificate) -> list[str]:
    return [check.what for check in certificate.checks if not check.passed]


def line(certificate: Certificate, what: str) -> str:
    """What was seen in the first failed line of that name."""
    return next((check.seen for check in certificate.checks if check.what.startswith(what) and not check.passed), "")


def found(certificate: Certificate) -> str:
    return "; ".join(certificate.findings)


# --- A coefficient changed by one per cent ----------------------------------------------------------------------------


@dataclass(frozen=True)
class CrookedHeun(RungeKutta):
    """Weights that do not add up to one."""

    tableau = Tableau(a=((1.0,),), b=(0.5 * 1.01, 0.5))
    order = 2


@dataclass(frozen=True)
class CrookedRK4(RungeKutta):
    """Right weights, one stage in the wrong place: consistent, of too low an order."""

    tableau = Tableau(a=((1 / 2,), (0.0, 1 / 2 * 1.01), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6))
    order = 4


@dataclass(frozen=True)
class Crooked2M(Solver[Tensor | None]):
    """DPM-Solver++(2M) whose weight of the last difference is 1 % too large."""

    order = 2
    nfe_per_step = 1
    equal: bool = False
    weight: float = 1.01
    start_order = 2

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise
    ) -> tuple[Tensor, Any]:
        path = problem.path
        lam_t = path.logsnr(t) / 2
        h = path.logsnr(s) / 2 - lam_t
        x0 = problem.predict(x, t).x0
        ahead = x0
        if state is not None:
            before, old = state
            share = 0.5 if self.equal else float(h / (lam_t - before)) / 2
            ahead = mix((1 + self.weight * share, x0), (-self.weight * share, old))
        return mix((path.sigma(s) / path.sigma(t), x), (-path.alpha(s) * torch.expm1(-h), ahead)), (lam_t, x0)


def test_weights_that_do_not_add_up(judge: Judge) -> None:
    certificate = judge(CrookedHeun())
    assert not certificate.passed
    assert "do not add up" in found(certificate)
    assert sum(what.startswith("order 2, ") for what in failed(certificate)) == 9


def test_a_stage_in_the_wrong_place(judge: Judge) -> None:
    certificate = judge(CrookedRK4())
    assert "order 4 with exact history" in failed(certificate)
    assert "are of order 1.0, not 4" in found(certificate)


def test_a_weight_of_history_off_by_a_hundredth(judge: Judge) -> None:
    """It costs the order in the end, and nothing that 160 steps would show: exact history and short steps do."""
    assert judge(Crooked2M(weight=1.0)).passed
    certificate = judge(Crooked2M())
    assert "order 2 with exact history" in failed(certificate)
    assert "are of order 1.2, not 2" in found(certificate)


def test_weights_of_equal_steps(judge: Judge) -> None:
    certificate = judge(Crooked2M(equal=True, weight=1.0))
    assert "order 2, vp/ve/flow, uneven" in failed(certificate)
    assert "order 2, vp/ve, uniform" not in failed(certificate)
    assert "weights those of equal steps?" in found(certificate)


# --- The start --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EulerFirst(Solver[bool]):
    """Any method, begun with one step of another."""

    then: Solver[Any] = field(default_factory=DPMSolverPP3S)
    first: Solver[Any] = field(default_factory=DDIM)

    def __post_init__(self) -> None:
        self.declare(order=self.then.order, nfe_per_step=self.then.nfe_per_step)

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> bool:
        return True

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: bool, noise: Noise
    ) -> tuple[Tensor, bool]:
        method = self.first if state else self.then
        return method.step(problem, x, t, s, None, noise)[0], False

    def nfe(self, steps: int) -> int:
        return self.first.nfe(1) + self.then.nfe(steps - 1)


@pytest.mark.parametrize("solver", [EulerFirst(), EulerFirst(RK4(), Euler())], ids=["3S", "RK4"])
def test_an_euler_first_step(solver: Solver[Any], judge: Judge) -> None:
    certificate = judge(solver)
    assert f"order {solver.order} from a cold start" in failed(certificate)
    assert f"order {solver.order} with exact history" not in failed(certificate)
    assert "the first steps are of order 1.0 and leave order 2.0" in found(certificate)


def test_an_euler_first_step_that_is_declared(judge: Judge) -> None:
    class Honest(EulerFirst):
        start_order = 2

    assert judge(Honest()).passed


# --- Noise ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loud(Solver[Any]):
    """Any stochastic method with the wrong amount of noise."""

    inner: Solver[Any] = field(default_factory=Ancestral)
    factor: float = 1.01

    stochastic = True

    def __post_init__(self) -> None:
        self.declare(order=self.inner.order, nfe_per_step=self.inner.nfe_per_step)

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> Any:
        return self.inner.init(problem, x, ts)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise
    ) -> tuple[Tensor, Any]:
        return self.inner.step(problem, x, t, s, state, lambda a, b: self.factor * noise(a, b))


INNER = [Ancestral(), DDIM(eta=0.5), EulerMaruyama(), SDEDPMSolverPP2M(), EulerMaruyama(eta=0.3)]


@pytest.mark.parametrize("inner", INNER, ids=repr)
@pytest.mark.parametrize("factor", [0.99, 1.001, 1.05])
def test_the_size_of_the_noise_is_measured(inner: Solver[Any], factor: float, vp: GaussianPath) -> None:
    """Exactly, whatever the method's eta and order: a tenth of a per cent is seen."""
    scales = noise_scale(Loud(inner, factor), vp)
    assert len(scales) == 3
    for scale in scales:
        assert not scale.right
        assert scale.scale == pytest.approx(factor, abs=1e-4)
    assert all(scale.right for scale in noise_scale(inner, vp))


@pytest.mark.parametrize("factor", [1.01, 1.05])
def test_noise_of_the_wrong_size_is_named(factor: float, judge: Judge) -> None:
    certificate = judge(Loud(Ancestral(), factor))
    assert f"{100 * factor - 100:.0f} % too much noise for its drift" in found(certificate)
    variances = [what for what in failed(certificate) if "variance" in what]
    assert len(variances) == 4  # on every grid
    assert not any("mean" in what for what in failed(certificate))


@dataclass(frozen=True)
class Unpaid(Solver[None]):
    """Euler-Maruyama with the drift of the probability-flow ODE: the noise is not paid for."""

    order = 1
    nfe_per_step = 1
    stochastic = True

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        z = noise(problem.path.logsnr(t) / 2, problem.path.logsnr(s) / 2)
        g = problem.path.g2(t).sqrt()
        return mix((1.0, x), (s - t, problem.velocity(x, t)), (g * (t - s).abs().sqrt(), z)), state


def test_noise_that_the_drift_does_not_pay_for(judge: Judge) -> None:
    assert "its drift needs no noise at all" in found(judge(Unpaid()))


# --- Time, memory, counts, digits, company ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Altered(Solver[Any]):
    """DDIM with something wrong about it."""

    order = 1
    nfe_per_step = 1

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise
    ) -> tuple[Tensor, Any]:
        return DDIM().step(problem, x, t, s, None, noise)[0], state


@dataclass(frozen=True)
class Timeless(Altered):
    """Asks the predictor at one time only."""

    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        middle = torch.tensor(0.5, dtype=torch.float64)
        fixed = DiffusionProblem(problem.path, lambda x, t: problem.predict(x, middle))
        return super().step(fixed, x, t, s, state, noise)


@dataclass(frozen=True)
class EqualSteps(Altered):
    """Takes steps of 1/20 in time, whatever it is told."""

    order = 1

    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        return mix((1.0, x), (-0.05, problem.velocity(x, t))), state


@dataclass(frozen=True)
class Unmoved(Altered):
    """Does not look where it is told to go."""

    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        return super().step(problem, x, t, t * 0.9, state, noise)


@dataclass(frozen=True)
class Remembering(Altered):
    """Keeps its history on itself."""

    seen: list[Tensor] = field(default_factory=list, compare=False, repr=False)

    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        self.seen.append(x)
        return super().step(problem, x, t, s, state, noise)


HIDDEN: list[Tensor] = []


@dataclass(frozen=True)
class Leaking(Altered):
    """Keeps its history in the module: DPM-Solver++(2M) that goes on from somebody else's step."""

    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        x0 = problem.predict(x, t).x0
        old = HIDDEN[-1] if HIDDEN and HIDDEN[-1].shape == x0.shape and HIDDEN[-1].dtype == x0.dtype else x0
        HIDDEN[:] = [x0]
        h = (problem.path.logsnr(s) - problem.path.logsnr(t)) / 2
        ahead = 1.1 * x0 - 0.1 * old
        return mix(
            (problem.path.sigma(s) / problem.path.sigma(t), x), (-problem.path.alpha(s) * torch.expm1(-h), ahead)
        ), state


@dataclass(frozen=True)
class Spendthrift(Altered):
    """Two calls, one declared; and a look beyond the end."""

    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        problem.predict(x, s - 1e-3)
        return super().step(problem, x, t, s, state, noise)


@dataclass(frozen=True)
class Single(Altered):
    """Works in float32 and hands back what it was given."""

    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        return super().step(problem, x.float(), t, s, state, noise)[0].to(x.dtype), state


@dataclass(frozen=True)
class Widening(Altered):
    """A float64 result whatever it was given."""

    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        return super().step(problem, x, t, s, state, noise)[0].double(), state


@dataclass(frozen=True)
class Coupled(Altered):
    """Rescales the batch by its norm, a little."""

    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        moved = super().step(problem, x, t, s, state, noise)[0]
        return moved * (1 + 1e-3 * (t - s) * (x.norm() / x.numel() ** 0.5 - 1)).to(x), state


@dataclass(frozen=True)
class InPlace(Altered):
    """Writes to the state that it was given."""

    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        return x.copy_(super().step(problem, x, t, s, state, noise)[0]), state


@dataclass(frozen=True)
class GlobalNoise(Altered):
    """Draws from the global random state, so that a sample depends on its batch and a seed on nothing."""

    stochastic = True

    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        return Ancestral().step(problem, x, t, s, state, lambda a, b: torch.randn_like(x))


@dataclass(frozen=True)
class Raising(Altered):
    """Does not run."""

    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        raise KeyError("sigmas")


@pytest.mark.parametrize(
    ("solver", "what", "words"),
    [
        (Timeless(), "a step uses its times", "asks at 1 different time in 10 steps"),
        (EqualSteps(), "a step uses its times", "where a step goes makes no difference"),
        (Unmoved(), "a step uses its times", "where a step goes makes no difference"),
        (Remembering(), "nothing is kept between solves", "changes the solver's seen"),
        (Leaking(), "nothing is kept between solves", "apart by"),
        (Spendthrift(), "counted calls are the declared ones", "[2, 4, 20] in 1, 2, 10 steps, declared [1, 2, 10]"),
        (Spendthrift(), "nothing is asked outside the path's range", "t in [-0.001"),
        (Single(), "float64 is float64 inside", "of the effect is lost"),
        (Widening(), "shape and dtype of the state are kept", "torch.float32 (3, 2, 4, 4) became torch.float64"),
        (Coupled(), "a sample does not see its batch", "apart by"),
        (InPlace(), "shape and dtype of the state are kept", "the start was written to"),
        (GlobalNoise(), "same seed, same bits", "apart by"),
        (GlobalNoise(), "a sample does not see its batch", "apart by"),
        (GlobalNoise(), "the global random state is untouched", ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Solver) else None,
)
def test_a_broken_promise_is_named(
    solver: Solver[Any], what: str, words: str, problems: Problems, vp: GaussianPath
) -> None:
    if isinstance(solver, Raising):
        certificate = certify(solver, problems)
    else:
        certificate = Certificate(solver, tuple(contract(solver, vp)))
    assert what in failed(certificate)
    assert words in line(certificate, what)


def test_what_does_not_run_says_why(problems: Problems) -> None:
    (line,) = certify(Raising(), problems).checks
    assert str(line).startswith(
        "FAIL  it runs                                      KeyError: 'sigmas' (test_broken.py, "
    )


# --- Claims -----------------------------------------------------------------------------------------------------------


def claiming(method: type[Solver[Any]], **claims: Any) -> Solver[Any]:
    return type("Claiming", (method,), claims)()


def test_an_order_declared_too_low(judge: Judge) -> None:
    assert failed(judge(claiming(RK4, order=3))) == ["the order is not declared too low"]


def test_an_order_declared_too_high(judge: Judge) -> None:
    certificate = judge(claiming(Heun, order=3))
    assert "order 3 with exact history" in failed(certificate)
    assert "are of order 2.1, not 3" in found(certificate)
    assert "the order seen is 2.0 to 2.1, declared is 3" in found(certificate)


def test_an_invariance_that_does_not_hold(judge: Judge) -> None:
    assert failed(judge(claiming(Heun, invariant=True))) == ["the same sample on vp, ve, flow"]


@dataclass(frozen=True)
class OnVPOnly(Altered):
    """DDIM that takes sigma for sqrt(1 - alpha^2), which it is on one path."""

    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        x0, eps = problem.predict(x, t)
        alpha = problem.path.alpha(s)
        return mix((alpha, x0), ((1 - alpha**2).sqrt(), eps)), state


def test_a_formula_of_one_path(judge: Judge) -> None:
    certificate = judge(OnVPOnly())
    assert "fails on flow and ve only" in found(certificate)
    assert "order 1, vp, uniform" not in failed(certificate)


def test_float32_coefficients_stop_the_errors(judge: Judge) -> None:
    class Rounded(RK4):
        def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise) -> tuple[Tensor, Any]:
            return super().step(problem, x, t, s.float().double(), state, noise)

    certificate = judge(Rounded())
    assert not certificate.passed
    assert "float32" in found(certificate)
