"""How far from the exact solution does each solver end, for a number of network calls?

On a mixture whose score is known, every solver of ``SOLVERS`` is run with several budgets from the same noises (and, if
it draws noise, with the same Brownian motion), and compared with the exact solution of its equation: pathwise, and by
the sliced Wasserstein distance to exact samples with the floor that a finite sample has.

    python -m experiments.solver_error
    python -m experiments.solver_error --oracle mixture16 --path ve --solvers heun,dpmpp_2m --out runs/sixteen
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm.auto import tqdm

from sdegen import figures, results
from sdegen.comparison import Comparison, compare
from sdegen.provenance import provenance
from sdegen.style import save

__all__ = ["Config", "run"]


@dataclass(frozen=True)
class Config:
    """The experiment.

    Args:
        comparison: solvers, budgets, oracle, path, sizes and seed.
        out: folder for ``results.h5``, ``errors.csv`` and ``errors.svg``.
    """

    comparison: Comparison = field(default_factory=Comparison)
    out: Path = Path("runs/solver_error")


def run(config: Config | None = None) -> Path:
    """Measure, write, and draw.

    Args:
        config: the default where None.

    Returns:
        Path of ``results.h5``.
    """
    config = config or Config()
    config.out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=1.0, disable=None, bar_format="{percentage:3.0f}% |{bar:24}| {remaining} left{postfix}") as bar:

        def advance(name: str, share: float) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(share - bar.n)

        found = compare(config.comparison, advance)
    found = results.Result(found.arrays, {**found.attributes, **provenance()})
    results.write(config.out / "results.h5", "errors", found)
    cells = [name for name, array in found.arrays.items() if array.axes == ("cell",)]
    rows = zip(*(found[name].tolist() for name in cells), strict=True)
    results.write_csv(config.out / "errors.csv", [dict(zip(cells, row, strict=True)) for row in rows])
    save(figures.errors(found), config.out / "errors.svg")
    return config.out / "results.h5"


def main(words: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    default = Config()
    parser = argparse.ArgumentParser(
        "python -m experiments.solver_error", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--oracle", default=default.comparison.oracle)
    parser.add_argument("--path", default=default.comparison.path)
    parser.add_argument("--solvers", default="", help="names, with commas between them; all by default")
    parser.add_argument("--budgets", default="", help="network calls, with commas between them")
    parser.add_argument("--seed", type=int, default=default.comparison.seed)
    parser.add_argument("--out", type=Path, default=default.out)
    chosen = parser.parse_args(words)
    try:
        settings = replace(default.comparison, oracle=chosen.oracle, path=chosen.path, seed=chosen.seed)
        if chosen.solvers:
            settings = replace(settings, solvers=tuple(chosen.solvers.split(",")))
        if chosen.budgets:
            settings = replace(settings, budgets=tuple(int(budget) for budget in chosen.budgets.split(",")))
        print(run(Config(settings, chosen.out)))
    except (ValueError, OSError) as error:
        print(f"experiments.solver_error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
