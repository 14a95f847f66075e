"""How likely data are under a model: the bound, the probability-flow ODE, importance weighting; all in one call."""

from __future__ import annotations

from sdegen.likelihood.audit import Audit, asymmetry, audit
from sdegen.likelihood.bound import bound
from sdegen.likelihood.control import IndependentLevels, LinearGaussian
from sdegen.likelihood.evaluate import Evaluation, evaluate
from sdegen.likelihood.every_t import best_grid, bound_of_every_T
from sdegen.likelihood.importance import importance
from sdegen.likelihood.ladder import Ladder, ladder
from sdegen.likelihood.log_density import LogDensity, log_density
from sdegen.likelihood.ode import ode_likelihood, ode_log_prob
from sdegen.likelihood.profile import DenoisingProfile, denoising_profile
from sdegen.likelihood.report import LikelihoodReport
from sdegen.likelihood.trace import Exact, Hutchinson, Trace, trace_for
from sdegen.likelihood.variate import ControlVariate, pilot

__all__ = [
    "Audit",
    "ControlVariate",
    "DenoisingProfile",
    "Evaluation",
    "Exact",
    "Hutchinson",
    "IndependentLevels",
    "Ladder",
    "LikelihoodReport",
    "LinearGaussian",
    "LogDensity",
    "Trace",
    "asymmetry",
    "audit",
    "best_grid",
    "bound",
    "bound_of_every_T",
    "denoising_profile",
    "evaluate",
    "importance",
    "ladder",
    "log_density",
    "ode_likelihood",
    "ode_log_prob",
    "pilot",
    "trace_for",
]
