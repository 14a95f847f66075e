"""Files are old or new, never half; a full disk is one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdegen.files import Busy, DiskFull, locked, replacing, sha256, sweep, write_bytes


def test_replaces_only_when_the_block_ends_well(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    write_bytes(file, b"old")

    def interrupted() -> None:
        with replacing(file) as temporary:
            assert temporary.suffix == ".npz"
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.npz"]
    write_bytes(file, "new")
    assert file.read_text() == "new"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device"),
    ],
)
def test_full_disk_says_path_needed_and_free_and_keeps_the_old_file(tmp_path: Path, error: Exception) -> None:
    file = tmp_path / "state.pt"
    write_bytes(file, b"o" * 2000)
    with (
        pytest.raises(DiskFull, match=r"disk full: cannot write .*state.pt: needs 2.0 kB, .* free; the previous"),
        replacing(file),
    ):
        raise error
    assert file.read_bytes() == b"o" * 2000
    assert os.listdir(tmp_path) == ["state.pt"]


def test_space_is_asked_for_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"needs 1\d{3,}\.0 TB"), replacing(tmp_path / "a", needed=10**16):
        pytest.fail("the block must not start")


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a"):
        _ = 1 / 0
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        pass  # nothing was written
    assert os.listdir(tmp_path) == []


def test_sweep_removes_what_the_dead_left(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead, mine, other = (tmp_path / name for name in (f".tmp-{child.pid}-a", f".tmp-{os.getpid()}-b", "c"))
    for file in (dead, mine, other):
        file.write_text("x")
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([mine.name, "c"])


def test_sha256(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    code = f"from sdegen.files import locked\nwith locked({str(tmp_path / 'a')!r}): print('in', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(Busy, match=r"another process is writing to .*/a: wait"), locked(tmp_path / "a"):
        pytest.fail("the lock is held")
    child.kill()  # the lock goes with its owner
    child.communicate()
    with locked(tmp_path / "a"):
        pass
