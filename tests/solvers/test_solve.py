"""solve and integrate: budgets, trajectories, counts, and one clear line for every mistake."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from solvers import (
    DDIM,
    GRIDS,
    ODE,
    SOLVERS,
    Ancestral,
    DiffusionProblem,
    Heun,
    Prediction,
    Solver,
    integrate,
    prior,
    resolve,
    solve,
)
from solvers.certify import gaussian
from solvers.solve import steps_within


@pytest.fixture
def problem(vp) -> DiffusionProblem:
    return gaussian(vp)


@pytest.fixture
def x(vp) -> Tensor:
    return prior(vp, (3, 2), seed=0)


# --- Budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.nfe_per_step])
def test_a_budget_is_respected_and_what_was_spent_is_said(name: str, problem, x: Tensor) -> None:
    calls, solver = 0, SOLVERS[name]

    def counting(function):
        def call(x, t):
            nonlocal calls
            calls += 1
            return function(x, t)

        return call

    for nfe in (1, 2, 3, 4, 5, 7, 9, 12, 20, 33):
        calls = 0
        if nfe < solver.nfe(1):
            with pytest.raises(
                ValueError, match=rf"needs at least {solver.nfe(1)} evaluations, the budget is nfe={nfe}$"
            ):
                solve(problem.calling(counting), x, solver=name, nfe=nfe, seed=0)
            assert calls == 0
            continue
        done = solve(problem.calling(counting), x, solver=name, nfe=nfe, seed=0)
        assert calls == done.nfe <= nfe
        assert nfe < solver.nfe(len(done.ts))  # one step more would not fit


def test_denoising_at_the_end_is_paid_for_by_the_budget(problem, x: Tensor) -> None:
    done = solve(problem, x, solver="ddim", nfe=10, end="denoise")
    assert done.nfe == 10
    assert len(done.ts) == 10
    plain = solve(problem, x, solver="ddim", steps=9)
    assert torch.equal(done.x, problem.predict(plain.x, plain.ts[-1]).x0)


def test_steps_within() -> None:
    assert steps_within(Heun(), 21) == 10
    with pytest.raises(ValueError, match="needs at least 2 evaluations, the budget is nfe=1"):
        steps_within(Heun(), 1)
    with pytest.raises(ValueError, match="controls its own steps"):
        steps_within(SOLVERS["dopri5"], 20)


def test_every_way_to_say_the_grid_is_the_same_grid(problem, x: Tensor) -> None:
    steps = solve(problem, x, solver="ddim", steps=8, grid="karras")
    assert torch.equal(steps.x, solve(problem, x, solver="ddim", ts=GRIDS["karras"](problem.path, 8)).x)
    assert torch.equal(steps.x, solve(problem, x, solver=DDIM(), nfe=8, grid=GRIDS["karras"]).x)
    assert torch.equal(steps.x, integrate(DDIM(), problem, x, steps.ts).x)
    assert torch.equal(steps.x, solve(problem, x, solver="solvers.ancestral:DDIM", steps=8, grid="karras").x)


def test_tighter_tolerances_cost_more_and_err_less(problem, x: Tensor) -> None:
    exact = solve(problem, x.double(), solver="dop853_lam", tol=1e-12).x
    for name in ("dopri5", "rk45", "dopri5_lam", "rk45_lam"):
        loose, tight = (solve(problem, x.double(), solver=name, tol=tol) for tol in (1e-4, 1e-8))
        assert loose.nfe < tight.nfe
        assert (loose.x - exact).abs().max() > (tight.x - exact).abs().max()
        assert (tight.x - exact).abs().max() < 1e-6


def test_an_ode_is_solved_by_what_needs_a_velocity_only() -> None:
    turning = ODE(lambda x, t: torch.stack([-x[:, 1], x[:, 0]], 1), t_min=0.0, t_max=math.pi)
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for name in ("heun", "rk4", "dopri5_fixed", "torchdiffeq_rk4", "dopri5", "rk45"):
        budget = {"tol": 1e-6} if SOLVERS[name].order == 0 else {"steps": 100}
        for encode in (False, True):
            done = solve(turning, start, solver=name, encode=encode, **budget)
            assert torch.allclose(done.x, -start, atol=1e-3), name
    assert solve(turning, start, solver="rk4", steps=5).nfe == 20


# --- Trajectories -----------------------------------------------------------------------------------------------------


def test_a_trajectory_holds_what_happened(problem, x: Tensor) -> None:
    seen = []
    done = solve(
        problem,
        x,
        solver="ancestral",
        steps=5,
        seed=9,
        save="all",
        callback=lambda i, t, x: seen.append((i, float(t), x)),
    )
    assert done.seed == 9
    assert done.xs is not None
    assert done.xs.shape == (6, 3, 2)
    assert torch.equal(done.xs[0], x)
    assert torch.equal(done.xs[-1], done.x)
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    assert [t for _, t, _ in seen] == done.ts[1:].tolist()
    assert torch.equal(seen[2][2], done.xs[3])
    assert "5 steps of logsnr, nfe=5" in repr(done)
    assert "seed=9" in repr(done)


def test_a_run_without_a_seed_says_which_it_drew(problem, x: Tensor) -> None:
    before = torch.random.get_rng_state()
    done = solve(problem, x, solver="euler_maruyama", steps=4)
    assert done.seed is not None
    assert torch.equal(done.x, solve(problem, x, solver="euler_maruyama", steps=4, seed=done.seed).x)
    assert solve(problem, x, solver="euler", steps=4).seed is None
    assert torch.equal(before, torch.random.get_rng_state())


def test_encode_walks_back(problem, x: Tensor) -> None:
    there = solve(problem, x.double(), solver="rk4", steps=40)
    back = solve(problem, there.x, solver="rk4", steps=40, encode=True)
    assert torch.equal(back.ts, there.ts.flip(0))
    assert torch.allclose(back.x, x.double(), atol=1e-4)


def test_prior_samples_are_keyed_and_scaled(path) -> None:
    sigma = float(path.sigma(torch.tensor(path.t_max, dtype=torch.float64)))
    many = prior(path, (2000, 4), seed=0)
    assert float(many.std()) == pytest.approx(sigma, rel=0.03)
    assert torch.equal(prior(path, (1, 4), seed=0, samples=[7])[0], many[7])


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [("huen", "'heun'"), ("dpmpp2m", "'dpmpp_2m'"), ("DDIM", "ddim"), ("eulermaruyama", "'euler_maruyama'")],
)
def test_an_unknown_solver_is_told_its_neighbours(name: str, near: str, problem, x: Tensor) -> None:
    with pytest.raises(ValueError, match="unknown solver") as error:
        solve(problem, x, solver=name, steps=2)
    assert near in str(error.value)
    assert one_line(error)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, "at least 1, got 0"),
        ({"steps": -3}, "at least 1, got -3"),
        ({}, "exactly one of steps, nfe, ts and tol"),
        ({"steps": 4, "nfe": 4}, "exactly one of"),
        ({"nfe": 1}, "needs at least 2 evaluations, the budget is nfe=1"),
        ({"nfe": -5}, "needs at least 2 evaluations"),
        ({"tol": 1e-3}, "takes fixed steps: give steps, nfe or ts, not tol"),
        ({"tol": -1.0}, "tol is positive"),
        ({"steps": 4, "grid": "karas"}, "unknown grid 'karas'; did you mean 'karras'"),
        ({"ts": torch.tensor([1.0, 0.5, 0.6, 0.0])}, "strictly monotone"),
        ({"ts": torch.tensor([1.0, 0.5, 0.5, 0.0])}, "followed by t = 0.5"),
        ({"ts": torch.tensor([1.5, 0.5])}, "path's range"),
        ({"ts": torch.tensor([1.0, 0.5]), "encode": True}, r"ts falls from 1 to 0.5: give ts.flip\(0\)"),
    ],
)
def test_an_impossible_request_is_one_clear_line(arguments: dict, words: str, problem, x: Tensor) -> None:
    with pytest.raises(ValueError, match=words) as error:
        solve(problem, x, solver="heun", **arguments)
    assert one_line(error)


@pytest.mark.parametrize(("what", "value"), [("steps", 5.0), ("steps", "5"), ("nfe", 8.5), ("seed", 1.5)])
def test_what_is_counted_is_whole(what: str, value: object, problem, x: Tensor) -> None:
    budget = {} if what != "seed" else {"steps": 4}
    with pytest.raises(TypeError, match=f"{what} is a whole number, got {value!r}"):
        solve(problem, x, solver="ancestral", **budget, **{what: value})
    assert solve(problem, x, solver="ancestral", steps=np.int64(4), seed=np.int64(3)).seed == 3


def test_an_ode_has_no_noise_levels() -> None:
    with pytest.raises(ValueError, match="the grid karras needs a path, uniform needs none"):
        solve(ODE(lambda x, t: -x), torch.ones(1, 1), solver="heun", steps=4, grid="karras")


@pytest.mark.parametrize("name", ["nowhere:Heun", "solvers:Nobody", "math:pi", "solvers:prior"])
def test_what_leads_to_no_solver_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot load|not a solvers.Solver"):
        resolve(name)


def test_a_stochastic_solver_needs_noise(problem, x: Tensor) -> None:
    with pytest.raises(ValueError, match="draws noise"):
        integrate(Ancestral(), problem, x, GRIDS["logsnr"](problem.path, 3))


@pytest.mark.parametrize("state", [torch.zeros(3, 2, dtype=torch.long), torch.tensor(1.0)])
def test_what_is_no_state_is_refused(state: Tensor, problem) -> None:
    with pytest.raises(ValueError, match="a state is a floating tensor"):
        solve(problem, state, solver="ddim", steps=2)


def test_an_ode_predicts_no_data() -> None:
    with pytest.raises(ValueError, match="denoise"):
        solve(ODE(lambda x, t: x), torch.ones(1, 1), solver="heun", steps=2, end="denoise")


def broken_at(problem: DiffusionProblem, call: int, what) -> DiffusionProblem:
    """The same problem with the answer number ``call`` of each walk replaced."""
    calls = {"n": 0}

    def wrap(function):
        def predict(x: Tensor, t: Tensor):
            calls["n"] = 1 if float(t) == problem.t_max else calls["n"] + 1
            out = function(x, t)
            return what(out) if calls["n"] == call else out

        return predict

    return problem.calling(wrap)


def with_nan(out: Prediction) -> Prediction:
    x0 = out.x0.clone()
    x0[1] = math.nan
    return Prediction(x0, out.eps)


@pytest.mark.parametrize("name", ["ddim", "ancestral", "dpmpp_2m"])
def test_nan_is_traced_to_solver_step_time_and_sample(name: str, problem, x: Tensor) -> None:
    t = float(GRIDS[resolve(name).grid](problem.path, 8)[3])
    with pytest.raises(FloatingPointError) as error:
        solve(broken_at(problem, 4, with_nan), x, solver=name, steps=8, seed=0)
    message = str(error.value)
    for word in (f"{name}: ", "step 4", f"t = {t:.6g}", "first bad sample: 1", "prediction"):
        assert word in message, message
    assert one_line(error)


def test_nan_in_the_start_is_not_blamed_on_the_solver(problem, x: Tensor) -> None:
    x[2] = math.inf
    with pytest.raises(FloatingPointError, match=r"the initial state .* \(first bad sample: 2\)"):
        solve(problem, x, solver="ddim", steps=3)


def test_a_step_that_changes_the_shape_of_the_state_is_refused(problem, x: Tensor) -> None:
    class Shrinking(DDIM):
        def step(self, problem, x, t, s, state, noise):
            x, state = super().step(problem, x, t, s, state, noise)
            return x[:1], state

    with pytest.raises(ValueError, match=r"Shrinking.*made a state of shape \(1, 2\) of one of \(3, 2\)"):
        solve(problem, x, solver=Shrinking(), steps=3)


def test_a_prediction_of_the_wrong_shape_names_solver_and_step(problem, x: Tensor) -> None:
    wrong = broken_at(problem, 2, lambda out: Prediction(out.x0[:, :1], out.eps))
    with pytest.raises(ValueError, match=r"^ddim: step 2, t = .* shape \(3, 1\) and \(3, 2\) where .* \(3, 2\)"):
        solve(wrong, x, solver="ddim", steps=4)


def test_what_is_no_prediction_is_refused(problem, x: Tensor) -> None:
    with pytest.raises(
        TypeError, match=r"^ddim: step 1, t = 1: predict returns Prediction\(x0, eps\), .*, got tuple\(Tensor, Tensor\)"
    ):
        solve(DiffusionProblem(problem.path, lambda x, t: (x, x)), x, solver="ddim", steps=2)


def test_a_solver_of_ones_own_is_a_solver(problem, x: Tensor) -> None:
    class Still(Solver[None]):
        order, nfe_per_step = 1, 0

        def step(self, problem, x, t, s, state, noise):
            return x, state

    assert torch.equal(solve(problem, x, solver=Still(), steps=3).x, x)


# --- Cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_costs_little_more_than_its_arithmetic(vp) -> None:
    """DDIM on an image batch against a loop written by hand; the benchmark has the figures, this is an alarm."""
    x = torch.randn(64, 3, 32, 32)
    given = Prediction(torch.randn_like(x), torch.randn_like(x))
    problem = DiffusionProblem(vp, lambda x, t: given)
    ts = GRIDS["logsnr"](vp, 100)
    alphas, sigmas = vp.alpha(ts).tolist(), vp.sigma(ts).tolist()

    def by_hand() -> None:
        for alpha, sigma in zip(alphas[1:], sigmas[1:], strict=True):
            x0, eps = problem.predict(x, ts)
            torch.add(x0 * alpha, eps, alpha=sigma)

    def timed(f) -> float:
        times = []
        for _ in range(7):
            start = time.process_time()
            f()
            times.append(time.process_time() - start)
        return min(times)

    ratio = timed(lambda: integrate(DDIM(), problem, x, ts)) / timed(by_hand)
    assert ratio < 2.5, ratio


def test_a_trajectory_says_which_grid_was_walked(problem) -> None:
    """The solver's own where none was asked for, and no name where nodes were given."""
    x = prior(problem.path, (2, 2), seed=0)
    chosen = solve(problem, x, solver="dpmpp_2m", steps=4)
    assert chosen.grid == resolve("dpmpp_2m").grid == "sqrt_flow"
    assert torch.equal(chosen.ts, GRIDS["sqrt_flow"](problem.path, 4))
    assert "4 steps of sqrt_flow" in repr(chosen)
    assert solve(problem, x, solver="dpmpp_2m", steps=4, grid="karras").grid == "karras"
    assert solve(problem, x, solver="dpmpp_2m", steps=4, grid=GRIDS["flow"]).grid == "flow"
    assert solve(problem, x, solver="dpmpp_2m", ts=chosen.ts).grid is None
    assert solve(problem, x, solver="dopri5", tol=1e-2).grid is None


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "edm_heun", "bosh32", "ancestral"])
def test_a_method_that_needs_a_prediction_says_so_of_an_ode(solver: str) -> None:
    ode = ODE(lambda x, t: -x)
    with pytest.raises(ValueError, match="neither path nor prediction: this method needs a DiffusionProblem"):
        solve(ode, torch.ones(2, 3), solver=solver, ts=torch.tensor([0.0, 0.5, 1.0]), seed=0)
