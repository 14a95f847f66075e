"""The demo from end to end, in seconds: every stage, the folder it leaves, and the page."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sdegen import demo, report, results
from sdegen.building import restore
from sdegen.results import read
from sdegen.runs import RESULTS, Run
from sdegen.style import save

STAGES = ("samples", "likelihood", "strips", "film", "errors", "flow", "training/diffusion", "training/vae")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    state = torch.get_rng_state()
    path = tmp_path_factory.mktemp("demo") / "run"
    page = demo.run(path, fast=True, threads=1, seed=3)
    assert page == path / "report.html"
    assert torch.equal(torch.get_rng_state(), state)
    return path


def test_every_stage_leaves_its_results(folder):
    assert set(results.names(folder / RESULTS)) == set(STAGES)
    manifest = Run.open(folder).manifest
    assert manifest["status"] == "finished"
    assert manifest["seed"] == 3
    assert set(manifest["stages"]) == set(demo.planned(demo.Demo.fast())) - {"Draw the page"}
    assert "torch" in manifest["versions"]


def test_the_page_has_every_section(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    for name in (*report.SECTIONS, "made"):
        assert f'<section id="{name}">' in text
    for name in ("scores", "ranking", "samples", "bounds", "strips", "errors", "flow", "training"):
        assert f'id="{name}-figure_1"' in text


def test_baselines_are_measured_and_right(folder):
    found = read(folder / RESULTS, "likelihood")
    bits = dict(zip(found["model"], found["bits"], strict=True))
    assert bits["uniform"] == pytest.approx(math.log2(17), abs=1e-6)
    assert bits["pixels"] == pytest.approx(2.43, abs=0.02)
    assert bits["pixels"] < bits["histogram"] < bits["uniform"]


def test_parts_of_a_bound_add_up(folder):
    found = read(folder / RESULTS, "likelihood")
    bound = (found["kind"] == "upper bound") & (found["model"] != "ODE")
    total = found["reconstruction"] + found["latent"] + found["prior"]
    np.testing.assert_allclose(total[bound], found["bits"][bound], atol=1e-6)
    assert (found["gap"][found["model"] == "DDPM"] > 0).all()
    np.testing.assert_allclose(found["gap"][found["model"] == "VP-SDE"], 0)


def test_samples_are_grey_levels(folder):
    found = read(folder / RESULTS, "samples")
    levels = (found["images"] + 1) * 17 / 2 - 0.5
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
    assert list(found["group"])[:2] == ["held-out digits", "VAE"]


def test_one_noise_gives_one_digit_as_the_budget_grows(folder):
    """Solvers of one equation from one noise, and the reference they are measured against, agree."""
    found = read(folder / RESULTS, "strips")
    assert (found["nfe"] <= found["budget"][:, None]).all()
    assert set(found["solver"]) == set(demo.Demo.fast().solvers)
    assert (found["error"] > 0).all()
    best = {str(s): e for s, e in zip(found["solver"], found["error"][0], strict=True)}
    assert best["dpmpp_2m"] < 1.0


def test_film_starts_and_ends_where_it_should(folder):
    found = read(folder / RESULTS, "film")
    rows = dict(zip(found["row"], found["images"], strict=True))
    assert found["logsnr"][0] < -4 < 7 < found["logsnr"][-1]
    np.testing.assert_allclose(rows["ODE"][0], rows["SDE"][0])
    assert np.abs(rows["forward"][-1] - rows["forward x0"][-1]).max() < 0.2


def test_flow_lines_go_from_noise_to_data(folder):
    found = read(folder / RESULTS, "flow")
    reach, (_, height, width) = found.attributes["reach"], found["density"].shape
    cell = (2 * reach) ** 2 / ((height - 1) * (width - 1))
    mass = found["density"].sum(axis=(1, 2)) * cell
    np.testing.assert_allclose(mass[-1], 1, atol=1e-3)
    # the arrows of the last field lead uphill in the density of the data more often than not
    assert found["lines"].shape[0] == 101
    np.testing.assert_allclose(found["walks"][0], found["lines"][0, :4])


def test_trained_runs_are_ordinary_runs(folder):
    for name in ("diffusion", "vae"):
        data, model = restore(folder / name)
        assert model.sample(2).shape == (2, *data.event_shape)


def test_the_page_can_be_drawn_again_without_training(folder, tmp_path):
    again = report.build(folder, tmp_path / "again.html")
    assert again.read_bytes() == (folder / "report.html").read_bytes()


def test_the_readme_picture(folder, tmp_path):
    path = report.picture(folder, tmp_path / "images" / "demo.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 50_000
    assert save is not None


def test_bad_settings_are_refused_before_the_work(tmp_path):
    with pytest.raises(ValueError, match="positive"):
        demo.run(tmp_path / "x", seconds=-1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    with pytest.raises(FileExistsError, match="not a run"):
        demo.run(tmp_path / "mine", fast=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_planned_time_fits_into_three_minutes():
    assert sum(demo.planned(demo.Demo()).values()) < 165
