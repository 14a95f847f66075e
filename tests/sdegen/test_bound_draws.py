"""Estimates of the bound: unbiased, with errors that are known, and the same whatever the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from truths import C2, MIXTURE, POINTS, OfAClass, Posterior, X, nelbo, trapezoid

from sdegen.bins import Bins
from sdegen.decoders import CategoricalHead, GaussianDecoder, PosteriorDecoder, TweedieDecoder
from sdegen.denoiser import Denoiser
from sdegen.levels import Continuous
from sdegen.likelihood import bound
from sdegen.likelihood.variate import pilot
from sdegen.models import VAE, VPSDE, GaussianDiffusion
from sdegen.networks import MLP
from sdegen.objectives import Objective, UniformTime
from sdegen.oracles import GaussianOracle, MixtureOracle
from sdegen.paths import VP, Cosine, GaussianPath, LinearLogSNR
from solvers import Prediction


def _scores(model: GaussianDiffusion, x: Tensor, **settings: Any) -> Tensor:
    """(estimate - truth) / claimed standard error for 200 seeds; the truth by quadrature."""
    truth = float(nelbo(model, x, trapezoid(120), nodes=128).mean())
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
    truth = Posterior([[0.5, 0.25, 0.2, 0.05]], bins.centers(torch.float64).numpy())
    model = GaussianDiffusion(truth, VP(LinearLogSNR(4, -8)), Continuous(), PosteriorDecoder(bins)).discretize(6)
    z = _scores(model, truth.sample(24, seed=0), draws=8)
    assert abs(float(z.mean())) < 4 / math.sqrt(200)
    assert 0.85 < float(z.std()) < 1.15


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("decoder", [GaussianDecoder(), TweedieDecoder()], ids=repr)
def test_monte_carlo_meets_quadrature_for_a_ddpm(variance: str, decoder: GaussianDecoder) -> None:
    model = VPSDE(MIXTURE, VP(LinearLogSNR(8, -5)), decoder=decoder).discretize(12, variance=variance)
    exact = float(nelbo(model, POINTS, trapezoid(120)).mean())
    report = bound(model, POINTS, draws=24, repeats=40, seed=1)
    assert abs(report.nats - exact) < 4 * report.estimator_se
    assert report.estimator_se < 0.3


def test_the_loss_of_the_bound_is_the_bound() -> None:
    model = VPSDE(MIXTURE, VP(LinearLogSNR(8, -5)))
    x = MIXTURE.sample(64, seed=1)
    losses = torch.stack([model.loss(x, generator=torch.Generator().manual_seed(i)) for i in range(40)])
    exact = nelbo(model, x, trapezoid(60), nodes=96).mean() / math.log(2)
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
        exact = float(nelbo(model, x, trapezoid(120)).mean())
        assert abs(report.nats - exact) < 4 * report.estimator_se


@pytest.mark.parametrize("decoder", [GaussianDecoder(), TweedieDecoder()], ids=repr)
@pytest.mark.parametrize("control", ["auto", None])
def test_labels_reach_the_network(decoder: GaussianDecoder, control: str | None) -> None:
    """Data far from their class cost more; the pilot and the decoder know the class, too."""
    x, labels = torch.cat([X, X + 1]).repeat(8, 1), torch.tensor([0] * 4 + [1] * 4).repeat(8)
    model = VPSDE(OfAClass(), VP(LinearLogSNR(9, -9)), decoder=decoder)  # type: ignore[arg-type]
    own, other, none = (bound(model, x, cond, control=control, batch=48) for cond in (labels, 1 - labels, None))
    of_class, of_any = GaussianOracle([0.0], [C2]), MixtureOracle([0.5, 0.5], [[0.0], [1.0]], [[C2], [C2]])
    assert own.nats == pytest.approx(-float(of_class.log_prob(X).mean()), abs=4 * own.estimator_se + 0.02)
    assert none.nats == pytest.approx(-float(of_any.log_prob(x).mean()), abs=4 * none.estimator_se + 0.02)
    assert other.nats > own.nats + 1


# --- what a report rests on -------------------------------------------------------------------------------------------


def test_an_error_is_believed_with_32_degrees_of_freedom_and_no_more_is_asked() -> None:
    """Every stratum of every datum counts: one datum with 32 of them is done after two rounds."""
    model = VPSDE(MIXTURE, VP(LinearLogSNR(8, -5)))
    for n, draws, repeats in ((1, 32, 2), (1, 8, 5), (4, 8, 2), (1, 1, 33)):
        found = bound(model, MIXTURE.sample(n, seed=0), draws=draws, target_se=1e3, control=None)
        assert found.settings["repeats"] == repeats


def test_the_error_of_the_data_is_what_lies_beyond_their_noise() -> None:
    model, x = VPSDE(MIXTURE, VP(LinearLogSNR(8, -5))), MIXTURE.sample(500, seed=0)
    for draws in (8, 32):
        found = bound(model, x, draws=draws, control=None)
        spread = float(found.values.var()) - 500 * found.estimator_se**2  # less the mean variance of a value
        assert found.data_se == pytest.approx(math.sqrt(spread / 500), rel=1e-9)
    assert float(found.values.var()) > 500 * found.estimator_se**2


def test_the_noise_at_the_clean_end_is_not_that_of_the_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = VPSDE(MIXTURE, VP(LinearLogSNR(8, -5)), decoder=TweedieDecoder()), MIXTURE.sample(400, seed=0)
    seen: dict[str, Tensor] = {}
    for name in ("error", "reconstruction"):
        ask = getattr(model, name)
        monkeypatch.setattr(
            model, name, lambda *a, name=name, ask=ask: (seen.setdefault(name, a[2].flatten()), ask(*a))[1]
        )
    bound(model, x, draws=1, repeats=1, control=None)
    assert len(seen["error"]) == len(seen["reconstruction"]) == 400
    assert abs(float((seen["error"] * seen["reconstruction"]).mean())) < 4 / math.sqrt(400)


def test_looks_at_the_clean_end_are_shared_out_by_what_they_are_worth() -> None:
    """At one price the best numbers of draws are as the standard deviations of the terms."""
    model, x = VPSDE(MIXTURE, VP(LinearLogSNR(4, -5)), decoder=TweedieDecoder()), MIXTURE.sample(300, seed=0)
    variate = pilot(model, x, controls=(), pairs=20_000)
    rows, draw = x.repeat_interleave(100, 0), torch.Generator().manual_seed(0)
    pairs = torch.randn(2, len(rows), 1, dtype=torch.float64, generator=draw)
    q = model.encode(rows).bottom
    one, other = (model.reconstruction(rows, q, noise) for noise in pairs)
    u = torch.rand(len(rows), dtype=torch.float64, generator=draw)
    at = model.levels.draw(model.path, u, variate.density)
    levels = [0.5 * at.weight * model.error(rows, at.t, noise) for noise in pairs]
    ratio = (one - other).square().mean().sqrt() / (levels[0] - levels[1]).square().mean().sqrt()
    assert variate.looks == pytest.approx(float(ratio), rel=0.2)
    few = bound(model, x, draws=16, control=replace(variate, looks=0.25, calls=0))
    most = bound(model, x, draws=16, control=replace(variate, looks=9.0, calls=0))
    assert (few.forward, most.forward) == (2 * (16 + 4), 2 * (16 + 16))  # never more looks than levels


def test_what_is_not_finite_is_refused() -> None:
    x = MIXTURE.sample(10, seed=0)

    class Breaks:
        event_shape = (1,)

        def predict(self, path: GaussianPath) -> Callable[[Tensor, Tensor], Prediction]:
            ask = MIXTURE.predict(path)

            def predict(z: Tensor, t: Tensor) -> Prediction:
                x0, eps = ask(z, t)
                return Prediction(x0, torch.where(z.abs() > 2, math.nan, eps))

            return predict

    model = VPSDE(Breaks(), VP(LinearLogSNR(8, -5)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"what the model says of example \d+ is not finite"):
        bound(model, x, samples=range(100, 110), draws=64)
    x[7] = math.nan
    with pytest.raises(ValueError, match="example 7 is not finite"):
        bound(model, x)
