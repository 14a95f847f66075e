"""Encoding and decoding: the code is the ODE's, the error is what does not come back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from solvers import DDIM, ODE, SOLVERS, DiffusionProblem, round_trip, solve
from solvers.certify import exact, gaussian, starts
from solvers.grids import logsnr

Problems = dict[str, DiffusionProblem]


@pytest.fixture(scope="module")
def data(problems: Problems) -> Tensor:
    return exact(problems["vp"], starts(problems["vp"]))


def test_the_error_is_what_does_not_come_back(problems: Problems, data: Tensor) -> None:
    trip = round_trip(problems["vp"], data, solver="heun", steps=10)
    there = solve(problems["vp"], data, solver="heun", steps=10, encode=True)
    back = solve(problems["vp"], there.x, solver="heun", steps=10)
    assert torch.equal(trip.code, there.x)
    assert torch.equal(trip.decoded.x, back.x)
    for i in range(len(data)):
        assert float(trip.error[i]) == pytest.approx(math.dist(back.x[i], data[i]) / 2**0.5)
    assert trip.nfe == there.nfe + back.nfe == 40
    assert "nfe=40, error mean" in repr(trip)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "rk4"])
def test_it_falls_with_the_order(name: str, problems: Problems, data: Tensor) -> None:
    """At least: what goes out along the error's first term may come back along it."""
    errors = [
        float(round_trip(problems["vp"], data, solver=name, steps=n, grid="logsnr").error.mean()) for n in (40, 80)
    ]
    assert math.log2(errors[0] / errors[1]) > SOLVERS[name].order - 0.2


def test_the_code_is_that_of_the_ode(path) -> None:
    """For Gaussian data the ODE keeps every datum at its number of standard deviations."""
    problem, ends = gaussian(path, 0.3, 0.5), torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    alpha, sigma = path.alpha(ends), path.sigma(ends)
    std = ((0.5 * alpha) ** 2 + sigma**2).sqrt()
    c = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    trip = round_trip(problem, 0.3 * alpha[0] + c * std[0], solver="dop853_lam", tol=1e-10)
    torch.testing.assert_close(trip.code, 0.3 * alpha[1] + c * std[1], rtol=1e-7, atol=1e-7)
    assert float(trip.error.max()) < 1e-8


def test_a_grid_of_ones_own_is_walked_backwards(problems: Problems, data: Tensor) -> None:
    problem = problems["flow"]
    ts = logsnr(problem.path, 12)
    mine, named = (round_trip(problem, data, solver="rk4", **g) for g in ({"ts": ts}, {"steps": 12, "grid": "logsnr"}))
    assert torch.equal(mine.code, named.code)
    assert torch.equal(mine.error, named.error)
    assert torch.equal(mine.encoded.ts, ts.flip(0))


def test_any_ode_has_codes() -> None:
    turning = ODE(lambda x, t: torch.stack([-x[:, 1], x[:, 0]], -1))
    x = torch.eye(2, dtype=torch.float64)
    trip = round_trip(turning, x, solver="rk4", nfe=400)
    angle = torch.tensor(1.0).double()
    turned = torch.stack([angle.cos(), angle.sin()])
    torch.testing.assert_close(trip.code[0], turned, rtol=1e-8, atol=1e-8)
    assert float(trip.error.max()) < 1e-8


def test_what_draws_noise_has_no_code(problems: Problems, data: Tensor) -> None:
    with pytest.raises(ValueError, match=r"DDIM\(eta=1.0\) draws noise, and what draws noise has no code"):
        round_trip(problems["vp"], data, solver=DDIM(eta=1.0), steps=4)
