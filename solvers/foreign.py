"""Somebody else's sampler, imported as a table by asking it the right questions.

A sampler of another library is run on symbols (:mod:`solvers.trace`) with its own code, its own schedule and its own
start-up and end rules, while this module translates what it asks the network, and in which scaling, into the terms of a
path here. What comes out is a :class:`~solvers.tables.Table` like any other: its coefficients can be compared number by
number with those of ours, and it can be replayed without the library.

    table = import_sampler(KDiffusion(k_diffusion.sampling.sample_dpmpp_2m, sigmas), path)
    np.abs(table.result() - trace("dpmpp_2m", path, ts).result()).max()

In k-diffusion the state is y = x / alpha, its noise level sigma / alpha, and the model returns x0. In diffusers a
scheduler says in which scaling it works and what it wants predicted. Noise that is drawn from the global random state
is caught and becomes a noise of the table, an independent one; k-diffusion's ``noise_sampler`` is handed our Brownian
motion. Coefficients are as exact as the library computes them: 1e-7 where it casts to float32.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, isinf, nan
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from solvers.noise import Noise
from solvers.problem import Path, Predict
from solvers.tables import Table
from solvers.trace import Node, record

__all__ = ["Diffusers", "Foreign", "KDiffusion", "import_sampler"]


class Foreign(Protocol):
    """A sampler of another library, translated."""

    @property
    def name(self) -> str:
        """What it is called there."""
        ...

    @property
    def rtol(self) -> float:
        """How exactly it computes."""
        ...

    def start(self, path: Path) -> float:
        """The time on ``path`` at which it begins."""
        ...

    def run(self, path: Path, predict: Predict, x: Tensor, noise: Noise, node: Node) -> Tensor:
        """Sample, with x and every evaluation in the scaling of ``path``."""
        ...


def import_sampler(sampler: Foreign, path: Path) -> Table:
    """The table of a sampler of another library, on a path of ours.

    Args:
        sampler: a :class:`KDiffusion` or a :class:`Diffusers`, or your own translation.
        path: where it shall be asked: any, since at equal logsnr all paths differ by a factor only.

    Returns:
        Its table. A noise that it drew from the global random state has no interval: replay it with noises of your own.

    Raises:
        ValueError: when it is not linear: adaptive steps, clipping, thresholding.
    """

    def program(predict: Predict, x: Tensor, noise: Noise, node: Node) -> Tensor:
        with _Caught(x, noise):
            return sampler.run(path, predict, x, noise, node)

    return record(program, path, name=sampler.name, start=sampler.start(path), rtol=sampler.rtol)


class _Caught(TorchFunctionMode):
    """Random numbers of the state's shape are noises of the table."""

    def __init__(self, like: Tensor, noise: Noise) -> None:
        super().__init__()
        self.shape, self.noise = like.shape, noise

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.randn, torch.randn_like):
            size = args or tuple((kwargs or {}).get(name) for name in ("size", "input"))
            first = next(item for item in size if item is not None)
            shape = first.shape if isinstance(first, Tensor) else size if isinstance(first, int) else first
            if tuple(shape) == tuple(self.shape):
                return self.noise(torch.tensor(nan), torch.tensor(nan))
        return func(*args, **(kwargs or {}))


def _time(path: Path, noise_level: Tensor) -> Tensor:
    """The time at which sigma / alpha is ``noise_level``; -inf for none, which may lie beyond what a path can say."""
    level = noise_level.as_subclass(Tensor).detach().reshape(-1)[0].double()
    return path.time(-2 * level.log()) if float(level) > 0 else torch.tensor(-inf, dtype=torch.float64)


def _asked(predict: Predict, y: Tensor, factor: Tensor | float, t: Tensor) -> Any:
    """The prediction at factor * y, after which ``y`` is what was asked about, over the factor.

    The last is no news for numbers; a symbol, though, is from then on written in terms of the point that was evaluated.
    """
    z = y * factor
    prediction = predict(z, t)
    y.copy_(z / factor)
    return prediction


@dataclass(frozen=True, eq=False)
class KDiffusion:
    """A sampler ``function(model, x, sigmas, ...)`` in the style of k-diffusion, where ``model(x, sigma)`` is x0.

    Args:
        function: the sampler. Its ``callback``, ``disable`` and ``noise_sampler`` are used if it has them.
        sigmas: falling noise levels sigma / alpha, (N + 1,); a last one of 0 means the data. Use float64.
        options: more arguments for it.

    Reference: https://github.com/crowsonkb/k-diffusion, sampling.py.
    """

    function: Callable[..., Tensor]
    sigmas: Tensor
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rtol: float = 1e-9

    @property
    def name(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"{self.function.__name__}({len(self.sigmas) - 1} steps{options})"

    def start(self, path: Path) -> float:
        return float(_time(path, self.sigmas[0]))

    def run(self, path: Path, predict: Predict, x: Tensor, noise: Noise, node: Node) -> Tensor:
        def scale(t: Tensor) -> Tensor | float:
            return 1.0 if isinf(t) else path.alpha(t)

        def model(y: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            t = _time(path, sigma)
            return _asked(predict, y, scale(t), t).x0

        def callback(seen: dict[str, Any]) -> None:
            if seen["i"] > 0:
                t = _time(path, seen.get("sigma_hat", seen["sigma"]))
                node(seen["x"] * scale(t), t, None)

        def noise_sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
            return noise(-sigma.log(), -sigma_next.log())

        ours = {"callback": callback, "disable": True, "noise_sampler": noise_sampler}
        known = inspect.signature(self.function).parameters
        extra = {**{key: value for key, value in ours.items() if key in known}, **self.options}
        y = self.function(model, x / scale(_time(path, self.sigmas[0])), self.sigmas, **extra)
        end = _time(path, self.sigmas[-1])
        out = y * scale(end)
        node(out, end, None)
        return out


@dataclass(frozen=True, eq=False)
class Diffusers:
    """A scheduler of the library diffusers, driven by its usual loop.

    Args:
        scheduler: with ``alphas_cumprod`` (trained on a table of betas), fresh or used; it is copied.
        steps: for its ``set_timesteps``.

    Reference: von Platen et al. 2022, https://github.com/huggingface/diffusers.
    """

    scheduler: Any
    steps: int
    rtol: float = 1e-4

    @property
    def name(self) -> str:
        return f"{type(self.scheduler).__name__}({self.steps} steps)"

    def start(self, path: Path) -> float:
        scheduler = self._ready()
        return float(_time(path, self._level(scheduler, 0)))

    def run(self, path: Path, predict: Predict, x: Tensor, noise: Noise, node: Node) -> Tensor:
        scheduler = self._ready()
        labels = scheduler.timesteps
        scaled = float(scheduler.init_noise_sigma) != 1.0  # it works on y = x / alpha, and not on the circle

        def factor(t: Tensor) -> Tensor:
            if isinf(t):
                return torch.ones((), dtype=torch.float64)
            return path.alpha(t) if scaled else (path.alpha(t).square() + path.sigma(t).square()).sqrt()

        y = out = x / factor(torch.tensor(self.start(path)).double())
        for i, label in enumerate(labels):
            t = _time(path, self._level(scheduler, i))
            scheduler.scale_model_input(y, label)  # some schedulers insist
            x0, eps = _asked(predict, y, factor(t), t)
            y = scheduler.step(self._output(x0, eps, t, path), label, y).prev_sample
            t = _time(path, self._level(scheduler, i + 1))
            out = y * factor(t)
            node(out, t, vars(scheduler))
        return out

    def _ready(self) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps)
        return scheduler

    def _level(self, scheduler: Any, i: int) -> Tensor:
        """sigma / alpha at the i-th evaluation; after the last one, at the end."""
        if hasattr(scheduler, "sigmas") and not hasattr(scheduler, "sigmas_interpol"):
            return scheduler.sigmas[i].double()
        kept = scheduler.alphas_cumprod.double()
        table = ((1 - kept) / kept).sqrt().log()
        if i == len(scheduler.timesteps):
            end = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).double()
            return ((1 - end) / end).sqrt()
        label = scheduler.timesteps[i].double()
        low = int(label.floor().clamp(max=len(table) - 2))
        return torch.lerp(table[low], table[low + 1], label - low).exp()

    def _output(self, x0: Tensor, eps: Tensor, t: Tensor, path: Path) -> Tensor:
        """What the scheduler takes for the output of the network."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return eps
        if kind == "sample":
            return x0
        if kind == "v_prediction":
            norm = (path.alpha(t).square() + path.sigma(t).square()).sqrt()
            return eps * (path.alpha(t) / norm) - x0 * (path.sigma(t) / norm)
        raise ValueError(f"{self.name} wants {kind!r} predicted, known are epsilon, sample and v_prediction")
