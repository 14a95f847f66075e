"""How likely are held-out digits: VAE, DDPM and VP-SDE, by every method, beside exact baselines?

One diffusion and one VAE are trained on scikit-learn's 8x8 digits and scored on the 360 that were held out, in bits per
pixel of 17 grey levels. The DDPMs are the diffusion with T levels, the same weights; ten levels are scored twice, in
equal steps with the posterior's variance, as is the custom, and with the grid and the variance that are the best for
a network that errs as this one does on its training data. Four baselines say what the numbers are worth: they are
exact, and a generative model that does not beat them has learnt nothing. The *gap* is to the VP-SDE's bound on the same
digits, which is known better than either number; the ODE is solved for some of them only.

    python -m experiments.likelihood_table
    python -m experiments.likelihood_table --target_se 0.001 --K 20000 --out runs/table

Stopped, it goes on where it was: started again, or by a second process at the same time.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.command import command
from sdegen import plots, results
from sdegen.building import build, restore
from sdegen.config import RunConfig, configure, read_toml, shipped
from sdegen.data import Dataset
from sdegen.files import write_bytes
from sdegen.levels import Discrete, Optimal
from sdegen.likelihood import Evaluation, LikelihoodReport, best_grid, denoising_profile, evaluate
from sdegen.likelihood.report import gap
from sdegen.models import VAE, GaussianDiffusion
from sdegen.plots import Dot
from sdegen.provenance import provenance
from sdegen.results import Result
from sdegen.runs import Run, describe
from sdegen.style import GREY, MODELS, Look, save
from sdegen.train import fit
from solvers.solve import find

__all__ = ["Config", "run"]

BAR = "{desc}: {percentage:3.0f}% |{bar:24}| {elapsed} spent, {remaining} left"


@dataclass(frozen=True)
class Config:
    """The experiment.

    Args:
        diffusion: configuration of the diffusion's training, a file or one that comes with sdegen.
        vae: of the VAE's.
        baselines: methods that are exact.
        T: numbers of levels; the first is also scored on its best grid.
        K: importance samples of the VAE.
        target_se: standard error of the estimators to reach, bits/dim; not by the ODE.
        max_nfe: network calls for each digit and method, at most.
        tol: tolerance of the probability-flow ODE.
        ode_n: digits that it is solved for, each twice; one solve is many times as dear as a bound.
        n: held-out digits, all of them by default.
        seed: of all noise in scoring.
        out: folder for the runs, results.h5, likelihood_table.csv, .md and .svg.
    """

    diffusion: str = "digits-long"
    vae: str = "digits-vae-long"
    baselines: tuple[str, ...] = ("uniform", "histogram", "pixel-histogram", "autoregressive")
    T: tuple[int, ...] = (10, 100, 1000)
    K: int = 5000
    target_se: float = 0.002
    max_nfe: int = 20_000
    tol: float = 1e-4
    ode_n: int = 120
    n: int = 360
    seed: int = 0
    out: Path = Path("runs/likelihood_table")

    def __post_init__(self) -> None:
        if not self.T or min(self.T) < 1:
            raise ValueError(f"T are numbers of levels, at least one of them, not {self.T}")
        for file in (self.diffusion, self.vae):
            if not Path(file).is_file():
                find(file, shipped(), "configuration")


def run(config: Config | None = None) -> Path:
    """Train what is not trained yet, score what is not scored yet, write, and draw.

    Args:
        config: the default where None.

    Returns:
        Path of ``results.h5``.
    """
    config = config or Config()
    config.out.mkdir(parents=True, exist_ok=True)
    data, diffusion = trained(config.diffusion, config.out / "diffusion")
    _, vae = trained(config.vae, config.out / "vae")
    assert isinstance(diffusion, GaussianDiffusion)
    assert isinstance(vae, VAE)
    first, *_ = config.T
    step, *ladder = ({f"DDPM, T = {T}": f"bound(T={T})"} for T in config.T)
    told = _Bars()
    common: dict[str, Any] = {
        "n": config.n, "seed": config.seed, "target_se": config.target_se, "max_nfe": config.max_nfe,
        "folder": config.out, "progress": told,
    }  # fmt: skip
    once = {"n": min(config.ode_n, config.n), "target_se": None, "max_nfe": None}
    flow = "ODE" if once["n"] == config.n else f"ODE, {once['n']} digits"
    best = {f"DDPM, T = {first}, best grid and variance": "bound"}
    scored = [
        evaluate(diffusion, data, methods=config.baselines, **common),
        evaluate(vae, data, methods={"VAE": "bound", f"VAE, IWAE K = {config.K}": f"iwae(K={config.K})"}, **common),
        evaluate(diffusion, data, methods=step, **common),
        evaluate(optimal(diffusion, data, first, config.seed), data, methods=best, **common),
        *(evaluate(diffusion, data, methods=methods, **common) for methods in [*ladder, {"VP-SDE": "bound(T=inf)"}]),
        evaluate(diffusion, data, methods={flow: f"ode(tol={config.tol})"}, **{**common, **once}),
    ]
    told.close()
    found = Evaluation({title: r for one in scored for title, r in one.reports.items()}, scored[0].data)
    rows = [
        {**row, **_above(report, found["VP-SDE"])}
        for row, report in zip(found.rows(), found.reports.values(), strict=True)
    ]
    table = found.to_result(config={**asdict(config), "out": str(config.out)}, **provenance())
    apart = {key: (("row",), [row[key] for row in rows], {"unit": "bit/dim"}) for key in ("gap", "gap_se")}
    kept = {name: (array.axes, array.values, array.attributes) for name, array in table.arrays.items()}
    results.write(config.out / "results.h5", "likelihood_table", Result({**kept, **apart}, table.attributes))
    results.write_csv(config.out / "likelihood_table.csv", rows)
    write_bytes(config.out / "likelihood_table.md", markdown(rows))
    save(figure(found.reports), config.out / "likelihood_table.svg")
    print(found)
    return config.out / "results.h5"


def _above(report: LikelihoodReport, other: LikelihoodReport) -> dict[str, float]:
    """How much more than another number it is on the same digits, bits/dim."""
    mean, error = gap(report, other)
    return {"gap": report.in_bits(mean), "gap_se": report.in_bits(error)}


def trained(name: str, folder: Path) -> tuple[Dataset, Any]:
    """The data and the trained model of a configuration, from a run folder: found finished, gone on with, or made."""
    config, _ = configure((), read_toml(name), origin=name)
    if not (folder / "manifest.json").exists():
        card = describe(build(config)[0])
        facts = {"seed": config.seed, "device": config.device, "threads": config.threads, "data": card}
        Run.create(folder, config.to_toml(), **facts)
    run = Run.open(folder)
    begun = RunConfig.from_toml(run.config)
    if changed := config.differences(begun):
        raise ValueError(f"{folder} was trained with other settings ({', '.join(changed)}): choose another folder")
    with run.exclusive():
        if run.manifest.get("status") != "finished":
            data, model = build(begun)
            done = fit(model, data, begun.train, run=run, resume=(run / "state.pt").exists())
            run.note(status="finished", steps=done.steps, seconds=round(done.seconds, 1))
    return restore(run)


def optimal(model: GaussianDiffusion, data: Dataset, T: int, seed: int) -> GaussianDiffusion:
    """The DDPM with T levels where they are best, and the best variance there, as a profile of training data says."""
    profile = denoising_profile(model, data.train[: len(data.test)], seed=seed)
    return model.with_levels(Discrete(best_grid(profile, T), variance=Optimal(profile.mse)))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a page."""
    sign = {"exact": "=", "upper bound": "≤", "estimate": "≈"}
    lines = [
        "| model | bits/dim | ± draws | ± data | above VP-SDE | calls |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        calls = f"{row['forward']:.0f}" + (f" + {row['vjp']:.0f} vjp" if row["vjp"] else "")
        own = row["title"] == "VP-SDE"
        apart = "" if own else f"{row['gap']:+.4f} ± {row['gap_se']:.4f}"
        lines.append(
            f"| {row['title']} | {sign[row['kind']]} {row['bits_per_dim']:.4f} | {row['estimator_se_bits']:.4f} "
            f"| {row['data_se_bits']:.3f} | {apart} | {calls} |"
        )
    return "\n".join(lines) + "\n"


def figure(reports: Mapping[str, LikelihoodReport]) -> Any:
    """All rows, best read from top to bottom."""
    rows = []
    for title, report in reports.items():
        look = MODELS.get(title.partition(",")[0], Look(GREY, "d", "-"))
        text = f"{report.bits_per_dim:.3f}"
        errors = (report.in_bits(report.estimator_se), report.in_bits(report.data_se))
        rows.append(Dot(title, report.bits_per_dim, *(0.0 if e != e else e for e in errors), look, text))
    values = [row.value for row in rows]
    limits = (min(values) - 0.1, max(values) + 0.6)  # room for the numbers
    xlabel = "bits per pixel of a held-out digit (less is better)"
    return plots.dots(rows, xlabel=xlabel, xlim=limits, size=(7.0, 0.32 * len(rows) + 0.9))


class _Bars:
    """A bar for each row, while it is computed."""

    def __init__(self) -> None:
        self.bars: dict[str, Any] = {}

    def __call__(self, title: str, share: float) -> None:
        if title not in self.bars:
            self.bars[title] = tqdm(total=1.0, desc=title, bar_format=BAR, disable=None)
        self.bars[title].update(share - self.bars[title].n)

    def close(self) -> None:
        for bar in self.bars.values():
            bar.close()


main = command(run, Config, __doc__, "--target_se 0.001 --K 20000 --out runs/table")

if __name__ == "__main__":
    sys.exit(main())
