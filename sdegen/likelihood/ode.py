"""Log-density by the probability-flow ODE.

The ODE dz/dt = f z + g^2 / (2 sigma) eps_hat(z, t) carries data to noise invertibly, so that a density is carried too:

    log p(z_0) = log p(z_1) + INT_0^1 div dt,      div = D f + g^2 / (2 sigma) tr(d eps_hat / dz).

The linear part of the divergence is known, INT D f dt = D log(alpha_1 / alpha_0), and only the trace of the noise
prediction's Jacobian is computed along the way, as further columns of the state. The trace is

* :class:`Exact`: D products with the Jacobian at each evaluation; for small events;
* :class:`Hutchinson`: E v' J v over random signs v, one product for each probe. Probes are drawn once for each solve
  and belong to their sample: the right-hand side stays a smooth function of time, as adaptive solvers need, and a
  sample's value does not depend on its batch. Every probe has a column of its own: the probes' spread is known.

p(z_1) is the model's prior N(0, (alpha_1^2 + sigma_1^2) I); the true marginal differs by the prior term of the bound.

What it says of a datum x depends on the decoder:

* continuous data: the density of z_0 / alpha_0, that is of data blurred by sigma_0 / alpha_0, evaluated at x,
  log p(x) = log p_ode(alpha_0 x) + D log alpha_0, exact for the ODE model up to the solver and the trace;
* grey levels: a lower bound on log P(x), E_q(z_0|x) [log p(x | z_0) - log q(z_0 | x) + log p_ode(z_0)].

A density near a wrong score need not beat the variational bound: that the ODE's number is the smaller is not a law.

References: Chen et al. 2018, arXiv:1806.07366, section 4; Grathwohl et al. 2019, arXiv:1810.01367; Song et al. 2021,
arXiv:2011.13456, section 4.3 and appendix D.2; Zheng et al. 2023, arXiv:2305.03935 (the bound for discrete data).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdegen.distributions import Gaussian
from sdegen.likelihood.report import LikelihoodReport
from sdegen.likelihood.scoring import beyond, chunks, describe, discreteness, evaluating, offset, rows
from sdegen.likelihood.trace import Exact, Trace, trace_for
from sdegen.models.diffusion import GaussianDiffusion
from solvers import GRIDS, ODE, DiffusionProblem, Solver, expand, resolve, solve, standard_normal
from solvers.noise import ENCODER
from solvers.solve import find, steps_within

__all__ = ["LogDensity", "log_density", "ode_likelihood", "ode_log_prob"]


@dataclass(frozen=True)
class LogDensity:
    """A log-density by the ODE, in nats, with what it is made of.

    Attributes:
        log_prob: (B,), float64.
        log_prior: log p(z_1), (B,).
        log_det: the integral of the divergence, (B,).
        spread: standard error of ``log_prob`` from the probes of the trace, (B,); zero for the exact trace, NaN for a
            single probe, whose error cannot be known.
        z: z_1, the state at the noisy end, (B, *event).
        forward: network calls per example.
        products: Jacobian products per example.
        parts: for a bound on discrete data, its terms, (B,) each.
    """

    log_prob: Tensor
    log_prior: Tensor
    log_det: Tensor
    spread: Tensor
    z: Tensor
    forward: int
    products: int
    parts: dict[str, Tensor]


def log_density(
    problem: DiffusionProblem,
    z: Tensor,
    *,
    prior_std: float | None = None,
    trace: Trace | None = None,
    solver: str | Solver[Any] = "dopri54",
    grid: str = "logsnr",
    steps: int | None = None,
    nfe: int | None = None,
    ts: Tensor | None = None,
    tol: float | None = None,
    samples: Sequence[int] | None = None,
) -> LogDensity:
    """log p(z_0) of a state at the clean end of the path.

    Args:
        problem: path and denoiser; a trained one or an oracle's.
        z: z_0, shape (B, *event), at ``path.t_min``, in the path's scaling; float64 for tight tolerances.
        prior_std: standard deviation of p(z_1); sqrt(alpha_1^2 + sigma_1^2) by default.
        trace: :class:`Exact` by default.
        solver: any ODE solver of :data:`solvers.SOLVERS`.
        grid: of a fixed-step solver, a name in :data:`solvers.GRIDS`.
        steps: number of steps of a fixed-step solver.
        nfe: budget of network calls of a fixed-step solver.
        ts: the grid itself, rising from t_min to t_max.
        tol: relative and absolute tolerance of an adaptive solver; 1e-5 where no budget is given.
        samples: sample numbers, which key the probes; ``range(B)`` by default.

    Returns:
        The log-density in nats with its parts.
    """
    path, event, dims = problem.path, z.shape[1:], z[0].numel()
    low, high = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    trace = trace or Exact()
    estimate = trace.start(z, samples if samples is not None else range(len(z)))
    columns = trace.columns

    def velocity(state: Tensor, t: Tensor) -> Tensor:
        x = state[:, :dims].reshape(-1, *event)
        eps, traces = estimate(lambda y: problem.predict(y, t).eps, x)
        f, c = path.f(t), path.g2(t) / (2 * path.sigma(t))
        return torch.cat([(expand(f, x) * x + expand(c, x) * eps).flatten(1), expand(c, traces) * traces], 1)

    method = resolve(solver)
    if method.stochastic:
        raise ValueError(f"{method} draws noise: a density is carried along an ODE by a solver without noise")
    if sum(budget is not None for budget in (steps, nfe, ts, tol)) > 1:
        raise ValueError("give at most one of steps, nfe, ts and tol")
    if nfe is not None:
        steps = steps_within(method, nfe)
    if steps is not None:
        if steps < 1:
            raise ValueError(f"the number of steps is at least 1, got {steps}")
        ts = find(grid, GRIDS, "grid")(path, steps).flip(0)
    budget: dict[str, Any] = {"ts": ts} if ts is not None else {"tol": 1e-5 if tol is None else tol}
    start = torch.cat([z.flatten(1), z.new_zeros(len(z), columns)], 1)
    ode = ODE(velocity, path.t_min, path.t_max)
    with torch.no_grad():
        end = solve(ode, start, solver=method, encode=ts is None, **budget)

    top = end.x[:, :dims].reshape(-1, *event)
    integrals = end.x[:, dims:].double()
    log_std = torch.hypot(path.alpha(high), path.sigma(high)).log()
    log_std = log_std if prior_std is None else torch.tensor(math.log(prior_std), dtype=torch.float64)
    log_prior = Gaussian(torch.zeros_like(top), log_std).log_prob(top)
    log_det = integrals.mean(1) + dims * float(path.alpha(high).log() - path.alpha(low).log())
    return LogDensity(
        log_prob=log_prior + log_det,
        log_prior=log_prior,
        log_det=log_det,
        spread=_spread(integrals, trace),
        z=top,
        forward=end.nfe,
        products=end.nfe * trace.products(dims),
        parts={},
    )


def _spread(integrals: Tensor, trace: Trace) -> Tensor:
    """Standard error of the mean over the columns, (B,)."""
    if trace.exact or trace.columns == 1:
        return integrals.new_full((len(integrals),), 0.0 if trace.exact else math.nan)
    return integrals.std(1) / math.sqrt(trace.columns)


def ode_log_prob(
    model: GaussianDiffusion,
    x: Tensor,
    cond: Tensor | None = None,
    *,
    trace: Trace | None = None,
    draws: int = 1,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    **settings: Any,
) -> LogDensity:
    """Log-likelihood of data by the probability-flow ODE; what it is depends on the decoder, see the module's text.

    Args:
        model: a diffusion, in evaluation mode.
        x: data (B, *event), model units; float64 data are integrated in float64.
        cond: class labels (B,) or None.
        trace: :func:`trace_for` the model's events by default.
        draws: z_0 drawn for each datum, where the decoder is discrete.
        seed: of z_0 and of the default probes.
        samples: sample numbers, which key all noise; ``range(B)`` by default.
        settings: of :func:`log_density`: ``solver``, ``tol`` or ``steps`` or ``nfe`` or ``ts``, ``grid``.

    Returns:
        ``log_prob`` is log p(x), or for grey levels the lower bound on log P(x), averaged over the draws.
    """
    model.check(x)
    if draws < 1:
        raise ValueError(f"draws is at least 1, not {draws}")
    numbers = list(samples if samples is not None else range(len(x)))
    draws = draws if model.discrete else 1
    keys = [k for n in numbers for k in range(n * draws, (n + 1) * draws)]
    trace = trace or trace_for(model.dims, seed)
    rows = x.repeat_interleave(draws, 0)
    labels = None if cond is None else cond.repeat_interleave(draws, 0)
    with torch.no_grad():
        q = model.encode(rows, labels).bottom
        if not model.discrete:
            found = log_density(model.problem(labels), q.mean, trace=trace, samples=keys, **settings)
            scale = model.dims * float(model.alpha.log())
            return replace(
                found, log_prob=found.log_prob + scale, parts={"scale": torch.full_like(found.log_prob, scale)}
            )
        noise = standard_normal(rows.shape, seed, samples=keys, stream=ENCODER, dtype=x.dtype, device=x.device)
        z = q.sample(noise)
        found = log_density(model.problem(labels), z, trace=trace, samples=keys, **settings)
        parts = {"reconstruction": -model.decode(z, labels).log_prob(rows), "entropy": q.log_prob(z)}
    log_prob = found.log_prob - parts["reconstruction"] - parts["entropy"]

    def mean(value: Tensor) -> Tensor:
        return value.reshape(-1, draws).mean(1)

    between = log_prob.reshape(-1, draws).std(1) / math.sqrt(draws) if draws > 1 else mean(found.spread)
    return LogDensity(
        log_prob=mean(log_prob),
        log_prior=mean(found.log_prior),
        log_det=mean(found.log_det),
        spread=between,
        z=found.z,
        forward=draws * (found.forward + model.decoder.calls),
        products=draws * found.products,
        parts={name: mean(value) for name, value in parts.items()},
    )


def ode_likelihood(
    model: GaussianDiffusion,
    data: Tensor,
    cond: Tensor | None = None,
    *,
    trace: Trace | None = None,
    draws: int = 1,
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
        trace: exact up to 16 coordinates, one Hutchinson probe beyond, by default.
        draws: z_0 for each datum, for a discrete decoder.
        batch: rows at a time; at most 512, and as many as fit into half a gigabyte by default. The default solver gives
            every row its own steps; the black boxes (``"dopri5"``, ``"rk45"``) share theirs within a batch, which then
            changes values at the level of the tolerance.
        seed: of all noise.
        bin_width: width of the bins that ``data`` were dequantised over, to get bits from a density.
        progress: called as ``progress(done, N)`` after every batch.
        settings: of :func:`log_density`: ``solver``, ``tol`` or ``steps`` or ``nfe`` or ``ts``, ``grid``.

    Returns:
        A :class:`LikelihoodReport`. The estimator's standard error is known with two draws or probes or more.
    """
    trace = trace or trace_for(model.dims, seed)
    began, done, calls, products = time.perf_counter(), 0, 0.0, 0.0
    found: list[tuple[Tensor, Tensor]] = []
    parts: dict[str, float] = {}
    with evaluating(model):
        for x, labels in chunks(model, data, cond, (batch or min(512, rows(model))) // max(draws, 1)):
            numbers = range(done, done + len(x))
            one = ode_log_prob(model, x, labels, trace=trace, draws=draws, seed=seed, samples=numbers, **settings)
            found.append((-one.log_prob.cpu(), one.spread.cpu()))
            terms = {"minus log prior": -one.log_prior, "minus log det": -one.log_det, **one.parts}
            for name, term in terms.items():
                sign = -1.0 if name == "scale" else 1.0
                parts[name] = parts.get(name, 0.0) + sign * float(term.sum()) / len(data)
            calls, products = calls + one.forward * len(x), products + one.products * len(x)
            done += len(x)
            if progress is not None:
                progress(done, len(data))
    values, spreads = (torch.cat(parts) for parts in zip(*found, strict=True))
    n = len(values)
    if model.discrete and float(values.mean()) < 0:
        raise ValueError(
            f"the ODE gives grey levels a probability above one ({float(values.mean()):.4g} nats): its solver's error "
            "is larger than the result; ask for a smaller tol or more steps"
        )
    unknown = model.discrete and draws == 1  # one z_0 each: its noise cannot be told from the data's
    within = spreads.square().mean() if not unknown and bool(spreads.isfinite().all()) else torch.tensor(0.0)
    spread = values.var() if n > 1 else torch.tensor(math.nan)
    method = resolve(settings.get("solver", "dopri54"))
    if settings.get("tol") is not None:
        method = method.with_tolerance(settings["tol"])
    return LikelihoodReport(
        method="probability-flow ODE",
        kind="estimate",  # the solver's own error is in it, which no standard error sees
        of="probability" if model.discrete else "density",
        values=values,
        parts=parts,
        estimator_se=math.nan if unknown else float(spreads.square().sum().sqrt()) / n,
        data_se=beyond(spread, within, n),
        solver_error=None,
        dims=model.dims,
        bits_offset=offset(model, bin_width),
        forward=calls / n,
        vjp=products / n,
        jvp=0,
        seconds=time.perf_counter() - began,
        logsnr=model.logsnr_ends,
        **discreteness(model, bin_width),
        solver=repr(method),
        tolerance=None if method.order else getattr(method, "rtol", None),  # order 0: it follows a tolerance
        seed=seed,
        settings={
            **describe(model),
            **{k: v for k, v in settings.items() if k not in ("solver", "tol")},
            "trace": repr(trace),
            "draws": draws,
        },
    )
