"""Our solvers and the samplers of azula, state by state, in float64; and where one of them is wrong."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from sdegen.certificates import PATHS, problems
from solvers import (
    DDIM,
    EDM,
    FLOW,
    SOLVERS,
    AdamsBashforth,
    DiffusionProblem,
    Euler,
    ExponentialAdams,
    OnPath,
    SDEDPMSolver1,
    Solver,
    Warmup,
    integrate,
)
from solvers.certify import exact, measured_order, refined, starts, uneven
from solvers.grids import karras

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]


def azula() -> tuple[Any, Any]:
    """The modules of denoisers and of samplers."""
    try:
        return importlib.import_module("azula.denoise"), importlib.import_module("azula.sample")
    except ImportError as error:
        pytest.skip(f"azula: {error}")


def theirs(name: str, problem: DiffusionProblem, x: Tensor, ts: Tensor, **options: Any) -> Tensor:
    denoise, sample = azula()

    class Denoiser(denoise.Denoiser):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.schedule = lambda t: (problem.path.alpha(t), problem.path.sigma(t))

        def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
            return denoise.DiracPosterior(mean=problem.predict(x_t, t).x0)

    sampler = getattr(sample, f"{name}Sampler")
    made = type(name, (sampler,), {"timesteps": ts})(Denoiser(), silent=True, **options)
    return made(x)


def exponential(p: int, form: str) -> Solver[Any]:
    return ExponentialAdams(p, form)


SAME: dict[str, tuple[str, dict[str, Any], Solver[Any]]] = {
    "DDIM": ("DDIM", {}, SOLVERS["ddim"]),
    "Euler": ("Euler", {}, SOLVERS["ddim"]),
    "Heun": ("Heun", {}, SOLVERS["edm_heun"]),
    **{f"zAB{p}": ("zAB", {"order": p}, OnPath(AdamsBashforth(p), EDM)) for p in (1, 2, 3, 4)},
    **{f"vAB{p}": ("vAB", {"order": p}, OnPath(AdamsBashforth(p), FLOW)) for p in (1, 2, 3, 4)},
    "vAB3 as a warm-up": ("vAB", {"order": 3}, OnPath(Warmup(Euler(), AdamsBashforth(3)), FLOW)),
    **{f"zEAB{p}": ("zEAB", {"order": p}, exponential(p, "eps")) for p in (1, 2, 3)},
    **{f"xEAB{p}": ("xEAB", {"order": p}, exponential(p, "x0")) for p in (1, 2, 3, 4)},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("what", SAME)
def test_states_agree(what: str, path: str) -> None:
    name, options, ours = SAME[what]
    problem = problems()[path]
    for grid in (karras, uneven):
        x, ts = starts(problem, 6), grid(problem.path, 10)
        expected = integrate(ours, problem, x, ts).x
        found = theirs(name, problem, x, ts, **options)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "options", "ours"),
    [
        ("DDPM", {}, SOLVERS["ancestral"]),
        ("DDIM", {"eta": 0.7}, DDIM(eta=0.7**0.5)),  # their eta is the square of the paper's
        ("Ito", {}, SDEDPMSolver1()),
    ],
)
def test_noise_agrees(name: str, options: dict[str, Any], ours: Solver[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step's noise is one known tensor, theirs drawn from the global state."""
    problem = problems()["vp"]
    x, ts = starts(problem, 6), karras(problem.path, 8)
    drawn = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)
    monkeypatch.setattr(torch, "randn_like", lambda like: drawn)
    expected = integrate(ours, problem, x, ts, noise=lambda a, b: drawn).x
    torch.testing.assert_close(theirs(name, problem, x, ts, **options), expected, rtol=1e-10, atol=1e-10)


def test_the_rosenbrock_method_there_is_of_order_one() -> None:
    """Its last factor has sigma_t where the formula has sigma_s: the step is off by a share of its length squared."""
    problem = problems()["vp"]
    x, answer = starts(problem), exact(problem, starts(problem))

    def error(n: int) -> Tensor:
        return theirs("REAB", problem, x, uneven(problem.path, n), order=3) - answer

    assert refined(error, 3, most=320).slope == pytest.approx(1, abs=0.2)
    assert measured_order(exponential(3, "eps"), problem, x, uneven, answer=answer).attains(3)
