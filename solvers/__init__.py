"""Solvers for diffusion problems: a function, a path, a grid, and methods whose order is measured.

    from solvers import DiffusionProblem, prior, solve

    problem = DiffusionProblem(path, predict)                    # predict(x, t) -> Prediction(x0, eps)
    x = prior(path, (64, 2), seed=0)
    solve(problem, x, solver="heun", steps=20).x

Nothing here knows a network, a data set or an experiment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from solvers.adaptive import BogackiShampine32, DormandPrince54
from solvers.adaptive_dpm import DPMSolver12, DPMSolver23
from solvers.adaptive_sde import AdaptiveHeun, GottaGoFast
from solvers.analytic import AnalyticDPM, GaussianMSE, LearnedVariance, MeasuredMSE
from solvers.ancestral import DDIM, Ancestral, DPM2Ancestral, DPMPP2SAncestral, EulerAncestral, ReverseDiffusion
from solvers.churn import Churn, Restart, RestartInterval
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
from solvers.er_sde import ERSDE, PowerScale, Scale5
from solvers.exponential import ExponentialAdams
from solvers.exponential_sde import (
    DPMSolverPPSDE,
    ExponentialAdamsSDE,
    SDEDPMSolver1,
    SDEDPMSolver2M,
    SDEDPMSolverPP1,
    SDEDPMSolverPP2M,
    SDEDPMSolverPP3M,
)
from solvers.external import ScipyODE, TorchDiffEq, TorchSDE
from solvers.foreign import Diffusers, KDiffusion, import_sampler
from solvers.gits import gits
from solvers.grids import GRIDS, Grid, check_grid
from solvers.integrate import Solver, Trajectory, integrate
from solvers.inversion import RoundTrip, round_trip
from solvers.langevin import AnnealedLangevin, Langevin, PredictorCorrector, SNRLangevin
from solvers.multistep import AdamsBashforth, GradientEstimation
from solvers.names import resolve
from solvers.noise import BrownianMotion, Noise, standard_normal
from solvers.optimize import OptimizedGrid, optimize_grid
from solvers.picard import Parallel, picard
from solvers.pndm import IPNDM, PLMS, PNDM, IPNDMv, PseudoRungeKutta
from solvers.problem import ODE, SDE, DiffusionProblem, Path, Prediction, expand, mix
from solvers.replay import capture, replay
from solvers.runge_kutta import RK4, BogackiShampine, DormandPrince, Euler, Heun, Midpoint, Ralston, RungeKutta, Tableau
from solvers.sa_solver import SASolver, Window
from solvers.sde import SRA1, EulerMaruyama, StochasticHeun
from solvers.seeds import SEEDS1, SEEDS2, SEEDS3
from solvers.solve import prior, solve
from solvers.tables import Moments, Table
from solvers.trace import trace
from solvers.unipc import UniC, UniP, UniPC

__all__ = [
    "DDIM",
    "EDM",
    "ERSDE",
    "FLOW",
    "GRIDS",
    "IPNDM",
    "ODE",
    "PLMS",
    "PNDM",
    "RK4",
    "SDE",
    "SEEDS1",
    "SEEDS2",
    "SEEDS3",
    "SOLVERS",
    "SRA1",
    "VP_LAM",
    "AdamsBashforth",
    "AdaptiveHeun",
    "AnalyticDPM",
    "Ancestral",
    "AnnealedLangevin",
    "BogackiShampine",
    "BogackiShampine32",
    "BrownianMotion",
    "Chord",
    "Churn",
    "Circle",
    "Coordinates",
    "Curve",
    "DEISrhoAB",
    "DEIStAB",
    "DPM2Ancestral",
    "DPMPP2SAncestral",
    "DPMSolver1",
    "DPMSolver2M",
    "DPMSolver2S",
    "DPMSolver3M",
    "DPMSolver3S",
    "DPMSolver12",
    "DPMSolver23",
    "DPMSolverPP1",
    "DPMSolverPP2M",
    "DPMSolverPP2S",
    "DPMSolverPP3M",
    "DPMSolverPP3S",
    "DPMSolverPPSDE",
    "DenseOutput",
    "Diffusers",
    "DiffusionProblem",
    "DormandPrince",
    "DormandPrince54",
    "Euler",
    "EulerAncestral",
    "EulerMaruyama",
    "ExponentialAdams",
    "ExponentialAdamsSDE",
    "FinalStep",
    "GaussianMSE",
    "GottaGoFast",
    "GradientEstimation",
    "Grid",
    "Heun",
    "IPNDMv",
    "InScaling",
    "KDiffusion",
    "Langevin",
    "LearnedVariance",
    "MeasuredMSE",
    "Midpoint",
    "Moments",
    "Noise",
    "OnPath",
    "OptimizedGrid",
    "Parallel",
    "Path",
    "PowerScale",
    "Prediction",
    "PredictorCorrector",
    "PseudoRungeKutta",
    "Ralston",
    "Ray",
    "Restart",
    "RestartInterval",
    "ReverseDiffusion",
    "RoundTrip",
    "RungeKutta",
    "SASolver",
    "SDEDPMSolver1",
    "SDEDPMSolver2M",
    "SDEDPMSolverPP1",
    "SDEDPMSolverPP2M",
    "SDEDPMSolverPP3M",
    "SNRLangevin",
    "Scale5",
    "ScipyODE",
    "Solver",
    "StochasticHeun",
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
    "Window",
    "capture",
    "check_grid",
    "dense",
    "expand",
    "gits",
    "import_sampler",
    "integrate",
    "mix",
    "optimize_grid",
    "picard",
    "prior",
    "replay",
    "resolve",
    "round_trip",
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
    "analytic_dpm": AnalyticDPM(),
    "reverse_diffusion": ReverseDiffusion(),
    "euler_a": EulerAncestral(),
    "dpm2_a": DPM2Ancestral(),
    "dpmpp_2s_a": DPMPP2SAncestral(),
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
    "sde_heun": StochasticHeun(),
    "sde_heun_lam": OnPath(StochasticHeun(), VP_LAM),
    "sra1": OnPath(SRA1(), VP_LAM),
    "sde_dpm_1": SDEDPMSolver1(),
    "sde_dpm_2m": SDEDPMSolver2M(),
    "sde_dpmpp_1": SDEDPMSolverPP1(),
    "sde_dpmpp_2m": SDEDPMSolverPP2M(),
    "sde_dpmpp_2m_heun": SDEDPMSolverPP2M(taylor=True),
    "sde_dpmpp_3m": SDEDPMSolverPP3M(),
    "sde_adams_3": ExponentialAdamsSDE(3),
    "dpmpp_sde": DPMSolverPPSDE(),
    "seeds_1": SEEDS1(),
    "seeds_2": SEEDS2(),
    "seeds_3": SEEDS3(),
    "seeds_3_x0": SEEDS3(form="x0"),
    "sa_solver": SASolver(),
    "er_sde_1": ERSDE(1),
    "er_sde_2": ERSDE(2),
    "er_sde_3": ERSDE(3),
    "er_sde_3_corrected": ERSDE(3, corrected=True),
    "edm_churn": Churn(OnPath(Heun(), EDM, grid="karras")),
    "restart": Restart(OnPath(Heun(), EDM, grid="karras")),
    "pc_langevin": PredictorCorrector(ReverseDiffusion(), SNRLangevin()),
    "pc_splitting": PredictorCorrector(Ancestral(), Langevin(rate=0.5)),
    "annealed_langevin": AnnealedLangevin(),
    "dpm_1": DPMSolver1(),
    "dpm_2s": DPMSolver2S(),
    "dpm_3s": DPMSolver3S(),
    "dpm_2m": DPMSolver2M(),
    "dpm_2m_taylor": DPMSolver2M(taylor=True),
    "dpm_3m": DPMSolver3M(),
    "dpm_3m_corrected": DPMSolver3M(corrected=True),
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
    "unipc_3": UniPC(3),
    "unic_ddim": UniC(DDIM(), 1),
    "unic_dpmpp_2s": UniC(DPMSolverPP2S(), 2),
    "deis_tab1": DEIStAB(1),
    "deis_tab2": Warmup(DPMSolver3S(), DEIStAB(2), steps=2),
    "deis_tab3": Warmup(DPMSolver3S(), DEIStAB(3), steps=2),
    "deis_rhoab1": DEISrhoAB(1),
    "deis_rhoab2": DEISrhoAB(2),
    "ab_2": AdamsBashforth(2),
    "lms_4": OnPath(Warmup(RK4(), AdamsBashforth(4), steps=2), EDM),
    "vab_2": OnPath(AdamsBashforth(2), FLOW),
    "vab_3": OnPath(Warmup(RK4(), AdamsBashforth(3), steps=2), FLOW),
    "vab_4": OnPath(Warmup(RK4(), AdamsBashforth(4), steps=2), FLOW),
    "vab_3_euler": OnPath(Warmup(Euler(), AdamsBashforth(3)), FLOW),
    "vab_4_euler": OnPath(Warmup(Euler(), AdamsBashforth(4)), FLOW),
    "gradient_estimation": GradientEstimation(),
    "pndm": PNDM(),
    "plms": PLMS(),
    "ipndm": IPNDM(),
    "ipndm_v": IPNDMv(2),
    "ipndm_v_corrected": IPNDMv(2, corrected=True),
    "bosh32": OnPath(BogackiShampine32(), VP_LAM),
    "dopri54": DormandPrince54(),
    "dopri54_lam": OnPath(DormandPrince54(), VP_LAM),
    "adaptive_dpm_12": OnPath(DPMSolver12(), VP_LAM),
    "adaptive_dpm_23": OnPath(DPMSolver23(), VP_LAM),
    "adaptive_heun": OnPath(AdaptiveHeun(), VP_LAM),
    "gotta_go_fast": GottaGoFast(),
    "dopri5": TorchDiffEq("dopri5"),
    "dopri5_lam": OnPath(TorchDiffEq("dopri5"), VP_LAM),
    "dopri8": TorchDiffEq("dopri8"),
    "bosh3": TorchDiffEq("bosh3"),
    "torchdiffeq_adaptive_heun": TorchDiffEq("adaptive_heun"),
    "torchdiffeq_euler": TorchDiffEq("euler"),
    "torchdiffeq_midpoint": TorchDiffEq("midpoint"),
    "torchdiffeq_heun2": TorchDiffEq("heun2"),
    "torchdiffeq_heun3": TorchDiffEq("heun3"),
    "torchdiffeq_rk4": TorchDiffEq("rk4"),
    "torchdiffeq_explicit_adams": TorchDiffEq("explicit_adams"),
    "torchdiffeq_implicit_adams": TorchDiffEq("implicit_adams"),
    "rk23": ScipyODE("RK23"),
    "rk45": ScipyODE("RK45"),
    "dop853": ScipyODE("DOP853"),
    "radau": ScipyODE("Radau"),
    "bdf": ScipyODE("BDF"),
    "lsoda": ScipyODE("LSODA"),
    "rk45_lam": OnPath(ScipyODE("RK45"), VP_LAM),
    "dop853_lam": OnPath(ScipyODE("DOP853"), VP_LAM),
    "torchsde_euler": TorchSDE("euler"),
    "torchsde_milstein": TorchSDE("milstein"),
    "torchsde_euler_heun": TorchSDE("euler_heun"),
    "torchsde_heun": TorchSDE("heun"),
    "torchsde_midpoint": TorchSDE("midpoint"),
    "torchsde_log_ode": TorchSDE("log_ode"),
    "torchsde_reversible_heun": TorchSDE("reversible_heun"),
    "torchsde_srk": TorchSDE("srk"),
}
"""Every solver by name; a library's own names with the library's in front where they are fixed-step or taken here. What
is in here is measured: ``solvers.certify`` and the tests go through the whole table."""


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
            str(solver.order or ("none" if solver.nfe_per_step else "adaptive")),
            str(solver.nfe_per_step or "adaptive"),
            "white" if solver.stochastic else "none",
            solver.reference,
        )
        for name, solver in SOLVERS.items()
    ]
