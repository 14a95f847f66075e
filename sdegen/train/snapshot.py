"""A training run at one moment: what it needs to go on, and its history."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sdegen.results import write_csv
from sdegen.runs import METRICS, STATE, WEIGHTS, Run
from sdegen.train.checkpoint import load_module, load_state, size_of, write_state, write_weights
from sdegen.train.config import TrainConfig
from sdegen.train.ema import EMA

__all__ = ["NonFiniteLoss", "Snapshot"]


class NonFiniteLoss(ArithmeticError):
    """The loss or its gradient became NaN or infinite. One line; the last good checkpoint is kept."""


@dataclass
class Snapshot:
    """A training run at one moment.

    Attributes:
        model: the weights that the optimiser moves.
        ema: their average.
        optimizer: with its moments.
        config: the settings.
        steps: optimiser steps done.
        seconds: wall-clock seconds spent, evaluations included.
        history: rows of metrics.
    """

    model: nn.Module = field(repr=False)
    ema: EMA[Any] = field(repr=False)
    optimizer: torch.optim.Optimizer = field(repr=False)
    config: TrainConfig
    steps: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    # since the last row: sum of losses (kept on the device, so that adding waits for nothing), examples, first moment
    _loss: Tensor | float = field(default=0.0, repr=False)
    _examples: int = field(default=0, repr=False)
    _since: float = field(default=0.0, repr=False)

    @property
    def spent(self) -> float:
        """Share of the budget that is used up."""
        return self.config.spent(self.steps, self.seconds)

    def advance(self, loss: Tensor, examples: int, seconds: float) -> None:
        """One more step is done, ``seconds`` after the beginning."""
        self._loss = self._loss + loss.detach()
        self._examples += examples
        self.steps, self.seconds = self.steps + 1, seconds

    def means(self) -> dict[str, float]:
        """Loss and examples per second since the last row."""
        steps = self.steps - int(self.history[-1]["step"] if self.history else 0)
        return {
            "loss": float(self._loss) / max(steps, 1),
            "per_second": self._examples / max(self.seconds - self._since, 1e-9),
        }

    def record(self, seconds: float, **measured: float) -> dict[str, float]:
        """Close a row of metrics with what was ``measured``, which took until ``seconds``."""
        row = {"step": self.steps, "seconds": self.seconds, **self.means(), **measured}
        self.history.append(row)
        self._loss, self._examples, self._since = 0.0, 0, seconds
        self.seconds = seconds
        return row

    def line(self) -> str:
        """How it goes, for the progress bar."""
        means = self.means() if self._examples else self.history[-1]
        text = f"step {self.steps}, loss {means['loss']:.3f}, {means['per_second']:.0f}/s"
        return f"{text}, held out {self.history[-1]['held_out']:.3f} bits/dim" if self.history else text

    def save(self, run: Run) -> None:
        """Write state, averaged weights and metrics into a run folder.

        Raises:
            NonFiniteLoss: there is nothing good to write; the last checkpoint stays.
            DiskFull: no room; the last checkpoint stays.
        """
        if not math.isfinite(float(self._loss)):
            raise NonFiniteLoss(f"training diverged before step {self.steps}: the loss is {float(self._loss)}")
        state = {
            "config": asdict(self.config),
            "steps": self.steps,
            "seconds": self.seconds,
            "history": self.history,
            "since": [float(self._loss), self._examples, self._since],
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with run.writing(STATE, needed=size_of(state)) as path:
            write_state(path, state)
        with run.writing(WEIGHTS, needed=size_of(state["ema"])) as path:
            write_weights(path, self.ema.module, steps=self.steps)
        write_csv(run / METRICS, self.history)

    def restore(self, run: Run) -> None:
        """Go back to the state in a run folder.

        Raises:
            FileNotFoundError: there is none.
            DamagedFile: it is not what was written.
            ValueError: it is of another architecture or was trained with other settings.
        """
        path = run.verified(STATE)
        state = load_state(path, next(self.model.parameters()).device)
        begun = TrainConfig(**{**state["config"], "betas": tuple(state["config"]["betas"])})
        if changed := self.config.changed(begun):
            pairs = ", ".join(f"{n} was {getattr(begun, n)}, is {getattr(self.config, n)}" for n in changed)
            raise ValueError(f"{run.path} was trained with other settings: {pairs}")
        load_module(self.model, state["model"], path)
        load_module(self.ema.module, state["ema"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.seconds, self.history = state["steps"], state["seconds"], state["history"]
        self._loss, self._examples, self._since = state["since"]
