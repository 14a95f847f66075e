"""What a model does not know, noise level by noise level.

The latent term of the bound is an area: half the integral, over logsnr, of the denoising error

    e(l) = E |eps - eps_hat(z_l)|^2,        z_l at the level logsnr = l,

so a plot of e against l shows where the bits are, and the distance to the error of the best *linear* denoiser shows
what a model knows beyond mean and covariance. One pass over the levels measures the curve with its errors:
:func:`denoising_profile`. It answers four more questions without asking the network again.

*Which bound would every T and every grid have?* With the variance sigma_p^2 that is best for the measured error, the
terms of a grid are closed forms of the curve at its levels (:class:`sdegen.levels.Optimal`), and with any other
variance they are linear in it: :meth:`DenoisingProfile.bound`, :func:`sdegen.likelihood.bound_of_every_T`.

*Which grid of T levels is the best?* :func:`sdegen.likelihood.best_grid`.

*Where should training draw?* At levels in proportion to sqrt(E|eps - eps_hat|^4): :meth:`DenoisingProfile.density`.

*How much of the variance of an estimate would a density leave?* :meth:`DenoisingProfile.moment`.

The curve between the levels. Every datum is asked once in every band of logsnr, at a uniform place in it, so that the
mean of a band is an unbiased estimate of its average error and the sum over bands of the whole area. The control
variate of the bound (:mod:`sdegen.likelihood.variate`) takes noise out of each: with the same noise its g is
subtracted, and its mean over the band, which is known, is added. The curve between the bands
(:class:`sdegen.likelihood.curve.ErrorCurve`) is linear in what was measured, so that standard errors follow from the
examples themselves. Where m enters through a logarithm, they are those of its linearisation, and as the variance is
the best one, that is the bound at this variance.

A variance that is chosen on some data flatters these data a little: measure a profile of training data to choose, and
score other data.

References: Guo, Shamai and Verdu 2005, doi:10.1109/TIT.2005.844072 (the bits are the area under the error); Kingma et
al. 2021, arXiv:2107.00630; Bao et al. 2022, arXiv:2201.06503 (the best variance).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdegen.densities import Shares, UniformLogSNR
from sdegen.levels import Continuous, Levels
from sdegen.likelihood.bound import ends
from sdegen.likelihood.control import Control, LinearGaussian
from sdegen.likelihood.control import bands as rule
from sdegen.likelihood.curve import ErrorCurve
from sdegen.likelihood.keyed import PROFILE, Keyed, strata
from sdegen.likelihood.report import LikelihoodReport, merged
from sdegen.likelihood.scoring import chunks, describe, discreteness, errors, evaluating, finite, numbered, offset, rows
from sdegen.likelihood.variate import ControlVariate, variate_for
from sdegen.models.diffusion import GaussianDiffusion
from sdegen.objectives import Bound, UniformTime, Weighting
from sdegen.results import Result
from sdegen.tables import aligned
from solvers.problem import Path

__all__ = ["DenoisingProfile", "denoising_profile"]

_OF_DATA = ("squares", "estimates", "reconstruction", "prior")  # repeats and data are the first axes
LOOKS = 8  # draws of z_0 for each datum and repeat: the clean end is one level, the bands are many


@dataclass(frozen=True, eq=False)
class DenoisingProfile:
    """The denoising error of a model as a function of logsnr; K bands of equal width, from the noise to the data.

    Attributes:
        path: of the model.
        edges: logsnr at the edges of the bands, rising, (K + 1,).
        squares: |eps - eps_hat|^2 of every repeat, datum and band, at a uniform place in the band, (R, N, K).
        estimates: the same less the control variate, plus its mean: of equal expectation, and less noisy, (R, N, K).
        reconstruction: the term of the bound at the clean end, (R, N).
        prior: the term at the noisy end, (R, N).
        linear: the average error of the best linear denoiser on the same data, (K,).
        report: the bound in continuous time, which the same calls give.
    """

    path: Path
    edges: Tensor = field(repr=False)
    squares: Tensor = field(repr=False)
    estimates: Tensor = field(repr=False)
    reconstruction: Tensor = field(repr=False)
    prior: Tensor = field(repr=False)
    linear: Tensor = field(repr=False)
    report: LikelihoodReport = field(repr=False)

    # --- the curve ---

    @property
    def dims(self) -> int:
        """D."""
        return self.report.dims

    @property
    def logsnr(self) -> Tensor:
        """The middles of the bands, (K,)."""
        return (self.edges[1:] + self.edges[:-1]) / 2

    @property
    def width(self) -> Tensor:
        """Of the bands, (K,)."""
        return self.edges.diff()

    @property
    def error(self) -> Tensor:
        """Average of |eps - eps_hat|^2 over each band, summed over the event, (K,)."""
        return self.estimates.mean((0, 1))

    @property
    def estimator_se(self) -> Tensor:
        """Standard error of :attr:`error` from the noise that was drawn, (K,); NaN with one repeat."""
        return torch.tensor([errors(band)[1] for band in self.estimates.unbind(2)], dtype=torch.float64)

    @property
    def data_se(self) -> Tensor:
        """Standard error of :attr:`error` from the data that were scored, (K,)."""
        return torch.tensor([errors(band)[2] for band in self.estimates.unbind(2)], dtype=torch.float64)

    @property
    def x0_error(self) -> Tensor:
        """|x - x0_hat|^2 at the middles, (K,): the same error in units of the data."""
        return (-self.logsnr).exp() * self.error

    @property
    def v_error(self) -> Tensor:
        """|v - v_hat|^2 at the middles on the circle alpha^2 + sigma^2 = 1, (K,)."""
        return (1 + (-self.logsnr).exp()) * self.error

    @property
    def nats(self) -> Tensor:
        """What each band contributes to the bound, nats per example, (K,)."""
        return 0.5 * self.width * self.error

    @property
    def share(self) -> Tensor:
        """The same as a share of the latent term, (K,)."""
        return self.nats / self.nats.sum()

    @property
    def mse(self) -> ErrorCurve:
        """E|x - x0_hat|^2 / D as a function of logsnr."""
        return ErrorCurve(self.edges, self.error / self.dims)

    # --- parts ---

    def part(self, rows: slice) -> DenoisingProfile:
        """The profile of some of the data."""
        mine = {name: getattr(self, name)[:, rows] for name in _OF_DATA}
        made = replace(self, **mine)
        return replace(made, report=made.bound())

    @classmethod
    def merged(cls, parts: Sequence[DenoisingProfile]) -> DenoisingProfile:
        """One profile of several, of data that follow each other."""
        whole = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in _OF_DATA}
        n = torch.tensor([len(part.report.values) for part in parts], dtype=torch.float64)
        linear = (n / n.sum()) @ torch.stack([part.linear for part in parts])
        made = replace(parts[0], **whole, linear=linear, report=merged([part.report for part in parts]))
        return replace(made, report=made.bound())

    # --- what follows from it ---

    def bound(self, levels: Levels | None = None) -> LikelihoodReport:
        """The bound on any levels.

        Args:
            levels: ``Continuous()`` by default; ``Discrete(ts, Optimal(profile.mse))`` is the form with the best
                variance.
        """
        levels = levels or Continuous()
        at = levels.nodes(self.path, 16 * len(self.linear))  # sixteen Gauss nodes in each band: exact for the spline
        slope = 0.5 * at.weight @ self.mse.weights(self.path.logsnr(at.t))
        latent = self.estimates @ slope + self.dims * levels.constant(self.path)
        values, estimator, spread = errors(latent + self.reconstruction + self.prior)
        terms = {"reconstruction": self.reconstruction, "latent": latent, "prior": self.prior}
        return replace(
            self.report,
            values=values,
            parts={name: float(term.mean()) for name, term in terms.items()},
            estimator_se=estimator,
            data_se=spread,
            settings={**self.report.settings, "levels": repr(levels)},
        )

    def moment(self, weighting: Weighting | None = None, *, evenly: bool = False) -> Tensor:
        """E [w |eps - eps_hat|^2]^2 in each band, (K,): what the variance of an estimate is made of.

        With draws from p, one estimate w |eps - eps_hat|^2 / 2p has the second moment INT moment / 4p dlogsnr.

        Args:
            weighting: w = 1 by default.
            evenly: only the variance about the mean of the level, which is what evenly spread draws leave.
        """
        t = self.path.time(self.logsnr).clamp(self.path.t_min, self.path.t_max)
        w = (weighting or Bound())(self.logsnr, UniformTime().pdf(t, self.path))
        pooled = self.squares.flatten(0, 1)
        return w.square() * (pooled.var(0) if evenly else pooled.square().mean(0))

    def density(self, weighting: Weighting | None = None, *, evenly: bool = False, floor: float = 0.01) -> Shares:
        """The sampling density with the least variance, p proportional to sqrt(moment).

        Args:
            weighting: as in :meth:`moment`.
            evenly: as in :meth:`moment`.
            floor: share of the draws that stays uniform.
        """
        root = self.moment(weighting, evenly=evenly).sqrt()
        shares = (1 - floor) * root / root.sum() + floor / len(root)
        return Shares(tuple(shares.flip(0).tolist()))

    # --- files ---

    def to_result(self, **more: Any) -> Result:
        """For an HDF5 file: the curve with its errors over the axis ``band``, and all that was measured."""
        ends = {"low": self.edges[:-1], "high": self.edges[1:]}
        curve = {
            "error": self.error,
            "estimator_se": self.estimator_se,
            "data_se": self.data_se,
            "linear": self.linear,
            "x0_error": self.x0_error,
            "v_error": self.v_error,
            "nats": self.nats,
            "share": self.share,
        }
        arrays: dict[str, tuple[Any, ...]] = {"band": (("band",), self.logsnr.numpy(), {"quantity": "logsnr"})}
        arrays |= {name: (("band",), values.numpy()) for name, values in {**ends, **curve}.items()}
        axes = ("repeat", "example", "band")
        arrays |= {name: (axes[: (of := getattr(self, name)).ndim], of.numpy()) for name in _OF_DATA}
        told = self.report.to_result(**more)
        clashes = {"mean": "part_mean", "nats": "example_nats"}
        arrays |= {clashes.get(name, name): tuple(array) for name, array in told.arrays.items()}
        return Result(arrays, told.attributes)

    @classmethod
    def from_result(cls, found: Result, path: Path) -> DenoisingProfile:
        """What :meth:`to_result` made, also after it has been in a file; ``path`` is the model's."""

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(np.array(found[name], dtype=np.float64))

        told = {"nats": found.arrays["example_nats"], "part": found.arrays["part"], "mean": found.arrays["part_mean"]}
        return cls(
            path=path,
            edges=torch.cat([tensor("low")[:1], tensor("high")]),
            **{name: tensor(name) for name in (*_OF_DATA, "linear")},
            report=LikelihoodReport.from_result(Result({k: tuple(v) for k, v in told.items()}, found.attributes)),
        )

    @property
    def shares(self) -> str:
        """Eight ranges of logsnr in a table: the error beside the linear denoiser's, and its share of the bits."""
        bits = self.report.bits_offset is not None
        rows = [["logsnr", "", "error / D", "linear / D", "bits/dim" if bits else "nats", "share"]]
        for i in torch.arange(len(self.linear)).chunk(8):
            ends = (f"{float(end):.2f}" for end in (self.edges[i[0]], self.edges[i[-1] + 1]))
            means = (f"{float(curve[i].mean()) / self.dims:.4f}" for curve in (self.error, self.linear))
            nats, share = float(self.nats[i].sum()), float(self.share[i].sum())
            rows.append([*ends, *means, f"{self.report.in_bits(nats) if bits else nats:.4f}", f"{100 * share:.1f} %"])
        return aligned(rows, right=range(6))

    def __str__(self) -> str:
        return f"{self.report}\n{self.shares}"


def denoising_profile(
    model: GaussianDiffusion,
    data: Tensor,
    cond: Tensor | None = None,
    *,
    bands: int = 48,
    repeats: int = 2,
    linear: LinearGaussian | None = None,
    control: str | Control | ControlVariate | None = "auto",
    samples: Sequence[int] | None = None,
    batch: int | None = None,
    seed: int = 0,
    bin_width: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DenoisingProfile:
    """Measure the denoising error of a model at all noise levels.

    Args:
        model: a diffusion; its levels do not matter, its path's ends do.
        data: (N, *event), model units.
        cond: class labels (N,) or None.
        bands: of equal width in logsnr between the ends of the path.
        repeats: network calls for each datum in each band, at least 2 to know the estimator's error.
        linear: the linear denoiser to compare with, as fitted to training data; to ``data`` by default.
        control: as in :func:`sdegen.likelihood.bound`: less noise for the same mean.
        samples: numbers of the data, which key their noise; ``range(N)`` by default.
        batch: network rows at a time; as many as fit into half a gigabyte by default.
        seed: of all noise.
        bin_width: width of the bins that ``data`` were dequantised over, to get bits from a density.
        progress: called as ``progress(done, N)`` after every batch.

    Raises:
        TypeError: the model has no noise levels, as a VAE.
        ValueError: fewer than 4 bands or 1 repeat, or data that are not the model's.
    """
    if not isinstance(model, GaussianDiffusion):
        raise TypeError(f"a {type(model).__name__} has no noise levels: a profile is measured of a diffusion")
    if bands < 4 or repeats < 1:
        raise ValueError(f"a profile takes at least 4 bands and 1 repeat, not {bands} and {repeats}")
    began, model = time.perf_counter(), model.continuous()  # another model, with a count of its own
    numbers, bits = numbered(data, samples), offset(model, bin_width)
    low, high = reversed(model.logsnr_ends)
    edges = torch.linspace(low, high, bands + 1, dtype=torch.float64)
    found: list[list[Tensor]] = []  # squares, estimates, reconstruction and prior of a batch
    with evaluating(model):
        variate = variate_for(control, model, data, cond, bands * repeats, seed, batch)
        known = None if variate is None else variate.averages(edges)
        done = 0
        for x, labels in chunks(model, data, cond, (batch or rows(model)) // bands):
            here = numbers[done : (done := done + len(x))]
            drawn: list[tuple[Tensor, ...]] = []
            for r in range(repeats):
                squares, less = _draw(model, x, labels, variate, Keyed(seed, here, r, bands, PROFILE))
                estimates = squares if known is None else squares - less + known(x)
                clean, noisy = ends(model, x, labels, Keyed(seed, here, r, LOOKS, PROFILE + 2))
                drawn.append((finite(squares, here), estimates, finite(clean, here).mean(1), noisy[:, 0]))
            found.append([torch.stack(part).double().cpu() for part in zip(*drawn, strict=True)])
            if progress is not None:
                progress(done, len(data))
    report = LikelihoodReport(
        method="variational bound from a profile",
        kind="upper bound",
        of="probability" if model.discrete else "density",
        values=torch.zeros(len(data), dtype=torch.float64),
        parts={},
        estimator_se=math.nan,
        data_se=math.nan,
        solver_error=None,
        dims=model.dims,
        bits_offset=bits,
        forward=model.evaluations / len(data),
        vjp=0,
        jvp=0,
        seconds=time.perf_counter() - began,
        logsnr=model.logsnr_ends,
        **discreteness(model, bin_width),
        solver=None,
        tolerance=None,
        seed=seed,
        settings={**describe(model), "bands": bands, "repeats": repeats, "control": repr(variate)},
    )
    curve = (linear or LinearGaussian.fit(data)).integral(*rule(edges))(data[:: -(-len(data) // 2048)]).mean(0).cpu()
    made = DenoisingProfile(
        model.path, edges, *(torch.cat(part, 1) for part in zip(*found, strict=True)), linear=curve, report=report
    )
    return replace(made, report=made.bound())


def _draw(
    model: GaussianDiffusion, x: Tensor, cond: Tensor | None, variate: ControlVariate | None, normal: Keyed
) -> tuple[Tensor, Tensor]:
    """The squared error in every band from the noise to the data, and the control variate there, (B, K) each."""
    bands = normal.draws
    y, labels = x.repeat_interleave(bands, 0), None if cond is None else cond.repeat_interleave(bands, 0)
    t, noise = UniformLogSNR().time(strata(normal, y), model.path), normal(y)
    squares, less = model.error(y, t, noise, labels).reshape(len(x), bands), torch.zeros(len(x), bands).to(t)
    if variate is not None:
        logsnr = model.path.logsnr(t).reshape(len(x), bands)
        less = variate(x[:, None], logsnr, noise.reshape(len(x), bands, *x.shape[1:]))
    return squares.flip(1), less.flip(1)
