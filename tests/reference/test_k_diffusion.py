"""Our solvers and the functions of k-diffusion, coefficient by coefficient, in float64.

A function is imported as a table by running it on symbols with its own code; ours is traced on the same grid. The noise
of both is that of one Brownian motion, so the noises agree interval by interval.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdegen.certificates import PATHS, problems
from sdegen.paths import VE
from solvers import (
    EDM,
    SOLVERS,
    AdamsBashforth,
    DPM2Ancestral,
    DPMPP2SAncestral,
    DPMSolverPP3M,
    DPMSolverPPSDE,
    EulerAncestral,
    OnPath,
    SDEDPMSolverPP2M,
    SDEDPMSolverPP3M,
    Solver,
    import_sampler,
    trace,
)
from solvers.certify import measured_order, starts, uneven
from solvers.foreign import KDiffusion
from solvers.grids import karras

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]


SAME: dict[str, tuple[str, dict[str, Any], Solver[Any]]] = {
    "euler": ("sample_euler", {}, SOLVERS["ddim"]),
    "heun": ("sample_heun", {}, SOLVERS["edm_heun"]),
    "dpm_2": ("sample_dpm_2", {}, DPM2Ancestral(eta=0.0)),
    "lms 1": ("sample_lms", {"order": 1}, SOLVERS["ddim"]),
    "lms 3": ("sample_lms", {"order": 3}, OnPath(AdamsBashforth(3), EDM)),
    "lms 4": ("sample_lms", {"order": 4}, OnPath(AdamsBashforth(4), EDM)),
    "euler a": ("sample_euler_ancestral", {}, SOLVERS["euler_a"]),
    "euler a, less": ("sample_euler_ancestral", {"eta": 0.4}, EulerAncestral(eta=0.4)),
    "dpm2 a": ("sample_dpm_2_ancestral", {}, SOLVERS["dpm2_a"]),
    "2s a": ("sample_dpmpp_2s_ancestral", {}, SOLVERS["dpmpp_2s_a"]),
    "2s": ("sample_dpmpp_2s_ancestral", {"eta": 0.0}, DPMPP2SAncestral(eta=0.0)),
    "2m": ("sample_dpmpp_2m", {}, SOLVERS["dpmpp_2m"]),
    "sde": ("sample_dpmpp_sde", {}, SOLVERS["dpmpp_sde"]),
    "sde, less": ("sample_dpmpp_sde", {"eta": 0.5}, DPMSolverPPSDE(eta=0.5)),
    "2m sde": ("sample_dpmpp_2m_sde", {}, SOLVERS["sde_dpmpp_2m"]),
    "2m sde heun": ("sample_dpmpp_2m_sde", {"solver_type": "heun"}, SOLVERS["sde_dpmpp_2m_heun"]),
    "2m sde, less": ("sample_dpmpp_2m_sde", {"eta": 0.3}, SDEDPMSolverPP2M(eta=0.3**0.5)),  # their eta is a square
    "3m sde": ("sample_dpmpp_3m_sde", {}, SOLVERS["sde_dpmpp_3m"]),
    "3m sde, none": ("sample_dpmpp_3m_sde", {"eta": 0.0}, SDEDPMSolverPP3M(eta=0.0)),
}


@pytest.mark.parametrize("grid", [karras, uneven], ids=["karras", "uneven"])
@pytest.mark.parametrize("what", SAME)
def test_coefficients_agree(what: str, grid: Any, k_diffusion: Any) -> None:
    name, options, ours = SAME[what]
    path = PATHS["vp"]
    ts = grid(path, 10)
    sigmas = torch.exp(-path.logsnr(ts) / 2)
    theirs = import_sampler(KDiffusion(getattr(k_diffusion, name), sigmas, options), path)
    mine = trace(ours, path, ts)
    assert (theirs.nfe, theirs.draws) == (mine.nfe, mine.draws)
    np.testing.assert_allclose(theirs.intervals, mine.intervals, atol=1e-10)
    for form in ("x0", "eps"):
        expected = mine.states(form)
        np.testing.assert_allclose(theirs.states(form), expected, atol=1e-10 * np.abs(expected).max())


def test_its_third_order_is_the_published_one() -> None:
    """Half of the quadratic term, and so of order 2: the same numbers as ours as published (above), and measured."""
    problem = problems()["vp"]
    slopes = [
        measured_order(method, problem, starts(problem), uneven).slope
        for method in (SDEDPMSolverPP3M(eta=0.0), DPMSolverPP3M(corrected=True))
    ]
    assert slopes == pytest.approx([2, 3], abs=0.2)


# --- To the end: the last step, to no noise at all --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nfe", "draws"),
    [
        ("sample_euler_ancestral", 6, 5),
        ("sample_dpm_2", 11, 0),
        ("sample_dpm_2_ancestral", 11, 5),
        ("sample_lms", 6, 0),
        ("sample_dpmpp_2s_ancestral", 11, 5),
        ("sample_dpmpp_sde", 11, 10),
        ("sample_dpmpp_2m_sde", 6, 5),
        ("sample_dpmpp_3m_sde", 6, 5),
    ],
)
def test_its_functions_are_imported_whole(name: str, nfe: int, draws: int, k_diffusion: Any) -> None:
    path = VE(0.02, 20.0)
    levels = torch.exp(-path.logsnr(karras(path, 5)) / 2)
    sigmas = torch.cat([levels, levels.new_zeros(1)])
    table = import_sampler(KDiffusion(getattr(k_diffusion, name), sigmas), path)
    assert (table.nfe, table.draws, table.steps) == (nfe, draws, 6)
    assert table.result()[0] == pytest.approx(0, abs=1e-12)  # the step to zero returns data


def test_its_adaptive_method_has_no_table(k_diffusion: Any) -> None:
    path = VE(0.02, 20.0)

    def sample_adaptive(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        return k_diffusion.sample_dpm_adaptive(model, x, 0.02, 20.0, disable=True)

    with pytest.raises(ValueError, match="only linear steps have a table"):
        import_sampler(KDiffusion(sample_adaptive, torch.exp(-path.logsnr(karras(path, 5)) / 2)), path)
