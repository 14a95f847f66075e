"""Measured cells on the disk: one line each, written when the cell is done, found again by what was measured.

Every process appends to a file of its own, so that any number of them, on any machines that see the folder, can share a
sweep without waiting for each other. A line is a checksum and a JSON object; the disk has it before the next cell is
begun. What a killed process left of a line has no right checksum, and its cell is measured again: nothing else can be
lost.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from sdegen.comparison.code import maker
from sdegen.comparison.table import SCHEMA
from sdegen.files import FULL, DiskFull

__all__ = ["Journal"]


class Journal:
    """The cells of a folder that are done.

    Args:
        folder: where the files are; made when the first cell is written.
        codes: marks of the present code (:mod:`sdegen.comparison.code`).

    Attributes:
        rows: key of a cell -> mark of the code that measured it -> what was measured.
        makers: mark of code -> in words.
        damaged: lines that were not what was written.
    """

    def __init__(self, folder: Path, codes: Collection[str] = ()) -> None:
        self.folder, self.codes = folder, codes
        self.rows: dict[str, dict[str, dict[str, Any]]] = {}
        self.makers: dict[str, str] = {}
        self.damaged = 0
        self._read: dict[Path, int] = {}  # how far each file has been read
        self._own: Path | None = None

    def row(self, key: str) -> dict[str, Any] | None:
        """What was measured of a cell: by the present code where it was, else by any."""
        found = self.rows.get(key, {})
        return next((row for code, row in found.items() if code in self.codes), next(iter(found.values()), None))

    def fresh(self, key: str) -> bool:
        """Whether the present code has measured a cell."""
        return any(code in self.codes for code in self.rows.get(key, {}))

    def refresh(self) -> None:
        """Read what other processes have written since.

        Raises:
            ValueError: the cells were written by another version.
        """
        for file in sorted(self.folder.glob("*.jsonl")):
            begin = self._read.get(file, 0)
            if file.stat().st_size <= begin:
                continue
            with open(file, "rb") as stream:
                stream.seek(begin)
                lines = stream.read()
            whole = lines.rfind(b"\n") + 1  # the last line may not be finished
            self._read[file] = begin + whole
            for line in lines[:whole].splitlines():
                self._take(file, line)

    def _take(self, file: Path, line: bytes) -> None:
        checksum, _, content = line.partition(b" ")
        if checksum.decode("ascii", "replace") != _checksum(content):
            self.damaged += 1
            return
        found = json.loads(content)
        if found["schema"] != SCHEMA:
            raise ValueError(
                f"{file} was written by another version: its schema is {found['schema']}, this program reads {SCHEMA}"
            )
        self._keep(found["key"], _unpacked(found["row"]), found["maker"])

    def _keep(self, key: str, row: dict[str, Any], maker: str) -> None:
        code = row.get("code", "")
        self.makers.setdefault(code, maker)
        self.rows.setdefault(key, {}).setdefault(code, row)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Write a cell, and be sure that the disk has it.

        Raises:
            DiskFull: it has no room.
        """
        if self._own is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._own = self.folder / f"{platform.node() or 'here'}-{os.getpid()}-{time.time_ns():x}.jsonl"
        content = json.dumps({"schema": SCHEMA, "key": key, "maker": maker(), "row": _packed(row)}).encode()
        line = _checksum(content).encode() + b" " + content + b"\n"
        try:
            with open(self._own, "ab") as stream:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            if error.errno in FULL:
                raise DiskFull(self._own, len(line)) from error
            raise
        self._keep(key, row, maker())


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _packed(row: dict[str, Any]) -> dict[str, Any]:
    """Floats as Python writes them come back bit for bit; arrays are bytes in base64."""
    return {
        key: {"shape": value.shape, "float32": base64.b64encode(value.astype("<f4").tobytes()).decode()}
        if isinstance(value, np.ndarray)
        else value
        for key, value in row.items()
    }


def _unpacked(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: np.frombuffer(base64.b64decode(value["float32"]), "<f4").reshape(value["shape"])
        if isinstance(value, dict)
        else value
        for key, value in row.items()
    }
