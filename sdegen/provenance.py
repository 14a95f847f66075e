"""How a file was made: versions, commit, command, time, machine. Every result carries it, so it can be made again."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["commit", "cpus", "now", "provenance", "versions"]

PACKAGES = ("sdegen", "torch", "numpy", "scipy", "h5py", "safetensors", "scikit-learn", "torchdiffeq", "torchsde")


def now() -> str:
    """The present moment in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str | None:
    """The git commit of this source tree, with ``+changes`` when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package may lie inside somebody else's repository
        return None

    def git(*words: str) -> str:
        run = subprocess.run(("git", "-C", root, *words), capture_output=True, text=True, timeout=10, check=True)
        return run.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def cpus() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def provenance() -> dict[str, Any]:
    """Everything about this process that a reader of its results may ask for.

    Returns:
        created (UTC), command, commit (absent outside a checkout), versions, platform and cpus (the cores this process
        may use).
    """
    found: dict[str, Any] = {"created": now(), "command": shlex.join(sys.argv)}
    if (made_by := commit()) is not None:
        found["commit"] = made_by
    return found | {"versions": versions(), "platform": platform.platform(), "cpus": cpus()}
