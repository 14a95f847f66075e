"""Sampling densities that are learned while they are used.

The second moment of l = w |eps - eps_hat|^2 / 2p is INT h / p dlogsnr with an h that does not depend on p, so what a
batch of training sees anyway says how to lower it. Two densities do:

:class:`SecondMoment` keeps a running mean of h in each of K bands and draws by its square root, which is the optimum in
closed form. It is the loss-second-moment resampler of Nichol and Dhariwal on the continuous axis.

:class:`LearnedClock` descends along the gradient of the variance. For parameters theta of p,

    d/dtheta INT h / p = -INT (h / p^2) dp/dtheta = -E_p [ l^2 dlog p/dtheta ],

an average over the draws of the batch, with l^2 as a number: nothing is differentiated through the network, where the
pathwise gradient of VDM needs a second pass. The mean of l is the loss itself and does not depend on theta, so the
second moment and the variance have one gradient. The map from uniform numbers to places is a smooth rising spline
pinned at both ends, which makes it a *schedule*: training with uniform times on :meth:`LearnedClock.schedule` is
training with this density.

Both are modules: their state is saved with the weights of the model, and a resumed run goes on bit for bit.

References: Kingma et al. 2021, arXiv:2107.00630, section 5 and appendix H (a schedule that minimises the variance);
Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdegen.densities import Banded, Placed, band
from sdegen.schedules import Learned
from sdegen.splines import RisingSpline
from solvers.problem import Path

__all__ = ["LearnedClock", "SecondMoment"]

FLOOR = 1e-3  # share of a learned clock that runs evenly: no two knots ever meet


class SecondMoment(Banded, nn.Module):
    """Bands drawn by the square root of the second moment of what was seen in them.

    p_k proportional to sqrt(E (p l)^2 in band k), with a running mean of the last ``memory`` draws of each band; all
    bands alike until each was drawn ``least`` times.

    Args:
        bands: of equal width in logsnr.
        memory: draws that the mean of a band remembers, about.
        least: draws of every band before the first use.
        floor: share of the draws that stays uniform, so that no band is forgotten.
    """

    moments: Tensor
    counts: Tensor

    def __init__(self, bands: int = 32, *, memory: int = 500, least: int = 16, floor: float = 0.02) -> None:
        nn.Module.__init__(self)
        if bands < 1 or memory < 1 or not 0 < floor <= 1:
            raise ValueError(f"needs bands and memory of at least 1 and 0 < floor <= 1, not {bands}, {memory}, {floor}")
        self.memory, self.least, self.floor = memory, least, floor
        self.register_buffer("moments", torch.zeros(bands, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(bands, dtype=torch.float64))

    def masses(self) -> Tensor:
        root = self.moments.sqrt()
        even = torch.full_like(root, 1 / len(root))
        shares = torch.lerp(root / root.sum().clamp(min=1e-300), even, self.floor)
        return torch.where((self.counts.min() >= self.least) & (root.sum() > 0), shares, even)

    @torch.no_grad()
    def learn(self, u: Tensor, values: Tensor, path: Path) -> Tensor | float:
        place = self.place(u)
        i = band(place, len(self.moments))
        squares = (values.detach().double() * self.crowd(place)).square()
        seen = torch.zeros_like(self.counts).index_add_(0, i, torch.ones_like(squares))
        total = torch.zeros_like(self.moments).index_add_(0, i, squares)
        self.counts += seen
        rate = 1 / torch.maximum(seen, self.counts.clamp(1, self.memory))
        self.moments += (total - seen * self.moments) * rate
        return 0.0

    def extra_repr(self) -> str:
        return f"bands={len(self.moments)}"


class LearnedClock(Placed, nn.Module):
    """A smooth monotone map from uniform numbers to places, trained to minimise the variance of the loss.

    The places of K + 1 equally spaced uniform numbers are sums of softmax(``rate`` theta), 0 and 1 at the ends; theta
    is a parameter of the model and is trained with it. However dense it gets somewhere, nowhere does it fall much below
    1 / K of the uniform density, so that no draw weighs much more than K of them.

    Args:
        knots: K.
        rate: how much faster it learns than the network's weights.
    """

    def __init__(self, knots: int = 24, *, rate: float = 4.0) -> None:
        nn.Module.__init__(self)
        if knots < 2 or not rate > 0:
            raise ValueError(f"needs at least 2 knots and a positive rate, not {knots} and {rate}")
        self.rate = rate
        self.theta = nn.Parameter(torch.zeros(knots, dtype=torch.float64))

    def spline(self) -> RisingSpline:
        """Place against share, differentiable in theta."""
        steps = torch.lerp((self.rate * self.theta).softmax(0), torch.full_like(self.theta, 1 / len(self.theta)), FLOOR)
        points = torch.cat([steps.new_zeros(1), steps[:-1].cumsum(0), steps.new_ones(1)])
        return RisingSpline(points)

    @torch.no_grad()
    def place(self, u: Tensor) -> Tensor:
        return self.spline()(u)

    @torch.no_grad()
    def share(self, place: Tensor) -> Tensor:
        return self.spline().inverse(place)

    @torch.no_grad()
    def crowd(self, place: Tensor) -> Tensor:
        return self._crowd(place)

    def _crowd(self, place: Tensor) -> Tensor:
        spline = self.spline()
        return 1 / spline.slope(spline.inverse(place))

    def learn(self, u: Tensor, values: Tensor, path: Path) -> Tensor | float:
        """-E[l^2 log p] / E[l^2], in value zero: its gradient is that of log E l^2."""
        squares = values.detach().double().square()
        surrogate = -(squares * self._crowd(self.place(u)).log()).mean() / squares.mean().clamp(min=1e-300)
        return surrogate - surrogate.detach()

    @torch.no_grad()
    def schedule(self, path: Path) -> Learned:
        """The clock as a schedule between the ends of ``path``: uniform times on it are draws of this density.

        The path with this clock is ``GaussianPath(path.curve, density.schedule(path), 0.0, 1.0)``.
        """
        ends = path.logsnr(torch.tensor([path.t_min, path.t_max], dtype=torch.float64))
        u = torch.linspace(0, 1, len(self.theta) + 1, dtype=torch.float64)
        found = torch.lerp(ends[0], ends[1], self.place(u.to(self.theta.device)).cpu())
        return Learned(tuple(found.tolist()))

    def extra_repr(self) -> str:
        return f"knots={len(self.theta)}, rate={self.rate:g}"
