"""Files that are either the old ones or the new ones, never half of each.

Every file that somebody would miss is written the same way: into a temporary file in the same folder, flushed to the
disk, and then renamed over the old one, which the operating system does in one indivisible step. Whatever happens
before the rename (Ctrl-C, ``kill -9``, a full disk, a power cut) leaves the old file as it was.

    with replacing(run / "state.pt") as temporary:
        torch.save(state, temporary)

A checksum (:func:`sha256`) says later whether a file is still the one that was written: neither HDF5 nor PyTorch nor
safetensors notices a flipped bit by itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: one writer at a time is then up to the user
    fcntl = None

__all__ = [
    "FULL",
    "Busy",
    "DamagedFile",
    "DiskFull",
    "locked",
    "readable_size",
    "replacing",
    "require_folder",
    "require_space",
    "sha256",
    "sweep",
    "write_bytes",
]

_PREFIX = ".tmp-"
# What an operating system says when it cannot write any more.
FULL = {errno.ENOSPC, errno.EDQUOT}


_UMASK = os.umask(0)  # it can be read only by setting it
os.umask(_UMASK)


class DiskFull(OSError):
    """There is no room for a file. One line: which file, what it needs, what is free; the old file is untouched."""

    def __init__(self, path: Path, needed: int) -> None:
        free = shutil.disk_usage(path.parent).free
        needs = f"needs {readable_size(needed)}" if needed else "needs more than that"
        kept = "; the previous file is kept" if path.exists() else ""
        super().__init__(f"disk full: cannot write {path}: {needs}, {readable_size(free)} are free{kept}")
        self.errno, self.path, self.needed, self.free = errno.ENOSPC, path, needed, free


class Busy(OSError):
    """Another process is writing to the same place, and did not finish in time."""


class DamagedFile(ValueError):
    """A file is truncated or altered. One line: which file, and what is wrong with it."""


def readable_size(count: int) -> str:
    """A number of bytes for people.

    >>> readable_size(512), readable_size(11_520_000)
    ('512 B', '11.5 MB')
    """
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def require_space(path: Path | str, needed: int) -> None:
    """Ask before the work whether ``needed`` bytes fit beside ``path``.

    Raises:
        DiskFull: when they do not.
    """
    path = Path(path)
    if shutil.disk_usage(path.parent).free < needed:
        raise DiskFull(path, needed)


def require_folder(path: Path | str) -> None:
    """Ask before the work whether files can be written in a folder, be it there or still to be made.

    Permissions do not say it (read-only and virtual file systems have them too), so a file is made that has no name.

    Raises:
        OSError: they cannot; one line.
    """
    place = Path(path)
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"expected a folder, and {place} is a file")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        why = "" if isinstance(error, FileNotFoundError) else f": {error.strerror}"  # what a virtual one says
        raise PermissionError(f"nothing can be written in {place}{why}") from None


@contextlib.contextmanager
def replacing(path: Path | str, *, needed: int = 0) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path, and renames it to ``path`` when the block ends well.

    The temporary file lies in the folder of ``path`` and has its suffix. When the block raises, it is removed and the
    old file stays.

    Args:
        path: the file to replace or create; its folder exists.
        needed: bytes that will be written, when known; checked before the block starts.

    Raises:
        DiskFull: when the disk has no room, whatever the library that wrote called it.
    """
    path = Path(path)
    temporary = path.with_name(f"{_PREFIX}{os.getpid()}-{path.name}")
    if needed:
        require_space(path, needed)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_UMASK)  # some libraries make files that only their owner may read
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:
        if _is_full(error, path.parent):
            known = max(needed, *(f.stat().st_size if f.exists() else 0 for f in (path, temporary)))
            temporary.unlink(missing_ok=True)
            raise DiskFull(path, known) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path | str, content: bytes | str) -> None:
    """Write bytes, or text as UTF-8, atomically.

    Raises:
        DiskFull: when the disk has no room; the old file stays.
    """
    content = content.encode() if isinstance(content, str) else content
    with replacing(path, needed=len(content)) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def locked(path: Path | str, *, wait: float = 0.0) -> Iterator[None]:
    """One writer of a file at a time. The lock ends with the process, however that ends.

    Args:
        path: what is to be written; the lock is the empty file ``.lock-NAME`` beside it.
        wait: seconds to wait for another writer.

    Raises:
        Busy: when somebody else still holds the lock then.
    """
    path = Path(path)
    with open(path.with_name(f".lock-{path.name}"), "a") as file:
        deadline = time.monotonic() + wait
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Busy(f"another process is writing to {path}: wait for it, or choose another folder") from None
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        yield


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path | str) -> None:
    """Remove what killed processes left behind: temporary files of :func:`replacing` whose process is gone."""
    for file in Path(folder).glob(f"{_PREFIX}*"):
        owner = file.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            file.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # there, signal 0 would end the process
        return pid == os.getpid()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    """Ask the operating system to bring a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_full(error: Exception, folder: Path) -> bool:
    """torch and safetensors raise their own errors on a full disk, some without a reason: look at the disk too."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return "No space left" in str(error) or shutil.disk_usage(folder).free < 1 << 16
