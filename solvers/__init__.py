"""Solvers for diffusion problems: a function, a path, a grid, and methods whose order is measured.

    from solvers import DiffusionProblem, prior, solve

    problem = DiffusionProblem(path, predict)                    # predict(x, t) -> Prediction(x0, eps)
    x = prior(path, (64, 2), seed=0)
    solve(problem, x, solver="heun", steps=20).x

Nothing here knows a network, a data set or an experiment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from solvers.ancestral import DDIM, Ancestral
from solvers.combine import FinalStep, InScaling, OnPath, Warmup
from solvers.curves import EDM, FLOW, VP_LAM, Chord, Circle, Coordinates, Curve, Ray, Tangent
from solvers.dpm_solver import DPMSolverPP2M
from solvers.external import ScipyODE, TorchDiffEq, TorchSDE
from solvers.foreign import Diffusers, KDiffusion, import_sampler
from solvers.grids import GRIDS, Grid, check_grid
from solvers.integrate import Solver, Trajectory, integrate
from solvers.noise import BrownianMotion, Noise, standard_normal
from solvers.problem import ODE, SDE, DiffusionProblem, Path, Prediction, expand, mix
from solvers.replay import capture, replay
from solvers.runge_kutta import RK4, BogackiShampine, DormandPrince, Euler, Heun, Midpoint, Ralston, RungeKutta, Tableau
from solvers.sde import EulerMaruyama
from solvers.solve import prior, resolve, solve
from solvers.tables import Moments, Table
from solvers.trace import trace

__all__ = [
    "DDIM",
    "EDM",
    "FLOW",
    "GRIDS",
    "ODE",
    "RK4",
    "SDE",
    "SOLVERS",
    "VP_LAM",
    "Ancestral",
    "BogackiShampine",
    "BrownianMotion",
    "Chord",
    "Circle",
    "Coordinates",
    "Curve",
    "DPMSolverPP2M",
    "Diffusers",
    "DiffusionProblem",
    "DormandPrince",
    "Euler",
    "EulerMaruyama",
    "FinalStep",
    "Grid",
    "Heun",
    "InScaling",
    "KDiffusion",
    "Midpoint",
    "Moments",
    "Noise",
    "OnPath",
    "Path",
    "Prediction",
    "Ralston",
    "Ray",
    "RungeKutta",
    "ScipyODE",
    "Solver",
    "Table",
    "Tableau",
    "Tangent",
    "TorchDiffEq",
    "TorchSDE",
    "Trajectory",
    "Warmup",
    "capture",
    "check_grid",
    "expand",
    "import_sampler",
    "integrate",
    "mix",
    "prior",
    "replay",
    "resolve",
    "solve",
    "standard_normal",
    "table",
    "trace",
]

SOLVERS: dict[str, Solver[Any]] = {
    "ddim": DDIM(),
    "ddim_0.5": DDIM(eta=0.5),
    "ancestral": Ancestral(),
    "ancestral_beta": Ancestral(variance=1.0),
    "euler": Euler(),
    "midpoint": Midpoint(),
    "heun": Heun(),
    "ralston": Ralston(),
    "bosh3_fixed": BogackiShampine(),
    "rk4": RK4(),
    "dopri5_fixed": DormandPrince(),
    "edm_heun": OnPath(Heun(), EDM, grid="karras"),
    "flow_euler": OnPath(Euler(), FLOW),
    "flow_heun": OnPath(Heun(), FLOW),
    "euler_maruyama": EulerMaruyama(),
    "dpmpp_2m": DPMSolverPP2M(),
    "dopri5": TorchDiffEq("dopri5"),
    "dopri5_lam": OnPath(TorchDiffEq("dopri5"), VP_LAM),
    "torchdiffeq_rk4": TorchDiffEq("rk4"),
    "rk45": ScipyODE("RK45"),
    "rk45_lam": OnPath(ScipyODE("RK45"), VP_LAM),
    "dop853_lam": OnPath(ScipyODE("DOP853"), VP_LAM),
    "torchsde_euler": TorchSDE("euler"),
    "torchsde_heun": TorchSDE("heun"),
}
"""Every solver by name. What is in here is measured: ``solvers.certify`` and the tests go through the whole table."""


class Row(NamedTuple):
    """A line of :func:`table`."""

    name: str
    order: str
    nfe_per_step: str
    noise: str
    reference: str


def table() -> list[Row]:
    """What the solvers declare, for people: name, order, evaluations per step, noise, reference."""
    return [
        Row(
            name,
            str(solver.order or "adaptive"),
            str(solver.nfe_per_step or "adaptive"),
            "white" if solver.stochastic else "none",
            solver.reference,
        )
        for name, solver in SOLVERS.items()
    ]
