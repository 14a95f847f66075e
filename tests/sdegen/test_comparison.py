"""Solvers against exact solutions: the exact solutions themselves, the distances, and what is reported."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sdegen.comparison import (
    Comparison,
    LazyBrownianMotion,
    best,
    compare,
    curves,
    exact_ode,
    exact_sde,
    sliced_wasserstein,
)
from sdegen.oracles import GaussianOracle, oracle
from sdegen.paths import PATHS, VE, VP, Flow
from solvers import BrownianMotion, prior, solve

SMALL = Comparison(
    solvers=("ddim", "heun", "ancestral", "dopri5"), samples=16, cloud=200, budgets=(6, 12), tols=(1e-2,)
)


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


def test_exact_sde_has_the_right_law_and_converges_along_one_brownian_motion():
    path = PATHS["vp-linear"]()
    problem = GaussianOracle([0.5], [0.09]).problem(path)
    x = prior(path, (4000, 1), 0, dtype=torch.float64)
    end = exact_sde(problem, x, LazyBrownianMotion(x, 1), steps=200)
    assert abs(float(end.mean()) - 0.5) < 0.02
    assert abs(float(end.std()) - 0.3) < 0.02
    x = x[:64]
    fine, middle, coarse = (exact_sde(problem, x, BrownianMotion(x, 0), steps=n) for n in (512, 128, 32))
    near, far = (float((fine - z).square().mean().sqrt()) for z in (middle, coarse))
    assert near < 0.4 * far  # order one: a quarter


def test_stochastic_solvers_converge_to_the_exact_sde():
    """The reference and the solver are different code on the same Brownian path."""
    path = PATHS["vp-linear"]()
    problem = oracle("gaussian").problem(path)
    x = prior(path, (32, 2), 0, dtype=torch.float64)
    exact = exact_sde(problem, x, BrownianMotion(x, 0), steps=1024)
    errors = [
        float((solve(problem, x, solver="ancestral", steps=n, noise=BrownianMotion(x, 0)).x - exact).norm())
        for n in (32, 128)
    ]
    assert errors[1] < 0.4 * errors[0]


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


def test_sliced_wasserstein_of_a_shift_and_of_itself():
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([0.3, 0.0, 0.4])
    assert sliced_wasserstein(x, x[torch.randperm(500)]) < 1e-6
    # a unit vector's squared projections average to 1/3 in three dimensions
    assert sliced_wasserstein(x, x + shift, projections=4000) == pytest.approx(0.5 / math.sqrt(3), rel=0.03)
    with pytest.raises(ValueError, match="as many samples"):
        sliced_wasserstein(x, x[:-1])


def test_compare_counts_calls_and_ranks():
    found = compare(SMALL)
    assert set(found["solver"]) == set(SMALL.solvers)
    fixed = found["solver"] != "dopri5"
    assert (found["nfe"][fixed] <= found["budget"][fixed]).all()
    assert (found["error"] > 0).all()
    assert (found["error_se"] > 0).all()
    assert found["floor"][1] <= found["floor"][0] <= found["floor"][2]
    assert found.attributes["solvers"] == list(SMALL.solvers)
    ranked = best(found, 12)
    assert [value for _, value in ranked] == sorted(value for _, value in ranked)
    assert "dopri5" not in dict(ranked)  # spends more than twelve calls
    nfe, error = curves(found, ["heun"], "error")["heun"]
    assert nfe.tolist() == [6, 12]
    assert error[1] < error[0]


def test_compare_is_reproducible_and_its_seed_matters():
    settings = Comparison(solvers=("heun", "ancestral"), samples=8, cloud=50, budgets=(6,), reference_steps=64)
    one, two = compare(settings), compare(settings)
    np.testing.assert_array_equal(one["error"], two["error"])
    np.testing.assert_array_equal(one["distance"], two["distance"])
    other = compare(Comparison(solvers=("heun",), samples=8, cloud=0, budgets=(6,), seed=1))
    assert other["error"][0] != one["error"][0]
    assert np.isnan(other["distance"]).all()


def test_a_wrong_solver_stands_out():
    """A solver with a coefficient that is one percent wrong stops converging, and its error says so."""
    import sys

    from solvers.ancestral import DDIM

    @dataclass(frozen=True)
    class Wrong(DDIM):
        def step(self, problem, x, t, s, state, noise):
            y, state = super().step(problem, x, t, s, state, noise)
            return 1.01 * y, state

    sys.modules[__name__].Wrong = Wrong
    settings = Comparison(solvers=("ddim", f"{__name__}:Wrong"), samples=16, cloud=0, budgets=(100,))
    right, wrong = compare(settings)["error"]
    assert wrong > 3 * right


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"solvers": ("huen",)}, "heun"),
        ({"path": "vp-lin"}, "vp-linear"),
        ({"oracle": "mixture"}, "mixture2d"),
        ({"budgets": (0,)}, "budgets"),
        ({"budgets": ()}, "budgets"),
        ({"samples": 1}, "at least 2"),
    ],
)
def test_bad_settings_are_refused_before_the_work(given, message):
    with pytest.raises(ValueError, match=message):
        Comparison(**given)
