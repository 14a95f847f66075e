"""Playing a table: the arithmetic of a solver and nothing else.

:func:`replay` walks the rows of a :class:`~solvers.tables.Table`. A row is one product and one fused multiply-add for
each further term, into one of a few tensors that are laid out beforehand, and onto the old state where nobody reads it
again: no path, no schedule, no history to shift and no memory to ask for, so the host has almost nothing to do between
two network calls.

On a GPU even the launches can go: :func:`capture` records a whole sampling run, network and all, as one CUDA graph,
with each row compiled into one kernel. (On a CPU a compiled row is no faster than its additions one after the other,
and a matrix product over a ring of states pays for the copies into the ring.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import FunctionType
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from solvers.noise import Noise
from solvers.problem import Predict
from solvers.tables import EVALUATE, STATE, Table

__all__ = ["Captured", "Draws", "capture", "replay"]

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


@dataclass(frozen=True, eq=False, repr=False)
class Captured:
    """A recorded sampling run: ``run(x, noise)``; ``noise`` is None for a table without draws.

    It always computes on the same tensors, so inputs are copied in and the result is copied out.

    Attributes:
        table: what was recorded.
        launch: does it again.
        start: where the run reads its start.
        noises: where it reads its noises, (m, B, *event).
        out: where it writes its result.
        kept: everything else that it reads (times, coefficients, the predictor): a graph holds addresses, not tensors.
    """

    table: Table
    launch: Callable[[], None]
    start: Tensor
    noises: Tensor
    out: Tensor
    kept: tuple[Any, ...]

    @torch.no_grad()
    def __call__(self, x: Tensor, noise: Draws | None = None) -> Tensor:
        """Sample, without gradient and without a look at the result; as :func:`replay` otherwise.

        Raises:
            ValueError: a state or a noise that is not like that of the recording.
        """
        self._copy("state", x, self.start)
        draw = _drawing(self.table, noise)
        for k, place in enumerate(self.noises):
            self._copy("noise", draw(k), place)
        self.launch()
        return self.out.clone()

    def _copy(self, what: str, given: Tensor, place: Tensor) -> None:
        if given.shape != place.shape or given.dtype != place.dtype:
            asked, found = (f"{tensor.dtype} of shape {tuple(tensor.shape)}" for tensor in (place, given))
            raise ValueError(f"{self.table.name} was captured with a {what} of {asked}, got {found}: capture it again")
        place.copy_(given)


def capture(table: Table, predict: Predict, like: Tensor, *, compiled: bool = True) -> Captured:
    """A whole sampling run as one CUDA graph: thousands of kernels, one launch.

    Args:
        table: the solver on its grid.
        predict: as for :func:`replay`, but its t is on the device. It is run twice before the recording and must stay
            on the device: no copies to or from the host, no look at a value, no generator but the device's default one.
        like: a state on a CUDA device: shape, dtype and device of those to come.
        compiled: compile the rows with ``torch.compile``, each into one kernel.

    Returns:
        A :class:`Captured` run. The numbers that ``predict`` reads (the weights) are read when it runs, not when it was
        captured.

    Raises:
        ValueError: ``like`` is not on a CUDA device, or another recording is under way.
        RuntimeError: what ``predict`` does cannot be recorded.
    """
    if not like.is_cuda:
        raise ValueError(f"a CUDA graph is captured on a CUDA device, and the state is on {like.device}: use replay")
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("a CUDA graph is being captured already, and there is one at a time")
    plan, graph = _plan(table), torch.cuda.CUDAGraph()
    # All on the device of the state, and warmed up on the stream of the recording: libraries have a handle for each.
    with torch.no_grad(), torch.cuda.device(like.device):
        start, noises = torch.zeros_like(like), like.new_zeros((table.draws, *like.shape))
        times = [step.time.to(like.device) for step in plan]
        add = _compiled(plan, like) if compiled else _fresh

        def once() -> Tensor:
            return _play(plan, predict, start, lambda k: noises[k], add, times, None)

        before, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(before)
        with torch.cuda.stream(aside):  # it is left even where the recording fails
            for _ in range(2):  # lazy set-up (compilation, library handles) is not part of a graph
                once()
            try:
                with torch.cuda.graph(graph, stream=aside):
                    out = once()
            except RuntimeError as error:
                # The end of a failed recording fails too; what came first is the reason.
                first = error if error.__context__ is None else error.__context__
                reason = str(first).partition("\n")[0]
                raise RuntimeError(f"{table.name}: predict cannot be captured as a CUDA graph: {reason}") from error
        before.wait_stream(aside)
    return Captured(table, graph.replay, start, noises, out, (predict, add, times))


# --- How it is done --------------------------------------------------------------------------------------------------


_Terms = tuple[tuple[float, int], ...]
"""Coefficients and columns."""


class _Step(NamedTuple):
    """A row, ready to be played."""

    terms: _Terms  # in the order in which they are added up
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
        slot, dying = -1, [c for c in held if alive[c] <= r]
        terms, reused = _onto(tuple(zip(factors[r], columns[r], strict=True)), owner, dying)
        if owner[1 + r] == 1 + r and alive[1 + r] < rows:
            if reused is not None:
                free.append(held.pop(reused))
            elif not free:
                free.append(plan.slots)
                plan.slots += 1
            held[1 + r] = slot = free.pop()
        answer = (1 + rows + asked, 1 + rows + n + asked) if kind == EVALUATE else None
        new = [c for c in columns[r] if c >= first_noise and c not in drawn]
        drawn.update(new)
        plan.append(
            _Step(
                terms=terms,
                out=1 + r,
                answer=answer,
                node=nodes if kind == STATE else -1,
                time=time,
                draws=tuple((c - first_noise, c) for c in new),
                done=tuple(c for c in {*columns[r], 1 + r, *(answer or ())} if last[c] <= r),
                slot=slot,
            )
        )
        free += [held.pop(c) for c in (*dying, 1 + r) if c in held and alive[c] <= r]
        asked, nodes = asked + (kind == EVALUATE), nodes + (kind == STATE)
    return plan


def _onto(terms: _Terms, owner: list[int], dying: list[int]) -> tuple[_Terms, int | None]:
    """A row's terms in the order in which they are added up, and the tensor among them that it is computed onto.

    That is one which is read here for the last time, if it is read at once: what lies in the cache is written to in
    half the time of what does not. A term of factor 1 stands first, as it costs nothing there.
    """
    owners = [owner[c] for _, c in terms]
    for reused in (c for c in dying if owners.count(c) == 1):
        ordered = tuple(sorted(terms, key=lambda term: (term[0] != 1.0, owner[term[1]] != reused)))
        at_once = ordered[: 1 + (ordered[0][0] == 1.0)]
        if reused in [owner[c] for _, c in at_once]:
            return ordered, reused
    return tuple(sorted(terms, key=lambda term: term[0] != 1.0)), None


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
    exact = torch.promote_types(like.dtype, torch.float32)
    factors = {step.out: torch.tensor([c for c, _ in step.terms], dtype=exact, device=like.device) for step in plan}
    kernels = {length: _kernel() for length in {len(step.terms) for step in plan}}

    def add(step: _Step, values: list[Any]) -> Tensor:
        if len(step.terms) == 1 and step.terms[0][0] == 1.0:
            return values[step.terms[0][1]]
        inputs = [values[column] for _, column in step.terms]
        return kernels[len(inputs)](factors[step.out], inputs)

    return add


def _kernel() -> Callable[[Tensor, list[Tensor]], Tensor]:
    """:func:`_weighted`, to be compiled for one length, one shape and one dtype.

    Each is compiled from code of its own: the versions of one code are counted, and the ninth would not be compiled.
    """
    own = FunctionType(_weighted.__code__.replace(), globals())
    return cast("Callable[[Tensor, list[Tensor]], Tensor]", cast(Any, torch).compile(own, dynamic=False))


def _weighted(factors: Tensor, inputs: list[Tensor]) -> Tensor:
    total = factors[0] * inputs[0].to(factors.dtype)
    for i, x in enumerate(inputs[1:], start=1):
        total = total + factors[i] * x.to(factors.dtype)
    return total.to(inputs[0].dtype)


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
    ends = list(zip(*(column.unbind() for column in torch.tensor(table.intervals).unbind(1)), strict=True))
    return lambda k: noise(*ends[k])


def _silent(k: int) -> Tensor:
    raise AssertionError("a table without draws drew")
