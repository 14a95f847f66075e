"""Solvers as tables: traced, replayed, analysed, stored."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from sdegen.oracles import MixtureOracle
from sdegen.paths import VP, GaussianPath, LinearLogSNR
from solvers import (
    DDIM,
    SOLVERS,
    BrownianMotion,
    DiffusionProblem,
    Heun,
    Moments,
    Noise,
    Path,
    Prediction,
    Solver,
    Table,
    capture,
    integrate,
    mix,
    prior,
    replay,
    trace,
)
from solvers.certify import gaussian, uneven, weak_order
from solvers.grids import logsnr
from solvers.problem import Predict
from solvers.replay import Captured, _compiled, _plan, _play
from solvers.tables import EVALUATE, KEEP, STATE

FIXED = [name for name, solver in SOLVERS.items() if solver.nfe_per_step > 0]
ADAPTIVE = [name for name, solver in SOLVERS.items() if solver.nfe_per_step == 0]
NONLINEAR = [name for name in FIXED if name == "pc_langevin"]
"""Its steps depend on norms of the state; there are no others."""
LINEAR = [name for name in FIXED if name not in NONLINEAR]


def stepped(solver: Solver[object], problem: DiffusionProblem, x: Tensor, ts: Tensor, **options: object) -> Tensor:
    return integrate(solver, problem, x, ts, noise=BrownianMotion(x, seed=4), **options).x


# --- Replaying is stepping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
def test_a_replay_is_the_solver_to_rounding(name: str, path: GaussianPath, mixture: MixtureOracle) -> None:
    solver, problem, ts = SOLVERS[name], mixture.problem(path), uneven(path, 9)
    table = trace(name, path, ts)
    x = prior(path, (5, 2), seed=0, dtype=torch.float64)
    expected = integrate(solver, problem, x, ts, noise=BrownianMotion(x, seed=4))
    found = replay(table, problem.predict, x, noise=BrownianMotion(x, seed=4))
    torch.testing.assert_close(found, expected.x, rtol=1e-9, atol=1e-9)
    assert table.nfe == expected.nfe == solver.nfe(9)
    assert table.steps == 9
    assert (table.draws > 0) == solver.stochastic
    assert np.array_equal(table.ts, ts.numpy())


@pytest.mark.parametrize("name", LINEAR)
def test_a_replay_in_single_precision_is_as_near(name: str, vp: GaussianPath) -> None:
    ts = logsnr(vp, 12)
    problem, x = gaussian(vp), prior(vp, (3, 1, 4, 4), seed=0)
    expected = stepped(SOLVERS[name], problem, x, ts)
    found = replay(trace(name, vp, ts), problem.predict, x, noise=BrownianMotion(x, seed=4))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "edm_heun"])
def test_a_table_encodes(name: str, vp: GaussianPath, mixture: MixtureOracle) -> None:
    ts, problem, x = logsnr(vp, 7).flip(0), mixture.problem(vp), mixture.sample(4, seed=0)
    found = replay(trace(name, vp, ts), problem.predict, x)
    torch.testing.assert_close(found, stepped(SOLVERS[name], problem, x, ts), rtol=1e-11, atol=1e-11)


def test_the_end_may_be_the_predicted_data(vp: GaussianPath, mixture: MixtureOracle) -> None:
    ts, problem, x = logsnr(vp, 5), mixture.problem(vp), prior(vp, (4, 2), seed=0, dtype=torch.float64)
    table = trace("dpmpp_2m", vp, ts, end="denoise")
    assert table.nfe == 6
    expected = stepped(SOLVERS["dpmpp_2m"], problem, x, ts, end="denoise")
    torch.testing.assert_close(replay(table, problem.predict, x), expected, rtol=1e-12, atol=1e-12)


def test_the_callback_sees_every_node_and_may_keep_it(vp: GaussianPath, mixture: MixtureOracle) -> None:
    ts, problem, x = logsnr(vp, 6), mixture.problem(vp), prior(vp, (4, 2), seed=0, dtype=torch.float64)
    seen: list[tuple[int, float, Tensor]] = []
    replay(trace("heun", vp, ts), problem.predict, x, callback=lambda i, t, x: seen.append((i, float(t), x)))
    xs = integrate(Heun(), problem, x, ts, save="all").xs
    assert xs is not None
    assert [i for i, *_ in seen] == list(range(6))
    assert [t for _, t, _ in seen] == ts[1:].tolist()
    torch.testing.assert_close(torch.stack([x for *_, x in seen]), xs[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "rk4"])
def test_a_prediction_may_be_the_point_itself_or_a_view_of_it(name: str, vp: GaussianPath) -> None:
    """The points live in memory that is used again; a prediction that lies there must not change under the solver."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return Prediction(x, x[:, 1:2].expand_as(x))

    x, ts = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), logsnr(vp, 5)
    expected = stepped(
        SOLVERS[name], DiffusionProblem(vp, lambda x, t: Prediction(*(p.clone() for p in predict(x, t)))), x, ts
    )
    torch.testing.assert_close(replay(trace(name, vp, ts), predict, x), expected, rtol=1e-11, atol=1e-11)


def some_table(draw: np.random.Generator) -> Table:
    """Rows of random lengths that read anything known, with many factors of one and rows that are other rows."""
    rows, n, m = 12, 4, 2
    kind = np.array([EVALUATE] * n + [STATE, KEEP] * ((rows - n) // 2))
    draw.shuffle(kind)
    columns, factors, first, asked = [], [], [0], 0
    for r in range(rows):
        answers = [1 + rows + j for j in range(asked)] + [1 + rows + n + j for j in range(asked)]
        known = [*range(1 + r), *answers, *(1 + rows + 2 * n + k for k in range(m))]
        recent = known[max(0, r - 3) : 1 + r] if draw.random() < 0.7 else known
        length = 1 if draw.random() < 0.3 else int(draw.integers(1, 6))
        some = draw.choice(recent, min(len(recent), length), replace=False)
        columns += some.tolist()
        factors += [1.0] if length == 1 else draw.choice([1.0, 1.0, -0.5, 0.3], len(some)).tolist()
        first.append(len(columns))
        asked += kind[r] == EVALUATE
    times = np.linspace(0.9, 0.1, 1 + rows)
    ones, intervals = np.ones(1 + rows), np.full((m, 2), np.nan)
    arrays = (np.array(a) for a in (first, columns, factors))
    return Table("random", kind, times, ones, ones, *arrays, intervals, int(draw.integers(rows - 3, rows + 1)))


def walked(table: Table, predict: Predict, x: Tensor, noises: Tensor) -> Tensor:
    """A replay that keeps everything and says what it does."""
    rows, n = len(table.kind), table.nfe
    values: dict[int, Tensor] = {0: x} | {1 + rows + 2 * n + k: z for k, z in enumerate(noises)}
    asked = 0
    for r, kind in enumerate(table.kind):
        span = slice(table.first[r], table.first[r + 1])
        parts = zip(table.coefficients[span].tolist(), table.columns[span].tolist(), strict=True)
        values[1 + r] = torch.stack([a * values[c] for a, c in parts]).sum(0)
        if kind == EVALUATE:
            answer = predict(values[1 + r], torch.tensor(table.time[1 + r]))
            values[1 + rows + asked], values[1 + rows + n + asked] = answer
            asked += 1
    return values[table.output]


def test_any_table_can_be_replayed() -> None:
    """Memory is used again as soon as nobody reads it, and by whoever reads it last: in every order, of every row."""
    x, *noises = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    answers: dict[str, Predict] = {
        "new": lambda z, t: Prediction((t * z).tanh(), z.sin()),
        "views": lambda z, t: Prediction(z, z.flip(0)[1:2].expand_as(z)),
    }
    for seed in range(300):
        table = some_table(np.random.default_rng(seed))
        for name, predict in answers.items():
            expected = walked(table, predict, x, torch.stack(noises))
            found = replay(table, predict, x.clone(), noise=noises)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_the_start_is_not_written_to(vp: GaussianPath) -> None:
    x = torch.ones(2, 3)
    replay(trace("dpmpp_2m", vp, logsnr(vp, 5)), gaussian(vp).predict, x)
    assert torch.equal(x, torch.ones(2, 3))


def test_a_replay_can_be_differentiated(vp: GaussianPath) -> None:
    ts, scale = logsnr(vp, 5), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return Prediction(scale * x.tanh(), x - scale * x.sin())

    table, problem = trace("dpmpp_2m", vp, ts), DiffusionProblem(vp, predict)
    for start in (x, x.detach()):  # the gradient begins at the state, or at the network's parameters
        wanted = [scale, x] if start is x else [scale]
        expected = torch.autograd.grad(stepped(SOLVERS["dpmpp_2m"], problem, start, ts).square().sum(), wanted)
        found = torch.autograd.grad(replay(table, predict, start).square().sum(), wanted)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_two_replays_are_equal_bit_for_bit(vp: GaussianPath, mixture: MixtureOracle) -> None:
    table = trace("ddim_0.5", vp, logsnr(vp, 8))
    again = Table.from_arrays(table.arrays())
    x = prior(vp, (6, 2), seed=1)
    one, two = (replay(t, mixture.problem(vp).predict, x, noise=BrownianMotion(x, seed=0)) for t in (table, again))
    assert torch.equal(one, two)


def test_noises_may_be_given_one_by_one(vp: GaussianPath) -> None:
    ts, problem, x = logsnr(vp, 4), gaussian(vp), prior(vp, (2, 3), seed=0)
    table, w = trace("ancestral", vp, ts), BrownianMotion(x, seed=3)
    noises = torch.stack([w(*ends) for ends in torch.tensor(table.intervals)])
    assert torch.equal(replay(table, problem.predict, x, noise=noises), replay(table, problem.predict, x, noise=w))


def test_misuse_is_said_in_one_line(vp: GaussianPath) -> None:
    ts, predict, x = logsnr(vp, 4), gaussian(vp).predict, torch.ones(2, 3)
    noisy, table = trace("ancestral", vp, ts), trace("ddim", vp, ts)
    with pytest.raises(ValueError, match=r"^DDIM.* draws noise|^Ancestral.* draws noise: pass noise="):
        replay(noisy, predict, x)
    with pytest.raises(ValueError, match="draws 4 noises, and 3 are given"):
        replay(noisy, predict, x, noise=torch.zeros(3, 2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 1\) where the state has \(2, 3\)"):
        replay(table, lambda x, t: Prediction(x[:, :1], x[:, :1]), x)
    with pytest.raises(FloatingPointError, match="first bad sample: 1"):
        replay(table, lambda x, t: Prediction(x / torch.tensor([[1.0], [0.0]]), x), x)
    with pytest.raises(ValueError, match="CUDA device"):
        capture(table, predict, x)


def test_a_finite_result_whose_sum_overflows_is_fine(vp: GaussianPath) -> None:
    def huge(x: Tensor, t: Tensor) -> Prediction:
        return Prediction(torch.full_like(x, 3e38), torch.zeros_like(x))

    assert bool(replay(trace("ddim", vp, logsnr(vp, 2)), huge, torch.zeros(2, 3)).isfinite().all())


# --- As one recording -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_in_one_kernel_are_the_rows(dtype: torch.dtype, vp: GaussianPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """In low precision they are added up in single precision, and every length has code of its own."""
    codes, real = list[object](), torch.compile

    def compile(function: Callable[..., Tensor], *, dynamic: bool) -> Callable[..., Tensor]:
        codes.append(function.__code__)
        return real(function, dynamic=dynamic, backend="eager")  # read as for a compiler, which takes seconds

    monkeypatch.setattr(torch, "compile", compile)
    table, x = trace("exp_adams_4", vp, logsnr(vp, 8)), prior(vp, (2, 3), seed=0, dtype=torch.float64)
    plan, predict = _plan(table), gaussian(vp).predict
    kernels = _compiled(plan, x.to(dtype))
    assert len({id(code) for code in codes}) == len({len(step.terms) for step in plan}) == 5
    found = _play(plan, predict, x.to(dtype), lambda k: x, kernels, [step.time for step in plan], None)
    assert found.dtype == dtype
    rounding = 1e-12 if dtype == torch.float64 else 0.03
    torch.testing.assert_close(found.double(), replay(table, predict, x), rtol=rounding, atol=rounding)


def recorded(table: Table, predict: Predict, like: Tensor) -> Captured:
    """A recording without a CUDA graph: it is played again, from and into the same tensors."""
    start, noises, out = torch.zeros_like(like), like.new_zeros((table.draws, *like.shape)), torch.empty_like(like)

    def again() -> None:
        out.copy_(replay(table, predict, start, noise=noises))

    return Captured(table, again, start, noises, out, (predict,))


def test_a_recording_is_given_inputs_and_asked_for_the_result(vp: GaussianPath) -> None:
    predict, table = gaussian(vp).predict, trace("ancestral", vp, logsnr(vp, 4))
    x, other = (prior(vp, (2, 3), seed=seed) for seed in (0, 1))
    run = recorded(table, predict, x)
    one = run(x, BrownianMotion(x, 5))
    kept = one.clone()
    two = run(other, BrownianMotion(other, 6))
    assert torch.equal(one, kept)  # it is nobody else's
    assert torch.equal(one, replay(table, predict, x, noise=BrownianMotion(x, 5)))
    assert torch.equal(two, replay(table, predict, other, noise=BrownianMotion(other, 6)))
    assert not run(x.requires_grad_(), BrownianMotion(other, 5)).requires_grad
    assert not run.start.requires_grad


def test_a_recording_refuses_what_is_not_like_it(vp: GaussianPath) -> None:
    table, x = trace("ancestral", vp, logsnr(vp, 4)), torch.zeros(2, 3)
    run, noises = recorded(table, gaussian(vp).predict, x), torch.zeros(4, 2, 3)
    for wrong in (torch.zeros(1, 3), torch.zeros(2, 3).double()):  # copied, it would be spread, or rounded
        with pytest.raises(ValueError, match=r"captured with a state of torch.float32 of shape \(2, 3\), got"):
            run(wrong, noises)
    with pytest.raises(ValueError, match=r"captured with a noise of .* got torch.float32 of shape \(3,\)"):
        run(x, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="draws noise"):
        run(x)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "edm_heun", "ancestral", "exp_adams_4"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_run_is_the_replay(name: str, compiled: bool, vp: GaussianPath) -> None:
    ts, problem = logsnr(vp, 6), gaussian(vp)
    table, x = trace(name, vp, ts), prior(vp, (4, 3, 8, 8), seed=0, device="cuda")
    run = capture(table, problem.predict, x, compiled=compiled)
    for seed in (0, 1):  # the second run sees nothing of the first
        x = prior(vp, (4, 3, 8, 8), seed=seed, device="cuda")
        noise = BrownianMotion(x, seed) if table.draws else None
        expected = replay(table, problem.predict, x, noise=BrownianMotion(x, seed) if table.draws else None)
        torch.testing.assert_close(run(x, noise), expected, rtol=1e-4, atol=1e-4)
        # What it reads (times, coefficients) must not have been given away.
        full = [torch.full((), torch.nan, dtype=dtype, device="cuda") for dtype in [torch.float64] * 64]
        full += [torch.full((k,), torch.nan, device="cuda") for k in range(1, 33)]
        torch.testing.assert_close(run(x, noise), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
def test_what_cannot_be_captured_is_said_and_leaves_nothing_behind(vp: GaussianPath) -> None:
    table, x = trace("ddim", vp, logsnr(vp, 3)), prior(vp, (2, 3), seed=0, device="cuda")
    exact, stream = gaussian(vp).predict, torch.cuda.current_stream()

    def looks(x: Tensor, t: Tensor) -> Prediction:
        return exact(x, torch.tensor(t.item(), device="cuda", dtype=torch.float64))

    with pytest.raises(RuntimeError, match=r"^DDIM.*cannot be captured as a CUDA graph: ") as caught:
        capture(table, looks, x, compiled=False)
    assert "\n" not in str(caught.value)
    assert torch.cuda.current_stream() == stream
    run = capture(table, exact, x, compiled=False)
    torch.testing.assert_close(run(x), replay(table, exact, x), rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
def test_a_captured_run_reads_the_weights_as_they_are(vp: GaussianPath) -> None:
    table, x = trace("dpmpp_2m", vp, logsnr(vp, 4)), prior(vp, (2, 3), seed=0, device="cuda")
    weight = torch.tensor(0.3, device="cuda")

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return Prediction(weight * x, x)

    run = capture(table, predict, x, compiled=False)
    before = run(x)
    weight.fill_(0.6)
    torch.testing.assert_close(run(x), replay(table, predict, x))
    assert not torch.equal(run(x), before)


# --- What has no table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ADAPTIVE, *NONLINEAR])
def test_solvers_that_are_not_linear_are_refused(name: str, vp: GaussianPath) -> None:
    with pytest.raises(ValueError, match=r"chooses its own steps|only linear steps have a table") as caught:
        trace(name, vp, logsnr(vp, 3))
    assert "\n" not in str(caught.value)


class OneStep(Solver[None]):
    order = 1
    nfe_per_step = 1


@dataclass(frozen=True)
class Clipping(OneStep):
    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        x0, eps = problem.predict(x, t)
        return mix((problem.path.alpha(s), x0.clamp(-50, 50)), (problem.path.sigma(s), eps)), None


@dataclass(frozen=True)
class Branching(OneStep):
    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        x0, eps = problem.predict(x, t)
        return mix((1.0 if x0.norm() > 1 else 2.0, x0), (problem.path.sigma(s), eps)), None


@dataclass(frozen=True)
class Shifting(OneStep):
    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        x0, eps = problem.predict(x, t)
        return mix((problem.path.alpha(s), x0), (problem.path.sigma(s), eps)) + 0.1, None


@dataclass(frozen=True)
class Forgetting(OneStep):
    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        problem.predict(x, t)
        return torch.zeros_like(x), None


@dataclass(frozen=True)
class PerSampleNorm(OneStep):
    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        x0, eps = problem.predict(x, t)
        norm = eps.flatten(1).norm(dim=1).reshape(-1, *(1,) * (x.ndim - 1))
        return mix((problem.path.alpha(s), x0), (problem.path.sigma(s), eps / norm)), None


@dataclass(frozen=True)
class AskingTwiceSometimes(OneStep):
    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        x0, eps = problem.predict(x, t)
        if np.asarray(x0.detach().as_subclass(Tensor)).max() > 5:
            x0, eps = problem.predict(x, t)
        return mix((problem.path.alpha(s), x0), (problem.path.sigma(s), eps)), None


@pytest.mark.parametrize(
    "solver", [Clipping(), Branching(), Shifting(), Forgetting(), PerSampleNorm(), AskingTwiceSometimes()]
)
def test_a_step_that_is_not_linear_is_found_out(solver: Solver[None], vp: GaussianPath) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(str(solver))} .*only linear steps have a table"):
        trace(solver, vp, logsnr(vp, 3))


def test_a_step_may_branch_on_times(vp: GaussianPath) -> None:
    assert trace("edm_heun", vp, logsnr(vp, 3)).nfe == 6  # FinalStep, Warmup and multistep methods do


# --- What is remembered becomes rows ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Momentum(Solver[object]):
    """DDIM with a running mean of predictions: whatever the container, memory must not make rows grow."""

    container: str = "tuple"
    order = 1
    nfe_per_step = 1

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> object:
        return CONTAINERS[self.container][0](torch.zeros_like(x))

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: object, noise: Noise
    ) -> tuple[Tensor, object]:
        x0, eps = problem.predict(x, t)
        wrap, unwrap = CONTAINERS[self.container]
        mean = 0.5 * unwrap(state) + 0.5 * x0
        return mix((problem.path.alpha(s), mean), (problem.path.sigma(s), eps)), wrap(mean)


@dataclass
class Box:
    inside: Tensor
    unrelated: float = 0.0


CONTAINERS = {
    "tuple": (lambda v: (1, v), lambda s: s[1]),
    "dict": (lambda v: {"mean": [v]}, lambda s: s["mean"][0]),
    "deque": (lambda v: deque([v, v], maxlen=2), lambda s: s[-1]),
    "dataclass": (Box, lambda s: s.inside),
    "stack": (lambda v: torch.stack([v, 2 * v]), lambda s: s[0]),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_memory_is_kept_in_rows_of_its_own(container: str, vp: GaussianPath, mixture: MixtureOracle) -> None:
    ts, solver, problem = logsnr(vp, 20), Momentum(container), mixture.problem(vp)
    table = trace(solver, vp, ts)
    assert np.diff(table.first).max() <= 3
    assert (table.kind == KEEP).sum() in range(18, 21)
    x = prior(vp, (3, 2), seed=0, dtype=torch.float64)
    torch.testing.assert_close(
        replay(table, problem.predict, x), stepped(solver, problem, x, ts), rtol=1e-11, atol=1e-11
    )


def test_rows_are_as_short_as_the_formulas(vp: GaussianPath) -> None:
    ts = logsnr(vp, 30)
    lengths = {name: np.diff(trace(name, vp, ts).first).max() for name in ("ddim", "dpmpp_2m", "heun", "rk4")}
    assert lengths == {"ddim": 2, "dpmpp_2m": 3, "heun": 4, "rk4": 8}


def test_there_and_back_again_is_not_arithmetic(vp: GaussianPath) -> None:
    """OnPath scales the state and scales it back before it is evaluated: the table knows that it is the state."""
    table = trace("edm_heun", vp, logsnr(vp, 5))
    firsts = [table.row(r) for r in range(0, len(table.kind), 3)]
    assert firsts == [{name: 1.0} for name in ("x_T", "x_1", "x_2", "x_3", "x_4")]


def test_many_steps_have_room(vp: GaussianPath) -> None:
    table = trace("dpmpp_2m", vp, logsnr(vp, 300))
    assert (table.nfe, table.steps) == (300, 300)
    assert table.result().shape == (301,)


# --- What a table says ------------------------------------------------------------------------------------------------


def test_a_table_reads_as_a_program(vp: GaussianPath) -> None:
    table = trace("dpmpp_2m", vp, logsnr(vp, 2))
    lines = str(table).splitlines()
    assert lines[0].startswith("# DPMSolverPP2M")
    assert lines[1:3] == ["z_1 = x_T", f"x0_1, eps_1 = predict(z_1, t={vp.t_max:.6g})"]
    assert re.fullmatch(r"x_2 = [\d.e-]+ x_1 - [\d.e-]+ x0_1 \+ [\d.e-]+ x0_2", lines[-2])
    assert lines[-1] == "return x_2"
    assert re.fullmatch(r"Table\(DPMSolverPP2M\(.*\), 2 steps, nfe=2, draws=0, 4 rows\)", repr(table))


def test_ddim_in_closed_form(path: GaussianPath) -> None:
    """x_i = (sigma_i / sigma_(i-1)) x_(i-1) + alpha_i (1 - exp(-h)) x0_i."""
    ts = uneven(path, 6)
    table = trace("ddim", path, ts)
    alpha, sigma, lam = path.alpha(ts).numpy(), path.sigma(ts).numpy(), path.logsnr(ts).numpy() / 2
    np.testing.assert_allclose(table.weights(), np.diag(alpha[1:] * -np.expm1(-np.diff(lam))), atol=1e-14)
    np.testing.assert_allclose(table.result()[0], sigma[-1] / sigma[0])
    np.testing.assert_allclose(table.amplification(), alpha[-1] - sigma[-1] * alpha[0] / sigma[0])
    np.testing.assert_allclose(table.amplification("eps"), alpha[-1] * sigma[0] / alpha[0] - sigma[-1], rtol=1e-10)
    np.testing.assert_allclose(table.logsnr, 2 * lam[:-1], atol=1e-12)
    np.testing.assert_allclose(
        table.marginal(Moments(np.array(2.0), np.array(3.0)))[1], 3 * alpha[-1] ** 2 + sigma[-1] ** 2
    )


@pytest.mark.parametrize(("name", "width"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_a_multistep_method_is_a_band(name: str, width: int, vp: GaussianPath) -> None:
    weights = trace(name, vp, logsnr(vp, 8)).weights()
    far = np.subtract.outer(np.arange(8), np.arange(8))
    assert np.abs(weights[(far >= width) | (far < 0)]).max() < 1e-12
    assert np.abs(weights[(far < width) & (far >= 0)]).min() > 1e-6


@pytest.mark.parametrize("form", ["x0", "eps"])
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "ddim_0.5", "flow_heun", "torchsde_heun"])
def test_the_dense_rows_make_the_sample_from_what_was_predicted(
    name: str, form: str, vp: GaussianPath, mixture: MixtureOracle
) -> None:
    ts, problem = logsnr(vp, 7), mixture.problem(vp)
    table, seen, x = trace(name, vp, ts), list[Tensor](), prior(vp, (1, 2), seed=0, dtype=torch.float64)
    asked: list[Tensor] = []

    def predict(z: Tensor, t: Tensor) -> Prediction:
        prediction = problem.predict(z, t)
        asked.append(z.clone())
        seen.append(getattr(prediction, form))
        return prediction

    w = BrownianMotion(x, seed=2)
    noises = [w(*ends) for ends in torch.tensor(table.intervals)]
    states: list[Tensor] = []
    out = replay(table, predict, x, noise=w, callback=lambda i, t, x: states.append(x))
    parts = torch.cat([x, *seen, *noises]).numpy()
    np.testing.assert_allclose(table.result(form) @ parts, out[0].numpy(), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(table.points(form) @ parts, torch.cat(asked).numpy(), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(table.states(form) @ parts, torch.cat(states).numpy(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in LINEAR if SOLVERS[name].stochastic] + ["heun", "dpmpp_2m"])
def test_moments_are_those_of_unit_impulses(name: str, vp: GaussianPath) -> None:
    """Against the certificates' own way: impulses stepped through the solver, noises cut into elementary ones."""
    data = Moments(np.array([-0.5, 0.3, 0.8]), np.array([0.2, 0.5, 0.8]) ** 2)
    mean_error, variance_error = weak_order(SOLVERS[name], vp, logsnr, steps=(11,))
    table = trace(name, vp, logsnr(vp, 11))
    found, exact = table.moments(data, start=table.marginal(data, 0)), table.marginal(data)
    errors = (found.mean - exact.mean) / np.sqrt(exact.variance), found.variance / exact.variance - 1
    for error, expected in zip(errors, (mean_error, variance_error), strict=True):
        assert np.sqrt(np.mean(error**2)) == pytest.approx(expected.errors[0], rel=1e-6, abs=1e-10)


def test_moments_from_noise_alone_and_of_any_shape(vp: GaussianPath) -> None:
    table = trace("ancestral", vp, logsnr(vp, 40))
    data = Moments(np.full((2, 3), 0.3), np.full((2, 3), 0.25))
    found = table.moments(data)
    assert found.mean.shape == found.variance.shape == (2, 3)
    narrow = table.moments(Moments(np.array(0.3), np.array(0.25)), Moments(np.array(0.0), table.sigma[0] ** 2))
    np.testing.assert_allclose(found.variance, narrow.variance)
    assert 0.15 < narrow.variance < 0.25  # beta-tilde disperses too little
    wide = trace("ancestral_beta", vp, logsnr(vp, 40)).moments(data).variance
    assert (wide > 0.25).all()


def test_moments_agree_with_samples(vp: GaussianPath) -> None:
    table, n = trace("euler_maruyama", vp, logsnr(vp, 5)), 40_000
    x = prior(vp, (20, n // 20), seed=0, dtype=torch.float64)
    out = replay(table, gaussian(vp).predict, x, noise=BrownianMotion(x, seed=1))
    mean, variance = table.moments(Moments(np.array(0.3), np.array(0.25)))
    assert float(out.mean()) == pytest.approx(float(mean), abs=4 * float(variance / n) ** 0.5)
    assert float(out.var()) == pytest.approx(float(variance), rel=4 * (2 / n) ** 0.5)


def test_increments_that_overlap_are_correlated(vp: GaussianPath) -> None:
    @dataclass(frozen=True)
    class Overlapping(OneStep):
        stochastic = True

        def step(
            self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
        ) -> tuple[Tensor, None]:
            problem.predict(x, t)
            a, c = problem.path.logsnr(t) / 2, problem.path.logsnr(s) / 2
            b = a + 0.25 * (c - a)
            return mix((1.0, noise(a, c)), (1.0, noise(a, b)), (1.0, noise(c, a)), (1.0, noise(a, c))), None

    table = trace(Overlapping(), vp, logsnr(vp, 1))
    assert table.draws == 3  # the same increment twice is one noise
    np.testing.assert_allclose(table.noise_covariance, [[1, 0.5, -1], [0.5, 1, -0.5], [-1, -0.5, 1]], atol=1e-12)
    variance = table.moments(Moments(np.array(0.0), np.array(1.0))).variance
    assert variance == pytest.approx(1 + 1 + 2 * 0.5)  # 2 W_ac + W_ab - W_ac


# --- Storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpmpp_2m", "ddim_0.5", "heun"])
def test_arrays_and_back_bit_for_bit(name: str, vp: GaussianPath) -> None:
    table = trace(name, vp, logsnr(vp, 5))
    arrays = table.arrays()
    assert all(isinstance(array, np.ndarray) and array.dtype.kind in "ifU" for array in arrays.values())
    for key, array in Table.from_arrays(arrays).arrays().items():
        assert np.array_equal(array, arrays[key], equal_nan=array.dtype.kind == "f"), key


def broken(table: Table, **changes: object) -> dict[str, object]:
    return {**table.arrays(), **changes}


def test_what_is_no_table_is_refused(vp: GaussianPath) -> None:
    table = trace("ddim", vp, logsnr(vp, 3))
    assert table.kind.tolist() == [EVALUATE, STATE] * 3
    make = partial(broken, table)
    bad = table.coefficients.copy()
    bad[0] = np.nan
    future = table.columns.copy()
    future[0] = 4  # the first point would be made of a later state
    early = table.columns.copy()
    early[1] = 1 + 6 + 2  # the first state of the third prediction
    for arrays, message in [
        ({k: v for k, v in table.arrays().items() if k != "time"}, "needs the arrays time too"),
        (make(alpha=table.alpha[1:]), "alpha has shape"),
        (make(coefficients=bad), "not finite"),
        (make(columns=table.columns + 100), "a column that is not there"),
        (make(output=-1), "a column that is not there"),
        (make(kind=table.kind + 2), "a row is one of the kinds"),
        (make(first=table.first[::-1]), "bounds must rise from 0"),
        (make(columns=future), "row 0 of the table reads what comes after it"),
        (make(columns=early), "row 1 of the table reads what comes after it"),
    ]:
        with pytest.raises(ValueError, match=message):
            Table.from_arrays(arrays)
    with pytest.raises(ValueError, match="form is 'x0' or 'eps', got 'v'"):
        table.dense("v")  # type: ignore[arg-type]


def test_a_path_of_ones_own_will_do() -> None:
    """Anything with the methods of a path: here one whose inverse is not needed."""
    inner = VP(LinearLogSNR(6, -6))

    class Own:
        t_min, t_max = inner.t_min, inner.t_max
        alpha, sigma, logsnr, f, g2, time = inner.alpha, inner.sigma, inner.logsnr, inner.f, inner.g2, inner.time

    own: Path = Own()
    assert np.array_equal(trace(DDIM(), own, logsnr(own, 3)).result(), trace(DDIM(), inner, logsnr(inner, 3)).result())
