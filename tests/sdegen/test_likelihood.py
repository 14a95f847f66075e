"""The probability-flow log-density against exact densities, and reports that hold what they must."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdegen.bins import Bins
from sdegen.decoders import CategoricalHead, PosteriorDecoder, SoftmaxDecoder, TweedieDecoder
from sdegen.denoiser import Denoiser
from sdegen.levels import Continuous
from sdegen.likelihood import (
    Exact,
    Hutchinson,
    LogDensity,
    bound,
    importance,
    log_density,
    ode_likelihood,
    ode_log_prob,
)
from sdegen.models import VAE, VPSDE, GaussianDiffusion, uniform
from sdegen.networks import MLP, UNet
from sdegen.oracles import GaussianOracle, MixtureOracle, Oracle, PixelOracle, oracle
from sdegen.paths import VE, VP, Flow, GaussianPath, LinearBeta, LinearLogSNR
from solvers import Prediction, standard_normal
from solvers.noise import DECODER, ENCODER, PRIOR, PROBES

PATHS = {
    "vp-logsnr": VP(LinearLogSNR(8, -8)),
    "vp-beta": VP(LinearBeta(), t_min=1e-3),
    "ve": VE(0.02, 30),
    "flow": Flow(t_min=0.02, t_max=0.98),
}


def _terminal(truth: Oracle, path: GaussianPath, found: LogDensity) -> Tensor:
    """The log-density with the true terminal density in place of the prior."""
    t = torch.tensor(path.t_max, dtype=torch.float64)
    return truth.log_prob_t(found.z, path, t) + found.log_det


def _at_clean_end(truth: Oracle, path: GaussianPath, n: int) -> tuple[Tensor, Tensor]:
    t = torch.tensor(path.t_min, dtype=torch.float64)
    z = path.alpha(t) * truth.sample(n, seed=2)
    return z, truth.log_prob_t(z, path, t)


# --- the ODE against exact densities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("tol", [1e-5, 1e-7])
def test_log_density_of_a_mixture_to_solver_tolerance(path: GaussianPath, tol: float) -> None:
    truth = oracle("mixture2d")
    z, exact = _at_clean_end(truth, path, 12)
    found = log_density(truth.problem(path), z, tol=tol)
    assert float((_terminal(truth, path, found) - exact).abs().max()) < 500 * tol


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("rk4", 4)])
def test_log_density_converges_with_the_order_of_the_solver(path: GaussianPath, solver: str, order: int) -> None:
    truth = oracle("mixture2d")
    z, exact = _at_clean_end(truth, path, 6)
    errors = [
        float((_terminal(truth, path, log_density(truth.problem(path), z, solver=solver, steps=n)) - exact).norm())
        for n in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_prior_shifts_the_density_by_its_mismatch(path: GaussianPath) -> None:
    truth = oracle("mixture2d")
    z, exact = _at_clean_end(truth, path, 8)
    found = log_density(truth.problem(path), z, solver="rk4", steps=200)
    t = torch.tensor(path.t_max, dtype=torch.float64)
    scale = torch.hypot(path.alpha(t), path.sigma(t))
    normal = torch.distributions.Normal(0, scale).log_prob(found.z).sum(1)
    mismatch = normal - truth.log_prob_t(found.z, path, t)
    torch.testing.assert_close(found.log_prior, normal)
    torch.testing.assert_close(found.log_prob - exact, mismatch, rtol=0, atol=2e-6)
    assert float(mismatch.abs().max()) > 1e-6


def test_the_density_of_an_event_of_any_shape() -> None:
    flat = oracle("mixture16")
    assert isinstance(flat, MixtureOracle)
    shaped = MixtureOracle(flat.weights.numpy(), flat.means.reshape(-1, 1, 4, 4).numpy(), flat.covs.numpy())
    path = PATHS["vp-logsnr"]
    z, exact = _at_clean_end(shaped, path, 3)
    found = log_density(shaped.problem(path), z, solver="rk4", steps=60)
    torch.testing.assert_close(_terminal(shaped, path, found), exact, rtol=0, atol=1e-4)
    assert (found.forward, found.products) == (240, 240 * 16)


def test_a_sample_does_not_know_its_batch() -> None:
    truth, path = oracle("mixture2d"), PATHS["vp-logsnr"]
    z, _ = _at_clean_end(truth, path, 9)
    for trace in (Exact(), Hutchinson(3, seed=1)):
        together = log_density(truth.problem(path), z, solver="heun", steps=30, trace=trace)
        alone = [
            log_density(truth.problem(path), z[i : i + 1], solver="heun", steps=30, trace=trace, samples=[i])
            for i in range(9)
        ]
        torch.testing.assert_close(torch.cat([a.log_prob for a in alone]), together.log_prob, rtol=0, atol=1e-9)


def test_hutchinson_has_the_mean_and_variance_of_theory() -> None:
    """For a Gaussian the integrated Jacobian M is known: Rademacher probes have variance 2 sum_{i != j} M_ij^2."""
    a = torch.tensor([[1.0, 0.4, -0.2], [0.4, 0.6, 0.3], [-0.2, 0.3, 0.8]], dtype=torch.float64)
    truth, path = GaussianOracle([0.0, 0.0, 0.0], (a @ a).numpy()), PATHS["vp-logsnr"]
    z = torch.tensor([[0.3, -0.5, 0.9]], dtype=torch.float64)
    probes = 2000
    found = log_density(truth.problem(path), z, solver="rk4", steps=40, trace=Hutchinson(probes))
    exact = log_density(truth.problem(path), z, solver="rk4", steps=40)
    # M = INT g^2 / 2 (alpha^2 S + sigma^2)^-1 dt, in the eigenvectors of S
    at = Continuous().nodes(path, 128)
    alpha2, sigma2 = path.alpha(at.t).square(), path.sigma(at.t).square()
    values, vectors = torch.linalg.eigh(a @ a)
    m = vectors @ torch.diag((0.5 * at.weight * sigma2 / (alpha2 * values[:, None] + sigma2)).sum(1)) @ vectors.T
    theory = 2 * float((m - m.diag().diag()).square().sum())
    assert float(found.spread) == pytest.approx(math.sqrt(theory / probes), rel=0.075)
    assert abs(float(found.log_prob - exact.log_prob)) < 4 * float(found.spread)
    assert float(exact.spread) == 0


class _Wrong:
    """The exact denoiser of N(0, 1/4) with its score multiplied by kappa."""

    event_shape = (1,)

    def __init__(self, kappa: float) -> None:
        self.truth, self.kappa = GaussianOracle([0.0], [0.25]), kappa

    def predict(self, path: GaussianPath) -> Callable[[Tensor, Tensor], Prediction]:
        return self.truth.predict(path, kappa=self.kappa)


def test_a_wrong_score_has_four_likelihoods() -> None:
    """kappa = 0.95: data 0.72579, reverse SDE 0.72847, probability-flow ODE 0.79341 (worse than the bound, 0.74003)."""
    x = torch.tensor([[0.5]], dtype=torch.float64)
    path = VP(LinearLogSNR(13.3, -10))
    model = VPSDE(_Wrong(0.95), path)  # type: ignore[arg-type]
    ode = -float(model.log_prob(x, tol=1e-9))
    assert ode == pytest.approx(0.79341, abs=1e-5)
    elbo = bound(model, x, draws=2000, repeats=8)
    assert abs(elbo.nats - 0.74003) < 4 * elbo.estimator_se
    # the reverse SDE keeps Gaussians Gaussian: the ancestral steps' affine maps give the variance of z_0
    T = 4000
    values = []
    for steps in (T, 2 * T):
        ts = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        t, s = ts[:-1], ts[1:]
        coef_z, coef_x, std = path.posterior(s, t)
        one = torch.ones(steps, 1, dtype=torch.float64)
        slope = (coef_z + coef_x * _Wrong(0.95).predict(path)(one, t).x0[:, 0]).tolist()
        variance = 1.0
        for m, noise in zip(slope, std.square().tolist(), strict=True):
            variance = m**2 * variance + noise
        values.append(0.5 * (math.log(2 * math.pi * variance) + 0.25 / variance))
    assert 2 * values[1] - values[0] == pytest.approx(0.72847, abs=1e-5)


# --- what it says of data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [None, TweedieDecoder()], ids=repr)
def test_the_density_of_data_is_that_of_the_scaled_clean_state(decoder: TweedieDecoder | None) -> None:
    truth, path = oracle("mixture2d"), VP(LinearLogSNR(3, -12))
    x = truth.sample(8, seed=4)
    model = VPSDE(truth, path, decoder=decoder)
    found = ode_log_prob(model, x, tol=1e-8)
    t0, t1 = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    exact = truth.log_prob_t(path.alpha(t0) * x, path, t0) + 2 * path.alpha(t0).log()
    corrected = found.log_prob - found.log_prior + truth.log_prob_t(found.z, path, t1)
    torch.testing.assert_close(corrected, exact, rtol=0, atol=1e-6)
    assert set(found.parts) == {"scale"}
    torch.testing.assert_close(model.log_prob(x, tol=1e-8), found.log_prob)


def test_with_a_clean_end_the_density_of_data_is_the_datas_own() -> None:
    truth = oracle("mixture2d")
    x = truth.sample(8, seed=4)
    found = VPSDE(truth, VP(LinearLogSNR(16, -12))).log_prob(x, tol=1e-7)
    assert float((found - truth.log_prob(x)).abs().max()) < 5e-3


class _Posterior(PixelOracle):
    def level_logits(self, z: Tensor, logsnr: Tensor, cond: Tensor | None = None) -> Tensor:
        return self._joint(z, logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt())[0].log_softmax(-1)


@pytest.mark.parametrize("softmax", [True, False])
def test_of_grey_levels_the_ode_gives_a_bound_on_the_probability(softmax: bool) -> None:
    """With the exact score and posterior, log p(x|z) - log q(z|x) + log p(z) = log P(x) for every z."""
    bins = Bins(4)
    probs = [[0.5, 0.25, 0.2, 0.05], [0.1, 0.2, 0.3, 0.4]]
    truth = _Posterior(probs, bins.centers(torch.float64).numpy())
    decoder = SoftmaxDecoder(bins) if softmax else PosteriorDecoder(bins)
    model = GaussianDiffusion(truth, VP(LinearLogSNR(3, -14)), Continuous(), decoder)
    x = truth.sample(16, seed=0)
    found = ode_log_prob(model, x, draws=2, solver="rk4", steps=150)
    gap = truth.log_prob(x) - found.log_prob
    assert set(found.parts) == {"reconstruction", "entropy"}
    if softmax:
        assert float(gap.mean()) > 0.05
    else:
        assert float(gap.abs().max()) < 3e-3


def test_of_an_untrained_network_the_ode_agrees_with_the_bound() -> None:
    bins = Bins(5)
    x = bins.value(torch.randint(5, (64, 1, 3, 3), generator=torch.Generator().manual_seed(0)))
    denoiser = Denoiser(MLP((1, 3, 3), 5, width=8, depth=1), "levels", bins).calibrate(x)
    model = VPSDE(denoiser, VP(LinearLogSNR(6, -8)), decoder=PosteriorDecoder(bins))
    a = bound(model, x, draws=32)
    b = ode_likelihood(model, x, solver="rk4", steps=40, trace=Hutchinson(2), draws=2)
    assert (a.kind, b.kind) == ("upper bound", "estimate")
    assert abs(a.nats - b.nats) < 4 * math.hypot(a.estimator_se, b.estimator_se) + 0.02
    exact = ode_likelihood(model, x, solver="rk4", steps=40, trace=Exact(), draws=2)
    assert abs(exact.nats - b.nats) < 4 * math.hypot(exact.estimator_se, b.estimator_se)


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


# --- reports ----------------------------------------------------------------------------------------------------------


def _model() -> GaussianDiffusion:
    bins = Bins(5)
    return VPSDE(Denoiser(MLP((1, 3, 3), 5, width=8, depth=1), "levels", bins))


def _grey(n: int) -> Tensor:
    return Bins(5).value(torch.randint(5, (n, 1, 3, 3), generator=torch.Generator().manual_seed(0)))


# What a number must come with before anybody can believe it.
FIELDS = {
    "nats", "bits_per_dim", "kind", "of", "parts", "estimator_se", "data_se", "solver_error", "forward", "vjp", "jvp",
    "seconds", "dequantizer", "bin_width", "logsnr", "tolerance", "solver", "seed", "settings",
}  # fmt: skip


def test_a_report_holds_all_that_is_needed_to_believe_it() -> None:
    model, x = _model(), _grey(24)
    vae = VAE.mlp((1, 3, 3), CategoricalHead(Bins(5)), latent=2, width=8)
    reports = [
        bound(model, x, draws=3),
        bound(model.discretize(5), x, draws=3),
        bound(vae, x, draws=3),
        bound(uniform((1, 3, 3), Bins(5)), x),
        importance(vae, x, 5),
        ode_likelihood(model, x, solver="heun", steps=3, draws=2),
    ]
    for report in reports:
        facts = report.to_dict()
        assert report.values.shape == (24,)
        assert report.values.dtype == torch.float64
        assert math.isfinite(report.nats + report.estimator_se + report.bits_per_dim)
        assert report.data_se > 0 or math.isnan(report.data_se)
        assert facts["kind"] in ("exact", "upper bound", "estimate")
        assert facts["of"] == "probability"
        assert facts["seconds"] > 0
        assert report.in_bits(report.nats) == pytest.approx(report.bits_per_dim)
        assert "bits/dim" in str(report)
        assert facts.keys() >= FIELDS
    for report in (*reports[:3], reports[5]):
        assert report.logsnr is None or report.logsnr[0] > report.logsnr[1]
        assert sum(report.parts.values()) == pytest.approx(report.nats, rel=1e-6)
    assert [r.kind for r in reports] == ["upper bound"] * 3 + ["exact", "upper bound", "estimate"]
    assert reports[3].estimator_se == 0
    assert reports[0].forward == 2 * 3
    assert reports[5].forward == 2 * 6
    assert reports[5].vjp == 2 * 6 * 9


def test_parts_of_the_ode_add_up() -> None:
    for report in (
        ode_likelihood(_model(), _grey(10), solver="heun", steps=3, draws=2),
        ode_likelihood(VPSDE(oracle("mixture2d")), oracle("mixture2d").sample(10, seed=0), solver="heun", steps=9),
    ):
        assert sum(report.parts.values()) == pytest.approx(report.nats, rel=1e-9)


def test_reports_do_not_depend_on_how_the_data_are_cut() -> None:
    model, x = _model(), _grey(20)
    ode = [ode_likelihood(model, x, solver="heun", steps=4, draws=2, batch=b).values for b in (6, 64)]
    torch.testing.assert_close(ode[0], ode[1], rtol=1e-5, atol=1e-5)
    seen: list[tuple[int, int]] = []
    bound(model, x, draws=2, batch=8, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(4, 20), (8, 20), (12, 20), (16, 20), (20, 20)]


def test_scoring_leaves_the_model_as_it_was() -> None:
    model, x = _model().train(), _grey(4)
    bound(model, x, draws=1)
    assert model.training
    again = [bound(model, x, draws=2, seed=3).nats for _ in range(2)]
    assert again[0] == again[1]


def test_errors_of_estimator_and_data_are_told_apart() -> None:
    truth = oracle("mixture2d")
    model = VPSDE(truth, VP(LinearLogSNR(8, -8)))
    x = truth.sample(400, seed=0)
    few, many = bound(model, x, draws=2), bound(model, x, draws=32)
    assert many.estimator_se < few.estimator_se / 3
    spread = float(truth.log_prob(x).std()) / math.sqrt(400)
    assert many.data_se == pytest.approx(spread, rel=0.35)
    assert math.isnan(bound(model, x[:5], repeats=1).estimator_se)


def test_a_density_without_bin_width_has_no_bits() -> None:
    truth = oracle("mixture2d")
    model, x = VPSDE(truth), truth.sample(4, seed=0)
    assert math.isnan(bound(model, x, draws=2).bits_per_dim)
    known = bound(model, x, draws=2, bin_width=0.1)
    assert known.bits_per_dim == pytest.approx(known.in_bits(known.nats) - math.log2(0.1))
    assert ode_likelihood(model, x, solver="heun", steps=5).kind == "estimate"
    assert ode_likelihood(model, x, solver="heun", steps=5, trace=Hutchinson(2)).kind == "estimate"


def test_bad_input_is_refused_in_one_line() -> None:
    model, x = _model(), _grey(4)
    for call, words in (
        (
            lambda: Exact(limit=8).start(x, range(4)),
            r"9 coordinates costs 9 .* Hutchinson\(probes=...\), or Exact\(limit=9\)",
        ),
        (lambda: Hutchinson(0), "at least one probe"),
        (lambda: bound(model, x[:0]), "no data"),
        (lambda: bound(model, x, draws=0), "at least 1"),
        (lambda: bound(model, x.squeeze(1)), "has shape"),
        (lambda: bound(model, x, bin_width=0.1), "probabilities"),
        (lambda: ode_likelihood(model, x, solver="dopri"), "dopri5"),
        (lambda: ode_likelihood(model, x, solver="heun", steps=0), "at least 1"),
        (lambda: ode_likelihood(model, x, solver="heun", steps=2, draws=0), "at least 1"),
        (lambda: ode_likelihood(model, x, solver="euler_maruyama", steps=2), "noise"),
        (lambda: ode_likelihood(model, x, solver="heun", steps=3, tol=1e-3), "at most one"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_draws_of_different_meaning_are_independent_at_one_seed() -> None:
    """A model's own samples must not be scored with the noise that made them."""
    streams = [standard_normal((500, 4), 0, stream=stream) for stream in (PRIOR, DECODER, ENCODER, PROBES)]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert abs(float((a * b).mean())) < 0.1
    truth = PixelOracle(torch.full((1, 2, 2, 5), 0.2), Bins(5).centers(torch.float64))
    model = VPSDE(truth, VP(LinearLogSNR(3, -8)), decoder=SoftmaxDecoder(Bins(5)), event_shape=(1, 2, 2))
    x = model.sample(1000, seed=0, steps=10)
    own, other = (ode_likelihood(model, x, solver="heun", steps=10, draws=1, seed=seed).nats for seed in (0, 1))
    assert own == pytest.approx(other, abs=0.03)
    assert own != other
