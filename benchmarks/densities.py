"""Where to draw noise levels: ``python -m benchmarks.densities RUN``.

Two profiles of a trained diffusion are measured, one on training data, where densities are chosen or learn, and one on
held-out data, where their variances are read off: a draw from p of the latent term has the variance

    INT E|eps - eps_hat|^4 / 4p dlogsnr - L^2        one level alone,
    INT Var(|eps - eps_hat|^2) / 4p dlogsnr          levels spread evenly over many draws.

The first is what an example of a batch adds where all draws are independent, the second where their uniform numbers are
spread over the batch, as in training. Printed as Markdown: the standard deviation of the mean over 128 draws, and both
variances in units of those of uniform logsnr. Then the bound with T levels, for three kinds of reverse process. With
``--images`` the pictures go to a folder.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sdegen.adaptive import LearnedClock, SecondMoment
from sdegen.building import restore
from sdegen.densities import Density, low_discrepancy
from sdegen.levels import Optimal
from sdegen.likelihood import DenoisingProfile, best_grid, bound_of_every_T, denoising_profile
from sdegen.likelihood.control import LinearGaussian
from sdegen.likelihood_plots import denoising, levels
from sdegen.models import GaussianDiffusion
from sdegen.objectives import DENSITIES, OBJECTIVES
from sdegen.paths import VP, Cosine
from sdegen.style import save
from sdegen.train.interrupt import cpu_threads

TS = (10, 20, 50, 100, 200, 500, 1000)
BATCH, STEPS = 128, 500


def variances(density: Density, profile: DenoisingProfile) -> tuple[float, float]:
    """Variance of one draw, nats^2: alone, and among evenly spread ones."""
    path = profile.path
    p = density.pdf(path.time(profile.logsnr).clamp(path.t_min, path.t_max), path)
    alone, evenly = (0.25 * (profile.width * profile.moment(evenly=e) / p).sum() for e in (False, True))
    return float(alone) - float(profile.nats.sum()) ** 2, float(evenly)


def taught(density: LearnedClock | SecondMoment, profile: DenoisingProfile) -> Density:
    """After as many batches as a short training, of errors that were measured: the network itself stays as it is."""
    path, pool = profile.path, profile.squares.flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([*density.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=4e-3)
    for _ in range(STEPS):
        u = low_discrepancy(BATCH, generator)
        t = density.time(u, path)
        bands = torch.bucketize(path.logsnr(t), profile.edges[1:-1].contiguous())
        rows = torch.randint(len(pool), (BATCH,), generator=generator)
        loss = density.learn(u, 0.5 * pool[rows, bands] / density.pdf(t, path), path)
        if isinstance(loss, Tensor):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return density


def chosen(data: Tensor, profile: DenoisingProfile) -> dict[str, Density]:
    """Every density by name; those that learn have learned on the profile."""
    found = {name: make(data) for name, make in DENSITIES.items()}
    for name in ("second-moment", "learned"):
        found[name] = taught(found[name], profile)  # type: ignore[arg-type]
    measured = {"measured, alone": profile.density(), "measured, even": profile.density(evenly=True)}
    return {**found, **measured}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """As Markdown."""
    head = list(head)
    print(f"\n| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser("python -m benchmarks.densities", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", nargs="?", default="runs/demo/diffusion", help="folder of a trained diffusion")
    parser.add_argument("--n", type=int, default=360, help="examples of each part of the data")
    parser.add_argument("--bands", type=int, default=64)
    parser.add_argument("--images", type=Path, help="folder for profile.png and levels.png")
    words = parser.parse_args()
    with cpu_threads(1):
        data, model = restore(words.run)
        if not isinstance(model, GaussianDiffusion):
            raise SystemExit(f"{words.run} holds no diffusion")
        linear = LinearGaussian.fit(data.train)
        known, held_out = (
            denoising_profile(model, x[: words.n], bands=words.bands, linear=linear, seed=seed)
            for seed, x in enumerate((data.train, data.test))
        )
    print(held_out)
    rows = {name: variances(density, held_out) for name, density in chosen(data.train, known).items()}
    alone, evenly = rows["logsnr"]
    table(
        ("density", "std of 128, alone", "even", "variance, alone", "even"),
        (
            (
                f"`{name}`",
                *(f"{held_out.report.in_bits(math.sqrt(v / BATCH)):.4f}" for v in found),
                f"{found[0] / alone:.2f}",
                f"{found[1] / evenly:.2f}",
            )
            for name, found in rows.items()
        ),
    )
    variance = Optimal(known.mse)
    ladders = {
        "posterior variance": bound_of_every_T(held_out, TS, variance="posterior"),
        "best variance": bound_of_every_T(held_out, TS, variance=variance),
        "best variance and grid": bound_of_every_T(held_out, TS, {T: best_grid(known, T) for T in TS}, variance),
    }
    table(
        ("T", *ladders),
        ((str(T), *(f"{ladder[T].bits_per_dim:.3f}" for ladder in ladders.values())) for T in TS),
    )
    told = {name: objective.describe(VP(Cosine())) for name, objective in OBJECTIVES.items()}
    table(
        ("objective", "w(logsnr)", "falls", "sigma / alpha of the noise added: 10 %, 50 %, 90 %"),
        (
            (
                f"`{name}`",
                f"`{one.weighting}`",
                "yes" if one.falls else f"only above {round(one.rises_to, 2) + 0.0:.2f}",
                ", ".join(f"{std:.3g}" for std in one.noise) if one.falls else "–",
            )
            for name, one in told.items()
        ),
    )
    if words.images is not None:
        save(denoising(held_out.to_result()), words.images / "profile.png", dpi=110)
        save(levels(ladders, held_out.report), words.images / "levels.png", dpi=110)


if __name__ == "__main__":
    main()
