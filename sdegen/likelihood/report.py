"""A likelihood is a report, not a number.

:class:`LikelihoodReport` holds a value in nats and in bits per dimension together with all that is needed to believe
it: whether it is a bound or exact, its parts, two standard errors kept apart (the *estimator's*, which more draws
reduce, and the *data's*, which only more data reduce), the network calls spent, and every setting.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdegen.likelihood.scoring import beyond
from sdegen.results import Result

__all__ = ["LikelihoodReport", "gap", "merged"]


@dataclass(frozen=True)
class LikelihoodReport:
    """How likely data are under a model, and how that is known.

    Attributes:
        method: what was computed.
        kind: "exact", "upper bound" (on the negative log-likelihood, in expectation) or "estimate" (an ODE's: the
            solver's error is in it, which the standard errors do not see; halve the tolerance to see it).
        of: "probability" (of grey levels) or "density" (per unit of x).
        values: negative log-likelihood of each datum, nats, (N,), float64.
        parts: mean of each term, nats per example.
        estimator_se: standard error of the mean that comes from random draws, nats; NaN where it is not known.
        data_se: standard error of the mean as an estimate for the population the data come from, nats; NaN where the
            estimator's noise hides it.
        solver_error: root mean square of the errors that the ODE's solver leaves in the values, nats, which no standard
            error sees and the mean's does not exceed; None where there is no solver or nobody has looked.
        dims: coordinates of one datum.
        bits_offset: -log2(bin width) for a density of dequantised data, 0 for a probability, None for a density whose
            bin width is not known: bits/dim have no meaning then.
        forward: network calls per example.
        vjp: products of a vector with the network's Jacobian (backward mode), per example.
        jvp: products of the network's Jacobian with a vector (forward mode), per example.
        seconds: wall-clock time.
        logsnr: at the clean and the noisy end, None without a path.
        dequantizer: how grey levels are reached from a density: the discrete decoder (whose probabilities are of
            levels), or the noise that was added to them; None for continuous data, and where no density is involved.
        bin_width: of the grey levels, in model units; None for continuous data.
        solver: of the ODE, None without one.
        tolerance: of the ODE's solver, None where its steps are fixed or there is none.
        seed: of all noise, None where there is none.
        settings: everything else that made the number: path, levels, decoder, draws, probes.
        note: what a reader must know before believing the number, such as a target that was out of reach.
    """

    method: str
    kind: str
    of: str
    values: Tensor = field(repr=False)
    parts: dict[str, float]
    estimator_se: float
    data_se: float
    solver_error: float | None
    dims: int
    bits_offset: float | None
    forward: float
    vjp: float
    jvp: float
    seconds: float
    logsnr: tuple[float, float] | None
    dequantizer: str | None
    bin_width: float | None
    solver: str | None
    tolerance: float | None
    seed: int | None
    settings: dict[str, Any]
    note: str = ""

    @property
    def nats(self) -> float:
        """Mean negative log-likelihood, nats per example."""
        return float(self.values.mean())

    @property
    def bits_per_dim(self) -> float:
        """Mean negative log-likelihood in bits per coordinate; NaN for a density without a bin width."""
        return self.in_bits(self.nats) + (math.nan if self.bits_offset is None else self.bits_offset)

    def in_bits(self, nats: float) -> float:
        """Nats per example as bits per coordinate, for parts and standard errors."""
        return nats / (self.dims * math.log(2))

    def to_dict(self) -> dict[str, Any]:
        """All but the values of single examples, as plain numbers, strings, lists and dictionaries."""
        return {
            "method": self.method,
            "kind": self.kind,
            "of": self.of,
            "nats": self.nats,
            "bits_per_dim": self.bits_per_dim,
            "parts": dict(self.parts),
            "estimator_se": self.estimator_se,
            "data_se": self.data_se,
            "estimator_se_bits": self.in_bits(self.estimator_se),
            "data_se_bits": self.in_bits(self.data_se),
            "solver_error": self.solver_error,
            "examples": len(self.values),
            "dims": self.dims,
            "bits_offset": self.bits_offset,
            "forward": self.forward,
            "vjp": self.vjp,
            "jvp": self.jvp,
            "seconds": self.seconds,
            "logsnr": None if self.logsnr is None else list(self.logsnr),
            "dequantizer": self.dequantizer,
            "bin_width": self.bin_width,
            "solver": self.solver,
            "tolerance": self.tolerance,
            "seed": self.seed,
            "settings": dict(self.settings),
            "note": self.note,
        }

    def to_result(self, **more: Any) -> Result:
        """For an HDF5 file: the values of the examples, the parts, and everything else as attributes.

        Args:
            more: further attributes.
        """
        facts = self.to_dict()
        parts = facts.pop("parts")
        return Result(
            {
                "nats": (("example",), self.values.numpy(), {"unit": "nat"}),
                "part": (("part",), np.array(list(parts), dtype=object)),
                "mean": (("part",), np.array(list(parts.values()), dtype=float), {"unit": "nat"}),
            },
            {**facts, **more},
        )

    @classmethod
    def from_result(cls, found: Result) -> LikelihoodReport:
        """What :meth:`to_result` made, also after it has been in a file."""
        kept = dict(found.attributes)
        given: dict[str, Any] = {f.name: kept.get(f.name) for f in fields(cls)}
        given["values"] = torch.from_numpy(np.array(found["nats"], dtype=np.float64))
        given["parts"] = dict(zip(found["part"].tolist(), found["mean"].tolist(), strict=True))
        if isinstance(kept["settings"], str):
            given["settings"] = json.loads(kept["settings"])
        if given["logsnr"] is not None:
            given["logsnr"] = tuple(float(end) for end in kept["logsnr"])
        return cls(**given)

    def __str__(self) -> str:
        sign = {"exact": "=", "upper bound": "<=", "estimate": "~"}[self.kind]
        what = "-log P(x)" if self.of == "probability" else "-log p(x)"

        def both(nats: float) -> str:
            return f"{nats:.4f} nats ({self.in_bits(nats):.4f} bits/dim)"

        lines = [
            f"{self.method}: {what} {sign} {self.nats:.4f} nats, {self.bits_per_dim:.4f} bits/dim",
            f"  standard error: estimator {both(self.estimator_se)}, data {both(self.data_se)}, "
            f"{len(self.values)} examples",
            "  parts (nats): " + ", ".join(f"{name} {value:.4f}" for name, value in self.parts.items()),
            f"  cost per example: {self.forward:g} network calls, {self.vjp:g} vjp, {self.jvp:g} jvp; "
            f"{self.seconds:.1f} s in all",
        ]
        if self.solver is not None:
            known = "not measured" if self.solver_error is None else both(self.solver_error)
            lines.append(f"  solver {self.solver}, tolerance {self.tolerance}, its error {known}")
        if self.logsnr is not None:
            lines.append(f"  logsnr from {self.logsnr[0]:.3f} (data) to {self.logsnr[1]:.3f} (noise)")
        lines.append(f"  dequantizer {self.dequantizer}, bin width {self.bin_width}, seed {self.seed}")
        lines.append("  " + ", ".join(f"{name}={value}" for name, value in self.settings.items()))
        return "\n".join([*lines, *([f"  note: {self.note}"] if self.note else [])])


def merged(reports: Sequence[LikelihoodReport]) -> LikelihoodReport:
    """One report of several, by the same method, on data that follow each other; their noises are independent.

    >>> from sdegen import VPSDE, bound, oracle
    >>> truth = oracle("mixture2d")
    >>> x = truth.sample(6, seed=0)
    >>> report = merged([bound(VPSDE(truth), part, draws=4) for part in x.split(3)])
    >>> len(report.values), report.forward
    (6, 8.0)
    """
    first, sizes = reports[0], torch.tensor([len(r.values) for r in reports], dtype=torch.float64)
    values, n = torch.cat([r.values for r in reports]), int(sizes.sum())

    def mean(numbers: Sequence[float]) -> float:
        return float((torch.tensor(numbers, dtype=torch.float64) * sizes).sum()) / n

    noise = float((torch.tensor([r.estimator_se for r in reports], dtype=torch.float64) * sizes).square().sum())
    spread = values.var() if n > 1 else torch.tensor(math.nan)
    errors = [r.solver_error for r in reports]
    return replace(
        first,
        kind=first.kind if len({r.kind for r in reports}) == 1 else "estimate",
        values=values,
        parts={name: mean([r.parts[name] for r in reports]) for name in first.parts},
        estimator_se=math.sqrt(noise) / n,
        data_se=beyond(spread, torch.tensor(0.0 if math.isnan(noise) else noise / n), n),
        solver_error=None if None in errors else math.sqrt(mean([e**2 for e in errors if e is not None])),
        forward=mean([r.forward for r in reports]),
        vjp=mean([r.vjp for r in reports]),
        jvp=mean([r.jvp for r in reports]),
        seconds=sum(r.seconds for r in reports),
        settings={name: _either([r.settings[name] for r in reports]) for name in first.settings},
        note="; ".join(_notes([r.note for r in reports])),
    )


def _notes(notes: Sequence[str]) -> list[str]:
    """Every note once; one that several parts have with other numbers, with the numbers of the first.

    >>> _notes(["3 of 64 are odd", "", "5 of 64 are odd", "no error"])
    ['3 of 64 are odd (and likewise in another part)', 'no error']
    """
    found: dict[str, list[str]] = {}
    for note in filter(None, notes):
        found.setdefault(re.sub(r"[-+]?\d[\d.e+-]*", "#", note), []).append(note)
    more = ("", " (and likewise in another part)")
    return [
        same[0] + (more[len(same) - 1] if len(same) < 3 else f" (and likewise in {len(same) - 1} other parts)")
        for same in found.values()
    ]


def _either(values: Sequence[Any]) -> Any:
    """A setting that all have, or the range of one that was adapted to the data."""
    if all(value == values[0] for value in values):
        return values[0]
    try:
        return f"{min(values)} to {max(values)}"
    except TypeError:
        return list(dict.fromkeys(map(str, values)))


def gap(one: LikelihoodReport, other: LikelihoodReport) -> tuple[float, float]:
    """How much larger one number is than another on the same examples, nats, and the standard error of that.

    Examples are compared with themselves, so that what differs between examples drops out; where one report has fewer
    examples, they are the other's first.
    """
    n = min(len(one.values), len(other.values))
    apart = one.values[:n] - other.values[:n]
    return float(apart.mean()), float(apart.std()) / math.sqrt(n) if n > 1 else math.nan
