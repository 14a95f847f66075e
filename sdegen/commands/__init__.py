"""The commands, one module each, and what they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdegen.files import require_folder
from sdegen.parsing import UsageError
from sdegen.provenance import provenance
from sdegen.runs import Run
from sdegen.tables import aligned

__all__ = ["aligned", "file_to_write", "folder_to_fill", "made_by"]


def made_by(run: Run, **more: Any) -> dict[str, Any]:
    """Attributes of every result of a run: its configuration, and this process."""
    return {"run": run.path.name, "config": run.config, **provenance(), **more}


def file_to_write(option: str, name: str) -> Path:
    """A file that an option names, in a folder that is there; asked before the work whether it can be written.

    Raises:
        UsageError: it cannot.
    """
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{option}: expected a file in a folder that is there, not {path}")
    folder_to_fill(option, path.parent)
    return path


def folder_to_fill(option: str, name: str | Path) -> Path:
    """A folder that an option names, there or still to be made; asked before the work whether it can be written to.

    Raises:
        UsageError: it cannot.
    """
    try:
        require_folder(name)
    except OSError as error:
        raise UsageError(f"{option}: {error}") from None
    return Path(name)
