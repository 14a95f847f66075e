"""How figures look, and how they get out of Python: one style, entered as a context, and SVG or PNG.

Neither pyplot nor matplotlib's global settings are touched. Curves differ in colour *and* marker *and* dash, so that
they survive a greyscale printer; a model has the same look in every figure.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib as mpl
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure

from sdegen.files import replacing

__all__ = [
    "CLOUD",
    "COLORS",
    "FAINT",
    "GREY",
    "INK",
    "MODELS",
    "PIXELS",
    "STYLE",
    "SUPERSCRIPT",
    "Canvas",
    "Look",
    "curve_id",
    "looks",
    "notebook",
    "save",
    "style",
    "styled",
    "svg",
]

Canvas = Figure | SubFigure

INK, GREY, FAINT, PAPER = "#1d1d1f", "#74747a", "#d9d7d0", "#f5f3ec"
COLORS = {
    "indigo": "#27348b",
    "rust": "#b5451f",
    "teal": "#2a8573",
    "plum": "#8a2a6d",
    "ochre": "#c48a14",
    "steel": "#5b8fc4",
    "olive": "#5f6b23",
    "ink": "#2b2b2e",
    "rose": "#cf6f88",
    "sea": "#1f6f8b",
}
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.6, 1.2, 1.6)))

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.labelcolor": GREY,
    "axes.edgecolor": "#a9a9ad",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.ymargin": 0.09,
    "axes.grid": True,
    "grid.color": "#e9e7e1",
    "grid.linewidth": 0.6,
    "xtick.color": "#a9a9ad",
    "ytick.color": "#a9a9ad",
    "xtick.labelcolor": GREY,
    "ytick.labelcolor": GREY,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be searched
    "svg.hashsalt": "sdegen",
}


def style() -> AbstractContextManager[None]:
    """The style as a context, for figures that are put together by hand."""
    return mpl.rc_context(STYLE)


styled = mpl.rc_context(STYLE)
"""A decorator: the function runs in the style."""

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
PIXELS = LinearSegmentedColormap.from_list("ink", [PAPER, "#b9b7b3", INK]).with_extremes(bad=(0, 0, 0, 0))
CLOUD = LinearSegmentedColormap.from_list("cloud", ["#ffffff", "#dfe3ee", "#a9b3d4", "#6c79b4"])


class Look(NamedTuple):
    """How one curve looks everywhere."""

    color: str
    marker: str
    dash: Any


MODELS = {
    "VAE": Look(COLORS["ochre"], "s", "-"),
    "DDPM": Look(COLORS["teal"], "D", "-"),
    "VP-SDE": Look(COLORS["indigo"], "o", "-"),
    "ODE": Look(COLORS["plum"], "^", "-"),
}
"""The models of the project, always the same: VAE, discrete DDPM, VP-SDE and its probability-flow ODE."""


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each name, by position: 10 colours, 9 markers and 4 dashes that cycle at different speeds.

    >>> len({(look.color, look.marker) for look in looks([str(i) for i in range(40)]).values()})
    40
    """
    colors = list(COLORS.values())
    return {
        name: Look(colors[i % len(colors)], _MARKERS[i % len(_MARKERS)], _DASHES[i % len(_DASHES)])
        for i, name in enumerate(names)
    }


_CURVE = re.compile(r'<g id="curve-\d+-([^"]*)">')


def curve_id(name: str, panel: int = 0) -> str:
    """What a curve is called in an SVG file (matplotlib's ``gid``); :func:`svg` makes a tooltip of it."""
    return f"curve-{panel}-{name}"


def svg(figure: Canvas, name: str, alt: str = "") -> str:
    """A figure as an SVG element to put into a page: text as text, no identifiers that collide with another figure's.

    A curve with a :func:`curve_id` becomes a group of class "curve" with its name as title, which browsers show where
    the mouse rests on it.

    Args:
        figure: what to draw.
        name: unique on the page; it prefixes every identifier.
        alt: what a reader who cannot see the picture should know.
    """
    stream = io.StringIO()
    with style():
        cast(Figure, figure).savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = _CURVE.sub(r'<g class="curve"><title>\1</title>', text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def notebook(dpi: int = 180) -> None:
    """Let Jupyter show a figure that is the value of a cell, in this style; without Jupyter nothing happens."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None:
        shell.display_formatter.formatters["image/png"].for_type(Figure, lambda figure: _png(figure, dpi))


@styled
def _png(figure: Figure, dpi: int) -> tuple[bytes, dict[str, int]]:
    """A picture of many pixels and the width at which a page shows it, so that it is sharp on every screen."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue(), {"width": round(88 * figure.get_figwidth())}


@styled
def save(figure: Canvas, path: Path | str, *, dpi: int = 200) -> Path:
    """Write a figure to a file; the suffix says which kind (.png, .svg, .pdf)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        cast(Figure, figure).savefig(temporary, dpi=dpi, format=path.suffix.removeprefix("."))
    return path
