"""Where solvers are certified, and what is left of a certificate in a file.

The paths: variance preserving, variance exploding and straight lines, each from logsnr -8 to 8, where some hundred
steps are small steps for the data of :func:`solvers.certify.mixture`. What is measured and why is said in
:mod:`solvers.certify`; how to read the result in ``docs/solvers.md``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdegen.files import write_bytes
from sdegen.paths import VE, VP, Flow, GaussianPath, LinearLogSNR
from sdegen.provenance import provenance
from sdegen.results import Result, write
from solvers import DiffusionProblem
from solvers.certify import Certificate, mixture

__all__ = ["PATHS", "problems", "record", "save", "to_result"]

_HALF = math.exp(4.0)  # sigma / alpha at logsnr -8

PATHS: dict[str, GaussianPath] = {
    "vp": VP(LinearLogSNR(8, -8)),
    "ve": VE(1 / _HALF, _HALF),
    "flow": Flow(t_min=1 / (1 + _HALF), t_max=_HALF / (1 + _HALF)),
}
"""The paths of a certificate, by name."""


def problems() -> dict[str, DiffusionProblem]:
    """The same data on every path."""
    return {name: mixture(path) for name, path in PATHS.items()}


def record(certificate: Certificate) -> dict[str, Any]:
    """A certificate as plain values, for JSON."""
    return {
        "solver": repr(certificate.solver),
        "reference": certificate.solver.reference,
        "claim": certificate.claim,
        "passed": certificate.passed,
        "findings": list(certificate.findings),
        "checks": [
            {
                "what": check.what,
                "passed": check.passed,
                "seen": check.seen,
                **({"steps": check.measured.steps, "errors": check.measured.errors} if check.measured else {}),
            }
            for check in certificate.checks
        ],
    }


def to_result(certificate: Certificate) -> Result:
    """A certificate as arrays: one row for each line, and its errors on ever finer grids, NaN where there are none."""
    checks = certificate.checks
    longest = max([1, *(len(check.measured.steps) for check in checks if check.measured)])
    steps, errors = (np.full((len(checks), longest), np.nan) for _ in range(2))
    for row, check in enumerate(checks):
        if check.measured:
            steps[row, : len(check.measured.steps)] = check.measured.steps
            errors[row, : len(check.measured.errors)] = check.measured.errors
    arrays: dict[str, Any] = {
        "check": (("check",), [check.what for check in checks]),
        "passed": (("check",), np.array([check.passed for check in checks])),
        "seen": (("check",), [check.seen for check in checks]),
        "slope": (("check",), [check.measured.slope if check.measured else np.nan for check in checks]),
        "steps": (("check", "refinement"), steps),
        "error": (("check", "refinement"), errors),
    }
    about = {key: value for key, value in record(certificate).items() if key != "checks"}
    return Result(arrays, {**about, **provenance()})


def save(certificates: Mapping[str, Certificate], path: Path) -> None:
    """Write certificates to a file, by the names that were asked for.

    Args:
        certificates: name -> certificate.
        path: with suffix .json, or .h5 for one group of :mod:`sdegen.results` each, under ``verify``.
    """
    if path.suffix == ".json":
        text = json.dumps({name: record(one) for name, one in certificates.items()}, indent=1, allow_nan=True)
        write_bytes(path, text + "\n")
        return
    for name, certificate in certificates.items():
        write(path, f"verify/{name.replace('/', '_')}", to_result(certificate))
