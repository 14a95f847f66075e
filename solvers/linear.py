"""Linear combinations of states.

A step is *linear* in the state, the predictions and the noises, and :func:`mix` is that linear combination: the one
place where a coefficient meets a state. Coefficients are float64, numbers or 0-dim tensors, and one for each sample
where samples have times of their own; states keep their dtype and device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["Terms", "expand", "gather", "mix", "number", "numbers"]


def expand(c: Tensor, x: Tensor) -> Tensor:
    """Give per-sample coefficients the trailing axes of a state.

    Args:
        c: 0-dim (returned as it is), or of shape (B,) or (B, 1, ..., 1).
        x: state of shape (B, *event).

    Returns:
        ``c`` as a 0-dim tensor or of shape (B, 1, ..., 1), on the device of ``x`` and in its dtype when per sample. A
        0-dim float64 CPU tensor multiplies a state on any device and of any dtype without a copy, so it stays.
    """
    return c if c.ndim == 0 else c.reshape(-1, *(1,) * (x.ndim - 1)).to(x)


def mix(*terms: tuple[Tensor | float, Tensor]) -> Tensor:
    """The linear combination c_1 x_1 + c_2 x_2 + ..., in the dtype and on the device of the states.

    One new tensor, and one fused kernel for every term after the first: a state of an image batch is some megabytes,
    and asking the system for fresh ones costs more than the additions.

    Args:
        terms: pairs (coefficient, state); a coefficient is a number, 0-dim, (B,) or (B, 1, ..., 1).

    >>> mix((2.0, torch.ones(2)), (torch.tensor(0.5).double(), torch.ones(2)))
    tensor([2.5000, 2.5000])
    """
    (c, x), *rest = terms
    out = x if isinstance(c, float) and c == 1.0 else (c if isinstance(c, float) else _factor(c, x)) * x
    for c, y in rest:
        if not isinstance(c, float) and isinstance(c := _factor(c, y), Tensor):
            out = c * y + out
        elif out is x:  # which is the caller's
            out = torch.add(out, y, alpha=c)
        else:
            out.add_(y, alpha=c)  # into memory that is still in the cache: a third faster
    return out


Terms = tuple[tuple[Tensor | float, Tensor], ...]
"""A linear combination that nobody has added up yet."""


def gather(*weighted: tuple[Tensor | float, Terms]) -> Terms:
    """c_1 (a_1 x_1 + b_1 y_1) + c_2 (...) + ... as one combination, each state once: what :func:`mix` adds up fastest.

    >>> x, y = torch.ones(1), torch.zeros(1)
    >>> [coefficient for coefficient, _ in gather((1.0, ((1.0, x),)), (0.5, ((2.0, x), (4.0, y))))]
    [2.0, 2.0]
    """
    found: dict[int, tuple[Tensor | float, Tensor]] = {}
    for weight, terms in weighted:
        for c, x in terms:
            before = found.get(id(x))
            found[id(x)] = (weight * c if before is None else before[0] + weight * c, x)
    return tuple(found.values())


def number(c: Tensor) -> Tensor | float:
    """A number where that is all a coefficient is; the tensor where it differs among samples or is being learned.

    The same arithmetic in Python's floats takes the host a tenth of the time.
    """
    return c if c.ndim > 0 or c.requires_grad else c.item()


def numbers(c: Tensor) -> Sequence[Tensor | float]:
    """The entries of (n,), or the rows of (n, m), as numbers where :func:`number` makes them numbers."""
    return c.unbind() if c.requires_grad else cast("Any", c).tolist()


def _factor(c: Tensor | float, x: Tensor) -> Tensor | float:
    """A coefficient as what multiplies ``x`` fastest."""
    c = number(c) if isinstance(c, Tensor) else c
    return expand(c, x).to(x) if isinstance(c, Tensor) else c
