"""A run is a folder that says how it was made and whether it is still whole.

    config.toml        what was asked for; ``sdegen train --config`` takes it again
    manifest.json      versions, commit, command, seed, device, data, and size and SHA-256 of the other files
    model.safetensors  the averaged (EMA) weights: what sampling and likelihoods use
    state.pt           everything that training needs to go on, bit for bit
    metrics.csv        loss and held-out bound by step (a log: it grows, and has no checksum)
    results.h5         results of ``sdegen sample`` and ``sdegen likelihood``, and beside it their pictures and tables

Files are replaced atomically, and the manifest never lies about them, even when the process dies between the two
writes: it names the new checksum *before* the file is renamed, and beside it the one it replaces.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdegen.files import DamagedFile, locked, readable_size, replacing, require_folder, sha256, sweep, write_bytes
from sdegen.provenance import now, provenance

if TYPE_CHECKING:
    from sdegen.data import Dataset

__all__ = ["SCHEMA", "Run", "describe"]

SCHEMA = 1
"""Version of the folder's layout; another one is refused."""

CONFIG, MANIFEST, METRICS, RESULTS = "config.toml", "manifest.json", "metrics.csv", "results.h5"
STATE, WEIGHTS = "state.pt", "model.safetensors"


@dataclass(frozen=True)
class Run:
    """A run folder. Make one with :meth:`create`, find one with :meth:`open`.

    Args:
        path: the folder.
    """

    path: Path

    @classmethod
    def create(cls, path: Path | str, config: str, *, overwrite: bool = False, **notes: Any) -> Run:
        """Make a new run folder; it appears whole or not at all.

        Args:
            path: the folder to make; it must not exist, or be empty, unless ``overwrite``.
            config: content of config.toml.
            overwrite: replace a run that is there; a folder that is no run is never touched.
            **notes: more for the manifest (seed, device, threads, data, ...).

        Raises:
            FileExistsError: something is there already.
        """
        path = Path(path)
        cls.check_free(path, overwrite=overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        new, old = (path.with_name(f".tmp-{os.getpid()}-{word}-{path.name}") for word in ("new", "old"))
        try:
            new.mkdir()
            write_bytes(new / CONFIG, config)
            manifest = {"schema": SCHEMA} | provenance() | notes | {"files": {CONFIG: _facts(new / CONFIG)}}
            write_bytes(new / MANIFEST, _json(manifest))
            if path.exists():
                with cls(path).exclusive():
                    os.replace(path, old)
            os.replace(new, path)
        finally:
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)
        return cls(path)

    @staticmethod
    def check_free(path: Path | str, *, overwrite: bool = False) -> None:
        """Ask before the work whether :meth:`create` will be allowed to make a folder.

        Raises:
            FileExistsError: something is there already.
            OSError: nothing can be written there.
        """
        path = Path(path)
        require_folder(path.parent)
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        if not (path / MANIFEST).exists():
            raise FileExistsError(f"{path} exists and is not a run: choose another folder")
        if not overwrite:
            raise FileExistsError(f"{path} holds a run already: --resume {path} continues it, --overwrite replaces it")

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Find an existing run.

        Raises:
            FileNotFoundError: no such folder, or it holds no run.
            ValueError: written by another version of the layout.
            DamagedFile: its manifest is truncated or altered.
        """
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"there is no folder {path}")
        if not (path / MANIFEST).exists():
            raise FileNotFoundError(f"{path} is not a run folder: it has no {MANIFEST}")
        run = cls(path)
        found = run.manifest.get("schema")
        if found != SCHEMA:
            raise ValueError(f"{path} is a run of another version: its schema is {found}, this program reads {SCHEMA}")
        return run

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of manifest.json, read anew."""
        try:
            manifest = json.loads((self / MANIFEST).read_text(encoding="utf-8"))
            return {**manifest, "files": dict(manifest.get("files", {}))}
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedFile(f"{self / MANIFEST} is truncated or damaged: {error}") from None

    @property
    def config(self) -> str:
        """Content of config.toml, verified."""
        return self.verified(CONFIG).read_text(encoding="utf-8")

    def note(self, **notes: Any) -> None:
        """Add to the manifest, or change it."""
        with locked(self / MANIFEST, wait=60):
            write_bytes(self / MANIFEST, _json(self.manifest | notes | {"updated": now()}))

    @contextmanager
    def writing(self, name: str, *, needed: int = 0) -> Iterator[Path]:
        """Replace a file of the run atomically, and its size and checksum in the manifest with it.

        Args:
            name: the file's name.
            needed: bytes that will be written, when known: a full disk is then noticed before the work.

        Yields:
            A temporary path to write to.

        Raises:
            DiskFull: the old file is kept.
        """
        with locked(self / MANIFEST, wait=60), replacing(self / name, needed=needed) as temporary:
            yield temporary
            manifest = self.manifest
            facts, before = _facts(temporary), manifest["files"].get(name, {}).get("sha256")
            manifest["files"][name] = facts | ({"replaced": before} if before else {})
            write_bytes(self / MANIFEST, _json(manifest | {"updated": now()}))

    def verified(self, name: str) -> Path:
        """Path of a file of the run, after its checksum.

        Raises:
            FileNotFoundError: it is not there.
            DamagedFile: it is not the file that was written.
        """
        path = self / name
        if not path.exists():
            raise FileNotFoundError(f"{self.path} has no {name}")
        known, found = self.manifest["files"].get(name), _facts(path)
        if known is not None and found["sha256"] not in (known["sha256"], known.get("replaced")):
            sizes = f"{readable_size(found['bytes'])} instead of {readable_size(known['bytes'])}, "
            sums = f"SHA-256 {found['sha256'][:12]} instead of {known['sha256'][:12]}"
            raise DamagedFile(f"{path} is damaged: {sizes if found['bytes'] != known['bytes'] else ''}{sums}")
        return path

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be the only process that trains in this folder; first tidy up after one that was killed.

        Raises:
            Busy: another one is at work.
        """
        with locked(self / "training"):
            sweep(self.path)
            yield


def describe(data: Dataset) -> dict[str, Any]:
    """What a manifest says about data: enough to recognise them, and to rebuild a model without them."""
    digest = hashlib.sha256()
    for part in (data.train, data.test):
        digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return {
        "name": data.name,
        "source": data.source,
        "description": data.describe(),
        "event_shape": list(data.event_shape),
        "levels": None if data.bins is None else data.bins.count,
        "classes": data.classes,
        "scale": data.scale,
        "shift": data.shift,
        "sha256": digest.hexdigest(),
    }


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
