"""What a step costs beyond the network: host time per step, ours and others', in one run.

The network is a constant, so all that is left is the solver: its coefficients, its history, its arithmetic on the
state. Everybody solves on a grid and on one with three times the steps, on one thread, whose processor time is counted;
the difference is what steps cost, and the rest is the set-up, which everybody pays once per solve (schedulers are set
up before the clock starts). Contestants take turns, so that whatever else the machine does falls on all of them, and
the table shows medians over the rounds and the ratio to a hand-written DDIM loop of two operations per step,
``x = torch.add(a * x, eps, alpha=b)`` with its coefficients computed beforehand. *Own* is the ratio to a hand-written
loop that adds up as many inputs as the method's step does (``x = a * x``, then ``x.add_(p, alpha=b)`` for each other
one): 1.00 is a method that costs its arithmetic and nothing else. The allocator is told to keep the memory it has: page
faults, which come and go with the weather, can cost more than the arithmetic.

Stepping is to cost 1.3 times the DDIM loop for methods of first order and 2 times for multistep ones; a replayed table
is to be no slower than a loop written by hand for as many inputs.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --steps 40 --rounds 101 --shape 64 3 32 32
    python -m benchmarks.overhead --check        # exit code 1 unless the goals are met

Peers are measured when they are installed (diffusers, azula, k-diffusion, torchdiffeq) and left out otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import importlib.util
import io
import itertools
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdegen.paths import VP, GaussianPath
from solvers import BrownianMotion, DiffusionProblem, Prediction, integrate, resolve
from solvers.grids import logsnr
from solvers.replay import replay
from solvers.trace import trace

FIRST_ORDER, MULTISTEP = 1.3, 2.0
"""The goals of stepping, as ratios to the hand-written DDIM loop."""
REPLAY = 1.0
"""The goal of a replay, as a ratio to the hand-written loop of as many inputs."""

OURS = (
    *("ddim", "dpmpp_1s", "euler", "flow_euler"),
    *("dpmpp_2m", "dpmpp_3m", "exp_adams_4", "exp_adams_4_eps", "unipc_2", "deis_tab3"),
    *("heun", "edm_heun", "ancestral", "sde_dpmpp_2m"),
)
"""Of these, the names that are in ``SOLVERS`` are measured."""


class Contestant(NamedTuple):
    """Something that samples.

    Attributes:
        name: whose it is, and what.
        run: one solve.
        inputs: how many tensors a step adds up, where it is one sum.
        goal: the ratio to the DDIM loop that it must not exceed, if any.
        own_goal: the same of the ratio to the loop of as many inputs.
    """

    name: str
    run: Callable[[], Any]
    inputs: int | None = None
    goal: float | None = None
    own_goal: float | None = None


class Setting(NamedTuple):
    """What everybody is given.

    Attributes:
        path: the path.
        ts: the grid.
        x: the state at its start.
        answer: what is predicted.
        answers: the same again and again, in tensors of their own.
    """

    path: GaussianPath
    ts: Tensor
    x: Tensor
    answer: Prediction
    answers: Iterator[Prediction]

    @property
    def steps(self) -> int:
        return len(self.ts) - 1

    def predict(self, x: Tensor, t: Tensor) -> Prediction:
        """The network: it costs nothing."""
        return next(self.answers)


def setting(path: GaussianPath, steps: int, x: Tensor, answer: Prediction) -> Setting:
    """The same for everybody: a grid and answers, more of them than any method remembers."""
    answers = itertools.cycle([Prediction(answer.x0.detach(), answer.eps.detach()) for _ in range(64)])
    return Setting(path, logsnr(path, steps), x, answer, answers)


def hand_written(given: Setting) -> Callable[[], Tensor]:
    """DDIM with nothing around it: two kernels per step."""
    alpha, sigma = given.path.alpha(given.ts), given.path.sigma(given.ts)
    a = alpha[1:] / alpha[:-1]
    coefficients = list(zip(a.tolist(), (sigma[1:] - a * sigma[:-1]).tolist(), strict=True))
    eps = given.answer.eps

    def run() -> Tensor:
        x = given.x
        for a, b in coefficients:
            x = torch.add(a * x, eps, alpha=b)
        return x

    return run


def added_up(given: Setting, inputs: int) -> Callable[[], Tensor]:
    """A multistep method with nothing around it: a state and ``inputs - 1`` predictions."""
    coefficients = torch.linspace(0.9, 0.1, inputs).tolist()

    def run() -> Tensor:
        x = given.x
        for _ in range(given.steps):
            x = coefficients[0] * x
            for c in coefficients[1:]:
                x.add_(given.answer.x0, alpha=c)
        return x

    return run


def by_hand(given: Setting) -> Iterator[Contestant]:
    """The DDIM loop, first of all, and loops of more inputs."""
    yield Contestant("hand-written DDIM", hand_written(given), inputs=2)
    for inputs in (3, 4, 5):
        yield Contestant(f"hand-written, {inputs} inputs", added_up(given, inputs), inputs)


def ours(given: Setting) -> Iterator[Contestant]:
    """Stepping and replaying."""
    from solvers import SOLVERS

    problem = DiffusionProblem(given.path, given.predict)
    for name in OURS:
        if name not in SOLVERS:
            continue
        solver = resolve(name)
        table = trace(solver, given.path, given.ts)
        noise: Any = _Drawn(given.x) if solver.stochastic else None
        single = solver.nfe_per_step == 1
        inputs = int(table.first[-1] - table.first[-2]) if single else None  # of the last row, the last step
        goal = FIRST_ORDER if solver.order == 1 else MULTISTEP
        yield Contestant(
            f"ours, {name}",
            lambda s=solver, w=noise: integrate(s, problem, given.x, given.ts, noise=w),
            inputs,
            goal if single and not solver.stochastic else None,
        )
        yield Contestant(
            f"ours, {name}, replayed",
            lambda t=table, w=noise: replay(t, given.predict, given.x, noise=w),
            inputs,
            own_goal=REPLAY if single and not solver.stochastic else None,
        )


class _Drawn:
    """Noise that was drawn before: the random numbers cost everybody the same."""

    def __init__(self, x: Tensor) -> None:
        self.z = BrownianMotion(x, seed=0)(torch.tensor(-1.0), torch.tensor(1.0))

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self.z


def diffusers(given: Setting) -> Iterator[Contestant]:
    """Schedulers in their usual loop; ``set_timesteps`` is not timed."""
    warnings.simplefilter("ignore")
    library = importlib.import_module("diffusers")
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    for label, kind, options in [
        ("DDIM", "DDIMScheduler", {"clip_sample": False}),
        ("Euler", "EulerDiscreteScheduler", {}),
        ("DPM++2M", "DPMSolverMultistepScheduler", {}),
        ("UniPC", "UniPCMultistepScheduler", {}),
        ("DEIS", "DEISMultistepScheduler", {}),
    ]:
        scheduler = getattr(library, kind)(**betas, **options)
        scheduler.set_timesteps(given.steps)
        fresh = dict(vars(scheduler))

        def run(scheduler: Any = scheduler, fresh: dict[str, Any] = fresh) -> Tensor:
            vars(scheduler).update(fresh)
            if hasattr(scheduler, "model_outputs"):
                scheduler.model_outputs = [None] * len(scheduler.model_outputs)
            x = given.x
            for t in scheduler.timesteps:
                scheduler.scale_model_input(x, t)
                x = scheduler.step(given.answer.eps, t, x, return_dict=False)[0]
            return x

        yield Contestant(f"diffusers, {label}", run)


def azula(given: Setting) -> Iterator[Contestant]:
    """Samplers of azula on its VP schedule."""
    denoise = importlib.import_module("azula.denoise")
    noise = importlib.import_module("azula.noise")
    sample = importlib.import_module("azula.sample")

    class Constant(denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = noise.VPSchedule()
            self.posterior = denoise.DiracPosterior(mean=given.answer.x0)

        def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
            return self.posterior

    for label, kind in [
        ("DDIM", "DDIMSampler"),
        ("Euler", "EulerSampler"),
        ("zAB2", "zABSampler"),
        ("xEAB2", "xEABSampler"),
    ]:
        sampler = getattr(sample, kind)(Constant(), steps=given.steps, silent=True)
        yield Contestant(f"azula, {label}", lambda sampler=sampler: sampler(given.x))


@lru_cache
def _sampling() -> Any:
    """k-diffusion's samplers, without the parts of the package that want more packages."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        raise ImportError("No module named 'k_diffusion'")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    missing = [] if importlib.util.find_spec("torchvision") else ["torchvision", "torchvision.transforms"]
    for name in missing:
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], "functional", None)  # noqa: B010
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in missing:
            del sys.modules[name]


def k_diffusion(given: Setting) -> Iterator[Contestant]:
    """Functions of k-diffusion."""
    sampling = _sampling()
    sigmas = torch.exp(-given.path.logsnr(given.ts) / 2).float()
    for label, function in [("Euler", sampling.sample_euler), ("DPM++2M", sampling.sample_dpmpp_2m)]:
        yield Contestant(
            f"k-diffusion, {label}",
            lambda f=function: f(lambda x, sigma: given.answer.x0, given.x, sigmas, disable=True),
        )


def torchdiffeq(given: Setting) -> Iterator[Contestant]:
    """Fixed-step methods on a constant velocity."""
    odeint = importlib.import_module("torchdiffeq").odeint
    for method in ("euler", "midpoint"):
        yield Contestant(
            f"torchdiffeq, {method}",
            lambda method=method: odeint(lambda t, x: given.answer.eps, given.x, given.ts, method=method),
        )


PEERS = (torchdiffeq, k_diffusion, azula, diffusers)


def contestants(given: Setting) -> tuple[list[Contestant], list[str]]:
    """Everybody who is here, the hand-written loop first, and the names of those who are not."""
    here, absent = [*by_hand(given), *ours(given)], []
    for peer in PEERS:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                here += list(peer(given))
        except ImportError as error:
            absent.append(f"{peer.__name__} ({error})")
    return here, absent


def keep_memory() -> None:
    """Ask glibc not to give freed memory back to the system; elsewhere do nothing."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 25)
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 1 << 28)


def measure(
    everybody: Sequence[tuple[Contestant, Contestant]], steps: int, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Microseconds per step and per set-up, each (rounds, contestants).

    Args:
        everybody: each contestant on a grid of ``steps`` steps and on one of 3 ``steps``.
        steps: of the shorter grid.
        rounds: in each, everybody solves once on both grids, in turns.
    """
    times = np.empty((rounds + 2, len(everybody), 2))
    for row in times:
        for i, pair in enumerate(everybody):
            for j, contestant in enumerate(pair):
                begun = time.thread_time()
                contestant.run()
                row[i, j] = 1e6 * (time.thread_time() - begun)
    short, long = np.moveaxis(times[2:], -1, 0)  # the first two rounds warm up
    per_step = (long - short) / (2 * steps)
    return per_step, short - steps * per_step


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if asked to check and a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of the shorter grid")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--shape", type=int, nargs="+", default=[64, 3, 32, 32])
    parser.add_argument("--check", action="store_true", help="fail unless the goals are met")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    keep_memory()
    draw = torch.Generator().manual_seed(0)
    x, x0, eps = (torch.randn(options.shape, generator=draw) for _ in range(3))
    path = VP()
    answer = Prediction(x0, eps)
    both = [contestants(setting(path, steps, x, answer)) for steps in (options.steps, 3 * options.steps)]
    pairs = list(zip(both[0][0], both[1][0], strict=True))
    times, setups = measure(pairs, options.steps, options.rounds)

    missed = 0
    print(f"{tuple(options.shape)} float32, {options.steps} and {3 * options.steps} steps, one thread,", end=" ")
    print(f"medians of {options.rounds} rounds")
    print(f"{'':<32}{'us/step':>9}{'ratio':>8}{'goal':>6}{'own':>8}{'goal':>6}{'us/set-up':>12}")
    medians, loops = np.median(times, 0), dict[int | None, float]()
    for (contestant, _), median, setup in zip(pairs, medians, setups.T, strict=True):
        if contestant.inputs is not None:
            loops.setdefault(contestant.inputs, median)  # by hand, as those come first
        ratio, own = median / medians[0], median / loops.get(contestant.inputs, np.nan)
        lost = _above(ratio, contestant.goal) or _above(own, contestant.own_goal)
        missed += lost
        print(f"{contestant.name:<32}{median:9.1f}{ratio:8.2f}{_shown(contestant.goal, 6, 1)}", end="")
        print(f"{_shown(own, 8, 2)}{_shown(contestant.own_goal, 6, 1)}{np.median(setup):12.0f}", end="")
        print("   missed" if lost else "")
    if both[0][1]:
        print("not installed:", "; ".join(both[0][1]))
    return int(options.check and missed > 0)


def _above(ratio: float, goal: float | None) -> bool:
    return goal is not None and ratio > goal


def _shown(number: float | None, width: int, digits: int) -> str:
    return " " * width if number is None or np.isnan(number) else f"{number:{width}.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
