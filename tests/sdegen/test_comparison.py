"""Solvers against exact solutions: the exact solutions themselves, the distances, and what is measured of a cell."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

import numpy as np
import ot
import pytest
import torch

from sdegen.comparison import (
    Comparison,
    LazyBrownianMotion,
    compare,
    exact_ode,
    exact_sde,
    sliced_wasserstein,
)
from sdegen.comparison.distances import Cloud, wasserstein
from sdegen.comparison.measure import root_mean, root_median
from sdegen.comparison.settings import chosen
from sdegen.comparison.table import tables
from sdegen.comparison.targets import as_target, find_target
from sdegen.comparison.truth import Truths, _sde_twice, equation
from sdegen.denoiser import Denoiser
from sdegen.models import VPSDE
from sdegen.networks import MLP
from sdegen.oracles import GaussianOracle, MixtureOracle, oracle
from sdegen.paths import PATHS, VE, VP, Flow
from sdegen.sweeps import merge, source
from solvers import DDIM, SOLVERS, BrownianMotion, DiffusionProblem, Prediction, prior, resolve, solve

SMALL = {"targets": ("gaussian",), "samples": 16, "cloud": 200, "transport": 50, "reference_steps": 32}
NO_LAW = {**SMALL, "cloud": 0}
ALIVE = {**NO_LAW, "targets": ("mixture2d",), "samples": 48}
MODEL = {**NO_LAW, "targets": ("mine",), "samples": 8}


# --- The exact solutions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [VP(), VE(0.01, 20.0), Flow(t_min=0.001, t_max=0.999)], ids=["vp", "ve", "flow"])
def test_exact_ode_is_the_closed_form_on_gaussian_data(path):
    """On N(m, c^2) the flow map is affine: (x - alpha m) / sqrt(alpha^2 c^2 + sigma^2) is kept."""
    m, c = 0.3, 0.4
    problem = GaussianOracle([m], [c**2]).problem(path)
    x = prior(path, (9, 1), 0, dtype=torch.float64)
    t = torch.tensor([path.t_max, path.t_min], dtype=torch.float64)
    mean, std = path.alpha(t) * m, (path.alpha(t).square() * c**2 + path.sigma(t).square()).sqrt()
    expected = mean[1] + std[1] * (x - mean[0]) / std[0]
    torch.testing.assert_close(exact_ode(problem, x), expected, rtol=1e-8, atol=1e-9)


def test_exact_sde_has_the_right_law():
    path = PATHS["vp-linear"]()
    problem = GaussianOracle([0.5], [0.09]).problem(path)
    x = prior(path, (4000, 1), 0, dtype=torch.float64)
    for eta in (0.5, 1.0):
        end = exact_sde(problem, x, LazyBrownianMotion(x, 1), eta=eta, steps=100)
        assert abs(float(end.mean()) - 0.5) < 0.02
        assert abs(float(end.std()) - 0.3) < 0.02


def test_the_error_of_the_exact_sde_is_bounded_by_that_of_half_the_steps():
    path = PATHS["vp-linear"]()
    problem, x = oracle("mixture2d").problem(path), prior(path, (24, 2), 0, dtype=torch.float64)
    finest = exact_sde(problem, x, BrownianMotion(x, 0), steps=1024)
    fine, coarse = _sde_twice(problem, x, BrownianMotion(x, 0), 1.0, 128)
    torch.testing.assert_close(fine, exact_sde(problem, x, BrownianMotion(x, 0), steps=128), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(coarse, exact_sde(problem, x, BrownianMotion(x, 0), steps=64), rtol=1e-3, atol=1e-3)
    error, bound = float((fine - finest).norm()), float((fine - coarse).norm())
    assert 0.2 * bound < error < 1.2 * bound


@pytest.mark.parametrize("name", ["ancestral", "sde_dpmpp_2m", "ddim_0.5"])
def test_stochastic_solvers_converge_to_the_exact_sde(name):
    """The reference and the solver are different code on the same Brownian path."""
    path, solver = PATHS["vp-linear"](), resolve(name)
    problem, x = oracle("gaussian").problem(path), prior(path, (16, 2), 0, dtype=torch.float64)
    eta = 0.5 if name == "ddim_0.5" else 1.0
    exact = exact_sde(problem, x, BrownianMotion(x, 0), steps=512, eta=eta)
    errors = [
        float((solve(problem, x, solver=solver, steps=n, noise=BrownianMotion(x, 0)).x - exact).norm())
        for n in (24, 96)
    ]
    assert errors[1] < 0.45 * errors[0]


def test_every_solver_has_its_equation():
    found = {name: equation(solver) for name, solver in SOLVERS.items()}
    assert all((found[name] == "ODE") == (not solver.stochastic) for name, solver in SOLVERS.items())
    assert found["ddim_0.5"] == "SDE 0.5"
    for name in ("ancestral", "euler_maruyama", "sde_heun_lam", "sra1", "sa_solver", "torchsde_srk", "seeds_3"):
        assert found[name] == "SDE", name
    for name in ("er_sde_2", "edm_churn", "restart", "pc_splitting"):
        assert found[name] == "own", name
    for name in ("pc_langevin", "annealed_langevin", "gotta_go_fast"):
        assert found[name] == "none", name


def test_lazy_brownian_motion_is_one():
    """Increments add up whatever the order of the questions, and have the right covariance."""
    w, t = LazyBrownianMotion(torch.zeros(40_000, 1, dtype=torch.float64), 0), torch.tensor

    def increment(a: float, b: float) -> torch.Tensor:
        return w(t(a), t(b)) * math.sqrt(abs(b - a))

    whole, second, first = increment(0.0, 2.0), increment(0.5, 2.0), increment(0.0, 0.5)
    torch.testing.assert_close(whole, first + second)
    torch.testing.assert_close(increment(2.0, 0.0), -whole)
    before, after = increment(-1.0, 0.0), increment(2.0, 5.0)
    for value, variance in ((first, 0.5), (second, 1.5), (before, 1.0), (after, 3.0)):
        assert abs(float(value.var()) / variance - 1) < 0.03
    for one, other in ((first, second), (before, first), (whole, after)):
        assert abs(float((one * other).mean())) < 0.03


# --- Distances --------------------------------------------------------------------------------------------------------


def test_sliced_wasserstein_of_a_shift_of_itself_and_as_another_library_has_it():
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([0.3, 0.0, 0.4])
    assert sliced_wasserstein(x, x[torch.randperm(500)]) < 1e-6
    # a unit vector's squared projections average to 1/3 in three dimensions
    assert sliced_wasserstein(x, x + shift, projections=4000) == pytest.approx(0.5 / math.sqrt(3), rel=0.03)
    y = 2 * x.flip(0) + 1
    theirs = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), n_projections=4000, seed=1)
    assert sliced_wasserstein(x, y, projections=4000) == pytest.approx(float(theirs), rel=0.03)
    with pytest.raises(ValueError, match="as many samples"):
        sliced_wasserstein(x, x[:-1])


def test_wasserstein_of_a_shift_is_its_length():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double()
    shift = torch.tensor([0.3, 0.0, 0.4], dtype=torch.float64)
    assert wasserstein(x, x.flip(0)) < 1e-6
    assert wasserstein(x, (x + shift).flip(0)) == pytest.approx(0.5, rel=1e-9)


@pytest.fixture(scope="module")
def ring():
    truth, path = oracle("ring"), PATHS["vp-linear"]()
    cloud = Cloud(truth, path, 1500, 300, seed=7)
    fresh = cloud._drawn(1000) * cloud.alpha  # as a perfect solver would end
    return cloud, fresh


def test_exact_samples_are_at_the_floor(ring):
    cloud, fresh = ring
    found, floors = cloud.measured(fresh), cloud.floors
    for name in ("sliced_w2", "w2", "energy", "mode_error", "mean_error", "cov_error"):
        assert 0 < found[name] < 1.3 * floors[f"{name}_floor_high"], name
        assert floors[f"{name}_floor"] < floors[f"{name}_floor_high"]
    assert found["log_density"] == pytest.approx(floors["log_density_floor"], abs=0.15)


def test_every_distance_sees_what_it_is_for(ring):
    cloud, fresh = ring
    floors, truth = cloud.floors, cloud.truth
    assert isinstance(truth, MixtureOracle)
    k = truth.component_probs(fresh, cloud.path, cloud.t).argmax(1)
    missed = fresh.clone()
    missed[k == 0] = fresh[k == 1][: int((k == 0).sum())].repeat(2, 1)[: int((k == 0).sum())]
    lost = cloud.measured(missed)
    assert lost["mode_error"] == pytest.approx(1 / 8, abs=0.03)
    assert all(lost[name] > floors[f"{name}_floor_high"] for name in ("sliced_w2", "w2", "energy", "mode_error"))
    wide = cloud.measured(1.2 * fresh)
    assert wide["cov_error"] == pytest.approx(0.44, abs=0.06)
    assert wide["mean_error"] < 1.5 * floors["mean_error_floor_high"]
    moved = cloud.measured(fresh + 0.1)
    assert moved["mean_error"] == pytest.approx(0.1 * math.sqrt(2) / truth.sample(4000, 0).std(0).norm(), rel=0.25)
    stray = fresh.clone()
    stray[:15] = 5.0
    assert cloud.measured(stray)["log_density"] < floors["log_density_floor"] - 1


def test_a_path_in_another_scale_gives_the_same_distances():
    """VE and VP at one noise level differ by a factor that is divided out."""
    truth = oracle("ring")
    ve = PATHS["vp-linear"]().on("ve")
    here, there = (Cloud(truth, path, 300, 100, seed=3) for path in (PATHS["vp-linear"](), ve))
    fresh = here._drawn(5)
    one, other = here.measured(fresh * here.alpha), there.measured(fresh * there.alpha)
    assert one == pytest.approx(other, rel=1e-6)


def test_intervals_cover_what_they_are_about():
    generator = torch.Generator().manual_seed(0)
    squares = torch.randn(400, 100, generator=generator).double().mul(0.8).exp()  # a heavy tail
    true = math.sqrt(math.exp(0.32))
    for interval, truth in ((root_mean, true), (root_median, 1.0)):
        found = np.array([interval(each) for each in squares])
        assert 0.88 < np.mean((found[:, 1] < truth) & (truth < found[:, 2])) < 0.995
        assert (found[:, 1] <= found[:, 0]).all()
        assert (found[:, 0] <= found[:, 2]).all()
        assert interval(torch.zeros(5)) == (0.0, 0.0, 0.0)
    few = torch.rand(2000, 16, generator=generator).double()
    found = np.array([root_median(each) for each in few])
    truth = math.sqrt(0.5)
    assert np.mean((found[:, 1] <= truth) & (truth <= found[:, 2])) > 0.95  # not fewer, with few noises as well


# --- Cells ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    names = ("ddim", "heun", "ancestral", "dopri54", "rk4")
    return compare(Comparison(solvers=names, budgets=(2, 6, 24), tols=(1e-2,), **SMALL))


def test_compare_counts_calls_and_ranks(table):
    assert list(dict.fromkeys(table["solver"])) == ["ddim", "heun", "ancestral", "dopri54", "rk4"]
    good = table["status"] == "ok"
    fixed = good & (table["solver"] != "dopri54")
    assert (table["nfe"][fixed] <= table["budget"][fixed]).all()
    assert (table["error_low"][good] < table["error"][good]).all()
    assert (table["error"][good] < table["error_high"][good]).all()
    assert (table["error_median"][good] <= 1.2 * table["error"][good]).all()
    assert (table["path"] == "vp-linear").all()
    assert set(table["equation"]) == {"ODE", "SDE"}
    (problem,) = merge([source(table)]).problems
    ranked = problem.ranked(24, "error")
    assert [row["error"].value for row in ranked] == sorted(row["error"].value for row in ranked)
    assert "dopri54" not in {row.label for row in ranked}  # spends more than 24 calls
    heun = problem.of("heun")
    assert [row.nfe for row in heun] == [2, 6, 24]
    assert heun[2]["error"].value < heun[1]["error"].value < heun[0]["error"].value


def test_an_impossible_budget_says_why_and_harms_nobody(table):
    i = int(np.flatnonzero((table["solver"] == "rk4") & (table["budget"] == 2))[0])
    assert table["status"][i] == "ValueError: needs at least 4 network calls, the budget is 2"
    assert np.isnan(table["error"][i])
    assert table["nfe"][i] == 0
    assert (np.delete(table["status"], i) == "ok").all()


def test_a_cell_is_what_one_call_gives(table):
    """Nothing of the machinery is in the number: the same noises, the same Brownian motion, the exact solution."""
    path = PATHS["vp-linear"]()
    problem, x = oracle("gaussian").problem(path), prior(path, (16, 2), seed=0, dtype=torch.float64)
    exact = {"heun": exact_ode(problem, x), "ancestral": exact_sde(problem, x, BrownianMotion(x, 0), steps=32)}
    for name, ends in exact.items():
        apart = solve(problem, x, solver=name, nfe=6, seed=0).x - ends
        i = int(np.flatnonzero((table["solver"] == name) & (table["budget"] == 6))[0])
        alpha = float(path.alpha(path.t_min))
        assert table["error"][i] == pytest.approx(float(apart.square().mean().sqrt()) / alpha, rel=1e-9)


def test_compare_is_reproducible_and_its_seed_matters():
    settings = {"solvers": ("heun", "ancestral"), "budgets": (6,), **SMALL}
    one, two = compare(Comparison(**settings)), compare(Comparison(**settings, seeds=(0, 1)))
    for name in ("error", "sliced_w2", "w2", "energy", "log_density", "peak_mib"):
        np.testing.assert_array_equal(one[name], two[name][::2])
        assert name == "peak_mib" or (two[name][::2] != two[name][1::2]).all(), name


def test_orders_are_measured():
    settings = Comparison(solvers=("ddim", "ab_2", "dpmpp_3m_corrected"), budgets=(50, 100), grids=("logsnr",), **ALIVE)
    truths = Truths(settings)
    found = tables(settings, [_row(cell, truths) for cell in settings.cells()], truths)["orders"]
    assert found["order"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(found["measured"], found["order"], atol=0.5)
    assert (found["measured_low"] < found["measured_high"]).all()


def _row(cell, truths):
    from sdegen.comparison.measure import measure

    return measure(cell, truths)


# --- Solvers of people ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong(DDIM):
    """A coefficient that is one percent off."""

    def step(self, problem, x, t, s, state, noise):
        y, state = super().step(problem, x, t, s, state, noise)
        return 1.01 * y, state


@dataclass(frozen=True)
class Broken(DDIM):
    def step(self, problem, x, t, s, state, noise):
        raise IndexError("list index\nout of range")


@dataclass(frozen=True)
class Hoarder(DDIM):
    """Holds seven copies of the state at once."""

    def step(self, problem, x, t, s, state, noise):
        kept = [x + i for i in range(7)]
        return super().step(problem, x, t, s, state, noise)[0] + 0 * kept[0], state


@dataclass(frozen=True)
class Slow(DDIM):
    def step(self, problem, x, t, s, state, noise):
        begin = time.thread_time()
        while time.thread_time() < begin + 0.003:
            pass
        return super().step(problem, x, t, s, state, noise)


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_solvers", sys.modules[__name__])
    return lambda *names, **more: compare(
        Comparison(solvers=("ddim", *(f"my_solvers:{name}" for name in names)), budgets=(50,), **NO_LAW, **more)
    )


def test_a_wrong_solver_stands_out_and_a_broken_one_harms_nobody(mine):
    found = mine("Broken", "Wrong")
    right, broken, wrong = found["error"]
    assert wrong > 3 * right
    assert np.isnan(broken)
    assert found["status"].tolist() == ["ok", "IndexError: list index out of range", "ok"]


def test_memory_and_overhead_are_the_solvers_own(mine):
    found = mine("Hoarder", "Slow")
    one_state = 16 * 2 * 8 / 2**20
    assert found["peak_mib"][1] - found["peak_mib"][0] == pytest.approx(7 * one_state, abs=1.01 * one_state)
    assert found["peak_mib"][0] < 6 * one_state
    assert found["overhead_us"][2] > 2900
    assert found["overhead_us"][0] < 2900
    assert (found["network_seconds"] < found["seconds"]).all()


# --- Targets ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VPSDE(Denoiser(MLP((2,), width=16, depth=1)))


def test_a_model_is_measured_against_its_own_converged_solution(model):
    settings = Comparison(solvers=("ddim", "dpmpp_2m", "ancestral"), budgets=(5, 40), **MODEL)
    found = compare(settings, known={"mine": model})
    assert found["status"].tolist() == ["ok"] * 6
    assert (found["path"] == "own").all()
    assert (found["error"][1::2] < 0.4 * found["error"][::2]).all()
    assert (found["reference_error"][:4] < 1e-5).all()
    assert np.isnan(found["sliced_w2"]).all()
    assert next(model.parameters()).dtype == torch.float32  # the reference has a copy of its own


def test_a_model_on_another_curve_is_the_same_to_a_solver_that_does_not_see_it(model):
    settings = Comparison(solvers=("ddim",), budgets=(10,), paths=("own", "ve", "flow"), **MODEL)
    found = compare(settings, known={"mine": model})
    np.testing.assert_allclose(found["error"], found["error"][0], rtol=1e-3)
    with pytest.raises(ValueError, match="unknown path"):
        compare(Comparison(solvers=("ddim",), paths=("vee",), **MODEL), known={"mine": model})


def test_targets_of_other_kinds(model, tmp_path, monkeypatch):
    path = VP()
    problem = DiffusionProblem(path, lambda x, t: Prediction(0 * x, x / path.sigma(t)))
    assert as_target("a", (problem, (3, 2)), "").event_shape == (3, 2)
    assert as_target("b", model.denoiser, "").event_shape == (2,)
    assert find_target("ring").truth is not None
    (tmp_path / "my_target.py").write_text("from sdegen import oracle\ndef made():\n    return oracle('grid')\n")
    monkeypatch.syspath_prepend(tmp_path)
    one = find_target("my_target:made")
    assert one.truth is not None
    (tmp_path / "my_target.py").write_text("from sdegen import oracle\ndef made():\n    return oracle('ring')\n")
    assert find_target("my_target:made").mark != one.mark


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixture", "mixture2d"),
        ("runs/there-is-none", "no folder"),
        ("no_such_module:f", "cannot load the target"),
        ("os:getcwd", "a solver needs a diffusion"),
    ],
)
def test_a_target_that_is_none_is_refused_in_one_line(name, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        compare(Comparison(targets=(name,), solvers=("ddim",)))
    assert "\n" not in str(caught.value)


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_solvers_by_name_pattern_and_family():
    assert chosen(("all",)) == list(SOLVERS)
    assert set(chosen(("ode", "sde"))) == set(chosen(("fixed", "adaptive"))) == set(SOLVERS)
    assert chosen(("heun", "unic_*", "heun")) == ["heun", *(name for name in SOLVERS if name.startswith("unic_"))]


def test_the_product_has_no_cell_twice():
    settings = Comparison(
        solvers=("ddim", "rk45"), budgets=(5, 10), tols=(0.1,), grids=("logsnr", "karras"), seeds=(0, 1)
    )
    cells = list(settings.cells())
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 + 2  # an adaptive solver has no use for a grid


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"solvers": ("huen",)}, "heun"),
        ({"solvers": ("zz*",)}, "no solver is called like"),
        ({"grids": ("karas",)}, "karras"),
        ({"budgets": (0,)}, "budgets"),
        ({"budgets": (), "tols": ()}, "at least one"),
        ({"tols": (0.0,)}, "tolerances"),
        ({"samples": 1}, "at least 2"),
        ({"seeds": (-1,)}, "seeds"),
        ({"reference_steps": 7}, "even"),
    ],
)
def test_bad_settings_are_refused_before_the_work(given, message):
    with pytest.raises(ValueError, match=message):
        Comparison(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"solvers": ("rk4",), "budgets": (2, 3)}, "rk4 needs at least 4 network calls, and the largest budget is 3"),
        ({"solvers": ("dopri54",), "tols": ()}, "dopri54 chooses its own steps: give tolerances"),
        ({"solvers": ("adaptive",), "tols": ()}, "no solver of this comparison"),
        ({"solvers": ("heun",), "budgets": ()}, "heun takes fixed steps: give budgets"),
    ],
)
def test_impossible_budgets_are_refused_before_the_work(given, message):
    with pytest.raises(ValueError, match=message):
        compare(Comparison(**given))
