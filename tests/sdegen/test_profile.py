"""The profile against closed forms and against direct estimation: one pass, and nothing else is asked."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from truths import C2, OfAClass, X

from sdegen import likelihood_plots
from sdegen.bins import Bins
from sdegen.decoders import GaussianDecoder, TweedieDecoder
from sdegen.densities import UniformLogSNR
from sdegen.levels import Continuous, Discrete, Interpolated, Optimal, Variance
from sdegen.likelihood import DenoisingProfile, best_grid, bound, bound_of_every_T, denoising_profile
from sdegen.likelihood.control import LinearGaussian
from sdegen.likelihood.curve import ErrorCurve
from sdegen.likelihood.variate import pilot
from sdegen.models import VPSDE, pixel_histogram
from sdegen.objectives import OBJECTIVES, Objective
from sdegen.oracles import GaussianOracle, oracle
from sdegen.paths import VP, Cosine, LinearLogSNR
from sdegen.results import read, write
from solvers.analytic import AnalyticDPM, GaussianMSE

COV = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)
GAUSSIAN = GaussianOracle([0.2, -0.1], COV)
LINEAR = LinearGaussian.of(torch.tensor([0.2, -0.1]), COV)
MIXTURE = oracle("mixture2d")


def _close(a: float, b: float, *ses: float) -> None:
    assert abs(a - b) < 4 * math.sqrt(sum(se**2 for se in ses))


@pytest.fixture(scope="module")
def gaussian() -> DenoisingProfile:
    model = VPSDE(GAUSSIAN, VP(LinearLogSNR(9, -7)))
    return denoising_profile(model, GAUSSIAN.sample(800, seed=0), bands=32, linear=LINEAR)


@pytest.fixture(scope="module")
def mixture() -> DenoisingProfile:
    return denoising_profile(VPSDE(MIXTURE, VP(Cosine())), MIXTURE.sample(1500, seed=0), bands=32)


# --- the curve --------------------------------------------------------------------------------------------------------


def test_the_error_of_gaussian_data_is_that_of_the_linear_denoiser(gaussian: DenoisingProfile) -> None:
    z = (gaussian.error - gaussian.linear) / gaussian.estimator_se
    assert float(z.square().mean()) == pytest.approx(1, abs=0.75)  # chi^2 / 32
    rho = gaussian.logsnr.exp()
    c2 = torch.linalg.eigvalsh(COV)
    expected = (rho[:, None] * c2 / (1 + rho[:, None] * c2)).sum(1)
    z = (gaussian.error - expected) / torch.hypot(gaussian.estimator_se, gaussian.data_se.nan_to_num())
    assert float(z.abs().max()) < 4.5


def test_the_three_errors_are_one(gaussian: DenoisingProfile) -> None:
    rho = gaussian.logsnr.exp()
    torch.testing.assert_close(rho * gaussian.x0_error, gaussian.error)
    torch.testing.assert_close(gaussian.v_error * rho / (1 + rho), gaussian.error)
    torch.testing.assert_close(gaussian.mse(gaussian.logsnr) * 2, gaussian.x0_error, rtol=0.05, atol=0)


def test_the_curve_has_the_measured_averages_and_sees_smooth_errors_between() -> None:
    edges = torch.linspace(-7, 9, 33, dtype=torch.float64)

    def primitive(l: Tensor) -> Tensor:
        return torch.log1p(0.3 * l.exp())

    curve = ErrorCurve(edges, primitive(edges).diff() / edges.diff())
    fine = torch.linspace(-7, 9, 501, dtype=torch.float64)
    torch.testing.assert_close(curve.noise(fine), torch.sigmoid(fine + math.log(0.3)), rtol=0, atol=2e-4)
    torch.testing.assert_close(curve.weights(fine).sum(1), torch.ones(501, dtype=torch.float64))
    x, w = np.polynomial.legendre.leggauss(4)
    inside = edges[:-1, None] + 0.5 * (torch.from_numpy(x) + 1)[None] * edges.diff()[:, None]
    averages = (curve.noise(inside) * torch.from_numpy(w / 2)).sum(1)
    torch.testing.assert_close(averages, curve.errors, rtol=1e-12, atol=0)
    assert float(curve(fine[313])) == pytest.approx(float(curve(fine)[313]), rel=1e-12)  # 0-dim, as solvers ask


def test_shares_add_up_to_the_latent_term(mixture: DenoisingProfile) -> None:
    assert float(mixture.share.sum()) == pytest.approx(1)
    assert float(mixture.nats.sum()) == pytest.approx(mixture.report.parts["latent"], rel=1e-9)
    assert mixture.report.nats == pytest.approx(sum(mixture.report.parts.values()), rel=1e-12)


# --- draws ------------------------------------------------------------------------------------------------------------


def test_a_control_variate_takes_noise_out_of_every_band(mixture: DenoisingProfile) -> None:
    """At the same noises and the same network calls but for the pilot's, the mean stays."""
    model, x = VPSDE(MIXTURE, VP(Cosine())), MIXTURE.sample(1500, seed=0)
    plain = denoising_profile(model, x, bands=32, control=None)
    assert torch.equal(plain.squares, mixture.squares)
    assert torch.equal(plain.squares, plain.estimates)
    off = (mixture.estimates - mixture.squares).mean((0, 1))
    error = (mixture.estimates - mixture.squares).std((0, 1)) / math.sqrt(2 * 1500)
    assert float((off / error).square().mean()) == pytest.approx(1, abs=0.75)  # chi^2 / 32
    assert float((mixture.estimator_se / plain.estimator_se).max()) < 1.02
    assert mixture.report.estimator_se < 0.7 * plain.report.estimator_se
    assert (plain.report.forward, mixture.report.forward) == (64, pytest.approx(64 + 1024 / 1500))


def test_of_gaussian_data_no_noise_is_left() -> None:
    model, x = VPSDE(GAUSSIAN, VP(LinearLogSNR(9, -7))), GAUSSIAN.sample(64, seed=0)
    found = denoising_profile(model, x, bands=11, repeats=2, linear=LINEAR, control=LINEAR)
    torch.testing.assert_close(found.error, found.linear, rtol=1e-3, atol=1e-6)
    assert float(found.estimator_se.max()) < 1e-3 * float(found.error.max())


def test_a_datum_has_its_own_noise_whatever_the_batch_and_the_shard() -> None:
    model, x = VPSDE(MIXTURE, VP(Cosine()), decoder=TweedieDecoder()), MIXTURE.sample(30, seed=0)
    common = {"bands": 12, "control": pilot(model.continuous(), x, pairs=40), "linear": LINEAR, "seed": 3}
    whole = denoising_profile(model, x, **common)
    for batch in (12, 130):
        again = denoising_profile(model, x, batch=batch, **common)
        torch.testing.assert_close(again.estimates, whole.estimates, rtol=0, atol=1e-9)
        torch.testing.assert_close(again.reconstruction, whole.reconstruction, rtol=0, atol=1e-9)
    parts = [denoising_profile(model, x[r.start : r.stop], samples=r, **common) for r in (range(11), range(11, 30))]
    one = DenoisingProfile.merged(parts)
    for name in ("squares", "estimates", "reconstruction", "prior", "linear", "error"):
        torch.testing.assert_close(getattr(one, name), getattr(whole, name), rtol=0, atol=1e-9)
    assert one.report.nats == pytest.approx(whole.report.nats, rel=1e-12)
    assert one.report.estimator_se == pytest.approx(whole.report.estimator_se, rel=1e-9)
    torch.testing.assert_close(whole.part(slice(11)).report.values, parts[0].report.values)
    other = denoising_profile(model, x, **{**common, "seed": 4})
    assert float((other.squares - whole.squares).abs().min()) > 0
    with pytest.raises(ValueError, match="30 data and 2 sample numbers"):
        denoising_profile(model, x, samples=range(2))


def test_labels_reach_the_network() -> None:
    x, labels = torch.cat([X, X + 1]).repeat(8, 1), torch.tensor([0] * 4 + [1] * 4).repeat(8)
    clean, early = (
        VPSDE(OfAClass(), VP(LinearLogSNR(end, -9)), decoder=TweedieDecoder())  # type: ignore[arg-type]
        for end in (9, 1)
    )
    own, other = (denoising_profile(clean, x, cond, batch=100).report for cond in (labels, 1 - labels))
    exact = -float(GaussianOracle([0.0], [C2]).log_prob(X).mean())
    assert own.nats == pytest.approx(exact, abs=4 * own.estimator_se + 0.02)
    assert other.nats > own.nats + 1
    own, other = (denoising_profile(early, x, cond).report for cond in (labels, 1 - labels))
    assert other.parts["reconstruction"] > own.parts["reconstruction"] + 0.2  # the decoder asks it, too


def test_calls_are_counted_whatever_the_model_did_before() -> None:
    x = MIXTURE.sample(20, seed=0)
    for decoder, looks in ((GaussianDecoder(), 0), (TweedieDecoder(), 8)):
        model = VPSDE(MIXTURE, VP(Cosine()), decoder=decoder)
        for _ in range(2):
            found = denoising_profile(model, x, bands=6, repeats=3, control=None)
            assert found.report.forward == 3 * (6 + looks)
            model.elbo(x, draws=7)


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_the_profile_has_the_bound(mixture: DenoisingProfile) -> None:
    direct = bound(VPSDE(MIXTURE, VP(Cosine())), MIXTURE.sample(1500, seed=0), draws=16, seed=9)
    _close(mixture.report.nats, direct.nats, mixture.report.estimator_se, direct.estimator_se)
    assert mixture.report.data_se == pytest.approx(direct.data_se, rel=0.3)
    assert mixture.report.forward >= 2 * 32


def test_the_profile_bound_is_calibrated() -> None:
    """z-scores against many more draws, over 60 seeds."""
    model, x = VPSDE(MIXTURE, VP(Cosine())), MIXTURE.sample(40, seed=0)
    levels = Discrete.on(model.path, 6)
    truth = denoising_profile(model, x, bands=16, repeats=400, seed=99)
    for kind in (Continuous(), levels):
        exact = truth.bound(kind).nats
        z = []
        for seed in range(60):
            found = denoising_profile(model, x, bands=16, repeats=6, seed=seed).bound(kind)
            z.append((found.nats - exact) / found.estimator_se)
        z = torch.tensor(z)
        assert abs(float(z.mean())) < 4 / math.sqrt(60)
        assert 0.75 < float(z.std()) < 1.3  # two standard errors of a standard deviation from 60


@pytest.mark.parametrize("T", [3, 20])
@pytest.mark.parametrize("kind", ["posterior", "beta", "optimal", "range"])
def test_the_bound_of_every_T_is_the_estimated_one(mixture: DenoisingProfile, T: int, kind: str) -> None:
    model = VPSDE(MIXTURE, VP(Cosine()))
    ts = Discrete.on(model.path, T).ts
    variances: dict[str, str | Variance] = {
        "optimal": Optimal(mixture.mse),
        "range": Interpolated.fit(model.path, ts, mixture.mse),
    }
    variance = variances.get(kind, kind)
    found = bound_of_every_T(mixture, [T], variance=variance)[T]
    x = MIXTURE.sample(1500, seed=0)
    direct = bound(model.discretize(T, variance=variance), x, draws=T, repeats=max(2, 30 // T), seed=7)
    _close(found.nats, direct.nats, found.estimator_se, direct.estimator_se)
    assert found.estimator_se < 0.1 * abs(found.nats)
    assert f"T={T}" in found.settings["levels"]


def test_the_optimal_form_is_the_logarithm(mixture: DenoisingProfile) -> None:
    path, ts = mixture.path, Discrete.on(mixture.path, 9).ts
    s, t = path.logsnr(ts[:-1]), path.logsnr(ts[1:])
    closed = torch.log1p((s.exp() - t.exp()) * mixture.mse(t)).sum()  # D/2 = 1
    assert bound_of_every_T(mixture, [9])[9].parts["latent"] == pytest.approx(float(closed), rel=1e-12)


def test_bounds_of_isotropic_gaussian_data_do_not_depend_on_T_or_grid() -> None:
    path, mse = VP(LinearLogSNR(9, -7)), GaussianMSE(0.5)
    edges = torch.linspace(-7, 9, 513, dtype=torch.float64)
    errors = (torch.log1p(0.25 * edges.exp())).diff() / edges.diff()
    curve = ErrorCurve(edges, errors)
    limit = 0.5 * float(errors @ edges.diff())
    for levels in (1, 4, 50):
        for grid in ("uniform", "quadratic", "karras"):
            made = Discrete.on(path, levels, grid=grid, variance=Optimal(curve))
            at = made.nodes(path)
            l = path.logsnr(at.t)
            latent = 0.5 * float(at.weight @ (l.exp() * mse(l))) + made.constant(path)
            assert latent == pytest.approx(limit, rel=1e-6)


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [None, Interpolated(0.0)], ids=["optimal", "posterior"])
def test_dynamic_programming_finds_the_best_of_all_grids(mixture: DenoisingProfile, variance: Variance | None) -> None:
    path, T, n = mixture.path, 3, 12
    kind = variance or Optimal(mixture.mse)
    found = best_grid(mixture, T, variance=variance, candidates=n)
    logsnr = torch.linspace(float(mixture.edges[-1]), float(mixture.edges[0]), n + 1, dtype=torch.float64)
    ts = path.time(logsnr)
    ts[0], ts[-1] = path.t_min, path.t_max
    all_of_them = {
        inner: mixture.bound(Discrete(ts[[0, *inner, n]], kind)).nats
        for inner in itertools.combinations(range(1, n), T - 1)
    }
    best = min(all_of_them, key=all_of_them.__getitem__)
    torch.testing.assert_close(found, ts[[0, *best, n]])


def test_the_best_grid_beats_the_usual_ones_on_other_data(mixture: DenoisingProfile) -> None:
    other = denoising_profile(VPSDE(MIXTURE, VP(Cosine())), MIXTURE.sample(1500, seed=5), bands=32, seed=5)
    for T in (4, 12):
        ts = best_grid(mixture, T)
        assert len(ts) == T + 1
        assert bool((ts.diff() > 0).all())
        assert (float(ts[0]), float(ts[-1])) == (mixture.path.t_min, mixture.path.t_max)
        best = bound_of_every_T(other, [T], {T: ts})[T].nats
        assert best > other.report.nats
        for grid in ("uniform", "logsnr", "quadratic", "karras"):
            assert best < bound_of_every_T(other, [T], grid)[T].nats


def test_a_model_of_the_best_grid_scores_and_samples(mixture: DenoisingProfile) -> None:
    levels = Discrete(best_grid(mixture, 6), Optimal(mixture.mse))
    model = VPSDE(MIXTURE, VP(Cosine())).with_levels(levels)
    assert isinstance(levels.sampler()["solver"], AnalyticDPM)
    x = model.sample(2000)
    truth = MIXTURE.sample(2000, seed=3)
    assert float((x.mean(0) - truth.mean(0)).abs().max()) < 0.1
    assert float((x.T.cov() - truth.T.cov()).abs().max()) < 0.15


# --- densities --------------------------------------------------------------------------------------------------------


def test_the_density_of_a_profile_lowers_the_variance_as_it_says(mixture: DenoisingProfile) -> None:
    model = VPSDE(MIXTURE, VP(Cosine()))
    x, variances, predicted = MIXTURE.sample(6000, seed=8), [], []
    for density in (UniformLogSNR(), mixture.density()):
        u = torch.rand(6000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        latent = model.bound(x, None, u, generator, objective=Objective(density=density)).latent
        variances.append(float(latent.var()))
        t = model.path.time(mixture.logsnr)
        second = 0.25 * (mixture.width * mixture.moment() / density.pdf(t, model.path)).sum()
        predicted.append(float(second) - mixture.report.parts["latent"] ** 2)
    assert variances[1] < 0.8 * variances[0]
    assert variances == pytest.approx(predicted, rel=0.2)


def test_even_draws_want_the_standard_deviation_and_weightings_their_own(mixture: DenoisingProfile) -> None:
    even, all_of_it = mixture.moment(evenly=True), mixture.moment()
    assert bool((even < all_of_it).all())
    weighting = OBJECTIVES["sigmoid"].weighting
    ratio = mixture.moment(weighting) / all_of_it
    torch.testing.assert_close(ratio, torch.sigmoid(2 - mixture.logsnr).square())
    for floor in (0.01, 0.5):
        made, root = mixture.density(floor=floor), all_of_it.sqrt().flip(0)
        torch.testing.assert_close(made.masses(), floor / 32 + (1 - floor) * root / root.sum())
    masses = mixture.density(weighting).masses()
    assert float(masses[:16].sum()) < float(mixture.density().masses()[:16].sum())  # the clean half


# --- files, pictures, mistakes ----------------------------------------------------------------------------------------


def test_a_profile_comes_back_from_a_file(mixture: DenoisingProfile, tmp_path: Path) -> None:
    write(tmp_path / "r.h5", "likelihood/profile", mixture.to_result(extra=1))
    found = read(tmp_path / "r.h5", "likelihood/profile")
    assert found.attributes["extra"] == 1
    again = DenoisingProfile.from_result(found, mixture.path)
    for name in ("edges", "squares", "estimates", "reconstruction", "prior", "linear", "error"):
        assert torch.equal(getattr(again, name), getattr(mixture, name)), name
    assert again.report.nats == mixture.report.nats
    assert again.bound(Discrete.on(mixture.path, 5)).nats == mixture.bound(Discrete.on(mixture.path, 5)).nats
    assert "share" in str(again)


def test_of_grey_levels_bits_and_shares_are_printed() -> None:
    from sdegen.denoiser import Denoiser
    from sdegen.networks import MLP

    bins = Bins(3)
    x = bins.centers()[torch.randint(0, 3, (40, 1, 2, 2), generator=torch.Generator().manual_seed(0))]
    model = VPSDE(Denoiser(MLP((1, 2, 2), outputs=3, width=8, depth=1), "levels", bins).calibrate(x))
    found = denoising_profile(model, x, bands=8)
    assert found.report.of == "probability"
    assert found.report.bin_width == bins.width
    assert 1 < found.report.bits_per_dim < 2
    assert str(found).count("%") == 8


def test_pictures_are_drawn(mixture: DenoisingProfile) -> None:
    figure = likelihood_plots.denoising(mixture.to_result(), ranges=8)
    assert isinstance(figure, Figure)
    texts = [text.get_text() for text in figure.axes[0].texts]
    percents = [float(text.removesuffix(" %").replace("<1", "0")) for text in texts if text.endswith("%")]
    assert len(percents) == 8
    assert sum(percents) == pytest.approx(100, abs=4)
    ladder = bound_of_every_T(mixture, [5, 10, 20])
    assert isinstance(likelihood_plots.levels({"best variance": ladder}, mixture.report), Figure)


def test_mistakes_are_one_line() -> None:
    model, x = VPSDE(MIXTURE), MIXTURE.sample(4, seed=0)
    profile = denoising_profile(model, x, bands=4, repeats=1)
    assert math.isnan(float(profile.estimator_se[0]))
    grey = pixel_histogram(torch.zeros(4, 1, 2, 2) + Bins(2).centers()[0], Bins(2))
    for call, words in (
        (lambda: denoising_profile(grey, x), "no noise levels"),  # type: ignore[arg-type]
        (lambda: denoising_profile(model, x, bands=3), "at least 4 bands"),
        (lambda: denoising_profile(model, x[:0]), "no data"),
        (lambda: denoising_profile(model, x * math.nan), "not finite"),
        (lambda: best_grid(profile, 0), "between 1 and"),
        (lambda: best_grid(profile, 20, candidates=10), "between 1 and"),
    ):
        with pytest.raises((ValueError, TypeError), match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
