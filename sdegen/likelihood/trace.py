"""The trace of a Jacobian, exact or by random probes: what the divergence of the probability-flow ODE needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from solvers import standard_normal
from solvers.noise import PROBES

__all__ = ["Estimate", "Exact", "Field", "Hutchinson", "Trace", "trace_for"]

Field = Callable[[Tensor], Tensor]
Estimate = Callable[[Field, Tensor], tuple[Tensor, Tensor]]


class Trace(ABC):
    """How the trace of a Jacobian is computed.

    Attributes:
        exact: whether it is the trace itself, and not an estimate.
    """

    exact: ClassVar[bool]

    @property
    def columns(self) -> int:
        """Estimates made side by side, P."""
        return 1

    @abstractmethod
    def products(self, dims: int) -> int:
        """Jacobian products for each evaluation of the field on ``dims`` coordinates."""

    @abstractmethod
    def start(self, z: Tensor, samples: Sequence[int]) -> Estimate:
        """What one solve uses: ``(field, z) -> (field(z), traces)`` with traces (B, P), one column for each probe.

        Args:
            z: initial state (B, *event).
            samples: sample numbers, which key the probes.
        """


@dataclass(frozen=True)
class Exact(Trace):
    """The trace itself, at D Jacobian products for each evaluation.

    Args:
        limit: refuse events of more coordinates than this.
    """

    limit: int = 256
    exact = True

    def products(self, dims: int) -> int:
        return dims

    def start(self, z: Tensor, samples: Sequence[int]) -> Estimate:
        dims = z[0].numel()
        if dims > self.limit:
            raise ValueError(
                f"the exact trace of {dims} coordinates costs {dims} Jacobian products per evaluation (the limit is "
                f"{self.limit}): use Hutchinson(probes=...), or Exact(limit={dims})"
            )
        basis = torch.eye(dims, dtype=z.dtype, device=z.device).reshape(dims, 1, *z.shape[1:])

        def estimate(field: Field, z: Tensor) -> tuple[Tensor, Tensor]:
            value, pull = _pullback(field, z)

            def diagonal(e: Tensor) -> Tensor:
                return (pull(e.expand_as(z)) * e).flatten(1).sum(1)

            return value, torch.func.vmap(diagonal, chunk_size=_at_once(z))(basis).sum(0)[:, None]

        return estimate


@dataclass(frozen=True)
class Hutchinson(Trace):
    """v' J v averaged over ``probes`` vectors of random signs, fixed for the whole solve.

    Args:
        probes: vectors for each sample.
        seed: of the signs; sample i's probes depend on (seed, i) alone.

    Reference: Hutchinson 1990, doi:10.1080/03610919008812866.
    """

    probes: int = 1
    seed: int = 0
    exact = False

    @property
    def columns(self) -> int:
        return self.probes

    def products(self, dims: int) -> int:
        return self.probes

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"Hutchinson's trace needs at least one probe, not {self.probes}")

    def start(self, z: Tensor, samples: Sequence[int]) -> Estimate:
        shape = (len(z), self.probes, *z.shape[1:])
        normal = standard_normal(shape, self.seed, samples=samples, stream=PROBES, dtype=z.dtype, device=z.device)
        signs = torch.where(normal < 0, -1.0, 1.0).to(z.dtype).movedim(1, 0)

        def estimate(field: Field, z: Tensor) -> tuple[Tensor, Tensor]:
            value, pull = _pullback(field, z)
            product = torch.func.vmap(lambda v: (pull(v) * v).flatten(1).sum(1), chunk_size=_at_once(z))
            return value, product(signs).mT

        return estimate


def trace_for(dims: int, seed: int = 0) -> Trace:
    """The exact trace of events of up to 16 coordinates, one Hutchinson probe beyond."""
    return Exact() if dims <= 16 else Hutchinson(seed=seed)


def _at_once(z: Tensor) -> int:
    """Jacobian products taken together: as many as make a batch of a million numbers."""
    return max(1, 2**20 // z.numel())


def _pullback(field: Field, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    out = torch.func.vjp(field, z)
    return out[0], lambda v: out[1](v)[0]
