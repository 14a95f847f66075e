"""One page about a run: pictures, tables, and how every number was measured.

:func:`build` draws the page from ``results.h5`` and ``manifest.json`` alone, so that it can be drawn again a year later
without training anything. The page is one file without scripts that fetches nothing; its figures are SVG with text.
Words live in ``templates/``, pictures in :mod:`sdegen.figures`; here numbers become table rows, captions and facts.

    python -m sdegen.report runs/demo                                  draws report.html again
    python -m sdegen.report runs/demo --picture docs/images/demo.png   draws the README's picture
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sdegen import figures, pages, results
from sdegen.figures import BUDGET
from sdegen.files import DamagedFile, write_bytes
from sdegen.pages import sig
from sdegen.results import Result
from sdegen.runs import RESULTS, Run
from sdegen.standings import Problem, Row
from sdegen.style import Canvas, save, svg

__all__ = ["build", "page", "picture", "read_all"]

Draw = Callable[[str, Canvas, str], None]
"""``draw(name, figure, alt)`` puts a figure into the page."""


def build(folder: Path | str, out: Path | str | None = None) -> Path:
    """Write the page of a run.

    Args:
        folder: a run folder with ``results.h5``; results that are not there are left out of the page.
        out: the page; ``report.html`` in the folder by default.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: no run, or a run without results.
        DamagedFile: results that cannot be read.
        ValueError: results of another version.
    """
    run = Run.open(folder)
    path = Path(out) if out is not None else run / "report.html"
    write_bytes(path, page(run))
    return path


def page(run: Run) -> str:
    """The page of a run as text; see :func:`build`."""
    try:
        return pages.render("demo.html.j2", _context(run.manifest, read_all(run)))
    except DamagedFile:
        raise
    except ValueError as error:
        raise ValueError(f"{run / RESULTS}: {error}; `sdegen demo --out {run.path}` makes it again") from None


def picture(folder: Path | str, out: Path | str) -> Path:
    """Draw a demo in one picture: samples, scores, solver errors and flow lines.

    Args:
        folder: run folder of a demo.
        out: .png, .svg or .pdf.
    """
    found = read_all(Run.open(folder))
    if missing := [name for name in ("samples", "likelihood", "errors", "flow") if name not in found]:
        raise ValueError(f"{folder} has no {' and no '.join(missing)}: the picture is that of a whole demo")
    return save(figures.overview(found), out)


def read_all(run: Run) -> dict[str, Result]:
    """All results of a run.

    Raises:
        FileNotFoundError: there are none.
    """
    names = results.names(run / RESULTS)
    if not names:
        raise FileNotFoundError(f"{run.path} has no results to report")
    return {name: results.read(run / RESULTS, name) for name in names}


def _context(manifest: Mapping[str, Any], found: Mapping[str, Result]) -> dict[str, Any]:
    """Everything that the template names."""
    drawn: dict[str, Markup] = {}

    def draw(name: str, figure: Canvas, alt: str) -> None:
        drawn[name] = Markup(svg(figure, name, alt))

    parts: dict[str, Any] = {}
    for name, (_, make, needs) in SECTIONS.items():
        if all(need in found for need in needs):
            try:
                parts[name] = make(draw, *(found[need] for need in needs))
            except KeyError as error:
                raise ValueError(f"the result {needs[0]!r} has no {error}: it was written by another version") from None
    titles = [(name, SECTIONS[name][0]) for name in parts] + [("made", "How it was measured")]
    stages = manifest.get("stages", {})
    version = manifest.get("versions", {}).get("sdegen")
    return {
        "figures": drawn,
        "parts": parts,
        "sections": [{"id": name, "title": title, "number": i} for i, (name, title) in enumerate(titles, start=1)],
        "about": manifest,
        "commit": manifest.get("commit"),
        "program": f"sdegen {version}" if version else "sdegen",
        "command": pages.command(str(manifest.get("command", ""))),
        "created": pages.moment(manifest["created"]),
        "budget": BUDGET,
        "solvers": len(set(found["strips"]["solver"])) if "strips" in found else 0,
        "trained": sum(seconds for stage, seconds in stages.items() if stage.startswith("Train")),
        "stages": [*stages.items()],
        "facts": _facts(manifest, found),
        "glossary": GLOSSARY,
    }


# --- Sections: figures, and the numbers that the text names -----------------------------------------------------------


def _samples(draw: Draw, found: Result) -> dict[str, Any]:
    draw("samples", figures.samples(found), "Grids of held-out digits and of samples of each model")
    return {"count": found.lengths["example"], **found.attributes}


def _likelihood(draw: Draw, found: Result) -> dict[str, Any]:
    rows = figures.scores_of(found)
    shown = {name: figures.the(rows, name) for name in ("VAE", "DDPM", "VP-SDE", "ODE", "pixels")}
    draw("scores", figures.scores(found), "; ".join(f"{s.title} {s.bits:.3f} bits" for s in shown.values()))
    draw("bounds", figures.bounds(found), "The DDPM's bound falls with T to that of the VP-SDE, at the rate 1 / T")
    baselines = [s for s in rows if s.look is None]
    ladder = [s for s in rows if s.model == "DDPM"]
    groups = [baselines, [shown["VAE"]], ladder, [shown["VP-SDE"], shown["ODE"]]]
    full = max(s.examples for s in rows)
    lowest = min(s.bits for s in rows if s.examples == full)
    return {
        "groups": groups, "what": _WHAT, "lowest": lowest, "shown": shown, "examples": full,
    }  # fmt: skip


_WHAT = {
    "uniform": "every level alike, log₂ 17",
    "histogram": "one histogram, all pixels",
    "pixels": "a histogram per pixel",
    "VAE": "bound, no levels",
    "DDPM": "bound, T levels",
    "VP-SDE": "bound, all levels",
    "ODE": "bound by the ODE",
}


def _strips(draw: Draw, found: Result, columns: int = 10) -> dict[str, Any]:
    figure = figures.strips(found, columns=columns)
    draw("strips", figure, "Rows of digits, one row for each solver, all from the same noises")
    first = figures.strips_order(found)["ODE"][0]
    return {
        "columns": min(columns, found.lengths["noise"]), "noises": found.lengths["noise"],
        "budget": int(found["budget"][0]), "best": found["solver"][first], "error": float(found["error"][0, first]),
    }  # fmt: skip


def _errors(draw: Draw, found: Result) -> dict[str, Any]:
    problem = figures.problem(found)
    draw("errors", figures.errors(found), "Error of every solver against the number of network calls")
    # Two equations, two rankings: a distance from the one's solution says nothing beside one from the other's.
    ranked = {kind: problem.ranked(BUDGET, "error", stochastic=kind == "SDE") for kind in ("ODE", "SDE")}
    if rows := [row for kind in ranked.values() for row in kind]:
        draw(
            "ranking",
            figures.ranking(found, BUDGET),
            "; ".join(f"{row.label} {sig(row['error'].value)}" for row in rows),
        )
    return {
        "ranked": ranked, **_common(found), "floor": [problem.floors["sliced_w2"], problem.limit("sliced_w2")],
        "tables": {measure: _table(problem, measure) for measure in ("error", "sliced_w2")},
        "dearer": [label for label in problem.labels if label not in {row.label for row in rows}],
    }  # fmt: skip


def _common(found: Result) -> dict[str, Any]:
    """What all cells of the comparison have in common; its one target among it."""
    return json.loads(found.attributes["settings"]) | {"about": json.loads(found.attributes["targets"])}


def _table(problem: Problem, measure: str) -> dict[str, Any]:
    """Rows of solvers, columns of budgets; marked: the best of each column and equation, or all within the floor."""
    columns = [{row.label: row for row in problem.ranked(budget, measure)} for budget in problem.budgets]
    first = {row.label: row for row in reversed(problem.rows)}
    rows = []
    for label in problem.labels:
        cells = [
            _cell(column[label], measure, budget) if label in column else None
            for column, budget in zip(columns, problem.budgets, strict=True)
        ]
        equation = "SDE" if first[label].stochastic else "ODE"
        rows.append({"name": label, "equation": equation, "order": first[label].order, "cells": cells})
    for place in range(len(columns)):
        for equation in ("ODE", "SDE"):
            cells = [cell for row in rows if row["equation"] == equation and (cell := row["cells"][place])]
            least = min((cell["value"] for cell in cells), default=0.0)
            for cell in cells:
                cell["best"] = cell["value"] <= (least if measure == "error" else problem.limit(measure))
    return {"budgets": problem.budgets, "rows": rows}


def _cell(row: Row, measure: str, budget: int) -> dict[str, Any]:
    """A number with its standard error, and the calls it took where they are not the budget."""
    value, low, high = row[measure]
    nfe = int(row.nfe)
    return {"value": value, "se": (high - low) / 3.92, "nfe": nfe if nfe != budget else 0, "best": False}


def _flow(draw: Draw, found: Result) -> dict[str, Any]:
    draw("flow", figures.flow(found), "Densities of a mixture with arrows, and lines from noise to data")
    return {"lines": found.lengths["sample"]}


def _film(draw: Draw, found: Result) -> dict[str, Any]:
    forward = {"forward": "noisy digit", "forward x0": "what the network sees"}
    draw("film_forward", figures.film(found, forward), "A digit with more and more noise, and the network's guess")
    seen = forward["forward x0"]
    backward = {"ODE": "along the ODE", "ODE x0": seen, "SDE": "along the SDE", "SDE x0": seen}
    figure = figures.film(found, backward, backward=True)
    draw("film_backward", figure, "Noise becoming a digit along the ODE and along the SDE")
    return {"steps": found.attributes["steps"]}


def _training(draw: Draw, diffusion: Result, vae: Result) -> dict[str, Any]:
    figure = figures.training({"Diffusion": diffusion, "VAE": vae})
    draw("training", figure, "Training and held-out bound against seconds, for both networks")
    return {}


SECTIONS: dict[str, tuple[str, Callable[..., dict[str, Any]], tuple[str, ...]]] = {
    "samples": ("Samples", _samples, ("samples",)),
    "likelihood": ("Likelihood", _likelihood, ("likelihood",)),
    "strips": ("One noise, many solvers", _strips, ("strips",)),
    "errors": ("Solvers and the truth", _errors, ("errors",)),
    "flow": ("Flow lines", _flow, ("flow",)),
    "film": ("The process", _film, ("film",)),
    "training": ("Training", _training, ("training/diffusion", "training/vae")),
}
"""The page: name -> (title, maker, the results it needs), in reading order."""


# --- How it was measured ----------------------------------------------------------------------------------------------


def _facts(manifest: Mapping[str, Any], found: Mapping[str, Result]) -> dict[str, str]:
    data, versions = manifest.get("data", {}), manifest.get("versions", {})
    facts = {
        "Data": f"{data.get('description', '')}; {data.get('source', '')}",
        "Seed": f"{manifest.get('seed')}, of weights, batches, noise and draws",
        "Machine": f"{manifest.get('platform')}, {manifest.get('cpus')} cores, {manifest.get('threads')} threads",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Commit": manifest.get("commit") or "not a git checkout",
    }
    if "likelihood" in found:
        reports = json.loads(found["likelihood"].attributes["reports"])
        bound = next(r for r in reports if r["logsnr"] and "ODE" not in r["method"])
        clean, noisy = bound["logsnr"]
        facts["Bounds"] = (
            f"{_settings(bound, 'path', 'decoder')}, logsnr from {clean:.2f} to {noisy:.2f}. Stratified noise levels, "
            f"averaged weights, no dropout, float32. Every digit is scored {bound['settings']['repeats']} times; the "
            "spread of the repeats is the estimator's error"
        )
        for ode in (r for r in reports if "ODE" in r["method"]):
            known = _settings(ode, "solver", "trace", "draws")
            facts["Probability flow"] = f"{known}; {ode['forward']:.0f} network calls for each digit, counted"
    if "errors" in found:
        e = _common(found["errors"])
        facts["Exact solutions"] = (
            f"{', '.join(f'{name}: {what}' for name, what in e['about'].items())}; the ODE by DOP853 at tolerance "
            f"1e-11, the SDE by an exponential multistep method with {e['reference_steps']} steps along the same "
            "Brownian motion. Every solver is on its own grid"
        )
    if "strips" in found:
        steps = found["strips"].attributes["reference_steps"]
        facts["Exact, on digits"] = (
            f"the same network with dpmpp_2m (ODE) and an exponential multistep method (SDE), {steps} steps"
        )
    return facts


def _settings(report: Mapping[str, Any], *names: str) -> str:
    words = {name: str(report["settings"][name]) for name in names if name in report["settings"]}
    return ", ".join(text if "(" in text else f"{name} {text}" for name, text in words.items())


GLOSSARY = {
    "bits per pixel": "length of a model's code for a digit, divided by its 64 pixels; also called bits per dimension",
    "bound": "an upper limit on that length, averaged over random noise: reconstruction + latent + prior",
    "network calls": "how often the network is asked for each sample; counted, not computed",
    "logsnr": "log of signal variance over noise variance: about +8 is a clean digit, −5 is noise",
    "ODE, SDE": "two equations with the same density at every time, one without noise and one with",
    "pathwise error": "root mean square distance from where the equation takes the same noise, in units of the data",
    "sliced Wasserstein": "distance of two clouds of points, root mean square over the directions of view",
}


def main(words: Sequence[str] | None = None) -> int:
    """Draw the page of a run again, or the README's picture."""
    parser = argparse.ArgumentParser("python -m sdegen.report", description=main.__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--picture", metavar="FILE", help="write this picture (.png, .svg, .pdf) and no page")
    chosen = parser.parse_args(words)
    try:
        print(picture(chosen.run, chosen.picture) if chosen.picture else build(chosen.run))
    except (OSError, ValueError) as error:
        print(f"sdegen.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
