"""The experiments without training of their own, very small: they write, they draw, and they refuse nonsense."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import discretization, stochasticity, time_grids
from sdegen.config import configure, read_toml
from sdegen.results import read


def test_noise_helps_where_the_start_is_wrong_and_costs_where_nothing_is(tmp_path: Path) -> None:
    config = stochasticity.Config(
        etas=(0.0, 1.0), budgets=(10, 60), seeds=(0,), cloud=400, narrow=0.6, out=tmp_path / "s"
    )
    found = read(stochasticity.run(config), "stochasticity")
    assert found["distance"].shape == (3, 2, 2, 2, 1)
    distance = dict(zip(map(str, found["case"]), found["distance"][..., 0], strict=True))
    exact, start = distance["exact"][0], distance["start"][0]  # of DDIM, (eta, nfe)
    assert exact[0, 0] < exact[1, 0]  # ten calls, exact score: the ODE
    assert start[1, 1] < 0.7 * start[0, 1]  # sixty calls, a narrow start: the SDE
    assert start[1, 1] < 3 * float(found["floor_high"].max())
    assert "<svg" in (tmp_path / "s" / "stochasticity.svg").read_text()
    assert (tmp_path / "s" / "stochasticity.csv").read_text().count("\n") == 1 + 3 * 2 * 2 * 2


def test_a_fitted_grid_is_compared_with_the_presets(tmp_path: Path) -> None:
    config = time_grids.Config(
        solvers=("heun",), grids=("uniform", "quadratic"), targets=("mixture2d",), paths=("vp-linear", "flow"),
        budgets=(10,), samples=8, out=tmp_path / "g",
    )  # fmt: skip
    found = read(time_grids.run(config), "time_grids")
    assert found["error"].shape == (1, 2, 1, 1, 3)
    assert found["grid"].tolist() == ["uniform", "quadratic", "fitted"]
    error = found["error"][0, :, 0, 0]
    assert error[0, 1] < error[0, 0]  # quadratic suits the linear VP path
    assert error[0, 2] < error[0, 1]
    assert np.isnan(error[1, 2])  # nothing is fitted on the second path
    assert np.nanmin(time_grids.losses(found)[..., :2]) == 0.0
    assert "heun         quadratic 1." in time_grids.told(found)
    assert "<svg" in (tmp_path / "g" / "time_grids.svg").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A diffusion and a VAE of a few steps."""
    from experiments.likelihood_table import trained

    made = {}
    for name, more in (("digits-vpsde", ["--network.channels", "[8,8]"]), ("digits-vae", ["--model.width", "16"])):
        config, _ = configure([*more, "--train.steps", "3", "--train.seconds", "null"], read_toml(name), origin=name)
        file = tmp_path_factory.mktemp("configs") / f"{name}.toml"
        file.write_text(config.to_toml())
        trained(str(file), file.with_suffix(""))
        made[name] = str(file.with_suffix(""))
    return made


def test_the_gap_of_a_chain_is_that_of_its_profile(tmp_path: Path, runs: dict[str, str]) -> None:
    config = discretization.Config(
        run=runs["digits-vpsde"], vae=runs["digits-vae"], T=(2, 10, 100), direct=10, bands=24, samples=8, seeds=(0,),
        out=tmp_path / "d",
    )  # fmt: skip
    found = read(discretization.run(config), "discretization")
    posterior, best, grid = (found[form.replace(" ", "_")] for form in discretization.FORMS)
    sde = float(found.attributes["sde"])
    assert (posterior > best).all()
    assert (best + 1e-3 > grid).all()
    assert (np.diff(posterior) < 0).all()
    assert (posterior > sde).all()
    assert abs(found["direct"][1] / posterior[1] - 1) < 0.02
    assert np.isnan(found["direct"][2])
    assert "<svg" in (tmp_path / "d" / "discretization.svg").read_text()


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (stochasticity.main, ["--target", "mixture3d"], "mixture2d"),
        (stochasticity.main, ["--etas", "[2]"], "eta is in [0, 1]"),
        (time_grids.main, ["--solvers", "ancestral"], "ancestral draws noise"),
        (time_grids.main, ["--solvers", "hewn"], "did you mean 'heun'"),
        (time_grids.main, ["--budgets", "1"], "needs at least"),
        (discretization.main, ["--run", "nowhere"], "nowhere"),
        (discretization.main, ["--T", "0"], "each at least 1"),
    ],
)
def test_nonsense_is_one_line(
    main: object, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", str(tmp_path / "x")]) == 2  # type: ignore[operator]
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not list(tmp_path.glob("x/*.h5"))


def test_the_help_of_an_experiment_calls_it_by_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["stochasticity", "--help"])
    monkeypatch.delitem(sys.modules, "experiments.stochasticity")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("experiments.stochasticity", run_name="__main__")
    assert not end.value.code
    assert "python -m experiments.stochasticity [options]" in capsys.readouterr().out
