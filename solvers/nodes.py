"""A Gaussian path, what it says at the nodes of a grid, and the way to another path.

Steps read like their papers, ``path.alpha(s)``, and a path may be anything that answers. :class:`Nodes` is a path that
has computed its answers at the nodes of a grid once for all, so that a step pays for a look-up; :class:`Passage` is the
way from a path to another one with the same data and noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from solvers.linear import number, numbers

__all__ = ["Nodes", "Passage", "Path", "pulls"]


@runtime_checkable
class Path(Protocol):
    """A Gaussian path. Every method takes a tensor of times of any shape and returns one of that shape and dtype."""

    @property
    def t_min(self) -> float:
        """The cleanest time at which the path is used; logsnr is finite there."""
        ...

    @property
    def t_max(self) -> float:
        """The noisiest time at which the path is used; logsnr is finite there."""
        ...

    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale."""
        ...

    def logsnr(self, t: Tensor) -> Tensor:
        """log alpha^2 / sigma^2, strictly falling in t."""
        ...

    def f(self, t: Tensor) -> Tensor:
        """Drift coefficient d log alpha / dt, per unit of t."""
        ...

    def g2(self, t: Tensor) -> Tensor:
        """Squared diffusion coefficient -sigma^2 d logsnr / dt, per unit of t."""
        ...

    def time(self, logsnr: Tensor) -> Tensor:
        """The inverse of :meth:`logsnr`."""
        ...


def _within(t: Tensor, path: Path) -> Tensor:
    """A time that was computed, and is exact to rounding only, held in the range; itself where it lies there."""
    plain = t.ndim == 0 and not t.requires_grad
    return t if plain and path.t_min <= float(t) <= path.t_max else t.clamp(path.t_min, path.t_max)


class Nodes:
    """A path with its values at the nodes of a grid looked up in place of computed.

    The keys are the objects themselves: a step that asks for ``alpha(s)`` with the ``s`` it was handed is answered from
    the table, and any other time is passed on to the path. That of a node's logsnr is the node, so the way to another
    path and back (:meth:`to`) leads from object to object, and is exact.

    Args:
        path: the path.
        nodes: 0-dim float64 tensors.
        levels: their logsnr, where it is known already.
    """

    def __init__(self, path: Path, nodes: Sequence[Tensor], levels: Sequence[Tensor] | None = None) -> None:
        self.path, self.t_min, self.t_max = path, path.t_min, path.t_max
        self._ts = torch.stack(list(nodes))
        # These are kept alive, so that no other tensor can have the id of one.
        self._nodes, self._levels = nodes, path.logsnr(self._ts).unbind() if levels is None else levels
        self._columns = {"logsnr": self._column(nodes, self._levels), "time": self._column(self._levels, nodes)}
        self._pulls: dict[int, tuple[Tensor | float, Tensor | float]] = {}

    @staticmethod
    def _column(keys: Sequence[Tensor], values: Sequence[Tensor]) -> dict[int, Tensor]:
        return dict(zip(map(id, keys), values, strict=True))

    def _look_up(self, what: str, key: Tensor) -> Tensor:
        column = self._columns.get(what)
        if column is None:  # computed when it is asked for, at all nodes at once
            column = self._columns[what] = self._column(self._nodes, getattr(self.path, what)(self._ts).unbind())
        value = column.get(id(key))
        return getattr(self.path, what)(key) if value is None else value

    def alpha(self, t: Tensor) -> Tensor:
        return self._look_up("alpha", t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._look_up("sigma", t)

    def logsnr(self, t: Tensor) -> Tensor:
        return self._look_up("logsnr", t)

    def f(self, t: Tensor) -> Tensor:
        return self._look_up("f", t)

    def g2(self, t: Tensor) -> Tensor:
        return self._look_up("g2", t)

    def time(self, logsnr: Tensor) -> Tensor:
        return self._look_up("time", logsnr)

    def pulls(self, t: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """:func:`pulls`, looked up."""
        if not self._pulls:
            pairs = zip(*map(numbers, _computed(self.path, self._ts)), strict=True)
            self._pulls = dict(zip(map(id, self._nodes), pairs, strict=True))
        found = self._pulls.get(id(t))
        return pulls(self.path, t) if found is None else found

    def to(self, path: Path) -> Passage:
        """The passage to another path, known at the nodes."""
        there = Nodes(path, path.time(self.path.logsnr(self._ts)).unbind(), self._levels)
        return Passage(
            self, there, known=(self._nodes, there._nodes, self.path.alpha(self._ts) / path.alpha(there._ts))
        )


def _computed(path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    return path.f(t), path.g2(t) / (2 * path.sigma(t))


def pulls(path: Path, t: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """How much of x and of eps a velocity is: f and g^2 / (2 sigma)."""
    if isinstance(path, Nodes):
        return path.pulls(t)
    f, rate = _computed(path, t)
    return number(f), number(rate)


class Passage:
    """The way from one path to another and back: at equal logsnr x0 and eps are the same, and x = unit x'.

    Args:
        old: the path with the states x.
        new: that with the states x' = (alpha' / alpha) x.
        known: nodes of the old path, those of the new one, and the units there (n,): they are looked up.
    """

    def __init__(
        self, old: Path, new: Path, known: tuple[Sequence[Tensor], Sequence[Tensor], Tensor] | None = None
    ) -> None:
        self.old, self.new = old, new
        here, there, units = known or ((), (), torch.ones(0))
        self._there = dict(zip(map(id, here), there, strict=True))
        self._here = dict(zip(map(id, there), zip(here, numbers(units), strict=True), strict=True))

    def forth(self, t: Tensor) -> Tensor:
        """The time on the new path."""
        found = self._there.get(id(t))
        return self.new.time(self.old.logsnr(t)) if found is None else found

    def back(self, t: Tensor) -> Tensor:
        """The time on the old path."""
        found = self._here.get(id(t))
        return _within(self.old.time(self.new.logsnr(t)), self.old) if found is None else found[0]

    def unit(self, t: Tensor) -> Tensor | float:
        """alpha / alpha' at a time on the new path."""
        found = self._here.get(id(t))
        return number(self.old.alpha(self.back(t)) / self.new.alpha(t)) if found is None else found[1]
