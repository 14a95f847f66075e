"""Noise of the trace: unbiased, as large as theory says, and known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from truths import PATHS, at_clean_end

from sdegen.bins import Bins
from sdegen.denoiser import Denoiser
from sdegen.levels import Continuous
from sdegen.likelihood import (
    Hutchinson,
    log_density,
)
from sdegen.likelihood.control import LinearGaussian
from sdegen.models import VPSDE
from sdegen.networks import UNet
from sdegen.oracles import GaussianOracle, MixtureOracle
from sdegen.paths import GaussianPath

COV = torch.tensor([[1.0, 0.4, -0.2], [0.4, 0.6, 0.3], [-0.2, 0.3, 0.8]], dtype=torch.float64)
COV = COV @ COV


def _gaussian() -> tuple[GaussianOracle, GaussianPath, Tensor, Tensor]:
    """A Gaussian, a path, a datum, and M = INT g^2 / 2 (alpha^2 S + sigma^2)^-1 dt, the Jacobian's integral."""
    truth, path = GaussianOracle([0.0, 0.0, 0.0], COV.numpy()), PATHS["vp-logsnr"]
    at = Continuous().nodes(path, 128)
    alpha2, sigma2 = path.alpha(at.t).square(), path.sigma(at.t).square()
    values, vectors = torch.linalg.eigh(COV)
    m = vectors @ torch.diag((0.5 * at.weight * sigma2 / (alpha2 * values[:, None] + sigma2)).sum(1)) @ vectors.T
    return truth, path, torch.tensor([[0.3, -0.5, 0.9]], dtype=torch.float64), m


@pytest.mark.parametrize("budget", [{"steps": 24}, {"tol": 1e-5}], ids=["fixed", "adaptive"])
def test_probes_that_stay_have_the_mean_and_variance_of_theory(budget: dict[str, Any]) -> None:
    """For a Gaussian the integrated Jacobian M is known: Rademacher probes have variance 2 SUM_{i != j} M_ij^2."""
    truth, path, z, m = _gaussian()
    probes = 2000
    found = log_density(truth.problem(path), z, trace=Hutchinson(probes, redraw=False), **budget)
    exact = log_density(truth.problem(path), z, **budget)
    theory = 2 * float((m - m.diag().diag()).square().sum())
    assert float(found.spread) == pytest.approx(math.sqrt(theory / probes), rel=0.075)
    assert abs(float(found.log_prob - exact.log_prob)) < 4 * float(found.spread)
    assert float(exact.spread) == 0


@pytest.mark.parametrize("solver", ["rk4", "heun", "ab_2"])
def test_fresh_probes_are_unbiased_and_know_their_noise(solver: str) -> None:
    """Whatever the weights of a method are, and also where they reach over several steps."""
    truth, path, z, m = _gaussian()
    rows = 2000
    budget = {"solver": solver, "nfe": 40}
    exact = log_density(truth.problem(path), z, **budget)
    found = log_density(truth.problem(path), z.expand(rows, 3), trace=Hutchinson(2), **budget)
    error = found.log_prob - exact.log_prob
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(rows)
    assert float(found.spread.square().mean().sqrt()) == pytest.approx(float(error.std()), rel=0.08)
    assert 0.85 < float((error / found.spread).std()) < 1.15  # of a single datum
    stays = math.sqrt(float((m - m.diag().diag()).square().sum()))
    assert float(error.std()) < stays / 2


def test_a_control_variate_takes_all_noise_from_a_gaussian_and_some_from_a_mixture() -> None:
    truth, path, z, _ = _gaussian()
    control = LinearGaussian.of(torch.zeros(3), COV)
    for budget in ({"steps": 20}, {"tol": 1e-5}):
        exact = log_density(truth.problem(path), z, **budget)
        found = log_density(truth.problem(path), z, trace=Hutchinson(1, control=control), **budget)
        assert float(found.log_prob - exact.log_prob) == pytest.approx(0, abs=1e-4)
    apart = torch.linspace(0.2, 0.5, 6, dtype=torch.float64)
    cov = torch.exp(-(apart[:, None] - apart).abs() / 0.2)
    mixture = MixtureOracle([0.5, 0.5], [apart.numpy(), -apart.numpy()], [cov.numpy(), 0.5 * cov.numpy()])
    linear = LinearGaussian.fit(mixture.sample(1000, seed=0))
    z, _ = at_clean_end(mixture, path, 4)
    z = z.repeat_interleave(50, 0)
    noise = []
    for trace in (Hutchinson(redraw=False), Hutchinson(), Hutchinson(control=linear), Hutchinson(hold=4)):
        found = log_density(mixture.problem(path), z, trace=trace, nfe=48).log_prob.reshape(4, 50)
        noise.append(float(found.var(1).mean().sqrt()))
    assert noise[1] < noise[0] / 3
    assert noise[2] < noise[1] / 2
    assert noise[1] < 0.7 * noise[3] < 0.7 * noise[0]  # a probe for a step is more than one for the solve, and no more


def test_probes_belong_to_sample_and_evaluation() -> None:
    truth, path, z, _ = _gaussian()
    ask = {"trace": Hutchinson(2, seed=5), "steps": 5}
    both = log_density(truth.problem(path), z.expand(2, 3), samples=[7, 8], **ask).log_prob
    one = log_density(truth.problem(path), z, samples=[8], **ask).log_prob
    assert float(both[1]) == float(one)
    assert float(both[0]) != float(both[1])


def test_fresh_probes_are_refused_where_steps_depend_on_what_is_seen() -> None:
    truth, path, z, _ = _gaussian()
    for solver in ("dopri54", "dopri5", "rk45"):
        with pytest.raises(ValueError, match=r"discontinuous.*rk4, or redraw=False"):
            log_density(truth.problem(path), z, trace=Hutchinson(redraw=True), solver=solver, tol=1e-3)


def test_traces_of_a_convolutional_network_agree() -> None:
    torch.manual_seed(0)
    bins = Bins(5)
    net = UNet((1, 4, 4), 5, channels=(8, 8), blocks=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model = VPSDE(Denoiser(net, "levels", bins)).double().eval()
    z = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    exact = log_density(model.problem(), z, solver="heun", steps=4)
    many = log_density(model.problem(), z, solver="heun", steps=4, trace=Hutchinson(200))
    assert float(((many.log_prob - exact.log_prob) / many.spread).abs().max()) < 4.5
