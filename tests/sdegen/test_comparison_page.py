"""``sdegen report``: one page with the answer on top, drawn from results files alone, whatever is in them."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest

from sdegen import comparison_figures, comparison_page, results
from sdegen.cli import main
from sdegen.results import Result
from sdegen.style import looks, svg
from sdegen.sweeps import gather, merge, source
from solvers import SOLVERS

ERRORS = {"heun": 0.2, "rk4": 0.05, "ddim": 0.5, "dpmpp_2m": 0.1, "ancestral": 0.8, "euler_a": 0.9}
NOISY = ("ancestral", "euler_a")


def cells(target: str = "mixture2d", **more):
    """Six solvers and three budgets; errors fall with the budget's square, distances to a floor."""
    found = []
    for name, error in ERRORS.items():
        for i, budget in enumerate((5, 10, 20)):
            value = error * 4.0**-i
            found.append({
                "solver": name, "target": target, "stochastic": name in NOISY, "order": 1 if name == "ddim" else 2,
                "equation": "SDE" if name in NOISY else "ODE", "budget": budget, "error": value,
                "error_low": value / 1.2, "error_high": value * 1.2, "sliced_w2": 0.02 + value,
                "sliced_w2_floor": 0.02, "sliced_w2_floor_high": 0.03, "seconds": 0.01 * budget, "overhead_us": 50.0,
                **more,
            })  # fmt: skip
    found.append(
        {
            **found[0],
            "solver": "dopri5",
            "order": 0,
            "budget": 0,
            "tol": 1e-3,
            "nfe": 14,
            "error": 0.001,
            "sliced_w2": 0.021,
        }
    )
    return found


@pytest.fixture(scope="module")
def file(sweep, tmp_path_factory):
    """A sweep with everything: orders, endpoints in the plane, a solver of somebody's own, and a failure."""
    folder = tmp_path_factory.mktemp("sweep")
    own = {"solver": "mine.code:Leap<frog>", "budget": 10, "error": 0.07, "error_low": 0.06, "error_high": 0.08}
    failed = {"solver": "euler", "order": 1, "budget": 10, "status": "FloatingPointError: the state is not finite"}
    provenance = {
        "commit": "0123456789abcdef",
        "created": "2026-03-01T09:05:00+00:00",
        "command": "/x/sdegen compare m",
    }
    versions = json.dumps({"sdegen": "0.1.0", "torch": "2.9.0"})
    rows = [*cells(), own, failed]
    results.write(folder / "results.h5", "comparison", sweep(rows, versions=versions, **provenance))
    order = {"target": "mixture2d", "path": "own", "grid": "logsnr", "solver": "heun", "stochastic": False}
    order |= {"order": 2.0, "start_order": 2.0, "measured": 1.1, "measured_low": 1.0, "measured_high": 1.2}
    results.write(folder / "results.h5", "orders", Result({name: (("row",), [v]) for name, v in order.items()}, {}))
    x = np.random.default_rng(0).normal(size=(2, 9, 2))
    arrays = {"cell": (("cell",), [1, 4]), "x": (("cell", "noise", "coordinate"), x)}
    arrays |= {"equation": (("equation",), ["ODE"]), "exact": (("equation", "noise", "coordinate"), x[:1])}
    results.write(folder / "results.h5", "samples/0", Result(arrays, {"target": "mixture2d"}))
    return folder / "results.h5"


@pytest.fixture(scope="module")
def page(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["report", str(file), "--out", str(out)]) == 0
    return out


def words(page) -> str:
    return " ".join("".join(page.text).split())


def test_the_answer_for_ten_calls_comes_first(page, parsed):
    glance = words(parsed(page)).partition("And for other budgets?")[0]
    assert "Which solver for 10 network calls?" in glance
    assert "Without noise, rk4. It ends 0.013 from the exact solution, before dpmpp_2m." in glance
    assert "With noise, ancestral, 0.20 from the exact path, tied with euler_a." in glance
    assert "only rk4 cannot be told from the truth" not in glance  # 0.033 is above the floor of 0.03
    assert "In distribution, rk4, 0.033 from exact samples" in glance


def test_within_the_floor_the_fewest_calls_count(sweep, tmp_path, parsed):
    good = {("heun", 5), ("heun", 10), ("rk4", 10), ("dopri5", 0)}
    rows = [{**c, "sliced_w2": 0.025 if (c["solver"], c["budget"]) in good else 0.5} for c in cells()]
    results.write(tmp_path / "results.h5", "comparison", sweep(rows))
    assert main(["report", str(tmp_path)]) == 0
    glance = words(parsed(tmp_path / "report.html")).partition("And for other budgets?")[0]
    assert "2 solvers cannot be told from the truth; heun needs the fewest calls for that, 5." in glance


def test_the_page_is_one_file_and_whole(page, parsed):
    found = parsed(page)
    assert [a for a in found.addresses if not a.startswith(("#", "data:"))] == []
    assert {a[1:] for a in found.addresses if a.startswith("#")} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert not re.search(r"url\((?!#|['\"]?data:)|@import|\bfetch\(|XMLHttp|import\(", found.source)
    assert found.images
    assert all(image.get("aria-label") for image in found.images)
    assert found.source.count("<th ") == found.source.count('scope="')


def test_nothing_needs_the_script(page, parsed):
    """All rows are in the page, in order, and what only a script can do is hidden until there is one."""
    found = parsed(page)
    body = found.source[found.source.index('class="sortable"') :]
    body = body[: body.index("</table>")]
    assert body.count("<tr") - 1 == len(cells()) + 2
    assert re.search(r'<p id="filter" hidden>', found.source)
    assert "One file, nothing fetched; its script only sorts and filters" in words(found)
    assert found.source.index("<script>") > found.source.index("</footer>")


def test_names_from_outside_are_escaped(page):
    text = page.read_text(encoding="utf-8")
    assert "Leap<frog>" not in text
    assert "Leap&lt;frog&gt;" in text


def test_every_curve_says_its_name(page):
    text = page.read_text(encoding="utf-8")
    titles = set(re.findall(r'<g class="curve">\s*<title>([^<]*)</title>', text))
    assert {*ERRORS, "dopri5"} <= titles


def test_how_it_was_measured(page, parsed):
    text = words(parsed(page))
    said = ("Oracle(mixture2d)", "256 noises", "5000 endpoints", "0123456789ab", "2.9.0", "1 March 2026, 09:05 UTC",
            "sdegen compare", "cells failed: 1 (euler)", "FloatingPointError: the state is not finite")  # fmt: skip
    assert [words for words in said if words not in text] == []


def test_the_page_is_the_same_every_time(page, file, tmp_path):
    again = tmp_path / "page.html"
    assert main(["report", str(file), "--out", str(again)]) == 0
    assert again.read_bytes() == page.read_bytes()


def test_several_files(file, sweep, tmp_path, parsed):
    results.write(tmp_path / "results.h5", "comparison", sweep(cells("ring")[:6], commit="fedcba9876543210"))
    assert main(["report", str(file), str(tmp_path), "--out", f"{tmp_path}/both.html"]) == 0
    text = words(parsed(tmp_path / "both.html"))
    assert "come from different commits: 0123456789ab" in text
    assert re.search(r"mixture2d ?rk4 .*ring ?rk4", text)  # the table of problems


def test_figures_are_files_too(sweep, tmp_path, capsys):
    results.write(tmp_path / "results.h5", "comparison", sweep([{**c, "sliced_w2": math.nan} for c in cells()[:3]]))
    assert main(["report", str(tmp_path), "--figures", f"{tmp_path}/f"]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/report.html"
    drawn = {path.name for path in (tmp_path / "f").iterdir()}
    names = ("ranking", "calls", "seconds", "shades", "families")  # no orders, and nothing to look at
    assert drawn == {f"p1{name}.{kind}" for name in names for kind in ("svg", "png")}
    ElementTree.parse(tmp_path / "f" / "p1calls.svg")


def test_a_cloud_without_distances_or_noise_or_budgets(sweep, tmp_path, parsed):
    """What was not measured is left out, and nothing else."""
    plain = {"sliced_w2": math.nan, "sliced_w2_floor": math.nan, "sliced_w2_floor_high": math.nan}
    kinds = {
        "no-distance": [{**c, **plain} for c in cells()],
        "no-noise": [c for c in cells() if not c.get("stochastic")],
        "only-tolerances": [{**cells()[-1], "tol": 10.0**-k, "nfe": 10 * k} for k in (1, 2, 3)],
        "nothing-worked": [{"solver": "heun", "budget": 10, "status": "ValueError: no"}],
    }
    for name, rows in kinds.items():
        (tmp_path / name).mkdir()
        results.write(tmp_path / name / "results.h5", "comparison", sweep(rows))
        assert main(["report", str(tmp_path / name)]) == 0, name
        text = words(parsed(tmp_path / name / "report.html"))
        assert ("In distribution" in text) == (name in ("no-noise", "only-tolerances"))
        assert ("With noise" in text) == (name == "no-distance")


def test_a_hundred_solvers_have_a_handful_of_names(sweep):
    """No legend with a hundred names, whatever their number."""
    rng = np.random.default_rng(0)
    rows = [
        {"solver": name, "stochastic": solver.stochastic, "order": solver.order, "budget": budget,
         "error": float(e := rng.uniform(0.1, 1) / budget), "error_low": e / 2, "error_high": 2 * e, "seconds": 0.1}
        for name, solver in SOLVERS.items() for budget in (5, 10, 20)
    ]  # fmt: skip
    (problem,) = merge([source(sweep(rows))]).problems
    figure = comparison_figures.costs(problem, "nfe", 10, looks(problem.labels))
    for axes in figure.axes:
        assert 2 <= sum(text.get_text() in SOLVERS for text in axes.texts) <= 6
        assert len(axes.lines) > 30
    table = svg(comparison_figures.shades(problem), "s")
    assert all(f">{name}<" in table for name in SOLVERS)


def test_shades_survive_a_greyscale_printer():
    """The lightness falls evenly along the colours."""
    rgb = comparison_figures.SHADES(np.linspace(0, 1, 21))[:, :3]
    lightness = rgb @ [0.2126, 0.7152, 0.0722]
    steps = np.diff(lightness)
    assert (steps > 0).all()
    assert steps.max() < 3 * steps.min()


def test_bad_input_is_one_line_and_nothing_is_written(file, sweep, tmp_path, capsys):
    def refused(*given: str) -> str:
        assert main(["report", *given]) == 2
        out = capsys.readouterr()
        assert out.out == ""
        assert len(out.err.strip().splitlines()) == 1
        return out.err

    assert "results" in refused()
    assert "no results file" in refused(str(tmp_path / "none.h5"))
    (tmp_path / "empty").mkdir()
    assert "has no results.h5" in refused(str(tmp_path / "empty"))
    broken = tmp_path / "broken.h5"
    broken.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "truncated or damaged" in refused(str(broken))
    assert "truncated or damaged" in refused(str(file), str(broken))
    nothing = tmp_path / "nothing.h5"
    nothing.write_bytes(b"")
    assert "nothing.h5 is truncated or damaged: it is empty" in refused(str(nothing))
    for name, content in {"results.csv": "target,path\n", "notes.h5": "text", "page.htm": "<html>"}.items():
        (tmp_path / name).write_text(content)
        assert f"{name} is no HDF5 file: give a results.h5" in refused(str(tmp_path / name))
        assert "no HDF5 file" in refused(str(file), str(tmp_path / name))
    with h5py.File(tmp_path / "foreign.h5", "w") as foreign:
        foreign["x"] = [1.0, 2.0]
    assert "foreign.h5 has no comparison: `sdegen compare` makes one" in refused(str(tmp_path / "foreign.h5"))
    (tmp_path / "sweep" / "journal").mkdir(parents=True)
    (tmp_path / "sweep" / "results.h5").write_bytes(broken.read_bytes())
    assert f"its cells are safe in {tmp_path}/sweep/journal: the sweep's command" in refused(f"{tmp_path}/sweep")
    older = tmp_path / "older.h5"
    results.write(older, "comparison", sweep(cells(), schema=99, commit="0123456789abcdef"))
    assert "another version (commit 0123456789ab): its schema is 99" in refused(str(older))
    assert "older.h5 was written by another version" in refused(str(file), str(older))
    other = tmp_path / "other.h5"
    results.write(other, "likelihood/bound", Result({"nats": (("example",), [1.0])}, {}))
    assert "has no comparison, only likelihood: `sdegen compare` makes one" in refused(str(other))
    assert "out: expected a file" in refused(str(file), "--out", str(tmp_path))
    assert "out: expected a file" in refused(str(file), "--out", str(tmp_path / "no" / "page.html"))
    assert "figures: expected a folder" in refused(str(file), "--figures", str(broken))
    assert not list(tmp_path.glob("**/*.html"))


def test_an_unfinished_sweep_is_reported_as_far_as_it_is(sweep, tmp_path):
    """A budget that a solver has not reached yet leaves a gap, not an error."""
    results.write(tmp_path / "results.h5", "comparison", sweep([{**c, "sliced_w2": math.nan} for c in cells()[:7]]))
    (problem,) = gather([tmp_path / "results.h5"]).problems
    assert problem.at("ddim", 10) is None
    assert main(["report", str(tmp_path)]) == 0


def test_what_else_is_known_of_a_model_goes_with_it(sweep, tmp_path, parsed):
    """Likelihoods of a run stand beside the sweep of its solvers."""
    import torch

    from sdegen.likelihood import LikelihoodReport

    common = dict.fromkeys(("solver_error", "logsnr", "dequantizer", "bin_width", "solver", "tolerance"))
    known = LikelihoodReport(
        method="variational bound", kind="upper bound", of="probability", values=torch.tensor([3.0, 5.0]).double(),
        parts={}, estimator_se=0.25, data_se=1.0, dims=2, bits_offset=0.0, forward=32.0, vjp=0.0, jvp=0.0,
        seconds=1.0, seed=0, settings={}, **common,
    )  # fmt: skip
    run, folder = tmp_path / "run", tmp_path / "sweep"
    run.mkdir()
    folder.mkdir()
    results.write(run / "results.h5", "likelihood/VP-SDE-0", known.to_result(title="VP-SDE", formula=""))
    results.write(folder / "results.h5", "comparison", sweep([{**c, "sliced_w2": math.nan} for c in cells()[:3]]))
    assert main(["report", str(folder), str(run)]) == 0
    text = words(parsed(folder / "report.html"))
    assert "VP-SDEvariational bound, upper bound≤ 4.000" in text  # cells have no spaces between them


def test_a_solver_that_never_worked_is_in_the_table_and_in_nobodys_way(sweep, tmp_path, parsed):
    """One of somebody's own, alone in its family."""
    mine = [{"solver": "mine.py", "order": 1, "budget": b, "status": "FloatingPointError: no number"} for b in (5, 10)]
    results.write(tmp_path / "results.h5", "comparison", sweep([*cells(), *mine]))
    assert main(["report", str(tmp_path)]) == 0
    text = words(parsed(tmp_path / "report.html"))
    assert "cells failed: 2 (mine)" in text
    assert "FloatingPointError: no number" in text


def test_no_two_solvers_look_alike_in_one_picture(sweep):
    """Whatever their number, and the same one alike in all of them."""
    rng = np.random.default_rng(1)
    rows = [
        {"solver": name, "stochastic": solver.stochastic, "order": solver.order, "budget": budget,
         "error": float(e := rng.uniform(0.1, 1) / budget), "error_low": e / 2, "error_high": 2 * e, "seconds": 0.1,
         "sliced_w2": e + 0.1}
        for name, solver in SOLVERS.items() for budget in (5, 10, 20)
    ]  # fmt: skip
    (problem,) = merge([source(sweep(rows))]).problems
    groups = comparison_figures.together(problem, 10)
    look = comparison_page._looks(groups)
    for group in groups:
        assert len({look[name].color for name in group}) == len(group)
    drawn = comparison_figures.families(problem, look).figure.axes
    drawn += comparison_figures.costs(problem, "nfe", 10, look).axes
    for axes in drawn:
        named = {text.get_text(): text.get_color() for text in axes.texts if text.get_text() in look}
        assert named
        assert len(set(named.values())) == len(named)
        assert all(look[name].color == color for name, color in named.items())


def test_a_cold_start_has_a_slope_of_its_own(sweep, tmp_path, parsed):
    rows = [{**c, "order": 3, "start_order": 2} if c["solver"] == "heun" else c for c in cells()]
    results.write(tmp_path / "results.h5", "comparison", sweep(rows))
    order = {"target": "mixture2d", "path": "own", "grid": "logsnr", "solver": "heun", "stochastic": False}
    order |= {"order": 3.0, "start_order": 2.0, "measured": 2.1, "measured_low": 2.0, "measured_high": 2.2}
    results.write(tmp_path / "results.h5", "orders", Result({name: (("row",), [v]) for name, v in order.items()}, {}))
    (problem,) = gather([tmp_path / "results.h5"]).problems
    assert not problem.orders[0].short  # below 3, and not below what it declares of a cold start
    third = comparison_figures.orders(problem, looks(problem.labels)).figure.subfigs[2].axes[0]
    assert third.get_title(loc="left") == "ODE solvers of order 3"
    lines = {line.get_gid().rpartition("-")[2]: line for line in third.lines if line.get_gid()}
    for name, slope in {"order 3": -3, "cold start: 2": -2}.items():
        (x0, x1), (y0, y1) = lines[name].get_data()
        assert np.log(y1 / y0) / np.log(x1 / x0) == pytest.approx(slope)
    assert main(["report", str(tmp_path)]) == 0
    text = words(parsed(tmp_path / "report.html"))
    assert "in brackets before the order, that of a cold start" in text
    assert "(2) 3" in text


def test_a_cell_that_was_not_measured_is_a_dash(sweep):
    """What a cheaper budget reaches is not shown again where a dearer one is missing."""
    (problem,) = merge([source(sweep(cells()[:4]))]).problems  # heun with all budgets, rk4 with five calls
    figure = comparison_figures.shades(problem)
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(shown[:6]) == sorted(["0.20", "0.050", "0.013", "0.050", "–", "–"])


def test_a_typical_noise_has_a_winner_of_its_own(sweep, tmp_path, parsed):
    """A few noises that end in another mode may decide the root mean square."""
    rows = [{**c, "sliced_w2": math.nan, "error_median": 0.01 if c["solver"] == "heun" else 0.02} for c in cells()[:6]]
    results.write(tmp_path / "results.h5", "comparison", sweep(rows))
    assert main(["report", str(tmp_path)]) == 0
    glance = words(parsed(tmp_path / "report.html")).partition("And for other budgets?")[0]
    assert "Without noise, rk4." in glance
    assert "For a typical noise (median): heun 0.010 (ODE)." in glance
