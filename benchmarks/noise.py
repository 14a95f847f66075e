"""What Brownian noise costs, and what it promises: milliseconds per step of a walk, ours and others', in one run.

A stochastic solver walks once over its grid and asks for the increment of every step. Everybody walks over 20 and over
100 steps of a state of shape (64, 3, 32, 32), in turns, and medians over the rounds are shown. Cheap noise is easy,
``torch.randn`` is the floor; what one pays for is said by three properties, which are measured too:

    sample    a sample is the same alone as in its batch (a seed for every sample)
    grid      the increments of a coarse grid are sums of those of a fine one (one path for every solver and grid)
    order     asked in another order, the answers are the same (a step that is refused, a solve in parallel)

    python -m benchmarks.noise
    python -m benchmarks.noise --device cuda --shape 16 3 256 256

On the CPU it is one thread and its processor time; on a device, the time until it is done. Peers are measured when they
are installed (torchsde is; k-diffusion) and left out otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.overhead import _sampling as k_diffusion_sampling
from benchmarks.overhead import keep_memory
from solvers import BrownianMotion

START, END = -5.03, 5.21  # in lam, what a solve walks over; nodes are no round numbers
Increment = Callable[[Tensor, Tensor], Tensor]


class Contestant(NamedTuple):
    """Somebody's Brownian motion.

    Attributes:
        name: whose it is, and what.
        start: ``start(like, samples)`` begins one, for these samples, and gives its normalised increments.
    """

    name: str
    start: Callable[[Tensor, Sequence[int]], Increment]


def ours() -> Iterator[Contestant]:
    yield Contestant("ours", lambda like, samples: BrownianMotion(like, 0, samples=samples))


def floor() -> Iterator[Contestant]:
    """Normals that know nothing of one another."""

    def start(like: Tensor, samples: Sequence[int]) -> Increment:
        draw = torch.Generator(like.device).manual_seed(0)
        return lambda a, b: torch.randn(like.shape, generator=draw, dtype=like.dtype, device=like.device)

    yield Contestant("torch.randn", start)


def torchsde() -> Iterator[Contestant]:
    library = importlib.import_module("torchsde")

    def interval(like: Tensor, samples: Sequence[int]) -> Increment:
        size, kind = (len(like), like[0].numel()), {"dtype": like.dtype, "device": like.device}
        w = library.BrownianInterval(START, END, size=size, entropy=0, **kind)
        return lambda a, b: w(a, b).reshape(like.shape) / (b - a).sqrt()

    def tree(like: Tensor, samples: Sequence[int]) -> Increment:
        w = library.BrownianTree(START, torch.zeros_like(like), END, entropy=0)
        return lambda a, b: w(a, b) / (b - a).sqrt()

    yield Contestant("torchsde, BrownianInterval", interval)
    yield Contestant("torchsde, BrownianTree", tree)


def k_diffusion() -> Iterator[Contestant]:
    sampling = k_diffusion_sampling()

    def start(like: Tensor, samples: Sequence[int]) -> Increment:
        return sampling.BrownianTreeNoiseSampler(like, START, END, seed=list(samples))

    yield Contestant("k-diffusion, a tree per sample", start)


PEERS = (floor, torchsde, k_diffusion)


def walk(contestant: Contestant, like: Tensor, steps: int) -> float:
    """Milliseconds per step."""
    clock = time.thread_time if like.device.type == "cpu" else time.perf_counter
    nodes = torch.linspace(START, END, steps + 1, dtype=torch.float64).unbind()
    increment = contestant.start(like, range(len(like)))
    _wait(like)
    begun = clock()
    for a, b in pairwise(nodes):
        increment(a, b)
    _wait(like)
    return 1e3 * (clock() - begun) / steps


def _wait(like: Tensor) -> None:
    if like.device.type != "cpu":
        torch.accelerator.synchronize(like.device)


def promises(contestant: Contestant, device: str) -> list[bool]:
    """Whether a sample, a grid and an order of questions leave the path as it is, on a small state."""
    x = torch.zeros(4, 3, device=device)
    nodes = torch.linspace(START, END, 21, dtype=torch.float64)

    def fresh(samples: Sequence[int]) -> Increment:
        return contestant.start(x[: len(samples)], samples)

    whole, some, alone, coarse = fresh(range(4)), fresh(range(4)), fresh([2]), fresh(range(4))
    steps = list(pairwise(nodes.unbind()))
    forth = [whole(a, b) for a, b in steps]
    back = [some(a, b) for a, b in reversed(steps)][::-1]
    single = [alone(a, b) for a, b in steps]
    pairs = [coarse(a, b) for a, b in pairwise(nodes[::2].unbind())]
    sums = [(a + b) / 2**0.5 for a, b in zip(forth[::2], forth[1::2], strict=True)]

    def same(these: Sequence[Tensor], those: Sequence[Tensor]) -> bool:
        return all(torch.allclose(a, b, atol=1e-3) for a, b in zip(these, those, strict=True))

    return [same(single, [z[2:3] for z in forth]), same(pairs, sums), same(forth, back)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100], help="of the walks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", type=int, nargs="+", default=[64, 3, 32, 32])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    keep_memory()
    here, absent = list(ours()), []
    for peer in PEERS:
        try:
            here += list(peer())
        except ImportError as error:
            absent.append(f"{peer.__name__} ({error})")
    like = torch.zeros(options.shape, device=options.device)
    times = np.empty((options.rounds + 1, len(options.steps), len(here)))
    for row in times:
        for steps, column in zip(options.steps, row, strict=True):
            column[:] = [walk(contestant, like, steps) for contestant in here]

    print(f"{tuple(options.shape)} float32 on {options.device}, ms per step, medians of {options.rounds} rounds")
    print(f"{'':<32}" + "".join(f"{f'{steps} steps':>12}" for steps in options.steps) + "   sample  grid   order")
    for contestant, columns in zip(here, np.median(times[1:], 0).T, strict=True):
        kept = "".join(f"{'yes' if kept else 'no':<7}" for kept in promises(contestant, options.device))
        print(f"{contestant.name:<32}" + "".join(f"{ms:12.2f}" for ms in columns) + f"   {kept}".rstrip())
    if absent:
        print("not installed:", "; ".join(absent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
