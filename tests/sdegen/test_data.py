"""Data sets: the split, the units, files of every kind, and one clear line for every file that is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from sdegen.bins import Bins
from sdegen.data import TOYS, Dataset, digits, from_arrays, from_file, load, names, toy

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 5, 4), dtype=np.uint8)
VECTORS = RNG.normal(3.0, 2.0, (50, 3)).astype(np.float32)


# --- digits ---


def test_digits_are_split_with_the_same_share_of_each_class() -> None:
    data = digits()
    assert (len(data.train), len(data.test)) == (1437, 360)
    shares = [torch.bincount(c, minlength=10) / len(c) for c in (data.train_cond, data.test_cond)]
    assert float((shares[0] - shares[1]).abs().max()) < 0.003
    levels = data.raw(torch.cat([data.train, data.test]))
    assert torch.equal(levels.unique(), torch.arange(17))
    assert torch.equal(digits().test, data.test)
    assert not torch.equal(digits(seed=1).test, data.test)


def test_digits_hold_every_image_once_with_its_label() -> None:
    from sklearn.datasets import load_digits

    data, bunch = digits(), load_digits()
    images = data.raw(torch.cat([data.train, data.test])).flatten(1)
    labels = torch.cat([data.train_cond, data.test_cond])
    mine = sorted(map(tuple, torch.cat([images, labels[:, None]], 1).tolist()))
    theirs = sorted(
        (*row, int(label)) for row, label in zip(bunch.data.astype(int).tolist(), bunch.target, strict=True)
    )
    assert mine == theirs


def test_three_constant_pixels_do_no_harm() -> None:
    data = digits()
    spread = torch.cat([data.train, data.test]).flatten(1).std(0)
    assert int((spread == 0).sum()) == 3
    assert bool(data.train.isfinite().all())


# --- toys ---


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_centred_seeded_and_independent(name: str) -> None:
    data = toy(name, size=20_000)
    assert data.event_shape == (2,)
    assert float(data.train.mean(0).abs().max()) < 0.12
    assert 0.6 < float(data.train.std()) < 1.3
    assert torch.equal(toy(name, size=20_000).train, data.train)
    assert not torch.equal(toy(name, size=20_000, seed=1).train, data.train)
    assert not torch.isin(data.test, data.train).all(1).any()


def test_checkerboard_lives_on_its_dark_squares() -> None:
    cell = (toy("checkerboard").train / 0.85 + 2).floor()
    assert bool(((cell.sum(1) % 2) == 0).all())
    assert len(cell.unique(dim=0)) == 8


def test_mixtures_know_their_density() -> None:
    data = load("mixture2d", size=4000)
    assert data.exact is not None
    assert float(data.exact.log_prob(data.test.double()).mean()) > float(
        data.exact.log_prob(data.test.double() + 3).mean()
    )


def test_names_are_suggested() -> None:
    assert {"digits", "moons", "mixture2d"} <= set(names())
    with pytest.raises(ValueError, match="did you mean digits"):
        load("digit")
    with pytest.raises(ValueError, match="unknown density 'digits'; there are moons"):
        toy("digits")


# --- files ---


def written(folder: Path, kind: str, **arrays: np.ndarray) -> Path:
    path = folder / f"data.{kind}"
    if kind == "npy":
        np.save(path, next(iter(arrays.values())))
    elif kind == "npz":
        np.savez_compressed(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(f"group/{name}", data=array, compression="gzip")
    return path


@pytest.mark.parametrize("kind", ["h5", "hdf5", "npz", "npy"])
def test_bytes_are_256_grey_levels_and_come_back(kind: str, tmp_path: Path) -> None:
    data = from_file(written(tmp_path, kind, x=IMAGES), test_fraction=0.25)
    assert data.bins == Bins(256)
    assert (data.train.shape, data.test.shape) == ((15, 1, 5, 4), (5, 1, 5, 4))
    both = torch.cat([data.train, data.test])
    back = sorted(map(tuple, data.raw(both).flatten(1).tolist()))
    assert back == sorted(map(tuple, IMAGES.reshape(20, -1).tolist()))
    torch.testing.assert_close(data.scale * data.raw(both).float() + data.shift, both)
    assert data.name == f"data.{kind}"


@pytest.mark.parametrize("kind", ["h5", "npz"])
def test_keys_labels_and_a_held_out_array(kind: str, tmp_path: Path) -> None:
    labels = np.arange(20) % 3
    path = written(tmp_path, kind, x=IMAGES, y=labels, xt=IMAGES[:4], yt=labels[:4])
    at = "group/" if kind == "h5" else ""
    data = from_file(path, f"{at}x", labels=f"{at}y", test_key=f"{at}xt", test_labels=f"{at}yt")
    assert torch.equal(data.raw(data.train).squeeze(1), torch.from_numpy(IMAGES).long())
    assert data.train_cond is not None
    assert data.train_cond.tolist() == labels.tolist()
    assert data.test_cond is not None
    assert (data.classes, len(data.test_cond)) == (3, 4)
    split = from_file(path, f"{at}x", labels=f"{at}y")
    for x, cond in ((split.train, split.train_cond), (split.test, split.test_cond)):
        for image, label in zip(split.raw(x).squeeze(1), cond, strict=True):  # labels stay with their images
            row = [bool((torch.from_numpy(other) == image).all()) for other in IMAGES].index(True)
            assert int(label) == labels[row]


def test_real_numbers_are_standardised_and_come_back() -> None:
    data = from_arrays(VECTORS)
    both = torch.cat([data.train, data.test])
    assert data.bins is None
    assert float(data.train.double().std(correction=0)) == pytest.approx(1, abs=1e-3)
    back = data.raw(both).sort(0).values
    torch.testing.assert_close(back, torch.from_numpy(VECTORS).sort(0).values, rtol=1e-5, atol=1e-5)
    assert data.log_volume == pytest.approx(3 * np.log(data.scale))


def test_levels_make_integers_of_numbers() -> None:
    assert from_arrays(IMAGES.astype(np.float64), levels=256).bins == Bins(256)
    assert from_arrays(IMAGES > 100).bins == Bins(2)
    with pytest.raises(ValueError, match=r"grey levels 0\.\.15, but \d+ values are none; the first is \d+"):
        from_arrays(IMAGES, levels=16)
    with pytest.raises(ValueError, match=r"grey levels 0\.\.9, but 1 values are none; the first is 0\.5"):
        from_arrays(np.array([[0.0], [0.5], [3.0]]), levels=10)


def test_the_split_is_fixed_by_the_seed() -> None:
    a, b, c = (from_arrays(VECTORS, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.test, b.test)
    assert not torch.equal(a.test, c.test)
    assert not torch.isin(a.test, a.train).all(1).any()


def faulty(bad: float) -> np.ndarray:
    x = VECTORS.copy()
    x[7, 2] = x[9, 1] = bad
    return x


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (faulty(np.nan), r"2 NaN or infinite values; the first is at index \(7, 2\)"),
        (faulty(-np.inf), r"2 NaN or infinite values; the first is at index \(7, 2\)"),
        (np.zeros(9), r"shape \(9,\); it must be \(N, D\), \(N, H, W\) or \(N, C, H, W\)"),
        (np.zeros((2, 2, 2, 2, 2)), r"shape \(2, 2, 2, 2, 2\)"),
        (np.zeros((0, 4)), "is empty"),
        (np.zeros((4, 0)), "is empty"),
        (np.array([["a", "b"], ["c", "d"]]), "not numbers"),
        (np.ones((3, 3)) * 1j, "complex128, not numbers"),
        (np.ones((9, 3)), "is 1: there is nothing to learn"),
        (np.zeros((3, 28, 28, 3), np.uint8), r"looks like \(N, H, W, C\)"),
        (np.zeros((1, 3)), "at least two are needed"),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "npy", "h5"])
def test_wrong_content_is_one_clear_line(kind: str, array: np.ndarray, message: str, tmp_path: Path) -> None:
    if kind == "h5" and array.dtype.kind == "U":
        array = array.astype("S")
    with pytest.raises(ValueError, match=message) as caught:
        from_file(written(tmp_path, kind, x=array))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["npz", "npy", "h5"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97])
def test_truncated_files_are_one_clear_line(kind: str, share: float, tmp_path: Path) -> None:
    path = written(tmp_path, kind, x=np.random.default_rng(1).normal(size=(200, 50)))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        from_file(path)
    assert "\n" not in str(caught.value)
    assert "truncated" in str(caught.value)


def test_a_damaged_block_inside_a_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "data.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=VECTORS, chunks=(50, 3), fletcher32=True)
    content = bytearray(path.read_bytes())
    content[content.index(VECTORS.tobytes()[:64]) + 10] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        from_file(path)


def test_missing_files_keys_and_endings_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.h5"):
        load("nowhere.h5")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        from_file(tmp_path)  # a folder
    for kind, at in (("npz", ""), ("h5", "group/")):
        path = written(tmp_path, kind, a=VECTORS, b=VECTORS)
        with pytest.raises(ValueError, match=f"several arrays: say which by key=, one of {at}a, {at}b"):
            from_file(path)
        with pytest.raises(ValueError, match=f"no array 'c'; it holds {at}a, {at}b"):
            from_file(path, "c")
    with pytest.raises(ValueError, match="one array without a name"):
        from_file(written(tmp_path, "npy", x=VECTORS), "x")
    other = tmp_path / "data.csv"
    other.write_text("1,2\n")
    with pytest.raises(ValueError, match=r"the ending must be one of \.h5, \.hdf5, \.npz, \.npy"):
        from_file(other)


def test_files_that_could_run_code_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"no \.npy file of numbers"):
        from_file(path)


def test_labels_are_checked() -> None:
    with pytest.raises(ValueError, match=r"labels have shape \(3,\), but there are 20"):
        from_arrays(IMAGES, labels=np.zeros(3, int))
    with pytest.raises(ValueError, match="integers from 0 upwards"):
        from_arrays(IMAGES, labels=np.zeros(20))
    with pytest.raises(ValueError, match="between 0 and 1"):
        from_arrays(IMAGES, test_fraction=1.5)


def test_a_dataset_must_agree_with_itself() -> None:
    with pytest.raises(ValueError, match="they must agree"):
        Dataset("x", torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="held-out part of x is empty"):
        Dataset("x", torch.zeros(3, 2), torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"training labels have shape \(2,\)"):
        Dataset("x", torch.zeros(3, 2), torch.zeros(3, 2), train_cond=torch.zeros(2))
