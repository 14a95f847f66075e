"""Results: what is written is read back, by us and by xarray; damage is one line; the file is never half."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from sdegen.files import DamagedFile, DiskFull
from sdegen.results import Result, names, read, write, write_csv


@pytest.fixture
def result() -> Result:
    return Result(
        {
            "T": (("T",), [10, 100, 1000], {"long_name": "levels"}),
            "part": (("part",), ["reconstruction", "latent", "prior"]),
            "nats": (("T", "part", "example"), np.random.default_rng(0).normal(size=(3, 3, 200)), {"unit": "nat"}),
            "seconds": ((), 1.5),
            "finite": (("example",), np.arange(200) > 3),
            "sample": (("example", "channel", "row", "column"), torch.zeros(200, 1, 2, 2, dtype=torch.float32)),
        },
        {
            "seed": 3,
            "config": 'seed = 3\n[model]\nname = "λ"\n',
            "versions": {"torch": "2.9"},
            "none": None,
            "ts": [1.0, 0.5],
        },
    )


def test_round_trip(tmp_path: Path, result: Result) -> None:
    file = tmp_path / "results.h5"
    write(file, "likelihood/bound", result)
    back = read(file, "likelihood/bound")
    assert list(back.arrays) == ["T", "part", *[n for n in back.arrays if n not in {"T", "part"}]]
    assert set(back.arrays) == set(result.arrays)
    for name, array in result.arrays.items():
        assert back.arrays[name].axes == array.axes
        assert back.arrays[name].values.tolist() == array.values.tolist()
        assert dict(back.arrays[name].attributes) == dict(array.attributes)
    assert back["finite"].dtype == bool
    assert back["sample"].dtype == np.float32
    assert back.attributes["seed"] == 3
    assert back.attributes["config"] == result.attributes["config"]
    assert back.attributes["versions"] == '{"torch": "2.9"}'
    assert back.attributes["ts"].tolist() == [1.0, 0.5]
    assert "none" not in back.attributes


def test_xarray_opens_it_unchanged(tmp_path: Path, result: Result) -> None:
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    write(tmp_path / "results.h5", "likelihood/bound", result)
    with xarray.open_dataset(tmp_path / "results.h5", group="likelihood/bound", engine="h5netcdf") as data:
        assert dict(data.sizes) == {"T": 3, "part": 3, "example": 200, "channel": 1, "row": 2, "column": 2}
        assert set(data.coords) == {"T", "part"}
        assert data["nats"].dims == ("T", "part", "example")
        assert data["nats"].attrs["unit"] == "nat"
        assert float(data["nats"].sel(T=100, part="latent")[7]) == result["nats"][1, 1, 7]
        assert data["finite"].dtype == bool
        assert data.attrs["seed"] == 3
        assert "example" not in data.variables


def test_other_results_stay_and_the_same_name_is_replaced(tmp_path: Path, result: Result) -> None:
    file = tmp_path / "results.h5"
    assert names(file) == []
    write(file, "b", result)
    write(file, "a/x", Result({"v": (("i",), [1, 2])}))
    write(file, "a/x", Result({"w": (("i",), [3, 4, 5])}))
    write(file, "a/y", Result({"v": (("i",), [1])}))
    assert sorted(names(file)) == ["a/x", "a/y", "b"]
    assert list(read(file, "a/x").arrays) == ["w"]
    assert read(file, "b")["nats"].tolist() == result["nats"].tolist()
    assert [f.name for f in tmp_path.glob("*") if not f.name.startswith(".lock-")] == ["results.h5"]
    with pytest.raises(KeyError, match="has no result 'c', only"):
        read(file, "c")


def test_room_of_a_replaced_result_is_used_again(tmp_path: Path, result: Result) -> None:
    file = tmp_path / "results.h5"
    write(file, "a", result)
    size = file.stat().st_size
    for _ in range(10):
        write(file, "a", result)
    assert file.stat().st_size < 2.5 * size


def test_a_failed_write_loses_nothing(tmp_path: Path, result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.h5"
    write(file, "a", result)
    before = file.read_bytes()
    with pytest.raises(TypeError, match="array 'v' of type datetime64"):
        write(file, "b", Result({"v": (("i",), np.array(["2020-01-01"], "datetime64[D]"))}))
    assert file.read_bytes() == before

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    with pytest.raises(DiskFull, match=r"results\.h5.*the previous file is kept"):
        write(file, "b", result)
    assert file.read_bytes() == before


def test_two_writers_take_turns(tmp_path: Path) -> None:
    file = tmp_path / "results.h5"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: write(file, f"r{i}", Result({"v": (("i",), [i])})), range(12)))
    assert sorted(names(file)) == sorted(f"r{i}" for i in range(12))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated(tmp_path: Path, result: Result, share: float) -> None:
    file = tmp_path / "results.h5"
    write(file, "a", result)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    for attempt in (lambda: read(file, "a"), lambda: names(file), lambda: write(file, "b", result)):
        with pytest.raises(DamagedFile, match=r"results\.h5 is truncated or damaged: ") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_seen(tmp_path: Path, result: Result) -> None:
    file = tmp_path / "results.h5"
    write(file, "a", result)
    with h5py.File(file) as opened:
        chunk = opened["a/nats"].id.get_chunk_info(0)
    content = bytearray(file.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedFile, match="truncated or damaged"):
        read(file, "a")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results file"):
        read(tmp_path / "results.h5", "a")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"v": (("i",), np.ones((2, 2)))}, r"'v' of shape \(2, 2\) needs as many axes"),
        ({"v": (("i",), [1, 2]), "w": (("i",), [1])}, "axis 'i' has length 2, but 1 in array 'w'"),
        ({"i": (("j",), [1, 2]), "w": (("i",), [1])}, "'i' is an axis and an array"),
    ],
)
def test_axes_that_do_not_fit(arrays: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Result(arrays)


def test_csv(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"model": "VAE", "bits": 2.1}, {"model": "DDPM, T=10", "bits": 3.5, "T": 10}])
    assert (tmp_path / "a.csv").read_text() == 'model,bits,T\nVAE,2.1,\n"DDPM, T=10",3.5,10\n'
