"""How likely data are under a model: the bound, the probability-flow ODE, importance weighting."""

from __future__ import annotations

from sdegen.likelihood.ode import Exact, Hutchinson, LogDensity, Trace, log_density, ode_log_prob, trace_for
from sdegen.likelihood.report import LikelihoodReport, bound, importance, ode_likelihood

__all__ = [
    "Exact",
    "Hutchinson",
    "LikelihoodReport",
    "LogDensity",
    "Trace",
    "bound",
    "importance",
    "log_density",
    "ode_likelihood",
    "ode_log_prob",
    "trace_for",
]
