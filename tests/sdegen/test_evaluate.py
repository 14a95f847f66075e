"""One call, one report: nothing is missing, nobody is needed, nothing is lost, nothing is computed twice."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import sdegen
from sdegen.bins import Bins
from sdegen.data import Dataset
from sdegen.decoders import CategoricalHead, GaussianDecoder
from sdegen.denoiser import Denoiser
from sdegen.levels import Discrete
from sdegen.likelihood import LikelihoodReport
from sdegen.likelihood.evaluate import evaluate
from sdegen.likelihood.methods import METHODS, Method
from sdegen.likelihood.store import everything, fingerprint
from sdegen.models import VAE, VPSDE, GaussianDiffusion
from sdegen.networks import MLP
from sdegen.oracles import oracle
from sdegen.results import read, write

BINS = Bins(5)
SHAPE = (1, 3, 3)

# What a number must come with before anybody can believe it.
FIELDS = {
    "nats", "bits_per_dim", "kind", "of", "estimator_se", "data_se", "solver_error", "forward", "vjp", "jvp", "seconds",
    "dequantizer", "bin_width", "logsnr_clean", "logsnr_noisy", "tolerance", "solver", "seed", "note",
}  # fmt: skip


def _data() -> Dataset:
    draw = torch.Generator().manual_seed(0)
    train, test = (BINS.value(torch.randint(5, (n, *SHAPE), generator=draw)) for n in (60, 25))
    return Dataset("dots", train, test, BINS, scale=BINS.width, shift=1 / 5 - 1)


def _model(width: int = 8) -> GaussianDiffusion:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = MLP(SHAPE, 5, width=width, depth=1)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return VPSDE(Denoiser(net, "levels", BINS))


def _vae() -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return VAE.mlp(SHAPE, CategoricalHead(BINS), latent=2, width=8)


def _same(one: LikelihoodReport, other: LikelihoodReport) -> None:
    """But for the time it took."""
    for f in fields(one):
        a, b = getattr(one, f.name), getattr(other, f.name)
        if f.name == "values":
            assert torch.equal(a, b)
        elif f.name != "seconds":
            assert a == b or (a != a and b != b), f.name


# --- nothing is missing -----------------------------------------------------------------------------------------------


def test_every_method_gives_every_field(tmp_path: Path) -> None:
    tested = {
        "ode": "ode(solver=heun, steps=3)",
        "iwae": "iwae(K=3)",
        "autoregressive": "autoregressive(width=9, steps=5)",
    }
    by_model = {"diffusion": _model(), "vae": _vae()}
    seen: set[str] = set()
    for kind, model in by_model.items():
        names = [
            n
            for n in METHODS
            if not (n in ("ode", "profile") and kind == "vae") and not (n == "iwae" and kind != "vae")
        ]
        asked = {name: tested.get(name, name) for name in names}
        found = evaluate(model, _data(), methods=asked)
        seen |= asked.keys()
        for line in found.rows():
            assert line.keys() >= FIELDS, line["title"]
            assert math.isfinite(line["nats"] + line["bits_per_dim"])
            assert line["bin_width"] == BINS.width or line["kind"] == "exact"
            assert line["seed"] == 0 or line["kind"] == "exact"
        write(tmp_path / "found.h5", kind, found.to_result())
        back = read(tmp_path / "found.h5", kind)
        assert back.arrays.keys() >= FIELDS | {"part", "parts", "values"}
        assert back["title"].tolist() == list(asked)
        assert back["values"].shape == (len(asked), 25)
        np.testing.assert_array_equal(back["nats"], [r.nats for r in found.reports.values()])
        assert back.attributes["data"] == "dots"
        assert back.attributes["scale"] == BINS.width
        text = str(found)
        assert "5 grey levels; model units are 0.4 level -0.8" in text
        for word in (
            *asked,
            "± draws",
            "± data",
            "forward",
            "vjp",
            "jvp",
            "dequantizer",
            "bin width",
            "tolerance",
            "seed",
        ):
            assert word in text
    assert seen == METHODS.keys()


def test_densities_come_in_nats_and_in_the_units_of_the_data() -> None:
    truth = oracle("mixture2d")
    x = truth.sample(12, seed=0).float()
    data = Dataset("blobs", x, x, scale=0.5)
    found = evaluate(VPSDE(truth), data, methods=["bound(T=20)", "ode(tol=1e-2, exact=true)"])
    text = str(found)
    assert "bits/dim" not in text
    assert f"densities are per model unit: {2 * math.log(2):+.4f} nats for raw units" in text
    assert found["bound(T=20)"].dequantizer is None
    known = evaluate(VPSDE(truth), x, methods=["bound(T=20)"], bin_width=0.1)
    assert known["bound(T=20)"].bin_width == 0.1
    assert "bits/dim" in str(known)


# --- nobody is needed, nothing is lost --------------------------------------------------------------------------------

ASKED = ["bound(T=4, draws=2)", "ode(solver=heun, steps=2)"]

CHILD = """
import importlib, sys, time
sys.path.insert(0, {tests!r})
import test_evaluate as t
module = importlib.import_module("sdegen.likelihood.evaluate")
compute = module._shard
def slow(*given):
    time.sleep({sleep})
    return compute(*given)
module._shard = slow
module.evaluate(t._model(), t._data(), methods=t.ASKED, shard=4, folder={folder!r})
"""


def _child(folder: Path, sleep: float, **environment: str) -> subprocess.Popen[bytes]:
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(folder), sleep=sleep)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", code], env=settings)


def _wait(until: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.01)
    assert until()  # type: ignore[operator]


def test_processes_share_the_work_and_one_that_is_killed_is_not_missed(tmp_path: Path) -> None:
    alone = evaluate(_model(), _data(), methods=ASKED, shard=4)
    killed = _child(tmp_path, 0.2)
    _wait(lambda: len(list(tmp_path.glob(".shards/*/[0-9]*.h5"))) > 2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = {file: file.stat().st_mtime_ns for file in tmp_path.glob(".shards/*/[0-9]*.h5")}
    assert left
    computed: list[range] = []
    module = sys.modules["sdegen.likelihood.evaluate"]
    compute = module._shard

    other = _child(tmp_path, 0.1, RANK="1", WORLD_SIZE="2")
    _wait(lambda: len(list(tmp_path.glob(".shards/*/[0-9]*.h5"))) > len(left))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "_shard", lambda *given: (computed.append(given[-2]), time.sleep(0.05), compute(*given))[-1]
        )
        together = evaluate(_model(), _data(), methods=ASKED, shard=4, folder=tmp_path)
    assert other.wait(60) == 0
    for title in ASKED:
        _same(alone[title], together[title])
    shards = 2 * 7
    assert len(computed) + len(left) <= shards  # what was done was not done again
    assert len(everything(tmp_path)) == 2
    assert not list(tmp_path.glob(".shards/*"))


def test_what_is_known_is_not_computed_again(tmp_path: Path) -> None:
    def ask(model: GaussianDiffusion, **more: object) -> sdegen.likelihood.evaluate.Evaluation:
        given = {"methods": ["bound(draws=2)"], "folder": tmp_path, **more}
        return evaluate(model, _data(), **given)  # type: ignore[arg-type]

    first, second = ask(_model()), ask(_model())
    assert first.known == frozenset()
    assert second.known == {"bound(draws=2)"}
    _same(first["bound(draws=2)"], second["bound(draws=2)"])
    assert "known already" in str(second)
    for more in (
        {"methods": ["bound(draws=3)"]},
        {"seed": 1},
        {"n": 7},
        {"target_se": 9.0},
        {"again": True},
        {"shard": 9},
    ):
        assert not ask(_model(), **more).known, more
    other = _model()
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    assert not ask(other).known
    # Written out, defaults are the same method; all that differ are kept.
    assert ask(_model(), methods={"mine": "bound(repeats=2, draws=2)"}).known == {"mine"}
    assert len(everything(tmp_path)) == 7


def test_a_model_is_known_by_its_weights_and_by_what_it_says() -> None:
    assert fingerprint(_model()) == fingerprint(_model())
    model = _model()
    models = [model, _model(16), _vae(), _model().discretize(3), VPSDE(oracle("mixture2d")), VPSDE(oracle("ring"))]
    grids = [model.with_levels(Discrete.on(model.path, 3, grid=grid)) for grid in ("karras", "quadratic")]
    assert repr(grids[0]) == repr(grids[1])
    assert len({fingerprint(model) for model in [*models, *grids]}) == len(models) + 2


# --- what goes wrong --------------------------------------------------------------------------------------------------


def _refused(*given: object, **settings: object) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        evaluate(*given, **settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_data_that_are_not_this_models() -> None:
    model, data = _model(), _data()
    other = Dataset("finer", *(Bins(9).value(torch.zeros(4, *SHAPE).long()) for _ in range(2)), Bins(9))
    real = Dataset("real", *(torch.zeros(4, *SHAPE) for _ in range(2)))
    assert _refused(model, other) == "the model gives probabilities of 5 grey levels, and finer has 9 grey levels"
    assert "and real has real numbers" in _refused(model, real)
    assert "are not centres of the 5 grey levels" in _refused(model, data.test + 0.1)
    bad = data.test.clone()
    bad[17, 0, 1, 2] = math.nan
    assert _refused(model, bad) == "example 17 is not finite"
    assert "bin_width is for density decoders" in _refused(model, data, bin_width=0.1)
    assert "there are 25 examples and 3 labels" in _refused(model, data, torch.zeros(3).long())
    assert "split is test or train" in _refused(model, data, split="val")
    assert "n is at least 1" in _refused(model, data, n=0)


def test_a_density_has_no_bits_of_grey_levels() -> None:
    net = MLP(SHAPE, 1, width=8, depth=1)
    model = VPSDE(Denoiser(net, "eps"), decoder=GaussianDecoder())
    assert "dots has grey levels and this model's decoder is a density" in _refused(model, _data())
    with pytest.raises(ValueError, match="use a discrete decoder, or say bin_width"):
        model.bits_per_dim(_data().test)
    found = evaluate(model, _data(), methods=["ode(dequantizer=uniform, steps=4)"], n=5)
    (report,) = found.reports.values()
    assert (report.of, report.bin_width) == ("probability", BINS.width)
    assert "Uniform" in str(report.dequantizer)
    assert report.bits_per_dim == report.in_bits(report.nats)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("bund", "unknown method 'bund'; did you mean bound?"),
        ("bound(T)", "'bound(T)': options are written bound(option=value, ...)"),
        ("bound(drawz=3)", "unknown option 'drawz' of bound; did you mean draws?"),
        ("bound(T=0)", "bound: T is a whole number of levels, at least 1, or inf, not 0"),
        ("ode(solver=heun, tol=0.1)", "takes fixed steps"),
        ("ode(solver=heun, steps=3, tol=0.1)", "give at most one of steps, nfe, ts and tol"),
        ("ode(solver=ancestral, steps=3)", "draws noise: a density is carried along an ODE by a solver without noise"),
        ("ode(dequantizer=uniform)", "this model gives probabilities of grey levels"),
        ("iwae", "iwae is for a VAE, and this model is a GaussianDiffusion"),
        ("]", "']' is no method: write a name, or name(option=value, ...)"),
    ],
)
def test_methods_that_are_none(method: str, message: str) -> None:
    assert message in _refused(_model(), _data(), methods=[method])


def test_a_baseline_needs_data_to_learn_from() -> None:
    assert "histogram is a baseline of grey levels" in _refused(_model(), _data().test, methods=["histogram"])
    assert "target_se must be positive" in _refused(_model(), _data(), target_se=0.0)


def test_method_text_and_back() -> None:
    for text in ("bound", "bound(T=inf)", "ode(solver=heun, steps=4, exact=True)"):
        assert Method.parse(str(Method.parse(text))) == Method.parse(text)
    assert Method.parse("iwae").full.startswith("iwae(K=100, repeats=2, ")
