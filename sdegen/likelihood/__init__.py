"""How likely data are under a model: the bound, the probability-flow ODE, importance weighting."""

from __future__ import annotations

from sdegen.likelihood.bound import bound
from sdegen.likelihood.every_t import best_grid, bound_of_every_T
from sdegen.likelihood.importance import importance
from sdegen.likelihood.ode import LogDensity, log_density, ode_likelihood, ode_log_prob
from sdegen.likelihood.profile import DenoisingProfile, denoising_profile
from sdegen.likelihood.report import LikelihoodReport
from sdegen.likelihood.trace import Exact, Hutchinson, Trace, trace_for

__all__ = [
    "DenoisingProfile",
    "Exact",
    "Hutchinson",
    "LikelihoodReport",
    "LogDensity",
    "Trace",
    "best_grid",
    "bound",
    "bound_of_every_T",
    "denoising_profile",
    "importance",
    "log_density",
    "ode_likelihood",
    "ode_log_prob",
    "trace_for",
]
