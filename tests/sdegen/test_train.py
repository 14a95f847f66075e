"""Training: the loop, its promises about randomness and resuming, and everything that can go wrong in it."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sdegen.building import build
from sdegen.config import configure, read_toml, shipped
from sdegen.data import Dataset, digits, from_arrays
from sdegen.denoiser import Denoiser
from sdegen.files import DamagedFile, DiskFull
from sdegen.models import VPSDE
from sdegen.networks import MLP, UNet
from sdegen.networks.layers import dropout
from sdegen.runs import Run
from sdegen.train import (
    EMA,
    Interrupted,
    NonFiniteLoss,
    TrainConfig,
    fit,
    held_out,
    load_weights,
    save_weights,
)
from sdegen.train.batches import batch
from sdegen.train.loop import _adamw


class Line(nn.Module):
    """x0 = w z + b with dropout: small, and random in every way that a model can be."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w, self.b = nn.Parameter(torch.randn(2, 2, generator=g)), nn.Parameter(torch.zeros(2))
        self.seen: list[Tensor | None] = []
        self.poison_at: int | None = None

    def loss(self, x: Tensor, cond: Tensor | None = None, *, generator: torch.Generator) -> Tensor:
        self.seen.append(cond)
        noise = torch.randn(x.shape, generator=generator)
        loss = (dropout(x + noise, 0.2, self.training) @ self.w + self.b - x).square().mean()
        return loss * float("nan") if self.poison_at == len(self.seen) else loss

    def bound(self, x: Tensor, cond: Tensor | None, u: Tensor, generator: torch.Generator) -> SimpleNamespace:
        noise = u.float().unsqueeze(1) * torch.randn(x.shape, generator=generator)
        return SimpleNamespace(total=((x + noise) @ self.w + self.b - x).square().mean(1))


def data(labels: bool = False) -> Dataset:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(70, 2, generator=g) @ torch.tensor([[1.0, 0.5], [0.0, 0.3]])
    return from_arrays(x.numpy(), labels=torch.randint(0, 3, (70,), generator=g).numpy() if labels else None)


def settings(steps: int = 12, **changes: object) -> TrainConfig:
    chosen = {"batch_size": 16, "warmup": 3, "eval_every": 5, "threads": 1, "precision": "float32", **changes}
    return TrainConfig(steps=steps, **chosen)  # type: ignore[arg-type]


def new_run(folder: Path) -> Run:
    return Run.create(folder / "run", "")


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def no_times(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "per_second")} for row in history]


def interrupt_at(step: int, number: int = signal.SIGINT) -> Callable[[dict[str, float]], None]:
    return lambda row: os.kill(os.getpid(), number) if row["step"] == step else None


# --- settings ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -5}, "steps must be positive, not -5"),
        ({"steps": 0}, "steps must be positive, not 0"),
        ({"steps": None}, "needs a budget: steps or seconds"),
        ({"seconds": -1.0}, "seconds must be positive"),
        ({"seconds": float("nan")}, "seconds must be positive"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("inf")}, "lr must be positive, not inf"),
        ({"warmup": -1}, "warmup must not be negative"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\), not 1\.0"),
        ({"betas": (0.9, 1.0)}, "beta2 must lie in"),
        ({"final_lr": 2.0}, "final_lr is a share"),
        ({"precision": "float16"}, "precision must be one of auto, float32, bfloat16"),
        ({"seed": -1}, "seed must not be negative"),
        ({"drop_labels": 1.0}, "drop_labels must lie in"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 10, **changes})


def test_learning_rate_rises_and_falls_with_the_budget() -> None:
    config = TrainConfig(steps=1000, lr=1.0, warmup=100, final_lr=0.1)
    rates = [config.learning_rate(n, config.spent(n, 0.0)) for n in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1, abs=0.03)
    assert rates[1000] == pytest.approx(0.1)
    assert rates[500] == pytest.approx(0.55, abs=0.01)
    both = TrainConfig(steps=1000, seconds=10.0)
    assert both.spent(100, 5.0) == 0.5  # whichever is further
    assert both.spent(900, 50.0) == 1


def test_ema_forgets_the_start() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 100.0)
    ema, expected = EMA(model, 0.9), 100.0
    for n in range(30):
        nn.init.constant_(model.weight, float(n))
        ema.update(model, n)
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * n
    assert float(ema.module.weight.detach()) == pytest.approx(expected, rel=1e-5)
    assert 15 < expected < 29
    assert not ema.module.weight.requires_grad


def test_every_epoch_shows_every_example_once() -> None:
    for epoch in range(3):
        rows = torch.cat([batch(64, 16, 7, 4 * epoch + i) for i in range(4)])
        assert torch.equal(rows.sort().values, torch.arange(64))
    assert not torch.equal(batch(64, 16, 7, 0), batch(64, 16, 7, 4))
    assert not torch.equal(batch(64, 16, 7, 0), batch(64, 16, 8, 0))
    assert len(batch(10, 128, 0, 5)) == 10  # fewer examples than a batch


# --- the loop ---


def test_it_learns_and_leaves_the_average_in_the_model(tmp_path: Path) -> None:
    model, run, rows = Line(), new_run(tmp_path), []
    before = held_out(model.eval(), data(), settings())
    done = fit(model, data(), settings(200, lr=0.05), run=run, callback=rows.append)
    assert done.steps == 200
    assert done.history == rows
    assert rows[-1]["held_out"] < 0.7 * before
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert same(model, done.ema.module)
    assert not model.training
    assert held_out(model, data(), settings()) == rows[-1]["held_out"]
    assert same(load_weights(run / "model.safetensors", Line()), model)
    table = list(csv.DictReader((run / "metrics.csv").open()))
    assert [int(row["step"]) for row in table] == [row["step"] for row in rows] == list(range(5, 201, 5))
    assert float(table[-1]["held_out"]) == rows[-1]["held_out"]
    for name in ("model.safetensors", "state.pt"):
        run.verified(name)


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    a, b, c = Line(), Line(), Line()
    fit(a, data(), settings())
    torch.manual_seed(12345)  # the global state does not matter ...
    fit(b, data(), settings())
    fit(c, data(), settings(seed=1))
    assert same(a, b)
    assert not same(a, c)


def test_the_callers_process_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    state, threads, handler = torch.get_rng_state(), torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    fit(Line(), data(), settings(threads=2))
    assert torch.equal(torch.get_rng_state(), state)  # ... and is untouched
    assert torch.get_num_threads() == threads
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_budget_of_seconds_ends_in_time() -> None:
    start = time.perf_counter()
    done = fit(Line(), data(), TrainConfig(seconds=0.5, threads=1, eval_every=0, batch_size=16))
    assert 0.5 <= time.perf_counter() - start < 3
    assert done.steps > 20
    assert len(done.history) == 1  # the end is always evaluated


def test_labels_are_used_on_request_and_sometimes_dropped() -> None:
    model = Line()
    fit(model, data(labels=True), settings(1))
    assert model.seen == [None]
    fit(model, data(labels=True), settings(100, conditional=True, drop_labels=0.25))
    labels = torch.cat([cond for cond in model.seen if cond is not None])
    assert set(labels.tolist()) == {-1, 0, 1, 2}
    assert float((labels == -1).float().mean()) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_real_model_learns_in_both_precisions(precision: str) -> None:
    digit = digits()
    net = UNet((1, 8, 8), 17, channels=(8, 16))
    model = VPSDE(Denoiser(net, "levels", digit.bins).calibrate(digit.train))
    config = settings(30, precision=precision, batch_size=64, lr=5e-3, eval_every=0, eval_size=64, ema=0.8)
    before = held_out(model.eval(), digit, config)
    done = fit(model, digit, config)
    assert 2.3 < before < 2.6  # the histogram's bound
    assert done.history[-1]["held_out"] < before - 0.05
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", shipped())
def test_shipped_configurations_build_and_start_near_the_histogram(name: str) -> None:
    config, _ = configure((), read_toml(name))
    data, model = build(config)
    _, again = build(config, data)
    assert same(model, again)
    if config.data.name == "digits" and config.model.name != "ddpm":
        assert held_out(model.eval(), data, config.train) == pytest.approx(2.45, abs=0.1)


def test_seconds_of_training_beat_the_histogram_by_far() -> None:
    """The whole chain on real images: 2.43 bits per dimension is the histogram, 2.12 is what this one reaches."""
    config, _ = configure((), read_toml("smoke"))
    data, model = build(config)
    done = fit(model, data, config.train)
    assert done.history[-1]["held_out"] < 2.22
    assert held_out(model, data, replace(config.train, eval_draws=16, seed=5)) < 2.18


# --- stopping and going on ---


def test_resuming_equals_not_stopping_bit_for_bit(tmp_path: Path) -> None:
    straight, stopped, resumed = Line(), Line(), Line()
    whole = fit(straight, data(), settings(25))
    run = new_run(tmp_path)
    with pytest.raises(Interrupted, match=r"stopped after step 10, as you asked; resuming goes on from .*run"):
        fit(stopped, data(), settings(25), run=run, callback=interrupt_at(10))
    assert not same(stopped, straight)
    assert same(load_weights(run / "model.safetensors", Line()), stopped)
    rest = fit(resumed, data(), settings(25), run=run, resume=True)
    assert same(resumed, straight)
    assert same(rest.model, whole.model)
    assert no_times(rest.history) == no_times(whole.history)
    assert rest.seconds > rest.history[1]["seconds"]


def test_resuming_a_real_model_is_bit_equal(tmp_path: Path) -> None:
    digit = digits()

    def model() -> nn.Module:
        with torch.random.fork_rng(()):
            torch.manual_seed(0)
            net = UNet((1, 8, 8), 17, channels=(8, 16), dropout=0.1)
        return VPSDE(Denoiser(net, "levels", digit.bins).calibrate(digit.train))

    a, b, c = model(), model(), model()
    config = settings(8, batch_size=32, eval_every=4, eval_size=16, eval_draws=1)
    fit(a, digit, config)
    with pytest.raises(Interrupted):
        fit(b, digit, config, run=(run := new_run(tmp_path)), callback=interrupt_at(4, signal.SIGTERM))
    fit(c, digit, config, run=run, resume=True)
    assert same(a, c)
    assert not same(a, b)


def test_training_can_be_extended_but_not_changed(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    fit(Line(), data(), settings(10), run=run)
    with pytest.raises(FileExistsError, match="holds a training state"):
        fit(Line(), data(), settings(20), run=run)
    with pytest.raises(ValueError, match=r"other settings: lr was 0\.002, is 0\.1, seed was 0, is 3"):
        fit(Line(), data(), settings(20, lr=0.1, seed=3), run=run, resume=True)
    with pytest.raises(ValueError, match="of another architecture"):
        fit(nn.Linear(2, 2), data(), settings(20), run=run, resume=True)
    more = fit(Line(), data(), settings(20, threads=2, eval_every=10), run=run, resume=True)
    assert more.steps == 20
    assert [row["step"] for row in more.history] == [5, 10, 20]
    again = fit(Line(), data(), settings(20), run=run, resume=True)  # nothing is left to do
    assert (again.steps, len(again.history)) == (20, 3)


def test_resuming_needs_a_whole_state(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"state\.pt"):
        fit(Line(), data(), settings(), run=run, resume=True)
    fit(Line(), data(), settings(), run=run)
    content = (run / "state.pt").read_bytes()
    (run / "state.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedFile, match=r"state\.pt is damaged"):
        fit(Line(), data(), settings(), run=run, resume=True)


KILLED = """
import sys, torch
sys.path[:0] = {path!r}
import test_train as t
t.fit(t.Line(), t.data(), t.settings(10**6, eval_every=5, checkpoint_seconds=0.0), run=t.Run.open({run!r}),
      callback=lambda row: print(row["step"], flush=True))
"""


def test_kill_minus_nine_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    here = Path(__file__)
    code = KILLED.format(path=[str(here.parent), str(here.parents[2])], run=str(run.path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 20:
            break
    process.kill()
    process.wait()
    process.stdout.close()
    saved = torch.load(run.verified("state.pt"), weights_only=True)["steps"]
    assert saved >= 14
    config = settings(10**6, eval_every=5)
    with pytest.raises(Interrupted):
        fit(resumed := Line(), data(), config, run=run, resume=True, callback=interrupt_at(5 * (saved // 5 + 2)))
    with pytest.raises(Interrupted):
        fit(straight := Line(), data(), config, callback=interrupt_at(5 * (saved // 5 + 2)))
    assert same(resumed, straight)


# --- what goes wrong ---


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    run, model = new_run(tmp_path), Line()
    model.poison_at = 8
    config = settings(20, eval_every=0, checkpoint_seconds=0.0)
    with pytest.raises(NonFiniteLoss, match=r"stopped at step 7: loss nan.*last good checkpoint is in") as caught:
        fit(model, data(), config, run=run)
    assert "\n" not in str(caught.value)
    saved = torch.load(run.verified("state.pt"), weights_only=True)
    assert saved["steps"] == 7
    assert all(bool(t.isfinite().all()) for part in ("model", "ema") for t in saved[part].values())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    fit(healed := Line(), data(), config, run=run, resume=True)
    fit(straight := Line(), data(), config)
    assert same(healed, straight)


def test_a_snapshot_never_saves_what_is_not_finite(tmp_path: Path) -> None:
    """On an accelerator the loss is looked at now and then; the file is protected at any time."""
    run = new_run(tmp_path)
    done = fit(Line(), data(), settings(), run=run)
    before = (run / "state.pt").read_bytes()
    done.advance(torch.tensor(float("inf")), 16, 1.0)
    with pytest.raises(NonFiniteLoss, match="diverged before step 13"):
        done.save(run)
    assert (run / "state.pt").read_bytes() == before


def test_a_full_disk_keeps_the_old_state_and_says_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)
    fit(Line(), data(), settings(10), run=run)
    before = {f.name: f.read_bytes() for f in run.path.iterdir() if f.is_file()}
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9, free=100))
        with pytest.raises(
            DiskFull, match=r"cannot write .*state\.pt: needs .*B, 100 B are free; the previous"
        ) as caught:
            fit(Line(), data(), settings(20), run=run, resume=True)
    assert caught.value.needed > 200
    assert {f.name: f.read_bytes() for f in run.path.iterdir() if f.is_file()} == before
    assert fit(Line(), data(), settings(20), run=run, resume=True).steps == 20


# --- weights ---


def test_weights_round_trip_and_refuse_what_is_wrong(tmp_path: Path) -> None:
    path, net = tmp_path / "w.safetensors", MLP((2,), width=8, depth=1)
    nn.init.normal_(net.readout.weight)
    save_weights(path, net, steps=3)
    assert same(load_weights(path, MLP((2,), width=8, depth=1)), net)
    with pytest.raises(ValueError, match=r"of another architecture: .*") as caught:
        load_weights(path, MLP((2,), width=9, depth=1))
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="there are no weights at"):
        load_weights(tmp_path / "none", net)
    for content in (b"", b"abc", path.read_bytes()[:-5]):
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match=r"w\.safetensors is damaged"):
            load_weights(path, net)


def test_the_average_is_never_slower_than_its_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        ema.module.weight.fill_(0.0)
        model.weight.fill_(1.0)
    ema.update(model, 10**6)
    assert float(ema.module.weight) == pytest.approx(0.1)


def test_decay_is_for_matrices_and_not_for_biases() -> None:
    matrices, rest = _adamw(nn.Linear(3, 2), settings(weight_decay=0.5)).param_groups
    assert [tuple(p.shape) for p in matrices["params"]] == [(2, 3)]
    assert [tuple(p.shape) for p in rest["params"]] == [(2,)]
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.5, 0.0)
