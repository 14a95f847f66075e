"""Playing a table: the arithmetic of a solver and nothing else.

:func:`replay` walks the rows of a :class:`~solvers.tables.Table`. A row is one product and one fused multiply-add for
each further term, into one of a few tensors that are laid out beforehand: no path, no schedule, no history to shift and
no memory to ask for, so the host has almost nothing to do between two network calls.

On a GPU even the launches can go: :func:`capture` records a whole sampling run, network and all, as one CUDA graph,
with each row compiled into one kernel. (On a CPU a compiled row is no faster than its additions one after the other,
and a matrix product over a ring of states pays for the copies into the ring.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from solvers.noise import Noise
from solvers.problem import Predict
from solvers.tables import EVALUATE, STATE, Table

__all__ = ["Draws", "capture", "replay"]

Draws = Noise | Sequence[Tensor] | Tensor
"""Where a replay has its noises from: a Brownian motion, or the m noises themselves, each of the state's shape."""


def replay(
    table: Table,
    predict: Predict,
    x: Tensor,
    *,
    noise: Draws | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Sample with a table: to rounding what ``integrate`` does with the solver it was traced from.

    Args:
        table: the solver on its grid.
        predict: ``predict(x, t)``, t 0-dim float64.
        x: state at ``table.ts[0]``, (B, *event).
        noise: Brownian increments, or m noises, for a table that draws.
        callback: ``callback(i, t, x)`` after the i-th step.

    Returns:
        The result, (B, *event), in the dtype and on the device of ``x``; it can be differentiated. The points that
        ``predict`` is given are used again later, so it copies what it keeps.

    Raises:
        ValueError: no noise for a table that draws, or a prediction of the wrong shape.
        FloatingPointError: the result is not finite.
    """
    plan = _plan(table)
    out = _play(plan, predict, x, _drawing(table, noise), _Ring(plan, x), [step.time for step in plan], callback)
    # A finite sum has finite terms, and is one pass; an infinite one may be an overflow.
    if not bool(out.sum().isfinite()) and bool((bad := ~out.isfinite()).any()):
        first = int(bad.reshape(len(out), -1).any(1).int().argmax())
        raise FloatingPointError(f"{table.name}, replayed: the result is not finite (first bad sample: {first})")
    return out


def capture(
    table: Table, predict: Predict, like: Tensor, *, compiled: bool = True
) -> Callable[[Tensor, Draws | None], Tensor]:
    """A whole sampling run as one CUDA graph: thousands of kernels, one launch.

    Args:
        table: the solver on its grid.
        predict: as for :func:`replay`, but its t is on the device; everything it does must be capturable, so it copies
            nothing to or from the host.
        like: a state on a CUDA device: shape, dtype and device of those to come.
        compiled: compile the rows with ``torch.compile``, each into one kernel.

    Returns:
        ``run(x, noise)``; ``noise`` is None for a table without draws. The numbers that ``predict`` reads (the weights)
        are read when it runs, not when it was captured.

    Raises:
        ValueError: ``like`` is not on a CUDA device.
    """
    if not like.is_cuda:
        raise ValueError(f"a CUDA graph is captured on a CUDA device, and the state is on {like.device}: use replay")
    plan = _plan(table)
    times = [step.time.to(like.device) for step in plan]
    start, noises = torch.zeros_like(like), like.new_zeros((table.draws, *like.shape))
    add = _compiled(plan, like) if compiled else _fresh
    graph = torch.cuda.CUDAGraph()

    def once() -> Tensor:
        return _play(plan, predict, start, lambda k: noises[k], add, times, None)

    with torch.no_grad():
        aside = torch.cuda.Stream(like.device)
        aside.wait_stream(torch.cuda.current_stream(like.device))
        with torch.cuda.stream(aside):  # lazy set-up (compilation, library handles) is not part of a graph
            for _ in range(2):
                once()
        torch.cuda.current_stream(like.device).wait_stream(aside)
        with torch.cuda.graph(graph):
            out = once()

    def run(x: Tensor, noise: Draws | None = None) -> Tensor:
        start.copy_(x)
        draw = _drawing(table, noise)
        for k, place in enumerate(noises):
            place.copy_(draw(k))
        graph.replay()
        return out.clone()

    return run


# --- How it is done --------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """A row, ready to be played."""

    terms: tuple[tuple[float, int], ...]  # coefficient and column; one of factor 1, which costs nothing, stands first
    out: int
    answer: tuple[int, int] | None  # where the prediction goes, for a point that is evaluated
    node: int  # which step of the grid it ends, -1 for none
    time: Tensor
    draws: tuple[tuple[int, int], ...]  # noises that are read here first: number and column
    done: tuple[int, ...]  # columns that are not read again
    slot: int  # which tensor of the ring it is computed into; -1 for one of its own


class _Plan(list[_Step]):
    """The steps, in order."""

    width: int
    output: int
    slots: int


@lru_cache(maxsize=64)
def _plan(table: Table) -> _Plan:
    """The rows in the form that is fastest to walk."""
    rows, n = len(table.kind), table.nfe
    first_noise = 1 + rows + 2 * n
    bounds = table.first.tolist()
    columns: list[list[int]] = [table.columns[a:b].tolist() for a, b in pairwise(bounds)]
    factors: list[list[float]] = [table.coefficients[a:b].tolist() for a, b in pairwise(bounds)]

    # A row that is nothing but another one shares its tensor, so the tensor lives as long as any of them is read.
    owner, last = list(range(table.width)), [-1] * table.width
    for r in range(rows):
        if factors[r] == [1.0]:
            owner[1 + r] = owner[columns[r][0]]
        last[1 + r] = r
        for c in columns[r]:
            last[c] = r
    last[table.output] = rows
    alive = last.copy()
    for c in range(table.width):
        alive[owner[c]] = max(alive[owner[c]], last[c])

    plan, asked, nodes = _Plan(), 0, 0
    plan.width, plan.output, plan.slots = table.width, table.output, 0
    free, held, drawn = list[int](), dict[int, int](), set[int]()
    for r, (kind, time) in enumerate(zip(table.kind.tolist(), torch.tensor(table.time[1:]).unbind(), strict=True)):
        slot = -1
        if owner[1 + r] == 1 + r and alive[1 + r] < rows:
            if not free:
                free.append(plan.slots)
                plan.slots += 1
            held[1 + r] = slot = free.pop()
        answer = (1 + rows + asked, 1 + rows + n + asked) if kind == EVALUATE else None
        new = [c for c in columns[r] if c >= first_noise and c not in drawn]
        drawn.update(new)
        plan.append(
            _Step(
                terms=tuple(sorted(zip(factors[r], columns[r], strict=True), key=lambda term: term[0] != 1.0)),
                out=1 + r,
                answer=answer,
                node=nodes if kind == STATE else -1,
                time=time,
                draws=tuple((c - first_noise, c) for c in new),
                done=tuple(c for c in {*columns[r], 1 + r, *(answer or ())} if last[c] <= r),
                slot=slot,
            )
        )
        free += [held.pop(c) for c in list(held) if alive[c] <= r]
        asked, nodes = asked + (kind == EVALUATE), nodes + (kind == STATE)
    return plan


class _Add(Protocol):
    """How a row is computed."""

    def __call__(self, step: _Step, values: list[Any]) -> Tensor:
        """The row's combination of the values."""
        ...


def _play(
    plan: _Plan,
    predict: Predict,
    x: Tensor,
    draw: Callable[[int], Tensor],
    add: _Add,
    times: list[Tensor],
    callback: Callable[[int, Tensor, Tensor], None] | None,
) -> Tensor:
    values: list[Any] = [None] * plan.width
    values[0], shape = x, x.shape
    own = add.own if isinstance(add, _Ring) else None
    if x.requires_grad:
        add, own = _fresh, None
    for step, t in zip(plan, times, strict=True):
        for k, column in step.draws:
            values[column] = draw(k)
        out = values[step.out] = add(step, values)
        if step.answer is not None:
            x0, eps = predict(out, t)
            if x0.shape != shape or eps.shape != shape:
                raise ValueError(f"the prediction has shape {tuple(x0.shape)} where the state has {tuple(shape)}")
            if own is not None:
                x0, eps = own(x0), own(eps)
                if x0.requires_grad or eps.requires_grad:  # from here on everything is remembered for the gradient
                    add, own = _fresh, None
            values[step.answer[0]], values[step.answer[1]] = x0, eps
        elif callback is not None and step.node >= 0:
            callback(step.node, t, out.clone())
        for column in step.done:
            values[column] = None
    return values[plan.output]


def _fresh(step: _Step, values: list[Any]) -> Tensor:
    """One product, then multiply-adds into it."""
    (c, column), *rest = step.terms
    if c == 1.0:
        if not rest:
            return values[column]
        (a, other), *rest = rest
        out = torch.add(values[column], values[other], alpha=a)
    else:
        out = values[column] * c
    for c, column in rest:
        out.add_(values[column], alpha=c)
    return out


class _Ring:
    """The same, into tensors that are used again and again.

    Asking the system for memory, and giving it back, in every step can cost more than the arithmetic.
    """

    def __init__(self, plan: _Plan, like: Tensor) -> None:
        ring = like.new_empty((plan.slots, *like.shape))
        self.slots = ring.unbind()
        self.begin = ring.data_ptr()
        self.end = self.begin + ring.numel() * ring.element_size()

    def __call__(self, step: _Step, values: list[Any]) -> Tensor:
        if step.slot < 0:
            return _fresh(step, values)
        out = self.slots[step.slot]
        (c, column), *rest = step.terms
        if c == 1.0:
            (a, other), *rest = rest
            torch.add(values[column], values[other], alpha=a, out=out)
        else:
            torch.mul(values[column], c, out=out)
        for c, column in rest:
            out.add_(values[column], alpha=c)
        return out

    def own(self, prediction: Tensor) -> Tensor:
        """A prediction that lies in the ring (the point itself, or a view of it) has to live longer than its place."""
        return prediction.clone() if self.begin <= prediction.data_ptr() < self.end else prediction


def _compiled(plan: _Plan, like: Tensor) -> _Add:
    """Rows as one kernel each; the coefficients are data, so that rows of equal length share it."""
    factors = {
        step.out: torch.tensor([c for c, _ in step.terms], dtype=like.dtype, device=like.device) for step in plan
    }
    fused = cast("Callable[[Tensor, list[Tensor]], Tensor]", cast(Any, torch).compile(_weighted, dynamic=False))

    def add(step: _Step, values: list[Any]) -> Tensor:
        if len(step.terms) == 1 and step.terms[0][0] == 1.0:
            return values[step.terms[0][1]]
        return fused(factors[step.out], [values[column] for _, column in step.terms])

    return add


def _weighted(factors: Tensor, inputs: list[Tensor]) -> Tensor:
    return sum((factors[i] * x for i, x in enumerate(inputs[1:], start=1)), factors[0] * inputs[0])


def _drawing(table: Table, noise: Draws | None) -> Callable[[int], Tensor]:
    """The k-th noise."""
    if table.draws == 0:
        return _silent
    if noise is None:
        raise ValueError(f"{table.name} draws noise: pass noise=BrownianMotion(x, seed), or its {table.draws} noises")
    if not callable(noise):
        if len(noise) != table.draws:
            raise ValueError(f"{table.name} draws {table.draws} noises, and {len(noise)} are given")
        return lambda k: noise[k]
    if np.isnan(table.intervals).any():
        raise ValueError(f"{table.name} draws noises that are no Brownian increments: pass the {table.draws} noises")
    ends = torch.tensor(table.intervals)
    return lambda k: noise(*ends[k])


def _silent(k: int) -> Tensor:
    raise AssertionError("a table without draws drew")
