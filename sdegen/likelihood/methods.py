"""The ways to compute a likelihood, by name: what :func:`sdegen.evaluate` and the command line are asked for.

=====================  ===============================================================================================
``bound``              the variational bound: the model's own; ``bound(T=10)`` as a DDPM with so many levels,
                       ``bound(T=inf)`` with all of them, the same weights
``ode``                the probability-flow ODE; ``ode(tol=1e-5, probes=4)``, ``ode(solver=heun, steps=40)``,
                       ``ode(exact=true)``, and of grey levels with a density decoder ``ode(dequantizer=uniform)``
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
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sdegen.bins import Bins
from sdegen.data import Dataset
from sdegen.likelihood.bound import bound
from sdegen.likelihood.control import LinearGaussian
from sdegen.likelihood.dequantize import DEQUANTIZERS, Dequantizer
from sdegen.likelihood.importance import importance
from sdegen.likelihood.log_density import Route
from sdegen.likelihood.ode import ode_likelihood
from sdegen.likelihood.report import LikelihoodReport
from sdegen.likelihood.scoring import offset
from sdegen.likelihood.trace import Exact, Hutchinson
from sdegen.likelihood.variate import variate_for
from sdegen.models import (
    VAE,
    Autoregressive,
    GaussianDiffusion,
    LatentVariableModel,
    global_histogram,
    pixel_histogram,
    uniform,
)
from sdegen.parsing import nearest
from sdegen.train import TrainConfig, fit
from solvers.solve import find

__all__ = ["METHODS", "Estimator", "Method", "countable"]


@dataclass(frozen=True)
class Estimator:
    """A method on a model, ready to be given data.

    Args:
        run: ``run(x, cond, samples=, progress=)`` -> report, and unless it is exact ``seed``, ``target_se`` (nats),
            ``max_nfe``, ``bin_width`` and ``learned`` too. ``samples`` are the numbers of the examples, which key their
            noise.
        model: the model that is scored; None for a baseline.
        trained_on: what a baseline learns from.
        learn: ``learn(x, cond, seed)`` -> ``learned``, what ``run`` needs to know of all data so that it gives for a
            part of them what it gives for the whole: a control variate.
    """

    run: Callable[..., LikelihoodReport]
    model: LatentVariableModel | None = None
    trained_on: Tensor | None = None
    learn: Callable[[Tensor, Tensor | None, int], Any] = lambda x, cond, seed: None

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
    countable(model, data)

    def learn(x: Tensor, cond: Tensor | None, seed: int) -> tuple[Any, float]:
        variate = variate_for("auto", model, x, cond, draws * repeats, seed)
        return variate, 0.0 if variate is None else variate.calls / len(x)

    def run(
        x: Tensor,
        cond: Tensor | None = None,
        *,
        learned: tuple[Any, float] = ("auto", 0.0),
        max_nfe: int | None = None,
        **rest: Any,
    ) -> LikelihoodReport:
        control, calls = learned  # the calls of the pilot, for each example
        most = None if max_nfe is None else int(max_nfe - calls)
        found = bound(model, x, cond, draws=draws, repeats=repeats, control=control, max_nfe=most, **rest)
        return replace(found, forward=found.forward + calls)

    return Estimator(run, model, learn=learn)


def _ode(
    model: LatentVariableModel,
    data: Dataset | None,
    *,
    solver: str | None = None,
    tol: float | None = None,
    steps: int | None = None,
    variable: str = "flow",
    draws: int | None = None,
    K: int = 1,
    probes: int | None = None,
    exact: bool = False,
    dequantizer: str | None = None,
) -> Estimator:
    """Args: solver, its tolerance or steps, its clock; z_0 per datum, weighted in groups of K; probes, or exact."""
    model = _diffusion(model, "ode").continuous()
    if exact and model.dims > Exact().limit:
        raise ValueError(
            f"ode: the exact trace of {model.dims} coordinates costs {model.dims} products per evaluation, and "
            f"the limit is {Exact().limit}: use probes"
        )
    spread = _dequantizer(dequantizer, model, data)
    trace = Exact() if exact else None if probes is None else Hutchinson(probes)
    route = {"solver": solver, "tol": tol, "steps": steps, "variable": variable}
    Route.of(model.path, trace or Hutchinson(), **route)  # says what does not go together

    def learn(x: Tensor, cond: Tensor | None, seed: int) -> Any:
        return None if exact else LinearGaussian.fit(x)

    def run(
        x: Tensor, cond: Tensor | None = None, *, learned: Any = "auto", seed: int = 0, **rest: Any
    ) -> LikelihoodReport:
        given = replace(trace, seed=seed) if isinstance(trace, Hutchinson) else trace
        return ode_likelihood(
            model,
            x,
            cond,
            trace=given,
            control=learned,
            dequantizer=spread,
            draws=draws,
            K=K,
            seed=seed,
            **route,
            **rest,
        )

    return Estimator(run, model, learn=learn)


def _iwae(
    model: LatentVariableModel,
    data: Dataset | None,
    *,
    K: int = 100,
    repeats: int = 2,
    debias: bool = False,
    dequantizer: str | None = None,
) -> Estimator:
    """Args: K latents per datum and repeat; repeats; the jackknife's estimate in place of the bound."""
    if not isinstance(model, VAE):
        raise ValueError(f"iwae is for a VAE, and this model is a {type(model).__name__}")
    spread = _dequantizer(dequantizer, model, data)

    def run(x: Tensor, cond: Tensor | None = None, *, learned: None = None, **rest: Any) -> LikelihoodReport:
        return importance(model, x, K, cond, repeats=repeats, debias=debias, dequantizer=spread, **rest)

    return Estimator(run, model)


def _baseline(make: Callable[[], LatentVariableModel], x: Tensor) -> Estimator:
    """A model made of training data when it is first asked for: a number that is known needs none."""
    made = functools.cache(make)

    def run(x: Tensor, cond: Tensor | None = None, **rest: Any) -> LikelihoodReport:
        return bound(made(), x, **rest)

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
    model: LatentVariableModel, data: Dataset | None, *, width: int = 512, steps: int = 800, seed: int = 0
) -> Estimator:
    x, bins = _levels(data, "autoregressive")

    def trained() -> Autoregressive:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            made = Autoregressive(bins.log_histogram(x), bins, width=width)
        settings = TrainConfig(
            steps=steps, lr=3e-3, weight_decay=0.1, ema=0.98, eval_every=0, precision="float32", seed=seed
        )
        fit(made, Dataset("training data", x, x[:1], bins), settings, progress=False)
        return made

    return _baseline(trained, x)


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


def countable(model: LatentVariableModel, data: Dataset | None) -> None:
    """Refuse a density of data that are grey levels: at a single point it can be anything."""
    if data is not None and data.bins is not None and not model.discrete:
        raise ValueError(
            f"{data.name} has grey levels and this model's decoder is a density, which gives a point no bits/dim: "
            "use a discrete decoder, such as softmax, or ode(dequantizer=uniform)"
        )


def _dequantizer(name: str | None, model: LatentVariableModel, data: Dataset | None) -> Dequantizer | None:
    """What spreads grey levels over their bins, where a density decoder needs it."""
    if name is None:
        countable(model, data)
        return None
    if model.discrete:
        raise ValueError("this model gives probabilities of grey levels: a dequantizer is for density decoders")
    if data is None or data.bins is None:
        raise ValueError("a dequantizer spreads grey levels over their bins, and these data have none")
    make = find(name, DEQUANTIZERS, "dequantizer")
    if not isinstance(model, GaussianDiffusion) and name != "uniform":
        raise ValueError(f"the {name} dequantizer takes its width from a path, and this model has none: use uniform")
    return make(data.bins, model)  # type: ignore[arg-type]


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
