"""What a likelihood rests on: every knob moved one notch, and by how much the number moves.

A number that is what it says does not care where the integration ends, how tight the tolerance is, how many probes the
trace has, or which seed was drawn. Each is moved by itself, on the same examples and with the same noise, so that a
drift is known much better than the number:

* **the clean end**, by one unit of logsnr either way. Outward an exact model gains what its decoder lacked and pays as
  much on the way. A learned network was never trained beyond its end: a *rise* outward is its extrapolation, and no
  fault of the number; a *fall* outward says that the path ends too early. Inward the decoder gets a noisier z_0, and a
  softmax decoder, which looks at each coordinate by itself, can tell the levels apart no longer: that rise is what the
  decoder costs and says nothing of the network. A decoder that asks the network for its posterior hardly drifts;
* **the noisy end**, likewise. Outward the prior term falls, and the integral grows by as much or less;
* **T**, doubled. The bound falls towards that of all levels, at the rate 1/T;
* **the tolerance** of the ODE's solver, a tenth of it, and **the probes** of its trace, twice as many;
* **the importance samples** of a VAE, twice as many;
* **the seed**, which must move nothing beyond the standard error.

Two numbers say how far the learned score is from being one. The *gap* between the probability-flow ODE and the bound of
the SDE: zero for an exact score, but for the ends. And the *asymmetry* |J - J'| / |J| of its Jacobian: a score is a
gradient, and the Jacobian of a gradient is symmetric. By random signs v, E|J v - J' v|^2 = |J - J'|^2, one product
forward and one backward. In much noise the score's Jacobian is little more than a multiple of the identity, whatever
the network says; the same ratio for the denoised image x0, which has no such term, stands beside it.

References: Lu et al. 2022, arXiv:2206.08265 (the gap); Chao et al. 2023, arXiv:2209.12753 (asymmetry); Hutchinson 1990.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdegen.levels import Continuous
from sdegen.likelihood.methods import Method
from sdegen.likelihood.report import LikelihoodReport, gap
from sdegen.likelihood.scoring import evaluating
from sdegen.likelihood.tables import column, number
from sdegen.models import VAE, GaussianDiffusion, LatentVariableModel
from sdegen.paths import VP, LinearLogSNR
from sdegen.results import Result
from sdegen.tables import aligned
from solvers import standard_normal
from solvers.noise import ENCODER, PROBES

__all__ = ["Asymmetry", "Audit", "Move", "asymmetry", "audit"]

NOTCH = 1.0  # of logsnr
KNOBS = ("clean end", "noisy end", "T", "tolerance", "probes", "seed")  # in this order


@dataclass(frozen=True)
class Job:
    """A number to compute: a method on a model, with a seed."""

    model: LatentVariableModel
    method: str
    seed: int


@dataclass(frozen=True)
class Knob:
    """Two jobs that differ in one thing."""

    title: str
    name: str
    before: Any
    after: Any
    one: Job
    other: Job


@dataclass(frozen=True)
class Move:
    """One knob, one notch.

    Attributes:
        title: whose number it is.
        knob: what was moved.
        before, after: the knob's values.
        value: the number before, nats.
        drift: how much more it is after, nats.
        drift_se: standard error of that, from the spread over the examples; NaN for one example.
    """

    title: str
    knob: str
    before: str
    after: str
    value: float
    drift: float
    drift_se: float


@dataclass(frozen=True)
class Asymmetry:
    """|J - J'| / |J| by level, Frobenius norms over the examples.

    Attributes:
        logsnr: (L,).
        score: of the score's Jacobian, (L,).
        score_se: standard error, (L,).
        x0: of the denoised image's Jacobian, (L,).
        x0_se: standard error, (L,).
    """

    logsnr: Tensor
    score: Tensor
    score_se: Tensor
    x0: Tensor
    x0_se: Tensor


@dataclass(frozen=True)
class Audit:
    """What moved.

    Attributes:
        moves: the knobs.
        gap: ODE minus bound, nats, and its standard error; None for a model without an ODE.
        asymmetry: of the learned score; None for a model without one.
        dims: coordinates of one datum.
        bits: whether the numbers are probabilities of levels, shown in bits/dim.
        examples: how many were scored.
    """

    moves: Sequence[Move]
    gap: tuple[float, float] | None
    asymmetry: Asymmetry | None
    dims: int
    bits: bool
    examples: int

    def to_result(self, **more: Any) -> Result:
        """For an HDF5 file: columns along the axis ``move``, the asymmetry along ``level``, the gap as attributes."""
        rows = [vars(move) for move in self.moves]
        arrays: dict[str, Any] = {key: (("move",), column([row[key] for row in rows])) for key in rows[0]}
        if (found := self.asymmetry) is not None:
            arrays |= {f"asymmetry_{key}": (("level",), value.numpy()) for key, value in vars(found).items()}
        apart, error = self.gap or (None, None)
        facts = {"unit": "nat", "gap": apart, "gap_se": error, "examples": self.examples, "dims": self.dims}
        return Result(arrays, {**facts, **more})

    def __str__(self) -> str:
        unit, scale = ("bits/dim", 1 / (self.dims * math.log(2))) if self.bits else ("nats", 1.0)

        def shown(move: Move) -> tuple[str, ...]:
            drift, error = scale * move.drift, scale * move.drift_se
            steps = abs(drift / error) if error > 0 else math.nan
            beyond = "" if not steps > 3 else "  <" if steps < 10 else "  <<"
            numbers = (number(scale * move.value, 4), f"{drift:+.4f}", number(error, 4))
            return (move.title, move.knob, f"{move.before} -> {move.after}", *numbers, beyond)

        head = ("number", "knob", "moved", unit, "drift", "± drift", "")
        lines = [
            f"each knob one notch, on {self.examples} examples with the same noise; < is a drift of 3 errors, << of 10",
            "",
            aligned([head, *map(shown, self.moves)], right=(3, 4, 5)),
        ]
        if self.gap is not None:
            apart, error = (scale * value for value in self.gap)
            lines += ["", f"ODE minus bound: {apart:+.4f} ± {error:.4f} {unit}; an exact score has none"]
        if (found := self.asymmetry) is not None:
            columns = (found.logsnr, found.score, found.score_se, found.x0, found.x0_se)
            cells = [tuple(f"{float(v):.3g}" for v in line) for line in zip(*columns, strict=True)]
            names = ("logsnr", "|J - J'| / |J| of the score", "±", "of x0", "±")
            lines += ["", aligned([names, *cells], right=range(5))]
        return "\n".join(lines)


def audit(
    model: LatentVariableModel,
    data: Tensor,
    cond: Tensor | None = None,
    *,
    T: Sequence[int] = (10, 100),
    draws: int = 16,
    tol: float = 1e-3,
    probes: int = 1,
    K: int = 100,
    ode_examples: int = 16,
    probe_examples: int = 32,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Audit:
    """Move every knob one notch.

    Args:
        model: a diffusion or a VAE.
        data: (N, *event), model units; a few dozen examples do, for they are compared with themselves.
        cond: class labels (N,) or None.
        T: numbers of levels to double.
        draws: noise levels per datum of a bound, twice.
        tol: tolerance of the ODE's solver.
        probes: of its trace.
        K: importance samples of a VAE.
        ode_examples: how many of the data the ODE is solved for.
        probe_examples: how many of the data the Jacobian is probed at.
        seed: of all noise.
        progress: called as ``progress(what, share)``.
    """
    model.check(data)
    if ode_examples < 1 or probe_examples < 1:
        raise ValueError(f"ode_examples and probe_examples are at least 1, not {ode_examples} and {probe_examples}")
    done: dict[tuple[int, str, int], LikelihoodReport] = {}

    def score(job: Job) -> LikelihoodReport:
        name = (id(job.model), job.method, job.seed)
        if name not in done:
            n = ode_examples if job.method.startswith("ode") else len(data)
            run = Method.parse(job.method).on(job.model, None).run
            done[name] = run(data[:n], None if cond is None else cond[:n], samples=range(n), seed=job.seed)
        return done[name]

    def tell(what: str, number: int) -> None:
        if progress is not None:
            progress(what, number / (len(knobs) + 2))

    levels = f"draws={draws}, repeats=2"
    if not isinstance(model, GaussianDiffusion):
        knobs = _latent_knobs(model, f"bound({levels})", K, seed)
        return Audit([_moved(knob, score, tell, i) for i, knob in enumerate(knobs)], None, None, **_facts(model, data))
    every, ode = (
        Job(_between(model, *model.logsnr_ends), f"bound(T=inf, {levels})", seed),
        f"ode(tol={tol}, probes={probes})",
    )
    knobs = _path_knobs(model, every, ode, T, levels, tol, probes)
    moves = [_moved(knob, score, tell, i) for i, knob in enumerate(knobs)]
    tell("gap", len(knobs))
    apart = gap(score(replace(every, method=ode)), score(every))
    tell("asymmetry", len(knobs) + 1)
    found = asymmetry(model, data[:probe_examples], None if cond is None else cond[:probe_examples], seed=seed)
    return Audit(moves, apart, found, **_facts(model, data))


def _facts(model: LatentVariableModel, data: Tensor) -> dict[str, Any]:
    return {"dims": model.dims, "bits": model.discrete, "examples": len(data)}


def _moved(knob: Knob, score: Callable[[Job], LikelihoodReport], tell: Callable[[str, int], None], i: int) -> Move:
    tell(f"{knob.title}: {knob.name}", i)
    before, after = score(knob.one), score(knob.other)
    return Move(knob.title, knob.name, str(knob.before), str(knob.after), before.nats, *gap(after, before))


def _path_knobs(
    model: GaussianDiffusion, every: Job, ode: str, T: Sequence[int], levels: str, tol: float, probes: int
) -> list[Knob]:
    """Both ends for the bound and the ODE; T; the ODE's tolerance and probes; the seed."""
    (clean, noisy), knobs = model.logsnr_ends, []
    flow = replace(every, method=ode)
    for by in (NOTCH, -NOTCH):
        for name, end, ends in (("clean end", clean, (clean + by, noisy)), ("noisy end", noisy, (clean, noisy + by))):
            elsewhere, shown = _between(model, *ends), (f"{end:.4g}", f"{end + by:.4g}")
            for title, job in (("all levels", every), ("ODE", flow)):
                knobs.append(Knob(title, name, *shown, job, replace(job, model=elsewhere)))
    for t in T:
        one, other = (Job(model, f"bound(T={k}, {levels})", every.seed) for k in (t, 2 * t))
        knobs.append(Knob(f"T = {t}", "T", t, 2 * t, one, other))
    tight, more = f"ode(tol={tol / 10}, probes={probes})", f"ode(tol={tol}, probes={2 * probes})"
    knobs.append(Knob("ODE", "tolerance", tol, tol / 10, flow, replace(flow, method=tight)))
    knobs.append(Knob("ODE", "probes", probes, 2 * probes, flow, replace(flow, method=more)))
    knobs += [_reseeded("all levels", every), _reseeded("ODE", flow)]
    return sorted(knobs, key=lambda knob: [knob.title != "all levels", knob.title == "ODE", KNOBS.index(knob.name)])


def _latent_knobs(model: LatentVariableModel, bound: str, K: int, seed: int) -> list[Knob]:
    """The seed, and the importance samples of a VAE."""
    own = Job(model, bound, seed)
    knobs = [_reseeded("bound", own)]
    if isinstance(model, VAE):
        one, other = (replace(own, method=f"iwae(K={k})") for k in (K, 2 * K))
        knobs += [Knob("IWAE", "K", K, 2 * K, one, other), _reseeded("IWAE", one)]
    return knobs


def _reseeded(title: str, job: Job) -> Knob:
    return Knob(title, "seed", job.seed, job.seed + 1, job, replace(job, seed=job.seed + 1))


def _between(model: GaussianDiffusion, clean: float, noisy: float) -> GaussianDiffusion:
    """The same network with all levels between two ends; on which curve and by which clock, the bound does not mind."""
    path = VP(LinearLogSNR(clean, noisy))
    return GaussianDiffusion(model.denoiser, path, Continuous(), model.decoder, event_shape=model.event_shape)


def asymmetry(
    model: GaussianDiffusion,
    x: Tensor,
    cond: Tensor | None = None,
    *,
    levels: int = 9,
    seed: int = 0,
) -> Asymmetry:
    """How far the learned Jacobian is from symmetric, at noise levels between the ends of the path.

    Args:
        model: a diffusion.
        x: data (N, *event), model units; one noise and one random sign vector for each.
        cond: class labels (N,) or None.
        levels: how many.
        seed: of noise and signs.
    """
    path = model.path
    ts = path.time(torch.linspace(*model.logsnr_ends, levels + 2, dtype=torch.float64)[1:-1])
    x = x.to(device=model.device, dtype=x.dtype if x.dtype == torch.float64 else model.dtype)
    noise = standard_normal(x.shape, seed, stream=ENCODER, dtype=x.dtype, device=x.device)
    normal = standard_normal(x.shape, seed, stream=PROBES, dtype=x.dtype, device=x.device)
    v = torch.where(normal < 0, -1.0, 1.0).to(x)
    rows: list[tuple[Tensor, ...]] = []
    with evaluating(model):
        ask = model.predict(cond)
        for t in ts:
            alpha, sigma = path.alpha(t).to(x), path.sigma(t).to(x)
            z = alpha * x + sigma * noise
            # J v and J' v of eps; score = -eps / sigma has the same ratio, and x0 = (z - sigma eps) / alpha
            forward = torch.func.jvp(lambda y, t=t: ask(y, t).eps, (z,), (v,))[1]
            backward = torch.func.vjp(lambda y, t=t: ask(y, t).eps, z)[1](v)[0]
            skew = _squares(forward - backward)
            rows.append((*_ratio(skew, _squares(forward)), *_ratio(sigma**2 * skew, _squares(v - sigma * forward))))
    columns = [torch.stack(values).double().cpu() for values in zip(*rows, strict=True)]
    return Asymmetry(path.logsnr(ts), *columns)


def _squares(x: Tensor) -> Tensor:
    return x.double().square().flatten(1).sum(1)


def _ratio(above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(E above / E below) from paired samples, and its standard error by the delta method."""
    ratio = (above.mean() / below.mean()).sqrt()
    if len(above) < 2:
        return ratio, torch.full_like(ratio, math.nan)
    spread = (above - ratio.square() * below).std() / below.mean() / math.sqrt(len(above))
    return ratio, spread / (2 * ratio).clamp(min=1e-12)
