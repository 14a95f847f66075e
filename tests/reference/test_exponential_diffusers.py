"""Our exponential multistep methods are those of diffusers, and where they are not, this says why.

The network is a list of random tensors, so that a scheduler and a solver can be fed the same predictions; the state is
compared before the scheduler's last step, which goes to the data (or nowhere, where it repeats the last noise level).
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdegen.paths import Tabulated
from solvers import (
    DiffusionProblem,
    DPMSolver2M,
    DPMSolver3M,
    DPMSolverPP2M,
    DPMSolverPP3M,
    ExponentialAdams,
    Prediction,
    Solver,
    UniP,
    UniPC,
    integrate,
)

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

PATH = Tabulated(betas=np.linspace(1e-4, 0.02, 1000))
END = {"final_sigmas_type": "sigma_min"}


def difference(name: str, options: dict[str, Any], ours: Solver[Any], steps: int = 12) -> float:
    """How far the states are apart after all steps but the last, relative to their size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library = importlib.import_module("diffusers")
            scheduler = getattr(library, name)(
                beta_start=1e-4,
                beta_end=0.02,
                beta_schedule="linear",
                timestep_spacing="trailing",
                lower_order_final=False,
                **options,
            )
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"diffusers: {error}")
    scheduler.set_timesteps(steps)
    draw = torch.Generator().manual_seed(0)
    start, *eps = torch.randn(steps + 1, 4, 3, generator=draw, dtype=torch.float64).unbind()

    theirs = start
    for label, answer in zip(scheduler.timesteps[:-1], eps, strict=False):
        theirs = scheduler.step(answer, label, theirs).prev_sample

    answers = iter(eps)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        answer = next(answers)
        return Prediction((x - PATH.sigma(t) * answer) / PATH.alpha(t), answer)

    ts = PATH.time(-2 * scheduler.sigmas[:steps].double().log())
    found = integrate(ours, DiffusionProblem(PATH, predict), start, ts).x
    return float((found - theirs).abs().max() / found.abs().max())


def dpm(order: int, kind: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "DPMSolverMultistepScheduler", {"solver_order": order, "algorithm_type": kind, **END, **more}


def uni(order: int, variant: str, x0: bool, **more: Any) -> tuple[str, dict[str, Any]]:
    options = {"solver_order": order, "solver_type": variant, "predict_x0": x0}
    return "UniPCMultistepScheduler", {**options, **END, **more}


SAME: dict[str, tuple[tuple[str, dict[str, Any]], Solver[Any]]] = {
    "DPM-Solver++(2M)": (dpm(2, "dpmsolver++"), DPMSolverPP2M()),
    "DPM-Solver++(2M) heun": (dpm(2, "dpmsolver++", solver_type="heun"), DPMSolverPP2M(taylor=True)),
    "DPM-Solver++(3M)": (dpm(3, "dpmsolver++"), DPMSolverPP3M()),
    "DPM-Solver(2M)": (dpm(2, "dpmsolver"), DPMSolver2M()),
    "DPM-Solver(2M) heun": (dpm(2, "dpmsolver", solver_type="heun"), DPMSolver2M(taylor=True)),
    "DPM-Solver(3M)": (dpm(3, "dpmsolver"), DPMSolver3M()),
    **{
        f"UniPC-{p} {variant} {form}": (uni(p, variant, form == "x0"), UniPC(p, form, variant))
        for p in (1, 2, 3)
        for variant in ("bh1", "bh2")
        for form in ("x0", "eps")
    },
    "UniP-2 bh1": (uni(2, "bh1", True, disable_corrector=list(range(99))), UniP(2, variant="bh1")),
    "UniP-3": (uni(3, "bh2", True, disable_corrector=list(range(99))), UniP(3)),
    # What is called DEIS there extrapolates eps in log rho = -lam.
    "DEIS-1": (("DEISMultistepScheduler", {"solver_order": 1}), ExponentialAdams(1, "eps")),
    "DEIS-2": (("DEISMultistepScheduler", {"solver_order": 2}), ExponentialAdams(2, "eps")),
}


@pytest.mark.parametrize("what", SAME)
def test_same_states(what: str) -> None:
    (name, options), ours = SAME[what]
    assert difference(name, options, ours) < 2e-5  # their coefficients are float32


def test_third_order_deis_there_cancels() -> None:
    """Its closed form loses its digits in float32: finer steps are worse."""
    name, options = "DEISMultistepScheduler", {"solver_order": 3}
    few, many = (difference(name, options, ExponentialAdams(3, "eps"), n) for n in (12, 200))
    assert few < 1e-3
    assert many > 100 * few


@pytest.mark.parametrize("kind", ["dpmsolver++", "dpmsolver"])
def test_the_third_order_method_there_has_half_of_its_quadratic_term(kind: str) -> None:
    corrected = DPMSolverPP3M(corrected=True) if kind == "dpmsolver++" else DPMSolver3M(corrected=True)
    assert difference(*dpm(3, kind), corrected) > 2e-3
