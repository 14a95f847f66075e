"""Likelihood reports as rows, columns and text."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from sdegen.likelihood.report import LikelihoodReport
from sdegen.tables import aligned

__all__ = ["column", "row", "table"]

SIGNS = {"exact": "=", "upper bound": "≤", "estimate": "≈"}
NONE = "–"


def row(title: str, report: LikelihoodReport) -> dict[str, Any]:
    """Everything about a report but its settings, flat."""
    facts = report.to_dict()
    clean, noisy = facts.pop("logsnr") or (math.nan, math.nan)
    parts, _ = facts.pop("parts"), facts.pop("settings")
    return {"title": title, **facts, "logsnr_clean": clean, "logsnr_noisy": noisy, **parts}


def column(values: Sequence[Any]) -> np.ndarray:
    """An array of numbers or of strings, for values some of which may be missing."""
    if any(isinstance(value, str) for value in values):
        return np.array(["" if value is None else value for value in values], dtype=object)
    return np.array([math.nan if value is None else value for value in values])


def table(reports: Mapping[str, LikelihoodReport], data: Mapping[str, Any], known: Collection[str] = ()) -> str:
    """The reports as people read them: the numbers, their parts, what they rest on, and what must be said."""
    blocks = [_head(reports, data), _numbers(reports), _parts(reports), _ground(reports)]
    notes = [f"{title}: {report.note}" for title, report in reports.items() if report.note]
    if known:
        notes.append(
            f"known already, from the same weights, data and settings: {', '.join(t for t in reports if t in known)}"
        )
    return "\n\n".join(filter(None, [*blocks, "\n".join(notes)]))


def _head(reports: Mapping[str, LikelihoodReport], data: Mapping[str, Any]) -> str:
    first = next(iter(reports.values()))
    kind = {"test": "held-out ", "train": "training "}.get(data.get("split", ""), "")
    name = f" of {data['data']}" if "data" in data else ""
    given = " | label" if data.get("conditional") else ""
    what = "P" if first.of == "probability" else "p"
    lines = [f"-log {what}(x{given}) of {len(first.values)} {kind}examples{name}, {first.dims} dimensions"]
    if data.get("levels"):
        lines.append(f"{data['levels']} grey levels; model units are {data['scale']:.6g} level {data['shift']:+.6g}")
    elif data.get("scale", 1.0) != 1.0:
        lines.append(f"model units are {data['scale']:.6g} raw {data['shift']:+.6g}")
        lines.append(f"densities are per model unit: {-data['log_volume']:+.4f} nats for raw units")
    return "\n".join(lines)


def _numbers(reports: Mapping[str, LikelihoodReport]) -> str:
    bits = any(r.bits_offset is not None for r in reports.values())
    unit = "bits/dim" if bits else "nats"
    head = [unit, "", "nats", *(["bits/dim"] if bits else []), "± draws", "± data", "± solver"]
    head += ["forward", "vjp", "jvp", "seconds"]

    def error(report: LikelihoodReport, nats: float | None) -> str:
        return NONE if nats is None else number(report.in_bits(nats) if bits else nats, 4)

    cells = [
        (
            title,
            SIGNS[r.kind],
            number(r.nats, 3),
            *([number(r.bits_per_dim, 4)] if bits else []),
            error(r, r.estimator_se),
            error(r, r.data_se),
            error(r, r.solver_error),
            f"{r.forward:.5g}",
            f"{r.vjp:.5g}",
            f"{r.jvp:.5g}",
            f"{r.seconds:.1f}",
        )
        for title, r in reports.items()
    ]
    return aligned([head, *cells], right=range(2, len(head)))


def _parts(reports: Mapping[str, LikelihoodReport]) -> str:
    names = list(dict.fromkeys(part for report in reports.values() for part in report.parts))
    cells = [
        (title, *(number(r.parts.get(name, math.nan), 3) for name in names))
        for title, r in reports.items()
        if r.kind != "exact"
    ]
    return aligned([("parts, nats", *names), *cells], right=range(1, len(names) + 1)) if cells else ""


def _ground(reports: Mapping[str, LikelihoodReport]) -> str:
    head = ("rests on", "logsnr", "dequantizer", "bin width", "solver", "tolerance", "seed")

    def said(value: Any) -> str:
        return NONE if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)

    cells = [
        (
            title,
            NONE if r.logsnr is None else f"{r.logsnr[0]:.4g} to {r.logsnr[1]:.4g}",
            *map(said, (r.dequantizer, r.bin_width, _class(r.solver), r.tolerance, r.seed)),
        )
        for title, r in reports.items()
        if r.kind != "exact"
    ]
    return aligned([head, *cells]) if cells else ""


def _class(shown: str | None) -> str | None:
    """The class alone, of something shown with its settings."""
    return None if shown is None else shown.partition("(")[0]


def number(value: float, digits: int) -> str:
    """A number, or a dash where there is none."""
    return NONE if math.isnan(value) else f"{value:.{digits}f}"
