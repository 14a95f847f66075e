"""One weighting for every loss: the closed forms of the literature's, and what holds for all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdegen.levels import Continuous
from sdegen.objectives import (
    DENSITIES,
    ELBO,
    OBJECTIVES,
    P2,
    EDMWeighting,
    MinSNR,
    Objective,
    SigmoidWeighting,
    Simple,
    UniformTime,
    VelocityMSE,
    Weighting,
    low_discrepancy,
    stratified,
)
from sdegen.paths import VP, Cosine, Flow, LinearLogSNR

COSINE = VP(Cosine(), t_min=1e-3, t_max=1 - 1e-3)
LOGSNR = torch.linspace(-6, 6, 49, dtype=torch.float64)


def _shape(w: Weighting, expected: Tensor, path: object = COSINE) -> None:
    """``w`` on the path is proportional to ``expected`` at LOGSNR."""
    t = path.time(LOGSNR)  # type: ignore[attr-defined]
    own = UniformTime().pdf(t, path)  # type: ignore[arg-type]
    ratio = w(LOGSNR, own) / expected
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-9, atol=0)


def test_weightings_have_the_shapes_of_their_papers() -> None:
    l = LOGSNR
    sech = 1 / torch.cosh(l / 2)
    _shape(Simple(), sech)
    _shape(VelocityMSE(), torch.exp(-l / 2))
    _shape(MinSNR(5.0), sech * torch.minimum(torch.ones_like(l), 5 * torch.exp(-l)))
    _shape(P2(1.0, 1.0), sech / (1 + torch.exp(l)))
    _shape(SigmoidWeighting(2.0), torch.sigmoid(2 - l))
    # EDM states its loss in sigma with log sigma ~ N(-1.2, 1.2^2): (sigma^2 + c^2) / (sigma c)^2 |x0 - x0_hat|^2
    sigma, c = torch.exp(-l / 2), 0.5
    per_x0 = (sigma**2 + c**2) / (sigma * c) ** 2
    density = torch.exp(-0.5 * ((sigma.log() + 1.2) / 1.2) ** 2)
    _shape(EDMWeighting(), density * per_x0 * sigma**2)


def test_the_flow_matching_loss_is_the_cosine_velocity_loss() -> None:
    """|u - u_hat|^2 = |eps - eps_hat|^2 / alpha^2 at uniform times of the straight line: w = exp(-logsnr / 2)."""
    path = Flow(t_min=1e-4, t_max=1 - 1e-4)
    t = path.time(LOGSNR)
    w = UniformTime().pdf(t, path) / path.alpha(t) ** 2
    torch.testing.assert_close(w / w[0], torch.exp(-(LOGSNR - LOGSNR[0]) / 2), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "weighting",
    [SigmoidWeighting(2.0), VelocityMSE(), lambda l, own: torch.sigmoid(-l) ** 2],
    ids=["sigmoid", "v", "square"],
)
def test_a_falling_weight_is_a_bound_on_noisier_data(weighting: Weighting) -> None:
    """L_w = w(l_max) L(l_max) + INT (-w') L(l) dl with L(l) the bound's latent term up to l."""
    x2, c2 = 0.4, 0.3
    path = VP(Cosine(), t_min=0.02, t_max=0.98)
    at = Continuous().nodes(path, 512)
    l = path.logsnr(at.t)

    def mse(l: Tensor) -> Tensor:
        rho = l.exp()
        return (rho * x2 + rho**2 * c2**2) / (1 + rho * c2) ** 2

    def primitive(l: Tensor) -> Tensor:  # of mse / 2
        rho = l.exp()
        return 0.5 * ((1 - x2 / c2) / (1 + rho * c2) + torch.log1p(rho * c2))

    def w(l: Tensor) -> Tensor:
        return weighting(l, UniformTime().pdf(path.time(l), path))

    low, high = path.logsnr(path.t_max), path.logsnr(path.t_min)
    leaf = l.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(w(leaf).sum(), leaf)
    assert bool((slope < 0).all())
    left = 0.5 * (at.weight * w(l) * mse(l)).sum()
    right = w(high) * (primitive(high) - primitive(low)) - (at.weight * slope * (primitive(l) - primitive(low))).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)


@pytest.mark.parametrize("curve", ["vp", "ve", "flow"])
@pytest.mark.parametrize("logsnr", [-5.0, 0.3, 6.0])
def test_errors_in_eps_x0_v_and_score_are_one_error(curve: str, logsnr: float) -> None:
    path = COSINE.on(curve)
    generator = torch.Generator().manual_seed(0)
    x, eps, guess = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64)
    t = path.time(logsnr)
    alpha, sigma = path.alpha(t), path.sigma(t)
    z = alpha * x + sigma * eps
    noise = (z - alpha * guess) / sigma  # the same guess in four units
    e = (eps - noise).square().sum(1)
    rho = math.exp(logsnr)
    torch.testing.assert_close(rho * (x - guess).square().sum(1), e, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma**2 * (-eps / sigma + noise / sigma).square().sum(1), e, rtol=1e-12, atol=0)
    a, s = (torch.sigmoid(torch.tensor(l, dtype=torch.float64)).sqrt() for l in (logsnr, -logsnr))
    v = ((a * eps - s * x) - (a * noise - s * guess)).square().sum(1)
    torch.testing.assert_close(a**2 * v, e, rtol=1e-12, atol=0)


# --- which bound it is ------------------------------------------------------------------------------------------------

FALLS = {"elbo": True, "simple": False, "v-mse": True, "min-snr": False, "p2": False, "edm": False, "sigmoid": True}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_says_whether_it_is_a_bound(name: str) -> None:
    objective = OBJECTIVES[name]
    found = objective.describe(COSINE)
    assert found.falls == FALLS[name]
    text = str(objective)
    assert str(objective.weighting) in text
    assert ("no bound" in text) == (not FALLS[name])
    assert repr(objective.density) in text


def test_the_noise_that_data_are_augmented_with() -> None:
    """Below the q-quantile of sigma / alpha lies the share q of the weight's fall."""
    found = OBJECTIVES["sigmoid"].describe(COSINE)
    low, high = found.logsnr

    def w(logsnr: float) -> float:
        return 1 / (1 + math.exp(logsnr - 2))

    assert found.clean == pytest.approx(w(high) / w(low))
    for q, std in zip((0.1, 0.5, 0.9), found.noise, strict=True):
        assert w(-2 * math.log(std)) / w(low) == pytest.approx(q, abs=2e-3)
    assert OBJECTIVES["elbo"].describe(COSINE).clean == 1.0
    assert OBJECTIVES["elbo"].describe(COSINE).noise == (0.0, 0.0, 0.0)


def test_a_weight_that_rises_says_up_to_where() -> None:
    assert OBJECTIVES["simple"].describe(COSINE).rises_to == pytest.approx(0, abs=0.01)  # sech(logsnr / 2)
    assert Objective(lambda logsnr, own: logsnr.exp()).describe(COSINE).rises_to == pytest.approx(13.0, abs=0.3)
    # d/dl log w = 0 of EDM's: (l - 2.4) / 2.4^2 = -4 e^-l / (1 + 4 e^-l)
    top = OBJECTIVES["edm"].describe(COSINE).rises_to
    assert (top - 2.4) / 2.4**2 == pytest.approx(-4 * math.exp(-top) / (1 + 4 * math.exp(-top)), abs=2e-3)
    # on a path whose levels all lie beyond the top, the same weight falls
    assert OBJECTIVES["edm"].describe(VP(LinearLogSNR(9, top + 0.1))).falls


def test_the_densities_of_a_name_are_new_each_time() -> None:
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    assert DENSITIES["learned"](x) is not DENSITIES["learned"](x)
    for make in DENSITIES.values():
        assert make(x).time(torch.tensor([0.0, 1.0]).double(), COSINE).tolist() == pytest.approx([1e-3, 1 - 1e-3])


def test_the_bound_is_the_default_and_has_weight_one() -> None:
    assert ELBO.is_bound
    assert OBJECTIVES["elbo"] == Objective() == ELBO
    assert not OBJECTIVES["simple"].is_bound
    assert bool((ELBO.weighting(LOGSNR, LOGSNR) == 1).all())


def test_low_discrepancy_numbers_share_one_shift() -> None:
    u = low_discrepancy(64, torch.Generator().manual_seed(5))
    assert u.dtype == torch.float64
    gaps = u.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full((63,), 1 / 64).double())
    means = torch.stack([low_discrepancy(7, torch.Generator().manual_seed(i))[0] for i in range(400)])
    assert abs(float(means.mean()) - 0.5) < 4 / math.sqrt(12 * 400)


def test_stratified_numbers_fall_once_in_each_stratum_and_are_independent_between_examples() -> None:
    u = stratified(200, 8, torch.Generator().manual_seed(5)).reshape(200, 8)
    assert bool(((u * 8).floor() == torch.arange(8)).all())
    shift = (u * 8) % 1
    assert float(torch.corrcoef(shift.T).fill_diagonal_(0).abs().max()) < 4 / math.sqrt(200)


def test_stratification_lowers_the_variance() -> None:
    path = VP(LinearLogSNR(8, -6))
    values = []
    for draws in (1, 32):
        u = stratified(2000 * 32 // draws, draws, torch.Generator().manual_seed(1))
        one = Continuous().integral(path, u, lambda t: torch.sigmoid(path.logsnr(t)), ELBO.density, ELBO.weighting)
        values.append(one.reshape(-1, 32).mean(1).var())
    assert values[1] < values[0] / 500
