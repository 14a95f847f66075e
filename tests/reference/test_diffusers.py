"""Our solvers and those of diffusers, coefficient by coefficient.

A scheduler is imported as a table by probing it with unit vectors, ours is traced, and every number of every state is
compared: how much of the start, of each prediction and of each noise is in it. That needs no network and no sample, and
nothing can cancel. The scheduler's last step, which goes to the data, has no counterpart on a grid of ours.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from sdegen.paths import Tabulated
from solvers import import_sampler, trace
from solvers.foreign import Diffusers
from solvers.grids import ALIGN_YOUR_STEPS

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

PATH = Tabulated(betas=np.linspace(1e-4, 0.02, 1000))
SDE = {"algorithm_type": "sde-dpmsolver++"}


def scheduler(name: str, **options: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library = importlib.import_module("diffusers")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"diffusers: {error}")
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    spacing = {} if "Singlestep" in name else {"timestep_spacing": "trailing"}
    return getattr(library, name)(**betas, **spacing, **options)


@pytest.mark.parametrize(
    ("theirs", "options", "ours", "calls"),
    [
        ("DDPMScheduler", {"clip_sample": False}, "ancestral", 1),
        ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}, "ancestral_beta", 1),
        ("DDIMScheduler", {"clip_sample": False}, "ddim", 1),
        ("EulerDiscreteScheduler", {}, "ddim", 1),
        ("HeunDiscreteScheduler", {}, "edm_heun", 2),
        ("EulerAncestralDiscreteScheduler", {}, "euler_a", 1),
        ("DPMSolverMultistepScheduler", {}, "dpmpp_2m", 1),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "dpmpp_2m_heun", 1),
        ("DPMSolverMultistepScheduler", SDE, "sde_dpmpp_2m", 1),
        ("DPMSolverMultistepScheduler", {**SDE, "solver_type": "heun"}, "sde_dpmpp_2m_heun", 1),
    ],
)
@pytest.mark.parametrize("steps", [5, 10])
def test_coefficients_agree(theirs: str, options: dict[str, Any], ours: str, calls: int, steps: int) -> None:
    made = scheduler(theirs, **options)
    if "DPMSolverMultistep" in theirs:
        made.register_to_config(lower_order_final=False)
    table = import_sampler(Diffusers(made, steps), PATH)
    nodes = torch.tensor(table.ts)
    mine = trace(ours, PATH, torch.unique(nodes[nodes.isfinite()]).flip(0))  # two-stage schedulers name a node twice
    assert len(mine.ts) == steps
    for form in ("x0", "eps"):
        expected = mine.states(form)
        kept = [*range(1 + mine.nfe), *range(1 + table.nfe, 1 + table.nfe + mine.draws)]
        found = table.states(form)[calls - 1 :: calls][: len(expected)][:, kept]
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_their_ddim_steps_to_a_label_that_it_does_not_start_from_next() -> None:
    """Where the number of steps does not divide that of the levels, a step of theirs ends 1000 // steps labels lower,
    and the next one starts from the rounded label: the chain has gaps, and its coefficients are not those of DDIM."""
    table = import_sampler(Diffusers(scheduler("DDIMScheduler", clip_sample=False), 6), PATH)
    mine = trace("ddim", PATH, torch.tensor(table.ts[:-1]))
    gap = np.abs(table.states("x0")[:-1, :-1] - mine.states("x0")).max()
    assert 1e-3 < gap < 1e-2


@pytest.mark.parametrize(("ours", "theirs"), [("sd1", ""), ("sdxl", "XL"), ("svd", "Video")])
def test_aligned_steps_are_the_published_ones(ours: str, theirs: str) -> None:
    scheduler("DDIMScheduler")
    published = importlib.import_module("diffusers.schedulers").AysSchedules[f"StableDiffusion{theirs}Sigmas"]
    assert list(ALIGN_YOUR_STEPS[f"ays_{ours}"][:10]) == published[:10]  # theirs end at 0


# --- Single-step methods and PNDM -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "kind", "order"),
    [
        ("dpmpp_2s", "dpmsolver++", 2),
        ("dpm_2s", "dpmsolver", 2),
        ("dpmpp_3s", "dpmsolver++", 3),
        ("dpm_3s", "dpmsolver", 3),
    ],
)
@pytest.mark.parametrize("steps", [6, 12])
def test_single_step_coefficients_agree(ours: str, kind: str, order: int, steps: int) -> None:
    """Their stages are nodes of the grid, ours are inside a step: where logsnr is uniform these are the same places.

    Compared is what a step makes of its own predictions. The second stage of their third-order method is made by their
    second-order one in place of the paper's formula, so those predictions are made at other points.
    """
    made = scheduler(
        "DPMSolverSinglestepScheduler", solver_order=order, algorithm_type=kind, use_exponential_sigmas=True,
        lower_order_final=False, final_sigmas_type="sigma_min",
    )  # fmt: skip
    table = import_sampler(Diffusers(made, steps), PATH)
    nodes = torch.tensor(table.ts)[::order][: (steps - 1) // order + 1]  # the last step goes nowhere
    mine = trace(ours, PATH, nodes)
    form = "x0" if "++" in kind else "eps"
    expected = mine.states(form)
    found = table.states(form)[order - 1 :: order][: len(expected), : expected.shape[1]]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    other = "eps" if form == "x0" else "x0"
    apart = np.abs(table.states(other)[order - 1 :: order][: len(expected), : expected.shape[1]] - mine.states(other))
    assert (apart.max() < 1e-3 * np.abs(mine.states(other)).max()) == (order == 2)


@pytest.mark.parametrize("steps", [5, 10, 20])
@pytest.mark.parametrize("ours", ["plms", "pndm"])
def test_pndm_coefficients_agree(ours: str, steps: int) -> None:
    made = scheduler("PNDMScheduler", skip_prk_steps=ours == "plms")
    table = import_sampler(Diffusers(made, steps), PATH)
    # What a step says on the way: Euler's point of the first PLMS step, three of the four stages of Runge-Kutta's.
    ends = [*range(1, steps + 1)] if ours == "plms" else [3, 7, 11, *range(12, steps + 9)]
    nodes = torch.tensor([table.ts[0], *(table.ts[i + 1] for i in ends)])
    mine = trace(ours, PATH, nodes)
    for form in ("x0", "eps"):
        expected = mine.states(form)
        np.testing.assert_allclose(table.states(form)[ends], expected, atol=1e-5 * np.abs(expected).max())


def test_a_last_step_of_no_length_is_not_a_number_there() -> None:
    """On Karras's grid that ends at the last noise level, the third order divides the step by itself."""
    made = scheduler(
        "DPMSolverMultistepScheduler", solver_order=3, use_karras_sigmas=True, final_sigmas_type="sigma_min"
    )
    made.set_timesteps(20)
    x = torch.ones(1, 1)
    for label in made.timesteps:
        x = made.step(0.5 * x, label, x).prev_sample
    assert not bool(x.isfinite().all())


def test_their_third_order_sde_in_eps_form_does_not_run() -> None:
    made = scheduler(
        "DPMSolverMultistepScheduler", solver_order=3, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"
    )
    made.set_timesteps(10)
    x = torch.ones(1, 1)
    for label in made.timesteps[:2]:  # of orders 1 and 2
        x = made.step(0.5 * x, label, x).prev_sample
    with pytest.raises(UnboundLocalError):
        made.step(0.5 * x, made.timesteps[2], x)
