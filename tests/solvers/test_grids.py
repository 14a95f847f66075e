"""Grids: their ends, their spacing, and what is no grid."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sdegen.paths import VP, Flow
from solvers import GRIDS, check_grid
from solvers.grids import (
    beta,
    flow,
    karras,
    leading,
    linspace,
    logsnr,
    polyexponential,
    power,
    quadratic,
    shift,
    shift_for_size,
    sqrt_flow,
    through,
    trailing,
    uniform,
    vp_quadratic,
)


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_is_a_grid(name: str, path) -> None:
    for n in (1, 2, 10, 50):
        ts = GRIDS[name](path, n)
        assert ts.dtype == torch.float64
        assert ts.shape == (n + 1,)
        check_grid(ts, path.t_min, path.t_max)
        assert float(ts[-1]) == path.t_min
        if name != "leading":  # which misses the noisiest level, and says so
            assert float(ts[0]) == path.t_max


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 400), name=st.sampled_from([n for n in GRIDS if n != "leading"]))
def test_grids_survive_a_schedule_with_steep_ends(n: int, name: str) -> None:
    path = VP()
    ts = GRIDS[name](path, n)
    check_grid(ts, path.t_min, path.t_max)
    assert float(ts[0]) == path.t_max


def test_what_is_equally_spaced_in_what(path) -> None:
    def equal(values: torch.Tensor) -> bool:
        return torch.allclose(values.diff(), values.diff().mean(), rtol=1e-6)

    assert equal(uniform(path, 20))
    assert equal(quadratic(path, 20).sqrt())
    assert equal(power(path, 20, 3.0) ** (1 / 3))
    assert equal(path.logsnr(logsnr(path, 20)))
    assert equal((-path.logsnr(karras(path, 20, rho=5.0)) / 10).exp())
    assert equal((-path.logsnr(flow(path, 20)) / 2).sigmoid())
    assert equal((-path.logsnr(sqrt_flow(path, 20)) / 2).sigmoid().sqrt())
    assert equal((-path.logsnr(vp_quadratic(path, 20))).exp().log1p() ** 0.25)
    ts = polyexponential(path, 20, rho=3.0)
    clean = path.logsnr(ts[-1])
    assert equal((clean - path.logsnr(ts)).clamp(min=0) ** (1 / 3))
    part = (beta(path, 20, 0.6, 0.8) - path.t_min) / (path.t_max - path.t_min)
    assert equal(torch.from_numpy(stats.beta(0.6, 0.8).cdf(part.numpy())))


def test_a_shift_for_a_size_is_the_one_of_flow_models(path) -> None:
    """exp(0.5) at 256 tokens, exp(1.15) at 4096, and their geometric mean half-way."""
    for tokens, mu in ((256, 0.5), (2176, 0.825), (4096, 1.15), (8192, 1.15 + 0.65 * 4096 / 3840)):
        torch.testing.assert_close(shift_for_size(path, 8, tokens), shift(path, 8, math.exp(mu)), rtol=1e-9, atol=1e-9)
    assert torch.equal(GRIDS["shift_for_size"](path, 5), shift_for_size(path, 5, 4096))
    with pytest.raises(ValueError, match="sizes are positive"):
        shift_for_size(path, 5, 0)


def test_a_shift_scales_noise_levels() -> None:
    """On the straight-line path: r = s u / (1 + (s - 1) u) of equally spaced u, by the paper's formula."""
    path, s = Flow(t_min=0.02, t_max=0.98), 3.0
    first, last = (r / (s - (s - 1) * r) for r in (0.98, 0.02))
    u = torch.linspace(first, last, 9, dtype=torch.float64)
    torch.testing.assert_close(shift(path, 8, s), s * u / (1 + (s - 1) * u))
    assert float(shift(path, 8)[4]) > float(flow(path, 8)[4])


def test_ends_keep_all_digits() -> None:
    """0.001 in float32 is 0.0010000000475: a grid that went through it ends outside the range or short of it."""
    path = VP(t_min=1e-3, t_max=0.9)
    for name in GRIDS:
        assert float(GRIDS[name](path, 4)[-1]) == 1e-3
    assert float(uniform(path, 9)[3]) == pytest.approx(0.9 + (1e-3 - 0.9) / 3, abs=1e-15)


def test_a_list_of_levels_is_carried_over(path) -> None:
    ts = karras(path, 10)
    levels = (-path.logsnr(ts) / 2).exp()
    grid = through(levels)
    torch.testing.assert_close(grid(path, 10), ts, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(path.logsnr(grid(path, 20))[::2], path.logsnr(ts), rtol=1e-9, atol=1e-9)
    check_grid(grid(path, 7), path.t_min, path.t_max)
    few = (-path.logsnr(through([9.0, 4.0, 1.0])(path, 4)) / 2).exp()  # the ends are the path's
    first, last = float((-path.logsnr(ts[0]) / 2).exp()), float((-path.logsnr(ts[-1]) / 2).exp())
    assert few.tolist() == pytest.approx([first, 6.0, 4.0, 2.0, last])
    assert float((-path.logsnr(through([9.0, 4.0, 1.0])(path, 3)[1]) / 2).exp()) == pytest.approx(
        9 ** (1 / 3) * 4 ** (2 / 3)
    )
    for bad in ([1.0], [1.0, 1.0], [1.0, 2.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="strictly falling"):
            through(bad)
    with pytest.raises(ValueError, match="range"):
        through([1e9, 1e8, 1e-8])(path, 2)


def test_discrete_grids_visit_levels(vp) -> None:
    for make in (leading, linspace, trailing):
        levels = make(vp, 10, 1000) * 999
        assert torch.allclose(levels, levels.round(), atol=1e-9)
    assert float(leading(vp, 9, 1000)[0]) == pytest.approx(900 / 999)
    with pytest.raises(ValueError, match="1 to 9 steps"):
        trailing(vp, 10, levels=10)


@pytest.mark.parametrize("make", [uniform, logsnr, karras, flow, beta, through([2.0, 1.0])])
def test_no_steps_is_no_grid(make, vp) -> None:
    with pytest.raises(ValueError, match="at least one step"):
        make(vp, 0)


def test_powers_are_positive(vp) -> None:
    with pytest.raises(ValueError, match="power"):
        power(vp, 4, 0.0)
    with pytest.raises(ValueError, match="rho"):
        karras(vp, 4, -1.0)
    with pytest.raises(ValueError, match="rho"):
        polyexponential(vp, 4, 0.0)
    with pytest.raises(ValueError, match="shift"):
        shift(vp, 4, 0.0)
    with pytest.raises(ValueError, match="beta"):
        beta(vp, 4, a=0.0)


@pytest.mark.parametrize(
    ("ts", "words"),
    [
        ([0.5], "at least two nodes"),
        ([[1.0, 0.0]], "1-D"),
        ([1.0, math.nan, 0.0], "finite"),
        ([1.0, 0.5, 0.5, 0.0], "node 1 at t = 0.5 is followed by t = 0.5"),
        ([1.0, 0.5, 0.5 - 1e-13, 0.0], "no node twice: nodes 1 and 2 are both t = 0.5"),
        ([0.0, 0.5, 0.5 + 1e-13, 1.0], "no node twice: nodes 1 and 2 are both t = 0.5"),
        ([1.0, 0.2, 0.3, 0.0], "node 1 at t = 0.2 is followed by t = 0.3"),
        ([0.0, 0.3, 0.2, 1.0], "node 1 at t = 0.3 is followed by t = 0.2"),
        ([1.1, 0.0], r"\[0, 1\], got \[0, 1.1\]"),
        ([1.0 + 1e-9, 0.0], r"range"),
        ([1.0, -1e-9], r"range"),
        ([1.0, -0.1], r"range"),
    ],
)
def test_what_is_no_grid_is_refused(ts: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_grid(torch.tensor(ts, dtype=torch.float64), 0.0, 1.0)


def test_a_grid_comes_back_in_float64_on_the_cpu() -> None:
    ts = check_grid(torch.tensor([1.0, 0.5, 0.25], dtype=torch.float32), 0.0, 1.0)
    assert ts.dtype == torch.float64
    assert ts.tolist() == [1.0, 0.5, 0.25]
