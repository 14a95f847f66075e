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
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdegen.distributions import Gaussian
from sdegen.models.diffusion import GaussianDiffusion
from solvers import GRIDS, ODE, DiffusionProblem, Solver, expand, resolve, solve, standard_normal
from solvers.noise import ENCODER, PROBES
from solvers.solve import find, steps_within

__all__ = ["Exact", "Hutchinson", "LogDensity", "Trace", "log_density", "ode_log_prob", "trace_for"]

Field = Callable[[Tensor], Tensor]
Estimate = Callable[[Field, Tensor], tuple[Tensor, Tensor]]


class Trace(ABC):
    """How the trace of a Jacobian is computed.

    Attributes:
        exact: whether it is the trace itself, and not an estimate.
    """

    exact: ClassVar[bool]

    @property
    def columns(self) -> int:
        """Estimates made side by side, P."""
        return 1

    @abstractmethod
    def products(self, dims: int) -> int:
        """Jacobian products for each evaluation of the field on ``dims`` coordinates."""

    @abstractmethod
    def start(self, z: Tensor, samples: Sequence[int]) -> Estimate:
        """What one solve uses: ``(field, z) -> (field(z), traces)`` with traces (B, P), one column for each probe.

        Args:
            z: initial state (B, *event).
            samples: sample numbers, which key the probes.
        """


@dataclass(frozen=True)
class Exact(Trace):
    """The trace itself, at D Jacobian products for each evaluation.

    Args:
        limit: refuse events of more coordinates than this.
    """

    limit: int = 256
    exact = True

    def products(self, dims: int) -> int:
        return dims

    def start(self, z: Tensor, samples: Sequence[int]) -> Estimate:
        dims = z[0].numel()
        if dims > self.limit:
            raise ValueError(
                f"the exact trace of {dims} coordinates costs {dims} Jacobian products per evaluation (the limit is "
                f"{self.limit}): use Hutchinson(probes=...), or Exact(limit={dims})"
            )
        basis = torch.eye(dims, dtype=z.dtype, device=z.device).reshape(dims, 1, *z.shape[1:])

        def estimate(field: Field, z: Tensor) -> tuple[Tensor, Tensor]:
            value, pull = _pullback(field, z)

            def diagonal(e: Tensor) -> Tensor:
                return (pull(e.expand_as(z)) * e).flatten(1).sum(1)

            return value, torch.func.vmap(diagonal, chunk_size=_at_once(z))(basis).sum(0)[:, None]

        return estimate


@dataclass(frozen=True)
class Hutchinson(Trace):
    """v' J v averaged over ``probes`` vectors of random signs, fixed for the whole solve.

    Args:
        probes: vectors for each sample.
        seed: of the signs; sample i's probes depend on (seed, i) alone.

    Reference: Hutchinson 1990, doi:10.1080/03610919008812866.
    """

    probes: int = 1
    seed: int = 0
    exact = False

    @property
    def columns(self) -> int:
        return self.probes

    def products(self, dims: int) -> int:
        return self.probes

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"Hutchinson's trace needs at least one probe, not {self.probes}")

    def start(self, z: Tensor, samples: Sequence[int]) -> Estimate:
        shape = (len(z), self.probes, *z.shape[1:])
        normal = standard_normal(shape, self.seed, samples=samples, stream=PROBES, dtype=z.dtype, device=z.device)
        signs = torch.where(normal < 0, -1.0, 1.0).to(z.dtype).movedim(1, 0)

        def estimate(field: Field, z: Tensor) -> tuple[Tensor, Tensor]:
            value, pull = _pullback(field, z)
            product = torch.func.vmap(lambda v: (pull(v) * v).flatten(1).sum(1), chunk_size=_at_once(z))
            return value, product(signs).mT

        return estimate


def trace_for(dims: int, seed: int = 0) -> Trace:
    """The exact trace of events of up to 16 coordinates, one Hutchinson probe beyond."""
    return Exact() if dims <= 16 else Hutchinson(seed=seed)


def _at_once(z: Tensor) -> int:
    """Jacobian products taken together: as many as make a batch of a million numbers."""
    return max(1, 2**20 // z.numel())


def _pullback(field: Field, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    out = torch.func.vjp(field, z)
    return out[0], lambda v: out[1](v)[0]


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
