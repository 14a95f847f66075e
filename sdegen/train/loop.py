"""The training loop: any model with a ``loss``, on any data set, on one device.

A step draws a batch, the model's own noise and dropout, and moves the weights; an average of the weights is what is
evaluated, kept and given back. The randomness of step n is a function of (seed, n) alone. So there is no random state
to save, a resumed run equals an uninterrupted one bit for bit on the CPU, and the caller's global state is untouched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from sdegen.data import Dataset
from sdegen.runs import STATE, Run
from sdegen.train.augment import augmented
from sdegen.train.batches import batch, distorted_class, labels, seed_of
from sdegen.train.config import TrainConfig
from sdegen.train.ema import EMA
from sdegen.train.held_out import held_out
from sdegen.train.interrupt import cpu_threads, own_randomness, stoppable
from sdegen.train.snapshot import NonFiniteLoss, Snapshot

__all__ = ["Interrupted", "fit"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a termination signal ended training after a whole step. One line that says where the state is."""


def fit(
    model: Any,
    dataset: Dataset,
    config: TrainConfig,
    *,
    run: Run | None = None,
    resume: bool = False,
    callback: Callable[[dict[str, float]], None] | None = None,
    progress: bool | None = None,
) -> Snapshot:
    """Train ``model`` and leave the averaged weights in it.

    Args:
        model: a module with ``loss(x, cond, generator=)`` -> 0-dim and ``bound(x, cond, u, generator)``, such as
            every :class:`sdegen.models.LatentVariableModel`; its device is used.
        dataset: what to train on and, held out, to be judged by.
        config: the settings.
        run: a folder for checkpoints, metrics and weights; None keeps nothing on disk.
        resume: go on from the state in ``run``.
        callback: sees every row of metrics: step, seconds, loss, held_out (bits per dimension), lr, grad_norm and
            per_second (examples).
        progress: show a bar; None shows one on terminals only.

    Returns:
        The steps and seconds spent, and ``history``, the rows of metrics.

    Raises:
        NonFiniteLoss: training diverged.
        Interrupted: somebody pressed Ctrl-C; a checkpoint is written and the averaged weights are in the model.
        DiskFull: a checkpoint did not fit; the previous one is kept.
        FileExistsError: ``run`` holds a training state, and ``resume`` was not asked for.
        ValueError: ``resume`` with other settings than at the beginning.
    """
    device = next(model.parameters()).device
    data, bfloat16 = dataset.to(device), config.autocast(device)
    now = Snapshot(model, EMA(model, config.ema), _adamw(model, config), config)
    if run is not None and resume:
        now.restore(run)
    elif run is not None and (run / STATE).exists():
        raise FileExistsError(f"{run.path} holds a training state: resume it, or choose another folder")
    weights, generator = list(model.parameters()), torch.Generator(device)
    look_every = 1 if device.type == "cpu" else 20  # reading a number from an accelerator waits for all its work
    begun, saved = time.perf_counter() - now.seconds, time.perf_counter()

    with (
        tqdm(total=1.0, initial=now.spent, disable=None if progress is None else not progress, bar_format=_BAR) as bar,
        stoppable() as stop,
        cpu_threads(config.cpu_threads()),
        own_randomness(device),
    ):
        while now.spent < 1 and not stop.is_set():
            model.train()
            n, lr = now.steps, config.learning_rate(now.steps, now.spent)
            rows = batch(len(data.train), config.batch_size, config.seed, n).to(device)
            torch.manual_seed(seed_of(config.seed, 0, n))
            generator.manual_seed(seed_of(config.seed, 1, n))
            x, cond = data.train[rows], labels(data.train_cond, rows, config)
            if config.augment:
                x, cond = augmented(x, cond, config.augment, distorted_class(data, config), data.bins, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss = model.loss(x, cond, generator=generator)
            now.optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(weights, config.clip)
            look = (n + 1) % look_every == 0
            if look and not bool(torch.isfinite(loss + norm)):
                raise NonFiniteLoss(_diverged(n, loss.item(), float(norm), lr, run))
            for group in now.optimizer.param_groups:
                group["lr"] = lr
            now.optimizer.step()
            now.ema.update(model, n)

            now.advance(loss, len(rows), time.perf_counter() - begun)
            if now.spent == 1 or (config.eval_every and now.steps % config.eval_every == 0):
                bits = held_out(now.ema.module, data, config)
                row = now.record(time.perf_counter() - begun, held_out=bits, lr=lr, grad_norm=float(norm))
                if callback is not None:
                    callback(row)
            if look:
                bar.set_postfix_str(now.line(), refresh=False)
                bar.update(now.spent - bar.n)
            if run is not None and look and time.perf_counter() - saved > config.checkpoint_seconds:
                now.save(run)
                saved = time.perf_counter()
    if run is not None:
        now.save(run)
    now.ema.copy_to(model)
    model.eval()
    if now.spent < 1:
        where = f"; resuming goes on from {run.path}" if run is not None else ""
        raise Interrupted(f"training stopped after step {now.steps}, as you asked{where}")
    return now


_BAR = "{percentage:3.0f}% |{bar:24}| {elapsed} spent, {remaining} left{postfix}"


def _adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices and filters only: biases and gains have no scale to lose."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)


def _diverged(step: int, loss: float, norm: float, lr: float, run: Run | None) -> str:
    kept = f"; the last good checkpoint is in {run.path}" if run is not None and (run / STATE).exists() else ""
    return f"training stopped at step {step}: loss {loss:g}, gradient {norm:g} (try lr below {lr:.2g}){kept}"
