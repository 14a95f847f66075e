"""Solvers as tables: what is left of a method when the words are gone is a short list of numbers.

Every step of a fixed-step method is linear in the state, the predictions and the noises, with coefficients that depend
on the grid alone. Written down in the order in which they happen, these combinations are the rows of a table,

    x0_1, eps_1 = predict(x_T, t=0.9)
    x_1 = 0.67 x_T + 0.33 x0_1                              the first step of DPM-Solver++(2M)
    x0_2, eps_2 = predict(x_1, t=0.6)
    x_2 = 0.33 x_1 - 0.33 x0_1 + 1.00 x0_2                  and its second

and the table *is* the method on that grid: it can be printed, compared with another one, stored, drawn, replayed at the
speed of its additions (:mod:`solvers.replay`), and made from somebody else's code (:mod:`solvers.foreign`).

A table is kept as the solver computed it: a row names the few states, predictions and noises that it reads, so that a
replay costs what the arithmetic of a step costs. For analysis the rows are substituted into one another, until
everything is a combination of the start, the predictions and the noises (with ``z_j = alpha_j x0_j + sigma_j eps_j``
one of each pair is enough). The last row of that triangle says how an error of the j-th prediction reaches the sample;
and on Gaussian data, where the exact prediction is itself linear, it says what the method does to mean and variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["EVALUATE", "KEEP", "STATE", "Form", "Moments", "Table"]

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
Form = Literal["x0", "eps"]
"""Which of the pair a prediction is counted as: the two differ by a multiple of the point where it was asked."""

STATE, EVALUATE, KEEP = 0, 1, 2
"""What a row is: the state at a node of the grid, a point handed to ``predict``, something remembered for later."""


class Moments(NamedTuple):
    """Mean and variance of independent Gaussian coordinates."""

    mean: Floats
    variance: Floats


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """The coefficients of one solver on one grid, float64.

    R rows read from 1 + R + 2n + m columns, in this order: the start x_T, the rows themselves, n predictions x0, n
    predictions eps, m noises. Row r reads ``columns[first[r]:first[r + 1]]`` with the ``coefficients`` at the same
    places, and only what is known when its turn comes.

    Attributes:
        name: the solver with its settings.
        kind: STATE, EVALUATE or KEEP, (R,).
        time: time of x_T and of each row, (1 + R,); NaN for a row that is only kept, -inf for data without noise.
        alpha: signal scale at these times, (1 + R,).
        sigma: noise scale at these times, (1 + R,).
        first: where each row begins, (R + 1,).
        columns: what the rows read.
        coefficients: how much of it.
        intervals: lam = logsnr / 2 at both ends of each noise's Brownian increment, (m, 2); NaN for a draw of its own.
        output: the column that is the result.

    Raises:
        ValueError: when the arrays do not fit together, or a row reads what comes after it.
    """

    name: str
    kind: Whole
    time: Floats
    alpha: Floats
    sigma: Floats
    first: Whole
    columns: Whole
    coefficients: Floats
    intervals: Floats
    output: int

    def __post_init__(self) -> None:
        rows, entries = len(self.kind), len(self.columns)
        expected = {
            "kind": (rows,),
            "time": (1 + rows,),
            "alpha": (1 + rows,),
            "sigma": (1 + rows,),
            "first": (rows + 1,),
            "columns": (entries,),
            "coefficients": (entries,),
            "intervals": (self.draws, 2),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape} in a table where it must be {shape}")
        if not set(self.kind.tolist()) <= {STATE, EVALUATE, KEEP}:
            raise ValueError(f"a row is one of the kinds {STATE}, {EVALUATE} and {KEEP}, got {set(self.kind.tolist())}")
        if self.first[0] != 0 or self.first[-1] != entries or (np.diff(self.first) <= 0).any():
            raise ValueError(f"the rows' bounds must rise from 0 to the number of entries, {entries}")
        read = np.append(self.columns, self.output)
        if not 0 <= read.min() <= read.max() < self.width:
            raise ValueError(f"a row reads a column that is not there: the table has {self.width}")
        if not np.isfinite(self.coefficients).all():
            raise ValueError(f"{self.name}: a coefficient is not finite")
        # The row that makes a column known; start and noises are known from the beginning.
        asked = np.flatnonzero(self.kind == EVALUATE)
        made = np.concatenate([[-1], np.arange(rows), asked, asked, np.full(self.draws, -1)])
        reader = np.repeat(np.arange(rows), np.diff(self.first))
        if (made[self.columns] >= reader).any():
            raise ValueError(f"row {reader[made[self.columns] >= reader][0]} of the table reads what comes after it")

    @property
    def nfe(self) -> int:
        """Calls of ``predict``, exactly."""
        return int((self.kind == EVALUATE).sum())

    @property
    def steps(self) -> int:
        """Steps of the grid."""
        return int((self.kind == STATE).sum())

    @property
    def draws(self) -> int:
        """Noises drawn."""
        return len(self.intervals)

    @property
    def width(self) -> int:
        """Number of columns."""
        return 1 + len(self.kind) + 2 * self.nfe + self.draws

    @property
    def ts(self) -> Floats:
        """The grid, (steps + 1,)."""
        return self.time[[True, *(self.kind == STATE)]]

    @property
    def logsnr(self) -> Floats:
        """logsnr of each evaluation, (n,)."""
        asked = [False, *(self.kind == EVALUATE)]
        return 2 * np.log(self.alpha[asked] / self.sigma[asked])

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the columns: x_T, then x_i, z_j and k_r for the rows, x0_j, eps_j, noise_k."""
        letters = {STATE: "x", EVALUATE: "z", KEEP: "k"}
        counts, rows = dict.fromkeys(letters, 0), list[str]()
        for kind in self.kind.tolist():
            counts[kind] += 1
            rows.append(f"{letters[kind]}_{counts[kind]}")
        pairs = [f"{name}_{j + 1}" for name in ("x0", "eps") for j in range(self.nfe)]
        return ("x_T", *rows, *pairs, *(f"noise_{k + 1}" for k in range(self.draws)))

    def row(self, r: int) -> dict[str, float]:
        """What row r reads, by name."""
        span = slice(self.first[r], self.first[r + 1])
        entries: zip[tuple[int, float]] = zip(
            self.columns[span].tolist(), self.coefficients[span].tolist(), strict=True
        )
        return {self.labels[c]: a for c, a in entries}

    def __repr__(self) -> str:
        return f"Table({self.name}, {self.steps} steps, nfe={self.nfe}, draws={self.draws}, {len(self.kind)} rows)"

    def __str__(self) -> str:
        """The method on this grid as a short program."""
        lines, asked = [f"# {self.name}: {self.steps} steps, {self.nfe} evaluations, {self.draws} draws"], 0
        for r, kind in enumerate(self.kind.tolist()):
            signed = " ".join(f"{'-' if a < 0 else '+'} {_times(abs(a))}{name}" for name, a in self.row(r).items())
            lines.append(f"{self.labels[1 + r]} = {signed.removeprefix('+ ') or '0'}")
            if kind == EVALUATE:
                asked += 1
                lines.append(f"x0_{asked}, eps_{asked} = predict(z_{asked}, t={self.time[1 + r]:.6g})")
        return "\n".join([*lines, f"return {self.labels[self.output]}"])

    # --- Analysis ----------------------------------------------------------------------------------------------------

    def dense(self, form: Form = "x0") -> Floats:
        """Every row as a combination of the start, the predictions and the noises: a lower triangle.

        Args:
            form: which prediction is kept; the other one is (z - alpha x0) / sigma or (z - sigma eps) / alpha.

        Returns:
            (R, 1 + n + m), columns x_T, predictions, noises.
        """
        return self._substituted(form)[1 : 1 + len(self.kind)]

    def states(self, form: Form = "x0") -> Floats:
        """:meth:`dense` at the nodes of the grid after the first, (steps, 1 + n + m)."""
        return self.dense(form)[self.kind == STATE]

    def points(self, form: Form = "x0") -> Floats:
        """:meth:`dense` where ``predict`` is asked, (n, 1 + n + m)."""
        return self.dense(form)[self.kind == EVALUATE]

    def result(self, form: Form = "x0") -> Floats:
        """:meth:`dense` for the output, (1 + n + m,)."""
        return self._substituted(form)[self.output]

    def weights(self, form: Form = "x0") -> Floats:
        """What each step itself adds of each prediction: the states minus what they inherit from the state before.

        x_i = (a_i / a_(i-1)) x_(i-1) + SUM_j w_ij x0_j + noise, with a the coefficient of x_T: for an exponential
        integrator in x0-form the first factor is sigma_s / sigma_t, and w are the weights of its papers. A multistep
        method is a band, a Runge-Kutta method is blocks.

        Returns:
            w, (steps, n).
        """
        states = self.states(form)
        before = np.vstack([np.eye(1, states.shape[1]), states[:-1]])
        gain = np.divide(states[:, 0], before[:, 0], out=np.zeros(len(states)), where=before[:, 0] != 0)
        return (states - gain[:, None] * before)[:, 1 : 1 + self.nfe]

    def amplification(self, form: Form = "x0") -> float:
        """SUM_j |c_j|, the most by which errors of size one in the predictions can move the result.

        Errors of size one in x0, or in eps; what the moved state does to later predictions comes on top.
        """
        return float(np.abs(self.result(form)[1 : 1 + self.nfe]).sum())

    @cached_property
    def noise_covariance(self) -> Floats:
        """Covariance of the noises, (m, m): increments of one Brownian motion are correlated where they overlap."""
        a, b = self.intervals.min(1), self.intervals.max(1)
        overlap = np.minimum(b[:, None], b) - np.maximum(a[:, None], a)
        direction = np.sign(self.intervals[:, 1] - self.intervals[:, 0])
        shared = np.clip(overlap, 0, None) * direction[:, None] * direction / np.sqrt(np.outer(b - a, b - a))
        own = np.isnan(a)
        return np.where(own[:, None] | own, np.eye(len(a)), shared)

    def moments(self, data: Moments, start: Moments | None = None) -> Moments:
        """What the method makes of Gaussian data when the predictions are perfect: its bias, without Monte Carlo.

        For data N(m, v) the posterior mean m + alpha v / (alpha^2 v + sigma^2) (z - alpha m) is linear in z, so that
        the result is c + a x_T + SUM_k b_k noise_k, whose mean and variance are read off.

        Args:
            data: m and v of independent coordinates, of any one shape.
            start: mean and variance of x_T, those of noise alone, 0 and sigma^2, by default; :meth:`marginal` is what a
                sampler without error at the start would be given.

        Returns:
            Mean and variance of the result, each of the shape of the data's.
        """
        m, v = np.broadcast_arrays(*(np.asarray(a, np.float64)[..., None] for a in data))
        mean, variance = Moments(np.zeros(()), self.sigma[0] ** 2) if start is None else start

        def posterior(r: int, z: Floats) -> tuple[Floats, Floats]:
            alpha, sigma = self.alpha[1 + r], self.sigma[1 + r]
            total, centred = alpha**2 * v + sigma**2, z - alpha * m * free[0]
            return m * free[0] + alpha * v / total * centred, sigma / total * centred

        # What everything is made of: one, x_T, the noises.
        free = np.eye(2 + self.draws)
        x = np.broadcast_to(free[1], (*v.shape[:-1], 2 + self.draws))
        out = self._played(x, free[2:], posterior)[self.output]
        b = out[..., 2:]
        spread = np.einsum("...j,jk,...k->...", b, self.noise_covariance, b)
        return Moments(out[..., 0] + out[..., 1] * mean, out[..., 1] ** 2 * variance + spread)

    def marginal(self, data: Moments, node: int = -1) -> Moments:
        """The exact law at a node of the grid for Gaussian data, N(alpha m, alpha^2 v + sigma^2)."""
        column = np.flatnonzero([True, *(self.kind == STATE)])[node]
        alpha, sigma = self.alpha[column], self.sigma[column]
        return Moments(alpha * np.asarray(data.mean), alpha**2 * np.asarray(data.variance) + sigma**2)

    def _substituted(self, form: Form) -> Floats:
        """All columns in terms of x_T, the predictions in one form, and the noises, (width, 1 + n + m)."""
        if form not in ("x0", "eps"):
            raise ValueError(f"form is 'x0' or 'eps', got {form!r}")
        free = np.eye(1 + self.nfe + self.draws)
        number = np.cumsum(self.kind == EVALUATE)  # of the evaluation that a row is, from one

        def pair(r: int, z: Floats) -> tuple[Floats, Floats]:
            alpha, sigma, given = self.alpha[1 + r], self.sigma[1 + r], free[number[r]]
            return (given, (z - alpha * given) / sigma) if form == "x0" else ((z - sigma * given) / alpha, given)

        return self._played(free[0], free[1 + self.nfe :], pair)

    def _played(self, start: Floats, noises: Floats, answer: Callable[[int, Floats], tuple[Floats, Floats]]) -> Floats:
        """The values of all columns, (width, *shape of start), when row r evaluated at z is ``answer(r, z)``."""
        rows, n = len(self.kind), self.nfe
        values = np.empty((self.width, *start.shape))
        values[0], j = start, 0
        for k, noise in enumerate(noises):
            values[1 + rows + 2 * n + k] = noise
        for r, kind in enumerate(self.kind.tolist()):
            span = slice(self.first[r], self.first[r + 1])
            values[1 + r] = np.tensordot(self.coefficients[span], values[self.columns[span]], 1)
            if kind == EVALUATE:
                values[1 + rows + j], values[1 + rows + n + j] = answer(r, values[1 + r])
                j += 1
        return values

    # --- Storage -----------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The table as plain arrays, for any file format; :meth:`from_arrays` makes it again, bit for bit."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Table:
        """The table that :meth:`arrays` took apart.

        Raises:
            ValueError: when an array is missing, or they make no table.
        """
        missing = [field.name for field in fields(cls) if field.name not in arrays]
        if missing:
            raise ValueError(f"a table needs the arrays {', '.join(missing)} too")

        def real(name: str) -> Floats:
            return np.asarray(arrays[name], dtype=np.float64)

        def whole(name: str) -> Whole:
            return np.asarray(arrays[name], dtype=np.int64)

        return cls(
            name=str(arrays["name"]),
            kind=whole("kind"),
            time=real("time"),
            alpha=real("alpha"),
            sigma=real("sigma"),
            first=whole("first"),
            columns=whole("columns"),
            coefficients=real("coefficients"),
            intervals=real("intervals"),
            output=int(arrays["output"]),
        )


def _times(factor: float) -> str:
    return "" if factor == 1 else f"{factor:.6g} "
