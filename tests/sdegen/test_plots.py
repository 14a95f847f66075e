"""Figures: drawn without touching matplotlib's globals, whole as SVG, and readable without colour."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from sdegen import plots
from sdegen.plane import Plane, field, planes, raster
from sdegen.plots import Dot, Panel, Series
from sdegen.style import COLORS, MODELS, looks, save, style, svg


def curves(n: int = 9) -> dict[str, Series]:
    nfe = np.array([5.0, 10, 20, 50])
    return {f"solver{i}": Series(nfe, nfe ** -(1 + 0.2 * i), nfe ** -(1.1 + 0.2 * i), nfe**-0.9) for i in range(n)}


FIGURES = {
    "lines": lambda on=None: plots.lines(
        [
            Panel(curves(), "left", "calls", "error", log="xy", ticks=((5, 10, 20, 50), ())),
            Panel(curves(3), "right", log="x", marks={"a": 0.1, "b": 0.01}, floor=(0, 0.01, "floor"), ylim=(0, 1)),
        ],
        on=on,
    ),
    "dots": lambda on=None: plots.dots(
        [Dot("a", 1.0, 0.1, 0.2, MODELS["VAE"], "1.0"), Dot("b", 3.0)], marks={"bar": 2.0}, log=True, on=on
    ),
    "gallery": lambda on=None: plots.gallery({"x": np.zeros((7, 1, 8, 8)), "y": np.ones((6, 8, 8))}, columns=3, on=on),
    "strips": lambda on=None: plots.strips(
        {"10 calls": np.zeros((3, 5, 8, 8)), "50 calls": np.zeros((3, 5, 8, 8))},
        ["exact", "heun", "ddim"],
        columns=list("abcde"),
        notes={"10 calls": ["", "0.1", "0.2"]},
        breaks=[2],
        on=on,
    ),
    "planes": lambda on=None: planes(
        [
            Plane("early", np.random.default_rng(0).random((20, 20)), (np.zeros((4, 2)), np.ones((4, 2)))),
            Plane(
                "late",
                points=np.zeros((5, 2)),
                twins=np.zeros((10, 1, 2)),
                paths=np.random.default_rng(1).normal(size=(10, 3, 2)),
                steps={"euler": np.ones((4, 2, 2)), "heun": np.zeros((3, 2, 2))},
                note="below",
            ),
        ],
        on=on,
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_in_the_style_and_leaves_no_trace(name):
    before = dict(mpl.rcParams)
    figure = FIGURES[name]()
    text = svg(figure, name, "what it shows")
    assert dict(mpl.rcParams) == before
    root = ElementTree.fromstring(text)
    assert root.get("aria-label") == "what it shows"
    assert "pyplot" not in str(type(figure.canvas))


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_the_same_every_time_and_fetches_nothing(name):
    one, two = (svg(FIGURES[name](), name) for _ in range(2))
    assert one == two
    assert not re.findall(r'(?:href|src)="(?!#|data:)', one)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_can_be_part_of_another(name):
    with style():
        figure = Figure((8, 4), layout="constrained")
        left, right = figure.subfigures(1, 2)
    assert FIGURES[name](left) is left
    assert len(left.axes) > 0
    assert len(right.axes) == 0


def test_identifiers_do_not_collide_and_none_dangles():
    texts = [svg(FIGURES["lines"](), name) for name in ("first", "second")]
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in texts]
    assert not ids[0] & ids[1]
    for text, known in zip(texts, ids, strict=True):
        used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
        assert used <= known


def test_alternative_text_is_escaped():
    text = svg(FIGURES["dots"](), "x", 'a < b & "c"')
    assert ElementTree.fromstring(text).get("aria-label") == 'a < b & "c"'


def test_text_stays_text():
    assert "solver3" in svg(FIGURES["lines"](), "x")


def test_a_plane_is_drawn_where_its_numbers_say():
    """Rows of a raster are read from the bottom, and an arrow stands where its field was asked."""
    figure = planes([Plane(density=raster(lambda z: z[:, 1].exp(), reach=1.0, size=5))], reach=1.0)
    shades = figure.axes[0].images[0]
    assert shades.origin == "lower"
    assert np.all(np.diff(shades.get_array()[:, 0]) > 0)
    at, vectors = field(lambda z: 2 * z, reach=1.0, size=3)
    assert np.array_equal(vectors, 2 * at)


def test_looks_differ_without_colour():
    """A greyscale printer leaves marker and dash: no two of nine solvers share both."""
    chosen = looks([str(i) for i in range(9)]).values()
    assert len({(look.marker, str(look.dash)) for look in chosen}) == 9


def test_colours_of_the_models_differ_in_lightness():
    def lightness(color: str) -> float:
        r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    values = sorted(lightness(MODELS[name].color) for name in ("VAE", "DDPM", "VP-SDE"))
    assert min(np.diff(values)) > 20
    assert all(lightness(color) < 160 for color in COLORS.values())  # readable on white


def test_names_at_the_ends_do_not_cover_each_other():
    same = {f"s{i}": Series([1.0, 2.0], [1.0, 1.0]) for i in range(6)}
    figure = plots.lines([Panel(same)])
    places = sorted(text.get_position()[1] for text in figure.axes[0].texts)
    assert min(np.diff(places)) > 0.05
    assert places[0] >= 0
    assert places[-1] <= 1.001


def test_a_curve_with_gaps_is_named_at_its_last_point():
    figure = plots.lines([Panel({"s": Series([1.0, 2.0, 3.0], [1.0, 2.0, np.nan])})])
    assert tuple(figure.axes[0].texts[0].xy) == (2.0, 2.0)


def test_mosaic_places_images_row_by_row():
    tiles = np.arange(3.0)[:, None, None] * np.ones((3, 2, 2))
    out = plots.mosaic(tiles, columns=2, gap=1, zoom=1)
    np.testing.assert_array_equal(out[:2, :2], 0)
    np.testing.assert_array_equal(out[:2, 3:], 1)
    np.testing.assert_array_equal(out[3:, :2], 2)
    assert np.isnan(out[2]).all()
    assert np.isnan(out[3:, 3:]).all()


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_save_makes_folders_and_knows_the_kind_by_its_suffix(tmp_path, suffix, magic):
    path = save(FIGURES["dots"](), tmp_path / "new" / f"x{suffix}")
    assert path.read_bytes().startswith(magic)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
