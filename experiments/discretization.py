"""What is lost by T levels? From the VAE's one level over the DDPM to the SDE, on one trained network.

A VAE is a chain with a single, learned level, a DDPM one of T fixed ones, the VP-SDE has them all; the bound is one and
the same expression for the three. One diffusion and one VAE are trained on scikit-learn's digits. Then

*the bound* of every T follows from one denoising profile of held-out digits: with the posterior's variance, with the
variance that is best for the measured error, and with the best grid on top of it. Some are estimated directly too, from
the chain itself, which must agree. The gap to the SDE falls as 1/T.

*samples* of the chain with T levels (ancestral sampling, T calls) are compared with held-out digits by the sliced
Wasserstein distance, beside those of the VAE and of the probability-flow ODE with as many calls.

    python -m experiments.discretization
    python -m experiments.discretization --run runs/demo/diffusion --vae runs/demo/vae

References: Ho et al. 2020, arXiv:2006.11239; Kingma et al. 2021, arXiv:2107.00630, section 4.2 (deeper is better).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from experiments.command import command
from experiments.likelihood_table import trained
from sdegen import results
from sdegen.building import restore
from sdegen.comparison.distances import sliced_wasserstein
from sdegen.likelihood import (
    DenoisingProfile,
    LikelihoodReport,
    best_grid,
    bound,
    bound_of_every_T,
    denoising_profile,
)
from sdegen.models import GaussianDiffusion
from sdegen.provenance import provenance
from sdegen.results import Result
from sdegen.style import GREY, MODELS, save, styled

__all__ = ["Config", "run"]

FORMS = ("posterior variance", "best variance", "best variance and grid")


@dataclass(frozen=True)
class Config:
    """The experiment.

    Args:
        run: folder of a trained diffusion; trained as ``digits-vpsde`` in ``out`` where empty.
        vae: folder of a trained VAE; trained as ``digits-vae`` where empty.
        T: numbers of levels.
        direct: of these, up to which the chain itself is asked, for its bound and for samples.
        bands: noise levels of the profile.
        samples: digits drawn from each chain.
        seeds: of the samples.
        solver: of the probability-flow ODE.
        out: folder for results.h5, discretization.csv and discretization.svg.
    """

    run: str = ""
    vae: str = ""
    T: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
    direct: int = 50
    bands: int = 64
    samples: int = 180
    seeds: tuple[int, ...] = (0,)
    solver: str = "dpmpp_2m"
    out: Path = Path("runs/discretization")

    def __post_init__(self) -> None:
        if not self.T or min(self.T) < 1 or not self.seeds or self.samples < 2:
            raise ValueError("the experiment needs numbers of levels, each at least 1, a seed, and two samples")


def run(config: Config | None = None) -> Path:
    """Train where nothing is trained, measure, write, and draw.

    Args:
        config: the default where None.

    Returns:
        Path of ``results.h5``.
    """
    config = config or Config()
    config.out.mkdir(parents=True, exist_ok=True)
    data, model = restore(config.run) if config.run else trained("digits-vpsde", config.out / "diffusion")
    _, vae = restore(config.vae) if config.vae else trained("digits-vae", config.out / "vae")
    if not isinstance(model, GaussianDiffusion):
        raise ValueError(f"{config.run} holds no diffusion")
    profile = denoising_profile(model, data.test, bands=config.bands)
    chosen = denoising_profile(model, data.train[: len(data.test)], bands=config.bands, seed=1)
    bits = _bounds(profile, chosen, config.T)
    rows: list[dict[str, Any]] = []
    for i, T in enumerate(config.T):
        row: dict[str, Any] = {"T": T}
        for form in FORMS:
            row |= {form: bits[form][i].bits_per_dim, f"{form} se": bits[form][i].in_bits(bits[form][i].estimator_se)}
        if config.direct >= T:
            report = bound(model.discretize(T), data.test)
            row |= {"direct": report.bits_per_dim, "direct_se": report.in_bits(report.estimator_se)}
            drawn = {
                "ancestral": {"solver": "ancestral", "steps": T, "grid": "uniform"},
                "ode": {"solver": config.solver, "nfe": T},
            }
            for name, how in drawn.items():
                row[name] = [_distance(model, data.test, config, seed, how) for seed in config.seeds]
        rows.append(row)
        print(f"T = {T}: " + ", ".join(f"{k} {np.mean(v):.4f}" for k, v in row.items() if k != "T"), file=sys.stderr)
    continuous, one = profile.bound(), bound(vae, data.test)
    known = {
        "sde": continuous.bits_per_dim, "sde_se": continuous.in_bits(continuous.estimator_se),
        "vae": one.bits_per_dim, "vae_se": one.in_bits(one.estimator_se),
        "vae_distance": float(np.mean([_distance(vae, data.test, config, seed, {}) for seed in config.seeds])),
        "training_distance": sliced_wasserstein(data.train[: len(data.test)], data.test),
    }  # fmt: skip
    found = _result(config, rows, known)
    results.write(config.out / "results.h5", "discretization", found)
    flat = [{k: float(np.mean(v)) for k, v in row.items()} for row in rows]
    results.write_csv(config.out / "discretization.csv", [*flat, *({"T": k, "direct": v} for k, v in known.items())])
    save(figure(found), config.out / "discretization.svg")
    gaps = ", ".join(
        f"{b.bits_per_dim - known['sde']:.4f} at T = {T}" for b, T in zip(bits[FORMS[0]], config.T, strict=True)
    )
    print(f"VP-SDE {known['sde']:.4f} bits/dim, VAE {known['vae']:.4f}; above the VP-SDE: {gaps}")
    return config.out / "results.h5"


def _bounds(profile: DenoisingProfile, chosen: DenoisingProfile, T: Sequence[int]) -> dict[str, list[LikelihoodReport]]:
    """The bound of every T, three ways; the grid is chosen on other data than it is judged by."""
    grids = {n: best_grid(chosen, n) for n in T}
    found = (
        bound_of_every_T(profile, T, variance="posterior"),
        bound_of_every_T(profile, T),
        bound_of_every_T(profile, T, grid=grids),
    )
    return {form: [reports[n] for n in T] for form, reports in zip(FORMS, found, strict=True)}


def _distance(model: Any, real: Tensor, config: Config, seed: int, how: dict[str, Any]) -> float:
    """Sliced Wasserstein distance of samples from as many held-out digits; NaN where the budget buys no sample."""
    count = min(config.samples, len(real))
    try:
        return sliced_wasserstein(model.sample(count, seed=seed, **how), real[:count])
    except ValueError:
        return float("nan")


def _result(config: Config, rows: list[dict[str, Any]], known: dict[str, float]) -> Result:
    arrays: dict[str, Any] = {"T": (("T",), np.array(config.T)), "seed": (("seed",), np.array(config.seeds))}
    for name in (*FORMS, *(f"{form} se" for form in FORMS), "direct", "direct_se"):
        values = np.array([row.get(name, np.nan) for row in rows])
        arrays[name.replace(" ", "_")] = (("T",), values, {"unit": "bit/dim"})
    for name in ("ancestral", "ode"):
        none = [np.nan] * len(config.seeds)
        values = np.array([row.get(name, none) for row in rows])
        arrays[name] = (("T", "seed"), values, {"quantity": "sliced Wasserstein-2"})
    return Result(arrays, {**asdict(config), "out": str(config.out), **known, **provenance()})


@styled
def figure(found: Result) -> Figure:
    """Left: how far above the SDE's bound; right: how far the samples are from digits."""
    drawn = Figure((10.5, 3.9))
    left, right = drawn.subplots(1, 2)
    T, known, ddpm = found["T"], found.attributes, MODELS["DDPM"]
    for form, dash, marker in zip(FORMS, ("-", (0, (5, 1.6)), (0, (1.2, 1.2))), "Dov", strict=True):
        gap = found[form.replace(" ", "_")] - known["sde"]
        error = 2 * found[f"{form} se".replace(" ", "_")]
        left.fill_between(T, np.maximum(gap - error, 1e-4), gap + error, color=ddpm.color, alpha=0.12, lw=0)
        left.plot(T, gap, color=ddpm.color, ls=dash, marker=marker, ms=4, label=f"DDPM, {form}")
    direct = found["direct"] - known["sde"]
    left.errorbar(T, direct, 2 * found["direct_se"], fmt="x", color=GREY, ms=7, lw=1, label="the chain itself")
    near = (found[FORMS[0].replace(" ", "_")] - known["sde"])[-1] * T[-1]
    left.plot(T, near / T, color=GREY, lw=0.8, ls=(0, (2, 2)), label="1/T")
    left.axhline(known["vae"] - known["sde"], color=MODELS["VAE"].color, lw=1.2, label="VAE: one learned level")
    left.set(xscale="log", yscale="log", xlabel="levels T", ylabel="bits/dim above the VP-SDE, held out")
    left.set_title("The bound")
    left.legend()
    for name, look, label in (
        ("ancestral", ddpm, "DDPM, ancestral"),
        ("ode", MODELS["ODE"], f"ODE, {known['solver']}"),
    ):
        values = found[name]
        right.fill_between(T, values.min(1), values.max(1), color=look.color, alpha=0.15, lw=0)
        right.plot(T, values.mean(1), color=look.color, marker=look.marker, ms=4, label=label)
    right.axhline(known["vae_distance"], color=MODELS["VAE"].color, lw=1.2, label="VAE")
    right.axhline(known["training_distance"], color=GREY, lw=0.8, ls=(0, (2, 2)), label="training digits")
    right.set(xscale="log", yscale="log", xlabel="levels T, or calls", ylabel="sliced Wasserstein distance to digits")
    right.set_title("Samples")
    right.legend()
    return drawn


main = command(run, Config, __doc__, "--run runs/demo/diffusion --vae runs/demo/vae")

if __name__ == "__main__":
    sys.exit(main())
