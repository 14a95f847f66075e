"""Densities that learn, and the schedule that one of them is: the right gradient, the right optimum, the same bound."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sdegen.adaptive import LearnedClock, SecondMoment
from sdegen.building import build
from sdegen.config import configure
from sdegen.data import Dataset, toy
from sdegen.densities import Density, Shares, Spectrum, UniformTime, low_discrepancy
from sdegen.levels import Continuous
from sdegen.models import VPSDE
from sdegen.objectives import DENSITIES, Objective
from sdegen.oracles import GaussianOracle
from sdegen.paths import VP, Cosine, GaussianPath, Learned, LinearLogSNR
from sdegen.runs import Run
from sdegen.train import TrainConfig, fit

PATH = VP(LinearLogSNR(8, -6))
KNOTS = (8.0, 7.2, 3.0, 1.0, 0.9, -2.0, -6.0)


def _bump(logsnr: Tensor) -> Tensor:
    """An error that is large in a narrow range, as of data with one scale."""
    return 0.02 + torch.exp(-0.5 * ((logsnr - 3) / 1.2).square())


def _second_moment(density: Density, path: GaussianPath = PATH, nodes: int = 4000) -> Tensor:
    """INT (f / 2)^2 / p dlogsnr."""
    at = Continuous().nodes(path, nodes)
    return (at.weight * (0.5 * _bump(path.logsnr(at.t))).square() / density.pdf(at.t, path)).sum()


def _least(path: GaussianPath = PATH) -> float:
    """(INT f / 2)^2: of the best density."""
    at = Continuous().nodes(path, 4000)
    return float((at.weight * 0.5 * _bump(path.logsnr(at.t))).sum()) ** 2


def _values(density: Density, u: Tensor) -> Tensor:
    t = density.time(u, PATH)
    return 0.5 * _bump(PATH.logsnr(t)) / density.pdf(t, PATH)


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_a_learned_schedule_goes_through_its_values_and_back() -> None:
    path = VP(Learned(KNOTS))
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    torch.testing.assert_close(path.logsnr(t), torch.tensor(KNOTS, dtype=torch.float64), rtol=1e-14, atol=1e-14)
    fine = torch.linspace(0, 1, 997, dtype=torch.float64)
    torch.testing.assert_close(path.time(path.logsnr(fine)), fine, rtol=0, atol=1e-12)
    leaf = fine.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(path.logsnr(leaf).sum(), leaf)
    torch.testing.assert_close(path.dlogsnr(fine), slope, rtol=1e-9, atol=1e-9)
    assert bool((slope < 0).all())


@pytest.mark.parametrize(
    "bad", [(1.0, 0.0), (1.0, 1.0, 0.0), (1.0, 2.0, 0.0), (math.inf, 1.0, 0.0), (2.0, math.nan, 0)]
)
def test_a_schedule_that_does_not_fall_is_refused(bad: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="learned schedule") as caught:
        Learned(bad)
    assert "\n" not in str(caught.value)


def test_any_clock_and_any_density_have_one_bound() -> None:
    """The integral over logsnr by each clock's own uniform time: another integrand on every path, one number."""
    x2, c2, low, high = 0.4, 0.3, -6.0, 8.0
    x, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(40))

    def primitive(l: float) -> float:
        rho = math.exp(l)
        return 0.5 * ((1 - x2 / c2) / (1 + rho * c2) + math.log1p(rho * c2))

    truth = primitive(high) - primitive(low)
    cosine = VP(Cosine(), t_min=1e-6, t_max=1 - 1e-6)
    paths = {
        "linear": (VP(LinearLogSNR(high, low)), 20),
        "cosine": (VP(Cosine(), t_min=float(cosine.time(high)), t_max=float(cosine.time(low))), 200),
        "learned": (VP(Learned(KNOTS)), 6 * 20),  # panels that end where the spline's pieces do
    }
    found = {}
    for name, (path, panels) in paths.items():
        edges = torch.linspace(path.t_min, path.t_max, panels + 1, dtype=torch.float64)
        t = (edges[:-1, None] + edges.diff()[:, None] * (x + 1) / 2).flatten()
        rho = path.logsnr(t).exp()
        mse = (rho * x2 + rho**2 * c2**2) / (1 + rho * c2) ** 2
        speed = -path.dlogsnr(t)
        found[name] = float((0.5 * mse * speed * (edges.diff()[:, None] * w / 2).flatten()).sum())
    assert found == {name: pytest.approx(truth, abs=1e-8) for name in paths}


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("clock", [LinearLogSNR(8, -6), Learned(KNOTS)], ids=["linear", "learned"])
def test_every_density_on_every_clock_estimates_one_bound(name: str, clock: LinearLogSNR | Learned) -> None:
    data = GaussianOracle([0.0, 0.0], [[0.3, 0.1], [0.1, 0.2]])
    density = DENSITIES[name](data.sample(500, seed=1))
    model = VPSDE(data, VP(clock), objective=Objective(density=density))
    x, n = torch.tensor([[0.4, -0.3]], dtype=torch.float64), 4000
    generator = torch.Generator().manual_seed(3)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    values = model.bound(x.expand(n, 2), None, u, generator, objective=model.objective).latent
    exact = VPSDE(data, PATH).elbo(x, draws=20_000, generator=generator).latent
    assert abs(float(values.mean() - exact)) < 3.5 * float(values.std()) / math.sqrt(n)


# --- learning ---------------------------------------------------------------------------------------------------------


def _clock(knots: int = 6) -> LearnedClock:
    clock = LearnedClock(knots)
    clock.theta.data = 0.1 * torch.randn(knots, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return clock


def test_the_gradient_is_that_of_the_second_moment() -> None:
    clock, h = _clock(), 1e-5
    clock.learn(u := torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1], _values(clock, u), PATH).backward()  # type: ignore[union-attr]
    assert clock.theta.grad is not None
    expected = torch.zeros(6, dtype=torch.float64)
    for i in range(6):
        logs = []
        for step in (h, -h):
            moved = copy.deepcopy(clock)
            with torch.no_grad():
                moved.theta[i] += step
            logs.append(_second_moment(moved, nodes=20_000).log())
        expected[i] = (logs[0] - logs[1]) / (2 * h)
    torch.testing.assert_close(clock.theta.grad, expected, rtol=2e-3, atol=1e-4)
    assert float(expected.abs().max()) > 0.1


def test_learning_adds_nothing_to_the_value_of_the_loss() -> None:
    u = torch.rand(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for density in (_clock(), SecondMoment(), Spectrum()):
        assert float(torch.as_tensor(density.learn(u, _values(density, u), PATH)).detach()) == 0.0


def test_both_learn_the_best_density() -> None:
    generator = torch.Generator().manual_seed(0)
    clock, resampler = LearnedClock(), SecondMoment()
    optimizer = torch.optim.Adam(clock.parameters(), lr=4e-3)
    for _ in range(600):
        u = low_discrepancy(64, generator)
        optimizer.zero_grad()
        clock.learn(u, _values(clock, u), PATH).backward()  # type: ignore[union-attr]
        optimizer.step()
        resampler.learn(u, _values(resampler, u), PATH)
    least, uniform = _least(), float(_second_moment(UniformTime()))
    assert uniform > 2 * least
    assert least <= float(_second_moment(clock)) < 1.03 * least
    assert least <= float(_second_moment(resampler)) < 1.03 * least


def test_the_ends_are_pinned_whatever_was_learned() -> None:
    clock = LearnedClock(5)
    clock.theta.data = torch.tensor([3.0, -8.0, 2.0, 9.0, -4.0], dtype=torch.float64)
    u = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert clock.place(u).tolist() == [0.0, 1.0]
    ends = clock.schedule(PATH).logsnr(u)
    torch.testing.assert_close(ends, torch.tensor([8.0, -6.0], dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_schedule_of_a_clock_draws_like_the_clock() -> None:
    clock = _clock()
    path = GaussianPath(PATH.curve, clock.schedule(PATH), 0.0, 1.0)
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(path.logsnr(u), PATH.logsnr(clock.time(u, PATH)), rtol=1e-12, atol=1e-12)
    own = UniformTime().pdf(u, path)
    torch.testing.assert_close(own, clock.pdf(clock.time(u, PATH), PATH), rtol=1e-9, atol=0)


def test_bands_are_drawn_alike_until_all_were_seen() -> None:
    resampler = SecondMoment(bands=8, least=4)
    u = torch.linspace(0, 0.8, 200, dtype=torch.float64)
    resampler.learn(u, _values(resampler, u), PATH)
    torch.testing.assert_close(resampler.masses(), torch.full((8,), 1 / 8, dtype=torch.float64))
    resampler.learn(u + 0.19, _values(resampler, u + 0.19), PATH)
    masses = resampler.masses()
    assert float(masses.max()) > 2 / 8 > 0.02 / 8 <= float(masses.min())
    assert float(masses.sum()) == pytest.approx(1)


def test_old_errors_are_forgotten() -> None:
    resampler = SecondMoment(bands=4, memory=50)
    u = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    resampler.learn(u, 100 * _values(resampler, u), PATH)
    before = resampler.moments.clone()
    for _ in range(20):
        resampler.learn(u, _values(resampler, u), PATH)
    assert bool((resampler.moments < 2e-4 * before).all())


# --- in the loop ------------------------------------------------------------------------------------------------------


def _small(density: str, steps: int = 60) -> tuple[Dataset, VPSDE, TrainConfig]:  # type: ignore[valid-type]
    words = ["--data", "moons", "--network.width", "16", "--network.depth", "1", "--model.density", density]
    words += ["--train.steps", str(steps), "--train.batch_size", "64", "--train.eval_every", "0"]
    words += ["--train.precision", "float32", "--train.lr", "1e-2"]
    config = configure(words)[0]
    data, model = build(config)
    return data, model, config.train


@pytest.mark.parametrize("density", ["learned", "second-moment"])
def test_a_density_learns_while_the_model_does(density: str) -> None:
    data, model, config = _small(density)
    state = copy.deepcopy(model.density.state_dict())
    fit(model, data, config, progress=False)
    assert any(not torch.equal(state[key], value) for key, value in model.density.state_dict().items())
    assert {key for key in model.state_dict() if key.startswith("density.")}
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    assert float((model.density.time(u, model.path) - UniformTime().time(u, model.path)).abs().max()) > 0.01


def test_scoring_teaches_nothing() -> None:
    data, model, _ = _small("second-moment")
    model.train().loss(data.train[:64])
    seen = model.density.counts.clone()
    assert float(seen.sum()) == 64
    model.eval().loss(data.train[:64])
    model.train().elbo(data.train[:64], draws=4)
    assert torch.equal(model.density.counts, seen)


@pytest.mark.parametrize("density", ["learned", "second-moment"])
def test_an_interrupted_run_goes_on_with_what_was_learned(density: str, tmp_path: Path) -> None:
    data, whole, config = _small(density, 40)
    fit(whole, data, config, progress=False)
    _, model, _ = _small(density, 40)
    run = Run.create(tmp_path / "run", "")

    def stop(row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, data, replace(config, checkpoint_seconds=0, eval_every=20), run=run, callback=stop, progress=False)
    _, again, _ = _small(density, 40)
    fit(again, data, config, run=run, resume=True, progress=False)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)


def test_an_unknown_density_is_one_line() -> None:
    with pytest.raises(ValueError, match="unknown density 'lerned'; did you mean 'learned'") as caught:
        _small("lerned")
    assert "\n" not in str(caught.value)


def test_densities_that_make_no_sense_are_refused_in_one_line() -> None:
    for make, words in (
        (lambda: Spectrum((1.0, 0.0)), "positive variances"),
        (lambda: Spectrum(()), "positive variances"),
        (lambda: Shares((0.5, -0.1)), "positive share"),
        (lambda: LearnedClock(1), "at least 2 knots"),
        (lambda: SecondMoment(0), "bands and memory"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_the_spectrum_of_data_is_that_of_their_covariance() -> None:
    x = toy("moons").train[:500].double()
    expected = torch.linalg.eigvalsh(x.T.cov())
    torch.testing.assert_close(torch.tensor(sorted(Spectrum.of(x).variances)).double(), expected, rtol=1e-6, atol=0)
    assert Spectrum.of(torch.ones(3, 4)) == Spectrum()
    assert len(Spectrum.of(torch.randn(3, 8, generator=torch.Generator().manual_seed(0))).variances) == 8
