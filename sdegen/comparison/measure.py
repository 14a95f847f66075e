"""One cell: a solver is run, and everything about it is measured.

It is run three times. First on a few noises with every tensor counted, which also warms it up: libraries are imported,
kernels chosen. Then from the noises of the comparison with a watch in its hand, which gives the pathwise error and the
times. And last on a large cloud, where the truth is known, for the distances in distribution.

*Time* is taken apart by holding watches over the network and over the Brownian motion: what is left is the solver's
own, and divided by the steps it is the *overhead*, which must be small beside a network call and can be compared across
machines of one kind only. It is the time of the thread that solves, so that other programs do not count; on a GPU, that
of the wall. Short solves are repeated, and the fastest counts.

*Memory* of the process says nothing about a solver that holds some kilobytes, and ``tracemalloc`` does not see torch.
So the tensors are counted: every tensor of a state's size that is made outside network and noise, from its birth until
it is freed. The peak of that is exact and the same on every machine, and scales with the batch. (What NumPy holds for
scipy's methods is not seen.)
"""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdegen.comparison.settings import Cell, begins
from sdegen.comparison.truth import LazyBrownianMotion, Truths, equation
from solvers import BrownianMotion, DiffusionProblem, Trajectory, solve

__all__ = ["measure"]

COUNTED = 13  # noises in the count of tensors: no other axis has that length
QUICK, REPEATS = 0.05, 3  # a solve of fewer seconds is repeated
IMAGES, POINTS = 16, 256  # endpoints that are kept for pictures: of images, and of points in the plane


def measure(cell: Cell, truths: Truths) -> dict[str, Any]:
    """Measure a cell.

    Args:
        cell: which.
        truths: what it is measured against.

    Returns:
        The columns of the table by name (:data:`sdegen.comparison.table.COLUMNS`), as far as they are known, and
        ``kept``, endpoints for pictures. A cell that fails says why in ``status``.
    """
    method = cell.method
    adaptive = method.nfe_per_step == 0
    row: dict[str, Any] = {
        "target": cell.target, "path": truths.targets[cell.target].path_name(cell.path), "solver": cell.solver,
        "seed": cell.seed, "budget": cell.budget, "tol": cell.tol,
        "grid": "none" if adaptive else method.grid if cell.grid == "own" else cell.grid,
        "stochastic": method.stochastic, "order": method.order, "start_order": begins(method),
        "equation": equation(method),
        "samples": truths.settings.samples, "cloud": 0, "code": truths.code(cell), "status": "ok",
    }  # fmt: skip
    try:
        with torch.no_grad():
            row |= _measured(cell, truths)
    except Exception as error:  # a solver may be anybody's: the other cells do not suffer
        row["status"] = " ".join(f"{type(error).__name__}: {error}".split())
    return row


def _measured(cell: Cell, truths: Truths) -> dict[str, Any]:
    method, (target, path) = cell.method, truths.problem(cell)
    problem, x, cloud = target.ask(path), truths.start(cell), truths.cloud(cell)
    fixed = method.nfe_per_step > 0
    if fixed and cell.budget < (least := method.nfe(1)):
        raise ValueError(f"needs at least {least} network calls, the budget is {cell.budget}")

    def solved(problem: DiffusionProblem, x: Tensor, noise: Any) -> Trajectory:
        grid = cell.grid if fixed and cell.grid != "own" else None
        return solve(problem, x, solver=method, grid=grid, noise=noise if method.stochastic else None, **cell.allowance)

    few = x[: min(COUNTED, len(x))].clone()
    count = _Tensors(few)
    with _uncollected(), count:
        solved(problem.calling(count.aside), few, _Wrapped(few, cell.seed, count.aside))
    row: dict[str, Any] = {"peak_mib": count.peak / len(few) * len(x) / 2**20}

    found, times = _timed(lambda p, noise: solved(p, x, noise), problem, x, cell.seed)
    steps = len(found.ts) - 1 if fixed else 0
    row |= {"steps": steps, "nfe": found.nfe, **times}
    row["nfe_mean"] = float(found.nfe if found.spent is None else found.spent.double().mean())
    own = times["seconds"] - times["network_seconds"] - times["noise_seconds"]
    row["overhead_us"] = 1e6 * own / (steps or found.nfe)
    row |= _errors(cell, truths, found.x)
    if cloud is not None:
        many = target.start(path, cloud.count, cloud.seed, truths.settings.device)
        # A solver that chooses the steps of every sample asks for the motions of single samples, which only one has.
        motion = LazyBrownianMotion if fixed else BrownianMotion
        ends = solved(problem, many, motion(many, cloud.seed)).x
        row |= {"cloud": cloud.count, **cloud.measured(ends), **cloud.floors}
    s = truths.settings
    pictured = (cell.path, cell.seed) == ((s.paths or ("own",))[0], s.seeds[0])
    if (keep := _seen(target.event_shape)) and pictured:
        row["kept"] = target.decode(found.x[:keep]).float().cpu().numpy()
    return row


def _seen(event_shape: tuple[int, ...]) -> int:
    """How many endpoints make a picture: of images, of points in the plane, and none of what nobody can see."""
    return IMAGES if len(event_shape) == 3 else POINTS if event_shape == (2,) else 0


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, which frees what is held in circles whenever it likes."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _errors(cell: Cell, truths: Truths, x: Tensor) -> dict[str, float]:
    """Distance from the converged solution, root mean square over noises and coordinates, in units of the data."""
    reference = truths.reference(cell)
    if reference is None:
        return {}
    _, path = truths.problem(cell)
    alpha = float(path.alpha(torch.tensor(path.t_min, dtype=torch.float64)))
    each = ((x - reference.x).double() / alpha).square().flatten(1).mean(1).cpu()
    (error, low, high), (middle, below, above) = root_mean(each), root_median(each)
    return {
        "error": error, "error_low": low, "error_high": high, "error_median": middle, "error_median_low": below,
        "error_median_high": above, "reference_error": reference.error / alpha,
        "reference_error_median": reference.median / alpha,
    }  # fmt: skip


def root_mean(squares: Tensor) -> tuple[float, float, float]:
    """Root of the mean of positive numbers, (N,), and its 95 % interval.

    The delta method on the logarithm of the mean, which is nearer to a normal variable than the mean; the root halves.
    """
    mean, spread = float(squares.mean()), float(squares.std()) / math.sqrt(len(squares))
    half = math.exp(1.96 / 2 * spread / mean) if mean > 0 else 1.0
    return math.sqrt(mean), math.sqrt(mean) / half, math.sqrt(mean) * half


def root_median(squares: Tensor) -> tuple[float, float, float]:
    """Root of the median of numbers, (N,), and its 95 % interval, of which nothing is supposed: order statistics."""
    ordered, n = squares.sort().values.sqrt(), len(squares)
    low = max(0, int(binom.ppf(0.025, n, 0.5)) - 1)  # how many lie below the median is binomial
    return float(ordered.quantile(0.5)), float(ordered[low]), float(ordered[n - 1 - low])


# --- Time -------------------------------------------------------------------------------------------------------------


class _Watch:
    """Adds up the seconds that a function takes: of this thread, or on a GPU until it is done.

    What other programs do meanwhile does not count where the system tells a thread's own time.
    """

    def __init__(self, gpu: bool) -> None:
        own = time.get_clock_info("thread_time").resolution < 1e-5 and not gpu
        self.clock: Callable[[], float] = time.thread_time if own else time.perf_counter
        self.gpu, self.seconds = gpu, 0.0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any) -> Any:
            with self.running():
                return function(*given)

        return watched

    @contextmanager
    def running(self) -> Iterator[None]:
        begin = self._now()
        yield
        self.seconds += self._now() - begin

    def _now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return self.clock()


class _Wrapped(BrownianMotion):
    """The shared Brownian motion, wrapped; one itself, because some solvers look for the motions of single samples."""

    def __init__(self, like: Tensor, seed: int, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        super().__init__(like, seed)
        self.wrapped = wrap(super().__call__)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self.wrapped(a, b)


def _timed(
    solved: Callable[[DiffusionProblem, Any], Trajectory], problem: DiffusionProblem, x: Tensor, seed: int
) -> tuple[Trajectory, dict[str, float]]:
    """The fastest of some solves, and where its time went."""
    best, found = {"seconds": math.inf}, None
    begin = time.perf_counter()
    for _ in range(REPEATS):
        whole, network, noise = (_Watch(x.is_cuda) for _ in range(3))
        with whole.running():
            found = solved(problem.calling(network), _Wrapped(x, seed, noise))
        if whole.seconds < best["seconds"]:
            best = {
                "seconds": whole.seconds, "network_seconds": network.seconds, "noise_seconds": noise.seconds,
            }  # fmt: skip
        if time.perf_counter() - begin > QUICK:
            break
    assert found is not None
    return found, best


# --- Memory -----------------------------------------------------------------------------------------------------------


class _Tensors(TorchDispatchMode):
    """Counts the bytes of all tensors of a state's size that are alive, made while this is entered.

    Args:
        state: whose size it is; itself not counted.
    """

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.size, self.counting = state.numel(), True
        self.alive, self.peak = 0, 0
        self.known: set[int] = {state.untyped_storage()._cdata}

    def aside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Network and noise: what they hold while they think is their own, what they return is the solver's."""

        def called(*given: Any) -> Any:
            self.counting = False
            try:
                out = function(*given)
            finally:
                self.counting = True
            self._seen(out)
            return out

        return called

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.counting:
            self._seen(out)
        return out

    def _seen(self, out: Any) -> None:
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.numel() == self.size and leaf.ndim > 1:
                storage = leaf.untyped_storage()
                key, bytes_ = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.alive += bytes_
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._freed, key, bytes_)

    def _freed(self, key: int, bytes_: int) -> None:
        self.known.discard(key)
        self.alive -= bytes_
