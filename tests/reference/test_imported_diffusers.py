"""Schedulers of diffusers, imported by probing: whole, with rows that stay short, and with our coefficients."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from sdegen.paths import Tabulated
from solvers import Diffusers, import_sampler, replay, trace
from solvers.certify import mixture

# It hands tensors to NumPy.
pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

BETAS = np.linspace(1e-4, 0.02, 1000)


def scheduler(name: str, **options: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library = importlib.import_module("diffusers")
            made = getattr(library, name)(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **options)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"diffusers: {error}")
    return made


@pytest.mark.parametrize(
    ("theirs", "options", "ours"),
    [
        ("DDIMScheduler", {"clip_sample": False}, "ddim"),
        ("EulerDiscreteScheduler", {}, "ddim"),
        ("DPMSolverMultistepScheduler", {}, "dpmpp_2m"),
    ],
)
def test_diffusers_has_our_coefficients(theirs: str, options: dict[str, Any], ours: str) -> None:
    path = Tabulated(betas=BETAS)
    table = import_sampler(Diffusers(scheduler(theirs, timestep_spacing="trailing", **options), 10), path)
    assert table.ts[-1] == -np.inf  # its last step goes to the data, which a grid of ours does not reach
    for form in ("x0", "eps"):
        found, expected = table.states(form), trace(ours, path, torch.tensor(table.ts[:-1])).states(form)
        np.testing.assert_allclose(found[:-1, :-1], expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(table.result(), np.eye(11)[-1], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "nfe", "draws"),
    [
        ("DDPMScheduler", {"clip_sample": False}, 10, 9),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 10, 9),
        ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, 10, 0),
        ("UniPCMultistepScheduler", {"solver_order": 3}, 10, 0),
        ("DEISMultistepScheduler", {"solver_order": 3}, 10, 0),
        ("HeunDiscreteScheduler", {}, 19, 0),
        ("KDPM2DiscreteScheduler", {}, 19, 0),
        ("LMSDiscreteScheduler", {}, 10, 0),
        ("EulerAncestralDiscreteScheduler", {}, 10, 9),
        ("PNDMScheduler", {"skip_prk_steps": True}, 11, 0),
        ("SASolverScheduler", {}, 10, 7),
    ],
)
def test_diffusers_is_imported_and_its_rows_stay_short(
    name: str, options: dict[str, Any], nfe: int, draws: int
) -> None:
    path = Tabulated(betas=BETAS)
    made = scheduler(name, **options)
    before = {key: value for key, value in vars(made).items() if isinstance(value, int | float)}
    table = import_sampler(Diffusers(made, 10), path)
    assert (table.nfe, table.draws) == (nfe, draws)
    assert np.diff(table.first).max() <= 11
    assert before == {key: value for key, value in vars(made).items() if isinstance(value, int | float)}  # a copy ran


def test_a_replay_is_its_own_loop() -> None:
    path, made = Tabulated(betas=BETAS), scheduler("UniPCMultistepScheduler", solver_order=2)
    problem, x = mixture(path), torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    made.set_timesteps(12)
    state = x
    for label in made.timesteps:
        t = (label.double() + 1) / 1000
        state = made.step(problem.predict(state, t).eps, label, state).prev_sample
    found = replay(import_sampler(Diffusers(made, 12), path), problem.predict, x)
    torch.testing.assert_close(found, state, rtol=1e-3, atol=1e-3)


def test_a_scheduler_that_clips_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^DDIMScheduler.*only linear steps have a table"):
        import_sampler(Diffusers(scheduler("DDIMScheduler", clip_sample=True), 5), Tabulated(betas=BETAS))
