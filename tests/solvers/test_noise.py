"""The Brownian motion: its law, its keys, and that it is one path whoever looks at it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from solvers import BrownianMotion, standard_normal
from solvers.noise import area, elsewhere, fresh_seed


def lam(*values: float) -> list[Tensor]:
    return list(torch.tensor(values, dtype=torch.float64).unbind())


@pytest.fixture
def many() -> Tensor:
    return torch.zeros(4, 20_000, dtype=torch.float64)


def test_increments_are_standard_normals(many: Tensor) -> None:
    z = BrownianMotion(many, seed=1)(*lam(-0.3, 0.45)).flatten()
    n = len(z)
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    exceed = (z.abs() > 1.96).double().mean()
    assert abs(exceed - 0.05) < 4 * math.sqrt(0.05 / n)


def test_disjoint_increments_are_independent_and_overlapping_ones_are_not(many: Tensor) -> None:
    w = BrownianMotion(many, seed=1)
    a, b, c, d = lam(-2.0, -1.1, 0.2, 3.0)
    early, late, across = w(a, b).flatten(), w(c, d).flatten(), w(a, c).flatten()
    n = len(early)
    assert abs((early * late).mean()) < 4 / math.sqrt(n)
    assert abs((early * across).mean() - math.sqrt(0.9 / 2.2)) < 4 / math.sqrt(n)


@pytest.mark.parametrize("parts", [2, 7, 64])
def test_the_same_path_on_every_grid(parts: int) -> None:
    x = torch.zeros(3, 5, dtype=torch.float64)
    grid = torch.linspace(-3.7, 3.1, parts + 1, dtype=torch.float64)
    steps = list(pairwise(grid))
    w = BrownianMotion(x, seed=4)
    total = sum((w(a, b) * (b - a).sqrt() for a, b in steps), torch.zeros_like(x))
    other = BrownianMotion(x, seed=4)
    assert torch.allclose(total, other(grid[0], grid[-1]) * (grid[-1] - grid[0]).sqrt(), atol=1e-12)


def test_the_order_of_questions_does_not_matter() -> None:
    x = torch.zeros(3, 5)
    steps = [lam(a, b) for a, b in ((-1.0, 0.5), (2.0, 2.001), (-7.5, 7.5), (-1.0, -0.99))]
    w, backwards = BrownianMotion(x, seed=4), BrownianMotion(x, seed=4)
    forth = [w(a, b) for a, b in steps]
    back = [backwards(a, b) for a, b in reversed(steps)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forth, back, strict=True))


def test_the_way_back_is_the_same_path() -> None:
    w = BrownianMotion(torch.zeros(3, 5), seed=4)
    a, b = lam(-0.4, 1.3)
    assert torch.equal(w(b, a), -w(a, b))


def test_sample_17_is_sample_17() -> None:
    a, b = lam(-0.4, 1.3)
    whole = BrownianMotion(torch.zeros(64, 3), seed=4)(a, b)
    assert torch.equal(BrownianMotion(torch.zeros(1, 3), seed=4, samples=[17])(a, b)[0], whole[17])
    assert torch.equal(BrownianMotion(torch.zeros(18, 3), seed=4)(a, b)[17], whole[17])
    assert torch.equal(standard_normal((64, 3), 4)[17], standard_normal((1, 3), 4, samples=[17])[0])
    assert not torch.equal(whole[17], whole[18])


def test_the_bits_do_not_depend_on_the_dtype() -> None:
    a, b = lam(-0.4, 1.3)
    narrow, wide = (BrownianMotion(torch.zeros(2, 3, dtype=d), seed=4)(a, b) for d in (torch.float32, torch.float64))
    assert narrow.dtype == torch.float32
    assert wide.dtype == torch.float64
    assert torch.allclose(narrow.double(), wide, atol=1e-5)


def test_seeds_and_streams_are_independent(many: Tensor) -> None:
    a, b = lam(-0.4, 1.3)
    w = BrownianMotion(many, seed=1)(a, b)
    n = w.numel()
    for other in (BrownianMotion(many, seed=2)(a, b), standard_normal(many.shape, 1, dtype=many.dtype)):
        assert abs((w * other).mean()) < 4 / math.sqrt(n)


def test_a_noise_elsewhere_is_another_noise(many: Tensor) -> None:
    a, b = lam(-0.4, 1.3)
    w = BrownianMotion(many, seed=1)
    here, there = w(a, b), elsewhere(w, 2)(a, b)
    assert abs((here * there).mean()) < 4 / math.sqrt(here.numel())
    assert torch.equal(elsewhere(w, 0)(a, b), here)


def test_the_area_is_a_standard_normal_of_its_own(many: Tensor) -> None:
    a, b = lam(-0.4, 1.3)
    w = BrownianMotion(many, seed=1)
    bulge, chord = area(w, a, b), w(a, b)
    n = bulge.numel()
    assert abs(bulge.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((bulge * chord).mean()) < 4 / math.sqrt(n)


def test_what_is_no_seed_or_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        standard_normal((2, 2), -1)
    with pytest.raises(ValueError, match="zero length"):
        BrownianMotion(torch.zeros(1, 1), seed=0)(*lam(0.5, 0.5))


def test_a_fresh_seed_is_fresh_and_leaves_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    assert len({fresh_seed() for _ in range(8)}) > 1
    standard_normal((4, 4), 0)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("step", [1e-3, 1e-2, 1.0])
def test_increments_have_unit_variance_on_fine_grids_too(step: float) -> None:
    w = BrownianMotion(torch.zeros(4000, 4), seed=3)
    ends = torch.tensor([0.3, 0.3 + step, 0.3 + 2 * step], dtype=torch.float64)
    z = torch.stack([w(ends[0], ends[1]), w(ends[1], ends[2])])
    assert float(z.var()) == pytest.approx(1, abs=0.03)
