"""Exponential integrators: the linear part of the equation is solved exactly, only the prediction is approximated.

In the clock ``lam = logsnr / 2`` the probability-flow ODE of every Gaussian path has the exact solution (two forms)

    x_s = (sigma_s / sigma_t) x_t + sigma_s INT_{lam_t}^{lam_s} exp(lam) x0(lam) dlam
        = (alpha_s / alpha_t) x_t - alpha_s INT_{lam_t}^{lam_s} exp(-lam) eps(lam) dlam,

so a method is a rule for the integrand. Freeze it and you have DDIM; extend it as the polynomial through earlier
predictions and you have a *multistep* method, at one evaluation per step; look at a few places inside the step and you
have a *singlestep* (Runge-Kutta) method. With ``h = lam_s - lam_t`` both forms read

    x_s = kept x_t + new INT_0^h exp(+-(h - u)) P(lam_t + u) du            (- and P = x0,  + and P = eps),

and a polynomial that takes the values P_j at ``u = h r_j`` has the integral SUM_j w_j P_j, where the weights are
determined by what they do to powers,

    SUM_j w_j r_j^k = m_k,        m_k = INT_0^h (u / h)^k exp(+-(h - u)) du = h k! phi_(k+1)(+-h),
    phi_0(z) = exp(z),            phi_(k+1)(z) = (phi_k(z) - 1/k!) / z.

These *moments* m_k are all that tells one method of the family from another: the published second- and third-order
formulas (:mod:`solvers.dpm_solver`, :mod:`solvers.unipc`) put something simpler in the place of one of them, DEIS
(:mod:`solvers.deis`) measures the powers in another variable than lam.

A multistep method remembers the :class:`Node` of each earlier step. While its memory is short it extrapolates with the
lower order that the memory allows, beginning with DDIM: that is its *start*. One step of order q makes an error of
order q + 1, so a start at order 1 leaves every method formally at order 2; how much of that is seen depends on how
constant the prediction is in the first steps, which, at high noise, it nearly is. :class:`solvers.combine.Warmup` with
a method of order p - 1 for the first p - 2 steps (the one after them has p - 1 predictions) keeps order p; the declared
``order`` is that of the steps.

Reference: Hochbruck and Ostermann 2010, Acta Numerica 19, sections 2.1 and 2.5; Lu et al. 2022, arXiv:2206.00927 and
arXiv:2211.01095.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from solvers.integrate import Solver
from solvers.linear import mix, number, numbers
from solvers.names import find
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, Path, Prediction

__all__ = [
    "FORMS",
    "ExponentialAdams",
    "ExponentialMultistep",
    "Form",
    "History",
    "Memory",
    "Multistep",
    "Node",
    "Row",
    "check",
    "filed",
    "interpolating",
    "phi",
    "phis",
    "row_of",
    "windows",
]


# --- Functions and integrals ------------------------------------------------------------------------------------------

_TERMS = 40  # of the series: enough for |z| < k + 1 and k up to 8


@lru_cache
def _inverse_factorials(count: int) -> Tensor:
    """1 / (j + k)! for j < _TERMS and k = 1..count."""
    rows = [[1 / math.factorial(j + k) for k in range(1, count + 1)] for j in range(_TERMS)]
    return torch.tensor(rows, dtype=torch.float64)


@lru_cache
def _factorials(count: int) -> Tensor:
    """k! for k < count."""
    return torch.tensor([float(math.factorial(k)) for k in range(count)], dtype=torch.float64)


def phis(count: int, z: Tensor) -> Tensor:
    """phi_1(z), ..., phi_count(z), accurate to a few ulp for every z.

    Args:
        count: how many, >= 1.
        z: float64, any shape.

    Returns:
        Tensor of shape (*z.shape, count).
    """
    k = torch.arange(1, count + 1, dtype=torch.float64)
    z = z[..., None]
    near = z.abs() < k + 1  # there the terms z^j / (j + k)! fall from the first on
    series = torch.where(near[..., -1:], z, 0.0) ** torch.arange(_TERMS) @ _inverse_factorials(count)
    # The recursion divides a difference by z: exact enough where |z| is large, useless where it is not.
    ratio, far = z.exp(), torch.where(near[..., :1], 1.0, z)
    ratios: list[Tensor] = []
    for j in range(count):
        ratio = (ratio - 1 / math.factorial(j)) / far
        ratios.append(ratio)
    return torch.where(near, series, torch.cat(ratios, -1))


def phi(k: int, z: Tensor) -> Tensor:
    """phi_k(z) = SUM_j z^j / (j + k)!, accurate to a few ulp for every z.

    Args:
        k: index, >= 0.
        z: float64, any shape.

    >>> phi(1, torch.tensor([0.0, 1e-9, -50.0]).double())
    tensor([1.0000, 1.0000, 0.0200], dtype=torch.float64)
    """
    return phis(k, z)[..., -1] if k else z.exp()


def interpolating(r: Tensor, moments: Tensor) -> Tensor:
    """The weights of an integral of the polynomial through values at ``r``: SUM_j w_j r_j^k = m_k for k < q.

    Args:
        r: q different nodes, (..., q).
        moments: integrals m_k of the powers k = 0..q-1 of the same variable, (..., q).

    Returns:
        Weights (..., q).

    Simpson's rule, from the nodes 0, 1/2, 1 and INT_0^1 r^k dr:

    >>> 6 * interpolating(torch.tensor([0.0, 0.5, 1.0]).double(), torch.tensor([1, 1 / 2, 1 / 3]).double())
    tensor([1.0000, 4.0000, 1.0000], dtype=torch.float64)
    """
    powers = r[..., None, :] ** torch.arange(r.shape[-1])[:, None]
    return cast("Any", torch.linalg).solve(powers, moments)


class Form(ABC):
    """One of the two exact solutions, x_s = kept x_t + new INT_0^h exp(sign (h - u)) P(lam_t + u) du.

    Attributes:
        sign: -1 where P = x0, +1 where P = eps.
    """

    sign: ClassVar[int]

    @abstractmethod
    def factors(self, path: Path, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(kept, new) of a step from t to s; any shape."""

    @abstractmethod
    def tied(self, prediction: Prediction, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
        """The same P at another state x: the pair with x = alpha x0 + sigma eps."""

    def zeroth(self, h: Tensor) -> Tensor:
        """m_0 = INT_0^h exp(sign u) du: e^h - 1 (eps) or 1 - e^-h (x0), any shape."""
        return h.expm1() if self.sign > 0 else -(-h).expm1()

    def moments(self, h: Tensor, count: int) -> Tensor:
        """m_k = INT_0^h (u / h)^k exp(sign (h - u)) du = h k! phi_(k+1)(sign h) for k < count.

        Args:
            h: step in lam, of any shape and sign.
            count: how many.

        Returns:
            Tensor (*h.shape, count).
        """
        return h[..., None] * _factorials(count) * phis(count, self.sign * h)


class _X0Form(Form):
    sign = -1

    def factors(self, path: Path, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return path.sigma(s) / path.sigma(t), path.alpha(s)

    def tied(self, prediction: Prediction, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
        return Prediction(prediction.x0, mix((1 / sigma, x), (-alpha / sigma, prediction.x0)))


class _EpsForm(Form):
    sign = 1

    def factors(self, path: Path, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return path.alpha(s) / path.alpha(t), -path.sigma(s)

    def tied(self, prediction: Prediction, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
        return Prediction(mix((1 / alpha, x), (-sigma / alpha, prediction.eps)), prediction.eps)


FORMS: dict[str, Form] = {"x0": _X0Form(), "eps": _EpsForm()}
"""The two forms, by the part of a :class:`~solvers.problem.Prediction` that is extrapolated."""


# --- What a multistep method remembers --------------------------------------------------------------------------------


class Node(NamedTuple):
    """What a multistep method remembers of a step: where it began and what was predicted there."""

    lam: Tensor
    x0: Tensor
    eps: Tensor


History = tuple[Node, ...]
"""Nodes, the newest first."""


class Multistep(Solver[History]):
    """A method that extrapolates from the predictions of ``memory`` steps; one evaluation per step."""

    memory: ClassVar[int]
    nfe_per_step = 1
    start_order = 2
    invariant = True

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> History:
        return ()

    def observe(self, state: History, lam: Tensor, prediction: Prediction) -> History:
        return (Node(lam, *prediction), *state)[: self.memory]


Row = Tensor | list[float]
"""The coefficients of one step: of the state, then of the predictions, the newest first."""


Seen = tuple[Tensor | float, Tensor]
"""logsnr / 2 where a prediction was made, and the part of it that is extrapolated."""


class Memory(NamedTuple):
    """What an :class:`ExponentialMultistep` hands from step to step.

    Attributes:
        nodes: what was seen so far, the newest first.
        planned: the rows of the grid, by (lam_s, lam_t, lam_previous, ...); None for a step that was not foreseen.
        target: lam at which its own last step arrived; None before the first.
    """

    nodes: tuple[Seen, ...]
    planned: Callable[[tuple[float, ...]], Row | None]
    target: float | None


def windows(lam: Tensor, memory: int, least: int = 1) -> Iterator[tuple[int, int, Tensor]]:
    """What a method with a memory remembers along a grid.

    Args:
        lam: the nodes at which it predicts, (n,).
        memory: how many predictions it keeps.
        least: how many it needs.

    Yields:
        (first, last, nodes): at the nodes first..last - 1 it has the same number q of predictions, at ``nodes`` (last -
        first, q), the newest first. While the memory fills, each is alone; then all are together.
    """
    for q in range(least, min(memory, len(lam)) + 1):
        last = len(lam) if q == memory else q
        yield q - 1, last, lam[:last].unfold(0, q, 1).flip(-1)


def row_of(kept: Tensor, new: Tensor, weights: Tensor) -> Tensor:
    """(kept, new w_0, new w_1, ...), of shape (..., 1 + q)."""
    return torch.cat([kept[..., None], new[..., None] * weights], -1)


def filed(keys: Tensor, rows: Tensor) -> dict[tuple[float, ...], Row]:
    """Rows (m, n) by their keys (m, k): numbers, which cost least, or tensors where somebody wants their gradient."""
    each: list[list[float]] = cast("Any", keys).tolist()
    return {tuple(key): row for key, row in zip(each, cast("Sequence[Row]", numbers(rows)), strict=True)}


# --- The family -------------------------------------------------------------------------------------------------------


class ExponentialMultistep(Solver[Memory]):
    """x_s = kept x_t + new (w_0 P_t + w_1 P_previous + ...): one evaluation per step, noise none.

    A subclass says how many predictions it uses, of which form, and :meth:`weights` or :meth:`moments`. The rows of a
    grid are computed at once, before the first step, so a step costs its additions; a step that the grid did not
    foresee (a combinator may change times, or take steps of its own) has its row computed when it comes.

    Attributes:
        memory: how many predictions a step uses, its own included.
        form: "x0" or "eps", a key of ``FORMS``.
    """

    memory: int
    form: str
    nfe_per_step = 1
    start_order = 2
    invariant = True
    grid = "sqrt_flow"

    def moments(self, h: Tensor, count: int) -> Tensor:
        """Moments (*h.shape, count) of a step that interpolates through ``count`` predictions; exact here."""
        return FORMS[self.form].moments(h, count)

    def integral(self, lam: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Weights (..., q) of INT_a^b exp(sign (b - u)) P(u) du, with P the polynomial through nodes lam (..., q)."""
        h = b - a
        return interpolating((lam - a[..., None]) / h[..., None], self.moments(h, lam.shape[-1]))

    def weights(self, path: Path, lam: Tensor, lam_s: Tensor) -> Tensor:
        """The weights of a step.

        Args:
            path: the Gaussian path.
            lam: where the predictions were made, (..., q), the newest, which is the step's own, first.
            lam_s: where the step goes, (...).

        Returns:
            w, (..., q).
        """
        return self.integral(lam, lam[..., 0], lam_s)

    def row(self, path: Path, lam: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The coefficients (..., 1 + q) of steps from t to s (...), with predictions made at lam (..., q)."""
        kept, new = FORMS[self.form].factors(path, t, s)
        return row_of(kept, new, self.weights(path, lam, path.logsnr(s) / 2))

    def drawn(self, path: Path, t: Tensor, s: Tensor, noise: Noise) -> tuple[Tensor, ...]:
        """What a step adds up beside the state and the predictions: nothing here."""
        return ()

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> Memory:
        path, lam = problem.path, problem.path.logsnr(ts) / 2
        planned: dict[tuple[float, ...], Row] = {}
        for first, last, nodes in windows(lam[:-1], self.memory):
            rows = self.row(path, nodes, ts[first:last], ts[first + 1 : last + 1])
            planned |= filed(torch.cat([lam[first + 1 : last + 1, None], nodes], -1), rows)
        return Memory((), planned.get, None)

    def observe(self, state: Memory, lam: Tensor, prediction: Prediction) -> Memory:
        return state._replace(nodes=((lam, getattr(prediction, self.form)), *state.nodes)[: self.memory])

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: Memory, noise: Noise
    ) -> tuple[Tensor, Memory]:
        path, planned, target = problem.path, state.planned, 0.5 * problem.path.logsnr(s).item()
        seen = 0.5 * number(path.logsnr(t)), getattr(problem.predict(x, t), self.form)
        nodes = (seen, *state.nodes)[: self.memory]
        row = planned((target, *[lam if isinstance(lam, (float, int)) else lam.item() for lam, _ in nodes]))
        if row is None:
            row = self.row(path, torch.stack([torch.as_tensor(lam, dtype=torch.float64) for lam, _ in nodes]), t, s)
        terms = zip(row, [x, *[part for _, part in nodes], *self.drawn(path, t, s, noise)], strict=True)
        return mix(*terms), Memory(nodes, planned, target)


@dataclass(frozen=True)
class ExponentialAdams(ExponentialMultistep):
    """Exponential Adams-Bashforth: the polynomial through the last p predictions, integrated exactly.

    x_s = kept x_t + new SUM_j w_j P_j,        SUM_j w_j r_j^k = h k! phi_(k+1)(+-h)  for k = 0..p-1,
    r_j = (lam_j - lam_t) / h.

    Order p, 1 evaluation per step, noise none. Start: orders 1, 2, ..., p. p = 1 is DDIM; in x0-form p = 2 is
    DPM-Solver++(2M) in its "heun" variant and p = 3 what DPM-Solver++(3M) is meant to be.

    Args:
        p: how many predictions the polynomial goes through, >= 1.
        form: "x0" or "eps", what is extrapolated.

    Reference: Hochbruck and Ostermann 2010, Acta Numerica 19, section 2.5; Zhang and Chen 2022, arXiv:2204.13902.
    """

    p: int = 3
    form: str = "x0"

    reference = "Hochbruck, Ostermann 2010, Acta Numerica 19, section 2.5"

    def __post_init__(self) -> None:
        check(self.p, self.form)
        self.declare(order=self.p, memory=self.p)
        if self.form == "x0" and self.p > 3:  # extrapolates too far where steps grow fast
            self.declare(grid="logsnr")


def check(p: int, form: str) -> None:
    """Refuse an order below 1 or above 8 and a form that does not exist.

    Raises:
        ValueError: saying which are allowed.
    """
    if not 1 <= p <= 8:
        raise ValueError(f"the order of an extrapolation is 1 to 8, got {p}")
    find(form, FORMS, "form")
