"""The stages of the demo: from models to results, each a function that can be called on its own.

Every stage returns a :class:`sdegen.results.Result` with all that its figure and its tables need (:mod:`sdegen.figures`
draws it), so that nothing is computed while a page is drawn and nothing must be trained to draw it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sdegen.building import build
from sdegen.comparison import Comparison, compare, exact_sde
from sdegen.config import RunConfig
from sdegen.data import Dataset
from sdegen.levels import Discrete
from sdegen.likelihood import LikelihoodReport, evaluate
from sdegen.likelihood.report import gap
from sdegen.models import VAE, Elbo, GaussianDiffusion
from sdegen.oracles import oracle
from sdegen.paths import PATHS
from sdegen.plane import field, raster
from sdegen.results import Result
from sdegen.runs import Run, describe
from sdegen.train import fit
from solvers import BrownianMotion, Trajectory, prior, resolve, solve

__all__ = ["errors", "film", "flow", "samples", "score", "strips", "train"]

BAR = "{percentage:3.0f}% |{bar:24}| {elapsed} spent, {remaining} left{postfix}"
ODE, SDE = "heun", "ancestral"  # what is used where the solver is not the question


def train(config: RunConfig, data: Dataset, folder: Path) -> tuple[Any, Result]:
    """Train one model in a run folder of its own, which every other command takes too.

    Args:
        config: of the run.
        data: what to train on.
        folder: to make.

    Returns:
        The model with its averaged weights, and the curves of its training.
    """
    _, model = build(config, data)
    run = Run.create(
        folder, config.to_toml(), seed=config.seed, device=config.device, threads=config.threads, data=describe(data)
    )
    done = fit(model, data, config.train, run=run)
    run.note(status="finished", steps=done.steps, seconds=round(done.seconds, 2))
    rows = done.history
    arrays = {name: (("row",), np.array([row[name] for row in rows])) for name in rows[0]}
    parameters = sum(p.numel() for p in model.parameters())
    return model, Result(arrays, {"parameters": parameters, "steps": done.steps, "unit": "bits per dimension"})


def score(
    data: Dataset,
    diffusion: GaussianDiffusion,
    vae: VAE,
    *,
    levels: Sequence[int],
    draws: int,
    ode_images: int,
    seed: int,
) -> Result:
    """Code lengths of the held-out data: baselines, VAE, DDPM for several T, VP-SDE, probability-flow ODE.

    Args:
        data: with grey levels.
        diffusion: the VP-SDE; its weights serve the DDPMs too.
        vae: the VAE.
        levels: the values of T.
        draws: noise levels for each datum and repeat; the VAE, which is cheap, gets four times as many latents.
        ode_images: data that are scored by the ODE.
        seed: of all noise; DDPM and VP-SDE get the same draws, so that their difference is known better than either.
    """
    if data.bins is None:
        raise ValueError(f"bits are counted of grey levels, and {data.name} has none")
    ladder = {f"DDPM {T}": f"bound(T={T}, draws={draws})" for T in levels}
    every = f"bound(T=inf, draws={draws})"
    asked = [
        (diffusion, {"uniform": "uniform", "histogram": "histogram", "pixels": "pixel-histogram"}, None),
        (vae, {"VAE": f"bound(draws={4 * draws})"}, None),
        (diffusion, {**ladder, "VP-SDE": every}, None),
        (diffusion, {"ODE": "ode(tol=1e-3, draws=2)"}, ode_images),
    ]
    found: dict[str, LikelihoodReport] = {}
    with tqdm(total=sum(len(methods) for _, methods, _ in asked), bar_format=BAR, disable=None) as bar:

        def advance(title: str, share: float) -> None:
            bar.set_postfix_str(title, refresh=False)
            bar.update(titles.index(title) + share - bar.n)

        titles = [title for _, methods, _ in asked for title in methods]
        for model, methods, n in asked:
            found |= evaluate(model, data, methods=methods, n=n, seed=seed, progress=advance).reports
    reports, apart = list(found.values()), [gap(report, found["VP-SDE"]) for report in found.values()]
    names, Ts = zip(*((title.partition(" ")[0], int(title.partition(" ")[2] or 0)) for title in found), strict=True)

    def column(value: Callable[[LikelihoodReport], float]) -> tuple[tuple[str, ...], list[float]]:
        return ("row",), [float(value(report)) for report in reports]

    return Result(
        {
            "model": (("row",), list(names)),
            "T": (("row",), list(Ts)),
            "kind": (("row",), [report.kind for report in reports]),
            "bits": column(lambda r: r.bits_per_dim),
            "estimator_se": column(lambda r: r.in_bits(r.estimator_se)),
            "data_se": column(lambda r: r.in_bits(r.data_se)),
            **{part: column(lambda r, part=part: r.in_bits(r.parts.get(part, np.nan))) for part in Elbo._fields},
            "forward": column(lambda r: r.forward),
            "vjp": column(lambda r: r.vjp),
            "seconds": column(lambda r: r.seconds),
            "examples": (("row",), [len(report.values) for report in reports]),
            "gap": (("row",), [r.in_bits(mean) for r, (mean, _) in zip(reports, apart, strict=True)]),
            "gap_se": (("row",), [r.in_bits(error) for r, (_, error) in zip(reports, apart, strict=True)]),
        },
        {"unit": "bits per dimension", "reports": [report.to_dict() for report in reports]},
    )


@torch.no_grad()
def samples(
    data: Dataset, diffusion: GaussianDiffusion, vae: VAE, *, count: int, T: int, solver: str, nfe: int, seed: int
) -> Result:
    """Draws of each model beside held-out data.

    Args:
        data: the data.
        diffusion: the VP-SDE.
        vae: the VAE.
        count: images of each.
        T: levels of the DDPM, sampled by as many ancestral steps.
        solver: of the VP-SDE's samples.
        nfe: its budget.
        seed: of all noise.
    """
    levels = Discrete.on(diffusion.path, T)
    ddpm = diffusion.with_levels(levels)
    groups = {
        "held-out digits": data.test[:count],
        "VAE": vae.sample(count, seed=seed),
        f"DDPM, T = {T}": ddpm.sample(count, seed=seed, solver="ancestral", ts=levels.ts.flip(0)),
        "VP-SDE": diffusion.sample(count, seed=seed, solver=solver, nfe=nfe),
    }
    images = np.stack([x.numpy() for x in groups.values()])
    arrays = {"group": (("group",), list(groups)), "images": (("group", "example", "channel", "y", "x"), images)}
    return Result(arrays, {"seed": seed, "T": T, "solver": solver, "nfe": nfe})


@torch.no_grad()
def strips(
    model: GaussianDiffusion,
    names: Sequence[str],
    *,
    budgets: Sequence[int],
    noises: int,
    reference: int,
    seed: int,
) -> Result:
    """The same noise, and the same Brownian motion, through several fixed-step solvers.

    Args:
        model: a trained diffusion of grey levels.
        names: of the solvers.
        budgets: network calls.
        noises: number of starts.
        reference: steps of the exact solutions, the ODE's and the SDE's.
        seed: of starts and Brownian motion.
    """
    problem, bins = model.problem(), model.denoiser.bins
    z = model.prior.sample((noises, *model.event_shape), seed=seed, dtype=model.dtype, device=model.device)
    chosen = {name: resolve(name) for name in names}
    exact = {
        False: solve(problem, z, solver="dpmpp_2m", steps=reference).x,
        True: exact_sde(problem, z, BrownianMotion(z, seed), steps=reference),
    }
    shape = (len(budgets), len(chosen))
    images, nfe, error = np.zeros((*shape, *z.shape), np.float32), np.zeros(shape, int), np.zeros(shape)
    with tqdm(total=len(chosen) * sum(budgets), bar_format=BAR, disable=None) as bar:
        for j, (name, solver) in enumerate(chosen.items()):
            for i, budget in enumerate(budgets):
                noise = BrownianMotion(z, seed) if solver.stochastic else None
                found = solve(problem, z, solver=solver, noise=noise, nfe=budget)
                images[i, j], nfe[i, j] = model.decode(found.x).mode.numpy(), found.nfe
                error[i, j] = (found.x - exact[solver.stochastic]).square().mean().sqrt() / bins.width
                bar.set_postfix_str(name, refresh=False)
                bar.update(budget)
    axes = ("noise", "channel", "y", "x")
    return Result(
        {
            "budget": (("budget",), list(budgets)),
            "solver": (("solver",), list(chosen)),
            "stochastic": (("solver",), [solver.stochastic for solver in chosen.values()]),
            "images": (("budget", "solver", *axes), images),
            "nfe": (("budget", "solver"), nfe),
            "error": (("budget", "solver"), error, {"unit": "grey levels"}),
            "equation": (("equation",), ["ODE", "SDE"]),
            "reference": (("equation", *axes), np.stack([model.decode(exact[k]).mode.numpy() for k in (False, True)])),
        },
        {"seed": seed, "reference_steps": reference},
    )


@torch.no_grad()
def film(data: Dataset, model: GaussianDiffusion, *, frames: int = 12, between: int = 8, seed: int) -> Result:
    """A digit dissolving, and one noise becoming a digit along the ODE and along the SDE, with what the network sees.

    Args:
        data: its first held-out image is taken.
        model: a trained diffusion.
        frames: noise levels that are kept.
        between: solver steps from one to the next.
        seed: of the noise.
    """
    path, problem = model.path, model.problem()
    fine = torch.linspace(path.t_max, path.t_min, (frames - 1) * between + 1, dtype=torch.float64)
    ts = fine[::between]
    start = model.prior.sample((1, *model.event_shape), seed=seed, dtype=model.dtype, device=model.device)
    alpha, sigma = (c.to(start).reshape(-1, 1, 1, 1) for c in (path.alpha(ts), path.sigma(ts)))
    states = {"forward": alpha * data.test[:1] + sigma * start / sigma[0]}
    for name, solver in (("ODE", ODE), ("SDE", SDE)):
        states[name] = _nodes(solve(problem, start, solver=solver, ts=fine, seed=seed, save="all"))[::between, 0]
    rows: dict[str, Tensor] = {}
    for name, z in states.items():
        rows |= {name: z, f"{name} x0": problem.predict(z, ts).x0}
    return Result(
        {
            "t": (("t",), ts.numpy()),
            "logsnr": (("t",), path.logsnr(ts).numpy()),
            "row": (("row",), list(rows)),
            "images": (("row", "t", "channel", "y", "x"), torch.stack(list(rows.values())).numpy()),
        },
        {"seed": seed, "solvers": [ODE, SDE], "steps": len(fine) - 1},
    )


def errors(settings: Comparison) -> Result:
    """Solvers against the exact solution, with a bar: see :func:`sdegen.comparison.compare`."""
    with tqdm(total=1.0, bar_format=BAR, disable=None) as bar:

        def advance(name: str, share: float) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(share - bar.n)

        return compare(settings, advance)


def flow(*, lines: int = 28, size: int = 140, arrows: int = 15, seed: int) -> Result:
    """A mixture in the plane on its way from noise to data, its velocity field, and the lines that samples follow.

    Args:
        lines: number of trajectories.
        size: points of the density in each direction.
        arrows: arrows in each direction.
        seed: of the starts.
    """
    truth, path, reach = oracle("mixture2d"), PATHS["vp-linear"](), 2.5
    problem = truth.problem(path)
    ts = path.time(torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64))
    all_ts = torch.cat([ts, torch.tensor([path.t_min], dtype=torch.float64)])
    shades = [
        raster(lambda z, t=t: truth.log_prob_t(z, path, t).exp(), reach=reach, size=size) for t in all_ts.unbind()
    ]
    # Time runs from data to noise, samples the other way: the arrows point against dx/dt.
    fields = [field(lambda z, t=t: -problem.velocity(z, t), reach=0.88 * reach, size=arrows) for t in ts.unbind()]
    x = prior(path, (lines, 2), seed, dtype=torch.float64)
    smooth = solve(problem, x, solver=ODE, steps=100, save="all")
    rough = solve(problem, x[:4], solver=SDE, steps=300, seed=seed, save="all")
    return Result(
        {
            "t": (("panel",), all_ts.numpy()),
            "logsnr": (("panel",), path.logsnr(all_ts).numpy()),
            "density": (("panel", "y", "x"), np.stack(shades)),
            "at": (("arrow", "coordinate"), fields[0][0]),
            "arrows": (("field", "arrow", "coordinate"), np.stack([vectors for _, vectors in fields])),
            "lines": (("node", "sample", "coordinate"), _nodes(smooth).numpy()),
            "walks": (("step", "walker", "coordinate"), _nodes(rough).numpy()),
        },
        {"reach": reach, "truth": repr(truth), "path": repr(path), "seed": seed},
    )


def _nodes(trajectory: Trajectory) -> Tensor:
    """The states at every node of a trajectory that was saved."""
    if trajectory.xs is None:
        raise ValueError("the trajectory was not saved: solve with save='all'")
    return trajectory.xs
