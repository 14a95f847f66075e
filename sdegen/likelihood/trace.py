"""The trace of a Jacobian along the solution of an ODE, exact or by random probes.

For a vector v of random signs, E v' J v = tr J. One product with the Jacobian costs about two evaluations, and the
price of having one in place of D is noise of variance 2 SUM_{i != j} S_ij^2, S the symmetric part of J. Three things
lower it:

* **Fresh probes.** The integral of the trace is a quadrature, SUM_i w_i tr J(x_i), whose nodes x_i and weights w_i do
  not know the probes if the steps are fixed. So every evaluation may have a probe of its own: the expectation is the
  quadrature's with exact traces, and the noise of N evaluations averages out like 1 / sqrt(N). (To hold a probe for a
  whole step is twice as noisy with RK4: the four stages then say the same.) A solver that chooses its steps must not be
  given fresh probes: it would see a discontinuous right-hand side, and its steps would depend on the noise. It gets
  probes that stay for the whole solve and belong to their sample, like a fixed-step solver with ``redraw=False``.
* **A control variate.** With the Jacobian A of the best linear denoiser (:mod:`sdegen.likelihood.control`), whose trace
  is known, v' (J - A) v + tr A has the same mean and less variance.
* **More probes**, side by side, at one product each.

How large the noise is, is estimated from two probes or more. Probes that stay are P whole solutions, and their spread
says it, with P - 1 degrees of freedom. Fresh probes say it at every evaluation: with s_i the standard error of their
mean there, the variance of the integral is SUM_i w_i^2 s_i^2. The weights are the solver's own business, but INT r s dt
with a random sign r at every evaluation has just that variance, and so the mean square of some such integrals, which
cost nothing, is an unbiased estimate of it, with many degrees of freedom even for two probes: about a third of those of
the evaluations, for not all of them matter alike, and no more than there are integrals.

Reference: Hutchinson 1990, doi:10.1080/03610919008812866; Grathwohl et al. 2019, arXiv:1810.01367, section 3.1.1 (a
probe that stays).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sdegen.likelihood.control import LinearGaussian
from solvers import Path, standard_normal
from solvers.noise import PROBES

__all__ = ["Exact", "Field", "Hutchinson", "Trace", "Walk", "trace_for"]

Field = Callable[[Tensor], Tensor]

REPLICAS = 32  # integrals with random signs, from which the noise of fresh probes is read


class Walk(ABC):
    """The trace along one solve.

    Attributes:
        columns: numbers to integrate for each sample.
    """

    columns: int

    @property
    def of_trace(self) -> Tensor:
        """1 for the columns that are the trace or an estimate of it, 0 for those that are noise, (columns,)."""
        return torch.ones(self.columns)

    @abstractmethod
    def __call__(self, field: Field, x: Tensor, t: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """An evaluation: field(x), and what is to be integrated, (b, columns).

        Args:
            field: (b, *event) -> (b, *event).
            x: where.
            t: when, 0-dim or (b,).
            rows: which samples of the batch these are, None for all.
        """

    @abstractmethod
    def read(self, integrals: Tensor) -> tuple[Tensor, Tensor]:
        """The trace's integral and its standard error, (B,) each, from the integrals of the columns (B, columns)."""


class Trace(ABC):
    """How the trace of a Jacobian is computed.

    Attributes:
        exact: whether it is the trace itself, and not an estimate.
    """

    exact: ClassVar[bool]

    @abstractmethod
    def vjps(self, dims: int) -> int:
        """Jacobian products for each evaluation of the field on ``dims`` coordinates."""

    def freedom(self, evaluations: float, *, fixed_steps: bool) -> float:
        """Degrees of freedom of the noise that one solve of one sample tells; without noise nothing is in doubt.

        Args:
            evaluations: of the solve.
            fixed_steps: whether the solver's steps are independent of what it sees.
        """
        return math.inf

    @abstractmethod
    def start(self, z: Tensor, path: Path, samples: Sequence[int], *, fixed_steps: bool) -> Walk:
        """What one solve uses.

        Args:
            z: initial state (B, *event).
            path: on which the field is the noise prediction.
            samples: sample numbers, which key the probes.
            fixed_steps: whether the solver's steps are independent of what it sees.
        """

    def staying(self) -> Trace:
        """The same with probes that stay for the whole solve: a smooth right-hand side."""
        return self


@dataclass(frozen=True)
class Exact(Trace):
    """The trace itself, at D Jacobian products for each evaluation.

    Args:
        limit: refuse events of more coordinates than this.
    """

    limit: int = 256
    exact = True

    def vjps(self, dims: int) -> int:
        return dims

    def start(self, z: Tensor, path: Path, samples: Sequence[int], *, fixed_steps: bool) -> Walk:
        dims = z[0].numel()
        if dims > self.limit:
            raise ValueError(
                f"the exact trace of {dims} coordinates costs {dims} Jacobian products per evaluation (the limit is "
                f"{self.limit}): use Hutchinson(probes=...), or Exact(limit={dims})"
            )
        return _Diagonal(torch.eye(dims, dtype=z.dtype, device=z.device).reshape(dims, 1, *z.shape[1:]))


class _Diagonal(Walk):
    columns = 1

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis

    def __call__(self, field: Field, x: Tensor, t: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        value, pull = _pullback(field, x)

        def entry(e: Tensor) -> Tensor:
            return (pull(e.expand_as(x)) * e).flatten(1).sum(1)

        return value, torch.func.vmap(entry, chunk_size=_at_once(x))(self.basis).sum(0)[:, None]

    def read(self, integrals: Tensor) -> tuple[Tensor, Tensor]:
        return integrals[:, 0], torch.zeros_like(integrals[:, 0])


@dataclass(frozen=True)
class Hutchinson(Trace):
    """v' J v averaged over ``probes`` vectors of random signs.

    Args:
        probes: vectors for each sample at each evaluation.
        seed: of the signs; sample i's are a function of (seed, i, number of the evaluation) alone.
        control: linear denoiser whose Jacobian is subtracted, and whose trace is added; None for none.
        redraw: fresh probes for every evaluation, for fixed steps only; by default wherever the steps are fixed.
        hold: evaluations in a row that share their probes, where they are fresh; 4 is a step of RK4.
    """

    probes: int = 1
    seed: int = 0
    control: LinearGaussian | None = None
    redraw: bool | None = None
    hold: int = 1
    exact = False

    def __post_init__(self) -> None:
        if self.probes < 1 or self.hold < 1:
            raise ValueError(f"Hutchinson's trace needs at least one probe, not {min(self.probes, self.hold)}")

    def vjps(self, dims: int) -> int:
        return self.probes

    def freedom(self, evaluations: float, *, fixed_steps: bool) -> float:
        if not self._fresh(fixed_steps):
            return self.probes - 1
        return min((self.probes - 1) * evaluations / (3 * self.hold), REPLICAS)

    def _fresh(self, fixed_steps: bool) -> bool:
        return fixed_steps if self.redraw is None else self.redraw

    def start(self, z: Tensor, path: Path, samples: Sequence[int], *, fixed_steps: bool) -> Walk:
        if self.redraw and not fixed_steps:
            raise ValueError(
                "fresh probes make the right-hand side discontinuous, which a solver that chooses its steps takes for "
                "stiffness: give a fixed-step solver, such as rk4, or redraw=False"
            )
        return (_Fresh if self._fresh(fixed_steps) else _Staying)(self, z, path, samples)

    def staying(self) -> Trace:
        return replace(self, redraw=False)


class _Probes(Walk):
    """Estimates of the trace at one place."""

    def __init__(self, trace: Hutchinson, z: Tensor, path: Path, samples: Sequence[int]) -> None:
        self.trace, self.path, self.samples, self.like = trace, path, samples, z

    def signs(self, more: int, number: int) -> tuple[Tensor, Tensor]:
        """Probes (P, B, *event), and ``more`` further signs (B, more), of the given evaluation."""
        z, p = self.like, self.trace.probes
        shape = (len(z), p * z[0].numel() + more)
        normal = standard_normal(shape, self.trace.seed, samples=self.samples, stream=PROBES, number=number)
        signs = torch.where(normal < 0, -1.0, 1.0).to(z)
        probes = signs[:, : p * z[0].numel()].reshape(len(z), p, *z.shape[1:]).movedim(1, 0)
        return probes, signs[:, p * z[0].numel() :]

    def estimates(self, field: Field, x: Tensor, t: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """field(x), and the estimates of all probes (b, P)."""
        value, pull = _pullback(field, x)
        found = torch.func.vmap(lambda v: (pull(v) * v).flatten(1).sum(1), chunk_size=_at_once(x))(probes).mT
        control = self.trace.control
        if control is None:
            return value, found
        flat = probes.flatten(0, 1)
        times = t if t.ndim == 0 else t.repeat(len(probes))
        known = (control.jacobian_vector(flat, self.path, times) * flat).flatten(1).sum(1).reshape(len(probes), -1).mT
        mean = control.jacobian_trace(self.path, t).to(found)
        return value, found - known + (mean if mean.ndim == 0 else mean[:, None])


class _Staying(_Probes):
    """Probes that stay: a column for each."""

    def __init__(self, trace: Hutchinson, z: Tensor, path: Path, samples: Sequence[int]) -> None:
        super().__init__(trace, z, path, samples)
        self.columns = trace.probes
        self.probes, _ = self.signs(0, 0)

    def __call__(self, field: Field, x: Tensor, t: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.estimates(field, x, t, self.probes if rows is None else self.probes[:, rows])

    def read(self, integrals: Tensor) -> tuple[Tensor, Tensor]:
        mean, p = integrals.mean(1), self.columns
        return mean, integrals.std(1) / math.sqrt(p) if p > 1 else torch.full_like(mean, math.nan)


class _Fresh(_Probes):
    """Fresh probes: a column for their mean, and with two or more the replicas of its noise."""

    def __init__(self, trace: Hutchinson, z: Tensor, path: Path, samples: Sequence[int]) -> None:
        super().__init__(trace, z, path, samples)
        self.columns, self.number = 1 + (REPLICAS if trace.probes > 1 else 0), 0

    @property
    def of_trace(self) -> Tensor:
        return (torch.arange(self.columns) == 0).float()

    def __call__(self, field: Field, x: Tensor, t: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        probes, signs = self.signs(self.columns - 1, self.number // self.trace.hold)  # nobody leaves
        self.number += 1
        value, found = self.estimates(field, x, t, probes)
        mean = found.mean(1, keepdim=True)
        if self.columns == 1:
            return value, mean
        return value, torch.cat([mean, signs * found.std(1, keepdim=True) / math.sqrt(len(probes))], 1)

    def read(self, integrals: Tensor) -> tuple[Tensor, Tensor]:
        mean, replicas = integrals[:, 0], integrals[:, 1:]
        return mean, replicas.square().mean(1).sqrt()  # NaN where there are none


def trace_for(dims: int, seed: int = 0, probes: int = 1) -> Trace:
    """The exact trace of events of up to 16 coordinates, Hutchinson's beyond."""
    return Exact() if dims <= 16 else Hutchinson(probes, seed)


def _at_once(x: Tensor) -> int:
    """Jacobian products taken together: as many as make a batch of a million numbers."""
    return max(1, 2**20 // x.numel())


def _pullback(field: Field, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    value, pull, *_ = torch.func.vjp(field, x)
    return value, lambda v: pull(v)[0]
