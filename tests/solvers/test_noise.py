"""The Brownian motion: its law, its keys, and that it is one path whoever looks at it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from solvers import BrownianMotion, DiffusionProblem, Prediction, resolve, standard_normal
from solvers.grids import GRIDS
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


class Impulses:
    """A Brownian motion of symbols: every normal is a unit vector, an increment its coordinates, its law exact."""

    def __init__(self, room: int = 1000, **options: Any) -> None:
        self.known: dict[int, int] = {}
        self.w = BrownianMotion(torch.zeros(1, room, dtype=torch.float64), seed=0, **options)
        self.w.normals = self  # type: ignore[assignment]
        self.room = room

    def __call__(self, places: Sequence[int]) -> list[Tensor]:
        numbers = [self.known.setdefault(place, len(self.known)) for place in places]
        rows = torch.zeros(len(places), 1, self.room, dtype=torch.float64)
        rows[range(len(places)), 0, numbers] = 1.0
        return list(rows.unbind())

    def covariance(self, *intervals: tuple[float, float], noise: Any = None) -> Tensor:
        """Of the increments over some intervals."""
        rows = torch.cat([(noise or self.w)(*lam(a, b)) for a, b in intervals])
        return rows @ rows.T


FINEST = 64 / 2**17


@pytest.mark.parametrize(
    "grid",
    [
        torch.linspace(-6.3, 8.1, 21),
        torch.linspace(-0.013, 0.011, 30),
        torch.arange(40) * 1.0001 * FINEST + 3.21,
        torch.arange(40) * 2.31 * FINEST - 17.3,
        torch.tensor([-40.0, -33.0, -32.0, -31.99, -20.0, 0.0, 31.0, 32.5, 40.0, 96.0, 96.001]),
        torch.tensor([-3.0, -2.999, 1.0, 1.001, 1.002, 5.5, 5.501, 9.0]),
    ],
    ids=["walk", "about zero", "as fine as cells", "fine", "across trees", "uneven"],
)
def test_increments_of_a_grid_are_independent_and_of_unit_variance(grid: Tensor) -> None:
    """Exactly, and not by drawing: their covariance is that of the formulas."""
    steps = list(pairwise(grid.double().tolist()))
    assert torch.allclose(Impulses().covariance(*steps), torch.eye(len(steps), dtype=torch.float64), atol=1e-9)


def test_increments_overlap_as_they_should() -> None:
    found = Impulses().covariance((-2.0, -1.1), (-2.0, 0.2), (0.2, -1.7), (-33.0, 30.0))
    for (i, a), (j, b), shared in (((0, 0.9), (1, 2.2), 0.9), ((1, 2.2), (2, 1.9), -1.9), ((0, 0.9), (3, 63.0), 0.9)):
        assert float(found[i, j]) == pytest.approx(shared / math.sqrt(a * b), abs=1e-9)


@pytest.mark.parametrize("place", [1, -1, 2, 511, 10_000])
def test_a_noise_elsewhere_is_independent(place: int) -> None:
    symbols = Impulses()
    here, there = symbols.covariance((-3.0, 2.0)), symbols.covariance((-3.0, 2.0), noise=elsewhere(symbols.w, place))
    assert torch.allclose(here, there)
    both = [noise(*lam(-3.0, 2.0)) for noise in (symbols.w, elsewhere(symbols.w, place))]
    assert float((both[0] * both[1]).sum()) == 0.0


def test_the_area_is_independent_of_the_chord_and_close_to_the_true_one() -> None:
    symbols, (a, b), parts = Impulses(), lam(-0.4, 1.3), 64
    chord, bulge = symbols.w(a, b), area(symbols.w, a, b)
    assert float(bulge.square().sum()) == pytest.approx(1, abs=1e-9)
    assert float((chord * bulge).sum()) == pytest.approx(0, abs=1e-9)
    assert float((bulge * area(symbols.w, a, b, parts)).sum()) == pytest.approx(
        math.sqrt((1 - 1 / 16**2) / (1 - 1 / parts**2)), abs=1e-9
    )


def test_a_deeper_tree_has_the_same_path_in_more_detail() -> None:
    x, cell = torch.zeros(3, 5), 64 / 2**10
    shallow, deep = BrownianMotion(x, seed=4, depth=10), BrownianMotion(x, seed=4, depth=15)
    for a, b in ((0, 1), (-7, 12), (100, 103)):
        assert torch.equal(shallow(*lam(a * cell, b * cell)), deep(*lam(a * cell, b * cell)))
    assert not torch.equal(shallow(*lam(0.3 * cell, 7.1 * cell)), deep(*lam(0.3 * cell, 7.1 * cell)))


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
    with pytest.raises(ValueError, match="length above 0"):
        BrownianMotion(torch.zeros(1, 1), seed=0)(*lam(0.5, 0.5))


def test_starts_are_what_they_were() -> None:
    """Figures in the documentation rest on these draws."""
    found = standard_normal((1, 4), 7, stream=3, number=2, samples=[(5 << 32) + 1])
    torch.testing.assert_close(found, torch.tensor([[-1.0356, 0.9471, 0.3446, 0.1865]]), rtol=0, atol=5e-5)
    close = [standard_normal((1, 4), 2**63 + k) for k in (1, 2)]
    assert not torch.equal(*close)


def test_a_fresh_seed_is_fresh_and_leaves_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    assert len({fresh_seed() for _ in range(8)}) > 1
    standard_normal((4, 4), 0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_increments_within_a_cell_are_too_small() -> None:
    """What the text says of them."""
    covariance = Impulses().covariance((0.3, 0.3 + FINEST / 100), (0.3, 0.3 + 20 * FINEST))
    assert float(covariance[0, 0]) < 0.2
    assert float(covariance[1, 1]) == pytest.approx(1, abs=1e-9)


# --- Samples with steps of their own ----------------------------------------------------------------------------------


def test_samples_with_steps_of_their_own_see_the_one_path() -> None:
    x = torch.zeros(5, 7, dtype=torch.float64)
    a = torch.tensor([-3.0, 31.9, 0.25, 2.0, -95.9], dtype=torch.float64)
    b = torch.tensor([-2.2, 32.3, 0.25, -1.7, -96.1], dtype=torch.float64)
    w = BrownianMotion(x, seed=4)
    together = w(a, b)
    for i in range(5):
        alone = BrownianMotion(x[i : i + 1], seed=4, samples=[i])
        assert torch.equal(alone(a[i : i + 1], b[i : i + 1])[0], together[i])
        if a[i] != b[i]:
            assert torch.allclose(w(a[i], b[i])[i], together[i], atol=1e-12)
    assert not together[2].any()
    assert torch.equal(w(b, a), -together)


# --- What it costs ----------------------------------------------------------------------------------------------------


class Counting:
    def __init__(self, w: BrownianMotion) -> None:
        self.normals, self.asked = w.normals, []
        w.normals = self  # type: ignore[assignment]

    def __call__(self, places: Sequence[int]) -> list[Tensor]:
        self.asked.append(len(places))
        return self.normals(places)


def test_a_walk_draws_what_is_new_and_keeps_what_it_needs() -> None:
    w = BrownianMotion(torch.zeros(2, 3), seed=0)
    count = Counting(w)
    for step in pairwise(torch.linspace(-5, 5, 101, dtype=torch.float64).unbind()):
        w(*step)
        assert len(w.kept) <= 2 * (w.depth + 2)
    assert sum(count.asked) <= 100 * math.log2(0.1 / FINEST) + 400  # the levels below a step, and four more
    before = len(count.asked)
    w(*lam(5.0, 4.9))  # the way back over the last step
    assert sum(count.asked[before:]) == 0


def test_a_predictor_and_a_corrector_walk_side_by_side() -> None:
    w = BrownianMotion(torch.zeros(2, 3), seed=0)
    count = Counting(w)
    for a, b in pairwise(torch.linspace(-5, 5, 101, dtype=torch.float64).unbind()):
        w(a, b)
        elsewhere(w, 1)(a, b)
    assert sum(count.asked) <= 2 * (100 * math.log2(0.1 / FINEST) + 400)


# --- Devices ----------------------------------------------------------------------------------------------------------


def walk(name: str, path: Any, x: Tensor, noise: BrownianMotion) -> list[Tensor]:
    """The states of a solve without the look at the end, by a predictor that is a formula."""
    ts = GRIDS["logsnr"](path, 3)
    nodes, solver, xs = ts.unbind(), resolve(name), [x]
    problem = DiffusionProblem(path, lambda z, t: Prediction(0.5 * z, 0.3 * z)).at(nodes)
    state = solver.init(problem, x, ts)
    for t, s in pairwise(nodes):
        x, state = solver.step(problem, xs[-1], t, s, state, noise)
        xs.append(x)
    return xs


STOCHASTIC = ("ancestral", "sde_dpmpp_2m", "sra1", "pc_langevin")


def test_the_way_of_a_device_is_the_same_path() -> None:
    """The generator of an accelerator, run on the processor."""
    x = torch.zeros(6, 3, 5)
    here, there = (BrownianMotion(x, seed=4, samples=[3, 4, 5, 9, 0, 1]) for _ in range(2))
    there.normals.there, there.normals.group = torch.tensor([3, 4, 5, 9, 0, 1]), 64
    for a, b in pairwise(torch.linspace(-3, 3, 12, dtype=torch.float64).unbind()):
        assert torch.equal(here(a, b), there(a, b))
    ends = torch.linspace(-3, 3, 6, dtype=torch.float64), torch.linspace(3, 3.3, 6, dtype=torch.float64)
    assert torch.equal(here(*ends), there(*ends))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_solve_reads_nothing_from_the_device(name: str, vp: Any) -> None:
    """A state without contents: whatever wanted to look into it would fail."""
    x = torch.zeros(4, 3, 5, device="meta")
    assert all(state.device.type == "meta" for state in walk(name, vp, x, BrownianMotion(x, seed=4)))


def test_steps_of_their_own_read_nothing_from_the_device() -> None:
    x, ends = torch.zeros(4, 3, 5, device="meta"), torch.zeros(4, dtype=torch.float64, device="meta")
    assert BrownianMotion(x, seed=4)(ends, ends).shape == x.shape


@pytest.mark.cuda
def test_devices_see_the_same_path() -> None:
    x = torch.zeros(6, 3, 5)
    here, there = BrownianMotion(x, seed=4), BrownianMotion(x.cuda(), seed=4)
    for a, b in [*pairwise(torch.linspace(-3, 3, 12, dtype=torch.float64).unbind()), lam(-33.0, 20.0)]:
        torch.testing.assert_close(there(a, b).cpu(), here(a, b), rtol=1e-5, atol=2e-5)
    ends = torch.linspace(-3, 3, 6, dtype=torch.float64), torch.linspace(3, 3.3, 6, dtype=torch.float64)
    torch.testing.assert_close(there(*(end.cuda() for end in ends)).cpu(), here(*ends), rtol=1e-5, atol=2e-5)
    alone = BrownianMotion(x[3:4].cuda(), seed=4, samples=[3])
    assert torch.equal(alone(*lam(-0.4, 1.3))[0], there(*lam(-0.4, 1.3))[3])


@pytest.mark.cuda
@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_solve_waits_for_nothing(name: str, vp: Any) -> None:
    x = standard_normal((4, 3, 8, 8), 0, device="cuda")
    walk(name, vp, x, BrownianMotion(x, seed=0))  # whatever is set up once
    noise = BrownianMotion(x, seed=1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        xs = walk(name, vp, x, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(state.isfinite().all()) for state in xs)


@pytest.mark.parametrize("step", [1e-3, 1e-2, 1.0])
def test_increments_have_unit_variance_on_fine_grids_too(step: float) -> None:
    w = BrownianMotion(torch.zeros(4000, 4), seed=3)
    ends = torch.tensor([0.3, 0.3 + step, 0.3 + 2 * step], dtype=torch.float64)
    z = torch.stack([w(ends[0], ends[1]), w(ends[1], ends[2])])
    assert float(z.var()) == pytest.approx(1, abs=0.03)
