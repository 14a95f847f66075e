"""The page of a run: one file that fetches nothing, drawn from results alone, honest about what is missing."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from sdegen import figures, pages, report, results
from sdegen.files import DamagedFile
from sdegen.results import Result
from sdegen.runs import RESULTS, Run


def likelihood() -> Result:
    models = ["uniform", "histogram", "pixels", "VAE", "DDPM", "DDPM", "VP-SDE", "ODE"]
    n = len(models)
    bits = np.array([4.087, 2.9, 2.4, 2.1, 3.5, 1.8, 1.75, 1.74])
    zeros, nan = np.zeros(n), np.full(n, np.nan)
    columns = {
        "bits": bits, "estimator_se": zeros + 0.004, "data_se": zeros + 0.013, "reconstruction": zeros + 0.008,
        "latent": bits - 0.01, "prior": np.where(bits == 1.74, nan, 0.002), "forward": zeros + 32, "vjp": zeros,
        "seconds": zeros + 1.5, "gap": bits - 1.75, "gap_se": zeros + 0.001,
    }  # fmt: skip
    settings = {"path": "VP(<cosine>)", "decoder": "Softmax()", "repeats": 2, "draws": 16}
    reports = [
        {"method": "variational bound", "logsnr": [7.9, -5.0], "forward": 32.0, "settings": settings},
        {"method": "probability-flow ODE", "logsnr": [7.9, -5.0], "forward": 60.0, "settings": settings},
    ]
    arrays = {name: (("row",), values) for name, values in columns.items()}
    arrays |= {"model": (("row",), models), "T": (("row",), [0, 0, 0, 0, 10, 1000, 0, 0])}
    arrays |= {"kind": (("row",), ["exact"] * 3 + ["upper bound"] * 5), "examples": (("row",), [360] * 7 + [180])}
    return Result(arrays, {"reports": json.dumps(reports)})


@pytest.fixture
def errors(sweep) -> Result:
    """Three solvers: one that spends its budgets, a stochastic one, and one with a tolerance."""
    cells = [
        ("heun", False, 2, 10, np.nan, 10, 0.2, 0.09), ("heun", False, 2, 20, np.nan, 20, 0.05, 0.01),
        ("ancestral", True, 1, 10, np.nan, 10, 0.4, 0.2), ("ancestral", True, 1, 20, np.nan, 20, 0.3, 0.1),
        ("dopri5", False, 0, 0, 1e-2, 14, 0.1, 0.02), ("dopri5", False, 0, 0, 1e-3, 18, 0.02, 0.01),
    ]  # fmt: skip
    names = ("solver", "stochastic", "order", "budget", "tol", "nfe", "error", "sliced_w2")
    more = {"error_low": 0.01, "error_high": 0.6, "sliced_w2_floor": 0.02, "sliced_w2_floor_high": 0.03, "seconds": 0.1}
    return sweep([dict(zip(names, cell, strict=True)) | more for cell in cells])


@pytest.fixture
def folder(tmp_path, errors):
    run = Run.create(
        tmp_path / "run", "seed = 0\n", seed=0, threads=2, train_size=1437, test_size=360,
        data={"description": "digits <&>", "source": "somewhere"}, stages={"Train the VAE": 12.0},
    )  # fmt: skip
    results.write(run / RESULTS, "likelihood", likelihood())
    results.write(run / RESULTS, "errors", errors)
    return run.path


def test_page_is_one_file_that_fetches_nothing(folder, parsed):
    page = report.build(folder)
    assert page == folder / "report.html"
    check, text = parsed(page), page.read_text(encoding="utf-8")
    outside = [a for a in check.addresses if not a.startswith(("#", "data:"))]
    assert outside == []
    assert "<script" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#|['\"]?data:)", text)
    assert len(check.ids) == len(set(check.ids))
    inside = {a[1:] for a in check.addresses if a.startswith("#")}
    assert inside <= set(check.ids)


def test_page_leaves_out_what_was_not_measured(folder):
    text = report.build(folder).read_text(encoding="utf-8")
    assert 'id="likelihood"' in text
    assert 'id="errors"' in text
    assert 'id="film"' not in text
    assert "Probability flow" in text


def test_page_is_drawn_again_from_results_alone_and_the_same(folder, tmp_path):
    one = report.build(folder).read_bytes()
    for file in folder.iterdir():
        if file.name not in (RESULTS, "manifest.json"):
            file.unlink()
    two = report.build(folder, tmp_path / "again.html").read_bytes()
    assert one == two


def test_an_installed_package_knows_no_commit(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("commit", None)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    text = report.build(folder).read_text(encoding="utf-8")
    assert "not a git checkout" in text
    (folder / "manifest.json").write_text(json.dumps(manifest | {"commit": "0123456789abcdef+changes"}))
    assert "commit 0123456789ab with changes" in report.build(folder).read_text(encoding="utf-8")


def test_values_from_outside_are_escaped(folder):
    text = report.build(folder).read_text(encoding="utf-8")
    assert "digits &lt;&amp;&gt;" in text
    assert "VP(&lt;cosine&gt;)" in text


def test_the_answers_come_first_and_are_right(folder, parsed):
    text = " ".join("".join(parsed(report.build(folder)).text).split())
    glance = text[: text.index("Two kinds of uncertainty")]
    assert "at most 1.75 bits" in glance
    assert "DDPM with 1,000 levels needs 1.80" in glance
    assert "the VAE 2.10" in glance
    assert "Without noise, heun. On a mixture in the plane, from the same noise, it ends 0.20 from the exact" in glance
    assert "With noise, ancestral, 0.40 from the exact path of its own equation." in glance
    assert "dopri5 needs more calls." in glance


def test_tables_mark_the_best_and_say_what_was_spent(errors):
    table = report._table(figures.problem(errors), "error")
    assert table["budgets"] == [10, 20]
    cells = {row["name"]: row["cells"] for row in table["rows"]}
    assert [cell["best"] for cell in cells["heun"]] == [True, False]
    assert [cell["best"] for cell in cells["ancestral"]] == [True, True]  # of its equation
    ten, twenty = cells["dopri5"]
    assert ten is None  # no solve of an adaptive method fits into ten calls
    assert (twenty["nfe"], twenty["value"], twenty["best"]) == (18, 0.02, True)
    within = {
        row["name"]: [bool(c and c["best"]) for c in row["cells"]]
        for row in report._table(figures.problem(errors), "sliced_w2")["rows"]
    }
    assert within == {"heun": [False, True], "ancestral": [False, False], "dopri5": [False, True]}


def test_the_readme_picture_needs_the_whole_demo(folder, tmp_path):
    assert report.main([str(folder), "--picture", str(tmp_path / "x.png")]) == 2
    assert not (tmp_path / "x.png").exists()


def test_bad_runs_get_one_line(folder, errors, tmp_path, capsys):
    cases = {}
    cases["nothing"] = tmp_path / "nothing"
    cases["empty"] = Run.create(tmp_path / "empty", "").path
    cases["truncated"] = shutil.copytree(folder, tmp_path / "truncated")
    content = (folder / RESULTS).read_bytes()
    (cases["truncated"] / RESULTS).write_bytes(content[: len(content) // 2])
    cases["older"] = shutil.copytree(folder, tmp_path / "older")
    results.write(
        cases["older"] / RESULTS, "errors", Result({n: a for n, a in errors.arrays.items() if n != "sliced_w2"}, {})
    )
    for name, path in cases.items():
        assert report.main([str(path)]) == 2, name
        out = capsys.readouterr()
        assert out.out == ""
        assert len(out.err.strip().splitlines()) == 1
        assert not (path / "report.html").exists()
    with pytest.raises(DamagedFile):
        report.build(cases["truncated"])
    with pytest.raises(ValueError, match=r"older/results.h5: .*another version.*; `sdegen demo --out .*older`"):
        report.build(cases["older"])


@pytest.mark.parametrize("value", [1e-9, 0.0034, 0.5, 12.3, 4567.0])
def test_significant_digits(value):
    text = pages.sig(value, 2).replace("·10", "e").translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    assert float(text) == pytest.approx(value, rel=0.05)
