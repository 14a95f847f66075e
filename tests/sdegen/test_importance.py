"""Importance weights of a VAE: against closed forms, and what they say of themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from sdegen.bins import Bins
from sdegen.decoders import CategoricalHead, GaussianHead
from sdegen.denoiser import Denoiser
from sdegen.likelihood import importance
from sdegen.likelihood.dequantize import Uniform
from sdegen.likelihood.importance import effective_sample_size, jackknife, pareto_k
from sdegen.models import VAE, VPSDE
from sdegen.networks import MLP

STD = 0.5


class _Encoder(nn.Module):
    """N(posterior mean, width posterior variance) of x = z + STD noise."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        variance = STD**2 / (1 + STD**2)
        return torch.cat([x / (1 + STD**2), torch.full_like(x, 0.5 * math.log(self.width * variance))], 1)


class _Decoder(nn.Module):
    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return z


def _vae(width: float) -> VAE:
    return VAE(_Encoder(width), _Decoder(), GaussianHead(STD), event_shape=(1,), latent=1)


X = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]
TRUTH = -torch.distributions.Normal(0.0, math.sqrt(1 + STD**2)).log_prob(X[:, 0])


def test_the_bound_tightens_with_K_as_theory_says() -> None:
    """With q twice as wide as the posterior Var w / E[w]^2 = 2 / sqrt(3) - 1, and the gap is half of that over K."""
    vae, gaps = _vae(2.0), {}
    for K in (1, 5, 50, 500):
        report = importance(vae, X, K, repeats=40 if K < 100 else 20)
        gaps[K] = report.nats - float(TRUTH.mean()), report.estimator_se
        assert report.kind == "upper bound"
        assert report.forward == K * report.settings["repeats"]
        assert report.parts["bound, K = 1"] == pytest.approx(gaps[1][0] + float(TRUTH.mean()), abs=0.02)
        assert sum(report.parts.values()) == pytest.approx(report.nats)
    kl = 0.5 * (2 - 1 - math.log(2))
    assert abs(gaps[1][0] - kl) < 4 * gaps[1][1]
    for K in (50, 500):
        assert abs(gaps[K][0] - (2 / math.sqrt(3) - 1) / (2 * K)) < 4 * gaps[K][1] + 2e-5
    assert gaps[1][0] > gaps[5][0] > gaps[50][0] > gaps[500][0] - 3 * gaps[500][1]


def test_the_jackknife_takes_most_of_the_gap_and_knows_its_error() -> None:
    generator = torch.Generator().manual_seed(0)
    log_w = torch.randn(6000, 20, generator=generator, dtype=torch.float64)
    truth = -0.5  # -log E exp(normal)
    found = jackknife(log_w)
    gap = float((math.log(20) - log_w.logsumexp(1)).mean()) - truth
    left = float(found.value.mean()) - truth
    assert gap == pytest.approx((math.e - 1) / 40, rel=0.15)
    assert abs(left) < gap / 2
    assert float(found.error.square().mean().sqrt()) == pytest.approx(float(found.value.std()), rel=0.25)
    vae = _vae(2.0)
    bound, debiased = (importance(vae, X, 10, repeats=100, debias=d) for d in (False, True))
    assert debiased.kind == "estimate"
    assert abs(debiased.nats - float(TRUTH.mean())) < 4 * debiased.estimator_se
    assert bound.nats - float(TRUTH.mean()) > 4 * bound.estimator_se
    assert bound.settings["jackknife"] == pytest.approx(debiased.nats)
    assert bound.settings["jackknife_se"] == pytest.approx(debiased.estimator_se)


def test_one_repeat_has_an_error_by_the_jackknife() -> None:
    vae = _vae(2.0)
    one = [importance(vae, X, 50, repeats=1, seed=seed) for seed in range(40)]
    z = torch.tensor([r.nats - float(TRUTH.mean()) - (2 / math.sqrt(3) - 1) / 100 for r in one]) / one[0].estimator_se
    assert 0.75 < float(z.std()) < 1.25


@pytest.mark.parametrize("k", [-0.3, 0.2, 0.5, 0.9, 1.5])
def test_pareto_k_is_the_shape_of_the_tail(k: float) -> None:
    w = torch.as_tensor(stats.genpareto(k).rvs((100, 4000), random_state=0))
    found = pareto_k(w.log())
    assert float(found.mean()) == pytest.approx((190 * k + 10 * 0.5) / 200, abs=0.06)
    torch.testing.assert_close(pareto_k(w.log() + 500), found)  # in logarithms, so that no scale overflows


def test_weights_that_are_equal_or_few_have_no_tail() -> None:
    assert pareto_k(torch.zeros(1, 100)).tolist() == [-math.inf]
    assert pareto_k(torch.zeros(1, 20)).isnan().all()
    ess = effective_sample_size(torch.tensor([[0.0] * 8, [0.0] + [-200.0] * 7]))
    assert ess.tolist() == pytest.approx([8.0, 1.0])


def test_a_report_warns_of_weights_with_heavy_tails() -> None:
    narrow = importance(_vae(0.1), X, 1000)  # the tail's true shape is 1 - 0.1
    assert "Pareto k is above 0.7" in narrow.note
    assert narrow.settings["pareto_k_max"] > 0.7
    assert narrow.settings["ess_min"] < 500
    wide = importance(_vae(1.5), X, 1000)
    assert not wide.note
    assert wide.settings["pareto_k_heavy"] == 0
    assert wide.settings["ess_mean"] > 800


def test_memory_does_not_grow_with_K_nor_the_numbers_with_the_batch() -> None:
    vae = VAE.mlp((1, 3, 3), CategoricalHead(Bins(5)), latent=2, width=8)
    x = Bins(5).value(torch.randint(5, (12, 1, 3, 3), generator=torch.Generator().manual_seed(0)))
    seen: list[int] = []
    decode = vae.decode
    vae.decode = lambda z, cond=None: (seen.append(len(z)), decode(z, cond))[1]  # type: ignore[method-assign]
    whole = importance(vae, x, 500, repeats=1, batch=64)
    assert max(seen) <= 64
    parts = [importance(vae, x[i : i + 4], 500, repeats=1, samples=range(i, i + 4)).values for i in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(parts), whole.values, rtol=0, atol=1e-5)


def test_repeats_are_added_until_the_target_is_met() -> None:
    vae = _vae(2.0)
    first = importance(vae, X, 4)
    found = importance(vae, X, 4, target_se=first.estimator_se / 3)
    assert found.estimator_se <= first.estimator_se / 3
    short = importance(vae, X, 4, target_se=first.estimator_se / 100, max_nfe=40)
    assert short.forward == 40
    assert "not reached" in short.note
    assert importance(vae, X, 4, max_nfe=40).forward == 40


def test_a_budget_is_kept_and_the_first_repeats_too() -> None:
    vae = _vae(2.0)
    assert importance(vae, X, 10, repeats=8, target_se=1e-9, max_nfe=40).forward == 40
    assert importance(vae, X, 10, repeats=8, max_nfe=40).forward == 40
    for n, repeats in ((1, 33), (8, 5), (32, 2)):  # 32 degrees of freedom
        assert importance(vae, X[:n], 4, target_se=1e3).settings["repeats"] == repeats


class _Shifted(nn.Module):
    """The decoder of data whose mean is their class."""

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None, "the labels were dropped"
        return z.unflatten(0, (len(cond), -1)).add(cond.double()[:, None, None]).flatten(0, 1)


@pytest.mark.parametrize("dequantizer", [None, Uniform(Bins(40))], ids=repr)
def test_labels_go_with_their_rows(dequantizer: Uniform | None) -> None:
    labels = torch.tensor([0, 1, 1, 0, 1])
    x = Bins(40).value(torch.tensor([[14], [38], [30], [22], [34]]), torch.float64)
    vae = VAE(_Encoder(30.0), _Shifted(), GaussianHead(STD), event_shape=(1,), latent=1)
    truth = -torch.distributions.Normal(0.0, math.sqrt(1 + STD**2)).log_prob((x - labels[:, None])[:, 0])
    truth = truth - (0 if dequantizer is None else math.log(Bins(40).width))
    found = importance(vae, x, 4000, labels, batch=48, dequantizer=dequantizer)
    assert float((found.values - truth).abs().max()) < 0.1
    assert importance(vae, x, 4000, 1 - labels, dequantizer=dequantizer).nats > found.nats + 0.2


def test_a_few_weights_do_not_claim_a_tail() -> None:
    """A prior worth ten exceedances that k is 1/2, in place of the fit's own noise."""
    w = torch.as_tensor(stats.genpareto(1.5).rvs((400, 100), random_state=0))
    assert float(pareto_k(w.log()).mean()) == pytest.approx((20 * 1.5 + 10 * 0.5) / 30, abs=0.12)


def test_bad_input_is_refused_in_one_line() -> None:
    vae = _vae(1.0)
    latent = VAE(_Encoder(1.0), _Decoder(), GaussianHead(STD), event_shape=(1,), latent=1,
                 prior=VPSDE(Denoiser(MLP((1,), width=4, depth=1))))  # fmt: skip
    bad = X.clone()
    bad[3] = math.nan
    for call, words in (
        (lambda: importance(vae, X, 0), "at least 1"),
        (lambda: importance(vae, X, 1, debias=True), "at least 2"),
        (lambda: importance(vae, X, 10, max_nfe=5), "max_nfe=5 is not enough"),
        (lambda: importance(latent, X, 10), "by a bound only"),
        (lambda: importance(vae, bad, 10), "example 3 is not finite"),
        (lambda: importance(vae, X, 10, samples=[1]), "1 sample numbers"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert np.isnan(importance(vae, X, 10).bits_per_dim)  # a density, and nobody said of what bins
