"""The problem: linear combinations, look-ups, coordinates, and the laws that tie score, velocity and drift."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdegen.paths import VP, Cosine, GaussianPath, SubVP
from solvers import (
    EDM,
    FLOW,
    ODE,
    VP_LAM,
    Chord,
    Circle,
    Coordinates,
    DiffusionProblem,
    Path,
    Ray,
    Tangent,
    expand,
    mix,
)
from solvers.certify import gaussian
from solvers.curves import FlowTime, Lam, OwnClock, SigmaHat
from solvers.problem import Nodes, Passage

CURVES = (Circle(), Chord(), Ray(), Tangent())
CLOCKS = (Lam(), SigmaHat(), FlowTime())
LOGSNR = torch.linspace(-12, 12, 25, dtype=torch.float64)


def slope(f, t: Tensor) -> Tensor:
    """Exact derivative, by automatic differentiation."""
    t = t.clone().requires_grad_()
    return torch.autograd.grad((f(t) + 0 * t).sum(), t)[0]  # which may be constant


# --- mix and expand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mix_is_the_linear_combination_in_the_dtype_of_the_states(dtype: torch.dtype) -> None:
    x, y, z = torch.randn(3, 4, 2, 5, dtype=torch.float64).to(dtype)
    a, b = torch.tensor([0.3, -1.7], dtype=torch.float64)
    out = mix((a, x), (b, y), (0.25, z))
    assert out.dtype == dtype
    assert torch.allclose(
        out, (0.3 * x.double() - 1.7 * y.double() + 0.25 * z.double()).to(dtype), rtol=2e-2, atol=1e-2
    )


def test_mix_does_not_write_into_what_it_is_given() -> None:
    x, y = torch.ones(3), torch.ones(3)
    mix((1.0, x), (2.0, y))
    mix((3.0, x), (2.0, y), (1.0, x))
    assert torch.equal(x, torch.ones(3))
    assert torch.equal(y, torch.ones(3))


def test_coefficients_per_sample_meet_their_samples() -> None:
    x = torch.ones(3, 2, 2)
    c = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for shaped in (c, c.reshape(3, 1, 1)):
        out = mix((shaped, x), (0.5, x))
        assert out.dtype == torch.float32
        assert out[:, 0, 0].tolist() == [1.5, 2.5, 3.5]
    assert expand(c, x).shape == (3, 1, 1)
    assert expand(c[0], x) is not None
    assert expand(c[0], x).ndim == 0


def test_coefficients_can_be_learned() -> None:
    c = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    mix((c, torch.ones(3)), (c**2, 2 * torch.ones(3))).sum().backward()
    assert float(c.grad) == pytest.approx(3 + 3 * 2 * 2 * 0.5)


# --- Nodes ------------------------------------------------------------------------------------------------------------


def test_nodes_look_up_what_the_path_would_say() -> None:
    path = VP(Cosine())
    ts = torch.linspace(path.t_max, path.t_min, 9, dtype=torch.float64)
    nodes = ts.unbind()
    table = Nodes(path, nodes)
    assert isinstance(table, Path)
    other = torch.tensor(0.123, dtype=torch.float64)
    for name in ("alpha", "sigma", "logsnr", "f", "g2"):
        ask, look = getattr(path, name), getattr(table, name)
        for t in (*nodes, other, ts):
            assert torch.equal(look(t), ask(t))
        assert look(nodes[3]) is look(nodes[3]), "computed once"
    assert float(table.time(path.logsnr(other))) == pytest.approx(0.123)


# --- Passages ---------------------------------------------------------------------------------------------------------


def test_a_passage_leads_there_and_back(path: GaussianPath) -> None:
    nodes = torch.linspace(path.t_max, path.t_min, 7, dtype=torch.float64).unbind()
    known, computed = Nodes(path, nodes).to(EDM.over(path)), Passage(path, EDM.over(path))
    for t in (*nodes, torch.tensor(0.3, dtype=torch.float64), torch.tensor([0.2, 0.4], dtype=torch.float64)):
        u = known.forth(t)
        assert torch.allclose(u, computed.forth(t), rtol=1e-14)
        assert torch.allclose(computed.back(u), t, atol=1e-9)
        for passage in (known, computed):  # alpha' = 1
            assert torch.allclose(torch.as_tensor(passage.unit(u), dtype=torch.float64), path.alpha(t), rtol=1e-9)
    assert all(known.back(known.forth(t)) is t for t in nodes)  # from object to object


@pytest.mark.parametrize("there", [EDM, FLOW, VP_LAM], ids=repr)
@pytest.mark.parametrize("together", [True, False])
def test_through_a_passage_the_equation_is_the_other_paths(there, together: bool, path: GaussianPath) -> None:
    problem, there = gaussian(path), there.over(path)
    u = there.time(torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64))
    u = u[0] if together else u
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen, moved = problem.through(Passage(path, there)), problem.rescaled(there)
    other = mix(*seen.terms(x, u))
    assert torch.allclose(other, expand(there.alpha(u) / path.alpha(path.time(there.logsnr(u))), x) * x, rtol=1e-9)
    assert torch.allclose(seen.state(u, (1.0, seen.terms(x, u))), x, rtol=1e-12)
    assert torch.allclose(seen.state(u, (0.5, ((2.0, other),)), (1.0, seen.terms(x, u))), 2 * x, rtol=1e-12)
    for of in (DiffusionProblem.velocity, DiffusionProblem.score, lambda p, x, t: p.sde(0.7).drift(x, t)):
        assert torch.allclose(of(seen, x, u), of(moved, other, u), rtol=1e-9, atol=1e-12)


def test_passages_follow_one_another(path: GaussianPath) -> None:
    edm, flow = EDM.over(path), FLOW.over(path)
    direct = gaussian(path).through(Passage(path, flow))
    around = gaussian(path).through(Passage(path, edm)).through(Passage(edm, flow))
    u, x = flow.time(torch.tensor(0.7, dtype=torch.float64)), torch.ones(2, 3, dtype=torch.float64)
    assert torch.allclose(mix(*around.terms(x, u)), mix(*direct.terms(x, u)), rtol=1e-12)
    assert torch.allclose(around.velocity(x, u), direct.velocity(x, u), rtol=1e-9)
    wrapped = around.calling(lambda predict: predict).at([u])
    assert torch.allclose(wrapped.velocity(x, u), direct.velocity(x, u), rtol=1e-9)


def test_what_the_state_does_not_drive_is_not_added_up() -> None:
    """On the ray f is zero: a velocity is one product."""
    x, t = torch.ones(2, 3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    path = VP(Cosine())
    ((_, eps),) = gaussian(path).rescaled(EDM.over(path)).slope(x, t)
    assert eps is not x
    assert len(gaussian(path).slope(x, t)) == 2


# --- Coordinates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", CURVES, ids=repr)
@pytest.mark.parametrize("clock", CLOCKS, ids=repr)
def test_coordinates_are_a_path(curve, clock) -> None:
    path = Coordinates(curve, clock)
    assert isinstance(path, Path)
    t = path.time(LOGSNR)
    assert torch.allclose(path.logsnr(t), LOGSNR, atol=1e-9)
    assert torch.allclose(path.alpha(t).log() - path.sigma(t).log(), LOGSNR / 2, atol=1e-9)
    assert torch.allclose(path.f(t), slope(lambda t: path.alpha(t).log(), t), rtol=1e-8, atol=1e-10)
    assert torch.allclose(path.g2(t), -(path.sigma(t) ** 2) * slope(path.logsnr, t), rtol=1e-8)


def test_curves_meet_their_constraints() -> None:
    for curve, constraint in (
        (Circle(), lambda a, s: a**2 + s**2),
        (Chord(), lambda a, s: a + s),
        (Ray(), lambda a, s: a),
        (Tangent(), lambda a, s: s),
    ):
        values = constraint(curve.alpha(LOGSNR), curve.sigma(LOGSNR))
        assert torch.allclose(values, torch.ones_like(values), atol=1e-14)


def test_the_named_coordinates_are_those_of_their_papers() -> None:
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    assert torch.equal(EDM.alpha(t), torch.ones(2).double())
    assert torch.allclose(EDM.sigma(t), t)
    assert torch.allclose(FLOW.alpha(t), 1 - t)
    assert torch.allclose(FLOW.sigma(t), t)
    assert torch.allclose(VP_LAM.logsnr(t), -2 * t)


@pytest.mark.parametrize("path", [VP(), VP(Cosine()), SubVP()], ids=str)
def test_a_paths_own_clock(path: GaussianPath) -> None:
    t = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    clock = OwnClock(path)
    assert torch.allclose(clock.dlogsnr(t), slope(path.logsnr, t), rtol=1e-8)
    assert torch.allclose(clock.time(clock.logsnr(t)), t)


def test_coordinates_over_a_path_cover_its_range(path: GaussianPath) -> None:
    there = VP_LAM.over(path)
    ends = torch.tensor([there.t_min, there.t_max], dtype=torch.float64)
    expected = path.logsnr(torch.tensor([path.t_min, path.t_max], dtype=torch.float64))
    assert torch.allclose(there.logsnr(ends), expected)


# --- Problems ---------------------------------------------------------------------------------------------------------


def test_rescaling_changes_neither_data_nor_noise(path: GaussianPath) -> None:
    problem = gaussian(path)
    moved = problem.rescaled(EDM)
    t = torch.tensor(path.t_min + 0.3 * (path.t_max - path.t_min), dtype=torch.float64)
    x = torch.randn(5, 2, dtype=torch.float64)
    u = EDM.time(path.logsnr(t))
    here, there = problem.predict(x, t), moved.predict(x / path.alpha(t), u)
    assert torch.allclose(here.x0, there.x0, atol=1e-12)
    assert torch.allclose(here.eps, there.eps, atol=1e-12)


def test_a_rescaled_problem_never_asks_outside_the_range(path: GaussianPath) -> None:
    asked: list[float] = []

    def noting(function):
        def predict(x: Tensor, t: Tensor):
            asked.append(float(t))
            return function(x, t)

        return predict

    moved = gaussian(path).calling(noting).rescaled(VP_LAM)
    for t in (path.t_min, path.t_max):
        lam = path.logsnr(torch.tensor(t, dtype=torch.float64)) / 2
        for shift in (-1e-13, 0.0, 1e-13):
            moved.predict(torch.zeros(1, 1).double(), -lam + shift)
    assert path.t_min <= min(asked)
    assert max(asked) <= path.t_max


@pytest.mark.parametrize("encode", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_member_of_the_family_keeps_the_marginals(eta: float, encode: bool, path: GaussianPath) -> None:
    """Mean and variance of the exact Gaussian marginals satisfy the moment equations of the SDE."""
    mean, std = 0.3, 0.5
    problem = gaussian(path, mean, std)
    sde = problem.sde(eta, encode=encode)
    t = torch.tensor(path.t_min + 0.4 * (path.t_max - path.t_min), dtype=torch.float64)
    probes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    offset, line = sde.drift(probes, t)[0, 0], sde.drift(probes, t).diff(dim=0)[0, 0]
    dmean = slope(lambda t: path.alpha(t) * mean, t)
    variance = (path.alpha(t) * std) ** 2 + path.sigma(t) ** 2
    dvariance = slope(lambda t: (path.alpha(t) * std) ** 2 + path.sigma(t) ** 2, t)
    assert float(offset + line * path.alpha(t) * mean) == pytest.approx(float(dmean), rel=1e-9, abs=1e-9)
    # run towards the noise, noise adds to the variance; towards the data it is what time runs against
    sign = 1 if encode else -1
    added = 2 * line * variance + sign * sde.diffusion(t) ** 2
    assert float(added) == pytest.approx(float(dvariance), rel=1e-9, abs=1e-9)


def test_score_and_velocity_are_the_predictions_in_other_words(path: GaussianPath) -> None:
    problem = gaussian(path)
    t = torch.tensor(path.t_min + 0.4 * (path.t_max - path.t_min), dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    x0, eps = problem.predict(x, t)
    assert torch.allclose(problem.score(x, t), -eps / path.sigma(t))
    # dx/dt along x = alpha x0 + sigma eps at fixed x0 and eps
    rates = slope(path.alpha, t) * x0 + slope(path.sigma, t) * eps
    assert torch.allclose(problem.velocity(x, t), rates, rtol=1e-9, atol=1e-9)


def test_times_may_differ_among_samples(path: GaussianPath) -> None:
    problem = gaussian(path)
    t = torch.linspace(path.t_min, path.t_max, 5, dtype=torch.float64)[1:-1]
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    together = problem.velocity(x, t)
    for i in range(3):
        assert torch.allclose(together[i], problem.velocity(x[i : i + 1], t[i])[0])


def test_calling_wraps_the_function_and_keeps_the_rest(path: GaussianPath) -> None:
    problem = gaussian(path)
    doubled = problem.calling(lambda f: lambda x, t: f(2 * x, t))
    x, t = torch.ones(1, 1).double(), torch.tensor(path.t_max, dtype=torch.float64)
    assert torch.equal(doubled.predict(x, t).x0, problem.predict(2 * x, t).x0)
    assert isinstance(doubled, DiffusionProblem)
    assert (doubled.t_min, doubled.t_max) == (path.t_min, path.t_max)
    ode = ODE(lambda x, t: x, 0.2, 0.9).calling(lambda f: lambda x, t: -f(x, t))
    assert (ode.t_min, ode.t_max) == (0.2, 0.9)
    assert torch.equal(ode.velocity(x, t), -x)
