"""How noisy an estimate of the variational bound is at equal network calls: ``python -m benchmarks.bound_variance``.

First on a mixture of Gaussians in 64 dimensions that is fitted to handwritten digits, whose exact denoiser stands in
for the network; then, with ``--run RUN``, on a trained network and its held-out data. All schemes estimate the same
number. Images have independent values, so that the mean of N has a variance N times smaller than one; not where a batch
shares its times, and there the mean's variance is measured over repetitions.

Calls of the pilot count. The last lines say what a standard error of 0.002 bits/dim takes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sdegen.building import restore
from sdegen.data import digits
from sdegen.densities import Density, UniformLogSNR, UniformTime, low_discrepancy, stratified
from sdegen.likelihood import bound
from sdegen.likelihood.control import LinearGaussian
from sdegen.models import VPSDE, GaussianDiffusion
from sdegen.objectives import Bound
from sdegen.oracles import MixtureOracle
from sdegen.paths import VP, Cosine

Values = Callable[[int], Tensor]
"""seed -> values of all images, (N,)."""
TARGET = 0.002  # bits/dim


class Row(NamedTuple):
    """Variances in nats^2: of one image's value, and N times that of the mean."""

    name: str
    of_one: float
    of_mean: float


def plain(
    model: GaussianDiffusion,
    x: Tensor,
    times: Callable[[int, int, torch.Generator], Tensor],
    calls: int,
    seed: int,
    density: Density | None = None,
) -> Tensor:
    """Values of all images from so many calls each, at times given as uniform numbers (n * calls,)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    with torch.no_grad():
        for part in x.split(max(1, 2048 // calls)):
            u, rows = times(len(part), calls, generator), part.repeat_interleave(calls, 0)
            noise = torch.randn(rows.shape, generator=generator, dtype=x.dtype)
            error = partial(_error, model, rows, noise)
            nats = model.levels.integral(model.path, u, error, density or UniformLogSNR(), Bound())
            found.append(nats.reshape(-1, calls).mean(1))
    return torch.cat(found)


def _error(model: GaussianDiffusion, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return model.error(x, t, noise)


def independent(n: int, calls: int, generator: torch.Generator) -> Tensor:
    """Any times."""
    return torch.rand(n * calls, generator=generator, dtype=torch.float64)


def over_the_batch(n: int, calls: int, generator: torch.Generator) -> Tensor:
    """One time per image and pass, evenly spread over the images of a batch (Kingma et al. 2021, appendix I.1)."""
    return torch.stack([low_discrepancy(n, generator) for _ in range(calls)], 1).flatten()


def schemes(model: GaussianDiffusion, x: Tensor, calls: int) -> dict[str, Values]:
    """Name -> estimator with so many calls per image; the first is what the others are compared with."""
    drawn = partial(plain, model, x)
    best = partial(bound, model, x, draws=calls // 2, max_nfe=calls)
    found: dict[str, Values] = {
        "one time per image and pass": lambda seed: drawn(independent, calls, seed),
        "the same, uniform in the path's time": lambda seed: drawn(independent, calls, seed, UniformTime()),
        "low-discrepancy over the batch": lambda seed: drawn(over_the_batch, calls, seed),
        "stratified over an image's calls": lambda seed: drawn(stratified, calls, seed),
    }
    if model.discrete:
        linear = LinearGaussian.fit(x)
        found["+ linear control"] = lambda seed: best(control=linear, seed=seed).values
    return {**found, "+ control (the default)": lambda seed: best(seed=seed).values}


def measure(model: GaussianDiffusion, x: Tensor, calls: int, repetitions: int) -> list[Row]:
    """Variances over seeds."""
    rows = []
    for name, values in schemes(model, x, calls).items():
        found = torch.stack([values(seed) for seed in range(repetitions)])
        of_one = float(found.var(0).mean())
        if name.startswith("low-discrepancy"):  # an image alone has one time per pass, like any other
            rows.append(Row(name, rows[0].of_one, len(x) * float(found.mean(1).var())))
        else:
            rows.append(Row(name, of_one, of_one))
    return rows


def table(title: str, rows: list[Row], calls: int, dims: int) -> None:
    """As Markdown."""
    base = rows[0]
    print(f"\n{title}, {calls} calls per image\n")
    print("| | std of one image, nats | bits/dim | variance, times less | the same of the mean | std of one call |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, of_one, of_mean in rows:
        std = math.sqrt(of_one)
        print(
            f"| {name} | {std:.2f} | {std / (dims * math.log(2)):.4f} | {base.of_one / of_one:.1f} | "
            f"{base.of_mean / of_mean:.1f} | {math.sqrt(calls * of_mean):.1f} |"
        )


def what_it_takes(model: GaussianDiffusion, x: Tensor) -> None:
    """Calls and seconds for the target."""
    for control in ("auto", None):
        report = bound(model, x, target_se=TARGET * model.dims * math.log(2), control=control)
        print(
            f"{'with' if control else 'without'} control: {report.bits_per_dim:.4f} bits/dim, standard error "
            f"{report.in_bits(report.estimator_se):.5f}, {report.forward:.0f} calls per image, {report.seconds:.0f} s"
        )


def mixture(components: int = 20) -> MixtureOracle:
    """Gaussians fitted to the training digits, with a floor of 0.002 on the variances."""
    from sklearn.mixture import GaussianMixture

    x = digits().train.flatten(1).double().numpy()
    fitted = GaussianMixture(components, reg_covar=2e-3, random_state=0).fit(x)
    return MixtureOracle(fitted.weights_, fitted.means_, fitted.covariances_)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="folder of a trained diffusion")
    parser.add_argument("--calls", type=int, default=64, help="per image")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=24)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    truth = mixture()
    x = truth.sample(chosen.images, seed=0)
    path = VP(Cosine(), t_min=0.001, t_max=0.98)
    rows = measure(VPSDE(truth, path), x, chosen.calls, chosen.repetitions)
    table("Mixture in 64 dimensions, exact denoiser, cosine schedule", rows, chosen.calls, 64)
    if chosen.run:
        data, model = restore(chosen.run)
        if not isinstance(model, GaussianDiffusion):
            raise SystemExit(f"{chosen.run} holds no diffusion")
        x = data.test[: chosen.images]
        rows = measure(model, x, chosen.calls, chosen.repetitions)
        table(f"Network trained on {data.name}, {chosen.run}", rows, chosen.calls, model.dims)
        print(f"\nFor {TARGET} bits/dim on {len(data.test)} held-out images:")
        what_it_takes(model, data.test)


if __name__ == "__main__":
    main()
