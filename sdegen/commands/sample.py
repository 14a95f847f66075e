"""``sdegen sample``: draws from a trained model, and what they cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from sdegen.commands import file_to_write, folder_to_fill, made_by
from sdegen.parsing import Parser, UsageError
from sdegen.results import Result, write
from sdegen.runs import RESULTS, Run

EXAMPLES = """\
  sdegen sample runs/a                                    64 samples, by the model's own default
  sdegen sample runs/a --n 512 --solver dpmpp_2m --nfe 20 --seed 1
  sdegen sample runs/a --solver dopri5 --tol 1e-4         adaptive
  sdegen sample runs/a --solver ancestral --steps 100 --out digits.npz
  sdegen sample runs/a --label 3                          one class, of a model trained with train.conditional

Sample i depends on the seed and on i alone: the first 64 of 512 are the same as 64. The folder gets samples-NAME.npz
(the samples in the units of the data file), samples-NAME.png, and a line in results.h5."""

PICTURED = 256  # at most so many images in the picture


def prepare(words: Sequence[str]) -> Callable[[], None]:
    """Read the command line; open the run; check solver, budget and label; give back the work."""
    parser = Parser("sample", "RUN [options]", "Draw samples from a trained model.", EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--n", type=PositiveInt, default=64, help="number of samples")
    parser.add_argument(
        "--solver", default=None, help="see `sdegen solvers`, or package.module:Class (default: the model's)"
    )
    parser.add_argument("--steps", type=PositiveInt, help="steps of the grid (default: 20, or a DDPM's T)")
    parser.add_argument("--nfe", type=PositiveInt, help="budget of network calls per sample, in place of steps")
    parser.add_argument("--tol", type=PositiveFloat, help="tolerance of an adaptive solver, in place of steps")
    parser.add_argument(
        "--grid",
        default=None,
        help="where the steps lie: logsnr, uniform, karras, quadratic, ... (default: the solver's)",
    )
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of all noise")
    parser.add_argument("--label", type=NonNegativeInt, help="class label, for a conditional model")
    parser.add_argument("--mode", action="store_true", help="the most likely value of p(x | z0) in place of a draw")
    parser.add_argument("--out", metavar="FILE", help=".npz or .png (default: both, in the run folder)")
    parser.add_argument("--batch", type=PositiveInt, default=512, help="samples at a time; it changes no sample")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads")
    chosen = parser.read(words)
    out = None if chosen.out is None else file_to_write("out", chosen.out)
    if out is not None and out.suffix not in (".npz", ".png"):
        raise UsageError(f"out: {out} must end in .npz or .png")

    run = Run.open(chosen.run)
    folder_to_fill("run", run.path)
    from sdegen.building import restore

    data, model = restore(run, device=chosen.device, data=False)
    settings = _settings(model, chosen)
    cond = _labels(model, run, chosen)
    return lambda: _sample(run, data, model, chosen, settings, cond, out)


def _settings(model: Any, chosen: Namespace) -> dict[str, Any]:
    """What ``model.sample`` is given; every mistake that a solver could make of it is found here."""
    from sdegen.models import GaussianDiffusion
    from solvers import GRIDS, resolve
    from solvers.solve import find, steps_within

    given = {key: chosen[key] for key in ("solver", "steps", "nfe", "tol", "grid") if chosen[key] is not None}
    if not isinstance(model, GaussianDiffusion):
        if given:
            raise UsageError(f"this model is sampled in one step: leave out --{' and --'.join(given)}")
        return {}
    settings = model.sampler(given)
    method = resolve(settings["solver"])
    budgets = [key for key in ("steps", "nfe", "tol") if key in given]
    if len(budgets) > 1:
        raise UsageError(f"give one of --steps, --nfe and --tol, not --{' and --'.join(budgets)}")
    if "grid" in given:
        find(given["grid"], GRIDS, "grid")
    adaptive = method.nfe_per_step == 0
    if adaptive and budgets != ["tol"] and budgets:
        raise UsageError(f"{chosen.solver} chooses its own steps: give --tol, not --{budgets[0]}")
    if not adaptive and budgets == ["tol"]:
        raise UsageError(f"{settings['solver']} takes fixed steps: give --steps or --nfe, not --tol")
    if "nfe" in given:
        steps_within(method, given["nfe"])
    if adaptive and not budgets:
        return {**given, "tol": 1e-4}
    return settings


def _labels(model: Any, run: Run, chosen: Namespace) -> Any:
    import torch

    if chosen.label is None:
        return None
    from sdegen.config import RunConfig

    classes = run.manifest["data"]["classes"]
    if not RunConfig.from_toml(run.config).train.conditional:
        raise UsageError(f"{run.path} was trained without labels (train.conditional): leave out --label")
    if chosen.label >= classes:
        raise UsageError(f"label: the classes are 0 to {classes - 1}, not {chosen.label}")
    return torch.full((chosen.n,), chosen.label, device=model.device)


def _sample(
    run: Run, data: Any, model: Any, chosen: Namespace, settings: dict[str, Any], cond: Any, out: Path | None
) -> None:
    import torch
    from tqdm import tqdm

    from sdegen.train.interrupt import cpu_threads

    budget = next((f"{key}{settings[key]:g}" for key in ("steps", "nfe", "tol") if key in settings), "")
    label = "" if chosen.label is None else f"label{chosen.label}"
    from solvers import SOLVERS

    chosen_solver = settings.get("solver", "")
    named = next((name for name, known in SOLVERS.items() if known == chosen_solver), str(chosen_solver))
    solver = "own-levels" if "ts" in settings else named.replace(":", ".")
    parts = [solver, settings.get("grid", ""), budget, label]
    name = "-".join(filter(None, [*parts, "mode" if chosen.mode else "", f"seed{chosen.seed}"]))
    before, begun = model.evaluations, time.perf_counter()
    pieces = []
    with tqdm(total=chosen.n, unit="sample", disable=None, leave=False) as bar, cpu_threads(chosen.threads):
        for first in range(0, chosen.n, chosen.batch):
            n = min(chosen.batch, chosen.n - first)
            labels = None if cond is None else cond[first : first + n]
            piece = model.sample(n, labels, seed=chosen.seed, first=first, draw=not chosen.mode, **settings)
            pieces.append(piece.cpu())
            bar.update(n)
    x = torch.cat(pieces)
    seconds = time.perf_counter() - begun
    nfe = (model.evaluations - before) / chosen.n
    if not bool(x.isfinite().all()):
        raise ArithmeticError(f"{int((~x.isfinite()).flatten(1).any(1).sum())} of {chosen.n} samples are not finite")

    raw = data.raw(x).cpu().numpy()
    raw = raw.astype(np.uint8) if data.bins is not None and data.bins.count <= 256 else raw
    files = [out] if out else [run / f"samples-{name}.npz", run / f"samples-{name}.png"]
    for file in files:
        _write(file, raw, x.cpu().numpy(), run, chosen, cond)
    asked = {key: value if key != "solver" else str(value) for key, value in settings.items() if key != "ts"}
    facts = {"nfe": nfe, "seconds": seconds, "n": chosen.n, "seed": chosen.seed, "device": chosen.device, **asked}
    axes = ("sample", *(("channel", "row", "column") if raw.ndim == 4 else ("coordinate",)))
    shown = Result({"x": (axes, raw, {"unit": "units of the data"})}, made_by(run, **facts))
    write(run / RESULTS, f"samples/{name}", shown)
    print(f"{chosen.n} samples, {nfe:g} network calls each, {seconds:.1f} s: {', '.join(map(str, files))}")


def _write(file: Path, raw: np.ndarray, x: np.ndarray, run: Run, chosen: Namespace, cond: Any) -> None:
    from sdegen.files import replacing

    with replacing(file, needed=raw.nbytes if file.suffix == ".npz" else 0) as temporary:
        if file.suffix == ".npz":
            labels = {} if cond is None else {"labels": cond.cpu().numpy()}
            np.savez_compressed(temporary, x=raw, **labels, made_by=np.array(f"{run.path} {chosen.as_dict()}"))
        else:
            _picture(temporary, x)


def _picture(file: Path, x: np.ndarray) -> None:
    """Images on a sheet, or points in the plane."""
    from matplotlib.figure import Figure
    from matplotlib.image import imsave

    if x.ndim == 4:
        grey = np.clip((x[:PICTURED].transpose(0, 2, 3, 1) + 1) / 2, 0, 1)
        grey = grey if grey.shape[-1] == 3 else grey[..., :1].repeat(3, -1)
        columns = math.ceil(math.sqrt(len(grey)))
        empty = np.ones((-len(grey) % columns, *grey.shape[1:]))
        framed = np.pad(np.concatenate([grey, empty]), ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=1.0)
        rows = framed.reshape(-1, columns, *framed.shape[1:])
        sheet = rows.transpose(0, 2, 1, 3, 4).reshape(rows.shape[0] * rows.shape[2], -1, 3)
        zoom = max(1, 768 // max(sheet.shape[:2]))
        imsave(file, sheet.repeat(zoom, 0).repeat(zoom, 1))
        return
    figure = Figure((5, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(x[:, 0], x[:, min(1, x.shape[1] - 1)], s=4, linewidths=0)
    axes.set(aspect="equal", xlabel="x[0]", ylabel=f"x[{min(1, x.shape[1] - 1)}]")
    figure.savefig(file, dpi=120)
