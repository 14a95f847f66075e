"""``sdegen demo``: the main job from end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from sdegen.files import require_space
from sdegen.parsing import Parser
from sdegen.runs import Run

EXAMPLES = """\
  sdegen demo
  sdegen demo --fast                a few seconds in all, to see that it works
  sdegen demo --seconds 300 --out runs/longer"""


def prepare(words: Sequence[str]) -> Callable[[], None]:
    """Read the command line; give back the work."""
    parser = Parser("demo", "[options]", "Train, sample and score on scikit-learn's digits; writes a report.", EXAMPLES)
    parser.add_argument("--out", default="runs/demo", help="run folder; a demo that is there is replaced")
    parser.add_argument("--seconds", type=PositiveFloat, help="training of the diffusion network")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of everything")
    parser.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads")
    parser.add_argument("--fast", action="store_true", help="a few seconds in all")
    chosen = parser.read(words)
    out = Path(chosen.out)
    Run.check_free(out, overwrite=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    require_space(out, 50_000_000)

    def job() -> None:
        from sdegen import demo

        demo.run(out, seconds=chosen.seconds, seed=chosen.seed, threads=chosen.threads, fast=chosen.fast)

    return job
