"""Shared by the tests of pages: tables of cells as ``sdegen compare`` writes them, and a reader of HTML."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdegen.comparison import COLUMNS, SCHEMA
from sdegen.results import Result

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that every element is closed, and collects what a page has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.addresses += [found[name] for name in ("src", "href", "xlink:href") if found.get(name)]
        self.ids += [found["id"]] if "id" in found else []
        if tag in ("svg", "img"):
            self.images.append(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="session")
def parsed() -> Callable[[Path], Page]:
    """Reads a page."""
    return lambda path: Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def sweep() -> Callable[..., Result]:
    """Makes a table of cells: ``sweep([{"solver": "heun", "error": 0.1, ...}, ...], commit="...")``."""

    def made(cells: Sequence[Mapping[str, Any]], **about: Any) -> Result:
        common = {"target": "mixture2d", "path": "own", "grid": "logsnr", "equation": "ODE", "status": "ok"}
        rows = [{**common, "nfe": cell.get("budget", 0), "start_order": cell.get("order", 0), **cell} for cell in cells]
        kinds = {str: object, bool: bool, int: np.int64, float: np.float64}
        arrays = {
            name: (("cell",), np.array([row.get(name, column.empty) for row in rows], kinds[type(column.empty)]))
            for name, column in COLUMNS.items()
        }
        names = list(dict.fromkeys(row["target"] for row in rows))
        settings = {
            "targets": names,
            "samples": 256,
            "cloud": 5000,
            "reference_steps": 512,
            "seeds": [0],
            "device": "cpu",
        }
        targets = json.dumps({name: f"Oracle({name})" for name in names})
        return Result(arrays, {"schema": SCHEMA, "settings": json.dumps(settings), "targets": targets, **about})

    return made
