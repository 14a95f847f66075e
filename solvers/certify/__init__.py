"""The certificate of a solver: what it declares, measured.

A solver that produces finite samples of the right shape may still be wrong; only its *order of convergence* shows
whether its coefficients are the paper's. Everything here compares with an exact answer and needs no Monte Carlo:

order
    The root-mean-square distance, sample by sample, between N steps and the solution of the probability-flow ODE
    (DOP853 in the clock lam, tolerance 3e-14) falls like N^-p. A wrong coefficient lowers p, a wrong limit makes it 0.
local order
    In the middle of the path, with exact history, a few steps of length h err by h^(p + 1); from a cold start by h^q,
    and q is the order that the first steps leave to the whole.
weak order
    On data N(m, v) the law of the result is Gaussian and follows by linear algebra from unit impulses in the noise. In
    the limit of short steps the noise has to be exactly what keeps the marginal law, to five digits.
strong order
    With one Brownian path for all grids, the distance of N to 2N steps falls like N^-p.
contract
    Shape, dtype, digits, seeds, batch independence, memory, counted calls, times, the round trip, the global random
    state; the same sample on every path, where that is declared.

    certify(solver, {"vp": mixture(vp), "ve": mixture(ve), "flow": mixture(flow)})

``docs/solvers.md`` says how to read one.
"""

from __future__ import annotations

from solvers.certify.certificate import Certificate, certify
from solvers.certify.contract import Check, contract
from solvers.certify.convergence import Measured, measured_order, refined, strong_order, tolerance_proportional
from solvers.certify.local import graded, local_order
from solvers.certify.problems import CERTIFIED_GRIDS, exact, gaussian, mixture, starts, uneven
from solvers.certify.weak import NoiseScale, noise_scale, weak_order

__all__ = [
    "CERTIFIED_GRIDS",
    "Certificate",
    "Check",
    "Measured",
    "NoiseScale",
    "certify",
    "contract",
    "exact",
    "gaussian",
    "graded",
    "local_order",
    "measured_order",
    "mixture",
    "noise_scale",
    "refined",
    "starts",
    "strong_order",
    "tolerance_proportional",
    "uneven",
    "weak_order",
]
