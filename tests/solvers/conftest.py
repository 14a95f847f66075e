"""The problems on which solvers are measured.

logsnr goes from 8 to -8 on every path: there 160 steps are small steps for a mixture of broad components, so that
slopes are orders. Schedules that reach logsnr 20 at their ends need more steps than a test has time for, and show in
the same 160 the order of the transient.
"""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from sdegen import certificates
from sdegen.certificates import PATHS
from sdegen.oracles import MixtureOracle
from sdegen.paths import GaussianPath
from solvers import DiffusionProblem
from solvers.certify import exact, starts


@pytest.fixture(scope="session")
def mixture() -> MixtureOracle:
    """The data of :func:`solvers.certify.mixture`, as an oracle."""
    covs = [np.diag([0.09, 0.16]), np.diag([0.16, 0.09])]
    return MixtureOracle([0.3, 0.7], [[-0.5, 0.3], [0.4, -0.4]], covs)


@pytest.fixture(scope="session")
def problems() -> dict[str, DiffusionProblem]:
    return certificates.problems()


@pytest.fixture(scope="session")
def answers(problems: dict[str, DiffusionProblem]) -> dict[str, Tensor]:
    return {name: exact(problem, starts(problem)) for name, problem in problems.items()}


@pytest.fixture(scope="session")
def paths() -> dict[str, GaussianPath]:
    return PATHS


@pytest.fixture(scope="session", params=list(PATHS))
def path(request: pytest.FixtureRequest) -> GaussianPath:
    return PATHS[request.param]


@pytest.fixture(scope="session")
def vp() -> GaussianPath:
    return PATHS["vp"]
