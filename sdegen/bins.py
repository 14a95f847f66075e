"""Grey levels as numbers.

A pixel with ``V`` grey levels 0, ..., V-1 lives in model units on [-1, 1] at the centres of V equal bins,

    v_k = 2 (k + 1/2) / V - 1,        bin width  2 / V,

so that level 0 and level V-1 are half a bin away from the ends and uniform dequantization fills [-1, 1] exactly. Every
place that must know which numbers a pixel may take (the categorical denoiser, the decoders, the dequantizers, the
change from nats of a density to bits of a discrete image) asks the same :class:`Bins`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Bins"]


@dataclass(frozen=True)
class Bins:
    """``count`` equal bins on [-1, 1].

    Args:
        count: number of grey levels V, at least 2.

    >>> Bins(4).centers()
    tensor([-0.7500, -0.2500,  0.2500,  0.7500])
    >>> Bins(4).index(torch.tensor([0.25, -0.75]))
    tensor([2, 0])
    """

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 2:
            raise ValueError(f"bins need an integer count of at least 2, not {self.count!r}")

    @property
    def width(self) -> float:
        """Distance between neighbouring levels in model units, 2 / V."""
        return 2.0 / self.count

    def centers(self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        """All values v_k in rising order, shape (V,)."""
        return self._value(torch.arange(self.count, dtype=torch.float64, device=device)).to(dtype)

    def value(self, k: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Model units of grey levels ``k`` (integers in 0..V-1, any shape).

        Raises:
            ValueError: a level lies outside 0..V-1.
        """
        if k.numel() and not (int(k.min()) >= 0 and int(k.max()) < self.count):
            raise ValueError(f"grey levels must lie in 0..{self.count - 1}, not {int(k.min())}..{int(k.max())}")
        return self._value(k.to(torch.float64)).to(dtype)

    def index(self, x: Tensor) -> Tensor:
        """Grey levels of data in model units; the inverse of :meth:`value`.

        Args:
            x: floats at bin centres, any shape.

        Returns:
            int64 levels, the shape of ``x``.

        Raises:
            ValueError: some value is not a bin centre (further than a thousandth of a bin from one), so that its
                probability under a discrete model would be meaningless.
        """
        k = self.nearest(x)
        off = (x - self._value(k.to(torch.float64)).to(x)).abs() > 1e-3 * self.width
        if bool(off.any()):
            bad = float(x[off].flatten()[0])
            raise ValueError(
                f"{int(off.sum())} of {x.numel()} values are not centres of the {self.count} grey levels "
                f"2 (k + 1/2) / {self.count} - 1; the first is {bad:.6g}"
            )
        return k

    def nearest(self, x: Tensor) -> Tensor:
        """The grey level whose bin holds ``x`` (clipped to the first and last): rounding for pictures and samples."""
        k = ((x.to(torch.float64) + 1) * (self.count / 2)).floor()
        return k.nan_to_num(0).clamp_(0, self.count - 1).long()

    def log_histogram(self, x: Tensor, pseudocount: float = 1.0) -> Tensor:
        """Logarithm of the share of each level at each pixel, smoothed so that no share is zero.

        p_j(k) = (n_j(k) + c q(k)) / (N + c),      q(k) = (n(k) + 1) / (N D + V)

        A pixel that is constant in the data, or has never shown some level, borrows ``pseudocount`` images' worth of
        the histogram of all pixels.

        Args:
            x: data in model units at bin centres, shape (N, *event).
            pseudocount: c > 0, in images.

        Returns:
            float32 log-probabilities, shape (*event, V).
        """
        if pseudocount <= 0:
            raise ValueError(f"the pseudocount must be positive, not {pseudocount}")
        k = self.index(x).flatten(1)
        n, d = k.shape
        flat = k + self.count * torch.arange(d, device=k.device)
        counts = torch.bincount(flat.flatten(), minlength=d * self.count).reshape(d, self.count).double()
        everywhere = (counts.sum(0) + 1) / (n * d + self.count)
        p = (counts + pseudocount * everywhere) / (n + pseudocount)
        return p.log().float().reshape(*x.shape[1:], self.count)

    def _value(self, k: Tensor) -> Tensor:
        return (2 * k + 1) / self.count - 1
