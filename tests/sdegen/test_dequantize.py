"""Dequantization against integrals over bins, importance weights, and when they are refused."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdegen.bins import Bins
from sdegen.decoders import GaussianHead, SoftmaxDecoder
from sdegen.likelihood import Exact, Hutchinson, importance, ode_likelihood
from sdegen.likelihood.dequantize import DEQUANTIZERS, Dequantizer, TruncatedNormal, Uniform
from sdegen.models import VAE, VPSDE, GaussianDiffusion
from sdegen.oracles import MixtureOracle, PixelOracle
from sdegen.paths import VP, LinearLogSNR
from solvers import standard_normal

BINS = Bins(4)


def _quadrature() -> tuple[Tensor, Tensor]:
    """Nodes and weights for expectations under a standard normal, by the trapezoidal rule."""
    noise = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    return noise, torch.exp(-0.5 * noise**2) * (noise[1] - noise[0]) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("q", [Uniform(BINS), *(TruncatedNormal(BINS, 0.25 / tau) for tau in (0.3, 1.0, 3.0, 6.0))])
def test_density_draws_and_entropy_are_of_one_distribution(q: Dequantizer) -> None:
    x = BINS.value(torch.tensor([[2]]), torch.float64)
    noise, weights = _quadrature()
    y, log_q = q.draw(x.expand(len(noise), 1), noise[:, None])
    assert float((y - x).abs().max()) <= BINS.width / 2
    assert float(-(weights * log_q).sum()) == pytest.approx(q.entropy, abs=1e-8)
    # and the density is that of the draws: phi(noise) dnoise = q dy
    slope = torch.gradient(y[:, 0], spacing=(noise,))[0]
    middle = noise.abs() < 3
    expected = weights.log() - (noise[1] - noise[0]).log() - slope.log()
    torch.testing.assert_close(log_q[middle], expected[middle], rtol=0, atol=1e-3)
    far, log_far = q.draw(x, torch.full((1, 1), 30.0))
    assert float(far - x) == pytest.approx(BINS.width / 2, rel=0.5)
    assert math.isfinite(float(log_far))


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 3.0, 4.0])
def test_both_bounds_hold_and_the_truncated_normal_becomes_exact_for_peaks_at_the_levels(tau: float) -> None:
    """z_0 / alpha_0 of a diffusion of grey levels: a mixture of narrow normals at the levels, of the probability P."""
    std = BINS.width / (2 * tau)
    p = [0.1, 0.4, 0.3, 0.2]
    centers = BINS.centers(torch.float64)
    density = MixtureOracle(p, centers[:, None].numpy(), np.full((4, 1), std**2))
    edges = torch.stack([centers - BINS.width / 2, centers + BINS.width / 2])
    mass = torch.special.ndtr((edges[:, :, None] - centers) / std) @ torch.tensor(p, dtype=torch.float64)
    exact = -(mass[1] - mass[0]).log()
    gaps = []
    for q in (Uniform(BINS), TruncatedNormal(BINS, std)):
        noise, weights = _quadrature()
        bounds = []
        for x in centers:
            y, log_q = q.draw(x.expand(len(noise), 1), noise[:, None])
            bounds.append((weights * (log_q - density.log_prob(y))).sum())
        gap = torch.stack(bounds) - exact
        assert float(gap.min()) > -1e-8
        gaps.append(float(gap.max()))
    if tau >= 3:
        assert gaps[1] < 6e-3 < gaps[0]
        # what is left is the mass that leaks out of the bin
        assert gaps[1] < 5 * math.erfc(tau / math.sqrt(2))


def _density_model(logsnr: float = 6.0) -> tuple[PixelOracle, GaussianDiffusion]:
    """Independent pixels of four levels, and the exact diffusion of them with a density for a decoder."""
    truth = PixelOracle([[0.5, 0.25, 0.2, 0.05], [0.1, 0.2, 0.3, 0.4]], BINS.centers(torch.float64).numpy())
    return truth, VPSDE(truth, VP(LinearLogSNR(logsnr, -12)))  # type: ignore[arg-type]


def test_a_density_of_grey_levels_becomes_a_bound_on_their_probability() -> None:
    truth, model = _density_model()
    x = truth.sample(12, seed=0)
    exact = float(-truth.log_prob(x).mean())
    found = {}
    for name in DEQUANTIZERS:
        q = DEQUANTIZERS[name](BINS, model)
        report = found[name] = ode_likelihood(model, x, dequantizer=q, draws=2, check=1, tol=1e-4)
        assert (report.of, report.bits_offset) == ("probability", 0.0)
        assert (report.dequantizer, report.bin_width) == (repr(q), BINS.width)
        assert report.kind == "upper bound"
        assert report.nats > exact - 4 * report.estimator_se - 5e-3  # the prior's mismatch
        assert report.bits_per_dim == pytest.approx(report.nats / (2 * math.log(2)))
        assert sum(report.parts.values()) == pytest.approx(report.nats, rel=1e-9)
        entropy = 2 * q.entropy
        assert report.parts["dequantization"] == pytest.approx(-entropy, abs=0.3 if name != "uniform" else 1e-9)
    assert found["truncated-normal"].nats < exact + 0.05
    assert found["uniform"].nats > exact + 2
    # and with the discrete decoder of the same model, the same number
    discrete = GaussianDiffusion(truth, model.path, model.levels, SoftmaxDecoder(BINS), event_shape=(2,))
    softmax = ode_likelihood(discrete, x, draws=2, check=0, tol=1e-4)
    assert softmax.nats == pytest.approx(found["truncated-normal"].nats, abs=0.05)


@pytest.mark.parametrize("logsnr", [0.5, 6.0])
def test_the_width_of_a_truncated_normal_is_that_of_z_0_in_units_of_the_data(logsnr: float) -> None:
    _, model = _density_model(logsnr)
    q = DEQUANTIZERS["truncated-normal"](BINS, model)
    assert isinstance(q, TruncatedNormal)
    assert q.std == pytest.approx(math.exp(-logsnr / 2))


def test_a_narrow_normal_has_no_draw_without_a_density() -> None:
    """Where nothing is cut off, the map from the noise is the identity up to float64's last digit, and not infinite."""
    x = BINS.value(torch.tensor([[2]]), torch.float64)
    for noise in (7.0, 9.0, 40.0):
        y, log_q = TruncatedNormal(BINS, 0.01).draw(x, torch.full((1, 1), noise))
        assert 0.06 < float(y - x) < BINS.width / 2
        assert math.isfinite(float(log_q))


def test_the_offset_in_bits_follows_from_the_bins_of_the_data() -> None:
    for bins in (Bins(2), Bins(17), Bins(256)):
        x = bins.value(torch.tensor([[0, 1]]), torch.float64)
        _, log_q = Uniform(bins).draw(x, torch.zeros_like(x))
        assert float(log_q) / (2 * math.log(2)) == pytest.approx(-math.log2(bins.width))


# --- importance weights -----------------------------------------------------------------------------------------------


def test_weighted_draws_tighten_the_bound() -> None:
    truth, model = _density_model(logsnr=4.0)
    x = truth.sample(8, seed=1)
    centers, std = BINS.centers(torch.float64), math.exp(-2)  # what the density gives a bin
    edges = torch.stack([centers - BINS.width / 2, centers + BINS.width / 2])
    mass = truth.probs @ torch.special.ndtr((edges[:, :, None] - centers) / std).diff(dim=0)[0].T
    exact = float(-mass.log().gather(1, BINS.index(x).T).sum(0).mean())
    common: dict[str, Any] = {"dequantizer": Uniform(BINS), "trace": Exact(), "check": 0, "tol": 1e-3}
    reports = [ode_likelihood(model, x, K=K, draws=32 // K, **common) for K in (1, 4, 16)]
    for loose, tight in pairwise(reports):
        assert tight.nats < loose.nats + 3 * math.hypot(loose.estimator_se, tight.estimator_se)
        assert sum(tight.parts.values()) == pytest.approx(tight.nats, rel=1e-9)
        assert tight.parts["importance weighting"] < 0
    gaps = [report.nats - exact for report in reports]
    assert gaps[0] > 2 * max(gaps[1:])
    assert gaps[2] > -3 * reports[2].estimator_se - 5e-3


def test_weights_that_are_noisy_are_refused_and_their_bias_is_known() -> None:
    truth, model = _density_model(logsnr=4.0)
    x = truth.sample(6, seed=1)
    common: dict[str, Any] = {"dequantizer": Uniform(BINS), "steps": 8, "check": 0}
    noisy = Hutchinson(2)
    with pytest.raises(ValueError, match=r"s\^2 / 2 nats of likelihood that are not there") as caught:
        ode_likelihood(model, x, K=5, trace=noisy, **common)
    assert "\n" not in str(caught.value)
    found = ode_likelihood(model, x, K=5, trace=noisy, noisy=True, **common)
    assert found.kind == "estimate"
    assert found.settings["noise_bias"] >= 0
    assert "optimistic by up to" in found.note
    ode_likelihood(model, x, K=5, trace=Exact(), **common)


def test_the_bias_of_noisy_weights_is_what_is_reported() -> None:
    """log-mean-exp of log p + noise of standard deviation s tends to log p + s^2 / 2: here p is known and s = 1."""
    s, K = 1.0, 4000
    noise = standard_normal((50, K), seed=0, dtype=torch.float64)
    found = (s * noise).logsumexp(1) - math.log(K)
    assert float(found.mean()) == pytest.approx(s**2 / 2, abs=0.02)


def test_a_vae_with_a_density_for_a_head_is_dequantised_too() -> None:
    torch.manual_seed(0)
    vae = VAE.mlp((3,), GaussianHead(), latent=2, width=8).double()
    x = BINS.value(torch.randint(4, (20, 3)), torch.float64)
    reports = [importance(vae, x, K, dequantizer=Uniform(BINS), repeats=4) for K in (1, 32)]
    assert reports[1].nats < reports[0].nats
    assert reports[0].of == "probability"
    density = importance(vae, x, 1, bin_width=BINS.width)
    assert reports[0].bits_per_dim == pytest.approx(density.bits_per_dim, abs=0.3)


def test_bad_input_is_refused_in_one_line() -> None:
    truth, model = _density_model()
    x = truth.sample(3, seed=0)
    discrete = GaussianDiffusion(truth, model.path, model.levels, SoftmaxDecoder(BINS), event_shape=(2,))
    for call, words in (
        (lambda: Uniform(BINS).draw(x + 0.01, x), "not centres of the 4 grey levels"),
        (lambda: ode_likelihood(model, x, dequantizer=Uniform(Bins(17)), steps=3), "not centres of the 17"),
        (lambda: TruncatedNormal(BINS, 0.0), "is positive"),
        (lambda: ode_likelihood(discrete, x, dequantizer=Uniform(BINS), steps=3), "for density decoders"),
        (lambda: ode_likelihood(model, x, dequantizer=Uniform(BINS), bin_width=0.1, steps=3), "not bin_width=0.1"),
        (lambda: ode_likelihood(model, x, K=3, steps=3), "nothing is drawn"),
        (lambda: ode_likelihood(discrete, x, K=0, steps=3), "at least 1"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
