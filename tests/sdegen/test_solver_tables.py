"""Solver tables on disk and on paper."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from sdegen import results
from sdegen.paths import VP
from sdegen.solver_plots import heat_map
from sdegen.solver_tables import read_table, write_table
from sdegen.style import svg
from solvers import BrownianMotion, Prediction, replay, trace
from solvers.grids import logsnr

PATH = VP()


@pytest.mark.parametrize("name", ["ddim", "ddim_0.5", "heun", "dpmpp_2m"])
def test_a_table_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    table = trace(name, PATH, logsnr(PATH, 7))
    write_table(tmp_path / "r.h5", f"solvers/{name}", table)
    again = read_table(tmp_path / "r.h5", f"solvers/{name}")
    for key, array in table.arrays().items():
        assert np.array_equal(array, again.arrays()[key], equal_nan=array.dtype.kind == "f"), key
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    noise = [BrownianMotion(x, seed=0), BrownianMotion(x, seed=0)]
    one, two = (
        replay(t, lambda x, t: Prediction(x, x), x, noise=w) for t, w in zip((table, again), noise, strict=True)
    )
    assert torch.equal(one, two)


def test_what_is_no_table_is_said(tmp_path: Path) -> None:
    file = tmp_path / "r.h5"
    results.write(file, "other", results.Result({"time": (("column",), [1.0])}, {"output": 0}))
    with pytest.raises(
        ValueError, match=r"r\.h5 holds no solver table under 'other': a table needs the arrays name, kind"
    ):
        read_table(file, "other")
    with pytest.raises(KeyError):
        read_table(file, "nothing")
    write_table(file, "solvers/ddim", trace("ddim", PATH, logsnr(PATH, 2)))
    assert results.names(file) == ["other", "solvers/ddim"]
    assert results.read(file, "solvers/ddim").attributes["nfe"] == 2


@pytest.mark.parametrize("form", ["x0", "eps"])
@pytest.mark.parametrize("name", ["ddim", "rk4"])
def test_the_heat_map_shows_both_views(name: str, form: str) -> None:
    table = trace(name, PATH, logsnr(PATH, 5))
    figure = heat_map(table, form=form)
    assert isinstance(figure, Figure)
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in panels] == ["what each step adds", "what each state is made of"]
    for axes, values in zip(panels, (table.weights(form), table.states(form)[:, 1 : 1 + table.nfe]), strict=True):
        assert np.array_equal(axes.images[0].get_array(), values)
        assert axes.images[0].get_extent() == [0.5, table.nfe + 0.5, 5.5, 0.5]
    root = ElementTree.fromstring(svg(figure, "map", "weights"))
    assert "DDIM" in "".join(root.itertext()) or name == "rk4"


def test_a_heat_map_can_be_a_part_of_a_figure() -> None:
    whole = Figure((10, 8))
    top, bottom = whole.subfigures(2, 1)
    assert heat_map(trace("ddim", PATH, logsnr(PATH, 3)), on=top) is top
    heat_map(trace("heun", PATH, logsnr(PATH, 3)), on=bottom)
    assert sum(bool(axes.images) for axes in whole.axes) == 4
