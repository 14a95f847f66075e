"""``sdegen likelihood``: how likely data are under a trained model, by every method that it has."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from sdegen.commands import folder_to_fill, made_by
from sdegen.config import RunConfig
from sdegen.parsing import Parser, UsageError
from sdegen.results import write_csv
from sdegen.runs import Run

EXAMPLES = """\
  sdegen likelihood runs/a                          the model's own bound on the held-out data
  sdegen likelihood runs/a --T 10,100,1000          and as a DDPM with so many levels, the same weights
  sdegen likelihood runs/a --target_se 0.001        until the estimator's standard error is that small
  sdegen likelihood runs/a --ode --tol 1e-4 --n 100 and by the probability-flow ODE, on the first hundred
  sdegen likelihood runs/a --profile                and where the bits are, and the bound for every T from one pass
  sdegen likelihood runs/v --iwae 5000              importance-weighted bound of a VAE
  sdegen likelihood runs/a --methods "bound(T=10), ode(tol=1e-5, probes=4), autoregressive"
  torchrun --nproc-per-node 4 -m sdegen likelihood runs/a     or start the same command again while it runs

Every number is kept in results.h5 under all that it depends on, so that asking again for one that is known gives it at
once; likelihood.csv has them all. A command that was stopped goes on where it was. The two standard errors are kept
apart: the estimator's falls with more draws, the data's with more data only."""


def prepare(words: Sequence[str]) -> Callable[[], None]:
    """Read the command line; open the run and its data; check the methods; give back the work."""
    parser = Parser("likelihood", "RUN [options]", "Score data under a trained model, nats and bits/dim.", EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--T", type=list[PositiveInt], default=[], help="numbers of DDPM levels, such as 10,100,1000")
    parser.add_argument("--ode", action="store_true", help="the probability-flow ODE too")
    parser.add_argument("--iwae", type=PositiveInt, metavar="K", help="of a VAE, with K latents per datum")
    parser.add_argument("--methods", help="these in place of all the above, with commas between them")
    parser.add_argument("--target_se", type=PositiveFloat, help="error to reach: bits/dim, or nats of a density")
    parser.add_argument("--max_nfe", type=PositiveInt, help="at most so many network calls per example and method")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="the denoising error by noise level too, and every T that follows from it",
    )
    parser.add_argument("--split", choices=["test", "train"], default="test", help="which data")
    parser.add_argument("--n", type=PositiveInt, help="only the first so many data (default: all)")
    parser.add_argument("--draws", type=PositiveInt, default=16, help="noise levels per datum and repeat")
    parser.add_argument("--repeats", type=PositiveInt, default=2, help="independent repeats, for the standard error")
    parser.add_argument("--solver", help="of the ODE (default: rk4, and dopri54 where there is a tolerance)")
    parser.add_argument("--tol", type=PositiveFloat, help="tolerance of a solver that chooses its steps")
    parser.add_argument("--steps", type=PositiveInt, help="steps of a solver whose steps are fixed")
    parser.add_argument("--dequantizer", help="of grey levels under a density decoder: uniform or truncated-normal")
    parser.add_argument("--ode_draws", type=PositiveInt, help="z0 per datum, where it is drawn (default: 2)")
    parser.add_argument("--probes", type=PositiveInt, help="of Hutchinson's trace (default: 1, and 2 for densities)")
    parser.add_argument("--exact", action="store_true", help="the exact trace, in place of Hutchinson's")
    parser.add_argument(
        "--bin_width", type=PositiveFloat, help="of dequantised data, in model units: bits of a density"
    )
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of all noise")
    parser.add_argument("--again", action="store_true", help="compute what is known, too")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads")
    chosen = parser.read(words)
    run = Run.open(chosen.run)
    folder_to_fill("run", run.path)
    from sdegen.building import restore

    data, model = restore(run, device=_device(chosen.device))
    from sdegen.likelihood.evaluate import evaluate
    from sdegen.likelihood.ladder import measure

    labels = data.test_cond if chosen.split == "test" else data.train_cond
    labelled = RunConfig.from_toml(run.config).train.conditional and labels is not None
    common: dict[str, Any] = {
        "split": chosen.split,
        "n": chosen.n,
        "seed": chosen.seed,
        "bin_width": chosen.bin_width,
        "folder": run.path,
        "again": chosen.again,
        "notes": made_by(run, device=chosen.device, conditional=labelled),
    }
    given = (model, data, labels if labelled else None)
    methods = _listed(chosen.methods) if chosen.methods else _asked(run, data, model, chosen)
    effort = {"target_se": chosen.target_se, "max_nfe": chosen.max_nfe}
    score = partial(evaluate, *given, methods=methods, **effort, **common)
    profile = partial(measure, *given, repeats=chosen.repeats, **common) if chosen.profile else None
    for work in filter(None, (score, profile)):
        work(dry_run=True)
    return lambda: _work(run, score, profile, chosen.threads)


def _device(name: str) -> str:
    """A process of several takes the accelerator of its own number."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name


def _listed(text: str) -> list[str]:
    """Methods between commas that are not inside parentheses.

    >>> _listed("bound(T=10, draws=4), ode")
    ['bound(T=10, draws=4)', 'ode']
    """
    return [word.strip() for word in re.split(r",(?![^()]*\))", text) if word.strip()]


def _asked(run: Run, data: Any, model: Any, chosen: Namespace) -> dict[str, str]:
    """Title -> method: baselines, what the model is, and what else was asked for."""
    from sdegen.levels import Discrete
    from sdegen.models import GaussianDiffusion

    name = RunConfig.from_toml(run.config).model.name
    effort = f"draws={chosen.draws}, repeats={chosen.repeats}"
    found: dict[str, str] = {}
    if data.bins is not None:
        found = {"uniform": "uniform", "histogram": "histogram", "pixel histogram": "pixel-histogram"}
    if not isinstance(model, GaussianDiffusion):
        if chosen.T or chosen.ode or chosen.profile:
            raise UsageError(f"--T, --ode and --profile are for diffusions, and {run.path} holds a {name}")
        found[name.upper()] = f"bound({effort})"
    else:
        if isinstance(model.levels, Discrete):
            found[f"DDPM T={model.levels.T}"] = f"bound({effort})"
        found |= {f"DDPM T={T}": f"bound(T={T}, {effort})" for T in chosen.T if f"DDPM T={T}" not in found}
        found["VP-SDE"] = f"bound(T=inf, {effort})"
    if chosen.ode:
        names = ("solver", "tol", "steps", "probes", "dequantizer")
        given = {**{name: getattr(chosen, name) for name in names}, "draws": chosen.ode_draws, "exact": chosen.exact}
        options = {key: value for key, value in given.items() if value is not None}
        found["ODE"] = f"ode({', '.join(f'{key}={value}' for key, value in options.items())})"
    if chosen.iwae:
        if name != "vae":
            raise UsageError(f"--iwae is for a vae, and {run.path} holds a {name}")
        found[f"IWAE K={chosen.iwae}"] = f"iwae(K={chosen.iwae}, repeats={chosen.repeats})"
    return found


def _work(run: Run, score: Callable[..., Any], profile: Callable[..., Any] | None, threads: int) -> None:
    from tqdm.auto import tqdm

    from sdegen.likelihood.store import everything
    from sdegen.train.interrupt import cpu_threads

    bars: dict[str, tqdm[Any]] = {}
    first = int(os.environ.get("RANK", "0")) == 0  # of several processes, one speaks
    with ExitStack() as stack:
        stack.enter_context(cpu_threads(threads))

        def progress(title: str, share: float) -> None:
            if title not in bars:
                made = tqdm(total=1.0, desc=title, disable=None, leave=False, bar_format=_BAR)
                bars[title] = stack.enter_context(made)
            bars[title].update(share - bars[title].n)

        try:
            found = score(progress=progress)
        finally:
            if first and (rows := everything(run.path)):
                write_csv(run / "likelihood.csv", rows)
        measured = None if profile is None else profile(progress=partial(progress, "profile"))
    if first:
        print(found)
        if measured is not None:
            _show(run, *measured)


def _show(run: Run, profile: Any, known: bool) -> None:
    """The bounds that follow from a profile, in print and in a table, and a picture of it."""
    from sdegen.likelihood.ladder import ladder
    from sdegen.likelihood_plots import denoising
    from sdegen.style import save

    found = ladder(profile)
    write_csv(run / "profile.csv", found.rows())
    picture = save(denoising(profile.to_result()), run / "profile.png")
    print(f"\n{profile.shares}\n\n{found}\n\n{'known already; ' if known else ''}{picture}, {run / 'profile.csv'}")


_BAR = "{desc}: {percentage:3.0f}% |{bar:24}| {elapsed} spent, {remaining} left"
