"""Black boxes: torchdiffeq, scipy and torchsde behind the one interface, with their quirks kept inside.

What each library does that its caller has to know, and what the adapter does about it:

torchdiffeq
    casts the time to the dtype of the state (near t = 0 a float32 time is wrong in its first digits): the state is
    float64 inside and goes back to its own dtype for ``predict`` and at the end; steps beyond the end of the interval
    and interpolates back: ``step_t`` holds it at the end, and times are clamped to the interval; measures the error
    over the whole batch, so that an adaptive solve of a sample depends on its company. Its Adams methods have the
    weights of equal steps and forget at the end of a call: they take some equal steps in each step of the grid. Its
    fehlberg2 is Fehlberg's pair 1(2), whose estimate h (k_3 - k_1) / 512 says little of its error h^3 x''' / 6: errors
    fall with the tolerance, and are some hundred times as large. It runs, and is no name in ``SOLVERS``.
scipy
    lives on the CPU in float64 with flat states: the batch is one system, with one step size, and of that system Radau
    and BDF make and factorise a dense Jacobian, B D calls of ``predict`` each time: for a handful of small samples.
both
    let a step grow tenfold. On a VP path nothing moves at either end, so that one step over the whole middle can look
    harmless (seen: error 0.3 at tolerance 1e-3, in silence): no step is longer than an eighth of the problem's range.
torchsde
    needs states (B, d), increasing time and a Brownian motion object: ours is handed in, which lives in the clock lam,
    and so does the equation, if not told otherwise; evaluates the drift once for its looks and again for its
    value: equal questions inside one step are asked once; draws from the global random state in its checks: it is put
    back.

An adaptive method ignores how many steps the grid has and goes from node to node; ``solve(..., tol=1e-6)`` gives it a
single interval. Its order is 0: it converges with the tolerance.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from solvers.curves import VP_LAM, Coordinates, Lam
from solvers.integrate import Solver
from solvers.noise import Noise, area
from solvers.problem import DiffusionProblem, Problem, mix

__all__ = ["ScipyODE", "TorchDiffEq", "TorchSDE"]

Velocity = Callable[[Tensor, Tensor], Tensor]


def _library(name: str) -> Any:
    """Imported when it is first used, and untyped as it is."""
    return importlib.import_module(name)


PATIENCE = 50_000  # evaluations between two nodes; a solution that needs more is no solution, or has exploded


class _Asking:
    """A velocity as a library asks for it: held inside the interval of the step, and not for ever."""

    def __init__(self, problem: Problem, t: Tensor, s: Tensor) -> None:
        self.velocity, self.ends, self.left = problem.velocity, (float(t), float(s)), PATIENCE
        self.last: Tensor | None = None

    def __call__(self, time: Tensor | float, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            a, b = self.ends
            raise ValueError(f"no end after {PATIENCE} evaluations between t = {a:.6g} and {b:.6g}: is it stiff?")
        # The time as the problem wants it, 0-dim float64 on the CPU.
        at = torch.as_tensor(time).to("cpu", torch.float64).clamp(min(self.ends), max(self.ends))
        self.last = self.velocity(x, at)
        return self.last

    def gave_up(self, solver: Solver[None], x: Tensor, reason: Exception | str) -> Tensor:
        """What is left of a state that a library could not carry on because the velocity was no number: none either.

        The loop then finds out, as for any other method, where it stopped being one and for which sample.

        Raises:
            ValueError: the velocity was a number.
        """
        if self.last is not None and not bool(self.last.isfinite().all()):
            return torch.full_like(x, torch.nan)
        if isinstance(reason, ValueError):  # ours: a prediction of the wrong shape, no end
            raise reason
        a, b = self.ends
        raise ValueError(f"{solver} gave up between t = {a:.6g} and {b:.6g}: {reason}")


def _longest(problem: Problem) -> float:
    """The longest step that an adaptive method may take."""
    return (problem.t_max - problem.t_min) / 8


def _check(kind: str, method: str, known: Any) -> None:
    if method not in known:
        raise ValueError(f"{kind} has no method {method!r}; there are: {', '.join(sorted(known))}")


def _check_tolerance(rtol: float, atol: float) -> None:
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"tolerances are positive, got rtol={rtol} and atol={atol}")


@dataclass(frozen=True)
class TorchDiffEq(Solver[None]):
    """The probability-flow ODE, or any other, by ``torchdiffeq.odeint``, differentiable.

    Order and evaluations per step are those of the fixed-step method, both 0 for an adaptive one; noise none.

    Args:
        method: adaptive ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"; "scipy_solver", which is scipy's
            LSODA and not differentiable), or fixed-step ("euler", "midpoint", "heun2", "heun3", "rk4": the 3/8 rule),
            one step for each step of the grid, or of Adams ("explicit_adams", "implicit_adams").
        rtol: relative tolerance, of an adaptive step and of the iteration of implicit Adams.
        atol: absolute tolerance.
        parts: how many equal steps an Adams method takes in a step of the grid; two are of RK4, to start with.

    Reference: Chen et al. 2018, arXiv:1806.07366; https://github.com/rtqichen/torchdiffeq.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    parts: int = 8

    FIXED: ClassVar[dict[str, tuple[int, int]]] = {  # order, evaluations
        "euler": (1, 1),
        "midpoint": (2, 2),
        "heun2": (2, 2),
        "heun3": (3, 3),
        "rk4": (4, 4),
    }
    ADAMS: ClassVar[tuple[str, ...]] = ("explicit_adams", "implicit_adams")  # and fixed_adams, which is the second
    ADAPTIVE: ClassVar[tuple[str, ...]] = ("adaptive_heun", "bosh3", "dopri5", "dopri8", "fehlberg2", "scipy_solver")
    reference = "Chen et al. 2018, arXiv:1806.07366 (torchdiffeq)"

    def __post_init__(self) -> None:
        _check("torchdiffeq", self.method, {*self.FIXED, *self.ADAMS, *self.ADAPTIVE})
        _check_tolerance(self.rtol, self.atol)
        if self.parts < 4:
            raise ValueError(f"an Adams method takes at least 4 equal steps in a step of the grid, got {self.parts}")
        # Two steps of RK4, then the third-order formula, and more from step to step; the implicit one iterates.
        adams = {"explicit_adams": (3, self.parts + 6), "implicit_adams": (4, 0)}
        order, nfe = {**self.FIXED, **adams}.get(self.method, (0, 0))
        self.declare(order=order, nfe_per_step=nfe)

    def step(self, problem: Problem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise) -> tuple[Tensor, None]:
        ask = _Asking(problem, t, s)

        def velocity(time: Tensor, y: Tensor) -> Tensor:
            return ask(time, y.to(x.dtype)).to(y.dtype)

        ends = torch.stack([t, s]).to(x.device)
        options: dict[str, Any] = {}
        if self.method in self.ADAMS:
            options["step_size"] = (1 + 1e-12) * abs(float(s - t)) / self.parts  # or rounding adds one more step
        elif self.method == "scipy_solver":
            options |= {"solver": "LSODA", "max_step": _longest(problem)}
        elif self.method in self.ADAPTIVE:
            options |= {"step_t": ends[1:], "max_step": _longest(problem)}
        try:
            path = _library("torchdiffeq").odeint(
                velocity, x.double(), ends, rtol=self.rtol, atol=self.atol, method=self.method, options=options
            )
        except AssertionError as reason:  # its way to say that a step became too short
            return ask.gave_up(self, x, reason), state
        return path[-1].to(x.dtype), state

    def with_tolerance(self, tol: float) -> Solver[None]:
        return super().with_tolerance(tol) if self.order else replace(self, rtol=tol, atol=tol)


@dataclass(frozen=True)
class ScipyODE(Solver[None]):
    """The probability-flow ODE, or any other, by ``scipy.integrate.solve_ivp``; not differentiable.

    Adaptive: order and evaluations per step 0; noise none.

    Args:
        method: "RK23", "RK45", "DOP853", "Radau", "BDF" or "LSODA".
        rtol: relative tolerance.
        atol: absolute tolerance.

    Reference: Virtanen et al. 2020, doi:10.1038/s41592-019-0686-2; Song et al. 2021, arXiv:2011.13456, section 4.3.
    """

    method: str = "RK45"
    rtol: float = 1e-5
    atol: float = 1e-5

    METHODS: ClassVar[tuple[str, ...]] = ("BDF", "DOP853", "LSODA", "RK23", "RK45", "Radau")
    order = 0
    nfe_per_step = 0
    reference = "Virtanen et al. 2020, doi:10.1038/s41592-019-0686-2 (scipy)"

    def __post_init__(self) -> None:
        _check("scipy", self.method, self.METHODS)
        _check_tolerance(self.rtol, self.atol)

    def step(self, problem: Problem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise) -> tuple[Tensor, None]:
        ask, b = _Asking(problem, t, s), float(s)

        def velocity(time: float, y: np.ndarray) -> np.ndarray:
            v = ask(time, torch.as_tensor(y).reshape(x.shape).to(x))
            return v.detach().to("cpu", torch.float64).reshape(-1).numpy()

        start = x.detach().to("cpu", torch.float64).reshape(-1).numpy()
        # t_eval keeps scipy from storing every step it takes.
        ivp = _library("scipy.integrate").solve_ivp
        settings = {"method": self.method, "rtol": self.rtol, "atol": self.atol, "max_step": _longest(problem)}
        try:
            done = ivp(velocity, ask.ends, start, t_eval=[b], **settings)
        except ValueError as reason:  # BDF factorises a matrix of numbers only
            return ask.gave_up(self, x, reason), state
        if not done.success:
            return ask.gave_up(self, x, done.message), state
        return torch.as_tensor(done.y[:, -1]).reshape(x.shape).to(x), state

    def with_tolerance(self, tol: float) -> Solver[None]:
        return replace(self, rtol=tol, atol=tol)


class _Increments:
    """Our Brownian motion as torchsde asks for one: increments over an interval of its time, flat, and their areas."""

    def __init__(self, noise: Noise, like: Tensor, lam: Callable[[Tensor], Tensor], levy: str) -> None:
        self.noise, self.lam, self.levy_area_approximation = noise, lam, levy
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device

    def __call__(self, a: Tensor, b: Tensor, return_U: bool = False, return_A: bool = False) -> Any:
        """W(b) - W(a), and with it INT_a^b (W(u) - W(a)) du = h (W(b) - W(a)) / 2 + h sqrt(h / 12) area.

        A Levy area between coordinates is asked for where it is multiplied by zero.
        """
        start, end, h = self.lam(a), self.lam(b), b - a
        w = mix((h.sqrt(), self.noise(start, end).reshape(self.shape)))
        if return_A:
            return w, None
        if not return_U:
            return w
        return w, mix((h / 2, w), (h * (h / 12).sqrt(), area(self.noise, start, end).reshape(self.shape)))


class _Equation:
    """An SDE with additive noise as torchsde asks for one; equal questions inside a step are answered once."""

    noise_type = "additive"

    def __init__(self, kind: str, drift: Velocity, diffusion: Callable[[Tensor], Tensor]) -> None:
        self.sde_type, self.drift, self.diffusion = kind, drift, diffusion
        self.asked: list[tuple[float, Tensor, Tensor]] = []

    def f(self, time: Tensor, y: Tensor) -> Tensor:
        for at, state, answer in self.asked:
            if at == float(time) and state is y:
                return answer
        self.asked.append((float(time), y, self.drift(y, time)))
        return self.asked[-1][2]

    def g_prod(self, time: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return mix((self.diffusion(time), v))


class _Diagonal(_Equation):
    """The same, for a method that wants the diffusion itself: a number for every coordinate."""

    noise_type = "diagonal"

    def g(self, time: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(y, float(self.diffusion(time)))


class _Method(NamedTuple):
    calculus: str
    order: int  # weak, and evaluations per step
    strong: float
    equation: type[_Equation] = _Equation
    levy: str = "space-time"


@dataclass(frozen=True)
class TorchSDE(Solver[None]):
    """The reverse SDE by ``torchsde.sdeint``, driven by the shared Brownian motion.

    On the circle in the clock lam it is dx = drift dlam + sqrt(2) eta sigma dW(lam); one step of the library's method
    for each step of the grid. In another clock u, the increment of its Brownian motion over a step is that of W(lam),
    scaled to variance du: right in law, and in the limit.

    Weak order 1 with 1 evaluation per step (euler, milstein, euler_heun: the noise is additive), weak order 2 with 2
    evaluations (heun, midpoint, srk; log_ode is midpoint and reversible_heun, which starts afresh in every step, is
    heun where the noise is additive); strong order 1, and 1.5 for srk in lam (there it is SRA1); noise white.

    Args:
        method: "euler", "milstein", "euler_heun", "heun", "midpoint", "log_ode", "reversible_heun" or "srk".
        eta: amount of noise, > 0; 1 is the reverse SDE.
        path: on which curve and in which clock; the problem's own where None.

    Reference: Li et al. 2020, arXiv:2001.01328; Kidger et al. 2021, arXiv:2105.13493;
    https://github.com/google-research/torchsde.
    """

    method: str = "euler"
    eta: float = 1.0
    path: Coordinates | None = VP_LAM

    METHODS: ClassVar[dict[str, _Method]] = {
        "euler": _Method("ito", 1, 1.0),
        "milstein": _Method("ito", 1, 1.0),
        "euler_heun": _Method("stratonovich", 1, 1.0),
        "heun": _Method("stratonovich", 2, 1.0),
        "midpoint": _Method("stratonovich", 2, 1.0),
        "log_ode": _Method("stratonovich", 2, 1.0, levy="foster"),
        "reversible_heun": _Method("stratonovich", 2, 1.0, _Diagonal),
        "srk": _Method("ito", 2, 1.5),
    }
    stochastic = True
    reference = "Li et al. 2020, arXiv:2001.01328 (torchsde)"

    def __post_init__(self) -> None:
        _check("torchsde (with additive noise)", self.method, self.METHODS)
        if not self.eta > 0:
            raise ValueError(f"eta is positive (use an ODE solver without noise), got {self.eta}")
        method, in_lam = self.METHODS[self.method], self.path is not None and isinstance(self.path.clock, Lam)
        self.declare(order=method.order, nfe_per_step=method.order, strong_order=method.strong if in_lam else 1.0)
        self.declare(invariant=self.path is not None)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path, shape, method = problem.path, x.shape, self.METHODS[self.method]
        there = path if self.path is None else self.path.over(path)
        u, v = (t, s) if there is path else (there.time(path.logsnr(end)) for end in (t, s))
        sign = 1.0 if v < u else -1.0  # torchsde's time grows: it is -u on the way to the data, and u on the way back
        sde = (problem if there is path else problem.rescaled(there)).sde(self.eta, encode=sign < 0)

        def time(tau: Tensor) -> Tensor:
            return (-sign * tau).clamp(torch.minimum(u, v), torch.maximum(u, v))

        def drift(y: Tensor, tau: Tensor) -> Tensor:
            return -sign * sde.drift(y.reshape(shape), time(tau)).reshape(y.shape)

        def lam(tau: Tensor) -> Tensor:
            return there.logsnr(time(tau)) / 2

        equation = method.equation(method.calculus, drift, lambda tau: sde.diffusion(time(tau)))
        start = mix((there.alpha(u) / path.alpha(t), x)).reshape(len(x), -1)
        bm = _Increments(noise, start, lam, method.levy)
        with _library("torch.random").fork_rng([x.device] if x.is_cuda else []):
            # A step longer than the interval is cut at its end; one of its length could miss it by rounding.
            ends, dt = torch.stack([-sign * u, -sign * v]), 2 * float(abs(v - u))
            ys = _library("torchsde").sdeint(equation, start, ends, bm=bm, method=self.method, dt=dt)
        return mix((path.alpha(s) / there.alpha(v), ys[-1].reshape(shape))), state
