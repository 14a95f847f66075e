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
from solvers.deis import DEISrhoAB, DEIStAB
from solvers.dense import DenseOutput, dense
from solvers.dpm_solver import (
    DPMSolver1,
    DPMSolver2M,
    DPMSolver2S,
    DPMSolver3M,
    DPMSolver3S,
    DPMSolverPP1,
    DPMSolverPP2M,
    DPMSolverPP2S,
    DPMSolverPP3M,
    DPMSolverPP3S,
)
from solvers.exponential import ExponentialAdams
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
from solvers.unipc import UniC, UniP, UniPC

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
    "DEISrhoAB",
    "DEIStAB",
    "DPMSolver1",
    "DPMSolver2M",
    "DPMSolver2S",
    "DPMSolver3M",
    "DPMSolver3S",
    "DPMSolverPP1",
    "DPMSolverPP2M",
    "DPMSolverPP2S",
    "DPMSolverPP3M",
    "DPMSolverPP3S",
    "DenseOutput",
    "Diffusers",
    "DiffusionProblem",
    "DormandPrince",
    "Euler",
    "EulerMaruyama",
    "ExponentialAdams",
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
    "UniC",
    "UniP",
    "UniPC",
    "Warmup",
    "capture",
    "check_grid",
    "dense",
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
    "dpm_1": DPMSolver1(),
    "dpm_2s": DPMSolver2S(),
    "dpm_3s": DPMSolver3S(),
    "dpm_2m": DPMSolver2M(),
    "dpm_2m_taylor": DPMSolver2M(taylor=True),
    "dpm_3m": DPMSolver3M(),
    "dpmpp_1s": DPMSolverPP1(),
    "dpmpp_2s": DPMSolverPP2S(),
    "dpmpp_3s": DPMSolverPP3S(),
    "dpmpp_2m": DPMSolverPP2M(),
    "dpmpp_2m_heun": DPMSolverPP2M(taylor=True),
    "dpmpp_3m": DPMSolverPP3M(),
    "dpmpp_3m_corrected": DPMSolverPP3M(corrected=True),
    "exp_adams_3": ExponentialAdams(3),
    "exp_adams_4": Warmup(DPMSolverPP3S(), ExponentialAdams(4), steps=2),
    "exp_adams_2_eps": ExponentialAdams(2, form="eps"),
    "exp_adams_4_eps": Warmup(DPMSolver3S(), ExponentialAdams(4, form="eps"), steps=2),
    "unip_2_bh1": UniP(2, variant="bh1"),
    "unip_2": UniP(2),
    "unip_3": UniP(3),
    "unipc_1_bh1": UniPC(1, variant="bh1"),
    "unipc_1": UniPC(1),
    "unipc_2_bh1": UniPC(2, variant="bh1"),
    "unipc_2": UniPC(2),
    "unipc_2_vary": UniPC(2, variant="vary"),
    "unipc_2_eps": UniPC(2, form="eps"),
    "unic_ddim": UniC(DDIM(), 1),
    "unic_dpmpp_2s": UniC(DPMSolverPP2S(), 2),
    "deis_tab1": DEIStAB(1),
    "deis_tab3": Warmup(DPMSolver3S(), DEIStAB(3), steps=2),
    "deis_rhoab1": DEISrhoAB(1),
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
