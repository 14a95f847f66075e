"""The likelihood of data by the probability-flow ODE.

:func:`sdegen.likelihood.log_density.log_density` gives the density of a state z_0 at the clean end. What that says of a
datum x depends on what lies between the two:

* **continuous data**: the density of z_0 / alpha_0, that is of data blurred by sigma_0 / alpha_0, evaluated at x,
  log p(x) = log p_ode(alpha_0 x) + D log alpha_0: exact for the ODE model up to solver and trace;
* **grey levels, a discrete decoder**: E_q(z_0|x) [log p(x | z_0) - log q(z_0 | x) + log p_ode(z_0)] <= log P(x);
* **grey levels, a density decoder**: E_q(y|x) [log p_ode(alpha_0 y) + D log alpha_0 - log q(y | x)] <= log P(x), with y
  spread over the bin by a dequantizer (:mod:`sdegen.likelihood.dequantize`).

Under the expectations stand log importance weights, log w. With K > 1 draws log(1/K SUM w_k) takes their place: a bound
that tightens with K. It is refused for Hutchinson's trace. A mean of exponentials takes the noise of log w for
likelihood: noise of variance s^2 is worth s^2 / 2 nats that are not there, and the bound is no bound.

**How it is known.** The standard error is that of everything that is drawn: z_0 or y, and probes. With a target, draws
are added (or probes, where nothing else is drawn) until it is met or the budget is spent. *The solver's error* is in no
standard error. It is measured: some data are solved again with a tenth of the tolerance or twice the steps, with the
same z_0 and probes that stay, and the root mean square of what that changes is reported with its largest value. At
least eight are looked at, spread over all that there are: errors differ between data by orders of magnitude, and one
or two easy ones say nothing. Where it is larger than the standard error (or the target, or 1e-3 nats per dimension) the
report's kind is "estimate", and else what the list above says: exact, or a bound, up to that error.

A density near a wrong score need not beat the variational bound: that the ODE's number is the smaller is not a law.

References: Song et al. 2021, arXiv:2011.13456, appendix D.2; Zheng et al. 2023, arXiv:2305.03935 (bounds for discrete
data); Burda et al. 2016, arXiv:1509.00519 (importance weights).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdegen.likelihood.control import LinearGaussian
from sdegen.likelihood.dequantize import Dequantizer
from sdegen.likelihood.log_density import LogDensity, Route, log_density
from sdegen.likelihood.report import LikelihoodReport
from sdegen.likelihood.rounds import Progress, Tally
from sdegen.likelihood.scoring import (
    beyond,
    chunks,
    describe,
    discreteness,
    evaluating,
    numbered,
    offset,
    positive,
    rows,
    spreadable,
)
from sdegen.likelihood.trace import Hutchinson, Trace, trace_for
from sdegen.models.diffusion import GaussianDiffusion
from solvers import standard_normal
from solvers.noise import ENCODER

__all__ = ["COARSE", "coarse", "ode_likelihood", "ode_log_prob", "tolerable"]

ENOUGH = 32  # data for a covariance
NEGLIGIBLE = 1e-3  # nats per dimension: a solver's error that nobody minds
COARSE = "the solver's error"
LEAST, SHARE = 8, 16  # data of which the solver's error is measured: so many at least, or one in so many


def ode_log_prob(
    model: GaussianDiffusion,
    x: Tensor,
    cond: Tensor | None = None,
    *,
    trace: Trace | None = None,
    dequantizer: Dequantizer | None = None,
    draws: int = 1,
    K: int = 1,
    noisy: bool = False,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    first: int = 0,
    route: Route | None = None,
    **settings: Any,
) -> LogDensity:
    """Log-likelihood of data by the probability-flow ODE; what it is depends on the decoder, see the module's text.

    Args:
        model: a diffusion, in evaluation mode.
        x: data (B, *event), model units; float64 data are predicted in float64.
        cond: class labels (B,) or None.
        trace: :func:`~sdegen.likelihood.trace.trace_for` the model's events by default.
        dequantizer: spreads grey levels over their bins, for a density decoder.
        draws: repetitions with other noise (z_0 or y, and probes), averaged.
        K: importance-weighted draws in each of them.
        noisy: allow K > 1 with a noisy trace.
        seed: of z_0, y and the default probes.
        samples: sample numbers, which key all noise; ``range(B)`` by default.
        first: number of the first draw.
        route: in place of the settings.
        settings: of :func:`~sdegen.likelihood.log_density.log_density`: ``solver``, ``variable``, ``tol`` or ``steps``
            or ``nfe`` or ``ts``, ``grid``.

    Returns:
        ``log_prob`` is log p(x), or for grey levels the lower bound on log P(x), averaged over the draws; ``spread``
        its standard error, where more than one draw says what it is.
    """
    model.check(x)
    spreadable(model, dequantizer)
    drawn = model.discrete or dequantizer is not None
    trace = trace or trace_for(model.dims, seed)
    _check(drawn, trace, draws, K, noisy)
    numbers, each = range(len(x)) if samples is None else samples, draws * K
    keys = [(k << 32) + n for n in numbers for k in range(first * K, first * K + each)]
    at, labels = x.repeat_interleave(each, 0), None if cond is None else cond.repeat_interleave(each, 0)
    parts: dict[str, Tensor] = {}

    def noise() -> Tensor:
        return standard_normal(at.shape, seed, samples=keys, stream=ENCODER, dtype=at.dtype, device=at.device)

    def problem(some: Tensor | None = None) -> Any:
        return model.problem(labels if labels is None or some is None else labels[some])

    with torch.no_grad():
        if model.discrete:
            q = model.encode(at, labels).bottom
            z = q.sample(noise())
            parts = {"reconstruction": -model.decode(z, labels).log_prob(at), "entropy": q.log_prob(z)}
        else:
            if dequantizer is not None:
                at, log_q = dequantizer.draw(at, noise())
                parts["dequantization"] = log_q
            z = model.alpha * at
            parts["scale"] = torch.full((len(at),), -model.dims * float(model.alpha.log())).double().to(at.device)
        route = route or Route.of(model.path, trace, **settings)
        found = log_density(problem(), z, trace=trace, samples=keys, select=problem, route=route)

    def mean(value: Tensor) -> Tensor:
        return value.reshape(-1, each).mean(1)

    log_w = (found.log_prob - sum(parts.values(), torch.zeros_like(found.log_prob))).reshape(-1, draws, K)
    log_p = log_w.logsumexp(2) - math.log(K)
    parts = {name: mean(value) for name, value in parts.items()}
    if K > 1:
        parts["importance weighting"] = mean(log_w.flatten()) - log_p.mean(1)
    within = found.spread.square().reshape(-1, each).mean(1)  # of a single draw
    decoder = model.decoder.calls if model.discrete else 0
    return LogDensity(
        log_prob=log_p.mean(1),
        log_prior=mean(found.log_prior),
        log_det=mean(found.log_det),
        spread=log_p.std(1) / math.sqrt(draws) if draws > 1 else within.sqrt() + (math.nan if drawn else 0.0),
        draws=log_p,
        trace_variance=within,
        z=found.z,
        forward=each * (found.forward + decoder),
        vjp=each * found.vjp,
        spent=found.spent,
        parts=parts,
    )


def ode_likelihood(
    model: GaussianDiffusion,
    data: Tensor,
    cond: Tensor | None = None,
    *,
    trace: Trace | None = None,
    control: str | LinearGaussian | None = "auto",
    dequantizer: Dequantizer | None = None,
    draws: int | None = None,
    K: int = 1,
    noisy: bool = False,
    target_se: float | None = None,
    max_nfe: int | None = None,
    check: int = 16,
    samples: Sequence[int] | None = None,
    batch: int | None = None,
    seed: int = 0,
    bin_width: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> LikelihoodReport:
    """The likelihood of a data set by the probability-flow ODE; see :mod:`sdegen.likelihood.ode` for what it is.

    Args:
        model: a diffusion.
        data: (N, *event), model units.
        cond: class labels (N,) or None.
        trace: by default exact up to 16 coordinates; beyond, Hutchinson's with two probes, or one where z_0 is drawn.
        control: of Hutchinson's trace: "auto" for the linear denoiser of the mean and covariance of ``data``, if there
            are 32 or more; another one, such as ``LinearGaussian.fit(train)``; or None. All are unbiased, for none of
            them knows the probes.
        dequantizer: spreads grey levels over their bins, for a density decoder: the result is of probabilities then.
        draws: repetitions for each datum, the first ones where there is a target; by default two where z_0 is drawn.
        K: importance-weighted draws in each of them.
        noisy: allow K > 1 with a noisy trace, and report how large its bias is.
        target_se: go on until the estimator's standard error of the mean is at most this, nats, and has 32 degrees of
            freedom.
        max_nfe: stop at so many network calls per datum, those of the check included; without a target they are all
            spent on draws, if anything is drawn.
        check: at most so many data, evenly spread, are solved again to measure the solver's error: one in sixteen, but
            not fewer than eight; 0 for none.
        samples: numbers of the data, which key their noise; ``range(N)`` by default.
        batch: rows at a time; at most 512, and as many as fit into half a gigabyte by default. The default solvers
            treat every row by itself; the black boxes (``"dopri5"``, ``"rk45"``) share steps within a batch, which
            then changes values at the level of the tolerance.
        seed: of all noise.
        bin_width: width of the bins that ``data`` were dequantised over, to get bits from a density.
        progress: called as ``progress(done, N)`` after every batch; with a target both grow when draws are added.
        settings: of :func:`~sdegen.likelihood.log_density.log_density`: ``solver``, ``variable``, ``tol`` or ``steps``
            or ``nfe`` or ``ts``, ``grid``.

    Returns:
        A :class:`LikelihoodReport`. The estimator's standard error is known with two draws or probes or more.
    """
    began = time.perf_counter()
    model.check(data)
    n, numbers = len(data), numbered(data, samples)
    positive(target_se)
    spreadable(model, dequantizer, bin_width)
    drawn = model.discrete or dequantizer is not None  # z_0, or y
    trace = _controlled(trace or trace_for(model.dims, seed, 1 if drawn else 2), control, data)
    start = (2 if drawn else 1) if draws is None else draws
    _check(drawn, trace, start, K, noisy)
    route = Route.of(model.path, trace, **settings)
    size = batch or min(512, rows(model))
    common: dict[str, Any] = {"dequantizer": dequantizer, "K": K, "noisy": noisy, "seed": seed}

    tally, report = Tally(drawn, trace, route.fixed_steps), Progress(progress, n)
    with evaluating(model):
        again = min(check, n, max(LEAST, -(-n // SHARE)))
        off = _solver_error(model, data, cond, trace, route, numbers, again, size, common, tally)
        plan = tally.first(start, target_se, max_nfe, trace.exact and not drawn, route, n)
        while plan is not None:
            found: list[LogDensity] = []
            report.add(n)
            for x, labels in chunks(model, data, cond, size // (plan.draws * K)):
                here = numbers[sum(len(one.log_prob) for one in found) :][: len(x)]
                found.append(
                    ode_log_prob(
                        model, x, labels, trace=plan.trace, draws=plan.draws, samples=here, first=tally.taken,
                        route=route, **common,
                    )
                )  # fmt: skip
                report.done(len(x))
            tally.add(plan, found)
            plan = tally.next(target_se, max_nfe)

    values, variances = tally.values, tally.variances
    se = float(variances.sum().sqrt()) / n
    notes = [tally.note]
    allowed = tolerable(target_se, se, model.dims)
    settled = off is not None and off.rms <= allowed
    if off is not None and not settled:
        notes.append(coarse(off.rms, allowed))
    if drawn and float(values.mean()) < 0:
        settled = False
        notes.append("grey levels would have a probability above one: the solver's error is larger than the result")
    bias = None
    if K > 1 and not trace.exact:
        bias, settled = 0.5 * float(tally.trace_variance), False
        notes.append(f"optimistic by up to {bias:.3g} nats: K > 1 takes the trace's noise for likelihood")
    within = variances.mean() if bool(variances.isfinite().all()) else torch.tensor(0.0)
    return LikelihoodReport(
        method="probability-flow ODE" + (f", K = {K}" if K > 1 else ""),
        kind=("upper bound" if drawn else "exact") if settled else "estimate",
        of="probability" if drawn else "density",
        values=values,
        parts=tally.parts,
        estimator_se=se,
        data_se=beyond(values.var() if n > 1 else torch.tensor(math.nan), within, n),
        solver_error=None if off is None else off.rms,
        dims=model.dims,
        bits_offset=0.0 if drawn else offset(model, bin_width),
        forward=tally.forward,
        vjp=tally.vjp,
        jvp=0,
        seconds=time.perf_counter() - began,
        logsnr=model.logsnr_ends,
        **discreteness(model, bin_width, dequantizer),
        solver=repr(route.method),
        tolerance=route.tolerance,
        seed=seed,
        settings={
            **describe(model),
            "variable": "t" if route.path is model.path else repr(route.path),
            "steps": None if route.ts is None else len(route.ts) - 1,
            "trace": repr(trace),
            "draws": tally.taken,
            **({"K": K} if K > 1 else {}),
            **({} if bias is None else {"noise_bias": bias}),
            **({} if off is None else off.facts),
        },
        note="; ".join(filter(None, notes)),
    )


def tolerable(target_se: float | None, se: float, dims: int) -> float:
    """The largest solver's error, nats, that leaves a number exact, or a bound: what nobody minds beside its noise."""
    return max(target_se or NEGLIGIBLE * dims, se if math.isfinite(se) else 0.0)


def coarse(error: float, allowed: float, unit: str = "nats") -> str:
    """What is said of a solver's error that is not tolerable."""
    return f"{COARSE}, {error:.3g} {unit}, is larger than {allowed:.3g}: ask for a smaller tol or more steps"


def _check(drawn: bool, trace: Trace, draws: int, K: int, noisy: bool) -> None:
    if draws < 1 or K < 1:
        raise ValueError(f"draws and K are at least 1, not {draws} and {K}")
    if K > 1 and not drawn:
        raise ValueError("K > 1 weighs draws of z_0, and for a density of continuous data nothing is drawn")
    if K > 1 and not trace.exact and not noisy:
        raise ValueError(
            f"K = {K} with {type(trace).__name__}: a mean of exponentials turns noise of variance s^2 in log p into "
            "s^2 / 2 nats of likelihood that are not there; use trace=Exact(), or noisy=True to see the bias reported"
        )


def _controlled(trace: Trace, control: str | LinearGaussian | None, data: Tensor) -> Trace:
    if not isinstance(control, LinearGaussian) and control not in ("auto", None):
        raise ValueError(f'control is "auto", a LinearGaussian or None, not {control!r}')
    if not isinstance(trace, Hutchinson) or trace.control is not None:
        return trace
    if isinstance(control, str):
        control = LinearGaussian.fit(data) if len(data) >= ENOUGH else None
    return replace(trace, control=control)


# --- the solver's error -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Off:
    """What a finer solve of some data changes in -log p, nats, (m,)."""

    change: Tensor

    @property
    def rms(self) -> float:
        """Root mean square: of one datum; the mean over data is off by less."""
        return float(self.change.square().mean().sqrt())

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "solver_error_max": float(self.change.abs().max()),
            "solver_error_mean": float(self.change.mean()),
            "solver_error_of": len(self.change),
        }


def _solver_error(
    model: GaussianDiffusion, data: Tensor, cond: Tensor | None, trace: Trace, route: Route, numbers: Sequence[int],
    count: int, size: int, common: dict[str, Any], tally: Tally,
) -> _Off | None:  # fmt: skip
    """Solve some data with the settings and with finer ones; the same z_0, and the same probes, which stay."""
    if count < 1:
        return None
    ends: list[Tensor] = []
    places = [i * len(data) // count for i in range(count)]
    some, chosen = None if cond is None else cond[places], [numbers[i] for i in places]
    for one in (route, route.finer()):
        found: list[LogDensity] = []
        for x, labels in chunks(model, data[places], some, size):
            here = chosen[sum(len(f.log_prob) for f in found) :][: len(x)]
            options = {**common, "K": 1, "samples": here, "route": one}
            found.append(ode_log_prob(model, x, labels, trace=trace.staying(), **options))
        ends.append(torch.cat([f.log_prob.cpu() for f in found]))
        tally.spend(found, len(data))
        tally.cost = tally.cost or tally.forward * len(data) / count
    return _Off(ends[0] - ends[1])
