"""A profile in shards, the bounds of many T that follow from it, and the command that prints them."""

from __future__ import annotations

import csv
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from truths import grey, grey_model

from sdegen.bins import Bins
from sdegen.cli import main
from sdegen.data import Dataset
from sdegen.decoders import GaussianDecoder
from sdegen.levels import Discrete, Optimal
from sdegen.likelihood import DenoisingProfile, best_grid, bound, denoising_profile
from sdegen.likelihood.control import LinearGaussian
from sdegen.likelihood.ladder import ladder, measure
from sdegen.models import VPSDE, pixel_histogram
from sdegen.oracles import oracle
from sdegen.results import names, read

TINY = ("--network=mlp", "--network.width=16", "--network.depth=1", "--train.steps=5", "--train.eval_every=0")
Captured = pytest.CaptureFixture[str]


def _data(n: int = 30) -> Dataset:
    x = grey(n + 40)
    return Dataset("dots", x[n:], x[:n], Bins(5))


# --- in shards --------------------------------------------------------------------------------------------------------


def test_shards_give_the_profile_of_the_whole() -> None:
    model, data = grey_model(std=0.3), _data()
    whole, _ = measure(model, data, shard=64, bands=8)
    cut, known = measure(model, data, shard=7, bands=8)
    assert whole is not None
    assert cut is not None
    assert not known
    torch.testing.assert_close(cut.estimates, whole.estimates, rtol=1e-4, atol=1e-4)
    assert cut.report.nats == pytest.approx(whole.report.nats, rel=1e-6)
    assert cut.report.forward == pytest.approx(whole.report.forward)
    plain = denoising_profile(model, data.test, bands=8, linear=LinearGaussian.fit(data.train))
    torch.testing.assert_close(whole.estimates, plain.estimates, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.linear, plain.linear)
    assert whole.report.forward == pytest.approx(plain.report.forward)


def test_shards_that_are_there_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = grey_model(std=0.3), _data()
    alone, _ = measure(model, data, shard=7, bands=8)
    module, calls = sys.modules["sdegen.likelihood.ladder"], []

    def killed(*given: object, samples: range, **more: object) -> DenoisingProfile:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(samples)
        return denoising_profile(*given, samples=samples, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(module, "denoising_profile", killed)
        with pytest.raises(KeyboardInterrupt):
            measure(model, data, shard=7, bands=8, folder=tmp_path)
        assert len(list(tmp_path.glob(".shards/*/[0-9]*.h5"))) == 2
        calls.clear()
        monkeypatch.setattr(
            module, "denoising_profile", lambda *a, **k: (calls.append(0), denoising_profile(*a, **k))[1]
        )
        found, known = measure(model, data, shard=7, bands=8, folder=tmp_path)
        assert (len(calls), known) == (3, False)
        again, known = measure(model, data, shard=7, bands=8, folder=tmp_path)
        assert (len(calls), known) == (3, True)
    assert alone is not None
    for one in (found, again):
        assert one is not None
        assert torch.equal(one.estimates, alone.estimates)
        assert one.report.nats == alone.report.nats
    for more in ({"seed": 1}, {"n": 9}, {"bands": 9}, {"repeats": 3}, {"again": True}):
        assert not measure(model, data, **{"shard": 7, "bands": 8, "folder": tmp_path, **more})[1], more  # type: ignore[arg-type]
    assert len(names(tmp_path / "results.h5")) == 5


def test_what_has_no_profile() -> None:
    data = _data()
    with pytest.raises(ValueError, match="a profile is of a diffusion's noise levels, and this model is a"):
        measure(pixel_histogram(data.train, Bins(5)), data)
    with pytest.raises(ValueError, match="dots has grey levels and this model's decoder is a density"):
        measure(VPSDE(grey_model().denoiser, decoder=GaussianDecoder()), data)
    assert measure(grey_model(), data, dry_run=True) == (None, False)


# --- bounds of many T -------------------------------------------------------------------------------------------------


def test_the_bounds_are_those_of_the_models_with_so_many_levels() -> None:
    model, data = grey_model(std=0.3), _data(120)
    profile, _ = measure(model, data, bands=24, repeats=4)
    assert profile is not None
    found = ladder(profile, (4, 40), few=5)
    for T in (4, 40):
        direct = bound(model.discretize(T), data.test, draws=16, repeats=4, seed=5)
        assert abs(found.posterior[T].nats - direct.nats) < 4 * math.hypot(
            found.posterior[T].estimator_se, direct.estimator_se
        )
        assert found.best[T].nats < found.posterior[T].nats
        assert found.best[T].nats > found.limit.nats
    assert found.posterior[4].nats > found.posterior[40].nats > found.limit.nats == profile.report.nats
    assert found.grid[0] > found.grid[-1]
    assert len(found.grid) == 6


def test_what_is_best_is_chosen_on_other_data_than_it_is_scored_on() -> None:
    truth = oracle("mixture2d")
    x = truth.sample(21, seed=0)
    profile = denoising_profile(VPSDE(truth), x, bands=24)
    even, odd = (profile.part(slice(i, None, 2)) for i in (0, 1))
    found = ladder(profile, (6,), few=6)
    parts = [a.bound(Discrete(best_grid(b, 6), Optimal(b.mse))) for a, b in ((even, odd), (odd, even))]
    assert found.few.nats == pytest.approx((11 * parts[0].nats + 10 * parts[1].nats) / 21)
    flattered = profile.bound(Discrete(best_grid(profile, 6), Optimal(profile.mse)))
    assert found.few.nats > flattered.nats
    assert len(found.few.values) == 21
    assert found.few.estimator_se > 0
    assert "chosen on one half of the" in str(found)
    assert "chosen on the one example" in str(ladder(denoising_profile(VPSDE(truth), x[:1], bands=8), (6,), few=3))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", str(path), *TINY]) == 0
    return path


def test_the_command(trained: Path, tmp_path: Path, capsys: Captured) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    words = ["likelihood", str(run), "--profile", "--n=12", "--methods=uniform"]
    assert main(words) == 0
    out = capsys.readouterr().out
    for word in ("posterior variance", "best variance", "the best grid of 10 levels", "share", "profile.png"):
        assert word in out
    group = next(name for name in names(run / "results.h5") if name.startswith("profile/test-"))
    kept = read(run / "results.h5", group)
    assert kept["squares"].shape == kept["estimates"].shape == (2, 12, 48)
    assert (kept.attributes["split"], kept.attributes["data"]) == ("test", "digits")
    assert (run / "profile.png").read_bytes()[:4] == b"\x89PNG"
    with (run / "profile.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["T"] for row in rows] == [*["10", "30", "100", "300", "1000"] * 2, "10", "inf"]
    assert float(rows[-1]["nats"]) == pytest.approx(float(np.sum(kept["part_mean"])))
    assert float(rows[0]["bits_per_dim"]) > float(rows[-2]["bits_per_dim"]) > float(rows[-1]["bits_per_dim"])
    assert main(words) == 0
    assert "known already" in capsys.readouterr().out


def test_a_vae_has_no_noise_levels(tmp_path: Path, capsys: Captured) -> None:
    run = str(tmp_path / "run")
    assert main(["train", run, "--model=vae", "--model.width=8", "--train.steps=2", "--train.eval_every=0"]) == 0
    capsys.readouterr()
    for more, words in (
        ([], "--T, --ode and --profile are for diffusions"),
        (["--methods=bound"], "this model is a VAE"),
    ):
        assert main(["likelihood", run, "--profile", *more]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1


def test_weights_that_are_not_numbers(trained: Path, tmp_path: Path, capsys: Captured) -> None:
    from safetensors.torch import load_file, save_file

    from sdegen.runs import Run

    run = shutil.copytree(trained, tmp_path / "run")
    weights = load_file(run / "model.safetensors")
    next(w for w in weights.values() if w.is_floating_point() and w.ndim == 2).fill_(math.nan)
    with Run.open(run).writing("model.safetensors") as temporary:
        save_file(weights, temporary)
    for words in (["--n=4"], ["--n=4", "--profile", "--methods=uniform"], ["--n=4", "--methods=ode(steps=2)"]):
        capsys.readouterr()
        assert main(["likelihood", str(run), *words]) == 1
        said = capsys.readouterr().err
        assert "is not finite" in said
        assert said.count("\n") == 1
