"""Paths against their textbook definitions in 60 digits, and against the laws that every Gaussian path obeys."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from sdegen.paths import (
    CURVES,
    PATHS,
    VE,
    VP,
    Cosine,
    Flow,
    GaussianPath,
    LinearBeta,
    LinearLogSNR,
    Sigmoid,
    SubVP,
    Tabulated,
)
from solvers import Path

Real = Any  # mpmath has no types

HO_BETAS = np.linspace(1e-4, 0.02, 1000)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> GaussianPath:
    return PATHS[request.param]()


def times(path: GaussianPath, count: int = 41, dtype: torch.dtype = torch.float64) -> Tensor:
    """Both ends, their neighbourhoods and the inside, within the path's range after rounding to ``dtype``."""
    width = path.t_max - path.t_min
    near = width * np.logspace(-6, -1, 8)
    t = np.concatenate([[path.t_min], path.t_min + near, np.linspace(0.1, 0.9, count - 18) * width, path.t_max - near])
    t = torch.tensor(np.append(t, path.t_max), dtype=dtype)
    return t[(t.double() >= path.t_min) & (t.double() <= path.t_max)]


# --- The definitions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Textbook:
    """(alpha, sigma) as its paper writes it, evaluated without a thought of rounding but in 60 digits."""

    alpha: Callable[[Real], Real]
    sigma: Callable[[Real], Real]


def _vp(alpha_bar: Callable[[Real], Real]) -> Textbook:
    return Textbook(lambda t: mpmath.sqrt(alpha_bar(t)), lambda t: mpmath.sqrt(1 - alpha_bar(t)))


def _linear_beta(t: Real) -> Real:
    low, high = mpmath.mpf(0.1), mpmath.mpf(20.0)
    return mpmath.exp(-(low * t + (high - low) * t**2 / 2))


def _jabri(t: Real) -> Real:
    def sigmoid(u: Real) -> Real:
        return 1 / (1 + mpmath.exp(-u))

    return (sigmoid(mpmath.mpf(3)) - sigmoid(6 * t - 3)) / (sigmoid(mpmath.mpf(3)) - sigmoid(mpmath.mpf(-3)))


TEXTBOOK = {
    "vp-linear": _vp(_linear_beta),
    "vp-cosine": _vp(lambda t: mpmath.cos(mpmath.pi * t / 2) ** 2),
    "vp-logsnr": _vp(lambda t: 1 / (1 + mpmath.exp(-(mpmath.mpf(13.3) * (1 - t) - 10 * t)))),
    "vp-sigmoid": _vp(_jabri),
    "sub-vp": Textbook(lambda t: mpmath.sqrt(_linear_beta(t)), lambda t: 1 - _linear_beta(t)),
    "ve": Textbook(lambda t: mpmath.mpf(1), lambda t: mpmath.mpf(0.01) * (50 / mpmath.mpf(0.01)) ** t),
    "flow": Textbook(lambda t: 1 - t, lambda t: t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", TEXTBOOK)
def test_every_path_is_its_textbook_definition_to_a_few_ulp(name: str, dtype: torch.dtype) -> None:
    path, book = PATHS[name](), TEXTBOOK[name]
    t = times(path, dtype=dtype)
    found = {k: getattr(path, k)(t) for k in ("alpha", "sigma", "logsnr", "dlogsnr", "f", "g2")}
    assert all(v.dtype == dtype and v.shape == t.shape for v in found.values())
    worst = dict.fromkeys(found, 0.0)
    with mpmath.workdps(60):
        for i, u in enumerate(map(mpmath.mpf, t.tolist())):
            logsnr = lambda s: 2 * mpmath.log(book.alpha(s) / book.sigma(s))  # noqa: E731
            f = mpmath.diff(lambda s: mpmath.log(book.alpha(s)), u)
            g2 = mpmath.diff(lambda s: book.sigma(s) ** 2, u) - 2 * f * book.sigma(u) ** 2
            truth = {"alpha": book.alpha(u), "sigma": book.sigma(u), "logsnr": logsnr(u)}
            truth |= {"dlogsnr": mpmath.diff(logsnr, u), "f": f, "g2": g2}
            for k, exact in truth.items():
                # A relative error, except in logsnr (which is a logarithm) and where f vanishes.
                scale = 1 if k == "logsnr" else max(abs(exact), mpmath.mpf(10) ** -12)
                error = abs(mpmath.mpf(found[k][i].item()) - exact) / scale / (1 + abs(truth["logsnr"]) / 2)
                worst[k] = max(worst[k], float(error / torch.finfo(dtype).eps))
    assert max(worst.values()) < 4, worst


@pytest.mark.parametrize("name", PATHS)
def test_the_curve_keeps_its_equation(name: str) -> None:
    path = PATHS[name]()
    alpha, sigma = path.alpha(times(path)), path.sigma(times(path))
    equation = {"sub-vp": sigma + alpha**2, "ve": alpha, "flow": alpha + sigma}.get(name, alpha**2 + sigma**2)
    torch.testing.assert_close(equation, torch.ones_like(equation), rtol=0, atol=1e-14)


# --- The laws ---------------------------------------------------------------------------------------------------------


def test_drift_and_diffusion_are_derivatives(path: GaussianPath) -> None:
    t = times(path)
    f, variance = path.f(t), path.sigma(t) ** 2
    torch.testing.assert_close(f, vmap(grad(path.log_alpha))(t), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(path.dlogsnr(t), vmap(grad(path.logsnr))(t), rtol=1e-11, atol=0)
    # dVar/dt = 2 f Var + g^2 is how the forward SDE makes the marginal.
    growth = vmap(grad(lambda u: path.sigma(u) ** 2))(t)
    torch.testing.assert_close(path.g2(t) + 2 * f * variance, growth, rtol=1e-10, atol=1e-11)
    assert (path.g2(t) > 0).all()
    assert (path.dlogsnr(t) < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_time_is_the_inverse_of_logsnr(path: GaussianPath, dtype: torch.dtype) -> None:
    t = times(path, dtype=dtype)
    logsnr = path.logsnr(t)
    back = path.time(logsnr)
    assert back.dtype == dtype
    # One ulp of logsnr, carried to t by the slope, is what no inverse can do better than.
    allowed = 8 * torch.finfo(dtype).eps * (t + (1 + logsnr.abs()) / path.dlogsnr(t).abs())
    assert ((back - t).abs() <= allowed).all(), ((back - t).abs() / allowed).max()
    assert (logsnr.diff()[t.diff() > 0] < 0).all()


def test_time_reaches_beyond_the_range_without_losing_order(path: GaussianPath) -> None:
    logsnr = torch.linspace(path.logsnr(path.t_min).item(), path.logsnr(path.t_max).item(), 1001, dtype=torch.float64)
    t = path.time(logsnr)
    assert (t.diff() > 0).all()
    torch.testing.assert_close(path.logsnr(t), logsnr, rtol=1e-12, atol=1e-11)


def test_transitions_compose_and_carry_marginals_to_marginals(path: GaussianPath) -> None:
    t = torch.sort(times(path)).values.unique()
    r, s, t = t[:-2], t[1:-1], t[2:]
    (a_rs, b_rs), (a_st, b_st), (a_rt, b_rt) = path.transition(r, s), path.transition(s, t), path.transition(r, t)
    torch.testing.assert_close(a_rs * a_st, a_rt, rtol=1e-13, atol=0)
    torch.testing.assert_close((a_st * b_rs) ** 2 + b_st**2, b_rt**2, rtol=1e-8, atol=0)
    torch.testing.assert_close(a_rt * path.alpha(r), path.alpha(t), rtol=1e-13, atol=0)
    torch.testing.assert_close((a_rt * path.sigma(r)) ** 2 + b_rt**2, path.sigma(t) ** 2, rtol=1e-12, atol=0)


def test_the_posterior_is_bayes_rule(path: GaussianPath) -> None:
    """q(z_s | z_t, x) ~ q(z_t | z_s) q(z_s | x): precisions add and so do precision-weighted means."""
    t = times(path).unique()[::3]
    s, t = t[:-1], t[1:]
    scale, noise = path.transition(s, t)
    coef_z, coef_x0, std = path.posterior(s, t)
    precision = path.sigma(s) ** -2 + (scale / noise) ** 2
    torch.testing.assert_close(std**-2, precision, rtol=1e-12, atol=0)
    torch.testing.assert_close(coef_z, scale / noise**2 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(coef_x0, path.alpha(s) / path.sigma(s) ** 2 / precision, rtol=1e-9, atol=0)
    # Averaged over z_t ~ q(z_t | x) it gives back q(z_s | x).
    torch.testing.assert_close(coef_z * path.alpha(t) + coef_x0, path.alpha(s), rtol=1e-12, atol=0)
    torch.testing.assert_close((coef_z * path.sigma(t)) ** 2 + std**2, path.sigma(s) ** 2, rtol=1e-12, atol=0)


def test_marginal_broadcasts_over_any_event_shape(path: GaussianPath) -> None:
    x0, t = torch.ones(3, 1, 4, 4), torch.linspace(path.t_min, path.t_max, 3, dtype=torch.float64)
    mean, std = path.marginal(x0, t)
    assert mean.shape == x0.shape
    assert mean.dtype == x0.dtype
    torch.testing.assert_close(mean[:, 0, 0, 0].double(), path.alpha(t), rtol=1e-6, atol=0)
    torch.testing.assert_close((mean + 0 * std).shape, x0.shape)
    assert path.marginal(x0, 0.5)[0].dtype == x0.dtype


# --- The family -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", CURVES)
def test_another_curve_keeps_the_clock(path: GaussianPath, curve: str) -> None:
    other, t = path.on(curve), times(path)
    assert torch.equal(other.logsnr(t), path.logsnr(t))
    torch.testing.assert_close(2 * (other.log_alpha(t) - other.log_sigma(t)), path.logsnr(t), rtol=1e-13, atol=1e-12)


def test_sub_vp_has_the_alpha_of_vp_and_its_squared_sigma() -> None:
    for schedule in (LinearBeta(), Cosine(), Sigmoid()):
        vp, sub = VP(schedule), SubVP(schedule)
        t = times(sub)
        torch.testing.assert_close(sub.alpha(t), vp.alpha(t), rtol=1e-13, atol=0)
        torch.testing.assert_close(sub.sigma(t), vp.sigma(t) ** 2, rtol=1e-13, atol=0)
        torch.testing.assert_close(sub.f(t), vp.f(t), rtol=1e-12, atol=0)
        assert sub.logsnr(sub.t_min).item() == pytest.approx(vp.logsnr(vp.t_min).item(), abs=1e-12)


def test_linear_beta_has_the_f_and_g2_of_its_paper() -> None:
    t = times(VP())
    beta = 0.1 + 19.9 * t
    torch.testing.assert_close(VP().f(t), -beta / 2, rtol=1e-13, atol=0)
    torch.testing.assert_close(VP().g2(t), beta, rtol=1e-13, atol=0)
    decay = 0.1 * t + 19.9 * t**2 / 2
    torch.testing.assert_close(SubVP().g2(t), beta * -torch.expm1(-2 * decay), rtol=1e-12, atol=0)


def test_shifted_cosine_moves_logsnr_only() -> None:
    t = times(VP(Cosine()))
    moved = VP(Cosine(shift=-2 * math.log(4)))
    torch.testing.assert_close(moved.logsnr(t), VP(Cosine()).logsnr(t) - 2 * math.log(4))
    torch.testing.assert_close(moved.time(moved.logsnr(t)), t, rtol=1e-13, atol=1e-14)


# --- Tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_as", ["betas", "alphas_bar"])
def test_a_table_is_exact_at_its_levels(given_as: str) -> None:
    alphas_bar = np.cumprod(1 - HO_BETAS)
    path = Tabulated(**{given_as: {"betas": HO_BETAS, "alphas_bar": alphas_bar}[given_as]})
    i = torch.arange(1, 1001, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(i / 1000) ** 2, torch.tensor(alphas_bar), rtol=1e-14, atol=1e-14)
    scale, _ = path.transition((i[1:] - 1) / 1000, i[1:] / 1000)
    torch.testing.assert_close(1 - scale**2, torch.tensor(HO_BETAS[1:]), rtol=0, atol=1e-14)
    assert (path.t_min, path.t_max) == (1e-3, 1.0)


def test_a_table_has_the_posterior_of_its_paper() -> None:
    """Ho et al. 2020, eqs. 6-7, between neighbouring levels; the last step ends in the prediction itself."""
    path, bar = PATHS["ddpm"](), np.cumprod(1 - HO_BETAS)
    i = torch.arange(2, 1001, dtype=torch.float64)
    coef_z, coef_x0, std = (c.numpy() for c in path.posterior((i - 1) / 1000, i / 1000))
    beta, now, before = HO_BETAS[1:], bar[1:], bar[:-1]
    np.testing.assert_allclose(std**2, (1 - before) / (1 - now) * beta, rtol=2e-11)
    np.testing.assert_allclose(coef_z, np.sqrt(1 - beta) * (1 - before) / (1 - now), rtol=2e-12)
    np.testing.assert_allclose(coef_x0, np.sqrt(before) * beta / (1 - now), rtol=2e-11)
    assert [c.item() for c in path.posterior(0.0, 1e-3)] == [0.0, 1.0, 0.0]


def test_a_table_between_its_levels_is_smooth_and_close_to_the_continuous_path() -> None:
    """Ho's betas are T^-1 times Song's beta(t), up to O(1/T)."""
    table, smooth = PATHS["ddpm"](), VP()
    t = torch.linspace(0.01, 1, 5001, dtype=torch.float64)
    assert (table.logsnr(t) - smooth.logsnr(t)).abs().max() < 0.1
    assert (table.f(t) / smooth.f(t) - 1).abs().max() < 0.04
    nodes = torch.arange(1, 1000, dtype=torch.float64) / 1000
    torch.testing.assert_close(table.dlogsnr(nodes - 1e-12), table.dlogsnr(nodes + 1e-12), rtol=1e-7, atol=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 0.9999), min_size=2, max_size=30))
def test_any_table_is_monotone_and_inverted(betas: list[float]) -> None:
    path = Tabulated(betas=betas)
    t = torch.linspace(path.t_min, path.t_max, 257, dtype=torch.float64)
    logsnr = path.logsnr(t)
    assert (logsnr.diff() < 0).all()
    back = path.time(logsnr)
    ulp = torch.finfo(torch.float64).eps * (t + (1 + logsnr.abs()) / path.dlogsnr(t).abs())
    assert ((back - t).abs() <= 16 * ulp).all()
    assert torch.equal(vmap(path.time)(logsnr), back)


# --- Parameters -------------------------------------------------------------------------------------------------------

SCHEDULES = st.one_of(
    st.builds(lambda low, more: VP(LinearBeta(low, low + more)), st.floats(0, 5), st.floats(0.01, 50)),
    st.builds(lambda a, w, tau: VP(Sigmoid(a, a + w, tau)), st.floats(-5, 2), st.floats(0.5, 8), st.floats(0.1, 3)),
    st.builds(lambda shift: VP(Cosine(shift)), st.floats(-6, 6)),
    st.builds(lambda top, width: VP(LinearLogSNR(top, top - width)), st.floats(-2, 15), st.floats(0.1, 30)),
    st.builds(lambda low, ratio: VE(low, low * ratio), st.floats(1e-4, 1), st.floats(1.1, 1e5)),
    st.builds(lambda low, more: SubVP(LinearBeta(low, low + more)), st.floats(0.05, 5), st.floats(0.01, 50)),
)


@settings(max_examples=50, deadline=None)
@given(SCHEDULES, st.floats(0, 1), st.floats(0, 1))
def test_any_parameters_make_a_path(path: GaussianPath, u: float, v: float) -> None:
    s, t = sorted(path.t_min + (path.t_max - path.t_min) * w for w in (u, v))
    assert path.time(path.logsnr(t)).item() == pytest.approx(t, rel=1e-8, abs=1e-12)
    if t - s > 1e-9:
        assert path.logsnr(s) > path.logsnr(t)
        coef_z, coef_x0, std = path.posterior(s, t)
        assert (coef_z * path.alpha(t) + coef_x0).item() == pytest.approx(path.alpha(s).item(), rel=1e-10)
        assert torch.hypot(coef_z * path.sigma(t), std).item() == pytest.approx(path.sigma(s).item(), rel=1e-10)
    assert path.f(t).isfinite()
    assert path.g2(t) > 0


def test_floats_are_float64_and_tensors_keep_shape_and_dtype(path: GaussianPath) -> None:
    assert isinstance(path, Path)
    for name in ("log_alpha", "log_sigma", "alpha", "sigma", "logsnr", "dlogsnr", "f", "g2", "time"):
        method = getattr(path, name)
        value = method(0.5)
        assert (value.shape, value.dtype) == ((), torch.float64)
        for dtype in (torch.float32, torch.float64):
            t = torch.full((2, 3), 0.5, dtype=dtype)
            assert (method(t).shape, method(t).dtype) == (t.shape, dtype)
            torch.testing.assert_close(method(t)[0, 0].double(), value, rtol=1e-5, atol=1e-5)
    assert torch.equal(path.alpha(torch.tensor(1)), path.alpha(1.0))


def test_times_stay_on_their_device(path: GaussianPath) -> None:
    """The meta device holds no numbers, and refuses to mix with tensors of another device."""
    t = torch.full((3,), 0.5, device="meta")
    for name in ("log_alpha", "log_sigma", "alpha", "sigma", "logsnr", "dlogsnr", "f", "g2", "time"):
        value = getattr(path, name)(t)
        assert (value.device.type, value.dtype, value.shape) == ("meta", t.dtype, t.shape)
    assert all(c.device.type == "meta" for c in path.posterior(t, t))


def test_paths_are_values(path: GaussianPath) -> None:
    copy = pickle.loads(pickle.dumps(path))
    assert copy == path
    assert hash(copy) == hash(path)
    assert str(path.t_min) in repr(path)
    assert path != VP(LinearBeta(0.1, 19.0))
    assert "beta_max=19.0" in repr(VP(LinearBeta(0.1, 19.0)))


def test_the_range_can_be_told() -> None:
    path = Flow(t_min=0.2, t_max=0.7)
    assert (path.t_min, path.t_max) == (0.2, 0.7)
    assert Tabulated(betas=HO_BETAS, t_min=0.01).t_min == 0.01


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: VP(LinearBeta(20.0, 0.1)), "beta_min <= beta_max"),
        (lambda: VP(LinearBeta(math.nan, 1.0)), "beta_min <= beta_max"),
        (lambda: VP(LinearBeta(-1.0, 1.0)), "0 <= beta_min"),
        (lambda: VP(LinearLogSNR(max=-5.0, min=5.0)), "min < max"),
        (lambda: VP(LinearLogSNR(max=math.inf)), "finite"),
        (lambda: VP(Sigmoid(tau=0.0)), "tau > 0"),
        (lambda: VP(Sigmoid(3.0, -3.0)), "start < end"),
        (lambda: VP(Cosine(math.nan)), "finite shift"),
        (lambda: VE(50.0, 0.01), "sigma_min < sigma_max"),
        (lambda: VE(0.0, 1.0), "0 < sigma_min"),
        (lambda: VP(t_min=0.0), "logsnr is inf at t_min=0.0"),
        (lambda: Flow(t_max=1.0), "logsnr is -inf at t_max=1.0"),
        (lambda: Flow(t_min=0.7, t_max=0.2), "t_min < t_max"),
        (lambda: Flow(t_min=math.nan), "t_min < t_max"),
        (lambda: VP(t_max=1.5), "t_max <= 1"),
        (lambda: Tabulated(), "exactly one"),
        (lambda: Tabulated(betas=[0.1, 0.2], alphas_bar=[0.9, 0.8]), "exactly one"),
        (lambda: Tabulated(betas=[0.1, 1.0]), r"betas must be a 1-D table in \(0, 1\)"),
        (lambda: Tabulated(betas=[0.1, math.nan]), "betas must be"),
        (lambda: Tabulated(betas=[[0.1, 0.2]]), "1-D"),
        (lambda: Tabulated(betas=[0.1]), "at least 2"),
        (lambda: Tabulated(alphas_bar=[0.5, 0.6]), "strictly falling"),
        (lambda: VP().on("vpp"), "choose from vp, sub-vp, ve, flow"),
    ],
)
def test_bad_input_is_one_clear_line(make: Callable[[], GaussianPath], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        make()
    assert "\n" not in str(error.value)
