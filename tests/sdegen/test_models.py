"""VAEs against probabilistic PCA, diffusions that share weights, baselines, and what all models have in common."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sdegen.bins import Bins
from sdegen.decoders import CategoricalHead, GaussianDecoder, GaussianHead, PosteriorDecoder, SoftmaxDecoder
from sdegen.denoiser import Denoiser
from sdegen.levels import Continuous, Discrete, Empty
from sdegen.models import (
    DDPM,
    VAE,
    VPSDE,
    GaussianDiffusion,
    LatentVariableModel,
    ModelPrior,
    NormalPrior,
    global_histogram,
    pixel_histogram,
    uniform,
)
from sdegen.models.base import decoder_noise
from sdegen.networks import MLP
from sdegen.objectives import ELBO, OBJECTIVES
from sdegen.oracles import GaussianOracle, oracle
from sdegen.paths import PATHS, VP, Cosine, LinearLogSNR, Tabulated
from solvers import standard_normal

D, K, S = 5, 3, 0.4


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- probabilistic PCA: x = W z + mu + s e, everything in closed form ------------------------------------------------

W, MU = 0.7 * _rand(D, K, seed=1), 0.3 * _rand(D, seed=2)
PRECISION = W.T @ W / S**2 + torch.eye(K).double()  # of p(z | x)
X = torch.distributions.MultivariateNormal(MU, W @ W.T + S**2 * torch.eye(D).double()).mean + _rand(40, D, seed=3)
TRUTH = torch.distributions.MultivariateNormal(MU, W @ W.T + S**2 * torch.eye(D).double()).log_prob(X)


class _Encoder(nn.Module):
    """The exact posterior mean; independent coordinates with the right precisions, times ``wider``."""

    def __init__(self, rotation: Tensor, log_std: Tensor) -> None:
        super().__init__()
        self.rotation, self.log_std = rotation, log_std

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        mean = torch.linalg.solve(PRECISION, W.T @ (x - MU).T / S**2).T @ self.rotation
        return torch.cat([mean, self.log_std.expand_as(mean)], 1)


class _Decoder(nn.Module):
    def __init__(self, rotation: Tensor) -> None:
        super().__init__()
        self.rotation = rotation

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return z @ (W @ self.rotation).T + MU


def _ppca(*, exact: bool, prior: LatentVariableModel | None = None) -> VAE:
    values, vectors = torch.linalg.eigh(PRECISION)
    # In the eigenvectors' basis the posterior's coordinates are independent, so that q is exact.
    rotation = vectors if exact else torch.eye(K).double()
    log_std = -0.5 * (values if exact else PRECISION.diagonal()).log()
    head = GaussianHead(std=S)
    return VAE(_Encoder(rotation, log_std), _Decoder(rotation), head, event_shape=(D,), latent=K, prior=prior)


def test_with_the_exact_posterior_every_importance_weight_is_the_likelihood() -> None:
    torch.testing.assert_close(_ppca(exact=True).iwae(X, 1), -TRUTH, rtol=0, atol=1e-11)
    torch.testing.assert_close(_ppca(exact=True).iwae(X, 7), -TRUTH, rtol=0, atol=1e-11)


@pytest.mark.parametrize("exact", [True, False])
def test_the_bound_of_probabilistic_pca_misses_the_truth_by_the_mean_field_gap(exact: bool) -> None:
    gap = 0.0 if exact else 0.5 * float(PRECISION.diagonal().log().sum() - torch.logdet(PRECISION))
    draws = torch.stack(
        [_ppca(exact=exact).elbo(X, generator=torch.Generator().manual_seed(i), draws=50).total for i in range(20)]
    )
    error = draws.mean(0) + TRUTH - gap
    se = draws.std(0) / math.sqrt(20)
    assert float((error / se).abs().max()) < 4.5
    assert abs(float(error.mean())) < 4 * float(se.square().sum().sqrt()) / len(X)


def test_importance_weighting_tightens_the_bound() -> None:
    vae, generator = _ppca(exact=False), torch.Generator().manual_seed(0)
    means, errors = [], []
    for count in (1, 5, 50):
        repeats = torch.stack([vae.iwae(X, count, generator=generator).mean() for _ in range(60)])
        means.append(float(repeats.mean()))
        errors.append(float(repeats.std()) / math.sqrt(60))
    elbo = torch.stack([vae.elbo(X, generator=generator).total.mean() for _ in range(60)])
    assert abs(means[0] - float(elbo.mean())) < 4 * math.hypot(errors[0], float(elbo.std()) / math.sqrt(60))
    assert means[0] > means[1] > means[2] > -float(TRUTH.mean()) - 4 * errors[2]


def test_a_vae_is_the_empty_chain_and_its_bound_the_textbooks() -> None:
    vae = VAE.mlp((1, 3, 3), CategoricalHead(Bins(5)), latent=4, width=16).double().eval()
    x = Bins(5).value(torch.randint(5, (8, 1, 3, 3), generator=torch.Generator().manual_seed(0)), torch.float64)
    for p in vae.parameters():
        nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(1))

    elbo = vae.elbo(x, generator=torch.Generator().manual_seed(5))

    mean, log_std = vae.encoder(x).chunk(2, 1)
    generator = torch.Generator().manual_seed(5)
    torch.rand(8, 1, generator=generator, dtype=torch.float64)  # the levels that a VAE does not have
    z = mean + log_std.exp() * torch.randn(8, 4, generator=generator, dtype=torch.float64)
    logits = vae.decoder(z).reshape(-1, 5)
    nll = nn.functional.cross_entropy(logits, Bins(5).index(x).flatten(), reduction="none").reshape(8, -1).sum(1)
    kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).sum(1)
    assert vae.levels == Empty()
    assert elbo.latent.tolist() == [0.0] * 8
    torch.testing.assert_close(elbo.total, nll + kl, rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(elbo.prior, kl, rtol=1e-14, atol=1e-14)


def test_a_diffusion_as_the_prior_of_a_vae() -> None:
    """Latent diffusion with the exact score of N(0, I) has the bound of the VAE, up to the ends of its path."""
    diffusion = VPSDE(GaussianOracle([0.0] * K, [1.0] * K), VP(LinearLogSNR(14, -10)))
    plain, latent = _ppca(exact=True), _ppca(exact=True, prior=diffusion)
    assert isinstance(plain.prior, NormalPrior)
    assert isinstance(latent.prior, ModelPrior)
    a = plain.elbo(X, generator=torch.Generator().manual_seed(0), draws=400).total
    repeats = torch.stack(
        [latent.elbo(X, generator=torch.Generator().manual_seed(i), draws=100).total for i in range(1, 9)]
    )
    difference = repeats.mean(0) - a
    assert abs(float(difference.mean())) < 4 * float(repeats.mean(1).std()) / math.sqrt(8) + 1e-3
    assert latent.sample(3).shape == (3, D)
    with pytest.raises(ValueError, match="density decoder"):
        _ppca(exact=True, prior=uniform((K,), Bins(4)))


# --- diffusions -------------------------------------------------------------------------------------------------------

BINS = Bins(5)


def _net(**settings: object) -> Denoiser:
    torch.manual_seed(0)
    denoiser = Denoiser(MLP((1, 3, 3), BINS.count, width=16, depth=1, **settings), "levels", BINS)  # type: ignore[arg-type]
    for p in denoiser.parameters():
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    return denoiser.eval()


def _grey(n: int) -> Tensor:
    return BINS.value(torch.randint(5, (n, 1, 3, 3), generator=torch.Generator().manual_seed(0)))


def test_ddpm_and_vpsde_are_one_class_that_shares_weights() -> None:
    denoiser = _net()
    vpsde, ddpm = VPSDE(denoiser), DDPM(denoiser, T=50)
    assert type(vpsde) is type(ddpm) is GaussianDiffusion
    assert vpsde.levels == Continuous()
    assert isinstance(ddpm.levels, Discrete)
    assert ddpm.levels.T == 50
    assert vpsde.discretize(10).denoiser is denoiser
    assert ddpm.continuous().denoiser is denoiser
    assert {p.data_ptr() for p in vpsde.discretize(10).parameters()} == {p.data_ptr() for p in vpsde.parameters()}
    assert vpsde.path == ddpm.path
    assert vpsde.decoder == SoftmaxDecoder(BINS)
    assert vpsde.event_shape == (1, 3, 3)


@torch.no_grad()
def test_more_levels_have_a_lower_bound() -> None:
    model, x = VPSDE(_net()), _grey(64)
    generator = torch.Generator().manual_seed(0)
    values = [
        float(m.elbo(x, draws=64, generator=generator).total.mean())
        for m in (model.discretize(5), model.discretize(20), model.discretize(200), model)
    ]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("name", PATHS)
def test_every_path_has_a_bound_a_loss_and_samples(name: str) -> None:
    model = VPSDE(_net(), PATHS[name]())
    x = _grey(4)
    assert bool(model.elbo(x, generator=torch.Generator().manual_seed(0)).total.isfinite().all())
    assert bool(model.loss(x, generator=torch.Generator().manual_seed(0)).isfinite())
    samples = model.sample(2, steps=5)
    BINS.index(samples)
    BINS.index(model.discretize(6).sample(2))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("decoder", [SoftmaxDecoder(BINS), PosteriorDecoder(BINS)], ids=repr)
def test_every_objective_trains_every_parameter(name: str, decoder: SoftmaxDecoder) -> None:
    model = VPSDE(_net(), decoder=decoder, objective=OBJECTIVES[name])
    for one in (model, model.discretize(7)):
        one.zero_grad()
        one.loss(_grey(8), generator=torch.Generator().manual_seed(0)).backward()
        for key, p in one.named_parameters():
            assert p.grad is not None, key
            assert bool(p.grad.isfinite().all()), key
    assert model.objective.is_bound == (OBJECTIVES[name] == ELBO)


@pytest.mark.parametrize("decoder", [SoftmaxDecoder(BINS), PosteriorDecoder(BINS)], ids=repr)
def test_the_loss_reads_as_the_bound(decoder: SoftmaxDecoder) -> None:
    model, x = VPSDE(_net(), decoder=decoder), _grey(64)
    with torch.no_grad():
        losses = torch.stack([model.loss(x, generator=torch.Generator().manual_seed(i)) for i in range(80)])
        exact = model.elbo(x, draws=400, generator=torch.Generator().manual_seed(0)).bits_per_dim(9).mean()
    if decoder.calls == 0:
        assert abs(float(losses.mean() - exact)) < 5 * float(losses.std()) / math.sqrt(80)
    else:  # every eighth example stands for all at the clean end
        assert abs(float(losses.mean() - exact)) < 0.1


def test_samples_depend_on_seed_and_number_alone() -> None:
    model = VPSDE(_net())
    for settings in ({}, {"solver": "ddim", "steps": 4}, {"solver": "ancestral", "steps": 4, "draw": False}):
        many = model.sample(6, seed=3, **settings)
        torch.testing.assert_close(model.sample(2, seed=3, **settings), many[:2], rtol=0, atol=0)
        torch.testing.assert_close(model.sample(2, seed=3, first=4, **settings), many[4:], rtol=0, atol=0)
        assert not torch.equal(model.sample(6, seed=4, **settings), many)
    vae = VAE.mlp((1, 3, 3), CategoricalHead(BINS), latent=2, width=8).eval()
    torch.testing.assert_close(vae.sample(2, seed=3), vae.sample(6, seed=3)[:2], rtol=0, atol=0)
    torch.testing.assert_close(vae.sample(2, seed=3, first=4), vae.sample(6, seed=3)[4:], rtol=0, atol=0)


def test_nothing_touches_the_global_random_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model, x = VPSDE(_net()), _grey(4)
    torch.manual_seed(0)
    model.elbo(x)
    model.loss(x)
    model.sample(2, steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_exact_denoisers_make_samples_of_the_data() -> None:
    truth = oracle("mixture2d")
    model = VPSDE(truth, VP(LinearLogSNR(12, -10)))
    x = model.sample(4000, steps=40)
    reference = truth.sample(4000, seed=1)
    assert float((x.mean(0) - reference.mean(0)).abs().max()) < 0.06
    assert float((x.T.cov() - reference.T.cov()).abs().max()) < 0.06
    assert abs(float(truth.log_prob(x).mean() - truth.log_prob(reference).mean())) < 0.12


def test_class_labels_reach_the_network() -> None:
    model, x = VPSDE(_net(classes=3)), _grey(6)
    cond = torch.arange(6) % 3
    a = model.elbo(x, cond, draws=2, generator=torch.Generator().manual_seed(0)).total
    b = model.elbo(x, (cond + 1) % 3, draws=2, generator=torch.Generator().manual_seed(0)).total
    assert bool((a != b).all())
    assert model.sample(6, cond, steps=2).shape == x.shape
    vae = VAE.mlp((1, 3, 3), CategoricalHead(BINS), latent=2, width=8, classes=3).eval()
    assert vae.elbo(x, cond).total.shape == (6,)
    assert vae.sample(6, cond).shape == x.shape


def test_network_calls_are_counted_per_example() -> None:
    model, x = VPSDE(_net(), decoder=PosteriorDecoder(BINS)), _grey(4)
    model.elbo(x, draws=3)
    assert model.evaluations == 4 * 3 * 2


# --- baselines --------------------------------------------------------------------------------------------------------


def test_baselines_are_exact() -> None:
    x = _grey(200)
    assert float(uniform((1, 3, 3), BINS).bits_per_dim(x).mean()) == pytest.approx(math.log2(5), abs=1e-12)
    k = BINS.index(x)
    shares = (torch.bincount(k.flatten(), minlength=5) + 1.0) / (k.numel() + 5)
    expected = -shares.log2()[k].flatten(1).mean(1).double()
    torch.testing.assert_close(global_histogram(x, BINS).bits_per_dim(x), expected, rtol=1e-6, atol=0)
    one = pixel_histogram(x, BINS)
    assert float(one.bits_per_dim(x).mean()) < float(expected.mean())
    assert one.sample(7).shape == (7, 1, 3, 3)
    total = one.log_p.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_one_line() -> None:
    model, density = VPSDE(_net()), VPSDE(oracle("mixture2d"))
    x = _grey(4)
    broken = x.clone()
    broken[2, 0, 1, 1] = math.nan
    for call, words in (
        (lambda: model.elbo(broken), "example 2 is not finite"),
        (lambda: model.elbo(x[:, 0]), r"shape \(1, 3, 3\), not \(3, 3\)"),
        (lambda: model.elbo(x + 0.01), "not centres of the 5 grey levels"),
        (lambda: model.elbo(x, draws=0), "draws is at least 1"),
        (lambda: model.bits_per_dim(x, bin_width=0.1), "probabilities of grey levels"),
        (lambda: density.bits_per_dim(_rand(3, 2)), "this model's decoder is a density"),
        (lambda: model.discretize(0), "at least one level"),
        (lambda: model.sample(2, solver="huen", steps=2), "did you mean 'heun'"),
        (lambda: model.sample(2, steps=-1), "at least 1"),
        (lambda: model.with_levels(Discrete(torch.tensor([0.1, 1.0]))), "do not reach the ends"),
        (lambda: VPSDE(nn.Identity()), "event_shape"),
        (lambda: VAE.mlp((2,), GaussianHead(), width=4).sample(2, steps=5), "one step"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_density_has_bits_when_its_bin_width_is_known() -> None:
    model, x = VPSDE(oracle("mixture2d"), VP(Cosine(), t_min=0.01, t_max=0.99)), oracle("mixture2d").sample(8, seed=0)
    bits = model.bits_per_dim(x, draws=4, bin_width=2 / 17, generator=torch.Generator().manual_seed(0))
    nats = model.elbo(x, draws=4, generator=torch.Generator().manual_seed(0)).total
    torch.testing.assert_close(bits, nats / (2 * math.log(2)) + math.log2(8.5))
    assert model.decoder == GaussianDecoder()


def test_the_decoder_does_not_draw_the_noise_of_the_prior() -> None:
    z = torch.zeros(6, 3)
    assert not torch.equal(decoder_noise(z.shape, 0, 0, z), standard_normal(z.shape, 0))
    torch.testing.assert_close(decoder_noise((2, 3), 0, 4, z), decoder_noise(z.shape, 0, 0, z)[4:], rtol=0, atol=0)


def test_ho_s_chain_is_on_his_levels() -> None:
    path = Tabulated(betas=torch.linspace(1e-4, 0.02, 50).double().numpy())
    levels = Discrete.on(path, 49).ts * 50
    torch.testing.assert_close(levels, torch.arange(1, 51).double(), rtol=0, atol=1e-9)


def test_every_coordinate_pays_for_a_wrong_variance() -> None:
    """Four independent coordinates cost four times one, the constant of a variance that is not the posterior's too."""
    bounds = []
    for dims in (1, 4):
        truth = GaussianOracle(torch.zeros(dims).numpy(), 0.25 * torch.eye(dims).numpy())
        model = DDPM(truth, VP(LinearLogSNR(6, -6)), T=4, variance="beta", event_shape=(dims,))
        x = torch.full((1, dims), 0.5, dtype=torch.float64)
        bounds.append(float(model.elbo(x, draws=4000, generator=torch.Generator().manual_seed(0)).latent))
    assert bounds[1] == pytest.approx(4 * bounds[0], rel=0.05)
    assert model.levels.constant(model.path) > 0.2 * bounds[0]
