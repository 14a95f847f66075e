"""Bins, and the denoiser: conversions at every noise level, grey levels by exact Bayes, any path, any precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sdegen.bins import Bins
from sdegen.data import digits
from sdegen.denoiser import PARAMETRIZATIONS, Denoiser, GreyLevels, Marginal
from sdegen.networks import MLP, UNet
from sdegen.paths import VE, VP, Flow
from solvers.problem import Prediction, expand

LOGSNR = torch.linspace(-20, 20, 41, dtype=torch.float64)
LINEAR = ["eps", "x0", "v", "score", "edm"]


class Fixed(nn.Module):
    """A network that gives what it was told to, and remembers what it was asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)
        self.asked: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, z: Tensor, logsnr: Tensor, cond: Tensor | None = None) -> Tensor:
        self.asked.append((z, logsnr, cond))
        return self.answer


def scales(logsnr: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    return expand(torch.sigmoid(logsnr).sqrt(), like), expand(torch.sigmoid(-logsnr).sqrt(), like)


def marginal(logsnr: Tensor, like: Tensor, mean: float = 0.3, std: float = 0.6) -> Marginal:
    alpha, sigma = scales(logsnr, like)
    return Marginal(alpha, sigma, torch.tensor(mean).to(like), torch.tensor(std).to(like))


# --- bins ---


@pytest.mark.parametrize("count", [2, 17, 256])
def test_bins_round_trip_and_tile_the_interval(count: int) -> None:
    bins, k = Bins(count), torch.arange(count)
    x = bins.value(k)
    assert torch.equal(bins.index(x), k)
    assert torch.equal(bins.nearest(x + 0.49 * bins.width), k)
    torch.testing.assert_close(bins.centers(torch.float64).diff(), torch.full((count - 1,), bins.width).double())
    assert float(bins.centers(torch.float64)[0]) - bins.width / 2 == pytest.approx(-1)
    assert torch.equal(bins.nearest(torch.tensor([-9.0, 9.0])), torch.tensor([0, count - 1]))


def test_bins_refuse_what_is_no_level() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 values are not centres of the 4 grey levels.*0\.3"):
        Bins(4).index(torch.tensor([0.25, 0.3]))
    with pytest.raises(ValueError, match=r"0\.\.3, not -1\.\.2"):
        Bins(4).value(torch.tensor([-1, 2]))
    for bad in (1, 0, 2.5, True):
        with pytest.raises(ValueError, match="at least 2"):
            Bins(bad)  # type: ignore[arg-type]


def test_histogram_is_a_probability_and_smooths_constant_pixels() -> None:
    data = digits()
    log_p = Bins(17).log_histogram(data.train)
    assert log_p.shape == (1, 8, 8, 17)
    torch.testing.assert_close(log_p.logsumexp(-1), torch.zeros(1, 8, 8), atol=1e-6, rtol=0)
    assert bool(log_p.isfinite().all())
    assert float(log_p[0, 0, 0].argmax()) == 0  # the corner is always empty ...
    assert math.exp(float(log_p[0, 0, 0, 0])) > 0.999  # ... and nearly surely so for the model
    bits = -log_p.expand(360, -1, -1, -1, -1).gather(-1, Bins(17).index(data.test).unsqueeze(-1)).mean() / math.log(2)
    assert 2.40 < float(bits) < 2.44  # the per-pixel histogram's known code length of held-out digits


# --- conversions ---


@pytest.mark.parametrize("name", LINEAR)
def test_conversion_is_inverted_by_its_target_at_every_noise_level(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(41, 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    at = marginal(LOGSNR, x0)
    z, rule = at.alpha * x0 + at.sigma * eps, PARAMETRIZATIONS[name](None)
    got = rule(rule.target(Prediction(x0, eps), at), z, at)
    worst = 1e-15 * torch.exp(0.5 * LOGSNR.abs()).reshape(-1, 1, 1) * 20  # eps or x0 divide by sigma or alpha
    assert bool(((got.x0 - x0).abs() < worst).all())
    assert bool(((got.eps - eps).abs() < worst).all())


@pytest.mark.parametrize("name", LINEAR)
def test_float32_conversion_is_backward_stable(name: str) -> None:
    """Against float64 on the same numbers: x0 to a few ulp of (|z| + |F|) / alpha, eps of (|z| + |F|) / sigma."""
    g = torch.Generator().manual_seed(1)
    z, out = (torch.randn(41, 50, generator=g) for _ in range(2))
    rule = PARAMETRIZATIONS[name](None)
    exact = rule(out.double(), z.double(), marginal(LOGSNR, z.double()))
    alpha, sigma = (0.5 * torch.nn.functional.logsigmoid(c) for c in (LOGSNR, -LOGSNR))
    at = Marginal(expand(alpha.exp(), z), expand(sigma.exp(), z), torch.tensor(0.3), torch.tensor(0.6))
    got = rule(out, z, at)
    ulp, size = 2.0**-23, z.abs() + out.abs() + 1
    assert bool(((got.x0 - exact.x0).abs() <= 4 * ulp * (size / at.alpha).maximum(exact.x0.abs())).all())
    assert bool(((got.eps - exact.eps).abs() <= 4 * ulp * (size / at.sigma).maximum(exact.eps.abs())).all())


@pytest.mark.parametrize("name", ["v", "edm"])
def test_v_and_edm_lose_nothing_at_either_end(name: str) -> None:
    g = torch.Generator().manual_seed(2)
    z, out = (torch.randn(41, 50, generator=g) for _ in range(2))
    rule = PARAMETRIZATIONS[name](None)
    exact = rule(out.double(), z.double(), marginal(LOGSNR, z.double()))
    got = rule(out, z, marginal(LOGSNR, z))
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)


def test_edm_without_a_network_is_the_best_linear_denoiser() -> None:
    """For data N(m, c^2) the posterior mean is linear and the residual is zero."""
    z = torch.randn(41, 5, dtype=torch.float64)
    at = marginal(LOGSNR, z)
    gain = at.alpha * 0.6**2 / (at.alpha**2 * 0.6**2 + at.sigma**2)
    got = PARAMETRIZATIONS["edm"](None)(torch.zeros_like(z), z, marginal(LOGSNR, z))
    mean, std = float(at.mean), float(at.std)
    assert (mean, std) == pytest.approx((0.3, 0.6), rel=1e-6)
    torch.testing.assert_close(got.x0, mean + gain * (z - at.alpha * mean), rtol=0, atol=1e-6)


def test_edm_of_standardised_data_is_minus_v() -> None:
    z, out = torch.randn(41, 5, dtype=torch.float64), torch.randn(41, 5, dtype=torch.float64)
    at = marginal(LOGSNR, z, mean=0.0, std=1.0)
    for a, b in zip(PARAMETRIZATIONS["edm"](None)(-out, z, at), PARAMETRIZATIONS["v"](None)(out, z, at), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(PARAMETRIZATIONS))
def test_the_pair_is_tied_by_the_state(name: str) -> None:
    """z = alpha x0 + sigma eps, whatever the network says."""
    bins, g = Bins(5), torch.Generator().manual_seed(3)
    z = torch.randn(41, 2, 4, 4, generator=g)
    k = bins.count if name == "levels" else 1
    d = Denoiser(Fixed(torch.randn(41, 2 * k, 4, 4, generator=g)), name, bins, data_mean=0.1, data_std=0.7)
    with torch.no_grad():
        x0, eps = d(z, LOGSNR)
    alpha, sigma = scales(LOGSNR, z)
    size = (alpha * x0).abs() + (sigma * eps).abs() + 1
    assert bool(((alpha * x0 + sigma * eps - z).abs() < 1e-5 * size).all())
    assert x0.dtype == eps.dtype == torch.float32


# --- grey levels ---


def brute_posterior(logits: Tensor, z: Tensor, logsnr: Tensor, bins: Bins) -> Tensor:
    """log p(level | z) one level at a time, float64."""
    alpha, sigma = scales(logsnr, z)
    columns = [logits[..., k] - ((z - alpha * v) / sigma) ** 2 / 2 for k, v in enumerate(bins.centers(torch.float64))]
    return torch.stack(columns, -1).log_softmax(-1)


@pytest.mark.parametrize("event", [(3,), (1, 4, 4), (3, 2, 5)])
def test_levels_are_exact_bayes(event: tuple[int, ...]) -> None:
    bins, g = Bins(6), torch.Generator().manual_seed(4)
    x = bins.value(torch.randint(0, 6, (41, *event), generator=g)).double()
    alpha, sigma = scales(LOGSNR, x)
    z = alpha * x + sigma * torch.randn(x.shape, generator=g, dtype=torch.float64)
    out = torch.randn(41, event[0] * 6, *event[1:], generator=g, dtype=torch.float64)
    prior = torch.randn(*event, 6, generator=g)
    d = Denoiser(Fixed(out).double(), GreyLevels(bins, prior)).double()
    logits = out.reshape(41, event[0], 6, *event[1:]).movedim(2, -1) + prior
    expected = brute_posterior(logits, z, LOGSNR, bins)
    with torch.no_grad():
        got, pair = d.level_logits(z, LOGSNR), d(z, LOGSNR)
    centers = bins.centers(torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pair.x0, (expected.exp() * centers).sum(-1), rtol=0, atol=2e-7)
    residual = (z.unsqueeze(-1) - alpha.unsqueeze(-1) * centers) / sigma.unsqueeze(-1)
    torch.testing.assert_close(pair.eps, (expected.exp() * residual).sum(-1), rtol=0, atol=1e-5)


def test_levels_keep_the_noise_accurate_near_the_data() -> None:
    """At logsnr = 14 the levels are certain and eps is what was added, to float32's rounding of z."""
    bins, g = Bins(17), torch.Generator().manual_seed(5)
    x = bins.value(torch.randint(0, 17, (64, 2), generator=g))
    eps, logsnr = torch.randn(64, 2, generator=g), torch.tensor(14.0, dtype=torch.float64)
    alpha, sigma = scales(logsnr, x)
    d = Denoiser(Fixed(torch.zeros(64, 34)), "levels", bins)
    with torch.no_grad():
        got = d(alpha * x + sigma * eps, logsnr)
    assert torch.equal(got.x0, x)
    assert float((got.eps - eps).abs().max()) < 4 * 2.0**-24 / float(sigma)


def test_untrained_levels_are_the_histogram_in_pure_noise() -> None:
    data = digits()
    net = UNet((1, 8, 8), 17, channels=(8, 8))
    d = Denoiser(net, "levels", data.bins).calibrate(data.train).eval()
    with torch.no_grad():
        got = d.level_logits(torch.randn(2, 1, 8, 8), torch.tensor(-40.0, dtype=torch.float64))
    torch.testing.assert_close(got, data.bins.log_histogram(data.train).expand_as(got), atol=1e-5, rtol=1e-5)


# --- the wrapper ---


def test_the_network_sees_unit_variance() -> None:
    g = torch.Generator().manual_seed(6)
    x = 0.2 + 0.05 * torch.randn(20_000, 3, generator=g, dtype=torch.float64)
    net = Fixed(torch.zeros(1))
    d = Denoiser(net, "eps").calibrate(x)
    for logsnr in (-8.0, 0.0, 8.0):
        level = torch.tensor(logsnr, dtype=torch.float64)
        alpha, sigma = scales(level, x)
        d(alpha * x + sigma * torch.randn(x.shape, generator=g, dtype=torch.float64), level)
        seen, told, _ = net.asked[-1]
        assert float(seen.mean()) == pytest.approx(0, abs=0.02)
        assert float(seen.std()) == pytest.approx(1, abs=0.02)
        assert told.shape == (20_000,)
        assert float(told[0]) == logsnr


@pytest.mark.parametrize("other", [VE(), Flow()], ids=["VE", "Flow"])
def test_prediction_is_the_same_on_every_path(other) -> None:
    net = MLP((2,), width=16, depth=1)
    nn.init.normal_(net.readout.weight)
    d, vp = Denoiser(net, "v").double(), VP()
    t = torch.linspace(vp.t_min, vp.t_max, 9, dtype=torch.float64)[1:-1]
    x = torch.randn(7, 2, dtype=torch.float64)
    level = vp.logsnr(t).clamp(
        *sorted(float(other.logsnr(torch.tensor(s).double())) for s in (other.t_min, other.t_max))
    )
    t, s = vp.time(level), other.time(level)
    scale = expand(other.alpha(s) / vp.alpha(t), x)
    with torch.no_grad():
        for a, b in zip(d.predict(vp)(x, t), d.predict(other)(scale * x, s), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_one_time_for_all_equals_one_time_each() -> None:
    net = MLP((2,), width=16, depth=1)
    nn.init.normal_(net.readout.weight)
    d, x, t = Denoiser(net, "v"), torch.randn(5, 2), torch.tensor(0.37, dtype=torch.float64)
    predict = d.predict(VP())
    with torch.no_grad():
        for a, b, c in zip(predict(x, t), predict(x, t.expand(5)), predict(x, t.expand(5, 1)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert torch.equal(b, c)


def test_autocast_reaches_the_network_only() -> None:
    net = UNet((1, 8, 8), 17, channels=(8, 16))
    nn.init.normal_(net.readout[-1].weight, std=0.1)
    d = Denoiser(net, "levels", Bins(17))
    z, logsnr = torch.randn(4, 1, 8, 8), torch.tensor([-5.0, 0.0, 5.0, 9.0])
    with torch.no_grad():
        exact = d(z, logsnr)
        with torch.autocast("cpu", torch.bfloat16):
            x0, eps = d(z, logsnr)
    assert x0.dtype == eps.dtype == torch.float32
    assert 0 < float((x0 - exact.x0).abs().max()) < 0.05
    alpha, sigma = scales(logsnr, z)
    torch.testing.assert_close(alpha * x0 + sigma * eps, z, atol=1e-5, rtol=0)


def test_state_dict_round_trip_takes_the_moments_along() -> None:
    data = digits()
    a = Denoiser(MLP((1, 8, 8), 17, width=8, depth=1), "levels", data.bins).calibrate(data.train)
    b = Denoiser(MLP((1, 8, 8), 17, width=8, depth=1), "levels", data.bins)
    b.load_state_dict(a.state_dict())
    assert torch.equal(b.data_mean, a.data_mean)
    assert torch.equal(b.parametrization.log_histogram, a.parametrization.log_histogram)


def test_wrong_use_is_said_in_one_line() -> None:
    net = MLP((2,), width=8, depth=1)
    with pytest.raises(ValueError, match="predicts='noise' is unknown; choose one of eps, x0"):
        Denoiser(net, "noise")
    with pytest.raises(ValueError, match=r'predicts="levels" needs bins=Bins\(V\)'):
        Denoiser(net, "levels")
    with pytest.raises(TypeError, match="posterior over grey levels"):
        Denoiser(net, "eps").level_logits(torch.zeros(1, 2), torch.tensor(0.0))
    at = marginal(torch.tensor(0.0), torch.zeros(1))
    with pytest.raises(TypeError, match="GreyLevels has no single target"):
        GreyLevels(Bins(3)).target(Prediction(torch.zeros(1), torch.zeros(1)), at)
