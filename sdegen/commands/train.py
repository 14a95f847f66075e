"""``sdegen train``: from a configuration to a run folder with weights in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdegen.commands import folder_to_fill
from sdegen.config import RunConfig, configure, defaults, last_value, read_toml
from sdegen.files import require_space
from sdegen.parsing import Parser, UsageError
from sdegen.runs import CONFIG, STATE, WEIGHTS, Run, describe

EXAMPLES = """\
  sdegen train                                        digits, VP-SDE, U-Net, one minute; runs/digits-vpsde
  sdegen train runs/a --model ddpm --model.T 100 --train.steps 2000
  sdegen train runs/b --data moons --network.width 256    vectors get a perceptron
  sdegen train runs/c --data mine.npz --data.levels 256 --model vae
  sdegen train --print_config > run.toml              every key, its default and its meaning
  sdegen train runs/d --config run.toml --seed 1      the command line goes over the file
  sdegen train runs/e --config smoke                  a configuration that comes with sdegen, by its name
  sdegen train --resume runs/a                        go on after Ctrl-C or a crash
  sdegen train --resume runs/a --train.steps 4000     train longer"""


def prepare(words: Sequence[str]) -> Callable[[], None]:
    """Read the command line; check the configuration, the data and the folder; give back the work."""
    parser = Parser("train", "[RUN] [options]", "Train a model on data and keep it in a run folder.", EXAMPLES)
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder to make (default: runs/DATA-MODEL)")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file, or the name of one that comes with sdegen",
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was interrupted, or train it longer")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    parser.add_argument("--print_config", action="store_true", help="print the configuration, explained, and stop")
    file, folder = last_value(words, "--config"), last_value(words, "--resume")
    if file and folder:
        raise UsageError("--resume takes the configuration of the run: leave out --config")
    old = Run.open(folder) if folder else None
    begun = RunConfig.from_toml(old.config, old / CONFIG) if old else None
    if begun is not None:
        table, origin = begun.table(), CONFIG
    else:
        table, origin = (read_toml(file), file) if file else (defaults(words), "the defaults")
    config, chosen = configure(words, table, origin=origin, parser=parser)
    if chosen.print_config:
        return lambda: print(config.to_toml(explained=True), end="")

    if old is not None and begun is not None:
        if chosen.run or chosen.overwrite:
            raise UsageError("--resume names the run: leave out RUN and --overwrite")
        if changed := config.differences(begun):
            raise UsageError(f"{old.path} cannot go on with other settings: {', '.join(changed)}")
        path = folder_to_fill("resume", old.path)
    else:
        path = Path(chosen.run or f"runs/{Path(config.data.name).stem}-{config.model.name}")
        Run.check_free(path, overwrite=chosen.overwrite)
    from sdegen.building import build

    data, model = build(config)
    if config.train.conditional and not data.classes:
        raise UsageError(f"train.conditional needs class labels, and {data.name} has none: name them by --data.labels")
    _try(model, data, config)
    card = describe(data)
    if old is not None:
        if (known := old.manifest["data"])["sha256"] != card["sha256"]:
            raise UsageError(f"the data have changed since {old.path} was begun: {known['source']}")
        if (old / STATE).exists():
            old.verified(STATE)
        elif (old / WEIGHTS).exists():
            raise UsageError(f"{old.path} has weights and no {STATE} to go on from; --overwrite would begin anew")
    return lambda: _train(path, old, config, data, model, card, chosen.overwrite)


def _try(model: Any, data: Any, config: RunConfig) -> None:
    """Score one example: what does not fit together says so before there is a folder."""
    import torch

    labels = data.train_cond[:1] if config.train.conditional else None
    try:
        with torch.no_grad():
            model.loss(data.train[:1].to(model.dtype), labels, generator=torch.Generator().manual_seed(0))
    except (TypeError, RuntimeError) as error:
        if config.network is None or ":" not in config.network.name:
            raise
        said = " ".join(str(error).split())
        raise UsageError(f"{config.network.name} is called as net(z, logsnr, cond=None), and said: {said}") from error


def _train(
    path: Path, old: Run | None, config: RunConfig, data: Any, model: Any, card: dict[str, Any], overwrite: bool
) -> None:
    from sdegen.train import fit

    run = old or Run.create(
        path,
        config.to_toml(),
        overwrite=overwrite,
        seed=config.seed,
        device=config.device,
        threads=config.threads,
        data=card,
    )
    with run.exclusive():
        if old is not None and config.to_toml() != old.config:
            with run.writing(CONFIG) as temporary:
                temporary.write_text(config.to_toml(), encoding="utf-8")
        size = sum(p.numel() for p in model.parameters())
        require_space(run / STATE, 40 * size)  # weights, average, two moments; twice while one replaces another
        print(f"{card['description']}\n{config.model.name} with {size:,} parameters; run folder {path}", flush=True)
        try:
            done = fit(model, data, config.train, run=run, resume=(run / STATE).exists())
        except KeyboardInterrupt as stop:  # fit says after which step; before it begins nobody does
            run.note(status="interrupted")
            what = str(stop).partition(",")[0] or "interrupted"
            raise KeyboardInterrupt(f"{what}; go on with: sdegen train --resume {path}") from None
        run.note(status="finished", steps=done.steps, seconds=round(done.seconds, 2))
    unit = "bits/dim" if model.discrete else "bits/dim of a density in model units, not of grey levels"
    held_out = f", held-out bound {done.history[-1]['held_out']:.4f} {unit}" if done.history else ""
    print(f"{done.steps} steps in {done.seconds:.0f} s{held_out}; next: sdegen sample {path}")
