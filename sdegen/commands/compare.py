"""``sdegen compare``: which solver, at which cost, and can I believe it?"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from sdegen.commands import folder_to_fill
from sdegen.parsing import Parser, UsageError
from sdegen.provenance import cpus
from sdegen.tables import duration

if TYPE_CHECKING:
    from sdegen.comparison.folder import Stale

EXAMPLES = """\
  sdegen compare mixture16 --nfe 5,10,20,50,100           every solver with fixed steps; minutes
  sdegen compare runs/a --solvers ddim,heun,'unipc*'      a trained run, against its own converged solution
  sdegen compare ring --solvers ode --grids karras,logsnr --nfe 10,20
  sdegen compare mixture2d --solvers adaptive --tol 1e-2,1e-4
  sdegen compare mixture2d --solvers mine.py:Leapfrog --out runs/compare   one more, beside those that are there
  torchrun --nproc-per-node 8 -m sdegen compare mixture64 --out runs/shared

TARGET is an oracle, a run folder, or package.module:function that returns a model; several with commas between them.
Every cell is on the disk when it is done: the same command goes on after Ctrl-C, a crash or kill -9, and measures only
what is not there yet. Cells that another version of the program has measured are not mixed in silently: it asks for
--keep or --anew. The folder gets results.h5 and results.csv; `sdegen report` draws them."""

MODEL = {"samples": 64, "reference_steps": 512}  # defaults where a network is asked, which takes longer than an oracle


def prepare(words: Sequence[str]) -> Callable[[], None]:
    """Read the command line; load the targets; check solvers, budgets and the folder; give back the work."""
    parser = Parser("compare", "TARGET [options]", "Measure solvers where the truth or its like is known.", EXAMPLES)
    parser.add_argument("target", metavar="TARGET", help="what is solved")
    parser.add_argument(
        "--solvers",
        default="all",
        help="names, patterns such as 'dpmpp*', package.module:Class, file.py:Class, or all, ode, sde, fixed, adaptive",
    )
    parser.add_argument("--nfe", type=list[PositiveInt], help="budgets of network calls (default: 5,10,20,50,100)")
    parser.add_argument("--tol", type=list[PositiveFloat], help="tolerances, for solvers that choose their own steps")
    parser.add_argument(
        "--paths", default="", help="Gaussian paths (default: the target's own; vp-linear of an oracle)"
    )
    parser.add_argument("--grids", default="", help="time grids (default: each solver's own)")
    parser.add_argument("--seeds", type=list[NonNegativeInt], default=[0], help="of noises, Brownian motion and data")
    parser.add_argument(
        "--samples", type=PositiveInt, help="noises of the pathwise error (default: 128; of a model 64)"
    )
    parser.add_argument("--cloud", type=NonNegativeInt, default=2000, help="endpoints of the distances; 0 for none")
    parser.add_argument("--transport", type=NonNegativeInt, default=1000, help="of these, for W2 and energy distance")
    parser.add_argument(
        "--reference_steps", type=PositiveInt, help="of the SDE's converged solution (default: 2048; of a model 512)"
    )
    parser.add_argument("--out", default="runs/compare", help="folder; what it holds is not measured again")
    parser.add_argument("--keep", action="store_true", help="keep cells that other code has measured (column code)")
    parser.add_argument("--anew", action="store_true", help="measure cells again that other code has measured")
    parser.add_argument("--overwrite", action="store_true", help="forget all that the folder holds")
    parser.add_argument(
        "--workers", type=PositiveInt, help="processes (default: one for each core, where it is worth it)"
    )
    parser.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads of each")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    chosen = parser.read(words)

    from sdegen.building import usable_device
    from sdegen.comparison.folder import Found, check_folder, check_replaceable
    from sdegen.comparison.settings import possible
    from sdegen.comparison.sweep import rank
    from sdegen.comparison.truth import Truths

    usable_device(chosen.device)
    settings, out = _settings(chosen), folder_to_fill("out", chosen.out)
    truths = Truths(settings)
    cells = possible(settings)
    number, of = rank()
    if chosen.keep + chosen.anew + chosen.overwrite > 1:
        raise UsageError("give one of --keep, --anew and --overwrite")
    if chosen.overwrite and of > 1:
        raise UsageError("overwrite: not with several processes; remove the folder")
    if chosen.overwrite:
        check_replaceable(out)
    found = Found() if chosen.overwrite else check_folder(out, truths, _stale(chosen))
    if number == 0:
        for note in found.notes:
            print(note, flush=True)
        if (
            any(target.truth for target in truths.targets.values())
            and settings.cloud
            and settings.transport
            and (not find_spec("ot"))
        ):
            print("w2 is left out: it needs POT, pip install 'sdegen[metrics]'", flush=True)
    workers = 1 if of > 1 else chosen.workers or max(1, min(cpus() // chosen.threads, len(cells) // 25, 16))
    return lambda: _compare(settings, out, workers, chosen, len(cells), found.done, first=number == 0)


def _stale(chosen: Namespace) -> Stale:
    return "keep" if chosen.keep else "anew" if chosen.anew else "ask"


def _settings(chosen: Namespace) -> Any:
    """What is asked for, as a :class:`Comparison`."""
    from sdegen.comparison import Comparison
    from sdegen.oracles import ORACLES

    targets = _listed(chosen.target)
    budgets = chosen.nfe or (() if chosen.tol else Comparison.budgets)
    tols = chosen.tol or (() if chosen.nfe else Comparison.tols)
    model = MODEL if any(target not in ORACLES for target in targets) else {}
    sizes: dict[str, Any] = {
        name: chosen[name] or model.get(name, getattr(Comparison, name)) for name in ("samples", "reference_steps")
    }
    return Comparison(
        targets, _listed(chosen.solvers), tuple(budgets), tuple(tols), _listed(chosen.paths), _listed(chosen.grids),
        tuple(chosen.seeds), cloud=chosen.cloud, transport=chosen.transport, device=chosen.device, **sizes,
    )  # fmt: skip


def _listed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _compare(settings: Any, out: Path, workers: int, chosen: Namespace, count: int, there: int, *, first: bool) -> None:
    from tqdm import tqdm

    from sdegen.comparison.folder import forget
    from sdegen.comparison.sweep import rank, sweep
    from sdegen.train.interrupt import stoppable

    if chosen.overwrite:
        forget(out, settings)
    began, spent = time.perf_counter(), _processor_seconds()
    shape = "{percentage:3.0f}% |{bar:24}| {elapsed} spent, {remaining} left{postfix}"
    with stoppable() as stop, tqdm(total=1.0, bar_format=shape, disable=None if first else True) as bar:

        def advance(what: str, share: float) -> None:
            if not what:  # what was there already did not take this time
                bar.initial = share
            bar.n = share
            bar.set_postfix_str(what)  # which draws it

        file = sweep(
            settings, out, workers=workers, threads=chosen.threads, stale=_stale(chosen), progress=advance, stop=stop
        )
    if not first:
        return
    if file.exists():
        print(_told(file))
    if stop.is_set():
        raise KeyboardInterrupt(
            f"stopped; what is measured of {count} cells is kept in {out}: the same command goes on"
        )
    took, busy = duration(time.perf_counter() - began), duration(_processor_seconds() - spent)
    whose = "the first process" if rank()[1] > 1 else f"{workers} processes" if workers > 1 else "one process"
    print(f"{count - there} cells measured in {took}, {busy} of processor time ({whose}); {there} were there before")
    print(f"all in {file} and {file.with_suffix('.csv')}; next: sdegen report {out}")


def _processor_seconds() -> float:
    """Of this process and of its helpers that have ended."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def _told(file: Path) -> str:
    """The best solvers for every budget, for people in a hurry."""
    from sdegen.standings import MEASURES, front
    from sdegen.sweeps import gather
    from sdegen.tables import aligned

    text: list[str] = []
    for problem in gather([file]).problems:
        head, law = ["calls", "nearest to its ODE", "nearest to its SDE"], problem.distance
        if law:
            head.append(f"{MEASURES[law]} (of exact samples {problem.floors[law]:.2g})")
        rows = [head]
        for budget in problem.budgets:
            row = [str(budget)]
            for noisy in (False, True):
                ranked = problem.ranked(budget, "error", stochastic=noisy)
                row.append(_best(ranked[0], "error") if ranked else "–")
            if law:
                ranked = problem.ranked(budget, law)
                inside = sum(problem.inside(one, law) for one in ranked)
                best = _best(ranked[0], law) if ranked else "–"
                row.append(best + (f", one of {inside} not to be told from exact" if inside > 1 else ""))
            rows.append(row)
        ode = front([row for row in problem.rows if not row.stochastic], "error")
        text += [problem.title, aligned(rows, right=[0]) if problem.budgets else ""]
        text += ["no ODE solver is cheaper and better: " + ", ".join(f"{row.label} {row.nfe:.0f}" for row in ode), ""]
        text += [f"no numbers: {reason} ({', '.join(names)})" for reason, names in _failed(problem.rows).items()]
    return "\n".join(line for line in text)


def _best(row: Any, measure: str) -> str:
    value, low, high = row[measure]
    interval = f" ({low:.2g} to {high:.2g})" if low < high else ""
    return f"{row.label} {value:.2g}{interval}"


def _failed(rows: Sequence[Any]) -> dict[str, list[str]]:
    """Why cells have no numbers -> which."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.status != "ok":
            found.setdefault(row.status.removeprefix("ValueError: "), []).append(row.label)
    return found
