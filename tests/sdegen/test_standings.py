"""Who is best: ranks, ties, fronts, families, and results files put together."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from sdegen import results
from sdegen.families import FAMILIES, family
from sdegen.files import DamagedFile
from sdegen.results import Result
from sdegen.standings import front
from sdegen.sweeps import gather, merge, source
from solvers import SOLVERS


def cell(solver: str, budget: int, error: float, **more):
    spread = {"error_low": error / 1.1, "error_high": error * 1.1}
    return {"solver": solver, "budget": budget, "error": error, "order": SOLVERS[solver].order, **spread, **more}


def problem(sweep, cells):
    return merge([source(sweep(cells))]).problems[0]


def test_the_row_that_spends_most_of_the_budget_counts(sweep):
    """Not the luckiest of all that are cheap enough; and of a tolerance, the smallest that the budget allows."""
    known = problem(sweep, [
        cell("heun", 5, 0.1, nfe=4), cell("heun", 10, 0.2), cell("heun", 20, 0.01), cell("ddim", 10, 0.3),
        cell("dopri5", 0, 0.15, tol=1e-2, nfe=8), cell("dopri5", 0, 0.05, tol=1e-3, nfe=12),
    ])  # fmt: skip
    ranked = known.ranked(10, "error")
    assert [(row.label, row["error"].value) for row in ranked] == [("dopri5", 0.15), ("heun", 0.2), ("ddim", 0.3)]
    assert ranked[0].tol == 1e-2
    assert known.ranked(3, "error") == []
    assert known.budgets == [5, 10, 20]


def test_equations_are_ranked_apart(sweep):
    known = problem(sweep, [cell("heun", 10, 0.1), cell("ancestral", 10, 0.3, stochastic=True)])
    assert [row.label for row in known.ranked(10, "error", stochastic=True)] == ["ancestral"]
    assert [row.label for row in known.ranked(10, "error", stochastic=False)] == ["heun"]


def test_who_is_within_the_floor_is_equal_and_the_cheapest_there_comes_first(sweep):
    floors = {"sliced_w2_floor": 0.05, "sliced_w2_floor_high": 0.08}
    known = problem(sweep, [
        cell("heun", 5, 0.5, sliced_w2=0.2, **floors), cell("heun", 10, 0.1, sliced_w2=0.04, **floors),
        cell("ddim", 5, 0.5, sliced_w2=0.07, **floors), cell("ddim", 10, 0.2, sliced_w2=0.07, **floors),
    ])  # fmt: skip
    assert known.limit("sliced_w2") == 0.08
    assert [row.label for row in known.ranked(10, "sliced_w2")] == ["ddim", "heun"]
    assert known.limit("error") == -math.inf


def test_the_floor_is_not_below_what_a_perfect_solver_shows(sweep):
    """The endpoints' noises may be off the law by chance: then all good solvers are, by the same."""
    floors = {"sliced_w2_floor": 0.05, "sliced_w2_floor_high": 0.06}
    known = problem(sweep, [
        cell("heun", 100, 1e-6, sliced_w2=0.09, **floors), cell("ddim", 10, 0.2, sliced_w2=0.3, **floors)
    ])  # fmt: skip
    assert known.limit("sliced_w2") == 0.09


def test_the_front_is_what_nobody_beats(sweep):
    cells = [cell("heun", 5, 1.0), cell("ddim", 5, 0.5), cell("heun", 10, 0.6), cell("ddim", 20, 0.2)]
    known = problem(sweep, cells)
    assert [(row.label, row.nfe) for row in front(known.rows, "error")] == [("ddim", 5), ("ddim", 20)]
    assert [(row.label, row.nfe) for row in front(known.rows, "error", floor=0.55)] == [("ddim", 5)]
    rng = np.random.default_rng(0)
    many = problem(sweep, [cell(name, int(b), float(e)) for name in ("heun", "ddim", "rk4") for b, e in
                           zip(range(5, 50, 3), rng.random(15), strict=True)])  # fmt: skip
    best = front(many.rows, "error")
    for row in many.rows:
        beaten = any(f.nfe <= row.nfe and f["error"].value <= row["error"].value for f in best)
        assert beaten
    assert all(a["error"].value > b["error"].value for a, b in pairwise(best))


def test_of_the_log_density_the_nearest_to_exact_samples_is_best(sweep):
    """Higher is not better: who draws everything into the modes has the highest of all."""
    floors = {"log_density_floor": -2.0, "log_density_floor_high": -1.9}
    known = problem(sweep, [
        cell("heun", 10, 1e-6, log_density=-2.01, **floors), cell("ddim", 10, 0.1, log_density=-1.2, **floors),
        cell("euler", 10, 0.2, log_density=-9.0, **floors), cell("rk4", 10, 0.2, log_density=-2.3, **floors),
    ])  # fmt: skip
    assert [row.label for row in known.ranked(10, "log_density")] == ["heun", "rk4", "ddim", "euler"]
    assert known.limit("log_density") == pytest.approx(0.1)
    assert [known.inside(row, "log_density") for row in known.rows] == [True, False, False, False]
    assert known.quality("log_density") == ["heun", "rk4", "ddim", "euler"]
    with pytest.raises(ValueError, match="not of log_density"):
        front(known.rows, "log_density")


def test_without_a_floor_nobody_knows_which_log_density_is_right(sweep):
    known = problem(sweep, [cell("heun", 10, 0.1, log_density=-2.0)])
    assert known.ranked(10, "log_density") == []


def test_solvers_of_one_name_are_told_apart(sweep):
    mine = [
        {**cell("heun", 10, 0.1 * i), "solver": name} for i, name in enumerate(("a.py:Leap", "b.py:Leap", "x/c.py"), 1)
    ]
    assert problem(sweep, mine).labels == ["a.py:Leap", "b.py:Leap", "c"]


def test_seeds_are_pooled(sweep):
    cells = [cell("heun", 10, error, seed=seed, seconds=error) for seed, error in enumerate((0.3, 0.4))]
    (row,) = problem(sweep, cells).rows
    assert row.seeds == 2
    value, low, high = row["error"]
    assert value == pytest.approx(math.sqrt((0.3**2 + 0.4**2) / 2))
    # two independent intervals of 10 % make one of 10 % / sqrt(2)
    assert math.log(high / value) == pytest.approx(math.log(1.1) / math.sqrt(2))
    assert low * high == pytest.approx(value**2)
    assert row["seconds"].value == pytest.approx(0.35)


def test_a_failed_cell_has_no_numbers_and_says_why(sweep):
    cells = [cell("heun", 10, math.nan, status="FloatingPointError: not finite"), cell("ddim", 10, 0.1)]
    known = problem(sweep, cells)
    assert [row.label for row in known.ranked(10, "error")] == ["ddim"]
    assert known.rows[0].status.startswith("FloatingPointError")


def test_ties_are_overlapping_intervals(sweep):
    known = problem(sweep, [cell("heun", 10, 0.1), cell("ddim", 10, 0.115), cell("rk4", 10, 0.2)])
    heun, ddim, rk4 = known.rows
    assert heun.ties(ddim, "error")
    assert not heun.ties(rk4, "error")
    assert not heun.ties(ddim, "sliced_w2")  # unknown


def test_several_grids_are_several_solvers(sweep):
    grids = [cell("heun", 10, 0.1, grid="karras"), cell("heun", 10, 0.2), cell("ddim", 10, 0.3)]
    assert problem(sweep, grids).labels == ["heun · karras", "heun · logsnr", "ddim"]


def test_quality_counts_a_budget_that_cannot_be_spent_as_the_worst(sweep):
    cells = [cell("heun", 5, 0.5), cell("heun", 10, 0.1), cell("ddim", 5, 0.4), cell("ddim", 10, 0.2)]
    cells += [cell("euler", 5, 1.0), cell("euler", 10, 1.0), cell("rk4", 10, 0.06)]
    assert problem(sweep, cells).quality("error") == ["heun", "rk4", "ddim", "euler"]


def test_the_handful_is_of_every_budget(sweep):
    cells = [cell(name, b, e) for name, errors in
             {"heun": (0.9, 0.1, 0.5), "ddim": (0.1, 0.5, 0.6), "rk4": (0.8, 0.4, 0.1), "euler": (1, 1, 1)}.items()
             for b, e in zip((5, 10, 20), errors, strict=True)]  # fmt: skip
    assert problem(sweep, cells).handful("error", 10, count=3) == ["heun", "ddim", "rk4"]


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_has_a_family_of_its_equation(name):
    assert family(name) in FAMILIES
    assert (list(FAMILIES).index(family(name)) >= 5) == SOLVERS[name].stochastic


def test_files_are_put_together(sweep, tmp_path):
    one, two = tmp_path / "one.h5", tmp_path / "two.h5"
    results.write(one, "comparison", sweep([cell("heun", 10, 0.1), cell("ddim", 10, 0.2)], commit="a"))
    results.write(two, "comparison", sweep([cell("ddim", 10, 0.3), cell("ddim", 10, 0.4, target="ring")], commit="b"))
    found = gather([one, two])
    assert [p.title for p in found.problems] == ["mixture2d", "ring"]
    assert found.doubled == 1
    assert found.problems[0].at("ddim", 10)["error"].value == 0.3  # the later file's
    assert [s.about["commit"] for s in found.problems[0].sources] == ["a", "b"]
    assert found.labels == ["heun", "ddim"]
    assert len(found.rows) == 3


def test_endpoints_and_orders_find_their_solver(sweep, tmp_path):
    file = tmp_path / "results.h5"
    results.write(file, "comparison", sweep([cell("heun", 10, 0.1), cell("ddim", 20, 0.2)]))
    order = {"target": "mixture2d", "path": "own", "grid": "logsnr", "solver": "ddim", "stochastic": False}
    order |= {"order": 1.0, "start_order": 1.0, "measured": 1.1, "measured_low": 0.9, "measured_high": 1.3}
    results.write(file, "orders", Result({name: (("row",), [value]) for name, value in order.items()}, {}))
    x = np.arange(12.0).reshape(2, 3, 2)
    arrays = {"cell": (("cell",), [1, 0]), "x": (("cell", "noise", "coordinate"), x)}
    arrays |= {"equation": (("equation",), ["ODE"]), "exact": (("equation", "noise", "coordinate"), x[:1])}
    results.write(file, "samples/0", Result(arrays, {"target": "mixture2d"}))
    (found,) = gather([file]).problems
    assert [(o.label, o.declared, o.measured.value) for o in found.orders] == [("ddim", 1.0, 1.1)]
    assert found.pictures is not None
    np.testing.assert_array_equal(found.pictures.shown["ddim", 20], x[0])
    np.testing.assert_array_equal(found.pictures.exact["ODE"], x[0])


def test_bad_files_are_refused_in_one_line(sweep, tmp_path):
    file = tmp_path / "results.h5"
    with pytest.raises(FileNotFoundError, match="no results file"):
        gather([file])
    results.write(file, "errors", sweep([cell("heun", 10, 0.1)]))
    with pytest.raises(ValueError, match="no comparison, only errors"):
        gather([file])
    results.write(file, "comparison", sweep([cell("heun", 10, 0.1)], schema=0))
    with pytest.raises(ValueError, match="another version: its schema is 0"):
        gather([file])
    found = sweep([cell("heun", 10, 0.1)])
    fewer = {name: array for name, array in found.arrays.items() if name != "overhead_us"}
    results.write(file, "comparison", Result(fewer, found.attributes))
    with pytest.raises(ValueError, match="another version: no overhead_us"):
        gather([file])
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DamagedFile):
        gather([file])
