"""The generator behind the Brownian motion: its words are Philox's on every device, its normals normal and alone."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from solvers.philox import Normals, box_muller, device_words, host_words, philox

TOP = 2**64 - 1
KNOWN = [  # counter, key, words: the known answers that come with Random123
    ((0, 0, 0, 0), (0, 0), (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)),
    ((TOP,) * 4, (TOP,) * 2, (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0)),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]


def int64(*words: int) -> list[Tensor]:
    return [torch.tensor((word + 2**63) % 2**64 - 2**63) for word in words]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert [int(word) % 2**64 for word in philox(int64(*counter), key)] == list(words)


@pytest.mark.parametrize("key", [(0, 0), (3, TOP), (2**63 + 1, 5), (123456789012345678, 2**64 - 2**40)])
def test_torch_and_numpy_make_the_same_words(key: tuple[int, int]) -> None:
    samples, places, blocks = [0, 1, 2, 7, 2**40, 2**40 + 1, 3], [0, 1, -7, 2**45 + 11, -(2**50)], 3
    ours = device_words(key, torch.tensor(samples), torch.tensor(places)[:, None], blocks)
    runs = [(0, 3), (7, 1), (2**40, 2), (3, 1)]
    theirs = host_words(key, [(*run, place) for place in places for run in runs], blocks)
    assert torch.equal(ours.flatten(), theirs)
    assert len(ours.unique()) == ours.numel()  # 840 of 2^32: the chance of two alike is 1e-4, and fixed


def test_close_keys_of_many_bits_are_not_the_same() -> None:
    one, other = (host_words((2**63 + k, 0), [(0, 1, 0)], 1) for k in (1, 2))
    assert not torch.equal(one, other)


def test_normals_are_normal() -> None:
    z = Normals(11, 0, range(64), (2**15,))([5])[0].double().flatten()
    n = len(z)
    errors = [1, math.sqrt(2), math.sqrt(15), math.sqrt(96)]  # standard deviations of z, z^2, z^3, z^4
    for k, (mean, error) in enumerate(zip((0, 1, 0, 3), errors, strict=True), start=1):
        assert abs(float((z**k).mean()) - mean) < 4 * error / math.sqrt(n)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    for far in (2.0, 3.0, 4.0):
        chance = 2 * stats.norm.sf(far)
        assert abs(int((z.abs() > far).sum()) - n * chance) < 4 * math.sqrt(n * chance)


def test_the_two_of_a_pair_are_independent() -> None:
    """Cosine and sine share a radius: their squares would show it if the angle were not uniform."""
    z = box_muller(host_words((1, 2), [(0, 2**12, 0)], 32).reshape(2**12, 256)).double()
    one, two = z.chunk(2, -1)
    n = one.numel()
    assert abs(float((one * two).mean())) < 4 / math.sqrt(n)
    assert abs(float((one.square() * two.square()).mean()) - 1) < 4 * math.sqrt(8 / n)
    assert abs(float((one.square() - two.square()).mean())) < 4 * math.sqrt(4 / n)


def test_every_word_gives_a_finite_normal_and_the_tail_reaches_as_far_as_it_says() -> None:
    ends = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 64, -(2**31) + 1], dtype=torch.int32)
    z = box_muller(torch.cartesian_prod(ends, ends))
    assert z.isfinite().all()
    assert float(z.norm(dim=-1).max()) == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)  # 6.66


def test_a_normal_is_the_same_bits_wherever_it_stands() -> None:
    """Kernels do some elements at once and the rest one by one: both ways must round alike."""
    words = host_words((4, 4), [(0, 1, 0)], 2**13)[: 2**16].reshape(-1, 2).T.contiguous().T  # pairs (far, way)
    alone = box_muller(words.contiguous())
    far, way = words.T
    for begin in range(0, 34, 3):
        for count in (1, 2, 3, 5, 8, 13, 15, 16, 17, 31, 33, 63, 1000, 2**15 - 34):
            some = slice(begin, begin + count)
            z = box_muller(torch.cat([far[some], way[some]]))
            assert torch.equal(z.reshape(2, -1).T, alone[some])


@pytest.mark.parametrize("event", [(1,), (7,), (3, 5), (3, 33, 31)])
def test_a_sample_is_the_same_bits_in_any_company(event: tuple[int, ...]) -> None:
    places = [3, -(2**41), 2**17 + 5]
    whole = Normals(9, 1, range(64), event)(places)
    for samples in ([17], range(17, 40), [63, 17, 18, 0]):
        some = Normals(9, 1, samples, event)(places)
        one_by_one = [Normals(9, 1, samples, event)([place])[0] for place in places]
        for all_of_them, few, single in zip(whole, some, one_by_one, strict=True):
            assert torch.equal(few, all_of_them[list(samples)])
            assert torch.equal(few, single)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = Normals(9, 1, range(64), event)(places)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(z, other) for z, other in zip(whole, again, strict=True))


@pytest.mark.parametrize("group", [1, 2, 100])
def test_a_device_makes_the_same_normals(group: int) -> None:
    """The way of an accelerator, walked on the processor."""
    here, there = (Normals(9, 1, [4, 5, 0], (3, 7)) for _ in range(2))
    there.there, there.group = torch.tensor([4, 5, 0]), group
    places = [0, 2**40 + 3, -12]
    assert all(torch.equal(z, y) for z, y in zip(here(places), there(places), strict=True))
    own = torch.tensor([[1, 2, 3], [4, 4, -(2**44)]])
    for row, z, y in zip(own, here.each(own), there.each(own), strict=True):
        assert torch.equal(z, y)
        for i, place in enumerate(row.tolist()):
            assert torch.equal(z[i], here([place])[0][i])


def test_who_keeps_one_place_does_not_keep_the_others() -> None:
    for z in Normals(0, 0, range(3), (5,))([1, 2, 3]):
        assert z.untyped_storage().nbytes() <= 3 * 8 * 4


def test_nothing_is_read_from_the_device() -> None:
    """Tensors without contents: whatever wanted to look at one would fail."""
    normals = Normals(0, 0, range(3), (5,), "meta")
    places = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    assert [z.shape for z in (*normals([1, 2]), *normals.each(places))] == [(3, 5)] * 4


def test_what_is_no_sample_number_is_refused() -> None:
    for samples in ([-1], [2**62]):
        with pytest.raises(ValueError, match="sample numbers are whole, >= 0"):
            Normals(0, 0, samples, (3,))


@pytest.mark.cuda
def test_words_are_equal_on_a_device_and_normals_to_rounding() -> None:
    samples, places = range(64), [0, 5, -(2**45), 2**17 + 1]
    here = host_words((7, TOP), [(0, 64, place) for place in places], 5).reshape(len(places), 64, 40)
    there = device_words((7, TOP), torch.arange(64, device="cuda"), torch.tensor(places, device="cuda")[:, None], 5)
    assert torch.equal(here, there.cpu())
    pairs = zip(Normals(7, 1, samples, (37,))(places), Normals(7, 1, samples, (37,), "cuda")(places), strict=True)
    for z, y in pairs:
        assert y.is_cuda
        torch.testing.assert_close(y.cpu(), z, rtol=1e-5, atol=2e-6)
    alone = Normals(7, 1, [17], (37,), "cuda")(places)
    together = Normals(7, 1, samples, (37,), "cuda")(places)
    assert all(torch.equal(one[0], many[17]) for one, many in zip(alone, together, strict=True))
