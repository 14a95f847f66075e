"""Tables as text: what commands and reports print."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """Columns of equal width, two spaces apart; the first row is the head.

    Args:
        rows: the cells.
        right: columns that are aligned to the right, as numbers are.

    >>> print(aligned([("name", "nfe"), ("heun", 2), ("rk4", 4)], right=[1]))
    name  nfe
    heun    2
    rk4     4
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pads = [str.rjust if i in right else str.ljust for i in range(len(widths))]
    lines = ["  ".join(pad(c, w) for c, w, pad in zip(row, widths, pads, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)
