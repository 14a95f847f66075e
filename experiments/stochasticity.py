"""When does noise help? Solvers with a little, some and all of the reverse SDE's noise, at equal cost.

DDIM(eta) and the second-order SDE-DPM-Solver++ go from the probability-flow ODE (eta = 0) to the reverse SDE (eta = 1),
which have the same marginals. With few calls noise can only cost: there is more to integrate. What it can do is forget:
an error made early, by the start or by the network, is carried along by the ODE to the end, and is washed out by an SDE
that goes on diffusing. So the same sweep is made three times:

*exact*   the score is that of the data;
*start*   the score is exact, and the noises to start from are too narrow by a factor, as of a prior that is wrong;
*score*   the score itself is too small by a factor, everywhere (``kappa``).

Endpoints are compared with exact samples by the sliced Wasserstein distance; other exact samples have a distance too.

    python -m experiments.stochasticity
    python -m experiments.stochasticity --target ring --budgets 10,50 --out runs/ring

Reference: Karras et al. 2022, arXiv:2206.00364, section 4 (noise corrects errors of earlier steps).
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.command import command
from sdegen import results
from sdegen.comparison.distances import Cloud
from sdegen.comparison.truth import LazyBrownianMotion
from sdegen.oracles import ORACLES
from sdegen.paths import PATHS
from sdegen.provenance import provenance
from sdegen.results import Result
from sdegen.style import GREY, looks, save, styled
from solvers import DDIM, SDEDPMSolverPP2M, Solver, prior, solve
from solvers.solve import find

__all__ = ["Config", "run"]

CASES = {"exact": "exact score", "start": "start too narrow", "score": "score too small"}


@dataclass(frozen=True)
class Config:
    """The experiment.

    Args:
        target: an oracle by name.
        path: a Gaussian path by name.
        etas: amounts of noise, from 0 (ODE) to 1 (reverse SDE).
        budgets: network calls.
        seeds: of noises, Brownian motion and data; each cell is measured once with each.
        cloud: endpoints for each cell.
        narrow: the start's standard deviation over the right one, in the case "start".
        kappa: the score over the right one, in the case "score".
        out: folder for results.h5, stochasticity.csv and stochasticity.svg.
    """

    target: str = "mixture2d"
    path: str = "vp-linear"
    etas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    budgets: tuple[int, ...] = (5, 10, 20, 50, 100)
    seeds: tuple[int, ...] = (0, 1, 2)
    cloud: int = 2000
    narrow: float = 0.8
    kappa: float = 0.95
    out: Path = Path("runs/stochasticity")

    def __post_init__(self) -> None:
        find(self.target, ORACLES, "oracle")
        find(self.path, PATHS, "path")
        if not self.etas or not all(0 <= eta <= 1 for eta in self.etas):
            raise ValueError(f"eta is in [0, 1], got {self.etas}")
        if not (self.budgets and self.seeds) or min(self.budgets) < 1 or self.cloud < 2:
            raise ValueError("the experiment needs budgets of at least one call, a seed, and a cloud of two samples")


def methods(eta: float) -> dict[str, Solver[Any]]:
    """The two solvers with so much noise; without any the second is DPM-Solver++(2M)."""
    return {"DDIM": DDIM(eta), "DPM-Solver++(2M)": SDEDPMSolverPP2M(eta=eta)}


def run(config: Config | None = None) -> Path:
    """Measure, write, and draw.

    Args:
        config: the default where None.

    Returns:
        Path of ``results.h5``.
    """
    config = config or Config()
    torch.set_num_threads(1)
    rows = [row for seed in config.seeds for row in _measured(config, seed)]
    axes = {
        "case": tuple(CASES),
        "solver": tuple(methods(0.0)),
        "eta": config.etas,
        "nfe": config.budgets,
        "seed": config.seeds,
    }
    shape = tuple(map(len, axes.values()))
    order = sorted(range(len(rows)), key=lambda i: tuple(axes[a].index(rows[i][a]) for a in axes))  # type: ignore[arg-type]
    arrays: dict[str, Any] = {name: ((name,), np.array(values)) for name, values in axes.items()}
    arrays |= {
        name: (tuple(axes), np.array([rows[i][name] for i in order]).reshape(shape), {"unit": unit})
        for name, unit in (("distance", "data"), ("floor", "data"), ("floor_high", "data"))
    }
    found = Result(arrays, {**asdict(config), "out": str(config.out), **provenance()})
    config.out.mkdir(parents=True, exist_ok=True)
    results.write(config.out / "results.h5", "stochasticity", found)
    results.write_csv(config.out / "stochasticity.csv", rows)
    save(figure(found), config.out / "stochasticity.svg")
    print(told(found))
    return config.out / "results.h5"


def _measured(config: Config, seed: int) -> list[dict[str, Any]]:
    """Every cell with one seed: the same noises, Brownian motion and exact samples for all."""
    truth, path = ORACLES[config.target](), PATHS[config.path]()
    cloud = Cloud(truth, path, config.cloud, 0, seed + 1000)
    floor = {"floor": cloud.floors["sliced_w2_floor"], "floor_high": cloud.floors["sliced_w2_floor_high"]}
    right, wrong = truth.problem(path), truth.problem(path, kappa=config.kappa)
    x = prior(path, (config.cloud, *truth.event_shape), seed, dtype=torch.float64)
    cases = {"exact": (right, x), "start": (right, config.narrow * x), "score": (wrong, x)}
    rows = []
    for case, (problem, start) in cases.items():
        for eta in config.etas:
            for solver, method in methods(eta).items():
                for nfe in config.budgets:
                    noise = LazyBrownianMotion(start, seed) if method.stochastic else None
                    with torch.no_grad():
                        end = solve(problem, start, solver=method, nfe=nfe, noise=noise, grid="logsnr").x
                    distance = cloud.measured(end)["sliced_w2"]
                    where = {"case": case, "solver": solver, "eta": eta, "nfe": nfe, "seed": seed}
                    rows.append({**where, "distance": distance, **floor})
            print(f"seed {seed}, {CASES[case]}, eta {eta:g}", file=sys.stderr, flush=True)
    return rows


def told(found: Result) -> str:
    """Which amount of noise is best, in words."""
    distance, lines = found["distance"].mean(-1), []
    for i, case in enumerate(found["case"]):
        for j, solver in enumerate(found["solver"]):
            best = found["eta"][distance[i, j].argmin(0)]
            said = ", ".join(f"{eta:g} at {nfe}" for eta, nfe in zip(best, found["nfe"], strict=True))
            lines.append(f"{CASES[str(case)]}, {solver}: best eta {said} calls")
    return "\n".join(lines)


@styled
def figure(found: Result) -> Figure:
    """Distance to exact samples against eta, a curve for each budget: rows are solvers, columns are cases."""
    solvers, cases = list(found["solver"]), list(found["case"])
    drawn = Figure((3.4 * len(cases), 2.7 * len(solvers)))
    panels = drawn.subplots(len(solvers), len(cases), sharex=True, sharey=True, squeeze=False)
    look = looks([str(nfe) for nfe in found["nfe"]])
    for j, solver in enumerate(solvers):
        for i, case in enumerate(cases):
            axes, distance = panels[j, i], found["distance"][i, j]
            for k, nfe in enumerate(found["nfe"]):
                kind, values = look[str(nfe)], distance[:, k]
                axes.fill_between(found["eta"], values.min(-1), values.max(-1), color=kind.color, alpha=0.15, lw=0)
                shown = {"color": kind.color, "marker": kind.marker, "ls": kind.dash, "label": str(nfe)}
                axes.plot(found["eta"], values.mean(-1), **shown)
            axes.axhline(float(found["floor_high"][i, j].mean()), color=GREY, lw=0.8, ls=(0, (2, 2)))
            axes.set_yscale("log")
            axes.set_title(f"{CASES[str(case)]}: {solver}")
            if j == len(solvers) - 1:
                axes.set_xlabel("eta   (0: ODE, 1: reverse SDE)")
            if i == 0:
                axes.set_ylabel("sliced Wasserstein distance")
    panels[0, -1].text(0.0, float(found["floor_high"].mean()), "exact samples", color=GREY, size=8, va="top")
    panels[0, 0].legend(title="calls", ncols=len(found["nfe"]), loc="upper left", handlelength=1.4, columnspacing=0.9)
    return drawn


main = command(run, Config, __doc__, "--target ring --budgets 10,50 --out runs/ring")

if __name__ == "__main__":
    sys.exit(main())
