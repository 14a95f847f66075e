"""Normals with an address: a pure function of (seed, stream, sample, place), the same on every device.

A *counter-based* generator has no state that moves on. It is a keyed bijection of counters, so good a mixer that the
images of 1, 2, 3, ... pass for random; any of them can be had at any time, in any order, by anybody. Philox4x64-10 does
ten rounds, on four 64-bit words c under the two words of a key k,

    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)),       k <- k + W,

with hi and lo the halves of a 128-bit product. Here the key is (seed, stream), and the counter (block, place): the
blocks of a sample follow one another and the samples do so too, hence a batch 0..B-1 is one run of counters. numpy has
that function in C, and a run costs one call, so it serves the CPU; elsewhere the same function is a few hundred
operations on whole-number tensors, for all samples and places together, and nothing is copied from the host. The words
are equal bit for bit.

Two 32-bit words make two normals (Box and Muller),

    z = sqrt(-2 log u) cos(2 pi v),   sqrt(-2 log u) sin(2 pi v),       u = (k + 1/2) / 2^31,

in float32, whatever the dtype of the state. A float is fine where it is small, so u keeps all of its 31 bits where they
make the tail: it reaches to |z| = 6.66, beyond which a normal lies once in 4e10. On two kinds of device the normals are
equal to the rounding of log, cos and sin. On one they are the same bits in any company, for kernels treat the elements
of a tensor alike wherever they stand (the tests look).

Reference: Salmon et al. 2011, doi:10.1145/2063384.2063405 (Philox); Box and Muller 1958, doi:10.1214/aoms/1177706645.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

__all__ = ["Normals", "box_muller", "device_words", "host_words", "philox"]

MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
INCREMENTS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # of the key: the golden ratio, and sqrt(3) - 1
ROUNDS = 10
BLOCK = 8  # 32-bit words that a counter gives
LOW = 2**32 - 1


def _signed(word: int) -> int:
    """The int64 of the same bits."""
    return (word + 2**63) % 2**64 - 2**63


def _product(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of the 128-bit product of unsigned words, by halves of 32 bits; int64 wraps, as it should."""
    m0, m1 = m & LOW, m >> 32
    x0, x1 = x & LOW, (x >> 32) & LOW
    carried = torch.add(((x0 * m0) >> 32) & LOW, x1, alpha=m0)
    middle = torch.add(carried & LOW, x0, alpha=m1)
    high = torch.add(((carried >> 32) & LOW) + ((middle >> 32) & LOW), x1, alpha=m1)
    return high, x * _signed(m)


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> Tensor:
    """Philox4x64-10 in torch.

    Args:
        counter: four int64 tensors that broadcast, read as unsigned words.
        key: two whole numbers, modulo 2^64.

    Returns:
        int64 of shape (..., 4), the bits of unsigned words.

    >>> [f"{int(word) % 2**64:x}" for word in philox([torch.zeros((), dtype=torch.int64)] * 4, (0, 0))]
    ['16554d9eca36314c', 'db20fe9d672d0fdc', 'd7e772cee186176b', '7e68b68aec7ba23b']
    """
    c0, c1, c2, c3 = counter
    for i in range(ROUNDS):
        k0, k1 = (_signed(k + i * step) for k, step in zip(key, INCREMENTS, strict=True))
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
    return torch.stack([c0, c1, c2, c3], -1)  # of one shape: each depends on all that went in


def device_words(key: tuple[int, int], samples: Tensor, places: Tensor, blocks: int) -> Tensor:
    """The words of samples at places, by torch, and nothing that the host would have to wait for.

    Args:
        key: (seed, stream).
        samples: sample numbers, int64 (B,), on the device.
        places: int64 (P, 1), the same for all, or (P, B).
        blocks: counters of a sample.

    Returns:
        int32 (P, B, 8 blocks).
    """
    count = torch.arange(1, blocks + 1, device=samples.device)
    none = torch.zeros((), dtype=torch.int64, device=samples.device)
    words = philox((samples[:, None] * blocks + count, places[..., None], none, none), key)
    return words.flatten(-2).view(torch.int32)


def host_words(key: tuple[int, int], addresses: Iterable[tuple[int, int, int]], blocks: int) -> Tensor:
    """The same words by numpy.

    Args:
        key: (seed, stream).
        addresses: runs of samples at a place: the number of the first, how many follow one another, and the place.
        blocks: counters of a sample.

    Returns:
        int32, all in one row: 8 blocks for every sample of every run.
    """
    bits = np.random.Philox(key=np.array([k % 2**64 for k in key], np.uint64))
    state, pieces = bits.state, list[np.ndarray]()
    for first, count, place in addresses:
        # It adds one to the counter before it looks, and its buffer is empty.
        state["state"]["counter"] = np.array([first * blocks, place % 2**64, 0, 0], np.uint64)
        bits.state = state
        pieces.append(bits.random_raw(count * blocks * 4))
    words = pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.empty(0, np.uint64)])
    return torch.as_tensor(words.view("<i4"))


def _runs(samples: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers: the first of each, and how many there are."""
    starts = [i for i in range(len(samples)) if i == 0 or samples[i] != samples[i - 1] + 1]
    return [(samples[a], b - a) for a, b in pairwise([*starts, len(samples)])]


def box_muller(words: Tensor) -> Tensor:
    """Standard normals of 32-bit words: the first half of a row says how far, the second in which direction.

    Args:
        words: int32 (..., 2 k).

    Returns:
        float32 of the same shape.
    """
    far, way = words.chunk(2, -1)
    radius = (far & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).log_().mul_(-2.0).sqrt_()
    angle = way.float().mul_(math.pi * 2.0**-31)
    out = radius.new_empty(words.shape)
    cosine, sine = out.chunk(2, -1)
    torch.mul(radius, angle.cos(), out=cosine)
    torch.mul(radius, angle.sin_(), out=sine)
    return out


class Normals:
    """Standard normals of some samples, at any places.

    Args:
        seed: whole number >= 0.
        stream: what they are for; two streams are independent.
        samples: B sample numbers, >= 0.
        event: shape of one sample.
        device: where they are made.
    """

    def __init__(
        self, seed: int, stream: int, samples: Sequence[int], event: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self.key, self.samples, self.event, self.size = (seed, stream), samples, tuple(event), math.prod(event)
        self.blocks = max(1, -(-self.size // BLOCK))
        if not all(0 <= sample < 2**62 // self.blocks for sample in samples):
            raise ValueError(f"sample numbers are whole, >= 0 and below 2^62 / {self.blocks}, got {samples}")
        device, self.runs = torch.device(device), _runs(samples)
        on_host = device.type == "cpu"
        self.there = None if on_host else torch.tensor(list(samples), dtype=torch.int64, device=device)
        # Places in one piece of work: as much as stays in the cache of a processor, or half a gigabyte.
        self.group = max(1, (2**16 if on_host else 2**24) // max(1, len(samples) * self.blocks * BLOCK))

    def __call__(self, places: Sequence[int]) -> list[Tensor]:
        """For each place, B normals: float32 (B, *event), each in memory of its own."""
        out: list[Tensor] = []
        for i in range(0, len(places), self.group):
            some = places[i : i + self.group]
            if self.there is None:
                words = host_words(self.key, [(*run, place) for place in some for run in self.runs], self.blocks)
            else:
                # A number in a kernel's arguments is nothing to wait for; a tensor made of a list is.
                rows = [torch.full((1,), place, dtype=torch.int64, device=self.there.device) for place in some]
                words = device_words(self.key, self.there, torch.stack(rows), self.blocks)
            block = self._normals(words, len(some))
            # Who keeps one does not keep its company.
            out += [z if len(some) == 1 else z.clone() for z in block.unbind()]
        return out

    def each(self, places: Tensor) -> Iterator[Tensor]:
        """For each row of places, one for every sample: int64 (P, B), P times B normals in turn."""
        for i in range(0, len(places), self.group):
            some = places[i : i + self.group]
            if self.there is None:
                numbers = cast("list[int]", cast("Any", some.flatten()).tolist())
                runs = [(sample, 1, place) for sample, place in zip(cycle(self.samples), numbers, strict=False)]
                words = host_words(self.key, runs, self.blocks)
            else:
                words = device_words(self.key, self.there, some, self.blocks)
            yield from self._normals(words, len(some)).unbind()

    def _normals(self, words: Tensor, places: int) -> Tensor:
        rows = box_muller(words.reshape(places, len(self.samples), self.blocks * BLOCK))
        return rows[..., : self.size].reshape(places, len(self.samples), *self.event)
