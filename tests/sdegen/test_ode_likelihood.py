"""What the probability-flow ODE says of data: errors that are known, effort until a target, densities and levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from truths import PATHS, Posterior, grey, grey_model, hermite

from sdegen.bins import Bins
from sdegen.decoders import PosteriorDecoder, SoftmaxDecoder, TweedieDecoder
from sdegen.denoiser import Denoiser
from sdegen.levels import Continuous
from sdegen.likelihood import (
    Exact,
    Hutchinson,
    bound,
    log_density,
    ode_likelihood,
    ode_log_prob,
)
from sdegen.models import VPSDE, GaussianDiffusion
from sdegen.networks import MLP
from sdegen.oracles import GaussianOracle, MixtureOracle, PixelOracle, oracle
from sdegen.paths import VP, GaussianPath, LinearLogSNR
from solvers import Prediction, standard_normal
from solvers.noise import DECODER, ENCODER, PRIOR, PROBES

# --- errors and effort ------------------------------------------------------------------------------------------------


def test_the_standard_error_of_a_report_is_calibrated() -> None:
    """Over 200 seeds the distance from the exact trace, in standard errors, has a standard deviation of one."""
    truth = oracle("mixture2d")
    model = VPSDE(truth, PATHS["vp-logsnr"])
    x, budget = truth.sample(24, seed=3), {"solver": "euler", "steps": 8, "check": 0}
    exact = ode_likelihood(model, x, trace=Exact(), **budget)
    assert exact.estimator_se == 0
    reports = [ode_likelihood(model, x, trace=Hutchinson(2, seed), seed=seed, **budget) for seed in range(200)]
    z = torch.tensor([(report.nats - exact.nats) / report.estimator_se for report in reports])
    assert abs(float(z.mean())) < 4 / math.sqrt(200)
    assert 0.85 < float(z.std()) < 1.15


def test_the_standard_error_counts_what_is_drawn_of_grey_levels() -> None:
    truth = PixelOracle([[0.5, 0.25, 0.2, 0.05], [0.1, 0.2, 0.3, 0.4]], Bins(4).centers(torch.float64).numpy())
    model = GaussianDiffusion(truth, VP(LinearLogSNR(3, -8)), Continuous(), SoftmaxDecoder(Bins(4)))
    x, budget = truth.sample(32, seed=3), {"solver": "heun", "steps": 3, "check": 0}
    reports = [ode_likelihood(model, x, seed=seed, **budget) for seed in range(100)]
    nats = torch.tensor([report.nats for report in reports])
    z = (nats - nats.mean()) / torch.tensor([report.estimator_se for report in reports])
    assert 0.8 < float(z.std()) < 1.2


def test_probes_are_added_until_the_target_is_met() -> None:
    truth = oracle("mixture16")
    model, x = VPSDE(truth, PATHS["vp-logsnr"]), truth.sample(8, seed=1)
    common: dict[str, Any] = {"trace": Hutchinson(2), "steps": 6, "check": 0}
    first = ode_likelihood(model, x, **common)
    target = first.estimator_se / 4
    found = ode_likelihood(model, x, target_se=target, **common)
    exact = ode_likelihood(model, x, trace=Exact(), steps=6, check=0)
    assert found.estimator_se <= target
    assert found.forward < 16 * first.forward  # a probe is cheaper than a solve
    assert found.vjp > 10 * first.vjp
    assert abs(found.nats - exact.nats) < 4 * found.estimator_se
    assert sum(found.parts.values()) == pytest.approx(found.nats, rel=1e-9)


@pytest.mark.parametrize("probes", [1, 2])
def test_a_budget_ends_what_a_target_asks_for(probes: int) -> None:
    truth = oracle("mixture16")
    model, x = VPSDE(truth, PATHS["vp-logsnr"]), truth.sample(8, seed=1)
    common: dict[str, Any] = {"trace": Hutchinson(probes), "steps": 6, "check": 1}
    found = ode_likelihood(model, x, target_se=1e-4, max_nfe=200, **common)
    assert found.forward <= 200
    assert "not reached" in found.note
    spent = ode_likelihood(model, x, max_nfe=200, **common)
    assert 150 < spent.forward <= 200
    with pytest.raises(ValueError, match=r"one solve takes 24 .* max_nfe=20 is not enough"):
        ode_likelihood(model, x, max_nfe=20, **common)


def test_draws_are_added_for_grey_levels() -> None:
    model, x = grey_model(), grey(6)
    common: dict[str, Any] = {"steps": 3, "check": 0, "seed": 1}
    first = ode_likelihood(model, x, **common)
    seen: list[tuple[int, int]] = []
    found = ode_likelihood(model, x, target_se=first.estimator_se / 3, progress=lambda *p: seen.append(p), **common)
    assert found.estimator_se <= first.estimator_se / 3
    assert found.settings["draws"] > 10
    assert seen[-1][0] == seen[-1][1] > 6
    assert sum(found.parts.values()) == pytest.approx(found.nats, rel=1e-6)


@pytest.mark.parametrize(("budget", "settled"), [({"tol": 1e-5}, True), ({"steps": 5}, False), ({"steps": 30}, True)])
def test_the_error_of_the_solver_is_measured(budget: dict[str, Any], settled: bool) -> None:
    truth, path = oracle("mixture2d"), PATHS["flow"]
    model, x = VPSDE(truth, path), truth.sample(64, seed=0)  # of which eight are solved again
    report = ode_likelihood(model, x, **budget)
    best = ode_likelihood(model, x, tol=1e-8, check=0)
    off = (report.values - best.values)[::8]
    assert report.settings["solver_error_of"] == 8
    assert report.solver_error == pytest.approx(float(off.square().mean().sqrt()), rel=0.2)
    assert report.settings["solver_error_max"] == pytest.approx(float(off.abs().max()), rel=0.2)
    assert report.kind == ("exact" if settled else "estimate")
    assert ("solver's error" in report.note) == (not settled)
    assert best.kind == "estimate"  # nobody has looked
    assert best.solver_error is None


def test_the_calls_that_measure_the_solver_s_error_are_counted() -> None:
    truth = oracle("mixture2d")
    model, x = VPSDE(truth, PATHS["flow"]), truth.sample(16, seed=0)
    alone = ode_likelihood(model, x, solver="rk4", steps=3, check=0)
    assert (alone.forward, alone.vjp) == (12, 24)
    found = ode_likelihood(model, x, solver="rk4", steps=3, check=4)
    assert found.forward == alone.forward + 4 / 16 * (12 + 24)  # as it is, and with steps half as long
    assert found.vjp == 2 * found.forward


def test_the_error_of_the_solver_is_not_the_noise_of_the_trace() -> None:
    """Both solves of a datum have the same probes, which stay: their difference is the solver's."""
    truth = oracle("mixture16")
    model, x = VPSDE(truth, PATHS["vp-logsnr"]), truth.sample(8, seed=1)
    exact, noisy = (ode_likelihood(model, x, trace=trace, steps=8) for trace in (Exact(), Hutchinson(2)))
    assert exact.solver_error is not None
    assert noisy.solver_error is not None
    assert noisy.solver_error < 3 * exact.solver_error < 0.1 * noisy.estimator_se * math.sqrt(8)


def test_a_probability_above_one_is_no_bound() -> None:
    truth = Posterior([[0.97, 0.01, 0.01, 0.01]] * 2, Bins(4).centers(torch.float64).numpy())
    model = GaussianDiffusion(truth, VP(LinearLogSNR(6, -8)), Continuous(), SoftmaxDecoder(Bins(4)))
    found = ode_likelihood(model, truth.sample(8, seed=0), solver="euler", steps=1, check=2, target_se=1e6)
    assert found.nats < 0
    assert found.solver_error is not None
    assert found.solver_error < 1e6  # which nobody minds
    assert found.kind == "estimate"
    assert found.note == "grey levels would have a probability above one: the solver's error is larger than the result"


def test_further_draws_have_noise_of_their_own() -> None:
    model, x, common = grey_model(), grey(5), {"solver": "heun", "steps": 2}
    whole = ode_log_prob(model, x, draws=5, **common)
    first, rest = (ode_log_prob(model, x, draws=n, first=i, **common) for n, i in ((2, 0), (3, 2)))
    torch.testing.assert_close(torch.cat([first.draws, rest.draws], 1), whole.draws)
    assert float((first.draws[:, :2] - rest.draws[:, :2]).abs().min()) > 1e-6


def test_the_noise_of_one_draw_by_the_trace_is_an_average() -> None:
    """With several draws for each datum, weighted or not, and in the bias that is reported."""
    model, x, common = grey_model(std=0.3), grey(6), {"solver": "heun", "steps": 2, "trace": Hutchinson(4)}
    few, many = (ode_log_prob(model, x, draws=draws, **common) for draws in (2, 40))
    assert 0.3 < float(many.trace_variance.mean() / few.trace_variance.mean()) < 3
    weighted = ode_log_prob(model, x, draws=2, K=5, noisy=True, **common)
    report = ode_likelihood(model, x, draws=2, K=5, noisy=True, check=0, control=None, **common)
    assert report.settings["noise_bias"] == pytest.approx(0.5 * float(weighted.trace_variance.mean()))


def test_calls_of_the_decoder_are_counted() -> None:
    model = VPSDE(grey_model().denoiser, decoder=PosteriorDecoder(Bins(5)))
    found = ode_likelihood(model, grey(4), solver="heun", steps=3, draws=2, check=0)
    assert found.forward == 2 * (6 + 1)
    assert found.vjp == 2 * 6 * 9


def test_data_in_float64_are_scored_in_float64() -> None:
    model, x = grey_model(), grey(4)
    single, double = (ode_log_prob(model, y, solver="heun", steps=3, trace=Exact()) for y in (x, x.double()))
    assert (single.z.dtype, double.z.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.log_prob, double.log_prob, rtol=1e-4, atol=1e-3)
    report = ode_likelihood(model, x.double(), solver="heun", steps=3, trace=Exact(), draws=1, check=0)
    torch.testing.assert_close(-report.values, double.log_prob, rtol=0, atol=1e-9)
    assert float((-report.values - single.log_prob).abs().max()) > 1e-9


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


def test_with_a_clean_end_the_density_of_data_is_the_datas_own() -> None:
    truth = oracle("mixture2d")
    x = truth.sample(8, seed=4)
    found = ode_log_prob(VPSDE(truth, VP(LinearLogSNR(16, -12))), x, tol=1e-7).log_prob
    assert float((found - truth.log_prob(x)).abs().max()) < 5e-3


def test_the_cutoff_costs_what_is_predicted() -> None:
    """At logsnr_0 the scaled datum is off by s^2 p'' / 2 p, with s = sigma_0 / alpha_0; with z_0 drawn, by a second
    such term, s^2 (log p)'' / 2; fed as it is, unscaled, by another density altogether."""
    truth = MixtureOracle([0.4, 0.6], [[-0.6], [0.5]], [[0.09], [0.04]])
    path = VP(LinearLogSNR(10, -14))
    t0, t1 = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    alpha, sigma = path.alpha(t0), path.sigma(t0)
    s2 = float((sigma / alpha).square())
    x = torch.tensor([[-0.7], [0.2], [1.0]], dtype=torch.float64)

    def ode(z: Tensor) -> Tensor:
        """log p(z_0), the true density at the noisy end."""
        found = log_density(truth.problem(path), z, tol=1e-9)
        return found.log_det + truth.log_prob_t(found.z, path, t1)

    at = x[:, 0].clone().requires_grad_()
    log_p = truth.log_prob(at[:, None])
    (first,) = torch.autograd.grad(log_p.sum(), at, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), at)
    log_p, first = log_p.detach(), first.detach()

    scaled = ode(alpha * x) + alpha.log() - log_p
    predicted = 0.5 * s2 * (second + first.square())
    torch.testing.assert_close(scaled, predicted, rtol=0.01, atol=0)

    nodes, weights = (torch.as_tensor(a) for a in hermite(8))
    z = (alpha * x + sigma * nodes).reshape(-1, 1)  # E log p(x | z_0) - log q(z_0 | x) + log p(z_0), a plain decoder
    drawn = (ode(z) + alpha.log()).reshape(3, 8) @ weights - log_p
    torch.testing.assert_close(drawn, predicted + 0.5 * s2 * second, rtol=0.01, atol=0)

    unscaled = ode(x) - log_p
    shift = truth.log_prob(x / alpha) - alpha.log() - log_p  # the density of alpha_0 x, in place of that of x
    torch.testing.assert_close(unscaled, shift + predicted, rtol=0.01, atol=1e-8)


class _Labelled:
    """Data that depend on the label: a denoiser for each class."""

    event_shape = (2,)
    classes = (GaussianOracle([0.5, 0.5], [0.04, 0.09]), GaussianOracle([-0.5, 0.0], [0.25, 0.01]))

    def predict(self, path: GaussianPath, cond: Tensor | None = None) -> Callable[[Tensor, Tensor], Prediction]:
        every = [one.predict(path) for one in self.classes]

        def predict(z: Tensor, t: Tensor) -> Prediction:
            assert cond is not None, "the labels were dropped"
            assert len(cond) == len(z)
            eps = torch.stack([one(z, t).eps for one in every])
            x0 = torch.stack([one(z, t).x0 for one in every])
            rows = torch.arange(len(z))
            return Prediction(x0[cond, rows], eps[cond, rows])

        return predict


@pytest.mark.parametrize(
    "budget",
    [{"tol": 1e-5}, {"trace": Exact(), "steps": 24}, {"trace": Hutchinson(2)}, {"solver": "rk45", "tol": 1e-5}],
    ids=["adaptive", "fixed", "hutchinson", "scipy"],
)
def test_labels_reach_the_denoiser_with_their_rows(budget: dict[str, Any]) -> None:
    model = VPSDE(_Labelled(), VP(LinearLogSNR(12, -12)))  # type: ignore[arg-type]
    cond = torch.tensor([0, 1, 1, 0, 1])
    x = torch.stack([_Labelled.classes[int(c)].sample(1, seed=i)[0] for i, c in enumerate(cond)])
    exact = torch.stack([_Labelled.classes[int(c)].log_prob(x[i : i + 1])[0] for i, c in enumerate(cond)])
    report = ode_likelihood(model, x, cond, batch=3, check=1, **budget)
    torch.testing.assert_close(-report.values, exact, rtol=0, atol=2e-2)
    with pytest.raises(AssertionError, match="labels were dropped"):
        ode_likelihood(model, x, **budget)


@pytest.mark.parametrize("softmax", [True, False])
def test_of_grey_levels_the_ode_gives_a_bound_on_the_probability(softmax: bool) -> None:
    """With the exact score and posterior, log p(x|z) - log q(z|x) + log p(z) = log P(x) for every z."""
    bins = Bins(4)
    probs = [[0.5, 0.25, 0.2, 0.05], [0.1, 0.2, 0.3, 0.4]]
    truth = Posterior(probs, bins.centers(torch.float64).numpy())
    decoder = SoftmaxDecoder(bins) if softmax else PosteriorDecoder(bins)
    model = GaussianDiffusion(truth, VP(LinearLogSNR(3, -14)), Continuous(), decoder)
    x = truth.sample(16, seed=0)
    found = ode_log_prob(model, x, draws=2, solver="rk4", steps=60)
    gap = truth.log_prob(x) - found.log_prob
    assert set(found.parts) == {"reconstruction", "entropy"}
    if softmax:
        assert float(gap.mean()) > 0.05
    else:
        assert float(gap.abs().max()) < 3e-3
        weighted = ode_log_prob(model, x, K=5, solver="rk4", steps=60)  # log K is taken off: equal weights gain nothing
        assert float((truth.log_prob(x) - weighted.log_prob).abs().max()) < 3e-3


def test_of_an_untrained_network_the_ode_agrees_with_the_bound() -> None:
    bins = Bins(5)
    x = bins.value(torch.randint(5, (64, 1, 3, 3), generator=torch.Generator().manual_seed(0)))
    denoiser = Denoiser(MLP((1, 3, 3), 5, width=8, depth=1), "levels", bins).calibrate(x)
    model = VPSDE(denoiser, VP(LinearLogSNR(6, -8)), decoder=PosteriorDecoder(bins))
    a = bound(model, x, draws=32)
    b = ode_likelihood(model, x, trace=Hutchinson(2))
    assert (a.kind, b.kind) == ("upper bound", "upper bound")
    assert abs(a.nats - b.nats) < 4 * math.hypot(a.estimator_se, b.estimator_se) + 0.02
    exact = ode_likelihood(model, x, nfe=96, trace=Exact(), check=0)
    assert abs(exact.nats - b.nats) < 4 * math.hypot(exact.estimator_se, b.estimator_se)


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
