"""The control variate of the latent term: which part of the noise is known, and where the rest is large.

The latent term is 1/2 INT E f dm with f = |eps - eps_hat|^2, m the measure of the levels. A few *pilot* calls of the
network, each noise level twice with different noises, show how f rises and falls with what needs no network: with
controls h_j (:mod:`sdegen.likelihood.control`),

    f  ~  g = a(l) + SUM_j b_j(l) h_j(x, l, eps),                l = logsnr,

a and b_j piecewise linear. The differences within a pair give b by least squares (what a datum adds to f is the same in
both and drops out), the means of the pairs give a, and what is left of the differences gives the standard deviation
s(l) of f - g at a level. The estimate of the latent term is then

    1/2 INT E g dm  +  the mean over stratified draws l ~ p of  (f - g) dm / 2p,         p proportional to s dm / dl.

The first term is known exactly for every datum: the means of the controls are closed forms, and INT is a quadrature or,
for a DDPM, a sum. So the estimate has the mean of f whatever a, b and p are, as long as they do not depend on the noise
that f is drawn with. The pilot's noise is another stream, so that they may well come from the data that are scored.

Why b and not one: a trained network is not linear, and one that knows grey levels makes hardly any error near the data,
where a linear denoiser errs by |eps|^2. There b is small, and a control of another kind takes over. Why a: it is the
same for all data and removes most of what is left of the choice of levels.

Reference: Glasserman 2003, Monte Carlo Methods in Financial Engineering, sections 4.1 and 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import ndtr

from sdegen.densities import Density, Shares, UniformLogSNR
from sdegen.levels import Levels
from sdegen.likelihood.control import Control, IndependentLevels, LinearGaussian, bands
from sdegen.likelihood.scoring import bins_of, chunks, evaluating, rows
from sdegen.models.base import LatentVariableModel
from sdegen.models.diffusion import GaussianDiffusion
from solvers import standard_normal
from solvers.noise import PILOT
from solvers.problem import Path

__all__ = ["ControlVariate", "controls_for", "pilot", "variate_for"]

SHARE, LEAST, MOST = 24, 16, 512  # pairs of calls in the pilot: one for so many draws, at least, at most
PAIRS = 6  # of the pilot, at least, between two knots of a and b
INTERVALS = 12  # between knots, at most
BANDS = 128  # of the density
WALK = 0.3  # how much b changes in a unit of logsnr
UNIFORM = 0.05  # share of the draws that no pilot moves: no draw counts more than twenty times a uniform one


@dataclass(frozen=True, eq=False)
class ControlVariate:
    """g and p of the module's text, ready to use; made by :func:`pilot`.

    Attributes:
        controls: h_j.
        knots: logsnr from the noisy to the clean end, equally spaced, (J + 1,).
        coefficients: a and b_j at the knots, (J + 1, 1 + C).
        density: p.
        looks: draws of z_0 that pay as much as one noise level does, where the decoder asks the network.
        calls: network calls that the pilot took.
        of: the number of data it looked at.
    """

    controls: tuple[Control, ...]
    knots: Tensor
    coefficients: Tensor
    density: Density
    looks: float
    calls: int
    of: int

    def __repr__(self) -> str:
        names = " + ".join(map(repr, self.controls)) or "a mean"
        return f"{names}, pilot of {self.calls} calls on {self.of} examples"

    def __call__(self, x: Tensor, logsnr: Tensor, noise: Tensor) -> Tensor:
        """g, shapes as for :meth:`Control.error`."""
        c = self._at(logsnr)
        found = c[..., 0]
        for j, control in enumerate(self.controls):
            found = found + c[..., j + 1] * control.error(x, logsnr, noise)
        return found

    def integral(self, levels: Levels, path: Path) -> Callable[[Tensor], Tensor]:
        """``x -> 1/2 INT E g dm`` for data (N, *event), (N,) and float64."""
        at = levels.nodes(path, 16 * (len(self.knots) - 1))  # panels end where a and b have their corners
        logsnr = path.logsnr(at.t)
        weighted = 0.5 * at.weight[:, None] * self._at(logsnr)
        constant = float(weighted[:, 0].sum())
        means = [control.integral(logsnr, weighted[:, j + 1]) for j, control in enumerate(self.controls)]

        def integral(x: Tensor) -> Tensor:
            found = torch.full((len(x),), constant, dtype=torch.float64, device=x.device)
            return sum((mean(x) for mean in means), found)

        return integral

    def averages(self, edges: Tensor) -> Callable[[Tensor], Tensor]:
        """``x -> E g`` averaged over each band of logsnr between ``edges`` (K + 1,): data (N, *event) to (N, K)."""
        logsnr, weight = bands(edges, self.knots)
        share = self._at(logsnr)
        constant = share[:, 0] @ weight
        means = [control.integral(logsnr, share[:, j + 1, None] * weight) for j, control in enumerate(self.controls)]
        return lambda x: sum((mean(x) for mean in means), constant.to(x.device).expand(len(x), -1))

    def _at(self, logsnr: Tensor) -> Tensor:
        """a and b_j at logsnr (...), (..., 1 + C)."""
        return _hats(logsnr, self.knots) @ self.coefficients.to(logsnr.device)


def controls_for(model: GaussianDiffusion, x: Tensor) -> tuple[Control, ...]:
    """What is compared with by default: the linear denoiser, and for grey levels that of independent pixels.

    Args:
        model: says whether there are grey levels.
        x: data (N, *event) that mean, covariance and histogram are taken of.
    """
    bins = bins_of(model)
    linear = LinearGaussian.fit(x)
    return (linear,) if bins is None else (linear, IndependentLevels.fit(x, bins))


def variate_for(
    control: str | Control | ControlVariate | None,
    model: LatentVariableModel,
    x: Tensor,
    cond: Tensor | None = None,
    draws: int = 32,
    seed: int = 0,
    batch: int | None = None,
) -> ControlVariate | None:
    """What the bound of data takes for a given ``control``.

    Args:
        control: "auto", one control, a finished :func:`pilot` or None.
        model: any.
        x: all data that will be scored, (N, *event).
        cond: class labels (N,) or None.
        draws: noise levels of each datum that are planned: a pilot takes one call for a dozen, and 1024 at most.
        seed: of the pilot's noise.
        batch: network rows at a time.

    Returns:
        None where there are no noise levels, or too few draws to learn from.
    """
    if not (control is None or control == "auto" or isinstance(control, Control | ControlVariate)):
        raise ValueError(f'control is "auto", a control, a finished pilot or None, not {control!r}')
    if not isinstance(model, GaussianDiffusion):
        if control not in (None, "auto"):
            raise ValueError(f"a control variate is for diffusions, and this model is a {type(model).__name__}")
        return None
    if isinstance(control, ControlVariate):
        made, wanted = [control.knots[-1].item(), control.knots[0].item()], list(model.logsnr_ends)
        if max(abs(one - other) for one, other in zip(made, wanted, strict=True)) > 1e-6:
            raise ValueError(
                f"the pilot looked at logsnr {made[0]:.6g} to {made[1]:.6g}, and this model's ends are "
                f"{wanted[0]:.6g} and {wanted[1]:.6g}: make one for this model"
            )
    if control is None or isinstance(control, ControlVariate):
        return control
    pairs = min(draws * len(x) // SHARE, MOST)
    if pairs < LEAST:
        return None
    controls = (control,) if isinstance(control, Control) else None
    return pilot(model, x, cond, controls=controls, pairs=pairs, seed=seed, batch=batch)


def pilot(
    model: GaussianDiffusion,
    x: Tensor,
    cond: Tensor | None = None,
    *,
    controls: Sequence[Control] | None = None,
    pairs: int = 512,
    seed: int = 0,
    batch: int | None = None,
) -> ControlVariate:
    """Look at a few noise levels of a few data and say how much of each control to take, and where to look next.

    Args:
        model: a diffusion.
        x: data (N, *event), model units; training data, or those that will be scored. ``pairs`` of them are looked at,
            evenly spread, again from the start where there are fewer.
        cond: class labels (N,) or None.
        controls: :func:`controls_for` the data by default.
        pairs: noise levels, each with two noises; the network is called twice as often.
        seed: of the noise, a stream of its own.
        batch: network rows at a time.

    Returns:
        The control variate for the model's bound, of these data or others.
    """
    if pairs < 1:
        raise ValueError(f"a pilot has at least one pair of calls, not {pairs}")
    model.check(x)
    controls = controls_for(model, x) if controls is None else tuple(controls)
    path, before = model.path, model.evaluations
    clean, noisy = model.logsnr_ends
    knots = torch.linspace(noisy, clean, 1 + min(max(pairs // PAIRS, 1), INTERVALS), dtype=torch.float64)
    rank = torch.arange(pairs, dtype=torch.float64)
    chosen = (rank * (math.sqrt(5) - 1) / 2 % 1 * len(x)).long()  # evenly spread, and not in step with the levels
    numbers = standard_normal((pairs, 1 + 2 * model.dims), seed, stream=PILOT)
    at = model.levels.draw(path, (rank + ndtr(numbers[:, 0].double())) / pairs, UniformLogSNR())
    noises = numbers[:, 1:].reshape(pairs, 2, *model.event_shape)
    errors, ends, start = [], [], 0
    with evaluating(model):
        size = (batch or rows(model)) // 2
        for part, labels in chunks(model, x[chosen], None if cond is None else cond[chosen], size):
            here = slice(start, start := start + len(part))
            t, noise = at.t[here].to(part.device), noises[here].to(part)
            twice, both = part.repeat_interleave(2, 0), None if labels is None else labels.repeat_interleave(2, 0)
            f = model.error(twice, t.repeat_interleave(2), noise.flatten(0, 1), both).reshape(-1, 2)
            level = path.logsnr(t)[:, None].expand(-1, 2)
            errors.append(torch.stack([f, *(c.error(part[:, None], level, noise) for c in controls)], -1).cpu())
            if model.decoder.drawn and model.decoder.calls:
                some = slice(None, None, 8)
                q, label = model.encode(part[some]).bottom, None if labels is None else labels[some]
                costs = [model.reconstruction(part[some], q, noise[some, i], label) for i in (0, 1)]
                ends.append((costs[0] - costs[1]).cpu())

    found, hats = torch.cat(errors), _hats(path.logsnr(at.t), knots)
    apart, mean = found[:, 0] - found[:, 1], found.mean(1)
    b = _shares(apart, hats, knots)
    left = apart[:, 0] - ((hats @ b) * apart[:, 1:]).sum(1)
    a = _averages(mean[:, 0] - ((hats @ b) * mean[:, 1:]).sum(1), hats)
    variances = _averages(0.5 * left.square(), hats)

    places = (torch.arange(BANDS, dtype=torch.float64) + 0.5) / BANDS
    at = model.levels.draw(path, places, UniformLogSNR())
    spread = at.weight * (_hats(path.logsnr(at.t), knots) @ variances).sqrt()  # of one draw, were p uniform
    total = float(spread.mean())
    shares = UNIFORM + (1 - UNIFORM) * spread / total if total > 0 else torch.ones(BANDS)
    looks = math.sqrt(float(torch.cat(ends).square().mean())) / max(total, 1e-9) if ends else 1.0
    return ControlVariate(
        controls=controls,
        knots=knots,
        coefficients=torch.cat([a[:, None], b], 1),
        density=Shares(tuple(shares.tolist())),
        looks=math.sqrt(2) * looks,  # half a difference's variance is a draw's; the latent term is half an integral
        calls=model.evaluations - before,
        of=min(len(x), pairs),
    )


def _hats(logsnr: Tensor, knots: Tensor) -> Tensor:
    """Piecewise linear functions that are one at one knot and zero at the others, (..., J + 1); they sum to one."""
    ends, last = knots.to(logsnr.device), len(knots) - 1
    place = ((logsnr - ends[0]) / (ends[-1] - ends[0]) * last).clamp(0, last)
    return (1 - (place[..., None] - torch.arange(last + 1, device=logsnr.device)).abs()).clamp(min=0)


def _averages(values: Tensor, hats: Tensor) -> Tensor:
    """The average of values (P,) around each knot, (J + 1,)."""
    return (hats.mT @ values) / hats.sum(0).clamp(min=1e-9)


def _shares(apart: Tensor, hats: Tensor, knots: Tensor) -> Tensor:
    """b at the knots, (J + 1, C), from the differences of the pairs, (P, 1 + C).

    Weighted least squares, with a random walk as prior: b changes by about 0.3 in a unit of logsnr. Few pairs then give
    a b that hardly depends on the level, and many what they say. A control that is nowhere different gets zero.
    """
    count = apart.shape[1] - 1
    spread = (hats @ _averages(apart[:, 0].square(), hats)).sqrt()
    scaled = apart / spread.clamp(min=max(1e-3 * float(spread.max()), 1e-300))[:, None]  # what is tiny has no say
    design = (hats[:, :, None] * scaled[:, None, 1:]).flatten(1)
    steps = torch.eye(len(knots), dtype=torch.float64).diff(dim=0) / (WALK * float(knots[1] - knots[0]) ** 0.5)
    prior = torch.kron(steps.mT @ steps, torch.eye(count, dtype=torch.float64))
    weak = 1e-6 * torch.eye(len(prior), dtype=torch.float64)
    return torch.linalg.solve(design.mT @ design + prior + weak, design.mT @ scaled[:, 0]).reshape(len(knots), count)
