"""One Brownian motion that every stochastic solver shares.

In the clock ``lam = logsnr / 2`` the reverse family of every Gaussian path is driven in the same way: with ``y = x /
alpha``

    dy = -(1 + eta^2) (y - x0) dlam + sqrt(2) eta exp(-lam) dW(lam),

so one Brownian motion ``W(lam)`` serves all solvers, all grids and all paths. A step from ``a`` to ``b`` asks only for
the normalised increment ``(W(b) - W(a)) / sqrt|b - a|``, a standard normal. Refine the grid and the same seed
converges to the same sample (*strong* convergence); compare two solvers and they see the same randomness (common
random numbers).

``W`` is Levy's construction. The line is cut into intervals of 64; over one of them W has a chord, in the middle of it
W is off the chord by a normal, and so on in each half:

    W(lam) = u sqrt(64) Z + SUM_k sqrt(h_k) tent(f_k) Z_k,        h_k = 64 / 2^k,  tent(f) = min(f, 1 - f),

with u and f_k where lam is in its interval and in its cell of level k. A point is a sum of as many normals as there are
levels, an increment is one over what its two ends do not share, and a normal is a pure function of (seed, sample,
level, cell), by :mod:`solvers.philox`. Nothing is stored that could not be had again, and there is no sequence that a
device would have to follow. Sample 17 is the same bits whatever stands beside it in the batch; on another kind of
device it is the same to the rounding of a logarithm.

In the finest cell the tent gives way to sqrt(f (1 - f)), the standard deviation of a path between its ends. So every
point has its right law, jointly with any points of other cells: on a grid whose steps are no shorter than the finest
cells, 64 / 2^17 = 5e-4, increments are exactly independent standard normals. A thousand steps of the usual grids are
ten times as long, and the shortest that :class:`solvers.AdaptiveHeun` takes at a tolerance of 1e-4 are just longer.
Between two points of one cell the path is smooth, and the increment too small.

Everything random in a solve is an increment of this one ``W``, which lives on the whole line, and two of its properties
serve what an increment over the step itself cannot:

* its increments over disjoint intervals are independent, so a noise *of its own* (Langevin steps, restarts) is that of
  the same interval moved to where no solver steps (:func:`elsewhere`);
* it is a path, so the second Gaussian that methods of strong order 1.5 want, the *area* between the path and its chord,
  can be computed from increments inside the step (:func:`area`).

Whatever can stand for a Brownian motion (unit impulses, symbols, recorded draws) thereby stands for all of them.

What a solve starts from, and what else is drawn once and not at every step, is :func:`standard_normal`: the same Philox
under other keys, made normal by numpy's ziggurat, on the CPU. Published figures rest on these draws, bit by bit.

Reference: Salmon et al. 2011 (Philox, counter-based generators); Kidger et al. 2021, arXiv:2105.13493 (virtual trees).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from solvers.philox import Normals
from solvers.problem import expand, mix

__all__ = ["BrownianMotion", "Noise", "area", "elsewhere", "fresh_seed", "silent", "standard_normal"]

PRIOR, _, DECODER, ENCODER, PROBES, PILOT, BOUND = range(7)
"""Streams of :func:`standard_normal`: draws of different meaning never share a counter. Those from BOUND on are the
bound's, one for each of its terms."""

BROWNIAN = 2**64 - 1  # in the key of the Brownian motion, where that of standard_normal has the number of a sample
WIDTH = 64.0  # of a tree, in lam; no two logsnr of one solve are 128 apart
PLACES = 2**40  # in a tree: its chord at 0, the cell c of level k at 2^k + c


class Noise(Protocol):
    """What a stochastic solver asks for: unit-variance increments of one Brownian motion in the clock lam."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(W(b) - W(a)) / sqrt|b - a|, of the state's shape, dtype and device.

        a and b are values of lam: 0-dim, or (B,) from adaptive methods, whose samples have steps of their own.
        """
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
    _check_seed(seed)
    out = np.empty((shape[0], math.prod(shape[1:])), np.float32)
    bits = np.random.Philox(key=0)
    normal, state = np.random.Generator(bits).standard_normal, bits.state
    for row, sample in zip(out, range(shape[0]) if samples is None else samples, strict=True):
        # Philox is a function of (key, counter): setting both is all that seeding means, and the buffer starts empty.
        state["state"]["key"] = np.array([seed % 2**64, sample], np.uint64)
        state["state"]["counter"] = np.array([0, 0, number, stream], np.uint64)
        bits.state = state
        normal(dtype=np.float32, out=row)
    return torch.as_tensor(out).reshape(tuple(shape)).to(device=device, dtype=dtype)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"a seed is a whole number >= 0, got {seed}")


def _points(lam: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """What W(lam) is made of in its tree: the places of the normals, and how much of each.

    Args:
        lam: points, float64 (..., K).
        depth: of the tree.

    Returns:
        int64 and float64, (..., depth + 2, K).
    """
    at = (lam / WIDTH + 0.5).unsqueeze(-2)
    tree = at.floor()
    u = at - tree
    cells = 2.0 ** torch.arange(depth + 1, dtype=lam.dtype, device=lam.device)[:, None]  # in each level
    f = u * cells
    cell = f.floor()
    f -= cell
    rise = torch.minimum(f, 1 - f)
    rise[..., -1, :] = (f * (1 - f))[..., -1, :].sqrt()
    places = torch.cat([torch.zeros_like(u), cells + cell], -2).long() + tree.long() * PLACES
    return places, WIDTH**0.5 * torch.cat([u, rise * cells.rsqrt()], -2)


def _increments(a: Tensor, b: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """What (W(b) - W(a)) / sqrt|b - a| is made of, for |b - a| < ``WIDTH``.

    Args:
        a: float64 (K,).
        b: float64 (K,); where it is equal to a, the weights are 0.
        depth: of the tree.

    Returns:
        Places, int64 (2, depth + 2, K), those of the upper end and those of the lower; and weights. From b to a they
        are the same but for the sign.
    """
    places, (high, low) = _points(torch.stack([torch.maximum(a, b), torch.minimum(a, b)]), depth)
    shared = places[0] == places[1]
    high, low = torch.where(shared, high - low, high), torch.where(shared, 0.0, -low)
    low[0] += torch.where(shared[0], 0.0, WIDTH**0.5)  # the upper end is in the next tree
    h = b - a
    return places, torch.stack([high, low]) * torch.where(h == 0, 0.0, h.sign() * h.abs().rsqrt())


class BrownianMotion:
    """W(lam) for one batch, the same on every grid; see the module's text.

    It is drawn on the device of the state, and a step waits for nothing. The normals behind the ends of the last two
    steps are kept, at most 2 (depth + 2) states, so a walk draws only what is new.

    Args:
        like: state of shape (B, *event) that gives shape, dtype and device.
        seed: whole number >= 0.
        samples: B sample numbers, ``range(B)`` by default.
        depth: cells of width 64 / 2^depth are the finest, 0 to 38. A deeper tree has the same path in more detail.

    >>> x = torch.zeros(4, 2, dtype=torch.float64)
    >>> w, a, b, c = BrownianMotion(x, seed=0), *torch.tensor([-1.0, 0.5, 1.0], dtype=torch.float64)
    >>> whole, parts = w(a, c) * 2**0.5, w(a, b) * 1.5**0.5 + w(b, c) * 0.5**0.5
    >>> torch.allclose(whole, parts)
    True
    """

    ENDS = 2  # of steps that are remembered; what is needed elsewhere is drawn again, the same

    def __init__(self, like: Tensor, seed: int, *, samples: Sequence[int] | None = None, depth: int = 17) -> None:
        _check_seed(seed)
        if not 0 <= depth <= 38:
            raise ValueError(f"the depth of a Brownian motion is 0 to 38, got {depth}")
        self.samples = range(len(like)) if samples is None else samples
        if len(self.samples) != len(like):
            raise ValueError(f"{len(like)} samples have as many numbers, got {len(self.samples)}")
        self.like, self.seed, self.depth = like, seed, depth
        self.normals = Normals(seed, BROWNIAN, self.samples, like.shape[1:], like.device)
        self.kept: dict[int, Tensor] = {}  # by their places
        self.ends: list[list[int]] = []  # the places behind the last ends of steps

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The normalised increment (W(b) - W(a)) / sqrt|b - a|, shape (B, *event), unit variance.

        Args:
            a: lam at the start of the step, 0-dim, or (B,) where samples have steps of their own.
            b: lam at its end, of the same shape, different from a; for a sample of many that rests, the increment is 0.

        Raises:
            ValueError: a 0-dim step of length zero.
        """
        out = torch.zeros_like(self.like, dtype=torch.promote_types(self.like.dtype, torch.float32))
        if a.ndim > 0:
            places, weights = _increments(a.to(self.like.device), b.to(self.like.device), self.depth)
            for c, z in zip(weights.flatten(0, 1).to(out.dtype), self.normals.each(places.flatten(0, 1)), strict=True):
                out.addcmul_(expand(c, out), z)
            return out.to(self.like.dtype)

        start, end = float(a), float(b)
        if not 0 < abs(end - start) < WIDTH:
            raise ValueError(f"a step of noise has a length above 0 and below {WIDTH:g}, not from {start} to {end}")
        ends = torch.tensor([[start], [end]], dtype=torch.float64)
        places, weights = _increments(ends[0], ends[1], self.depth)
        upper, lower = cast("list[list[int]]", cast("Any", places[..., 0]).tolist())
        shares = cast("list[float]", cast("Any", weights.flatten()).tolist())
        terms = {place: c for place, c in zip((*upper, *lower), shares, strict=True) if c}

        new = [place for place in terms if place not in self.kept]
        self.kept |= dict(zip(new, self.normals(new), strict=True))
        for place, c in terms.items():
            out.add_(self.kept[place], alpha=c)
        self.ends = [*self.ends, upper if end > start else lower][-self.ENDS :]
        behind = {place for places in self.ends for place in places}
        self.kept = {place: z for place, z in self.kept.items() if place in behind}
        return out.to(self.like.dtype)


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
        return noise(a + WIDTH * place, b + WIDTH * place)

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
