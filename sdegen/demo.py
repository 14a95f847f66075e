"""The main job from end to end: ``sdegen demo``, or ``make demo``.

Train one diffusion network and one VAE on scikit-learn's digits, sample them with many solvers, score them in bits per
pixel, measure the solvers where the truth is known, and write one page about it. The stages are functions in
:mod:`sdegen.stages`; what each returns is written to ``results.h5`` at once, and :func:`sdegen.report.build` draws the
page from that file alone, now or a year later.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w
import torch

from sdegen import report, results, stages
from sdegen.comparison import Comparison
from sdegen.config import Choice, RunConfig
from sdegen.data import digits
from sdegen.results import Result
from sdegen.runs import RESULTS, Run, describe
from sdegen.tables import duration
from sdegen.train import TrainConfig
from sdegen.train.interrupt import cpu_threads

__all__ = ["Demo", "recipes", "run"]

SOLVERS = ("euler", "ddim", "dpmpp_2m", "heun", "edm_heun", "rk4", "dopri5", "ancestral", "euler_maruyama")
"""A selection of :data:`solvers.SOLVERS` that fits a page: what people use, on the ODE and on the SDE."""


@dataclass(frozen=True)
class Demo:
    """The settings of the demo.

    Args:
        seconds: training of the diffusion network.
        vae_seconds: training of the VAE.
        channels: of the U-Net.
        vae_width: of the VAE's layers.
        levels: numbers of levels T that the DDPM's bound is computed for.
        draws: noise levels for each held-out digit in the DDPM's bounds; the other models get more.
        ode_images: held-out digits that are scored by the probability-flow ODE.
        images: digits in the gallery, of each model.
        ddpm: T of the DDPM in the gallery.
        solver: of the VP-SDE in the gallery.
        nfe: its budget.
        solvers: names of those that are compared.
        noises: starts of the comparison on digits.
        budgets: network calls in it.
        reference: steps of its exact solutions.
        comparison: the one on the oracle.
        seed: of everything.
        threads: CPU threads.
    """

    seconds: float = 75.0
    vae_seconds: float = 12.0
    channels: tuple[int, ...] = (24, 48)
    vae_width: int = 512
    levels: tuple[int, ...] = (10, 30, 100, 300, 1000)
    draws: int = 16
    ode_images: int = 180
    images: int = 48
    ddpm: int = 250
    solver: str = "dpmpp_2m"
    nfe: int = 50
    solvers: tuple[str, ...] = tuple(name for name in SOLVERS if name != "dopri5")
    noises: int = 24
    budgets: tuple[int, ...] = (10, 50)
    reference: int = 200
    comparison: Comparison = field(
        default_factory=lambda: Comparison(solvers=SOLVERS, samples=256, cloud=5000, transport=0, reference_steps=512)
    )
    seed: int = 0
    threads: int = 1

    @classmethod
    def fast(cls) -> Demo:
        """Everything once in a few seconds, for tests: the page is whole and the models are bad."""
        few = Comparison(
            solvers=SOLVERS, samples=8, cloud=100, transport=0, budgets=(6, 10), tols=(1e-2,), reference_steps=32
        )
        return cls(
            seconds=1.0, vae_seconds=0.5, channels=(8, 8), vae_width=32, levels=(4, 8), draws=1, ode_images=4,
            images=6, ddpm=8, nfe=6, noises=4, budgets=(6,), reference=16, comparison=few,
        )  # fmt: skip


def recipes(settings: Demo) -> dict[str, RunConfig]:
    """The two runs, as ``sdegen train`` would take them.

    The diffusion is a U-Net whose output is a posterior over the grey levels, the VAE two perceptrons with sixteen
    numbers between them; both are trained on the bound itself.
    """
    shared: dict[str, Any] = {"seed": settings.seed, "threads": settings.threads}
    data, unet = Choice("digits"), Choice("unet", {"channels": settings.channels, "dropout": 0.05})
    longer = TrainConfig(seconds=settings.seconds, batch_size=128, lr=4e-3, ema=0.98, eval_every=50, **shared)
    shorter = TrainConfig(
        seconds=settings.vae_seconds, batch_size=128, lr=3e-3, weight_decay=0.1, eval_every=50, **shared
    )
    vae = Choice("vae", {"width": settings.vae_width})
    return {
        "diffusion": RunConfig(data, Choice("vpsde"), unet, longer, **shared),
        "vae": RunConfig(data, vae, None, shorter, **shared),
    }


def run(
    out: Path | str = "runs/demo",
    *,
    seconds: float | None = None,
    seed: int = 0,
    threads: int = 1,
    fast: bool = False,
) -> Path:
    """Do the whole job and write the page.

    Args:
        out: run folder; a run that is there is replaced.
        seconds: training of the diffusion network, 75 by default; the VAE gets a sixth of it.
        seed: of everything.
        threads: CPU threads.
        fast: a few seconds in all, to see that it works.

    Returns:
        Path of ``report.html``.
    """
    settings = Demo.fast() if fast else Demo()
    if seconds is not None:
        if not seconds > 0:
            raise ValueError(f"the training time must be positive, not {seconds} s")
        settings = replace(settings, seconds=seconds, vae_seconds=seconds / 6)
    comparison = replace(settings.comparison, seeds=(seed,))
    settings = replace(settings, seed=seed, threads=threads, comparison=comparison)
    with cpu_threads(recipes(settings)["diffusion"].train.cpu_threads()):
        return _run(Path(out), settings)


def _run(out: Path, settings: Demo) -> Path:
    data, seed, configs = digits(), settings.seed, recipes(settings)
    folder = Run.create(
        out, tomli_w.dumps(_plain(asdict(settings))), overwrite=True,
        seed=seed, device="cpu", threads=torch.get_num_threads(), data=describe(data),
        train_size=len(data.train), test_size=len(data.test),
    )  # fmt: skip
    print(data.describe(), flush=True)
    stage = Stages(planned(settings))

    def keep(name: str, result: Result) -> None:
        results.write(folder / RESULTS, name, result)

    with stage("Train the diffusion network"):
        diffusion, history = stages.train(configs["diffusion"], data, folder / "diffusion")
        keep("training/diffusion", history)
    with stage("Train the VAE"):
        vae, history = stages.train(configs["vae"], data, folder / "vae")
        keep("training/vae", history)
    with stage("Score held-out digits"):
        given = {"levels": settings.levels, "draws": settings.draws, "ode_images": settings.ode_images}
        keep("likelihood", stages.score(data, diffusion, vae, **given, seed=seed))
    with stage("Draw samples"):
        given = {"T": settings.ddpm, "solver": settings.solver, "nfe": settings.nfe}
        keep("samples", stages.samples(data, diffusion, vae, count=settings.images, **given, seed=seed))
    with stage("Push one noise through every solver"):
        given = {"budgets": settings.budgets, "noises": settings.noises, "reference": settings.reference}
        keep("strips", stages.strips(diffusion, settings.solvers, **given, seed=seed))
    with stage("Film the process"):
        keep("film", stages.film(data, diffusion, seed=seed))
    with stage("Compare solvers with the exact solution"):
        keep("errors", stages.errors(settings.comparison))
    with stage("Trace flow lines"):
        keep("flow", stages.flow(seed=seed))
    folder.note(status="finished", stages={name: round(seconds, 2) for name, seconds in stage.spent.items()})
    with stage("Draw the page"):
        page = report.build(folder.path)
    print(f"done in {duration(sum(stage.spent.values()))}; open {page}", flush=True)
    return page


def planned(settings: Demo) -> dict[str, float]:
    """The stages and about what they take on two cores, in seconds."""
    rest = {
        "Score held-out digits": 25.0, "Draw samples": 5.0, "Push one noise through every solver": 8.0,
        "Film the process": 1.0, "Compare solvers with the exact solution": 15.0, "Trace flow lines": 1.0,
        "Draw the page": 5.0,
    }  # fmt: skip
    quick = 0.2 if settings.images < 20 else 1.0
    training = {"Train the diffusion network": settings.seconds, "Train the VAE": settings.vae_seconds}
    return training | {name: quick * seconds for name, seconds in rest.items()}


class Stages:
    """Says what is being done and what is left, and remembers how long each stage took.

    Args:
        planned: the stages in order, with about what they take in seconds.
    """

    def __init__(self, planned: dict[str, float]) -> None:
        self.planned = planned
        self.spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        left = sum(seconds for stage, seconds in self.planned.items() if stage not in self.spent)
        number = list(self.planned).index(name) + 1
        print(f"[{number}/{len(self.planned)}] {name} (about {duration(left)} left in all)", flush=True)
        begin = time.perf_counter()
        yield
        self.spent[name] = time.perf_counter() - begin


def _plain(content: Any) -> Any:
    """What TOML can hold: tuples as lists, and no None."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items() if value is not None}
    return [_plain(value) for value in content] if isinstance(content, (list, tuple)) else content
