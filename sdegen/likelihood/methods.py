"""The ways to compute a likelihood, by name: what :func:`sdegen.evaluate` and the command line are asked for.

=====================  ===============================================================================================
``bound``              the variational bound: the model's own; ``bound(T=10)`` as a DDPM with so many levels,
                       ``bound(T=inf)`` with all of them, the same weights
``ode``                the probability-flow ODE; ``ode(tol=1e-5, probes=4)``, ``ode(solver=heun, steps=40)``,
                       ``ode(exact=true)``
``iwae``               the importance-weighted bound of a VAE, ``iwae(K=5000)``
``uniform``            baselines, exact: all levels alike,
``histogram``          one histogram for all coordinates,
``pixel-histogram``    one for each,
``autoregressive``     and every coordinate given those before it, by a masked network trained on the spot
=====================  ===============================================================================================

A method is a name and options. The options of a name are the keyword arguments of the function in :data:`METHODS` that
makes its estimator, so that they are written once.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from sdegen.bins import Bins
from sdegen.data import Dataset
from sdegen.likelihood.bound import bound
from sdegen.likelihood.importance import importance
from sdegen.likelihood.ode import ode_likelihood
from sdegen.likelihood.report import LikelihoodReport
from sdegen.likelihood.scoring import offset
from sdegen.likelihood.trace import Exact, Hutchinson
from sdegen.models import (
    VAE,
    GaussianDiffusion,
    LatentVariableModel,
    autoregressive,
    global_histogram,
    pixel_histogram,
    uniform,
)
from sdegen.parsing import nearest
from solvers import resolve

__all__ = ["METHODS", "Estimator", "Method"]


@dataclass(frozen=True)
class Estimator:
    """A method on a model, ready to be given data.

    Args:
        run: ``run(x, cond, samples=, progress=)`` -> report, and unless it is exact ``seed``, ``target_se`` (nats),
            ``max_nfe`` and ``bin_width`` too. ``samples`` are the numbers of the examples, which key their noise.
        model: the model that is scored; None for a baseline.
        trained_on: what a baseline learns from.
    """

    run: Callable[..., LikelihoodReport]
    model: LatentVariableModel | None = None
    trained_on: Tensor | None = None

    @property
    def exact(self) -> bool:
        """Whether there is no noise, and so nothing to repeat."""
        return self.model is None or self.model.exact

    @property
    def depends_on(self) -> tuple[Any, ...]:
        """What the number depends on besides the method and the data that are scored."""
        return (self.model, self.trained_on)

    def nats_per_unit(self, bin_width: float | None) -> float:
        """Nats in a unit of the target: one bit per dimension where the number has bits, else one nat."""
        if self.model is None or offset(self.model, bin_width) is None:
            return 1.0
        return self.model.dims * math.log(2)


@dataclass(frozen=True)
class Method:
    """A name in :data:`METHODS` and options.

    >>> Method.parse("bound(T=10, draws=4)")
    Method(name='bound', options={'T': 10, 'draws': 4})
    >>> str(Method.parse("ode( solver = heun, steps=40 )"))
    'ode(solver=heun, steps=40)'
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read ``name`` or ``name(option=value, ...)``; words are text, ``inf`` and ``true`` mean themselves.

        Raises:
            ValueError: no such method or option; says which there are.
        """
        found = re.fullmatch(r"\s*([\w -]+?)\s*(?:\((.*)\))?\s*", text)
        if not found:
            raise ValueError(f"{text!r} is no method: write a name, or name(option=value, ...)")
        name, inside = found[1], found[2] or ""
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}{nearest(name, METHODS)}")
        try:
            call = ast.parse(f"f({inside})", mode="eval").body
            if not isinstance(call, ast.Call) or call.args:
                raise ValueError
            options = {str(word.arg): _value(word.value) for word in call.keywords}
        except (SyntaxError, ValueError):
            raise ValueError(f"{text!r}: options are written {name}(option=value, ...)") from None
        known = _options(name)
        for option in options:
            if option not in known:
                has = f"{name} has {', '.join(known) or 'no options'}"
                raise ValueError(f"unknown option {option!r} of {name}{nearest(option, known, has)}")
        return cls(name, options)

    def on(self, model: LatentVariableModel, data: Dataset | None) -> Estimator:
        """The estimator.

        Args:
            model: what is scored.
            data: where baselines learn; None where there is no training data.

        Raises:
            ValueError: the method is not for this model, or a value is wrong.
        """
        return METHODS[self.name](model, data, **self.options)

    @property
    def full(self) -> str:
        """The method with the defaults written out: two that say the same compute the same."""
        return _written(self.name, {**_options(self.name), **self.options})

    def __str__(self) -> str:
        return _written(self.name, self.options)


def _bound(
    model: LatentVariableModel,
    data: Dataset | None,
    *,
    T: float | None = None,
    grid: str = "uniform",
    variance: str = "posterior",
    draws: int = 16,
    repeats: int = 2,
) -> Estimator:
    """Args: T levels (inf for all; by default the model's own) on a grid; noise levels per repeat; repeats."""
    if T is not None:
        model = _diffusion(model, "bound(T=...)")
        if math.inf != T and (int(T) != T or T < 1):
            raise ValueError(f"bound: T is a whole number of levels, at least 1, or inf, not {T}")
        model = model.continuous() if math.inf == T else model.discretize(int(T), grid=grid, variance=variance)
    _countable(model, data)

    def run(x: Tensor, cond: Tensor | None = None, **rest: Any) -> LikelihoodReport:
        return bound(model, x, cond, draws=draws, repeats=repeats, **_taken(bound, rest))

    return Estimator(run, model)


def _ode(
    model: LatentVariableModel,
    data: Dataset | None,
    *,
    solver: str = "dopri54",
    tol: float | None = None,
    steps: int | None = None,
    draws: int = 2,
    probes: int | None = None,
    exact: bool = False,
) -> Estimator:
    """Args: solver with its tolerance or steps; z_0 per datum of grey levels; probes of the trace, or the exact one."""
    model = _diffusion(model, "ode").continuous()
    method = resolve(solver)
    if method.stochastic:
        raise ValueError(f"ode: {solver} draws noise: the ODE needs a solver without")
    if (method.nfe_per_step == 0) == (steps is not None):
        kind, want = ("chooses its own", "tol, not steps") if steps else ("takes fixed", "steps")
        raise ValueError(f"ode: {solver} {kind} steps: give {want}")
    if exact and model.dims > Exact().limit:
        raise ValueError(
            f"ode: the exact trace is for at most {Exact().limit} coordinates, not {model.dims}: use probes"
        )
    budget = {"steps": steps} if steps else {"tol": tol or 1e-4}

    _countable(model, data)

    def run(x: Tensor, cond: Tensor | None = None, *, seed: int = 0, **rest: Any) -> LikelihoodReport:
        trace = Exact() if exact else Hutchinson(probes or (1 if model.discrete else 2), seed)
        z0 = draws if model.discrete else 1
        return ode_likelihood(
            model, x, cond, solver=solver, trace=trace, draws=z0, seed=seed, **budget, **_taken(ode_likelihood, rest)
        )

    return Estimator(run, model)


def _iwae(model: LatentVariableModel, data: Dataset | None, *, K: int = 100, repeats: int = 2) -> Estimator:
    """Args: K latents per datum and repeat; repeats."""
    if not isinstance(model, VAE):
        raise ValueError(f"iwae is for a VAE, and this model is a {type(model).__name__}")

    def run(x: Tensor, cond: Tensor | None = None, **rest: Any) -> LikelihoodReport:
        return importance(model, x, K, cond, repeats=repeats, **_taken(importance, rest))

    return Estimator(run, model)


def _baseline(make: Callable[[], LatentVariableModel], x: Tensor) -> Estimator:
    """A model made of training data when it is first asked for: a number that is known needs none."""
    made = functools.cache(make)

    def run(x: Tensor, cond: Tensor | None = None, **rest: Any) -> LikelihoodReport:
        return bound(made(), x, draws=1, repeats=1, **_taken(bound, rest))

    return Estimator(run, trained_on=x)


def _uniform(model: LatentVariableModel, data: Dataset | None) -> Estimator:
    x, bins = _levels(data, "uniform")
    return _baseline(lambda: uniform(x.shape[1:], bins), x)


def _histogram(model: LatentVariableModel, data: Dataset | None) -> Estimator:
    x, bins = _levels(data, "histogram")
    return _baseline(lambda: global_histogram(x, bins), x)


def _pixel_histogram(model: LatentVariableModel, data: Dataset | None, *, pseudocount: float = 1.0) -> Estimator:
    x, bins = _levels(data, "pixel-histogram")
    return _baseline(lambda: pixel_histogram(x, bins, pseudocount=pseudocount), x)


def _autoregressive(
    model: LatentVariableModel, data: Dataset | None, *, width: int = 512, steps: int = 600, seed: int = 0
) -> Estimator:
    x, bins = _levels(data, "autoregressive")
    return _baseline(lambda: autoregressive(x, bins, width=width, steps=steps, seed=seed), x)


METHODS: dict[str, Callable[..., Estimator]] = {
    "bound": _bound,
    "ode": _ode,
    "iwae": _iwae,
    "uniform": _uniform,
    "histogram": _histogram,
    "pixel-histogram": _pixel_histogram,
    "autoregressive": _autoregressive,
}
"""Name -> ``make(model, data, **options)`` -> :class:`Estimator`."""


def _diffusion(model: LatentVariableModel, what: str) -> GaussianDiffusion:
    if not isinstance(model, GaussianDiffusion):
        raise ValueError(f"{what} is for diffusions, and this model is a {type(model).__name__}")
    return model


def _levels(data: Dataset | None, name: str) -> tuple[Tensor, Bins]:
    """Training data and grey levels, for a baseline."""
    if data is None or data.bins is None:
        raise ValueError(f"{name} is a baseline of grey levels: it needs a data set that has them, to learn from")
    return data.train, data.bins


def _countable(model: LatentVariableModel, data: Dataset | None) -> None:
    """Refuse a density of data that are grey levels: at a single point it can be anything."""
    if data is not None and data.bins is not None and not model.discrete:
        raise ValueError(
            f"{data.name} has grey levels and this model's decoder is a density, which gives a point no bits/dim: "
            "use a discrete decoder, such as softmax"
        )


def _taken(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k in inspect.signature(function).parameters}


def _options(name: str) -> dict[str, Any]:
    """The options of a method with their defaults."""
    parameters = inspect.signature(METHODS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return {"inf": math.inf, "true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    return ast.literal_eval(node)


def _written(name: str, options: Mapping[str, Any]) -> str:
    inside = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{name}({inside})" if inside else name
