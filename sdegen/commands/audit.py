"""``sdegen audit``: what a run's likelihoods rest on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from sdegen.commands import folder_to_fill, made_by
from sdegen.config import RunConfig
from sdegen.parsing import Parser
from sdegen.results import write
from sdegen.runs import RESULTS, Run

EXAMPLES = """\
  sdegen audit runs/a                        every knob one notch, on the first 64 held-out examples
  sdegen audit runs/a --T 10,100,1000        the numbers of levels that are doubled
  sdegen audit runs/a --n 200 --ode_n 50     more examples: smaller errors of the drifts
  sdegen audit runs/v                        of a VAE: importance samples and seed

The table says for each number how far it moves when one setting does, the same examples and noise on both sides. A
rise when the clean end moves outward is the network asked about noise levels that it was never trained on; a rise when
it moves inward is the price of a softmax decoder that can no longer tell the levels apart. See the documentation of
sdegen.likelihood.audit. The result is the group `audit` of results.h5."""


def prepare(words: Sequence[str]) -> Callable[[], None]:
    """Read the command line; open the run and its data; give back the work."""
    parser = Parser(
        "audit", "RUN [options]", "Move every knob of a likelihood one notch and see what drifts.", EXAMPLES
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--T", type=list[PositiveInt], default=[10, 100], help="numbers of levels to double")
    parser.add_argument("--n", type=PositiveInt, default=64, help="held-out examples")
    parser.add_argument("--ode_n", type=PositiveInt, default=16, help="of them by the probability-flow ODE")
    parser.add_argument("--draws", type=PositiveInt, default=16, help="noise levels per example of a bound, twice")
    parser.add_argument("--tol", type=PositiveFloat, default=1e-3, help="tolerance of the ODE's solver")
    parser.add_argument("--probes", type=PositiveInt, default=1, help="of the ODE's trace")
    parser.add_argument("--K", type=PositiveInt, default=100, help="importance samples of a VAE")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of all noise")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads")
    chosen = parser.read(words)
    run = Run.open(chosen.run)
    folder_to_fill("run", run.path)
    from sdegen.building import restore

    data, model = restore(run, device=chosen.device)
    labels = data.test_cond if RunConfig.from_toml(run.config).train.conditional else None
    x, cond = data.test[: chosen.n], None if labels is None else labels[: chosen.n]
    return lambda: _audit(run, model, x, cond, chosen)


def _audit(run: Run, model: Any, x: Any, cond: Any, chosen: Namespace) -> None:
    from tqdm.auto import tqdm

    from sdegen.likelihood.audit import audit
    from sdegen.train.interrupt import cpu_threads

    with tqdm(total=1.0, disable=None, leave=False, bar_format=_BAR) as bar, cpu_threads(chosen.threads):

        def progress(what: str, share: float) -> None:
            bar.set_postfix_str(what)
            bar.update(share - bar.n)

        found = audit(
            model, x, cond, T=chosen.T, draws=chosen.draws, tol=chosen.tol, probes=chosen.probes, K=chosen.K,
            ode_examples=min(chosen.ode_n, len(x)), probe_examples=min(32, len(x)), seed=chosen.seed, progress=progress,
        )  # fmt: skip
    asked = {key: getattr(chosen, key) for key in ("T", "n", "ode_n", "draws", "tol", "probes", "K", "seed", "device")}
    write(run / RESULTS, "audit", found.to_result(**made_by(run, **asked)))
    print(found)


_BAR = "{percentage:3.0f}% |{bar:24}| {elapsed} spent, {remaining} left {postfix}"
