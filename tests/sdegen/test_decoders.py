"""Probabilities that sum to one, tails without a floor, samples that are functions of their noise."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from sdegen.bins import Bins
from sdegen.decoders import (
    HEADS,
    BernoulliHead,
    CategoricalHead,
    DiscretisedGaussianHead,
    DiscretisedLogisticHead,
    GaussianDecoder,
    GaussianHead,
    PosteriorDecoder,
    RoundingDecoder,
    SoftmaxDecoder,
    TweedieDecoder,
    logsnr_for,
)
from sdegen.distributions import (
    Bernoulli,
    Categorical,
    DiscretisedGaussian,
    DiscretisedLogistic,
    Distribution,
    Gaussian,
)
from solvers import Prediction, standard_normal

BINS = Bins(17)
LEVELS = BINS.centers(torch.float64)


def _normals(*shape: int, seed: int = 0) -> Tensor:
    return standard_normal(shape, seed, dtype=torch.float64)


class AtCleanEnd:
    """A state at logsnr 4 and a denoiser that shrinks it."""

    alpha = torch.tensor(4.0).double().sigmoid().sqrt()
    sigma = torch.tensor(-4.0).double().sigmoid().sqrt()

    def predict(self, z: Tensor) -> Prediction:
        return Prediction(0.9 * z, (z - self.alpha * 0.9 * z) / self.sigma)

    def level_logits(self, z: Tensor) -> Tensor:
        return -(z.unsqueeze(-1) - LEVELS).square()


DISCRETE: dict[str, Distribution] = {
    "categorical": Categorical(_normals(1, 3, 17), BINS),
    "gaussian": DiscretisedGaussian(torch.tensor([[-0.3, 0.98, 3.0]]).double(), torch.tensor(-2.0).double(), BINS),
    "logistic": DiscretisedLogistic(torch.tensor([[-0.3, 0.98, -3.0]]).double(), torch.tensor(-2.0).double(), BINS),
    "softmax": SoftmaxDecoder(BINS)(_normals(1, 3), AtCleanEnd()),
    "posterior": PosteriorDecoder(BINS)(_normals(1, 3), AtCleanEnd()),
    "rounding": RoundingDecoder(BINS)(_normals(1, 3), AtCleanEnd()),
}


def _table(p: Distribution, coordinate: int) -> Tensor:
    """Probabilities of all levels of one coordinate, by differences of log-probabilities of the whole event."""
    base = LEVELS[8].expand(1, 3)
    rows = base.repeat(17, 1)
    rows[:, coordinate] = LEVELS
    own = torch.stack([p.log_prob(row[None])[0] for row in rows])
    return (own - own.logsumexp(0)).exp()


@pytest.mark.parametrize("name", DISCRETE)
def test_probabilities_of_all_events_sum_to_one(name: str) -> None:
    p = DISCRETE[name]
    assert p.discrete
    grid = torch.cartesian_prod(LEVELS, LEVELS, LEVELS)
    total = torch.stack([p.log_prob(row[None])[0] for row in grid]).logsumexp(0)
    assert abs(float(total)) < 1e-12


@pytest.mark.parametrize("name", DISCRETE)
def test_samples_have_the_probabilities(name: str) -> None:
    p, n = DISCRETE[name], 4000
    noise = _normals(n, 3, seed=1)
    samples = torch.cat([p.sample(e[None]) for e in noise])
    for coordinate in range(3):
        counts = torch.bincount(BINS.index(samples[:, coordinate]), minlength=17)
        expected = n * _table(p, coordinate)
        seen = expected > 1
        chi2 = float(((counts - expected).square() / expected)[seen].sum())
        assert chi2 < scipy.stats.chi2.ppf(1 - 1e-4, int(seen.sum())), (coordinate, counts, expected)


@pytest.mark.parametrize("name", DISCRETE)
def test_the_mode_is_the_most_likely_level(name: str) -> None:
    p = DISCRETE[name]
    for coordinate in range(3):
        assert int(BINS.index(p.mode)[0, coordinate]) == int(_table(p, coordinate).argmax())


@pytest.mark.parametrize("kind", [DiscretisedGaussian, DiscretisedLogistic])
def test_discretised_tails_have_no_floor(kind: type[DiscretisedGaussian] | type[DiscretisedLogistic]) -> None:
    scale = 0.05
    reference = scipy.stats.norm if kind is DiscretisedGaussian else scipy.stats.logistic
    for sigmas in (0.0, 3.0, 20.0, 40.0):
        mean = float(LEVELS[8]) - sigmas * scale
        p = kind(torch.full((1, 1), mean, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64).log(), BINS)
        for k in (0, 8, 16):
            low, high = LEVELS[k] - BINS.width / 2, LEVELS[k] + BINS.width / 2
            # the reference in the tail where it keeps its digits
            a, b = (-(low - mean) / scale, -(high - mean) / scale)
            upper, lower = reference.logcdf(float(a)), reference.logcdf(float(b))
            if k == 0:
                expected = reference.logcdf(float((high - mean) / scale))
            elif k == 16:
                expected = upper
            else:
                expected = upper + math.log1p(-math.exp(lower - upper))
            got = float(p.log_prob(LEVELS[k].reshape(1, 1)))
            assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)
            assert math.isfinite(got)


@pytest.mark.parametrize("kind", [DiscretisedGaussian, DiscretisedLogistic])
def test_discretised_gradients_are_finite_everywhere(
    kind: type[DiscretisedGaussian] | type[DiscretisedLogistic],
) -> None:
    for level in (0, 8, 16):
        for mean in (-4.0, 0.0, 4.0):
            m = torch.full((1, 1), mean, dtype=torch.float64, requires_grad=True)
            s = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
            kind(m, s, BINS).log_prob(LEVELS[level].reshape(1, 1)).sum().backward()
            assert m.grad is not None
            assert s.grad is not None
            assert math.isfinite(float(m.grad + s.grad))


def test_gaussian_agrees_with_torch() -> None:
    mean, log_std, x = _normals(5, 2, 3), 0.3 * _normals(5, 2, 3, seed=1), _normals(5, 2, 3, seed=2)
    ours, theirs = Gaussian(mean, log_std), torch.distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x).flatten(1).sum(1))
    other = torch.distributions.Normal(torch.zeros_like(mean), 1.7)
    kl = torch.distributions.kl_divergence(theirs, other).flatten(1).sum(1)
    torch.testing.assert_close(ours.kl_to_normal(torch.tensor(1.7, dtype=torch.float64).log()), kl)
    wide = Gaussian(mean, torch.tensor(0.5).double())
    torch.testing.assert_close(
        wide.log_prob(x), torch.distributions.Normal(mean, math.exp(0.5)).log_prob(x).sum((1, 2))
    )


def test_kl_of_nearly_equal_gaussians_keeps_its_digits() -> None:
    """KL(N(0, e^{2 d}) || N(0, 1)) = d^2 + O(d^3): the naive formula loses all of it at d = 1e-9."""
    d = 1e-9
    kl = Gaussian(torch.zeros(1, 1).double(), torch.tensor(d, dtype=torch.float64)).kl_to_normal(
        torch.tensor(0.0).double()
    )
    assert abs(float(kl)) < 1e-16


@pytest.mark.parametrize(
    "head",
    [
        CategoricalHead(BINS),
        DiscretisedGaussianHead(BINS),
        DiscretisedLogisticHead(BINS),
        BernoulliHead(),
        GaussianHead(),
        GaussianHead(0.1),
    ],
    ids=repr,
)
def test_heads_give_distributions_of_the_event(head: CategoricalHead) -> None:
    p = head(_normals(4, 1, 2, 2, head.outputs))
    x = p.sample(_normals(4, 1, 2, 2, seed=1))
    assert x.shape == p.mean.shape == p.mode.shape == (4, 1, 2, 2)
    assert p.log_prob(x).shape == (4,)
    assert p.log_prob(x).dtype == torch.float64
    assert p.discrete == head.discrete
    assert type(head) in HEADS.values()


def test_bernoulli_is_the_two_level_categorical() -> None:
    logits, bins = _normals(6, 3), Bins(2)
    two = Categorical(torch.stack([torch.zeros_like(logits), logits], -1), bins)
    x = bins.value((_normals(6, 3, seed=1) > 0).long(), torch.float64)
    torch.testing.assert_close(Bernoulli(logits).log_prob(x), two.log_prob(x))
    torch.testing.assert_close(Bernoulli(logits).mean, two.mean)
    noise = _normals(6, 3, seed=2)
    torch.testing.assert_close(Bernoulli(logits).sample(noise), two.sample(noise))
    with pytest.raises(ValueError, match="two levels"):
        Bernoulli(logits, BINS)
    with pytest.raises(ValueError, match="not centres"):
        Bernoulli(logits).log_prob(0.3 * torch.ones(6, 3).double())


def test_the_softmax_decoder_is_bayes_with_equal_shares() -> None:
    at, z = AtCleanEnd(), _normals(3, 2)
    normal = torch.distributions.Normal(at.alpha * LEVELS, at.sigma)
    posterior = normal.log_prob(z.unsqueeze(-1)).softmax(-1)
    p = SoftmaxDecoder(BINS)(z, at)
    torch.testing.assert_close(p.mean, posterior @ LEVELS)


def test_density_decoders_differ_in_their_mean_alone() -> None:
    at, x = AtCleanEnd(), _normals(50_000, 2)
    noise = _normals(50_000, 2, seed=3)
    q = Gaussian(at.alpha * x, at.sigma.log())
    z = q.sample(noise)
    torch.testing.assert_close(GaussianDecoder()(z, at).mean, z / at.alpha)
    torch.testing.assert_close(TweedieDecoder()(z, at).mean, 0.9 * z)
    drawn = -GaussianDecoder()(z, at).log_prob(x)
    exact = GaussianDecoder().reconstruction(x, q, noise, at)
    assert len(exact.unique()) == 1
    assert abs(float(drawn.mean() - exact[0])) < 4 * float(drawn.std()) / math.sqrt(len(x))


def test_the_rule_for_the_clean_end_tells_levels_apart() -> None:
    for count in (2, 17, 256):
        logsnr = logsnr_for(Bins(count))
        spacing = Bins(count).width / math.exp(-logsnr / 2)
        assert spacing == pytest.approx(6.04)
