"""Denoisers without a network, and the control variate that is made of them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from sdegen.bins import Bins
from sdegen.decoders import GaussianHead, SoftmaxDecoder
from sdegen.densities import UniformLogSNR
from sdegen.levels import Continuous, Discrete
from sdegen.likelihood.bound import bound
from sdegen.likelihood.control import Control, IndependentLevels, LinearGaussian
from sdegen.likelihood.variate import ControlVariate, controls_for, pilot, variate_for
from sdegen.models import VAE, VPSDE
from sdegen.oracles import GaussianOracle, PixelOracle, oracle
from sdegen.paths import VE, VP, Cosine, Flow, GaussianPath, LinearLogSNR

PATHS = [VP(), VE(), Flow(t_min=0.01, t_max=0.99)]
SHAPE = (2, 1, 2)


def _covariance() -> Tensor:
    """Of rank two in four dimensions; the first coordinate is constant."""
    root = torch.tensor([[0.0, 0.0], [0.5, 0.1], [0.3, -0.4], [0.8, 0.2]], dtype=torch.float64)
    return root @ root.mT


def _normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MEAN = _normals(4, seed=9).reshape(SHAPE)
LINEAR = {
    "full": LinearGaussian.of(MEAN, _covariance()),
    "diagonal": LinearGaussian.of(MEAN, _covariance().diagonal()),
}
LOGSNR = torch.tensor([-9.0, -2.0, 0.5, 4.0, 13.0], dtype=torch.float64)


# --- denoisers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path.curve).__name__)
@pytest.mark.parametrize("kind", LINEAR)
def test_the_linear_denoiser_is_exact_for_gaussian_data(kind: str, path: GaussianPath) -> None:
    control = LINEAR[kind]
    cov = _covariance() if kind == "full" else _covariance().diagonal().diag()
    truth = GaussianOracle(MEAN.numpy(), cov.numpy())
    z, t = _normals(5, *SHAPE), torch.linspace(0.02, 0.98, 5, dtype=torch.float64)
    expected = truth.posterior(z, path.alpha(t), path.sigma(t)).eps
    torch.testing.assert_close(control.eps(z, path, t), expected, rtol=1e-9, atol=1e-12)
    assert control.eps(z.float(), path, t).dtype == torch.float32
    torch.testing.assert_close(control.eps(z.float(), path, t).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path.curve).__name__)
@pytest.mark.parametrize("kind", LINEAR)
def test_the_jacobian_of_the_linear_denoiser(kind: str, path: GaussianPath) -> None:
    control, t = LINEAR[kind], torch.tensor([0.1, 0.7], dtype=torch.float64)
    z, v = _normals(2, *SHAPE), _normals(2, *SHAPE, seed=1)
    _, product = torch.func.jvp(lambda y: control.eps(y, path, t), (z,), (v,))
    torch.testing.assert_close(control.jacobian_vector(v, path, t), product)
    for i in range(2):
        jacobian = torch.func.jacrev(lambda y, i=i: control.eps(y[None], path, t[i])[0])(z[i]).reshape(4, 4)
        torch.testing.assert_close(control.jacobian_trace(path, t)[i], jacobian.trace())
        torch.testing.assert_close(control.jacobian_trace(path, t[i]), jacobian.trace())


def test_a_step_is_seen_alike_through_vmap() -> None:
    """The probes of a trace come side by side."""
    control, path, t = LINEAR["full"], VP(), torch.tensor(0.3, dtype=torch.float64)
    v = _normals(3, 5, *SHAPE)
    together = torch.func.vmap(lambda w: control.jacobian_vector(w, path, t))(v)
    torch.testing.assert_close(together, torch.stack([control.jacobian_vector(w, path, t) for w in v]))


def _levels_control(count: int = 5) -> tuple[IndependentLevels, Tensor]:
    p = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) ** 3
    p = p / p.sum()
    return IndependentLevels(Bins(count), p.log()), p


def test_the_levels_denoiser_is_exact_for_independent_pixels() -> None:
    control, p = _levels_control()
    values, path = Bins(5).centers(torch.float64), VP(LinearLogSNR(9, -9))
    truth = PixelOracle(p.expand(2, 3, 5).numpy(), values.numpy())
    x, eps, t = truth.sample(7, seed=0), _normals(7, 2, 3), torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    z = path.alpha(t)[:, None, None] * x + path.sigma(t)[:, None, None] * eps
    expected = (eps - truth.predict(path)(z, t).eps).square().flatten(1).sum(1)
    torch.testing.assert_close(control.error(x, path.logsnr(t), eps), expected, rtol=1e-9, atol=1e-12)


CONTROLS: dict[str, tuple[Control, Tensor]] = {
    **{kind: (control, MEAN + _normals(6, *SHAPE, seed=2)) for kind, control in LINEAR.items()},
    "levels": (_levels_control()[0], Bins(5).centers(torch.float64)[torch.arange(24).reshape(6, *SHAPE) % 5]),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_the_mean_of_the_squared_error_is_known(name: str) -> None:
    """Against the trapezoidal rule in one dimension, or Gauss-Hermite for a quadratic in four."""
    control, x = CONTROLS[name]
    ones = torch.ones(1, dtype=torch.float64)
    for logsnr in LOGSNR:
        known = control.integral(logsnr[None], ones)(x)
        if name == "levels":
            e = torch.linspace(-9, 9, 1801, dtype=torch.float64)
            w = torch.exp(-0.5 * e.square()) / math.sqrt(2 * math.pi) * (e[1] - e[0])
            pixels = x.reshape(-1, 1, 1)
            found = control.error(pixels, logsnr.expand(len(pixels), len(e)), e[:, None].expand(len(pixels), -1, 1)) @ w
            found = found.reshape(len(x), -1).sum(1)
        else:
            nodes, weights = np.polynomial.hermite_e.hermegauss(2)
            e = torch.cartesian_prod(*[torch.from_numpy(nodes)] * 4).reshape(-1, *SHAPE)
            w = torch.cartesian_prod(*[torch.from_numpy(weights)] * 4).prod(1) / (2 * math.pi) ** 2
            found = control.error(x[:, None], logsnr.expand(len(x), len(e)), e) @ w
        torch.testing.assert_close(found, known, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CONTROLS)
def test_errors_keep_float32_and_broadcast(name: str) -> None:
    control, x = CONTROLS[name]
    eps, logsnr = _normals(len(x), 3, *SHAPE), LOGSNR[:3].expand(len(x), 3)
    together = control.error(x[:, None], logsnr, eps)
    alone = torch.stack([control.error(x, logsnr[:, k], eps[:, k]) for k in range(3)], 1)
    torch.testing.assert_close(together, alone)
    single = control.error(x[:, None].float(), logsnr, eps.float())
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, together, rtol=1e-3, atol=1e-4)


def test_the_integral_over_all_levels_is_the_closed_form() -> None:
    """INT d logsnr of the mean is (1 - y^2 / c^2) / (1 + rho c^2) + log (1 + rho c^2) between the ends, per axis."""
    variances = torch.tensor([0.2, 3.0], dtype=torch.float64)
    control, x = LinearGaussian.of(torch.zeros(2), variances), _normals(5, 2)
    model = VPSDE(GaussianOracle([0.0, 0.0], [1.0, 1.0]), VP(LinearLogSNR(8, -6)))
    at = model.levels.nodes(model.path, 128)

    def primitive(logsnr: float) -> Tensor:
        r = math.exp(logsnr) * variances
        return ((1 - x.square() / variances) / (1 + r) + torch.log1p(r)).sum(1)

    found = control.integral(model.path.logsnr(at.t), at.weight)(x)
    torch.testing.assert_close(found, primitive(8) - primitive(-6), rtol=1e-12, atol=1e-12)


def test_a_covariance_is_fitted_to_few_data() -> None:
    x = _normals(20, 6) @ (torch.eye(6, dtype=torch.float64) + 0.3)
    x[:, 2] = 0.5  # a constant pixel
    few = LinearGaussian.fit(x.float().reshape(20, 2, 3))
    assert few.axes is not None
    cov = few.axes * few.variances @ few.axes.mT
    torch.testing.assert_close(cov.diagonal(), torch.cov(x.mT).diagonal(), rtol=1e-5, atol=1e-6)
    off = ~torch.eye(6, dtype=torch.bool)
    share = cov[off].norm() / torch.cov(x.mT)[off].norm()
    assert 0.3 < float(share) < 0.95  # correlations are shrunk, and variances are not
    assert float(few.variances.min()) < 1e-9
    assert float(LinearGaussian.fit(_normals(20_000, 6)).variances.sub(1).abs().max()) < 0.05
    assert bool(few.error(x.reshape(20, 2, 3), LOGSNR[:4].repeat(5), _normals(20, 2, 3)).isfinite().all())


def test_fewer_data_than_dimensions_and_large_events() -> None:
    for n in (1, 2, 3):
        few = LinearGaussian.fit(_normals(n, 9))
        assert float(few.variances.min()) >= 0
        assert bool(few.integral(LOGSNR, torch.ones(5, dtype=torch.float64))(_normals(4, 9)).isfinite().all())
    large = LinearGaussian.fit(_normals(30, 3, 8), limit=16)
    assert large.axes is None
    torch.testing.assert_close(large.variances, _normals(30, 24).var(0))
    assert repr(large) == "LinearGaussian(24 coordinates, diagonal covariance of 30 examples)"


def test_what_is_no_covariance_is_refused() -> None:
    for call, words in (
        (lambda: LinearGaussian.of(torch.zeros(2), -torch.eye(2)), "negative eigenvalues"),
        (lambda: LinearGaussian.of(torch.zeros(2), torch.eye(3)), r"of 2 coordinates is not of shape \(3, 3\)"),
        (lambda: LinearGaussian(torch.zeros(2), torch.ones(3)), r"2 coordinates take 2 variances"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# --- the control variate ----------------------------------------------------------------------------------------------


def _invented(*controls: Control) -> ControlVariate:
    """Any coefficients and any density: what follows must be unbiased all the same."""
    knots = torch.linspace(-6, 8, 5, dtype=torch.float64)
    return ControlVariate(
        controls, knots, _normals(5, 1 + len(controls), seed=4), UniformLogSNR(), looks=1.0, calls=0, of=0
    )


@pytest.mark.parametrize("path", [VP(LinearLogSNR(8, -6)), VP(LinearLogSNR(8, -6)).on("flow")], ids=["vp", "flow"])
@pytest.mark.parametrize("T", [None, 3, 40])
def test_what_is_added_is_the_mean_of_what_is_subtracted(T: int | None, path: GaussianPath) -> None:
    """For every coefficient and for every measure of the levels, by quadrature over the levels and the noise."""
    model = VPSDE(GaussianOracle([0.0], [0.25]), path)
    if T is not None:
        model = model.discretize(T, variance="beta", grid="logsnr")
    x = _normals(4, 1)
    variances = torch.tensor([0.4]), torch.tensor([1.0])
    variate = _invented(*(LinearGaussian.of(torch.full((1,), 0.3), variance) for variance in variances))
    e, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    at = model.levels.nodes(path, 2048)
    logsnr = path.logsnr(at.t)
    g = variate(x[:, None, None], logsnr[:, None].expand(4, -1, 3), e[:, None].expand(4, len(logsnr), 3, 1))
    mean = 0.5 * ((g @ w) / math.sqrt(2 * math.pi) * at.weight).sum(1)
    torch.testing.assert_close(variate.integral(model.levels, path)(x), mean, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("edges", [[-6.0, 8.0], [-6.0, -5.1, 0.3, 0.4, 8.0], [-5.0, 1.0, 7.0]], ids=len)
def test_averages_over_bands_are_known(edges: list[float]) -> None:
    """Where bands end between the corners of the coefficients, too; against a fine trapezoid."""
    linear, grey = (
        LinearGaussian.of(torch.full((1,), 0.3), torch.tensor([0.4])),
        Bins(5).value(torch.arange(5)[:, None]),
    )
    for control, data in ((linear, _normals(4, 1)), (_levels_control()[0], grey.double())):
        made = _invented(control)
        ends = torch.tensor(edges, dtype=torch.float64)
        found = made.averages(ends)(data)
        assert found.shape == (len(data), len(edges) - 1)
        e, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(80))
        for k, (low, high) in enumerate(pairwise(edges)):
            logsnr = low + (high - low) * (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
            level, noise = logsnr[:, None].expand(len(data), -1, 80), e[:, None].expand(len(data), 2000, 80, 1)
            mean = (made(data[:, None, None], level, noise) @ w / math.sqrt(2 * math.pi)).mean(1)
            torch.testing.assert_close(found[:, k], mean, rtol=2e-3, atol=2e-3)


def test_one_call_gives_many_sums() -> None:
    weight = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for control, x in CONTROLS.values():
        together = control.integral(LOGSNR, weight)(x)
        alone = torch.stack([control.integral(LOGSNR, w)(x) for w in weight.unbind(1)], 1)
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_for_gaussian_data_nothing_is_left_to_chance() -> None:
    truth = GaussianOracle([0.3, -0.2], [[0.5, 0.2], [0.2, 0.3]])
    model, x = VPSDE(truth, VP(LinearLogSNR(9, -9))), truth.sample(40, seed=0)
    exact = LinearGaussian.of(torch.tensor([0.3, -0.2]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
    report = bound(model, x, control=exact)
    assert report.estimator_se < 1e-6 * bound(model, x, control=None).estimator_se
    assert report.nats == pytest.approx(-float(truth.log_prob(x).mean()), abs=1e-3)  # the ends


def test_the_pilot_knows_what_helps_where() -> None:
    """Independent pixels: the linear denoiser is of use in noise, that of levels everywhere, and exactly."""
    p = [0.6, 0.0, 0.1, 0.0, 0.3]
    truth = PixelOracle(np.tile(p, (1, 2, 2, 1)), Bins(5).centers(torch.float64).numpy())
    model = VPSDE(truth, VP(LinearLogSNR(8, -6)), decoder=SoftmaxDecoder(Bins(5)), event_shape=(1, 2, 2))
    x = truth.sample(200, seed=0)
    both = pilot(model, x, pairs=300)
    assert [type(c) for c in both.controls] == [LinearGaussian, IndependentLevels]
    assert both.calls == 600
    lone = pilot(model, x, controls=controls_for(model, x)[:1], pairs=300)
    share = lone.coefficients[:, 1]
    assert float(share[2]) > 0.5
    assert float(share[-1].abs()) < 0.1  # near the data the network rounds and a linear denoiser does not
    errors = [bound(model, x, control=control, seed=1).estimator_se for control in (None, lone, both)]
    assert errors[0] > 1.2 * errors[1] > 20 * errors[2]


def test_a_pilot_of_one_data_set_serves_another_and_any_levels() -> None:
    truth = oracle("mixture2d")
    model = VPSDE(truth, VP(LinearLogSNR(8, -6)))
    variate = pilot(model, truth.sample(300, seed=1), pairs=200)
    x = truth.sample(64, seed=0)
    for levels in (Continuous(), Discrete.on(model.path, 20)):
        plain, better = (bound(model.with_levels(levels), x, control=c, seed=3) for c in (None, variate))
        assert better.estimator_se < 0.8 * plain.estimator_se
        assert better.forward == plain.forward  # a finished pilot is not paid for again
        assert abs(better.nats - plain.nats) < 4 * math.hypot(better.estimator_se, plain.estimator_se)


def test_the_density_follows_the_noise_that_is_left() -> None:
    """Draws are proportional to the standard deviation of the integrand: the best for stratified levels."""
    truth = oracle("mixture2d")
    model, x = VPSDE(truth, VP(Cosine(), t_min=0.01, t_max=0.99)).discretize(10), truth.sample(64, seed=0)
    variate = pilot(model, x, pairs=400)
    uniform = replace(variate, density=UniformLogSNR())
    good, bad = (bound(model, x, control=c, draws=32, repeats=4) for c in (variate, uniform))
    assert good.estimator_se < 0.8 * bad.estimator_se
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    at = model.levels.draw(model.path, u, variate.density)
    assert float(at.weight.mean()) == pytest.approx(float(model.levels.mass(model.path).sum()), rel=1e-3)  # type: ignore[attr-defined]


def test_what_is_no_control_is_refused() -> None:
    truth = oracle("mixture2d")
    model, x = VPSDE(truth), truth.sample(8, seed=0)
    vae = VAE.mlp((2,), GaussianHead(), latent=1, width=4)
    with pytest.raises(ValueError, match='control is "auto"'):
        bound(model, x, control="linear")
    with pytest.raises(ValueError, match="for diffusions, and this model is a VAE"):
        bound(vae, x.float(), control=LinearGaussian.fit(x))
    with pytest.raises(ValueError, match="at least one pair"):
        pilot(model, x, pairs=0)
    with pytest.raises(ValueError, match=r"the pilot looked at logsnr 10 to -10, .* make one for this model"):
        bound(VPSDE(truth, VP(LinearLogSNR(9, -10))), x, control=pilot(model, x, pairs=20))
    assert variate_for("auto", vae, x) is None
    assert variate_for("auto", model, x[:2]) is None  # too few draws to learn from


def test_the_default_has_a_tenth_of_the_variance_of_one_time_per_image() -> None:
    """At equal network calls, the pilot's included, in 64 dimensions (the factor is about a hundred)."""
    truth = oracle("mixture64")
    model, x = VPSDE(truth, VP(LinearLogSNR(13.3, -5))), truth.sample(24, seed=0)
    default, naive = bound(model, x, max_nfe=64), bound(model, x, draws=1, repeats=64, control=None)
    assert default.forward <= naive.forward
    assert default.estimator_se**2 < naive.estimator_se**2 / 10
    assert abs(default.nats - naive.nats) < 4 * math.hypot(default.estimator_se, naive.estimator_se)
