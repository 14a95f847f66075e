"""Numbers on disk: shards while they are computed, by one process or by several, and whole reports afterwards.

    results.h5                  group likelihood/NAME-HASH: a report, with everything that made it; likewise profile/
    .shards/HASH/0-63.h5        a shard of one that is not whole yet

A process that works at a shard holds a lock on its name, which ends with the process, however that ends. All the rest
follows from whether files are there: no process knows of another.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from sdegen.files import Busy, locked
from sdegen.likelihood.report import LikelihoodReport
from sdegen.likelihood.tables import row
from sdegen.models import LatentVariableModel
from sdegen.results import Result, names, read, write

__all__ = ["GROUP", "Kept", "Progress", "Store", "everything", "fingerprint", "part", "processes"]

Progress = Callable[[float], None]


class Kept(Protocol):
    """What can be kept: a report, a profile."""

    def to_result(self, **more: Any) -> Result: ...


R = TypeVar("R", bound=Kept)

GROUP, SHARD = "likelihood", "shard"
PATIENCE = 0.05  # seconds between looks at shards that others are at


@dataclass(frozen=True)
class Store(Generic[R]):
    """Reports in a folder.

    Args:
        folder: made when it is not there.
        notes: attributes of the results.
        restore: from what ``to_result`` made to the report.
        group: of the file, where they are.
    """

    folder: Path
    notes: Mapping[str, Any]
    restore: Callable[[Result], R]
    group: str = GROUP

    @property
    def file(self) -> Path:
        """Where whole reports are."""
        return self.folder / "results.h5"

    def find(self, key: str) -> R | None:
        """The report that is kept under a key, if there is one."""
        mine = (name for name in names(self.file) if name.startswith(f"{self.group}/") and name.endswith(f"-{key}"))
        group = next(mine, None)
        return None if group is None else self.restore(read(self.file, group))

    def get(
        self,
        key: str,
        title: str,
        shards: Sequence[range],
        compute: Callable[[range, Progress | None], R],
        merge: Callable[[Sequence[R]], R],
        progress: Progress | None = None,
        *,
        again: bool = False,
        **more: Any,
    ) -> tuple[R, bool]:
        """The report under a key: the one that is kept, or the shards that are, and the rest computed.

        Args:
            key: of everything that the number depends on.
            title: for people; the group is called after it.
            shards: examples, a shard at a time.
            compute: ``compute(rows, progress)`` -> report.
            merge: reports of all shards -> report.
            progress: called with the share that is done.
            again: compute what is kept too; it stays until the new one is whole.
            more: attributes of the result.

        Returns:
            The report, and whether it was there.
        """
        if again:
            shutil.rmtree(self._shards(key), ignore_errors=True)
        elif (kept := self.find(key)) is not None:
            return kept, True
        folder = self._shards(key)
        first = int(os.environ.get("RANK", "0")) * len(shards) // processes()  # where the others are not likely to be
        order = [*shards[first:], *shards[:first]]
        while True:
            todo = [rows for rows in order if not _file(folder, rows).exists()]
            if not todo and None not in (parts := [self._read(_file(folder, rows)) for rows in shards]):
                whole = merge([part for part in parts if part is not None])
                self._keep(key, title, whole, **more)
                return whole, False
            if not again and (kept := self.find(key)) is not None:  # another process has put the shards together
                shutil.rmtree(folder, ignore_errors=True)
                return kept, False
            done = len(shards) - len(todo)
            tell = part(progress, done, len(shards))
            if not self._one_of(todo, key, lambda rows, tell=tell: compute(rows, tell), again):
                time.sleep(PATIENCE)  # others are at the rest
            elif progress is not None:
                progress((done + 1) / len(shards))

    def _one_of(self, todo: Sequence[range], key: str, compute: Callable[[range], R], again: bool) -> bool:
        """Compute the first shard that nobody is at, unless the whole is there."""
        for rows in todo:
            file = _file(self._shards(key), rows)
            with _claimed(file) as mine:
                # A file that is not there was never made, or was tidied up after the whole had been kept.
                if mine and not file.exists() and (again or self.find(key) is None):
                    write(file, SHARD, compute(rows).to_result())
                    return True
        return False

    def _read(self, file: Path) -> R | None:
        """The report of a shard; None where somebody has just tidied it up."""
        try:
            return self.restore(read(file, SHARD))
        except FileNotFoundError:
            return None

    def _keep(self, key: str, title: str, report: R, **more: Any) -> None:
        word = re.sub(r"[^\w.]+", "-", title).strip("-")
        write(self.file, f"{self.group}/{word}-{key}", report.to_result(title=title, **more, **self.notes))
        shutil.rmtree(self._shards(key), ignore_errors=True)

    def _shards(self, key: str) -> Path:
        return self.folder / ".shards" / key


def processes() -> int:
    """How many processes were started together, by ``torchrun`` or the like."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def _file(folder: Path, rows: range) -> Path:
    return folder / f"{rows.start}-{rows.stop - 1}.h5"


@contextmanager
def _claimed(file: Path) -> Iterator[bool]:
    """Whether this process, and no other, is at a shard."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(file.with_suffix(".claim")))
            mine = True
        except (Busy, FileNotFoundError):
            mine = False
        yield mine


def part(progress: Progress | None, done: int, of: int) -> Progress | None:
    """Progress within the next of several parts."""
    return None if progress is None else lambda share: progress((done + share) / of)


def everything(folder: Path | str) -> list[dict[str, Any]]:
    """All likelihoods that are kept in a folder, one flat dictionary each, oldest first."""
    found: list[dict[str, Any]] = []
    file = Path(folder) / "results.h5"
    for group in names(file):
        if group.startswith(f"{GROUP}/"):
            kept = read(file, group)
            if "formula" not in kept.attributes:  # of an earlier version, or somebody else's
                continue
            asked = {key: kept.attributes.get(key) for key in ("formula", "split", "created")}
            found.append({**row(kept.attributes["title"], LikelihoodReport.from_result(kept)), **asked})
    return sorted(found, key=lambda line: line["created"] or "")


def fingerprint(*things: Any) -> str:
    """A short hash of models, tensors and settings: equal where every number that follows from them is.

    A model counts with its weights, its levels, and all that its representation says.
    """
    digest = hashlib.sha256()
    for thing in things:
        digest.update(_bytes(thing))
    return digest.hexdigest()[:12]


def _bytes(thing: Any) -> bytes:
    if isinstance(thing, Tensor):
        return f"{tuple(thing.shape)} {thing.dtype}".encode() + thing.detach().cpu().contiguous().numpy().tobytes()
    if isinstance(thing, LatentVariableModel):
        parts = [repr(thing).encode(), *(_bytes(tensor) for _, tensor in sorted(thing.state_dict().items()))]
        if (path := thing.path) is not None:  # a representation may be shorter than what it stands for
            at = thing.levels.nodes(path, 16)
            parts += [_bytes(tensor) for tensor in (at.t, at.weight, path.alpha(at.t), path.sigma(at.t))]
        if (denoiser := getattr(thing, "denoiser", None)) is not None and not isinstance(denoiser, nn.Module):
            parts.append(pickle.dumps(denoiser))  # an oracle
        return b"".join(parts)
    return json.dumps(thing, sort_keys=True, default=repr).encode()
