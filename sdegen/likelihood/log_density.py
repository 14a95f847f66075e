"""Log-density of a state by the probability-flow ODE.

The ODE dz/dt = f z + g^2 / (2 sigma) eps_hat(z, t) carries data to noise invertibly, so that a density is carried too:

    log p(z_0) = log p(z_1) + INT_0^1 div dt,      div = D f + g^2 / (2 sigma) tr(d eps_hat / dz).

The trace of the noise prediction's Jacobian (:mod:`sdegen.likelihood.trace`) is computed along the way, and the
divergence integrated as further columns of the state. Its linear part could be left out, for INT D f dt = D log(alpha_1
/ alpha_0) is known; but where nothing happens, at the noise end, the two parts cancel, and what is left is far easier
to integrate.

**In which variable** the ODE is solved does not change what is solved, and changes what a tolerance buys. In flow time,
sigma / (alpha + sigma), on the straight line alpha + sigma = 1, state and divergence move evenly from data to noise,
whatever the model's own path: the default. To the same error logsnr takes a quarter more calls, and sigma / alpha,
which is long at the noise, three times as many (``benchmarks/likelihood.py``).

**With which steps.** The exact trace, and probes that stay, make a smooth right-hand side, and the solver may choose
its steps, for each sample its own: a sample's value then does not depend on its batch, and who has arrived leaves it.
With fixed steps every evaluation has fresh probes, which at equal cost is several times less noisy: the default for
Hutchinson's trace is RK4 in 24 steps. Any solver of :data:`solvers.SOLVERS` without noise will do, and ``OnPath`` is
understood; the black boxes (``"dopri5"`` of torchdiffeq, ``"rk45"`` of scipy) share their steps within a batch.

p(z_1) is the model's prior N(0, (alpha_1^2 + sigma_1^2) I); the true marginal differs by the prior term of the bound.

References: Chen et al. 2018, arXiv:1806.07366, section 4; Grathwohl et al. 2019, arXiv:1810.01367; Song et al. 2021,
arXiv:2011.13456, section 4.3 and appendix D.2; Zheng et al. 2023, arXiv:2305.03935 (logsnr as the variable).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdegen.distributions import Gaussian
from sdegen.likelihood.trace import Exact, Trace
from solvers import (
    EDM,
    FLOW,
    GRIDS,
    ODE,
    VP_LAM,
    Coordinates,
    DiffusionProblem,
    DormandPrince54,
    OnPath,
    Path,
    Solver,
    expand,
    resolve,
    solve,
)
from solvers.solve import find, steps_within

__all__ = ["VARIABLES", "LogDensity", "Route", "log_density"]

VARIABLES: dict[str, Coordinates | None] = {"flow": FLOW, "logsnr": VP_LAM, "sigma": EDM, "t": None}
"""Where the ODE is solved: chord and flow time, circle and logsnr, ray and sigma / alpha, or the path's own."""

TOL, NFE = 1e-5, 96
"""Budgets where none is given, of solvers that choose their steps and of others."""


@dataclass(frozen=True)
class LogDensity:
    """A log-density by the ODE, in nats, with what it is made of.

    Attributes:
        log_prob: (B,), float64.
        log_prior: log p(z_1), (B,).
        log_det: the integral of the divergence, (B,).
        spread: standard error of ``log_prob`` from what is drawn, (B,); zero where nothing is, NaN where it is not
            known, as with a single probe.
        draws: what ``log_prob`` is the mean of, (B, draws); one column for the density of a state.
        trace_variance: of one draw by the noise of the trace alone, (B,); NaN where it is not known.
        z: z_1, the state at the noisy end, (B, *event).
        forward: network calls per example, those of the decoder included.
        vjp: Jacobian products per example.
        spent: network calls of each sample, (B,), where its steps are its own; else None.
        parts: what a likelihood of data has besides, (B,) each, in nats of the negative log-likelihood.
    """

    log_prob: Tensor
    log_prior: Tensor
    log_det: Tensor
    spread: Tensor
    draws: Tensor
    trace_variance: Tensor
    z: Tensor
    forward: float
    vjp: float
    spent: Tensor | None
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Route:
    """Where and with which steps the ODE is solved; made by :meth:`of`.

    Attributes:
        path: on which it is solved, with its own clock.
        method: the solver.
        ts: the grid in that clock, rising, for fixed steps; None for a method that chooses its steps.
    """

    path: Path
    method: Solver[Any]
    ts: Tensor | None

    @classmethod
    def of(
        cls,
        path: Path,
        trace: Trace,
        *,
        solver: str | Solver[Any] | None = None,
        variable: str | Coordinates = "flow",
        grid: str = "sqrt_flow",
        steps: int | None = None,
        nfe: int | None = None,
        ts: Tensor | None = None,
        tol: float | None = None,
    ) -> Route:
        """The arguments of :func:`log_density`, checked, with what is left out filled in."""
        there = find(variable, VARIABLES, "variable") if isinstance(variable, str) else variable
        if solver is None and (tol is not None or (trace.exact and steps is nfe is ts is None)):
            solver = DormandPrince54(longest=1 / 2 if there is FLOW else 1 / 8)  # in flow time no end is at rest
        method = resolve(solver or "rk4")
        while isinstance(method, OnPath):
            method, there = method.solver, method.path
        if method.stochastic:
            raise ValueError(f"{method} draws noise: a density is carried along an ODE by a solver without noise")
        if sum(budget is not None for budget in (steps, nfe, ts, tol)) > 1:
            raise ValueError("give at most one of steps, nfe, ts and tol")
        on = path if there is None else there.over(path)
        chooses = method.nfe_per_step == 0
        if chooses and nfe is None and steps is None and ts is None:
            return cls(on, method.with_tolerance(TOL if tol is None else tol), None)
        if tol is not None:
            method.with_tolerance(tol)  # says that its steps are fixed
        if steps is None and ts is None:
            steps = steps_within(method, NFE if nfe is None else nfe)
        if ts is None:
            if steps is None or steps < 1:
                raise ValueError(f"the number of steps is at least 1, got {steps}")
            ts = find(grid, GRIDS, "grid")(path, steps).flip(0)
        return cls(on, method, ts if there is None else on.time(path.logsnr(ts)))

    @property
    def fixed_steps(self) -> bool:
        """Whether the steps are independent of what the solver sees."""
        return self.method.nfe_per_step > 0

    @property
    def tolerance(self) -> float | None:
        """Of a method that chooses its steps."""
        return None if self.fixed_steps else getattr(self.method, "rtol", None)

    @property
    def nfe(self) -> int | None:
        """Network calls, where they are known beforehand."""
        return None if self.ts is None or not self.fixed_steps else self.method.nfe(len(self.ts) - 1)

    def finer(self) -> Route:
        """With every step halved, or a tenth of the tolerance: what the solver's error is measured against."""
        if self.fixed_steps and self.ts is not None:
            middle = 0.5 * (self.ts[1:] + self.ts[:-1])
            return Route(self.path, self.method, torch.cat([self.ts, middle]).sort().values)
        return Route(self.path, self.method.with_tolerance((self.tolerance or TOL) / 10), self.ts)


def log_density(
    problem: DiffusionProblem,
    z: Tensor,
    *,
    prior_std: float | None = None,
    trace: Trace | None = None,
    samples: Sequence[int] | None = None,
    select: Callable[[Tensor], DiffusionProblem] | None = None,
    route: Route | None = None,
    **settings: Any,
) -> LogDensity:
    """log p(z_0) of a state at the clean end of the path.

    Args:
        problem: path and denoiser; a trained one or an oracle's.
        z: z_0, shape (B, *event), at ``path.t_min``, in the path's scaling. The prediction is asked in its dtype, all
            else is float64.
        prior_std: standard deviation of p(z_1); sqrt(alpha_1^2 + sigma_1^2) by default.
        trace: :class:`~sdegen.likelihood.trace.Exact` by default.
        samples: sample numbers, which key the probes; ``range(B)`` by default.
        select: the problem of some rows of the batch; where it is given, who has arrived leaves.
        route: in place of the settings.
        settings: ``solver`` (any ODE solver by name or as an object), ``variable`` of integration (a name in
            :data:`VARIABLES`, or coordinates), and one of ``tol``, ``steps`` (with ``grid``), ``nfe`` and ``ts``, which
            rises from t_min to t_max. By default each sample's own steps at tolerance 1e-5 for the exact trace, and RK4
            in 24 steps for Hutchinson's.

    Returns:
        The log-density in nats with its parts.
    """
    path, event, dims = problem.path, z.shape[1:], z[0].numel()
    trace = trace or Exact()
    route = route or Route.of(path, trace, **settings)
    there, calls = route.path, 0
    here_ends, there_ends = (torch.tensor([p.t_min, p.t_max], dtype=torch.float64) for p in (path, there))
    scales = path.alpha(here_ends) / there.alpha(there_ends)  # ours over those of the path where it is solved
    start = z.double() / float(scales[0])
    numbers = samples if samples is not None else range(len(z))
    walk = trace.start(start, there, numbers, fixed_steps=route.fixed_steps)

    def velocity_of(asked: DiffusionProblem, rows: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        predict = (asked if there is path else asked.rescaled(there)).predict

        def velocity(state: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            calls += len(state)
            x = state[:, :dims].reshape(-1, *event)
            eps, traces = walk(lambda y: predict(y.to(z.dtype), t).eps.double(), x, t, rows)
            f, c = there.f(t), there.g2(t) / (2 * there.sigma(t))
            divergence = expand(c, traces) * traces + expand(dims * f, traces) * walk.of_trace.to(traces)
            return torch.cat([(expand(f, x) * x + expand(c, x) * eps).flatten(1), divergence], 1)

        return velocity

    some = None if select is None else lambda rows: velocity_of(select(rows), rows)
    ode = ODE(velocity_of(problem, None), there.t_min, there.t_max, some)
    state = torch.cat([start.flatten(1), start.new_zeros(len(z), walk.columns)], 1)
    ts = there_ends if route.ts is None else route.ts
    with torch.no_grad():
        end = solve(ode, state, solver=route.method, ts=ts)

    top = float(scales[1]) * end.x[:, :dims].reshape(-1, *event)
    integral, spread = walk.read(end.x[:, dims:])
    log_std = torch.hypot(path.alpha(here_ends[1]), path.sigma(here_ends[1])).log()
    log_std = log_std if prior_std is None else torch.tensor(math.log(prior_std), dtype=torch.float64)
    log_prior = Gaussian(torch.zeros_like(top), log_std).log_prob(top)
    log_det = integral + dims * float((scales[1] / scales[0]).log())
    return LogDensity(
        log_prob=log_prior + log_det,
        log_prior=log_prior,
        log_det=log_det,
        spread=spread,
        draws=(log_prior + log_det)[:, None],
        trace_variance=spread.square(),
        z=top.to(z.dtype),
        forward=calls / len(z),
        vjp=calls / len(z) * trace.vjps(dims),
        spent=end.spent,
        parts={},
    )
