"""The bound against closed forms: exact denoisers of Gaussian, mixture and few-level data, expectations by quadrature.

No Monte Carlo where there need be none: the integral over noise is Gauss-Hermite or a fine trapezoid, the one over
levels is the levels' own rule, so that tolerances are those of float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import scipy.special
import torch
from torch import Tensor, nn
from truths import C2, MIXTURE, POINTS, Posterior, Wrong, X, hermite, latent, mse, nelbo, trapezoid

from sdegen.bins import Bins
from sdegen.decoders import PosteriorDecoder, SoftmaxDecoder
from sdegen.denoiser import Denoiser
from sdegen.levels import Continuous, Discrete, given
from sdegen.likelihood import bound
from sdegen.models import VPSDE, GaussianDiffusion, pixel_histogram
from sdegen.networks import MLP
from sdegen.objectives import UniformTime
from sdegen.oracles import GaussianOracle, oracle
from sdegen.paths import VP, Cosine, GaussianPath, LinearBeta, LinearLogSNR, Sigmoid


def _gaussian_model(low: float = -10, high: float = 13.3, c2: float = C2) -> GaussianDiffusion:
    return VPSDE(GaussianOracle([0.0], [c2]), VP(LinearLogSNR(high, low)))


def _gaussian_ends(model: GaussianDiffusion, x: Tensor, c2: float = C2) -> Tensor:
    """E log[q(x|z_0) / p(x|z_0)] + E log[q(z_1) / p(z_1)] of N(0, c^2) data, decoder N(z_0/alpha_0, .)."""
    x = x[:, 0]
    (high, low) = model.logsnr_ends
    rho = math.exp(high)
    v, s2 = c2 / (1 + rho * c2), 1 / rho  # variance of q(x | z_0), of p(x | z_0)
    # x - E[x|z_0] has mean x / (1 + rho c2) and variance (rho c2 / (1 + rho c2))^2 / rho under q(z_0 | x)
    m2 = (x.square() + (rho * c2) ** 2 / rho) / (1 + rho * c2) ** 2
    clean = 0.5 * (math.log(s2 / v) - m2 / v + 1)
    a2, b2 = 1 / (1 + math.exp(-low)), 1 / (1 + math.exp(low))
    v1, e2 = a2 * c2 + b2, a2 * x.square() + b2  # marginal variance, and E z_1^2 under q(z_1 | x)
    noisy = 0.5 * (-math.log(v1) - e2 / v1 + e2)
    return clean + noisy


# --- Gaussian data ----------------------------------------------------------------------------------------------------


def test_denoising_error_of_gaussian_data() -> None:
    model = _gaussian_model()
    t = torch.linspace(0, 1, 13, dtype=torch.float64)
    rho = model.path.logsnr(t).exp()
    expected = (rho * X.square() + rho**2 * C2**2) / (1 + rho * C2) ** 2
    torch.testing.assert_close(mse(model, X, t, hermite(4)), expected, rtol=1e-12, atol=1e-12)


def test_latent_term_of_gaussian_data() -> None:
    model = _gaussian_model()
    low, high = (math.exp(l) for l in reversed(model.logsnr_ends))

    def primitive(rho: float) -> Tensor:
        return 0.5 * ((1 - X[:, 0].square() / C2) / (1 + rho * C2) + math.log1p(rho * C2))

    torch.testing.assert_close(latent(model, X, hermite(4)), primitive(high) - primitive(low), rtol=0, atol=1e-10)


@pytest.mark.parametrize("ends", [(-5, 7), (-10, 13.3)])
def test_bound_and_truth_differ_by_the_two_ends(ends: tuple[float, float]) -> None:
    model = _gaussian_model(*ends)
    truth = GaussianOracle([0.0], [C2]).log_prob(X)
    gap = nelbo(model, X, hermite(8)) + truth
    torch.testing.assert_close(gap, _gaussian_ends(model, X), rtol=0, atol=1e-10)


def _averaged(model: GaussianDiffusion, c2: float) -> Tensor:
    """Latent term averaged over N(0, c2) data: two rows suffice, for the error is quadratic in x."""
    e, w = hermite(2)
    return (latent(model, math.sqrt(c2) * e[:, None], hermite(2)) * w).sum()


def test_ddpm_bound_falls_to_the_continuous_one_at_rate_one_over_T() -> None:
    model = _gaussian_model(-10, 13.3)
    limit = _averaged(model, C2)
    gaps = {T: float(_averaged(model.discretize(T), C2) - limit) for T in (50, 200, 800, 1600)}
    assert all(gap > 0 for gap in gaps.values())
    constant = 23.3 / 4 * (math.log1p(math.exp(13.3) * C2) - 1)
    assert 1600 * gaps[1600] == pytest.approx(constant, rel=0.01)
    assert math.log(gaps[200] / gaps[800]) / math.log(4) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("T", [1, 2, 10, 100])
def test_with_the_best_variance_every_T_has_the_continuous_bound(T: int) -> None:
    """sigma_p^2 = sigma_Q^2 + (alpha_s c)^2 mmse makes the terms telescope on isotropic Gaussian data."""
    model = _gaussian_model(-10, 13.3)
    path = model.path
    ts = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    s, t = ts[:-1], ts[1:]
    mmse = C2 / (1 + path.logsnr(t).exp() * C2)
    _, coef, std = path.posterior(s, t)  # type: ignore[attr-defined]
    best = model.with_levels(Discrete(ts, given(std.square() + coef.square() * mmse)))
    low, high = (math.log1p(math.exp(l) * C2) for l in reversed(model.logsnr_ends))
    torch.testing.assert_close(float(_averaged(best, C2)), 0.5 * (high - low), rtol=1e-10, atol=0)
    assert float(_averaged(model.discretize(T), C2)) > 0.5 * (high - low)
    assert float(_averaged(model.discretize(T, variance="beta"), C2)) > 0.5 * (high - low)


def test_beta_is_the_best_variance_of_unit_gaussian_data() -> None:
    """Ho et al. 2020, section 3.2: optimal for x0 ~ N(0, I)."""
    model = _gaussian_model(-6, 8, c2=1.0)
    low, high = (math.log1p(math.exp(l)) for l in reversed(model.logsnr_ends))
    best = float(_averaged(model.discretize(7, variance="beta"), 1.0))
    assert best == pytest.approx(0.5 * (high - low), rel=1e-10)


# --- mixtures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ends", "gap"), [((-5, 13.3), 1e-3), ((-10, 18), 1e-5), ((-14, 22), 5e-7)])
def test_mixture_bound_meets_the_truth_as_the_ends_move_out(ends: tuple[float, float], gap: float) -> None:
    model = VPSDE(MIXTURE, VP(LinearLogSNR(ends[1], ends[0])))
    found = (nelbo(model, POINTS, trapezoid(160), nodes=480) + MIXTURE.log_prob(POINTS)).abs()
    assert float(found.max()) < gap
    # the gap is at the ends and nowhere else: only the noisy end is left when the prior is the true marginal
    z, w = trapezoid(400)
    top = model.encode(POINTS).top
    states = top.mean + top.log_std.exp() * z
    t = torch.tensor(1.0, dtype=torch.float64)
    true = MIXTURE.log_prob_t(states.reshape(-1, 1), model.path, t).reshape(states.shape)
    noisy = ((true + 0.5 * states.square() + 0.5 * math.log(2 * math.pi)) * w).sum(1)
    bottom = model.encode(POINTS).bottom
    clean_states = bottom.mean + bottom.log_std.exp() * z
    flat = clean_states.reshape(-1, 1)
    t0 = torch.tensor(0.0, dtype=torch.float64)
    x = POINTS.expand_as(clean_states).reshape(-1, 1)
    # log q(x|z_0) - log p(x|z_0) = log q(x) + log q(z_0|x) - log q(z_0) - log p(x|z_0)
    q_z = torch.distributions.Normal(model.alpha * x, model.sigma).log_prob(flat)[:, 0]
    p_x = torch.distributions.Normal(flat / model.alpha, model.sigma / model.alpha).log_prob(x)[:, 0]
    ratio = MIXTURE.log_prob(x) + q_z - MIXTURE.log_prob_t(flat, model.path, t0) - p_x
    clean = (ratio.reshape(clean_states.shape) * w).sum(1)
    signed = nelbo(model, POINTS, trapezoid(160), nodes=480) + MIXTURE.log_prob(POINTS)
    torch.testing.assert_close(signed, clean + noisy, rtol=0, atol=2e-8)


def _with_ends(make: Callable[..., GaussianPath], low: float, high: float) -> GaussianPath:
    free = make(t_min=1e-6, t_max=1 - 1e-6)
    return make(t_min=float(free.time(high)), t_max=float(free.time(low)))


def test_the_bound_sees_the_ends_and_neither_clock_nor_curve() -> None:
    """Integrated over the clock's own uniform time, which is another integrand on every path."""
    u, w = (torch.from_numpy(a) for a in scipy.special.roots_legendre(600))
    u, w = 0.5 * (u + 1), 0.5 * w
    rule, points, values = trapezoid(72), POINTS[1:2], []
    for schedule in (LinearLogSNR(9, -8), Cosine(), Sigmoid(), LinearBeta()):
        vp = _with_ends(lambda schedule=schedule, **ends: VP(schedule, **ends), -7, 8)
        for curve in ("vp", "ve", "flow", "sub-vp") if schedule == Cosine() else ("vp",):
            model = VPSDE(MIXTURE, vp.on(curve))
            at = model.levels.draw(model.path, u, UniformTime())
            latent = 0.5 * (mse(model, points, at.t, rule) * at.weight * w).sum(1)
            q = model.encode(points)
            ends = model.reconstruction(points, q.bottom, points) + q.top.kl_to_normal(model.prior.log_std)  # type: ignore[attr-defined]
            values.append(latent + ends)
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=1e-8)


class _Answers(nn.Module):
    """A network that knows the exact posterior means and says them in one parametrization."""

    event_shape = (2,)

    def __init__(self, predicts: str) -> None:
        super().__init__()
        self.predicts, self.truth = predicts, oracle("mixture2d")

    def forward(self, z: Tensor, logsnr: Tensor, cond: Tensor | None = None) -> Tensor:
        alpha, sigma = logsnr.double().sigmoid().sqrt()[:, None], (-logsnr.double()).sigmoid().sqrt()[:, None]
        x0, eps = self.truth.posterior(z, alpha, sigma)
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "score": -eps / sigma}[self.predicts]


def test_four_parametrizations_have_one_bound() -> None:
    x = oracle("mixture2d").sample(50, seed=0)
    values = []
    for predicts in ("eps", "x0", "v", "score"):
        denoiser = Denoiser(_Answers(predicts), predicts)
        model = VPSDE(denoiser, VP(LinearLogSNR(9, -7)))
        values.append(model.elbo(x, draws=4, generator=torch.Generator().manual_seed(0)).total)
    exact = VPSDE(oracle("mixture2d"), VP(LinearLogSNR(9, -7)))
    values.append(exact.elbo(x, draws=4, generator=torch.Generator().manual_seed(0)).total)
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=1e-9)


# --- few levels -------------------------------------------------------------------------------------------------------


def test_bound_of_few_levels_is_the_code_length() -> None:
    bins = Bins(4)
    values = bins.centers(torch.float64)
    truth = Posterior([[0.5, 0.25, 0.2, 0.05]], values.numpy())
    path = VP(LinearLogSNR(9, -12))
    x = values[:, None]
    code = -truth.log_prob(x) / math.log(2)
    rule = trapezoid(400)
    exact = GaussianDiffusion(truth, path, Continuous(), PosteriorDecoder(bins))
    uniform = GaussianDiffusion(truth, path, Continuous(), SoftmaxDecoder(bins))
    assert float((nelbo(exact, x, rule) / math.log(2) - code).abs().max()) < 1e-4
    assert float((nelbo(uniform, x, rule) / math.log(2) - code).abs().max()) < 1e-2
    # with the posterior as decoder the clean end is free, and the noisy end costs the prior mismatch alone
    early = GaussianDiffusion(truth, VP(LinearLogSNR(3, -12)), Continuous(), PosteriorDecoder(bins))
    assert float((nelbo(early, x, rule) - nelbo(exact, x, rule)).abs().max()) < 1e-9


def test_an_untrained_network_has_the_bound_of_the_pixel_histogram() -> None:
    from sdegen.data import digits

    data = digits()
    assert data.bins is not None
    denoiser = Denoiser(MLP(data.event_shape, data.bins.count, width=8, depth=1), "levels", data.bins)
    model = VPSDE(denoiser.calibrate(data.train), decoder=PosteriorDecoder(data.bins))
    histogram = pixel_histogram(data.train, data.bins).bits_per_dim(data.test)
    assert float(histogram.mean()) == pytest.approx(2.4331, abs=1e-4)
    report = bound(model, data.test, draws=8, seed=0)
    without_prior = report.bits_per_dim - report.in_bits(report.parts["prior"])
    assert abs(without_prior - float(histogram.mean())) < 4 * report.in_bits(report.estimator_se) + 2e-3


# --- a wrong score ----------------------------------------------------------------------------------------------------


def test_a_wrong_score_has_its_own_bound() -> None:
    """kappa = 0.95, c^2 = 1/4, x = 1/2, logsnr in [-10, 13.3]: data 0.72579 nats, bound 0.74003."""
    x = torch.tensor([[0.5]], dtype=torch.float64)
    model = VPSDE(Wrong(0.95), VP(LinearLogSNR(13.3, -10)))  # type: ignore[arg-type]
    assert -float(GaussianOracle([0.0], [C2]).log_prob(x)) == pytest.approx(0.72579, abs=1e-5)
    assert float(nelbo(model, x, hermite(8))) == pytest.approx(0.74003, abs=1e-5)
