"""The rising spline: through its points, rising, as smooth and as exact as it says, and inverted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdegen.splines import RisingSpline


def _exponential(knots: int) -> RisingSpline:
    u = torch.linspace(0, 1, knots + 1, dtype=torch.float64)
    return RisingSpline(torch.expm1(2 * u) / math.expm1(2))


def _rough() -> tuple[Tensor, RisingSpline]:
    points = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).pow(4).add(1e-6).cumsum(0)
    return points, RisingSpline(points)


def test_it_goes_through_the_points_and_rises() -> None:
    points, curve = _rough()
    u = torch.linspace(0, 1, 12, dtype=torch.float64)
    torch.testing.assert_close(curve(u), points, rtol=1e-12, atol=1e-12)
    fine = torch.linspace(0, 1, 4001, dtype=torch.float64)
    assert bool((curve(fine).diff() > 0).all())
    assert bool((curve.slope(fine) > 0).all())


def test_the_slope_is_the_derivative_and_has_no_jumps() -> None:
    _, curve = _rough()
    u = torch.linspace(1e-6, 1 - 1e-6, 997, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(curve(u).sum(), u)
    torch.testing.assert_close(curve.slope(u.detach()), slope, rtol=1e-9, atol=1e-12)
    knots = torch.linspace(0, 1, 12, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(curve.slope(knots - 1e-12), curve.slope(knots + 1e-12), rtol=1e-6, atol=1e-9)


def test_the_inverse_undoes_it() -> None:
    points, curve = _rough()
    u = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(curve.inverse(curve(u)), u, rtol=0, atol=1e-8)
    torch.testing.assert_close(curve.inverse(points), torch.linspace(0, 1, 12, dtype=torch.float64), rtol=0, atol=1e-9)
    beyond = curve.inverse(points[-1] + torch.tensor([1e-9, 0.1, 5.0]).double())
    torch.testing.assert_close(beyond, torch.ones(3, dtype=torch.float64))
    assert float(curve(torch.tensor(1.0))) == pytest.approx(float(points[-1]))


def test_a_smooth_function_is_followed_up_to_the_ends() -> None:
    """The slopes at the ends are of second order, as those inside: the error falls like the cube of the interval."""
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    errors = [float((_exponential(k)(u) - torch.expm1(2 * u) / math.expm1(2)).abs().max()) for k in (16, 32)]
    assert errors[0] < 2e-5
    assert math.log2(errors[0] / errors[1]) > 2.7
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    exact = 2 * torch.exp(2 * ends) / math.expm1(2)
    torch.testing.assert_close(_exponential(32).slope(ends), exact, rtol=3e-3, atol=0)


def test_points_are_parameters() -> None:
    rise = torch.tensor([0.2, 0.5, 0.1, 0.2], dtype=torch.float64, requires_grad=True)

    def at(rise: Tensor) -> Tensor:
        curve = RisingSpline(torch.cat([rise.new_zeros(1), rise.cumsum(0)]))
        return torch.stack([curve(torch.tensor(0.37).double()), curve.inverse(torch.tensor(0.4).double())])

    assert torch.autograd.gradcheck(at, rise)
