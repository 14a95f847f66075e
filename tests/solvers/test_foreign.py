"""Samplers in the style of other libraries, imported by probing: their coefficients are ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdegen.oracles import MixtureOracle
from sdegen.paths import VE, GaussianPath
from solvers import (
    BrownianMotion,
    KDiffusion,
    Moments,
    Prediction,
    Table,
    import_sampler,
    integrate,
    prior,
    replay,
    resolve,
    trace,
)
from solvers.grids import karras, logsnr

Model = Callable[..., Tensor]


def noise_levels(path: GaussianPath, ts: Tensor, *, zero: bool = False) -> Tensor:
    sigmas = torch.exp(-path.logsnr(ts) / 2)
    return torch.cat([sigmas, sigmas.new_zeros(1)]) if zero else sigmas


def same(one: Table, other: Table, tol: float) -> None:
    """Equal states, as combinations of start, predictions and noises."""
    assert one.nfe == other.nfe
    for form in ("x0", "eps"):
        a, b = one.states(form), other.states(form)
        np.testing.assert_allclose(a, b, atol=tol * np.abs(b).max())


# --- Functions in the style of k-diffusion ----------------------------------------------------------------------------


def euler(model: Model, x: Tensor, sigmas: Tensor, callback: Any = None, disable: Any = None) -> Tensor:
    s_in = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def heun(model: Model, x: Tensor, sigmas: Tensor, callback: Any = None) -> Tensor:
    for i in range(len(sigmas) - 1):
        sigma, target = sigmas[i], sigmas[i + 1]
        d = (x - model(x, sigma)) / sigma
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma})
        if target == 0:
            return x + d * (target - sigma)
        there = x + d * (target - sigma)
        x = x + 0.5 * (d + (there - model(there, target)) / target) * (target - sigma)
    return x


def dpmpp_2m(model: Model, x: Tensor, sigmas: Tensor, callback: Any = None, extra_args: Any = None) -> Tensor:
    old, lam = None, -sigmas.log()
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i], **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i]})
        h = lam[i + 1] - lam[i]
        d = denoised if old is None else denoised + h / (2 * (lam[i] - lam[i - 1])) * (denoised - old)
        x = (sigmas[i + 1] / sigmas[i]) * x - torch.expm1(-h) * d
        old = denoised
    return x


def ancestral(model: Model, x: Tensor, sigmas: Tensor, callback: Any = None, noise_sampler: Any = None) -> Tensor:
    noise_sampler = noise_sampler or (lambda sigma, target: torch.randn_like(x))
    for i in range(len(sigmas) - 1):
        sigma, target = sigmas[i], sigmas[i + 1]
        d = (x - model(x, sigma)) / sigma
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma})
        up = (target**2 * (1 - target**2 / sigma**2)) ** 0.5
        x = x + d * (target**2 / sigma - sigma) + up * noise_sampler(sigma, target)
    return x


def without_noise_sampler(model: Model, x: Tensor, sigmas: Tensor) -> Tensor:
    return ancestral(model, x, sigmas)


def wasteful(model: Model, x: Tensor, sigmas: Tensor, churn: float = 0.0) -> Tensor:
    """Draws noise whether it is wanted or not."""
    for i in range(len(sigmas) - 1):
        torch.randn(x.shape)
        x = x + churn * torch.randn(*x.shape, dtype=x.dtype)
        x = x + (x - model(x, sigmas[i])) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def thresholding(model: Model, x: Tensor, sigmas: Tensor) -> Tensor:
    return euler(lambda x, sigma: model(x, sigma).clamp(-1, 1), x, sigmas)


def adaptive(model: Model, x: Tensor, sigmas: Tensor) -> Tensor:
    d = x - model(x, sigmas[0])
    return x - d if float(d.norm()) < 1 else x - 0.5 * d


@pytest.mark.parametrize(
    ("function", "name"), [(euler, "ddim"), (heun, "edm_heun"), (dpmpp_2m, "dpmpp_2m"), (ancestral, "ancestral")]
)
def test_the_same_method_has_the_same_table(function: Callable[..., Tensor], name: str, path: GaussianPath) -> None:
    ts = karras(path, 7)
    found, ours = import_sampler(KDiffusion(function, noise_levels(path, ts)), path), trace(name, path, ts)
    same(found, ours, 1e-12)
    np.testing.assert_allclose(found.ts, ours.ts, atol=1e-12)
    np.testing.assert_allclose(found.intervals, ours.intervals, atol=1e-12)
    assert np.diff(found.first).max() <= 4  # and it is as short


def test_an_imported_sampler_samples(path: GaussianPath, mixture: MixtureOracle) -> None:
    """On any path, and driven by the same Brownian motion as ours."""
    ts, x = logsnr(path, 9), prior(path, (6, 2), seed=0, dtype=torch.float64)
    predict = mixture.problem(path).predict
    table = import_sampler(KDiffusion(ancestral, noise_levels(path, ts)), path)
    found = replay(table, predict, x, noise=BrownianMotion(x, seed=1))
    expected = integrate(resolve("ancestral"), mixture.problem(path), x, ts, noise=BrownianMotion(x, seed=1)).x
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_replay_is_what_the_function_itself_does(mixture: MixtureOracle) -> None:
    path = VE(0.02, 20.0)  # where its state is ours
    sigmas = noise_levels(path, karras(path, 8), zero=True)
    x = prior(path, (5, 2), seed=0, dtype=torch.float64)
    problem = mixture.problem(path)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return problem.predict(x, path.time(-2 * sigma.log())).x0

    table = import_sampler(KDiffusion(heun, sigmas), path)
    assert (table.steps, table.nfe) == (9, 17)  # the last step to zero is one of Euler
    torch.testing.assert_close(replay(table, problem.predict, x), heun(model, x, sigmas), rtol=1e-10, atol=1e-10)


def test_noise_from_the_global_state_is_a_noise_of_its_own(vp: GaussianPath) -> None:
    ts = logsnr(vp, 4)
    before = torch.random.get_rng_state()
    table = import_sampler(KDiffusion(without_noise_sampler, noise_levels(vp, ts)), vp)
    assert torch.equal(before, torch.random.get_rng_state())
    same_law = trace("ancestral", vp, ts)
    assert table.draws == 4
    assert np.isnan(table.intervals).all()
    np.testing.assert_allclose(table.result(), same_law.result(), atol=1e-12)
    data = Moments(np.array(0.3), np.array(0.5))
    np.testing.assert_allclose(table.moments(data), same_law.moments(data), rtol=1e-10)
    x = prior(vp, (2, 3), seed=0)
    with pytest.raises(ValueError, match="no Brownian increments: pass the 4 noises"):
        replay(table, lambda x, t: Prediction(x, x), x, noise=BrownianMotion(x, seed=0))
    noises = list(torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)))
    assert replay(table, lambda x, t: Prediction(x, x), x, noise=noises).shape == (2, 3)


def test_noise_that_is_not_used_is_not_drawn(vp: GaussianPath) -> None:
    sigmas = noise_levels(vp, logsnr(vp, 3))
    assert import_sampler(KDiffusion(wasteful, sigmas), vp).draws == 0
    churned = import_sampler(KDiffusion(wasteful, sigmas, {"churn": 0.1}), vp)
    assert churned.draws == 3  # and the ones drawn for nothing between them are left out
    assert churned.name == "wasteful(3 steps, churn=0.1)"


@pytest.mark.parametrize("function", [thresholding, adaptive])
def test_what_is_not_linear_is_refused(function: Callable[..., Tensor], vp: GaussianPath) -> None:
    with pytest.raises(ValueError, match=f"^{function.__name__}.*only linear steps have a table"):
        import_sampler(KDiffusion(function, noise_levels(vp, logsnr(vp, 3))), vp)
