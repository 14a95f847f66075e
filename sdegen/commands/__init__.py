"""The commands, one module each, and what they share."""

from __future__ import annotations

from typing import Any

from sdegen.provenance import provenance
from sdegen.runs import Run
from sdegen.tables import aligned

__all__ = ["aligned", "made_by"]


def made_by(run: Run, **more: Any) -> dict[str, Any]:
    """Attributes of every result of a run: its configuration, and this process."""
    return {"run": run.path.name, "config": run.config, **provenance(), **more}
