"""One call, one report: how likely data are under a model, by every method that is asked for.

    found = sdegen.evaluate(model, data, methods=["bound", "bound(T=10)", "ode", "pixel-histogram"], target_se=0.002)
    print(found)                      # a table
    found["ode"].bits_per_dim         # a report for each
    found.gap("ode", "bound")         # the same examples, so that the difference is known better than either

The data are cut into *shards*, always in the same places, and what a shard gives depends on its examples, their numbers
and the seed alone. So it does not matter who computes it: one process, or many that were started with the same folder,
by ``torchrun`` or by hand and at any time. Each takes a shard that nobody is at, keeps it in a file, and goes on;
whoever finds all of them done puts them together. A process that is killed loses the shard that it was at, and nobody
waits for it. The result is the same in all these cases, bit for bit.

A number that is known is not computed again: it is kept under a hash of everything that it depends on, the weights, the
data, the method with all its options, the seed. Ask for it ``again`` to compute it anew.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sdegen.data import Dataset
from sdegen.likelihood.methods import Estimator, Method
from sdegen.likelihood.ode import COARSE, coarse, tolerable
from sdegen.likelihood.report import LikelihoodReport, gap, merged
from sdegen.likelihood.scoring import bins_of
from sdegen.likelihood.store import Progress, Store, fingerprint, part, processes
from sdegen.likelihood.tables import column, row, table
from sdegen.models import LatentVariableModel
from sdegen.provenance import provenance
from sdegen.results import Result

__all__ = ["Evaluation", "evaluate", "given"]


@dataclass(frozen=True)
class Evaluation:
    """Reports by title, on the same data.

    Attributes:
        reports: title -> report.
        data: what was scored: its name, the split, how many examples, and how its numbers became model units.
        known: titles of the reports that had been computed before.
    """

    reports: Mapping[str, LikelihoodReport]
    data: Mapping[str, Any] = field(default_factory=dict)
    known: frozenset[str] = frozenset()

    def __getitem__(self, title: str) -> LikelihoodReport:
        return self.reports[title]

    def gap(self, one: str, other: str) -> tuple[float, float]:
        """How much larger one number is than another on the same examples, nats, and its standard error."""
        return gap(self[one], self[other])

    def rows(self) -> list[dict[str, Any]]:
        """A flat dictionary for each report, the rows of a CSV file."""
        return [row(title, report) for title, report in self.reports.items()]

    def to_result(self, **more: Any) -> Result:
        """For an HDF5 file: columns along the axis ``row``, and beside them the parts and the values of the examples.

        Args:
            more: further attributes.
        """
        reports = list(self.reports.values())
        names = list(dict.fromkeys(part for report in reports for part in report.parts))
        values = np.full((len(reports), max(len(r.values) for r in reports)), np.nan)
        for line, report in zip(values, reports, strict=True):
            line[: len(report.values)] = report.values
        rows = [{key: value for key, value in line.items() if key not in names} for line in self.rows()]
        parts = [[report.parts.get(part, math.nan) for part in names] for report in reports]
        return Result(
            {
                **{key: (("row",), column([line[key] for line in rows])) for key in rows[0]},
                "part": (("part",), np.array(names, dtype=object)),
                "parts": (("row", "part"), np.array(parts, dtype=float), {"unit": "nat"}),
                "values": (("row", "example"), values, {"unit": "nat"}),
            },
            {**self.data, "settings": {title: r.settings for title, r in self.reports.items()}, **more},
        )

    def __str__(self) -> str:
        return table(self.reports, self.data, self.known)


def evaluate(
    model: LatentVariableModel,
    data: Dataset | Tensor,
    cond: Tensor | None = None,
    *,
    methods: Sequence[str | Method] | Mapping[str, str | Method] = ("bound",),
    split: str = "test",
    n: int | None = None,
    target_se: float | None = None,
    max_nfe: int | None = None,
    seed: int = 0,
    bin_width: float | None = None,
    folder: Path | str | None = None,
    again: bool = False,
    shard: int = 64,
    notes: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Evaluation:
    """How likely data are under a model, by several methods.

    Args:
        model: any model with a bound.
        data: a data set, or a tensor (N, *event) in model units.
        cond: class labels (N,) of these examples, or None.
        methods: names with options, such as ``"bound(T=10)"`` (:mod:`sdegen.likelihood.methods`); a mapping gives them
            titles.
        split: "test" or "train", of a data set.
        n: only the first so many examples.
        target_se: go on until the estimator's standard error is at most this: bits/dim where the number has bits, nats
            otherwise. Without it every method takes its own number of draws.
        max_nfe: budget of each method, network calls per example; a target that it does not reach is noted in the
            report.
        seed: of all noise. Example i's depends on (seed, i) alone.
        bin_width: of the bins that a tensor was dequantised over, in model units, to get bits from a density.
        folder: where shards and reports are kept, in ``results.h5``; several processes may share it. Nothing is kept
            where None.
        again: compute what is known, too.
        shard: examples at a time.
        notes: attributes of the kept reports; :func:`sdegen.provenance.provenance` by default.
        dry_run: check everything and compute nothing.
        progress: called as ``progress(title, share)``.

    Returns:
        An :class:`Evaluation`.

    Raises:
        ValueError: a method that is not for this model, or data that are not this model's; before anything is computed.
    """
    for name, value in (("target_se", target_se), ("max_nfe", max_nfe), ("shard", shard)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")
    x, cond, card = given(model, data, cond, split, n, bin_width)
    if again and processes() > 1:
        raise ValueError("again is for one process: another would find the number that is to be forgotten")
    asked = dict(methods) if isinstance(methods, Mapping) else {str(method): method for method in methods}
    chosen = {title: Method.parse(m) if isinstance(m, str) else m for title, m in asked.items()}
    if not chosen:
        raise ValueError('name at least one method, such as methods=["bound"]')
    source = data if isinstance(data, Dataset) else None
    jobs = {title: method.on(model, source) for title, method in chosen.items()}
    if dry_run:
        return Evaluation({}, card)

    settings = {"seed": seed, "target_se": target_se, "max_nfe": max_nfe, "bin_width": bin_width}
    about = {**(provenance() if notes is None else notes), **card}
    store = None if folder is None else Store(Path(folder), about, LikelihoodReport.from_result)
    shards = [range(i, min(i + shard, len(x))) for i in range(0, len(x), shard)]
    found: dict[str, LikelihoodReport] = {}
    known: set[str] = set()
    for title, job in jobs.items():
        compute = partial(_shard, job, functools.cache(partial(job.learn, x, cond, seed)), x, cond, settings)
        merge = partial(_whole, None if target_se is None else target_se * job.nats_per_unit(bin_width), max_nfe)
        tell = None if progress is None else partial(progress, title)
        if store is None:
            found[title] = merge([compute(rows, part(tell, i, len(shards))) for i, rows in enumerate(shards)])
            continue
        full = chosen[title].full
        key = fingerprint(full, *job.depends_on, x, cond, settings, shard)
        found[title], had = store.get(key, title, shards, compute, merge, tell, again=again, formula=full)
        if had:
            known.add(title)
    return Evaluation(found, card, frozenset(known))


def _shard(
    job: Estimator,
    learn: Callable[[], Any],
    x: Tensor,
    cond: Tensor | None,
    settings: Mapping[str, Any],
    rows: range,
    progress: Progress | None,
) -> LikelihoodReport:
    """The report of some examples. Each meets its share of the target, so that all meet it together.

    The variance of the mean over N examples is the sum of theirs over N^2; n of them may have n / N of it.
    """
    labels = None if cond is None else cond[rows.start : rows.stop]
    effort: dict[str, Any] = {}
    if not job.exact:
        target, share = settings["target_se"], math.sqrt(len(x) / len(rows))
        effort = {**settings, "learned": learn()}
        if target is not None:
            effort["target_se"] = target * share * job.nats_per_unit(settings["bin_width"])
    tell = None if progress is None else lambda done, of: progress(done / of)
    return job.run(x[rows.start : rows.stop], labels, samples=rows, progress=tell, **effort)


def _whole(target: float | None, max_nfe: int | None, parts: Sequence[LikelihoodReport]) -> LikelihoodReport:
    """One report of all shards. Whether the target (nats) is met is said of the whole and not of every shard.

    So is whether a solver's error is small: it does not average out as the noise of the shards does.
    """
    report = merged(parts)
    notes = [note for note in report.note.split("; ") if note and "target" not in note]
    bits = report.bits_offset is not None
    unit = "bits/dim" if bits else "nats"

    def shown(nats: float) -> float:
        return report.in_bits(nats) if bits else nats

    error, allowed = report.solver_error, tolerable(target, report.estimator_se, report.dims)
    if error is not None and error > allowed:
        report = replace(report, kind="estimate")
        notes = [coarse(shown(error), shown(allowed), unit), *(note for note in notes if not note.startswith(COARSE))]
    if target is not None and report.estimator_se > target:
        budget = "" if max_nfe is None else f" within max_nfe={max_nfe}"
        is_, wanted = shown(report.estimator_se), shown(target)
        notes.insert(0, f"the target was not reached{budget}: {is_:.3g} {unit}, not {wanted:.3g}")
    return replace(report, note="; ".join(notes))


def given(
    model: LatentVariableModel,
    data: Dataset | Tensor,
    cond: Tensor | None,
    split: str,
    n: int | None,
    bin_width: float | None,
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """What to score, and a card that says what it is; refuses what is not this model's."""
    card: dict[str, Any] = {}
    bins = bins_of(model)
    if isinstance(data, Dataset):
        if split not in ("test", "train"):
            raise ValueError(f"split is test or train, not {split!r}")
        x = data.test if split == "test" else data.train
        levels = None if data.bins is None else data.bins.count
        if bins is not None and bins != data.bins:
            has = "real numbers" if levels is None else f"{levels} grey levels"
            raise ValueError(f"the model gives probabilities of {bins.count} grey levels, and {data.name} has {has}")
        card = {
            "data": data.name, "split": split, "levels": levels, "scale": data.scale, "shift": data.shift,
            "log_volume": data.log_volume,
        }  # fmt: skip
    else:
        x = data
    if cond is not None and len(cond) != len(x):
        raise ValueError(f"there are {len(x)} examples and {len(cond)} labels")
    if n is not None and n < 1:
        raise ValueError(f"n is at least 1, not {n}")
    x, cond = x[:n], None if cond is None else cond[:n]
    model.check(x)
    if bins is not None:
        bins.index(x)  # refuses what is no grey level
        if bin_width is not None:
            raise ValueError("this model gives probabilities of grey levels: bin_width is for density decoders")
    return x, cond, {**card, "examples": len(x), "conditional": cond is not None}
