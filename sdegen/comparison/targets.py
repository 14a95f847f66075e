"""What solvers are compared on: an oracle, a trained run, anybody's model.

A target says which problem it is on a path, where a solve starts, and, if it knows, what the truth is:

    mixture16                      an oracle of :mod:`sdegen.oracles`: data of known distribution, diffused exactly
    runs/a                         a run folder of ``sdegen train``: the network is the problem, and its own converged
                                   solution the reference
    package.module:function        a function without arguments that returns a :class:`GaussianDiffusion`, a
                                   :class:`Denoiser`, an :class:`Oracle`, or ``(DiffusionProblem, event_shape)``

A model lives on a path of its own. On another one it is seen through the change of scale and clock that leaves logsnr,
x0 and eps unchanged, between the noise levels that both paths have.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from sdegen.files import sha256
from sdegen.oracles import ORACLES, Oracle
from sdegen.paths import CURVES, PATHS, GaussianPath
from solvers import SOLVERS, DiffusionProblem, standard_normal
from solvers.names import find, installed, load
from solvers.problem import Path

__all__ = ["HOME", "Target", "as_target", "find_target", "source"]

HOME = "vp-linear"
"""The path of an oracle where none is asked for."""


@dataclass(frozen=True)
class Target:
    """A problem on any path.

    Args:
        name: for the table.
        event_shape: of one sample.
        own: the path it lives on; None for an oracle, which lives on all.
        ask: path -> problem.
        exact: path -> the same problem in float64, as far as it can be had.
        dtype: of the state.
        spread: path -> standard deviation of the noise at t_max.
        decode: state at t_min -> data.
        truth: the data's distribution, where it is known.
        mark: changes when the problem does.
        about: in words.
    """

    name: str
    event_shape: tuple[int, ...]
    own: Any
    ask: Callable[[Any], DiffusionProblem]
    exact: Callable[[Any], DiffusionProblem]
    dtype: torch.dtype
    spread: Callable[[Path], float]
    decode: Callable[[Tensor], Tensor]
    truth: Oracle | None
    mark: str
    about: str

    def path_name(self, name: str) -> str:
        """What a path is called in the table: an oracle has none of its own, and is put on this one."""
        return HOME if name == "own" and self.own is None else name

    def path(self, name: str) -> Path:
        """A path by its name; "own" is the model's, or "vp-linear" for an oracle.

        The names of curves ("vp", "sub-vp", "ve", "flow") are for a model its own clock on that curve.

        Raises:
            ValueError: an unknown name, or no noise level in common.
        """
        if self.own is None:
            return find(self.path_name(name), PATHS, "path")()
        if name == "own":
            return self.own
        if name in CURVES and isinstance(self.own, GaussianPath):
            return self.own.on(name)
        other = find(name, PATHS, "path")()
        ends = self.own.logsnr(torch.tensor([self.own.t_min, self.own.t_max], dtype=torch.float64))
        low, high = (float(t) for t in other.time(ends))
        return replace(other, t_min=max(low, other.t_min), t_max=min(high, other.t_max))

    def start(self, path: Path, count: int, seed: int, device: str) -> Tensor:
        """Noises at t_max, (count, *event); the i-th is a function of (seed, i) and of the path's scale."""
        noise = standard_normal((count, *self.event_shape), seed, dtype=self.dtype, device=device)
        return self.spread(path) * noise


def find_target(name: str, known: Mapping[str, Any] | None = None, device: str = "cpu") -> Target:
    """A target by its name.

    Args:
        name: of an oracle, a run folder, "package.module:function", or a key of ``known``.
        known: objects by name, as :func:`as_target` takes them.
        device: where a model goes.

    Raises:
        ValueError: there is no such thing, or it is no problem for a solver; one line.
        FileNotFoundError, DamagedFile: of a run folder.
    """
    if known and name in known:
        return as_target(name, known[name], "", device)
    if name in ORACLES:
        return as_target(name, ORACLES[name](), name, device)
    if ":" in name:
        return as_target(name, _made(name), source(name), device)
    if File(name).exists() or "/" in name:
        from sdegen.building import restore
        from sdegen.runs import WEIGHTS, Run

        run = Run.open(name)
        _, model = restore(run, device=device, data=False)
        return as_target(name, model, sha256(run / WEIGHTS), device)
    everything: dict[str, Any] = {**ORACLES, **(known or {})}
    return find(name, everything, "target")


def as_target(name: str, thing: Any, mark: str, device: str = "cpu") -> Target:
    """An oracle, a model, a denoiser, or a problem with the shape of its samples, as a target.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(thing, Target):
        return thing
    if isinstance(thing, Oracle):
        return _of_oracle(name, thing, mark)
    from sdegen.denoiser import Denoiser
    from sdegen.models import VPSDE, GaussianDiffusion

    if isinstance(thing, Denoiser):
        thing = VPSDE(thing)
    if isinstance(thing, GaussianDiffusion):
        moved = thing.training or thing.device != torch.device(device)  # what is somebody's stays as it is
        return _of_model(name, copy.deepcopy(thing).to(device).eval() if moved else thing, mark)
    if isinstance(thing, tuple) and len(thing) == 2 and isinstance(thing[0], DiffusionProblem):
        return _of_problem(name, *thing, mark)
    kind = type(thing).__name__
    raise ValueError(
        f"{name}: a solver needs a diffusion, and this is a {kind}; allowed are an oracle, a GaussianDiffusion, a "
        "Denoiser, or (DiffusionProblem, event_shape)"
    )


def source(name: str) -> str:
    """The checksum of the file behind "package.module:thing", "file.py:thing" or an installed package's solver.

    When it is edited, its cells are measured again. Our own have none.
    """
    if name in SOLVERS:
        return ""
    place = installed()[name].value if name in installed() else name
    where = place if place.endswith(".py") else place.rpartition(":")[0]
    file = where if where.endswith(".py") else getattr(sys.modules.get(where), "__file__", None)
    return sha256(file) if file and File(file).exists() else ""


def _made(name: str) -> Any:
    thing = load(name, "target")
    return thing() if callable(thing) and not isinstance(thing, torch.nn.Module) else thing


def _of_oracle(name: str, truth: Oracle, mark: str) -> Target:
    return Target(
        name, truth.event_shape, None, truth.problem, truth.problem, torch.float64,
        _noise_level, lambda z: z, truth, mark, repr(truth),
    )  # fmt: skip


def _of_model(name: str, model: Any, mark: str) -> Target:
    twice: list[Any] = []  # the float64 copy, when it is asked for

    def exact(path: Path) -> DiffusionProblem:
        if not twice:
            twice.append(copy.deepcopy(model).double())
        return _seen(twice[0].problem(), path)

    def spread(path: Path) -> float:
        t = torch.tensor(path.t_max, dtype=torch.float64)
        return float(torch.hypot(path.alpha(t), path.sigma(t)))  # data of unit variance, as the model's prior has it

    parameters = sum(p.numel() for p in model.parameters())
    return Target(
        name, tuple(model.event_shape), model.path, lambda path: _seen(model.problem(), path), exact, model.dtype,
        spread, lambda z: model.decode(z).mode, None, mark, f"{type(model).__name__} of {parameters:,} parameters",
    )  # fmt: skip


def _of_problem(name: str, problem: DiffusionProblem, event_shape: Any, mark: str) -> Target:
    def ask(path: Path) -> DiffusionProblem:
        return _seen(problem, path)

    shape = tuple(int(size) for size in event_shape)
    return Target(
        name, shape, problem.path, ask, ask, torch.get_default_dtype(), _noise_level, lambda z: z, None, mark,
        f"a problem on {problem.path!r}",
    )  # fmt: skip


def _seen(problem: DiffusionProblem, path: Path) -> DiffusionProblem:
    return problem if path == problem.path else problem.rescaled(path)


def _noise_level(path: Path) -> float:
    return float(path.sigma(torch.tensor(path.t_max, dtype=torch.float64)))
