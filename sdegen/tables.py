"""Tables and times as text: what commands and reports print."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned", "duration"]


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


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(0.34), duration(8), duration(75), duration(7500)
    ('0.3 s', '8 s', '1 min 15 s', '2 h 5 min')
    """
    if seconds < 9.5:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    minutes, rest = divmod(round(seconds), 60)
    hours, more = divmod(minutes, 60)
    return f"{hours} h {more} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
