"""``sdegen solvers``: the table of solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdegen.commands import aligned
from sdegen.parsing import Parser

EXAMPLES = """\
  sdegen solvers
  sdegen sample runs/a --solver heun --steps 20          one of them at work
  sdegen sample runs/a --solver mypackage.mine:Leapfrog  one of your own"""


def prepare(words: Sequence[str]) -> Callable[[], None]:
    """Read the command line; give back the work."""
    parser = Parser("solvers", "", "Every solver: declared order, evaluations per step, noise, reference.", EXAMPLES)
    parser.read(words)

    def job() -> None:
        from solvers import table

        print(aligned([("name", "order", "nfe/step", "noise", "reference"), *table()], right=[1, 2]))

    return job
