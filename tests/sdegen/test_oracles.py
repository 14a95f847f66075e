"""Oracles against independent formulas: torch.distributions, autograd, quadrature and mpmath."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.func import hessian, jacrev, vmap

from sdegen.oracles import ORACLES, GaussianOracle, MixtureOracle, Oracle, PixelOracle, oracle
from sdegen.paths import PATHS, VE, VP, Flow, GaussianPath, LinearLogSNR
from solvers import expand, standard_normal

ONE = torch.ones((), dtype=torch.float64)
PIXELS = PixelOracle([[[0.2, 0.5, 0.3], [0.0, 0.1, 0.9]], [[1.0, 0.0, 0.0], [0.4, 0.4, 0.2]]], [-0.7, 0.1, 0.6])


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> GaussianPath:
    return PATHS[request.param]()


@pytest.fixture(params=[*ORACLES, "atoms", "image", "pixels"])
def data(request: pytest.FixtureRequest) -> Oracle:
    match request.param:
        case "atoms":
            return MixtureOracle([0.3, 0.7], [[-1.0, 0.5], [0.4, 0.2]], np.zeros((2, 2)))
        case "image":
            return GaussianOracle(np.linspace(-1, 1, 12).reshape(3, 2, 2), np.geomspace(1e-4, 1, 12))
        case "pixels":
            return PIXELS
        case name:
            return oracle(name)


def ends_and_middle(path: GaussianPath) -> list[float]:
    return [path.t_min, (path.t_min + path.t_max) / 2, path.t_max]


def diffused(data: Oracle, path: GaussianPath, t: Tensor | float, n: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    x, eps = data.sample(n, seed=3), standard_normal((n, *data.event_shape), seed=5, dtype=torch.float64)
    return x, eps, expand(path.alpha(t), x) * x + expand(path.sigma(t), x) * eps


# --- Densities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORACLES)
def test_log_density_is_that_of_torch_distributions_at_every_level(name: str, path: GaussianPath) -> None:
    mix = ORACLES[name]()
    assert isinstance(mix, MixtureOracle)

    def reference(z: Tensor, a: Tensor, s: Tensor) -> Tensor:
        covs = a**2 * mix.covs + s**2 * torch.eye(mix.covs.shape[-1], dtype=torch.float64)
        parts = MultivariateNormal(a * mix.means, covs)
        return MixtureSameFamily(Categorical(mix.weights), parts).log_prob(z)

    x = mix.sample(20, seed=0)
    torch.testing.assert_close(mix.log_prob(x), reference(x, ONE, 0 * ONE), rtol=1e-10, atol=1e-9)
    for t in ends_and_middle(path):
        z = diffused(mix, path, t)[2]
        exact = reference(z, path.alpha(t), path.sigma(t))
        torch.testing.assert_close(mix.log_prob_t(z, path, t), exact, rtol=1e-10, atol=1e-9)


def test_the_score_is_the_gradient_of_the_log_density(data: Oracle, path: GaussianPath) -> None:
    for t in ends_and_middle(path):
        z = diffused(data, path, t)[2].requires_grad_()
        (gradient,) = torch.autograd.grad(data.log_prob_t(z, path, t).sum(), z)
        torch.testing.assert_close(data.score(z, path, t), gradient, rtol=1e-9, atol=1e-10 / path.sigma(t).item())


# --- Moments ----------------------------------------------------------------------------------------------------------


def test_the_prediction_is_tied_at_both_ends(data: Oracle, path: GaussianPath) -> None:
    for t in ends_and_middle(path):
        z = diffused(data, path, t)[2]
        x0, eps = data.predict(path)(z, torch.tensor(t, dtype=torch.float64))
        tied = path.alpha(t) * x0 + path.sigma(t) * eps
        torch.testing.assert_close(tied, z, rtol=1e-12, atol=1e-12 * path.sigma(t).item())


def test_each_prediction_is_accurate_where_the_other_would_cancel() -> None:
    """In 50 digits, at noise levels far beyond use, where (z - sigma eps) / alpha keeps no digit of x0."""
    mix = MixtureOracle([0.3, 0.7], [[-0.8], [0.5]], [[0.04], [0.01]])
    path = VP(LinearLogSNR(max=50.0, min=-50.0))
    for t in (0.0, 0.1, 0.5, 0.9, 1.0):
        x, _, z = diffused(mix, path, t)
        predicted = mix.predict(path)(z, torch.tensor(t, dtype=torch.float64))
        with mpmath.workdps(50):
            snr = mpmath.exp(path.logsnr(t).item())
            a, s = mpmath.sqrt(snr / (1 + snr)), mpmath.sqrt(1 / (1 + snr))
            for i in range(len(x)):
                y, p, x0, eps = mpmath.mpf(z[i].item()), [], [], []
                for w, mu, d in ((0.3, -0.8, 0.04), (0.7, 0.5, 0.01)):
                    v, r = a**2 * mpmath.mpf(d) + s**2, y - a * mpmath.mpf(mu)
                    p.append(mpmath.mpf(w) * mpmath.exp(-(r**2) / v / 2) / mpmath.sqrt(v))
                    x0.append(mpmath.mpf(mu) + a * mpmath.mpf(d) / v * r)
                    eps.append(s / v * r)
                for found, parts in ((predicted.x0, x0), (predicted.eps, eps)):
                    exact = sum(q * m for q, m in zip(p, parts, strict=True)) / sum(p)
                    assert found[i].item() == pytest.approx(float(exact), rel=1e-12)


def test_posterior_moments_are_integrals_over_x0(path: GaussianPath) -> None:
    """Brute force in one dimension: the trapezium rule on q(z | x) p(x), which converges exponentially."""
    mix = MixtureOracle([0.3, 0.7], [[-0.8], [0.5]], [[0.04], [0.01]])
    for t in (path.time(logsnr).item() for logsnr in (4.0, 0.0, -4.0)):
        z, (a, s) = diffused(mix, path, t)[2], (path.alpha(t), path.sigma(t))
        x = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
        log_joint = mix.log_prob(x[:, None]) - 0.5 * ((z - a * x) / s) ** 2
        p = log_joint.softmax(1)
        mean = (p * x).sum(1, keepdim=True)
        variance = (p * (x - mean) ** 2).sum(1)
        torch.testing.assert_close(mix.posterior_mean(z, path, t), mean, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(mix.posterior_cov(z, path, t)[:, 0, 0], variance, rtol=1e-9, atol=1e-12)
        evidence = log_joint.logsumexp(1) + math.log(6 / 60_000) - torch.log(s) - 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(mix.log_prob_t(z, path, t), evidence, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["mixture16", "mixture64", "curve16"])
def test_thin_sheets_are_predicted_by_their_long_axes(
    name: str, path: GaussianPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against all axes of every component, between the data and the noise."""
    data = oracle(name)
    for t in torch.linspace(path.t_min, path.t_max, 7, dtype=torch.float64):
        z = diffused(data, path, t)[2]
        quick = data.predict(path)(z, t)
        with monkeypatch.context() as patch:
            patch.setattr(data, "_long", None)
            plain = data.predict(path)(z, t)
        for a, b in zip(quick, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
            assert not torch.equal(a, b)


def test_tweedie_ties_mean_and_covariance_to_the_score(data: Oracle, path: GaussianPath) -> None:
    """E[x0|z] = (z + sigma^2 score) / alpha and Cov[x0|z] = (sigma/alpha)^2 (I + sigma^2 Hessian), by torch.func."""
    t = path.time(0.5)
    z, a, s = diffused(data, path, t, n=3)[2], path.alpha(t), path.sigma(t)
    mean = (z + s**2 * data.score(z, path, t)) / a
    torch.testing.assert_close(data.posterior_mean(z, path, t), mean, rtol=1e-10, atol=1e-11)
    size = math.prod(data.event_shape)
    jacobian = vmap(jacrev(lambda y: data.score(y[None], path, t)[0]))(z).reshape(3, size, size)
    cov = (s / a) ** 2 * (torch.eye(size, dtype=torch.float64) + s**2 * jacobian)
    torch.testing.assert_close(data.posterior_cov(z, path, t), cov, rtol=1e-9, atol=1e-11)
    if size <= 2:
        curvature = vmap(hessian(lambda y: data.log_prob_t(y[None], path, t)[0]))(z).reshape(3, size, size)
        torch.testing.assert_close(jacobian, curvature, rtol=1e-8, atol=1e-9)


def test_a_gaussian_is_the_wiener_filter(path: GaussianPath) -> None:
    """Linear in z, with the matrix that textbooks invert: x0 = mu + a S (a^2 S + s^2 I)^-1 (z - a mu)."""
    mu, cov = np.array([0.3, -0.5, 0.1]), np.array([[0.5, 0.2, 0.0], [0.2, 0.3, -0.1], [0.0, -0.1, 0.2]])
    normal, mean, sigma = GaussianOracle(mu, cov), torch.tensor(mu), torch.tensor(cov)
    for t in ends_and_middle(path):
        z, a, s = diffused(normal, path, t)[2], path.alpha(t), path.sigma(t)
        total = a**2 * sigma + s**2 * torch.eye(3, dtype=torch.float64)
        gain = a * torch.linalg.solve(total, sigma).T
        wiener = mean + (z - a * mean) @ gain.T
        torch.testing.assert_close(normal.posterior_mean(z, path, t), wiener, rtol=1e-10, atol=1e-12)
        within = sigma - a * gain @ sigma
        torch.testing.assert_close(normal.posterior_cov(z, path, t)[2], within, rtol=1e-6, atol=1e-12)


def test_times_may_differ_per_sample(data: Oracle, path: GaussianPath) -> None:
    t = torch.linspace(path.t_min, path.t_max, 5, dtype=torch.float64)
    z = diffused(data, path, t, n=5)[2]
    together, log_prob = data.predict(path)(z, t), data.log_prob_t(z, path, t)
    for i in range(5):
        alone = data.predict(path)(z[i : i + 1], t[i])
        torch.testing.assert_close(together.x0[i], alone.x0[0], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(together.eps[i], alone.eps[0], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(log_prob[i], data.log_prob_t(z[i : i + 1], path, t[i])[0], rtol=1e-12, atol=1e-11)
        assert data.posterior_cov(z, path, t).shape == (5, *2 * (math.prod(data.event_shape),))


def test_float32_states_get_float32_answers_of_float32_accuracy(data: Oracle, path: GaussianPath) -> None:
    for t in ends_and_middle(path):
        z = diffused(data, path, t)[2].float()
        exact = data.predict(path)(z.double(), torch.tensor(t, dtype=torch.float64))
        found = data.predict(path)(z, torch.tensor(t, dtype=torch.float64))
        for a, b in zip(found, exact, strict=True):
            assert (a.dtype, a.shape) == (torch.float32, z.shape)
            assert torch.equal(a, b.float())
        assert data.log_prob_t(z, path, t).dtype == torch.float64


@pytest.mark.parametrize("name", ["gaussian", "mixture2d", "ring", "grid"])
def test_answers_in_the_plane_do_not_depend_on_the_batch(name: str, path: GaussianPath) -> None:
    data, t = oracle(name), torch.tensor(0.4, dtype=torch.float64)
    z = diffused(data, path, t, n=257)[2]
    together = data.predict(path)(z, t)
    for some in (slice(17, 18), slice(0, 3), slice(100, 164)):
        alone = data.predict(path)(z[some], t)
        assert torch.equal(alone.x0, together.x0[some])
        assert torch.equal(alone.eps, together.eps[some])


# --- A denoiser that is wrong on purpose ------------------------------------------------------------------------------


def test_a_wrong_score_is_wrong_by_kappa_and_still_tied(data: Oracle, path: GaussianPath) -> None:
    t = path.time(1.0)
    z = diffused(data, path, t)[2]
    right, wrong = data.problem(path), data.problem(path, kappa=0.95)
    torch.testing.assert_close(wrong.score(z, t), 0.95 * right.score(z, t), rtol=1e-13, atol=1e-13)
    x0, eps = wrong.predict(z, t)
    torch.testing.assert_close(path.alpha(t) * x0 + path.sigma(t) * eps, z, rtol=1e-12, atol=1e-12)


def test_a_wrong_score_gives_the_known_ode_likelihood() -> None:
    """On N(0, c^2) the ODE with kappa times the score is z' = a(t) z, and log p(x) = log N(m x; 0, 1) + log m.

    With l = logsnr and v = alpha^2 c^2 + sigma^2, log m = INT a dt = INT (sigma^2 - kappa sigma^2 / v) / 2 dl, whose
    primitive is [l - log(1 + e^l)] / 2 - kappa [l - log(1 + c^2 e^l)] / 2.
    """
    c2, top, bottom, x = 0.25, 13.3, -10.0, 0.5
    path, data = VP(LinearLogSNR(max=top, min=bottom)), GaussianOracle([0.0], [c2])
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(200))

    def primitive(logsnr: float, kappa: float) -> float:
        return (logsnr - math.log1p(math.exp(logsnr)) - kappa * (logsnr - math.log1p(c2 * math.exp(logsnr)))) / 2

    for kappa in (1.0, 0.95):
        velocity = data.problem(path, kappa=kappa).velocity(torch.ones(200, 1, dtype=torch.float64), (1 + nodes) / 2)
        log_m = (weights / 2 * velocity[:, 0]).sum().item()
        assert log_m == pytest.approx(primitive(bottom, kappa) - primitive(top, kappa), rel=1e-12)
        nll = (x**2 * math.exp(2 * log_m) + math.log(2 * math.pi)) / 2 - log_m
        assert nll == pytest.approx({1.0: 0.7257914, 0.95: 0.7934138}[kappa], abs=1e-7)
    assert -data.log_prob(torch.tensor([[x]])).item() == pytest.approx(0.7257914, abs=1e-4)  # up to the end points


# --- Samples ----------------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_seed_and_number_alone(data: Oracle) -> None:
    before = torch.get_rng_state()
    many = data.sample(300, seed=11)
    assert torch.equal(torch.get_rng_state(), before)
    assert (many.shape, many.dtype) == ((300, *data.event_shape), torch.float64)
    for n in (1, 18, 64):
        assert torch.equal(data.sample(n, seed=11), many[:n])
    assert not torch.equal(data.sample(300, seed=12), many)


def test_data_and_noise_of_one_seed_are_independent() -> None:
    data = GaussianOracle(np.zeros(3), np.ones(3))
    x, noise = data.sample(4000, seed=1), standard_normal((4000, 4), seed=1, dtype=torch.float64)
    assert torch.corrcoef(torch.cat([x, noise], 1).T).sub(torch.eye(7)).abs().max() < 0.08


@pytest.mark.parametrize("name", ORACLES)
def test_samples_have_the_moments_of_the_mixture(name: str) -> None:
    """Whitened, mean and covariance of n samples are off by O(sqrt(D/n)): bounds at about five standard errors."""
    mix, n = ORACLES[name](), 20_000
    assert isinstance(mix, MixtureOracle)
    mean = mix.weights @ mix.means
    apart = mix.means - mean
    cov = torch.einsum("k,kij->ij", mix.weights, mix.covs + apart[:, :, None] * apart[:, None, :])
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (mix.sample(n, seed=7) - mean).T, upper=False)
    size = len(mean)
    assert white.mean(1).square().sum() * n < size + 5 * math.sqrt(2 * size)
    assert (white @ white.T / n - torch.eye(size)).abs().max() < 6 * math.sqrt(2 / n)


@pytest.mark.parametrize("name", ["gaussian", "mixture2d", "mixture64"])
def test_the_mean_log_density_of_samples_is_minus_the_entropy(name: str) -> None:
    """E log p = -entropy; for the Gaussian in closed form, else between the bounds known for mixtures."""
    mix = ORACLES[name]()
    assert isinstance(mix, MixtureOracle)
    log_prob = mix.log_prob(mix.sample(4_000, seed=2))
    parts = 0.5 * torch.logdet(2 * math.pi * math.e * mix.covs)
    low = (mix.weights * parts).sum()
    high = low - (mix.weights * mix.weights.log()).sum()
    error = 4 * log_prob.std() / math.sqrt(len(log_prob))
    assert low - error <= -log_prob.mean() <= high + error


# --- Pixels -----------------------------------------------------------------------------------------------------------


def test_independent_pixels_are_a_product_of_their_tables() -> None:
    levels = torch.cartesian_prod(*[PIXELS.values] * 4).reshape(-1, 2, 2)
    assert PIXELS.log_prob(levels).exp().sum().item() == pytest.approx(1, abs=1e-14)
    x = torch.tensor([[[0.1, 0.6], [-0.7, -0.7]], [[0.1, -0.7], [-0.7, 0.1]], [[0.2, 0.6], [-0.7, 0.1]]])
    torch.testing.assert_close(PIXELS.log_prob(x).exp(), torch.tensor([0.5 * 0.9 * 0.4, 0.0, 0.0]).double())


def test_pixels_are_the_mixture_of_all_their_images(path: GaussianPath) -> None:
    images = torch.cartesian_prod(*[PIXELS.values] * 4).reshape(-1, 2, 2)
    weights = PIXELS.log_prob(images).exp()
    some = weights > 0
    atoms = MixtureOracle(weights[some].numpy(), images[some].numpy(), np.zeros((int(some.sum()), 4)))
    for t in ends_and_middle(path):
        z = diffused(PIXELS, path, t)[2]
        torch.testing.assert_close(PIXELS.log_prob_t(z, path, t), atoms.log_prob_t(z, path, t), rtol=1e-9, atol=1e-9)
        for a, b in zip(PIXELS.predict(path)(z, ONE * t), atoms.predict(path)(z, ONE * t), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        cov = atoms.posterior_cov(z, path, t)
        torch.testing.assert_close(PIXELS.posterior_cov(z, path, t), cov, rtol=1e-9, atol=1e-9)


def test_pixel_samples_have_the_frequencies_of_the_table() -> None:
    x = PIXELS.sample(20_000, seed=4)
    found = (x[..., None] == PIXELS.values).double().mean(0)
    assert (found - PIXELS.probs).abs().max() < 4 * 0.5 / math.sqrt(20_000)
    assert (found[PIXELS.probs == 0] == 0).all()


# --- Behaviour --------------------------------------------------------------------------------------------------------


def test_a_problem_is_made_in_one_call() -> None:
    problem = oracle("mixture2d").problem(VE())
    z = torch.zeros(3, 2)
    assert problem.velocity(z, torch.tensor(0.5, dtype=torch.float64)).dtype == torch.float32
    assert problem.path == VE()
    assert repr(oracle("grid")) == "MixtureOracle(25 components, event_shape=(2,))"


def test_the_yardstick_does_not_change() -> None:
    """A change of the ready-made oracles changes what errors measured on them mean."""
    x = torch.tensor([[0.1, 0.2]], dtype=torch.float64)
    found = {name: oracle(name).log_prob(x).item() for name in ("gaussian", "mixture2d", "ring", "grid")}
    found |= {f"mixture{size}": oracle(f"mixture{size}").log_prob(torch.zeros(1, size)).item() for size in (16, 64)}
    kept = {"gaussian": -1.9069551241344407, "mixture2d": -3.9304102277317003, "ring": -123.50209647269847}
    kept |= {"grid": -3.891621318525453, "mixture16": -463.0499779569054, "mixture64": -2167.095989346403}
    assert found == pytest.approx(kept, rel=1e-10)


def test_everything_follows_the_device_of_z(data: Oracle, path: GaussianPath) -> None:
    """The meta device holds no numbers, and refuses to mix with tensors of another device."""
    z, t = torch.zeros(4, *data.event_shape, device="meta"), torch.full((4,), 0.5, dtype=torch.float64)
    for time in (t, t.to("meta"), t[0]):
        for found in (*data.predict(path)(z, time), data.score(z, path, time), data.posterior_cov(z, path, time)):
            assert (found.device.type, found.dtype) == ("meta", z.dtype)
        assert data.log_prob_t(z, path, time).shape == (4,)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: oracle("mixture2"), "did you mean 'mixture2d'"),
        (lambda: MixtureOracle([0.5, -0.5], [[0.0], [1.0]], [[1.0], [1.0]]), "weights must be"),
        (lambda: MixtureOracle([1.0], [[0.0], [1.0]], [[1.0], [1.0]]), r"K=1, got \(2, 1\)"),
        (lambda: MixtureOracle([1.0], [[0.0, 1.0]], [[[1.0]]]), r"covs must be \(1, 2, 2\), got \(1, 1, 1\)"),
        (lambda: GaussianOracle([0.0, math.nan], [1.0, 1.0]), "must be finite"),
        (lambda: GaussianOracle([0.0, 0.0], [[1.0, 0.5], [0.4, 1.0]]), "symmetric"),
        (lambda: GaussianOracle([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), "positive semi-definite"),
        (lambda: GaussianOracle([0.0], [0.0]).log_prob(torch.zeros(1, 1)), "no density"),
        (lambda: PixelOracle([[0.5, -0.5]], [0.0, 1.0]), "probabilities"),
        (lambda: PixelOracle([[0.5, 0.5]], [0.0, 0.0]), "different"),
        (lambda: PixelOracle([[0.5, 0.5]], [0.0, 1.0, 2.0]), "V=3"),
        (lambda: oracle("gaussian").predict(Flow())(torch.zeros(4, 3), ONE / 2), r"z must be \(B, 2\), got \(4, 3\)"),
    ],
)
def test_bad_input_is_one_clear_line(make: object, says: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=says) as error:
        make()
    assert "\n" not in str(error.value)
