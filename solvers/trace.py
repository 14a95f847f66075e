"""Running a solver on symbols: its own code, unchanged, writes down its table.

The state that a solver is given here is a row of coefficients: a tensor of shape (1, K) with a one in the column of
x_T. ``predict`` answers with two new columns, x0_j and eps_j, and a noise is a new column. All that a step does is to
add multiples of these, so what comes out of it are the coefficients of what it computed, in float64, as it computed it.

Everything that is computed is *named* when it is done: a point handed to ``predict``, the state after a step and what
the solver remembers of it are written into the table as rows, and the tensor in the solver's hands becomes a new
column, that of the row. So rows stay as short as the formulas of the step and never reach back to the start.

Nothing in this says that the solver is linear. Two things do: a symbol refuses to say whether it is positive, so code
that branches on values stops there; and in the end the solver is run on random numbers, and the table is returned only
if it gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from math import inf, isfinite, isnan, nan
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from solvers.grids import check_grid
from solvers.integrate import Solver
from solvers.names import resolve
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, Path, Predict, Prediction
from solvers.replay import replay
from solvers.tables import EVALUATE, KEEP, STATE, Table

__all__ = ["Node", "Program", "record", "trace"]

Node = Callable[[Tensor, "Tensor | float", Any], None]
"""``node(x, t, memory)``: said at every node of the grid, with whatever is remembered for the next step."""


class Program(Protocol):
    """Anything that samples: what :func:`record` can make a table of."""

    def __call__(self, predict: Predict, x: Tensor, noise: Noise, node: Node) -> Tensor:
        """Carry ``x`` to the result, asking ``predict`` and ``noise``, and saying each node."""
        ...


def trace(solver: str | Solver[Any], path: Path, ts: Tensor, *, end: Literal["stop", "denoise"] = "stop") -> Table:
    """The table of a solver on a grid.

    Args:
        solver: a name in ``SOLVERS``, "package.module:Class", or a :class:`Solver` with fixed steps.
        path: the Gaussian path.
        ts: grid (N + 1,), strictly monotone within the path's range.
        end: "denoise" makes the data predicted at the last node the result (one more evaluation).

    Returns:
        Its :class:`~solvers.tables.Table`.

    Raises:
        ValueError: a bad grid, or a solver that is not linear: one that controls its steps, branches on values, clips.

    >>> from solvers import FLOW
    >>> print(trace("dpmpp_2m", FLOW, torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64)))
    # DPMSolverPP2M(taylor=False): 2 steps, 2 evaluations, 0 draws
    z_1 = x_T
    x0_1, eps_1 = predict(z_1, t=0.9)
    x_1 = 0.666667 x_T + 0.333333 x0_1
    z_2 = x_1
    x0_2, eps_2 = predict(z_2, t=0.6)
    x_2 = 0.333333 x_1 - 0.333333 x0_1 + x0_2
    return x_2
    """
    method = resolve(solver)
    if method.nfe_per_step == 0:
        raise ValueError(f"{method} chooses its own steps, which no table can hold: trace a method with fixed steps")
    nodes = check_grid(ts, path.t_min, path.t_max).unbind()

    def program(predict: Predict, x: Tensor, noise: Noise, node: Node) -> Tensor:
        problem = DiffusionProblem(path, predict).at(nodes)
        state = method.init(problem, x, torch.stack(nodes))
        for t, s in pairwise(nodes):
            x, state = method.step(problem, x, t, s, state, noise)
            node(x, s, state)
        return problem.predict(x, nodes[-1]).x0 if end == "denoise" else x

    return record(program, path, name=f"{method!r}", start=float(nodes[0]))


def record(program: Program, path: Path, *, name: str, start: float, rtol: float = 1e-9) -> Table:
    """The table of anything that samples; see the module's text.

    Args:
        program: what to run; it is run twice.
        path: the path on which ``predict`` is asked.
        name: of the table.
        start: time at which ``program`` is given its state.
        rtol: how closely the table has to follow the program on random numbers, relative to the largest of them.

    Raises:
        ValueError: when the program is not linear.
    """
    columns = 64
    while True:
        tape = _Tape(path, columns)
        try:
            with torch.no_grad():
                out = program(tape.predict, tape.column("start"), tape.noise, tape.node)
            table = tape.table(name, start, out)
            break
        except _Full:
            columns *= 4
        except _NotLinear as reason:
            raise ValueError(f"{name} {reason}: only linear steps have a table") from None
    _believe(table, program, tape, rtol)
    return table


class _Full(Exception):
    """There are more symbols than columns."""


class _NotLinear(Exception):
    """The program did something that a combination of symbols cannot follow."""


# Asking for a value.
_LOOKS: set[Any] = {
    getattr(Tensor, name)
    for name in ("__bool__", "__float__", "__int__", "__array__", "item", "tolist", "numpy", "is_nonzero")
}
# Making a tensor that is *like* a symbol, and reading nothing of it.
_LIKE: set[Any] = {getattr(Tensor, name) for name in ("new_ones", "new_zeros", "new_full", "new_tensor", "new_empty")}
_BROUGHT: set[Any] = {Tensor.to, Tensor.type_as}


class _Symbols(Tensor):
    """Coefficients in place of values: arithmetic is that of tensors, but nobody may look."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKS:
            raise _NotLinear(f"looks at values of the state (Tensor.{func.__name__})")
        out = cast(Any, super()).__torch_function__(func, types, args, kwargs or {})
        # A number that is only brought to the dtype or device of a symbol does not become one.
        other = func in _LIKE or (func in _BROUGHT and not isinstance(args[0], _Symbols))
        return out.as_subclass(Tensor) if other else out


class _Row(NamedTuple):
    kind: int
    time: float
    terms: list[tuple[int, float]]  # (column of the tape, coefficient)


class _Tape:
    """Hands out columns and writes rows. A column is known by what it is: ("start", 0), ("row", r), ("x0", j), ..."""

    def __init__(self, path: Path, columns: int) -> None:
        self.path, self.shape = path, (1, columns)
        self.made: list[tuple[str, int]] = []
        self.rows: list[_Row] = []
        self.calls = 0
        self.increments: dict[tuple[float, float], Tensor] = {}
        self.intervals: list[tuple[float, float]] = []
        self.drawn: list[int] = []  # those of the noises that are read

    def column(self, what: str, index: int = 0, into: Tensor | None = None) -> Tensor:
        """A new symbol; ``into`` a tensor that becomes it."""
        if len(self.made) == self.shape[1]:
            raise _Full
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            symbol = torch.zeros(self.shape, dtype=torch.float64) if into is None else into.zero_()
            symbol[..., len(self.made)] = 1.0
        self.made.append((what, index))
        return symbol.as_subclass(_Symbols)

    def terms(self, value: Tensor) -> list[tuple[int, float]]:
        """What a tensor is made of."""
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            flat = value.detach().reshape(-1).double()
            at = flat.nonzero()[:, 0]
            found: list[tuple[int, float]] = list(
                zip(cast(Any, at).tolist(), cast(Any, flat[at]).tolist(), strict=True)
            )
        if found and (found[-1][0] >= len(self.made) or not all(isfinite(a) for _, a in found)):
            raise _NotLinear("does more than to add multiples")  # a constant, a division by the state
        # There and back again (another curve, another clock) is a factor one up to rounding.
        return [(c, 1.0 if abs(a - 1) < 1e-15 else a) for c, a in found]

    def name(self, value: Tensor, kind: int, time: float = nan) -> None:
        """Write a row and turn the tensor, in place, into its symbol; what is a symbol already stays it."""
        terms = self.terms(value)
        plain = len(terms) == 1 and terms[0][1] == 1.0
        if kind == KEEP and (plain or not terms):
            return
        if not terms:
            raise _NotLinear("makes a state of nothing")
        self.rows.append(_Row(kind, time, terms))
        if not plain:
            self.column("row", len(self.rows) - 1, into=value)

    # What the program is given.

    def predict(self, x: Tensor, t: Tensor) -> Prediction:
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            time = float(t.reshape(-1)[0])
        self.name(x, EVALUATE, time)
        self.calls += 1
        return Prediction(self.column("x0", self.calls - 1), self.column("eps", self.calls - 1))

    def noise(self, a: Tensor | float, b: Tensor | float) -> Tensor:
        interval = float(a), float(b)
        if interval in self.increments and not isnan(interval[0]):
            return self.increments[interval].clone()  # asked again; the first may have been changed in place
        self.intervals.append(interval)
        symbol = self.column("noise", len(self.intervals) - 1)
        self.increments[interval] = symbol.clone()
        return symbol

    def node(self, x: Tensor, t: Tensor | float, memory: Any) -> None:
        self.name(x, STATE, float(t))
        for kept in _tensors(memory):
            if kept.shape[-2:] == self.shape:
                for row in kept.reshape(-1, *self.shape).unbind():
                    self.name(row, KEEP)

    # What it leaves.

    def table(self, name: str, start: float, out: Tensor) -> Table:
        self.name(out, KEEP)  # if it is not a symbol already
        ((output, _),) = self.terms(out)
        rows, place = self._layout(output)

        entries = [sorted((place[self.made[c]], a) for c, a in row.terms) for row in rows]
        times = torch.tensor([start, *(row.time for row in rows)], dtype=torch.float64)
        alpha, sigma, timed = torch.full_like(times, nan), torch.full_like(times, nan), times.isfinite()
        alpha[times == -inf], sigma[times == -inf] = 1.0, 0.0
        alpha[timed], sigma[timed] = self.path.alpha(times[timed]), self.path.sigma(times[timed])
        return Table(
            name=name,
            kind=np.array([row.kind for row in rows], np.int64),
            time=times.numpy(),
            alpha=alpha.numpy(),
            sigma=sigma.numpy(),
            first=np.cumsum([0, *map(len, entries)], dtype=np.int64),
            columns=np.array([c for row in entries for c, _ in row], np.int64),
            coefficients=np.array([a for row in entries for _, a in row], np.float64),
            intervals=np.array([self.intervals[k] for k in self.drawn], np.float64).reshape(-1, 2),
            output=place[self.made[output]],
        )

    def _layout(self, output: int) -> tuple[list[_Row], dict[tuple[str, int], int]]:
        """The rows and the place of every column, without what was kept or drawn and never read."""
        read = {self.made[output]}
        kept: list[int] = []
        for r in reversed(range(len(self.rows))):
            if self.rows[r].kind != KEEP or ("row", r) in read:
                read.update(self.made[c] for c, _ in self.rows[r].terms)
                kept.append(r)
        kept.reverse()
        self.drawn = [k for k in range(len(self.intervals)) if ("noise", k) in read]
        pairs = [(name, j) for name in ("x0", "eps") for j in range(self.calls)]
        columns = [("start", 0), *(("row", r) for r in kept), *pairs, *(("noise", k) for k in self.drawn)]
        return [self.rows[r] for r in kept], {column: place for place, column in enumerate(columns)}


def _tensors(memory: Any) -> Iterator[Tensor]:
    """The tensors in sequences, mappings and dataclasses of whatever depth."""
    if isinstance(memory, Tensor):
        yield memory
    elif isinstance(memory, Mapping):
        yield from _tensors(list(cast("Mapping[Any, Any]", memory).values()))
    elif isinstance(memory, Sequence) and not isinstance(memory, (str, bytes)):
        for item in cast("Sequence[Any]", memory):
            yield from _tensors(item)
    elif is_dataclass(memory) and not isinstance(memory, type):
        yield from _tensors([getattr(memory, field.name) for field in fields(memory)])


def _nobody(x: Tensor, t: Tensor | float, memory: Any) -> None:
    """Nobody wants to know the nodes."""


def _believe(table: Table, program: Program, tape: _Tape, rtol: float) -> None:
    """Run the program on random numbers, large ones, so that a clipping shows, and compare."""
    draw = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return 100 * torch.randn(shape, generator=draw, dtype=torch.float64)

    x, answers, noises = numbers(2, 3), numbers(table.nfe, 2, 2, 3), numbers(len(tape.intervals), 2, 3)
    own = iter([z for (a, _), z in zip(tape.intervals, noises, strict=True) if isnan(a)])
    shared = dict(zip(tape.intervals, noises, strict=True))

    def noise(a: Tensor | float, b: Tensor | float) -> Tensor:
        return (next(own) if isnan(a) else shared[float(a), float(b)]).clone()

    def answering(calls: list[float]) -> Predict:
        def predict(x: Tensor, t: Tensor) -> Prediction:
            calls.append(float(t.reshape(-1)[0]))
            if len(calls) > table.nfe:
                raise ValueError(f"{table.name} asks more often when it sees numbers: only linear steps have a table")
            return Prediction(*answers[len(calls) - 1].clone())

        return predict

    calls: list[float] = []
    expected = program(answering(calls), x.clone(), noise, _nobody)
    found = replay(table, answering([]), x, noise=noises[tape.drawn])
    scale = max(float(v.abs().max()) for v in (expected, x))
    if len(calls) != table.nfe or not bool(((found - expected).abs() <= rtol * scale).all()):
        raise ValueError(f"{table.name} is not linear in the state: only linear steps have a table")
