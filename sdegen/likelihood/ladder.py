"""The denoising profile of a data set in shards, kept like a likelihood, and the bound of a ladder of T that follows.

    profile, known = measure(model, data, folder="runs/digits")      # goes on where a killed one stopped
    print(ladder(profile))                                           # T = 10 to 1000 and all levels, and the best ten

What is chosen on data flatters these data: the best variance and the best grid of so many levels are chosen on one half
of the examples and scored on the other, and the other way round. That takes no further network calls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sdegen.data import Dataset
from sdegen.levels import Discrete, Optimal, posterior
from sdegen.likelihood.control import LinearGaussian
from sdegen.likelihood.evaluate import given
from sdegen.likelihood.every_t import best_grid
from sdegen.likelihood.methods import countable
from sdegen.likelihood.profile import DenoisingProfile, denoising_profile
from sdegen.likelihood.report import LikelihoodReport, merged
from sdegen.likelihood.store import Store, fingerprint, part
from sdegen.likelihood.tables import number
from sdegen.likelihood.variate import ControlVariate, variate_for
from sdegen.models import GaussianDiffusion, LatentVariableModel
from sdegen.provenance import provenance
from sdegen.tables import aligned

__all__ = ["Ladder", "ladder", "measure"]

TS = (10, 30, 100, 300, 1000)


def measure(
    model: LatentVariableModel,
    data: Dataset,
    cond: Tensor | None = None,
    *,
    split: str = "test",
    n: int | None = None,
    bands: int = 48,
    repeats: int = 2,
    seed: int = 0,
    bin_width: float | None = None,
    folder: Path | str | None = None,
    again: bool = False,
    shard: int = 64,
    notes: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    progress: Callable[[float], None] | None = None,
) -> tuple[DenoisingProfile | None, bool]:
    """The denoising profile of a data set, beside the linear denoiser of its training data.

    Args:
        model: a diffusion.
        data: a data set.
        cond: class labels of the split, or None.
        split: "test" or "train".
        n: only the first so many examples.
        bands: of :func:`denoising_profile`.
        repeats: of :func:`denoising_profile`.
        seed: of all noise. Example i's depends on (seed, i) alone.
        bin_width: of the bins that real numbers were dequantised over, in model units, to get bits from a density.
        folder: where shards and the profile are kept, group ``profile`` of ``results.h5``; several processes may share
            it. Nothing is kept where None.
        again: compute what is known, too.
        shard: examples at a time.
        notes: attributes of the result; :func:`sdegen.provenance.provenance` by default.
        dry_run: check everything and compute nothing.
        progress: called with the share that is done.

    Returns:
        The profile, None of a dry run, and whether it was known.

    Raises:
        ValueError: the model has no noise levels, or the data are not this model's; before anything is computed.
    """
    if not isinstance(model, GaussianDiffusion):
        raise ValueError(f"a profile is of a diffusion's noise levels, and this model is a {type(model).__name__}")
    countable(model, data)
    x, cond, card = given(model, data, cond, split, n, bin_width)
    if dry_run:
        return None, False

    @functools.cache
    def learned() -> tuple[LinearGaussian, ControlVariate | None]:
        return LinearGaussian.fit(data.train), variate_for("auto", model, x, cond, bands * repeats, seed)

    def compute(rows: range, tell: Callable[[float], None] | None) -> DenoisingProfile:
        (linear, control), here = learned(), slice(rows.start, rows.stop)
        found = denoising_profile(
            model, x[here], None if cond is None else cond[here], bands=bands, repeats=repeats, linear=linear,
            control=control, samples=rows, seed=seed, bin_width=bin_width,
            progress=None if tell is None else lambda done, of: tell(done / of),
        )  # fmt: skip
        calls = 0 if control is None else control.calls / len(x)
        return replace(found, report=replace(found.report, forward=found.report.forward + calls))

    shards = [range(i, min(i + shard, len(x))) for i in range(0, len(x), shard)]
    if folder is None:
        parts = [compute(rows, part(progress, i, len(shards))) for i, rows in enumerate(shards)]
        return DenoisingProfile.merged(parts), False
    about = {**(provenance() if notes is None else notes), **card}
    store = Store(Path(folder), about, partial(DenoisingProfile.from_result, path=model.path), "profile")
    key = fingerprint("profile", model.continuous(), data.train, x, cond, bands, repeats, seed, bin_width, shard)
    return store.get(key, split, shards, compute, DenoisingProfile.merged, progress, again=again)


@dataclass(frozen=True)
class Ladder:
    """The bound with T levels for some T, on the path's own clock, and on the best grid of few.

    Attributes:
        posterior: T -> report, with the posterior's variance.
        best: T -> report, with the variance that is best for the measured error.
        limit: all levels.
        few: the report of the best grid, with the best variance.
        grid: its levels, logsnr from the data to the noise, (T + 1,).
    """

    posterior: Mapping[int, LikelihoodReport]
    best: Mapping[int, LikelihoodReport]
    limit: LikelihoodReport
    few: LikelihoodReport
    grid: Sequence[float]

    def rows(self) -> list[dict[str, Any]]:
        """A flat dictionary for each bound."""
        named = [
            *[(T, "posterior", "uniform", r) for T, r in self.posterior.items()],
            *[(T, "best", "uniform", r) for T, r in self.best.items()],
            (len(self.grid) - 1, "best", "best", self.few),
            (math.inf, "", "", self.limit),
        ]
        keys = ("nats", "bits_per_dim", "estimator_se", "data_se", "estimator_se_bits", "data_se_bits")
        return [
            {"T": T, "variance": variance, "grid": grid, **{key: r.to_dict()[key] for key in keys}}
            for T, variance, grid, r in named
        ]

    def __str__(self) -> str:
        bits = self.limit.bits_offset is not None

        def cells(r: LikelihoodReport) -> list[str]:
            value, errors = (r.bits_per_dim if bits else r.nats), (r.estimator_se, r.data_se)
            return [number(value, 4), *(number(r.in_bits(e) if bits else e, 4) for e in errors)]

        head = ["T", "posterior variance", "± draws", "± data", "best variance", "± draws", "± data"]
        rows = [[str(T), *cells(r), *cells(self.best[T])] for T, r in self.posterior.items()]
        rows.append(["all", *cells(self.limit), *cells(self.limit)])
        value, draws, spread = cells(self.few)
        halves = "one half of the\nexamples and scored on the other"
        lines = [
            f"the bound with T levels, {'bits/dim' if bits else 'nats'}; what is best was chosen on "
            f"{halves if len(self.limit.values) > 1 else 'the one example'}",
            "",
            aligned([head, *rows], right=range(7)),
            "",
            f"the best grid of {len(self.grid) - 1} levels: {value} ± {draws} draws ± {spread} data, at logsnr",
            "  " + " ".join(f"{level:.2f}" for level in self.grid),
        ]
        return "\n".join(lines)


def ladder(profile: DenoisingProfile, Ts: Sequence[int] = TS, few: int = 10) -> Ladder:
    """The bounds of some T, and of the best grid of ``few`` levels; no network is asked.

    Args:
        profile: of K bands and N data; with N > 1 what is best is chosen on one half of them and scored on the other.
        Ts: numbers of levels, each in equal steps of the path's own time.
        few: levels of the best grid.

    Returns:
        A :class:`Ladder`, whose reports are in nats per example and know their bits/dim.
    """
    path = profile.path

    def on_grid(choice: DenoisingProfile, T: int) -> Discrete:
        return Discrete.on(path, T, variance=Optimal(choice.mse))

    def on_best(choice: DenoisingProfile, T: int) -> Discrete:
        return Discrete(best_grid(choice, T), Optimal(choice.mse))

    return Ladder(
        {T: profile.bound(Discrete.on(path, T, variance=posterior)) for T in Ts},
        {T: _across(profile, partial(on_grid, T=T)) for T in Ts},
        profile.report,
        _across(profile, partial(on_best, T=few)),
        path.logsnr(best_grid(profile, few)).tolist(),
    )


def _across(profile: DenoisingProfile, choose: Callable[[DenoisingProfile], Discrete]) -> LikelihoodReport:
    """The bound of levels that are chosen on every other datum and scored on the rest; of one datum, on itself."""
    if len(profile.report.values) < 2:
        return profile.bound(choose(profile))
    even, odd = (profile.part(slice(i, None, 2)) for i in (0, 1))
    return merged([even.bound(choose(odd)), odd.bound(choose(even))])
