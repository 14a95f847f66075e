"""The bound against closed forms: exact denoisers of Gaussian, mixture and few-level data, expectations by quadrature.

No Monte Carlo where there need be none: the integral over noise is Gauss-Hermite or a fine trapezoid, the one over
levels is the levels' own rule, so that tolerances are those of float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor, nn

from sdegen.bins import Bins
from sdegen.decoders import CategoricalHead, GaussianDecoder, PosteriorDecoder, SoftmaxDecoder, TweedieDecoder
from sdegen.denoiser import Denoiser
from sdegen.levels import Continuous, Discrete, given
from sdegen.likelihood import bound
from sdegen.likelihood.variate import pilot
from sdegen.models import VAE, VPSDE, GaussianDiffusion, pixel_histogram
from sdegen.networks import MLP
from sdegen.objectives import Objective, UniformTime
from sdegen.oracles import GaussianOracle, MixtureOracle, PixelOracle, oracle
from sdegen.paths import VP, Cosine, GaussianPath, LinearBeta, LinearLogSNR, Sigmoid
from solvers import Prediction, expand

C2 = 0.25
X = torch.tensor([[-1.2], [0.0], [0.5], [0.8]], dtype=torch.float64)


def _hermite(order: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(e), e ~ N(0, 1)."""
    e, w = np.polynomial.hermite_e.hermegauss(order)
    return torch.from_numpy(e), torch.from_numpy(w) / math.sqrt(2 * math.pi)


def _trapezoid(count: int, reach: float = 9.0) -> tuple[Tensor, Tensor]:
    """The same by the trapezoidal rule, which converges geometrically and does not mind sharp corners."""
    e = torch.linspace(-reach, reach, count, dtype=torch.float64)
    return e, torch.exp(-0.5 * e.square()) / math.sqrt(2 * math.pi) * (e[1] - e[0])


def _mse(model: GaussianDiffusion, x: Tensor, t: Tensor, rule: tuple[Tensor, Tensor]) -> Tensor:
    """E |eps - eps_hat|^2 for each x (N, 1) and t (L,): (N, L)."""
    e, w = rule
    n, l, k = len(x), len(t), len(e)
    rows = x.reshape(n, 1, 1, 1).expand(n, l, k, 1).reshape(-1, 1)
    times, noise = t.reshape(1, l, 1).expand(n, l, k).reshape(-1), e.reshape(1, 1, k).expand(n, l, k).reshape(-1, 1)
    return (model.error(rows, times, noise).reshape(n, l, k) * w).sum(-1)


def _latent(model: GaussianDiffusion, x: Tensor, rule: tuple[Tensor, Tensor], nodes: int = 256) -> Tensor:
    """The latent term of each x, by quadrature."""
    at = model.levels.nodes(model.path, nodes)
    return 0.5 * (_mse(model, x, at.t, rule) * at.weight).sum(1) + model.levels.constant(model.path)


def _nelbo(model: GaussianDiffusion, x: Tensor, rule: tuple[Tensor, Tensor], nodes: int = 256) -> Tensor:
    """The whole bound of each x, by quadrature."""
    e, w = rule
    q = model.encode(x)
    reconstruction = sum(
        float(b) * model.reconstruction(x, q.bottom, a.reshape(1, 1).expand_as(x)) for a, b in zip(e, w, strict=True)
    )
    prior = q.top.kl_to_normal(model.prior.log_std)  # type: ignore[attr-defined]
    return reconstruction + _latent(model, x, rule, nodes) + prior


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
    torch.testing.assert_close(_mse(model, X, t, _hermite(4)), expected, rtol=1e-12, atol=1e-12)


def test_latent_term_of_gaussian_data() -> None:
    model = _gaussian_model()
    low, high = (math.exp(l) for l in reversed(model.logsnr_ends))

    def primitive(rho: float) -> Tensor:
        return 0.5 * ((1 - X[:, 0].square() / C2) / (1 + rho * C2) + math.log1p(rho * C2))

    torch.testing.assert_close(_latent(model, X, _hermite(4)), primitive(high) - primitive(low), rtol=0, atol=1e-10)


@pytest.mark.parametrize("ends", [(-5, 7), (-10, 13.3)])
def test_bound_and_truth_differ_by_the_two_ends(ends: tuple[float, float]) -> None:
    model = _gaussian_model(*ends)
    truth = GaussianOracle([0.0], [C2]).log_prob(X)
    gap = _nelbo(model, X, _hermite(8)) + truth
    torch.testing.assert_close(gap, _gaussian_ends(model, X), rtol=0, atol=1e-10)


def _averaged(model: GaussianDiffusion, c2: float) -> Tensor:
    """Latent term averaged over N(0, c2) data: two rows suffice, for the error is quadratic in x."""
    e, w = _hermite(2)
    return (_latent(model, math.sqrt(c2) * e[:, None], _hermite(2)) * w).sum()


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

MIXTURE = MixtureOracle([0.3, 0.7], [[-0.6], [0.5]], [[0.01], [0.04]])
POINTS = torch.tensor([[-0.65], [-0.1], [0.5]], dtype=torch.float64)


@pytest.mark.parametrize(("ends", "gap"), [((-5, 13.3), 1e-3), ((-10, 18), 1e-5), ((-14, 22), 5e-7)])
def test_mixture_bound_meets_the_truth_as_the_ends_move_out(ends: tuple[float, float], gap: float) -> None:
    model = VPSDE(MIXTURE, VP(LinearLogSNR(ends[1], ends[0])))
    found = (_nelbo(model, POINTS, _trapezoid(160), nodes=480) + MIXTURE.log_prob(POINTS)).abs()
    assert float(found.max()) < gap
    # the gap is at the ends and nowhere else: only the noisy end is left when the prior is the true marginal
    z, w = _trapezoid(400)
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
    signed = _nelbo(model, POINTS, _trapezoid(160), nodes=480) + MIXTURE.log_prob(POINTS)
    torch.testing.assert_close(signed, clean + noisy, rtol=0, atol=2e-8)


def _with_ends(make: Callable[..., GaussianPath], low: float, high: float) -> GaussianPath:
    free = make(t_min=1e-6, t_max=1 - 1e-6)
    return make(t_min=float(free.time(high)), t_max=float(free.time(low)))


def test_the_bound_sees_the_ends_and_neither_clock_nor_curve() -> None:
    """Integrated over the clock's own uniform time, which is another integrand on every path."""
    u, w = (torch.from_numpy(a) for a in scipy.special.roots_legendre(600))
    u, w = 0.5 * (u + 1), 0.5 * w
    rule, points, values = _trapezoid(72), POINTS[1:2], []
    for schedule in (LinearLogSNR(9, -8), Cosine(), Sigmoid(), LinearBeta()):
        vp = _with_ends(lambda schedule=schedule, **ends: VP(schedule, **ends), -7, 8)
        for curve in ("vp", "ve", "flow", "sub-vp") if schedule == Cosine() else ("vp",):
            model = VPSDE(MIXTURE, vp.on(curve))
            at = model.levels.draw(model.path, u, UniformTime())
            latent = 0.5 * (_mse(model, points, at.t, rule) * at.weight * w).sum(1)
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


class _Posterior(PixelOracle):
    """The exact denoiser of independent pixels, which also tells its posterior over the levels."""

    def level_logits(self, z: Tensor, logsnr: Tensor, cond: Tensor | None = None) -> Tensor:
        alpha, sigma = logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()
        return self._joint(z, alpha, sigma)[0].log_softmax(-1)


def test_bound_of_few_levels_is_the_code_length() -> None:
    bins = Bins(4)
    values = bins.centers(torch.float64)
    truth = _Posterior([[0.5, 0.25, 0.2, 0.05]], values.numpy())
    path = VP(LinearLogSNR(9, -12))
    x = values[:, None]
    code = -truth.log_prob(x) / math.log(2)
    rule = _trapezoid(400)
    exact = GaussianDiffusion(truth, path, Continuous(), PosteriorDecoder(bins))
    uniform = GaussianDiffusion(truth, path, Continuous(), SoftmaxDecoder(bins))
    assert float((_nelbo(exact, x, rule) / math.log(2) - code).abs().max()) < 1e-4
    assert float((_nelbo(uniform, x, rule) / math.log(2) - code).abs().max()) < 1e-2
    # with the posterior as decoder the clean end is free, and the noisy end costs the prior mismatch alone
    early = GaussianDiffusion(truth, VP(LinearLogSNR(3, -12)), Continuous(), PosteriorDecoder(bins))
    assert float((_nelbo(early, x, rule) - _nelbo(exact, x, rule)).abs().max()) < 1e-9


def test_an_untrained_network_has_the_bound_of_the_pixel_histogram() -> None:
    from sdegen.data import digits
    from sdegen.networks import MLP

    data = digits()
    assert data.bins is not None
    denoiser = Denoiser(MLP(data.event_shape, data.bins.count, width=8, depth=1), "levels", data.bins)
    model = VPSDE(denoiser.calibrate(data.train), decoder=PosteriorDecoder(data.bins))
    histogram = pixel_histogram(data.train, data.bins).bits_per_dim(data.test)
    assert float(histogram.mean()) == pytest.approx(2.4331, abs=1e-4)
    report = bound(model, data.test, draws=8, seed=0)
    without_prior = report.bits_per_dim - report.in_bits(report.parts["prior"])
    assert abs(without_prior - float(histogram.mean())) < 4 * report.in_bits(report.estimator_se) + 2e-3


# --- estimators -------------------------------------------------------------------------------------------------------


def _scores(model: GaussianDiffusion, x: Tensor, **settings: Any) -> Tensor:
    """(estimate - truth) / claimed standard error for 200 seeds; the truth by quadrature."""
    truth = float(_nelbo(model, x, _trapezoid(120), nodes=128).mean())
    reports = [bound(model, x, seed=seed, **settings) for seed in range(200)]
    return torch.tensor([(report.nats - truth) / report.estimator_se for report in reports])


@pytest.mark.parametrize(
    ("n", "settings"),
    [
        (48, {"draws": 8}),
        (1, {"draws": 32, "repeats": 12, "control": None}),
        (32, {"draws": 8, "target_se": 0.08}),
    ],
    ids=["default", "one datum", "until a target"],
)
def test_estimates_are_unbiased_and_know_their_error(n: int, settings: dict[str, Any]) -> None:
    """Over 200 seeds the z-scores against quadrature are standard normal."""
    z = _scores(VPSDE(MIXTURE, VP(LinearLogSNR(9, -5))), MIXTURE.sample(n, seed=0), **settings)
    assert abs(float(z.mean())) < 4 / math.sqrt(200)
    assert 0.85 < float(z.std()) < 1.15


def test_estimates_of_grey_levels_know_their_error_too() -> None:
    bins = Bins(4)
    truth = _Posterior([[0.5, 0.25, 0.2, 0.05]], bins.centers(torch.float64).numpy())
    model = GaussianDiffusion(truth, VP(LinearLogSNR(4, -8)), Continuous(), PosteriorDecoder(bins)).discretize(6)
    z = _scores(model, truth.sample(24, seed=0), draws=8)
    assert abs(float(z.mean())) < 4 / math.sqrt(200)
    assert 0.85 < float(z.std()) < 1.15


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("decoder", [GaussianDecoder(), TweedieDecoder()], ids=repr)
def test_monte_carlo_meets_quadrature_for_a_ddpm(variance: str, decoder: GaussianDecoder) -> None:
    model = VPSDE(MIXTURE, VP(LinearLogSNR(8, -5)), decoder=decoder).discretize(12, variance=variance)
    exact = float(_nelbo(model, POINTS, _trapezoid(120)).mean())
    report = bound(model, POINTS, draws=24, repeats=40, seed=1)
    assert abs(report.nats - exact) < 4 * report.estimator_se
    assert report.estimator_se < 0.3


def test_the_loss_of_the_bound_is_the_bound() -> None:
    model = VPSDE(MIXTURE, VP(LinearLogSNR(8, -5)))
    x = MIXTURE.sample(64, seed=1)
    losses = torch.stack([model.loss(x, generator=torch.Generator().manual_seed(i)) for i in range(40)])
    exact = _nelbo(model, x, _trapezoid(60), nodes=96).mean() / math.log(2)
    assert abs(float(losses.mean() - exact)) < 4 * float(losses.std()) / math.sqrt(40)


def test_the_density_changes_the_variance_of_the_loss_alone() -> None:
    x = MIXTURE.sample(256, seed=1)
    means = []
    for density in (None, UniformTime()):
        objective = Objective() if density is None else Objective(density=density)
        model = GaussianDiffusion(
            MIXTURE, VP(Cosine(), t_min=0.02, t_max=0.98), Continuous(), GaussianDecoder(), objective
        )
        losses = torch.stack([model.loss(x, generator=torch.Generator().manual_seed(i)) for i in range(60)])
        means.append((float(losses.mean()), float(losses.std()) / math.sqrt(60)))
    (a, sa), (b, sb) = means
    assert abs(a - b) < 4 * math.hypot(sa, sb)


def test_values_depend_on_seed_and_number_alone() -> None:
    """Whatever the batch; and with a finished pilot, whatever the shard."""
    model, x = VPSDE(MIXTURE, VP(LinearLogSNR(8, -5))), MIXTURE.sample(40, seed=0)
    whole = bound(model, x, draws=12)
    for batch in (12, 130, 4096):
        torch.testing.assert_close(bound(model, x, draws=12, batch=batch).values, whole.values, rtol=0, atol=1e-9)
    variate = pilot(model, x, pairs=40)
    whole = bound(model, x, draws=12, control=variate)
    shards = [bound(model, x[rows], draws=12, control=variate, samples=rows) for rows in (range(7), range(7, 40))]
    torch.testing.assert_close(torch.cat([s.values for s in shards]), whole.values, rtol=0, atol=1e-9)
    errors = [s.estimator_se * len(s.values) / 40 for s in shards]
    assert math.hypot(*errors) == pytest.approx(whole.estimator_se, rel=1e-9)
    assert float((bound(model, x, draws=12, seed=1).values - whole.values).abs().min()) > 1e-6
    more = bound(model, x, draws=12, repeats=4, control=variate)
    assert float((more.values - whole.values).abs().min()) > 1e-6  # further rounds have noise of their own


def test_values_of_latent_diffusion_depend_on_seed_and_number_alone() -> None:
    """A prior that is a model draws levels and noise of its own."""
    torch.manual_seed(0)
    inner = VPSDE(Denoiser(MLP((2,), width=8, depth=1)), VP(LinearLogSNR(8, -8)))
    vae = VAE.mlp((1, 2, 2), CategoricalHead(Bins(4)), latent=2, width=8, prior=inner)
    x = Bins(4).value(torch.arange(40).reshape(10, 1, 2, 2) % 4)
    whole = bound(vae, x, draws=6)
    torch.testing.assert_close(bound(vae, x, draws=6, batch=18).values, whole.values, rtol=1e-5, atol=1e-5)
    part = bound(vae, x[4:], draws=6, samples=range(4, 10))
    torch.testing.assert_close(part.values, whole.values[4:], rtol=1e-5, atol=1e-5)
    assert sum(whole.parts.values()) == pytest.approx(whole.nats, rel=1e-9)
    assert whole.estimator_se > 0


def test_sampling_goes_on_until_the_target_or_the_budget_is_met() -> None:
    model, x = VPSDE(MIXTURE, VP(LinearLogSNR(8, -5))), MIXTURE.sample(60, seed=0)
    first = bound(model, x)
    seen: list[tuple[int, int]] = []
    met = bound(model, x, target_se=first.estimator_se / 3, progress=lambda done, of: seen.append((done, of)))
    assert met.estimator_se <= first.estimator_se / 3
    assert met.note == ""
    assert 12 <= met.settings["repeats"] <= 45
    assert seen[-1][0] == seen[-1][1]
    assert all(done <= of for done, of in seen)
    assert bound(model, x, target_se=10.0).values.equal(first.values)
    short = bound(model, x, target_se=first.estimator_se / 30, max_nfe=100)
    assert "takes more calls" in short.note
    spent = bound(model, x, max_nfe=100)
    for report in (short, spent):
        assert 80 < report.forward <= 100
        assert report.estimator_se < first.estimator_se
    for decoder, few in ((GaussianDecoder(), 2), (TweedieDecoder(), 4)):
        poor = VPSDE(MIXTURE, VP(LinearLogSNR(8, -5)), decoder=decoder)
        assert bound(poor, x, max_nfe=few).forward == few
        with pytest.raises(ValueError, match=f"at least {few} network calls"):
            bound(poor, x, max_nfe=few - 1)
    with pytest.raises(ValueError, match="positive number of nats"):
        bound(model, x, target_se=0)
    with pytest.raises(ValueError, match="60 data and 3 sample numbers"):
        bound(model, x, samples=range(3))


def test_a_decoder_that_asks_the_network_gets_the_draws_it_deserves() -> None:
    x = MIXTURE.sample(50, seed=0)
    clean, early = (VPSDE(MIXTURE, VP(LinearLogSNR(end, -5)), decoder=TweedieDecoder()) for end in (12, 2))
    looks = [bound(model, x, draws=16).forward for model in (clean, early)]
    assert looks[0] < looks[1]
    for model in (clean, early):
        report = bound(model, x, draws=64, repeats=4)
        exact = float(_nelbo(model, x, _trapezoid(120)).mean())
        assert abs(report.nats - exact) < 4 * report.estimator_se


class _OfAClass:
    """Class k has data N(k, 1/4); without a class, an even mixture of two."""

    event_shape = (1,)

    def predict(self, path: GaussianPath, cond: Tensor | None = None) -> Callable[[Tensor, Tensor], Prediction]:
        if cond is None:
            return MixtureOracle([0.5, 0.5], [[0.0], [1.0]], [[C2], [C2]]).predict(path)
        centred, mean = GaussianOracle([0.0], [C2]).predict(path), cond.double()[:, None]

        def predict(z: Tensor, t: Tensor) -> Prediction:
            assert len(z) == len(cond), "a label for every row"
            x0, eps = centred(z - expand(path.alpha(t), z) * mean, t)
            return Prediction(x0 + mean, eps)

        return predict


@pytest.mark.parametrize("decoder", [GaussianDecoder(), TweedieDecoder()], ids=repr)
@pytest.mark.parametrize("control", ["auto", None])
def test_labels_reach_the_network(decoder: GaussianDecoder, control: str | None) -> None:
    """Data far from their class cost more; the pilot and the decoder know the class, too."""
    x, labels = torch.cat([X, X + 1]).repeat(8, 1), torch.tensor([0] * 4 + [1] * 4).repeat(8)
    model = VPSDE(_OfAClass(), VP(LinearLogSNR(9, -9)), decoder=decoder)  # type: ignore[arg-type]
    own, other, none = (bound(model, x, cond, control=control, batch=48) for cond in (labels, 1 - labels, None))
    of_class, of_any = GaussianOracle([0.0], [C2]), MixtureOracle([0.5, 0.5], [[0.0], [1.0]], [[C2], [C2]])
    assert own.nats == pytest.approx(-float(of_class.log_prob(X).mean()), abs=4 * own.estimator_se + 0.02)
    assert none.nats == pytest.approx(-float(of_any.log_prob(x).mean()), abs=4 * none.estimator_se + 0.02)
    assert other.nats > own.nats + 1


# --- a wrong score ----------------------------------------------------------------------------------------------------


class _Wrong:
    """The exact denoiser of N(0, c^2) with its score multiplied by kappa."""

    event_shape = (1,)

    def __init__(self, kappa: float) -> None:
        self.truth, self.kappa = GaussianOracle([0.0], [C2]), kappa

    def predict(self, path: GaussianPath) -> Callable[[Tensor, Tensor], Prediction]:
        return self.truth.predict(path, kappa=self.kappa)


def test_a_wrong_score_has_its_own_bound() -> None:
    """kappa = 0.95, c^2 = 1/4, x = 1/2, logsnr in [-10, 13.3]: data 0.72579 nats, bound 0.74003."""
    x = torch.tensor([[0.5]], dtype=torch.float64)
    model = VPSDE(_Wrong(0.95), VP(LinearLogSNR(13.3, -10)))  # type: ignore[arg-type]
    assert -float(GaussianOracle([0.0], [C2]).log_prob(x)) == pytest.approx(0.72579, abs=1e-5)
    assert float(_nelbo(model, x, _hermite(8))) == pytest.approx(0.74003, abs=1e-5)
