"""``sdegen likelihood``: how likely data are under a trained model, by every method that it has."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from sdegen.commands import aligned, made_by
from sdegen.config import RunConfig
from sdegen.parsing import Parser, UsageError
from sdegen.results import Result, write, write_csv
from sdegen.runs import RESULTS, Run

EXAMPLES = """\
  sdegen likelihood runs/a                          the model's own bound on the held-out data
  sdegen likelihood runs/a --T 10,100,1000          and as a DDPM with so many levels, the same weights
  sdegen likelihood runs/a --ode --tol 1e-4 --n 100 and by the probability-flow ODE, on the first hundred
  sdegen likelihood runs/v --iwae 100               importance-weighted bound of a VAE

Every row goes to results.h5 as soon as it is known, the table to likelihood.csv. The two standard errors are kept
apart: the estimator's falls with more draws, the data's with more data only."""

Job = Callable[..., Any]  # progress= -> LikelihoodReport


def prepare(words: Sequence[str]) -> Callable[[], None]:
    """Read the command line; open the run and its data; check the methods; give back the work."""
    parser = Parser("likelihood", "RUN [options]", "Score data under a trained model, nats and bits/dim.", EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--T", type=list[PositiveInt], default=[], help="numbers of DDPM levels, such as 10,100,1000")
    parser.add_argument("--ode", action="store_true", help="the probability-flow ODE too")
    parser.add_argument("--iwae", type=PositiveInt, metavar="K", help="of a VAE, with K latents per datum")
    parser.add_argument("--split", choices=["test", "train"], default="test", help="which data")
    parser.add_argument("--n", type=PositiveInt, help="only the first so many data (default: all)")
    parser.add_argument("--draws", type=PositiveInt, default=16, help="noise levels per datum and repeat")
    parser.add_argument("--repeats", type=PositiveInt, default=2, help="independent repeats, for the standard error")
    parser.add_argument("--solver", default="dopri54", help="of the ODE")
    parser.add_argument("--tol", type=PositiveFloat, help="tolerance of the ODE's solver (default: 1e-4)")
    parser.add_argument("--steps", type=PositiveInt, help="steps of the ODE's solver, where they are fixed")
    parser.add_argument("--ode_draws", type=PositiveInt, default=2, help="z0 per datum, where the data are grey levels")
    parser.add_argument("--probes", type=PositiveInt, help="of Hutchinson's trace (default: 1, and 2 for densities)")
    parser.add_argument("--exact", action="store_true", help="the exact trace, in place of Hutchinson's")
    parser.add_argument(
        "--bin_width", type=PositiveFloat, help="of dequantised data, in model units: bits of a density"
    )
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of all noise")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads")
    chosen = parser.read(words)
    run = Run.open(chosen.run)
    data, model = run.load(device=chosen.device)
    jobs = _jobs(run, data, model, chosen)
    labelled = RunConfig.from_toml(run.config).train.conditional
    return lambda: _score(run, data, chosen, jobs, "-log p(x | label)" if labelled else "-log p(x)")


def _jobs(run: Run, data: Any, model: Any, chosen: Namespace) -> dict[str, Job]:
    """Name of a row -> what computes it."""
    from sdegen.levels import Discrete
    from sdegen.likelihood import bound, importance, ode_likelihood
    from sdegen.models import VAE, GaussianDiffusion, global_histogram, pixel_histogram, uniform

    config = RunConfig.from_toml(run.config)
    x, labels = (data.test, data.test_cond) if chosen.split == "test" else (data.train, data.train_cond)
    x, cond = x[: chosen.n], None if labels is None or not config.train.conditional else labels[: chosen.n]
    if model.discrete and chosen.bin_width is not None:
        raise UsageError("bin_width: this model gives probabilities of grey levels; leave it out")
    common = {"seed": chosen.seed, "bin_width": chosen.bin_width}
    effort = {"draws": chosen.draws, "repeats": chosen.repeats, **common}
    jobs: dict[str, Job] = {}
    if data.bins is not None:
        baselines = {
            "uniform": uniform(data.event_shape, data.bins),
            "histogram": global_histogram(data.train, data.bins),
            "pixel histogram": pixel_histogram(data.train, data.bins),
        }
        jobs |= {name: partial(bound, m, x, draws=1, repeats=1) for name, m in baselines.items()}
    if not isinstance(model, GaussianDiffusion) and (chosen.T or chosen.ode):
        raise UsageError(f"--T and --ode are for diffusions, and {run.path} holds a {config.model.name}")
    if not isinstance(model, VAE) and chosen.iwae:
        raise UsageError(f"--iwae is for a vae, and {run.path} holds a {config.model.name}")
    if isinstance(model, GaussianDiffusion):
        own = [model.levels.T] if isinstance(model.levels, Discrete) else []
        for T in own:
            jobs[f"DDPM T={T}"] = partial(bound, model, x, cond, **effort)
        for T in (T for T in chosen.T if T not in own):
            jobs[f"DDPM T={T}"] = partial(bound, model.discretize(T), x, cond, **effort)
        jobs["VP-SDE"] = partial(bound, model.continuous(), x, cond, **effort)
        if chosen.ode:
            jobs["ODE"] = partial(ode_likelihood, model.continuous(), x, cond, **_ode(model, chosen), **common)
    else:
        jobs[config.model.name.upper()] = partial(bound, model, x, cond, **effort)
        if K := chosen.iwae:
            jobs[f"IWAE K={K}"] = partial(importance, model, x, K, cond, repeats=chosen.repeats, **common)
    return jobs


def _ode(model: Any, chosen: Namespace) -> dict[str, Any]:
    """Solver, budget and trace of the probability-flow ODE."""
    from sdegen.likelihood import Exact, Hutchinson
    from solvers import resolve

    method = resolve(chosen.solver)
    if method.stochastic:
        raise UsageError(f"{chosen.solver} draws noise: the ODE needs a solver without")
    if (method.nfe_per_step == 0) == (chosen.steps is not None):
        kind, want = ("chooses its own", "--tol, not --steps") if chosen.steps else ("takes fixed", "--steps")
        raise UsageError(f"{chosen.solver} {kind} steps: give {want}")
    if chosen.exact and model.dims > Exact().limit:
        raise UsageError(f"the exact trace is for at most {Exact().limit} coordinates, not {model.dims}: use --probes")
    budget = {"steps": chosen.steps} if chosen.steps else {"tol": chosen.tol or 1e-4}
    trace = Exact() if chosen.exact else Hutchinson(chosen.probes or (1 if model.discrete else 2), chosen.seed)
    draws = {"draws": chosen.ode_draws} if model.discrete else {}
    return {"solver": chosen.solver, "trace": trace, **budget, **draws}


def _score(run: Run, data: Any, chosen: Namespace, jobs: dict[str, Job], what: str) -> None:
    rows: list[dict[str, Any]] = []
    try:
        for name, job in jobs.items():
            rows.append(_row(run, data, chosen, name, job))
    finally:
        if rows:
            write_csv(run / "likelihood.csv", rows)
            print(_table(rows, data, chosen, what))


def _row(run: Run, data: Any, chosen: Namespace, name: str, job: Job) -> dict[str, Any]:
    """Compute one row and keep it."""
    from tqdm import tqdm

    from sdegen.train.interrupt import cpu_threads

    with tqdm(total=1.0, desc=name, disable=None, leave=False, bar_format=_BAR) as bar, cpu_threads(chosen.threads):
        tells = "progress" in inspect.signature(job).parameters
        report = job(progress=lambda done, of: bar.update(done / of - bar.n)) if tells else job()
    facts = report.to_dict()
    parts = facts.pop("parts")
    arrays: dict[str, Any] = {"nats": (("example",), report.values.numpy(), {"unit": "nat"})}
    if parts:
        arrays |= {"part": (("part",), list(parts)), "mean": (("part",), list(parts.values()), {"unit": "nat"})}
    more = {"split": chosen.split, "device": chosen.device, "seed": chosen.seed, "nfe": report.forward}
    more["log_volume"] = data.log_volume  # nats between model units and the file's
    key = name.replace(" ", "-").replace("=", "")
    write(run / RESULTS, f"likelihood/{key}", Result(arrays, made_by(run, **facts, **more)))
    return {"model": name, **{k: v for k, v in facts.items() if k not in ("settings", "logsnr")}, **parts}


_BAR = "{desc}: {percentage:3.0f}% |{bar:24}| {elapsed} spent, {remaining} left"


def _table(rows: list[dict[str, Any]], data: Any, chosen: Namespace, what: str) -> str:
    head = ("", "nats", "bits/dim", "± estimator", "± data", "nfe", "vjp", "seconds")
    sign = {"exact": "= ", "upper bound": "≤ ", "estimate": "≈ "}

    def number(value: float, digits: int) -> str:
        return "–" if math.isnan(value) else f"{value:.{digits}f}"

    cells = [
        (
            row["model"],
            sign[row["kind"]] + number(row["nats"], 3),
            number(row["bits_per_dim"], 4),
            number(row["estimator_se_bits"], 4),
            number(row["data_se_bits"], 4),
            f"{row['forward']:g}",
            f"{row['vjp']:g}",
            f"{row['seconds']:.1f}",
        )
        for row in rows
    ]
    which = "held-out" if chosen.split == "test" else "training"
    lines = [f"{what} of {rows[0]['examples']} {which} examples of {data.name}; standard errors in bits/dim"]
    if rows[-1]["of"] == "density" and data.scale != 1:
        lines.append(f"densities are per model unit: {-data.log_volume:+.4f} nats for the units of {data.name}")
    return "\n".join([*lines, "", aligned([head, *cells], right=range(1, len(head)))])
