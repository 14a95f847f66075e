"""Which objective for the bound, and which for looks?

One small perceptron is trained on scikit-learn's digits with each objective of :data:`sdegen.objectives.OBJECTIVES`,
for equally many steps, on one path (cosine, between the ends that suit 17 grey levels), each with the sampling density
that suits its own weighting (``second-moment``, which learns it). Then two questions are asked of each:

*the bound* on held-out digits, in bits/dim, from a denoising profile, which also says at which noise levels an
objective gains or loses;

*looks*: as many samples as there are held-out digits are compared with these: sliced Wasserstein-2 and Wasserstein-2
distance, and by nearest neighbours the share of samples that lie among real digits (precision) and the share of real
digits that lie among samples (recall). The same numbers for as many training digits say what is perfect.

    python -m experiments.weighting
    python -m experiments.weighting --objectives elbo,sigmoid --steps 2000 --out runs/longer

References: Kingma and Gao 2023, arXiv:2303.00848; Kynkaanniemi et al. 2019, arXiv:1904.06991 (precision and recall).
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.command import command
from sdegen import plots, results
from sdegen.comparison.distances import sliced_wasserstein, wasserstein
from sdegen.data import digits
from sdegen.data.dataset import Dataset
from sdegen.decoders import logsnr_for
from sdegen.denoiser import Denoiser
from sdegen.likelihood import DenoisingProfile, denoising_profile
from sdegen.likelihood.report import gap
from sdegen.models import VPSDE, GaussianDiffusion
from sdegen.networks import MLP
from sdegen.objectives import DENSITIES, OBJECTIVES
from sdegen.paths import VP, Cosine, GaussianPath
from sdegen.plots import Panel, Series
from sdegen.provenance import provenance
from sdegen.results import Result
from sdegen.style import GREY, looks, save, styled
from sdegen.train import TrainConfig, fit
from solvers.solve import find

__all__ = ["Config", "run"]

LOOKS = ("sliced_w2", "w2", "precision", "recall")


@dataclass(frozen=True)
class Config:
    """The experiment.

    Args:
        objectives: names; the first is what the others are compared with.
        seeds: of weights, batches and noise; each objective is trained once with each.
        steps: of training.
        batch_size: examples per step.
        width: of the perceptron.
        depth: its residual blocks.
        dropout: share of its units that are dropped in training.
        density: where noise levels are drawn.
        bands: noise levels of the profile.
        solver: of the samples.
        nfe: its network calls.
        out: folder for results.h5, weighting.csv and weighting.svg.
    """

    objectives: tuple[str, ...] = ("elbo", "simple", "v-mse", "min-snr", "p2", "edm", "sigmoid")
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 1200
    batch_size: int = 128
    width: int = 128
    depth: int = 3
    dropout: float = 0.1
    density: str = "second-moment"
    bands: int = 24
    solver: str = "dpmpp_2m"
    nfe: int = 25
    out: Path = Path("runs/weighting")

    def __post_init__(self) -> None:
        for name in self.objectives:
            find(name, OBJECTIVES, "objective")
        find(self.density, DENSITIES, "density")
        if not self.objectives or not self.seeds:
            raise ValueError("the experiment needs an objective and a seed at least")


def run(config: Config | None = None) -> Path:
    """Train, measure, write, and draw.

    Args:
        config: the default where None.

    Returns:
        Path of ``results.h5``.
    """
    config = config or Config()
    data, began = digits(), time.perf_counter()
    ends = VP(Cosine(), t_min=1e-6, t_max=1 - 1e-6)
    high, low = logsnr_for(data.bins), -5.0  # type: ignore[arg-type]
    path = VP(Cosine(), t_min=float(ends.time(high)), t_max=float(ends.time(low)))
    rows, profiles = [], {}
    for name in config.objectives:
        for seed in config.seeds:
            model, seconds = _trained(config, name, seed, data, path)
            profile = denoising_profile(model, data.test, bands=config.bands, seed=seed)
            profiles[name, seed] = profile
            drawn = model.sample(len(data.test), seed=seed, solver=config.solver, nfe=config.nfe)
            row = {"objective": name, "seed": seed, "seconds": seconds} | _bits(profile, profiles, config)
            rows.append(row | likeness(drawn, data.test))
            print(_told(rows[-1]), flush=True)
    perfect = likeness(data.train[: len(data.test)], data.test)
    found = _result(config, rows, profiles, perfect, path)
    config.out.mkdir(parents=True, exist_ok=True)
    results.write(config.out / "results.h5", "weighting", found)
    results.write_csv(config.out / "weighting.csv", [*rows, {"objective": "training digits", **perfect}])
    save(figure(found), config.out / "weighting.svg")
    print(f"training digits: {', '.join(f'{k} {v:.3f}' for k, v in perfect.items())}")
    print(f"{time.perf_counter() - began:.0f} s in all")
    return config.out / "results.h5"


def _trained(
    config: Config, name: str, seed: int, data: Dataset, path: GaussianPath
) -> tuple[GaussianDiffusion, float]:
    """The averaged weights after equally many steps from equal weights, and the seconds that took."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        shape = {"width": config.width, "depth": config.depth, "dropout": config.dropout}
        net = MLP(data.event_shape, outputs=data.bins.count, **shape)  # type: ignore[union-attr]
    aim = replace(OBJECTIVES[name], density=DENSITIES[config.density](data.train))
    model = VPSDE(Denoiser(net, "levels", data.bins).calibrate(data.train), path, objective=aim)
    settings = TrainConfig(
        steps=config.steps, batch_size=config.batch_size, lr=3e-3, ema=0.99, eval_every=0, seed=seed, threads=1
    )
    return model, fit(model, data, settings, progress=False).seconds


def _bits(profile: DenoisingProfile, all_: dict[tuple[str, int], DenoisingProfile], config: Config) -> dict[str, float]:
    """The bound, and how much it is above that of the first objective, with the same seed, example by example."""
    report, first = profile.report, all_[config.objectives[0], profile.report.seed or 0].report
    more, more_se = (report.in_bits(nats) for nats in gap(report, first))
    return {"bits": report.bits_per_dim, "bits_se": report.in_bits(report.estimator_se), "gap": more, "gap_se": more_se}


def likeness(x: Tensor, real: Tensor, neighbours: int = 3) -> dict[str, float]:
    """How much one set of images is like another of the same size.

    Precision is the share of ``x`` that is nearer to some real image than that image's third real neighbour; recall is
    the same with the roles exchanged.

    Args:
        x: (N, *event).
        real: (N, *event).
        neighbours: whose distance is the radius.
    """
    a, b = x.double().flatten(1), real.double().flatten(1)

    def covered(points: Tensor, by: Tensor) -> float:
        radius = torch.cdist(by, by).kthvalue(neighbours + 1).values  # the nearest of all is the image itself
        return float((torch.cdist(points, by) <= radius).any(1).double().mean())

    distances = {"sliced_w2": sliced_wasserstein(a, b), "w2": wasserstein(a, b)}
    return {**distances, "precision": covered(a, b), "recall": covered(b, a)}


def _told(row: dict[str, Any]) -> str:
    likes = ", ".join(f"{name} {row[name]:.3f}" for name in LOOKS)
    return f"{row['objective']:8} seed {row['seed']}: {row['bits']:.4f} bits/dim, {likes} ({row['seconds']:.0f} s)"


def _result(
    config: Config, rows: list[dict[str, Any]], profiles: dict[Any, DenoisingProfile], perfect: Any, path: Any
) -> Result:
    shape = (len(config.objectives), len(config.seeds))
    numbers = [name for name in rows[0] if name not in ("objective", "seed")]
    arrays: dict[str, Any] = {
        "objective": (("objective",), np.array(config.objectives)),
        "seed": (("seed",), np.array(config.seeds)),
        "band": (("band",), next(iter(profiles.values())).logsnr.numpy(), {"quantity": "logsnr"}),
        "error": (
            ("objective", "seed", "band"),
            torch.stack([profile.error for profile in profiles.values()]).reshape(*shape, -1).numpy(),
        ),
    }
    arrays |= {n: (("objective", "seed"), np.array([row[n] for row in rows]).reshape(shape)) for n in numbers}
    settings = {**asdict(config), "out": str(config.out)}
    about = {"weightings": [str(OBJECTIVES[name].describe(path)) for name in config.objectives]}
    return Result(arrays, {**settings, **about, **{f"perfect_{k}": v for k, v in perfect.items()}, **provenance()})


@styled
def figure(found: Result) -> Figure:
    """Bound against looks, and where in logsnr an objective gains and loses against the first."""
    drawn = Figure((11, 4.2))
    parts: Any = drawn.subfigures(1, 2)
    one, two = parts
    names = [str(name) for name in found["objective"]]
    look = looks(names)
    left = one.subplots()
    for i, name in enumerate(names):
        x, y, (color, marker, _) = found["bits"][i], found["precision"][i], look[name]
        left.plot(x, y, color=color, lw=0.8, alpha=0.6)
        left.plot(x, y, marker, color=color, ms=6.5, mec="white", mew=0.8, ls="", label=name)
    left.axhline(perfect := float(found.attributes["perfect_precision"]), color=GREY, lw=0.8, ls=(0, (2, 2)))
    note: dict[str, Any] = {"ha": "right", "va": "bottom", "color": GREY, "size": 8}
    left.text(0.985, perfect, "training digits ", transform=left.get_yaxis_transform(), **note)
    left.legend(loc="lower right", labelcolor="linecolor")
    left.set(xlabel="bits per dimension, held out", ylabel="share of samples that lie among real digits")
    left.set_title("Bound and looks, for each seed")
    error = found["error"].mean(1)
    above = {name: Series(found["band"], 100 * (error[i] / error[0] - 1)) for i, name in enumerate(names)}
    panel = Panel(
        {name: curve for name, curve in above.items() if name != names[0]},
        "Where it is gained and lost",
        "noise   ←   logsnr   →   data",
        f"denoising error above that of {names[0]}, %",
        marks={names[0]: 0.0},
        look=look,
    )
    plots.lines([panel], on=two)
    return drawn


main = command(run, Config, __doc__, "--objectives elbo,sigmoid --steps 2000 --out runs/longer")

if __name__ == "__main__":
    sys.exit(main())
