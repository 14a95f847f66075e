"""One Brownian motion that every stochastic solver shares.

In the clock ``lam = logsnr / 2`` the reverse family of every Gaussian path is driven in the same way: with ``y = x /
alpha``

    dy = -(1 + eta^2) (y - x0) dlam + sqrt(2) eta exp(-lam) dW(lam),

so one Brownian motion ``W(lam)`` serves all solvers, all grids and all paths. A step from ``a`` to ``b`` asks only for
the normalised increment ``(W(b) - W(a)) / sqrt|b - a|``, a standard normal. Refine the grid and the same seed
converges to the same sample (*strong* convergence); compare two solvers and they see the same randomness (common
random numbers).

``W`` is a virtual tree on the dyadic points of an interval: the midpoint of a cell, given its ends, is

    W(m) = (W(l) + W(r)) / 2 + sqrt(r - l) / 2 Z,

and ``Z`` comes from a counter-based generator keyed by (seed, sample, cell). A walk along a grid keeps the cells that
hold its last point on a stack and redraws only what is below; nothing else is stored. Every sample has its own key, so
sample 17 is the same bits whatever stands beside it in the batch, on CPU and GPU alike.

Everything random in a solve is an increment of this one ``W``, which lives on the whole line, and two of its properties
serve what an increment over the step itself cannot:

* its increments over disjoint intervals are independent, so a noise *of its own* (Langevin steps, restarts) is that of
  the same interval moved to where no solver steps (:func:`elsewhere`);
* it is a path, so the second Gaussian that methods of strong order 1.5 want, the *area* between the path and its chord,
  can be computed from increments inside the step (:func:`area`).

Whatever can stand for a Brownian motion (unit impulses, symbols, recorded draws) thereby stands for all of them.

Reference: Salmon et al. 2011 (Philox, counter-based generators); Kidger et al. 2021, arXiv:2105.13493 (virtual trees).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from solvers.problem import mix

__all__ = ["BrownianMotion", "Noise", "area", "elsewhere", "fresh_seed", "silent", "standard_normal"]

PRIOR, TREE, DECODER, ENCODER, PROBES, PILOT, BOUND = range(7)
"""Streams: draws of different meaning never share a counter. Those from BOUND on are the bound's, one for each of its
terms; trees beyond the first are at 256 and on."""


class Noise(Protocol):
    """What a stochastic solver asks for: unit-variance increments of one Brownian motion in the clock lam."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(W(b) - W(a)) / sqrt|b - a|, of the state's shape, dtype and device; a and b are 0-dim values of lam."""
        ...


def silent(a: Tensor, b: Tensor) -> Tensor:
    """The noise of a solve that was given none: asking it is a mistake.

    Raises:
        ValueError: always.
    """
    raise ValueError("this solver draws noise: pass noise=BrownianMotion(x, seed), or call solve(..., seed=...)")


def fresh_seed() -> int:
    """A seed from the operating system's entropy, so that an unseeded run can still say which seed it used."""
    return int(np.random.SeedSequence().generate_state(1, np.uint32)[0])


class _Keyed:
    """Standard normals addressed by (seed, sample, counter) in place of drawn in sequence.

    Draws are made in float32 whatever the dtype of the state: a float64 solve sees the noise of the float32 one.
    """

    def __init__(self, seed: int, samples: Sequence[int], event: Sequence[int]) -> None:
        if seed < 0:
            raise ValueError(f"a seed is a whole number >= 0, got {seed}")
        self.bits = np.random.Philox(key=[seed % 2**64, 0])
        self.normal = np.random.Generator(self.bits).standard_normal
        self.state = self.bits.state
        self.seed, self.samples, self.event = seed % 2**64, samples, tuple(event)

    def __call__(self, stream: int, level: int = 0, cell: int = 0) -> Tensor:
        out = np.empty((len(self.samples), int(np.prod(self.event))), np.float32)
        inner = self.state["state"]
        # Philox is a function of (key, counter): setting both is all that seeding means, and the buffer starts empty.
        self.state["buffer_pos"], self.state["has_uint32"] = 4, 0
        for row, sample in zip(out, self.samples, strict=True):
            inner["key"][:] = self.seed, sample
            inner["counter"][:] = 0, cell, level, stream
            self.bits.state = self.state
            self.normal(dtype=np.float32, out=row)
        return torch.as_tensor(out).reshape(len(self.samples), *self.event)


def standard_normal(
    shape: Sequence[int],
    seed: int,
    *,
    samples: Sequence[int] | None = None,
    stream: int = PRIOR,
    number: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Independent standard normals, one generator per sample: the start of a solve.

    Args:
        shape: (B, *event).
        seed: whole number >= 0.
        samples: B sample numbers; ``range(B)`` by default, so the first 16 of 64 are the 16 of a batch of 16.
        stream: what they are for; draws of two streams are independent at one seed.
        number: of the draw, where a stream has several; all are independent.
        dtype: of the result; the draws themselves are float32 normals.
        device: of the result; the bits do not depend on it.

    Returns:
        Tensor of shape ``shape``.

    >>> alone = standard_normal((1, 3), seed=7, samples=[17])
    >>> bool((standard_normal((64, 3), seed=7)[17] == alone).all())
    True
    """
    draw = _Keyed(seed, range(shape[0]) if samples is None else samples, shape[1:])
    return draw(stream, number).to(device=device, dtype=dtype)


class _Tree:
    """W on one interval of the line, W = 0 at its left end.

    Args:
        normal: ``normal(level, cell)``, the draw that belongs to a cell of a level.
        like: state of shape (B, *event).
        left: left end of the interval.
        width: of the interval.
        depth: cells of width ``width / 2^depth`` are the finest; W is linear inside.
    """

    def __init__(
        self, normal: Callable[[int, int], Tensor], like: Tensor, left: float, width: float, depth: int
    ) -> None:
        self.normal, self.left, self.width, self.depth = normal, left, width, depth
        # The cells around the last point asked for, coarse to fine: (index in its level, W at its left and right end).
        self.cells = [(0, torch.zeros_like(like), width**0.5 * normal(0, 0))]
        self.last: tuple[float, Tensor] | None = None

    def at(self, lam: float) -> Tensor:
        """W(lam), shape (B, *event)."""
        if self.last is not None and self.last[0] == lam:
            return self.last[1]
        u = min(max((lam - self.left) / self.width, 0.0), 1.0)  # position in the interval
        while len(self.cells) > 1 and not self._holds(len(self.cells) - 1, u):
            self.cells.pop()
        for level in range(len(self.cells) - 1, self.depth):
            cell, left, right = self.cells[level]
            half = 0.5 * (self.width / 2**level) ** 0.5
            middle = 0.5 * (left + right) + half * self.normal(level + 1, cell)
            upper = u * 2**level - cell >= 0.5
            self.cells.append((2 * cell + 1, middle, right) if upper else (2 * cell, left, middle))
        cell, left, right = self.cells[-1]
        w = torch.lerp(left, right, u * 2**self.depth - cell)
        self.last = (lam, w)
        return w

    def _holds(self, level: int, u: float) -> bool:
        return 0.0 <= u * 2**level - self.cells[level][0] <= 1.0


class BrownianMotion:
    """W(lam) for one batch, the same on every grid; see the module's text.

    The line is tiled with trees. The one around 0 is as wide as any solve; the others grow when asked for.

    Args:
        like: state of shape (B, *event) that gives shape, dtype and device.
        seed: whole number >= 0.
        samples: B sample numbers, ``range(B)`` by default.
        reach: the tree around 0 covers lam in [-reach, reach].
        depth: cells of width ``2 reach / 2^depth`` are the finest; W is linear inside.

    >>> x = torch.zeros(4, 2, dtype=torch.float64)
    >>> w, a, b, c = BrownianMotion(x, seed=0), *torch.tensor([-1.0, 0.5, 1.0], dtype=torch.float64)
    >>> whole, parts = w(a, c) * 2**0.5, w(a, b) * 1.5**0.5 + w(b, c) * 0.5**0.5
    >>> torch.allclose(whole, parts)
    True
    """

    TREES = 4  # that are remembered; one that comes back is grown again, the same

    def __init__(
        self, like: Tensor, seed: int, *, samples: Sequence[int] | None = None, reach: float = 16.0, depth: int = 20
    ) -> None:
        self.draw = _Keyed(seed, range(len(like)) if samples is None else samples, like.shape[1:])
        self.like, self.seed, self.reach, self.depth = like, seed, reach, depth
        self.trees: dict[int, _Tree] = {}

    def _tree(self, tile: int) -> _Tree:
        """The tree on [(2 tile - 1) reach, (2 tile + 1) reach]."""
        tree = self.trees.pop(tile, None)
        if tree is None:
            stream = TREE + (abs(2 * tile) + (tile < 0) << 8)  # 0, 1, -1, 2, ... as 0, 2, 3, 4, ...

            def normal(level: int, cell: int) -> Tensor:
                return self.draw(stream, level, cell).to(self.like)

            tree = _Tree(normal, self.like, (2 * tile - 1) * self.reach, 2 * self.reach, self.depth)
        self.trees[tile] = tree  # the last used comes last
        if len(self.trees) > self.TREES:
            del self.trees[next(iter(self.trees))]
        return tree

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The normalised increment (W(b) - W(a)) / sqrt|b - a|, shape (B, *event), unit variance.

        Steps as short as the finest cells have less: about 1 - c / (4 |b - a|) with c = 2 reach / 2^depth = 3e-5.

        Args:
            a: lam at the start of the step, 0-dim.
            b: lam at its end, 0-dim, different from a.
        """
        start, end = float(a), float(b)
        if start == end:
            raise ValueError(f"the noise of a step of zero length is not defined (lam = {start})")
        first, last = (math.floor((lam / self.reach + 1) / 2) for lam in (start, end))
        if first == last:
            tree = self._tree(first)
            before = tree.at(start)
            return (tree.at(end) - before) / abs(end - start) ** 0.5
        # W(lam) is what the tree under lam says, plus all of the trees before it.
        way = 1 if last > first else -1
        crossed = [self._tree(tile).at(math.inf) for tile in range(*sorted((first, last)))]
        inside = self._tree(last).at(end) - self._tree(first).at(start)
        return (inside + way * sum(crossed, torch.zeros_like(inside))) / abs(end - start) ** 0.5


ELSEWHERE = 64.0  # no two logsnr of one solve are 128 apart


def elsewhere(noise: Noise, place: int) -> Noise:
    """The same Brownian motion, looked at far from where solvers step: a noise that is independent of it.

    Two noises are independent if their places are different; place 0 is the noise itself.

    Args:
        noise: a Brownian motion in lam.
        place: whole number.

    >>> x, (a, b) = torch.zeros(1000, 1), torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> w = BrownianMotion(x, seed=0)
    >>> bool((w(a, b) * elsewhere(w, 3)(a, b)).mean().abs() < 0.1)
    True
    """

    def moved(a: Tensor, b: Tensor) -> Tensor:
        return noise(a + ELSEWHERE * place, b + ELSEWHERE * place)

    return moved


def area(noise: Noise, a: Tensor, b: Tensor, parts: int = 16) -> Tensor:
    """The space-time area, a standard normal like noise(a, b) and independent of it.

    sqrt(12 / |b - a|) INT_0^1 [W(a + u (b - a)) - W(a) - u (W(b) - W(a))] du: how far the path bulges over its chord.

    The integral is taken by the trapezoidal rule, which is its expectation given W at equally spaced points, and
    divided by its own standard deviation: the law is exact, the correlation with the true area sqrt(1 - 1 / parts^2).

    Args:
        noise: a Brownian motion in lam.
        a: lam at the start of the step, 0-dim.
        b: lam at its end, 0-dim, different from a.
        parts: of the step, >= 2; as many increments are asked for.

    Reference: Foster, Lyons and Oberhauser 2020, arXiv:1904.06998.
    """
    points = torch.lerp(a, b, torch.linspace(0, 1, parts + 1, dtype=torch.float64)).unbind()
    # With increments z_i / sqrt(parts), W at the middle points enters with weight 1 / parts, the chord takes off the
    # mean, and z_i is seen by all points after it.
    seen = torch.arange(parts - 1, -parts, -2, dtype=torch.float64)
    weights = seen / seen.square().sum().sqrt()
    return mix(*((w, noise(p, q)) for w, (p, q) in zip(weights.unbind(), pairwise(points), strict=True)))
