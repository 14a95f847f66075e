"""The command line of an experiment: every field of its ``Config`` is an option, with the text written there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from docstring_parser import parse as docstring

from sdegen.files import require_folder
from sdegen.parsing import Parser

__all__ = ["command"]


def command(run: Callable[[Any], Path], config: type[Any], doc: str | None, example: str = "") -> Callable[..., int]:
    """Make ``main(words)`` of an experiment.

    Args:
        run: the experiment.
        config: its dataclass; a field of type ``tuple[str, ...]`` takes names with commas between.
        doc: docstring of the module, whose first line is the question.
        example: options worth an example.

    Returns:
        A function that reads the command line, runs, prints where the results are, and returns the exit code: 2 where
        something that was asked for makes no sense.
    """
    name = Path(run.__code__.co_filename).stem  # its module is "__main__" when it is run

    def main(words: Sequence[str] | None = None) -> int:
        parser = Parser(name, "[options]", (doc or "").partition("\n")[0], f"  python -m experiments.{name} {example}")
        parser.prog = f"python -m experiments.{name}"
        listed = {f.name: ",".join(f.default) for f in fields(config) if f.type == "tuple[str, ...]"}  # type: ignore[arg-type]
        told = {param.arg_name: param.description or "" for param in docstring(config.__doc__ or "").params}
        parser.add_class_arguments(config, as_group=False, skip=set(listed))
        for key, default in listed.items():
            parser.add_argument(f"--{key}", default=default, help=f"{told[key].rstrip('.')}; commas between")
        try:
            chosen = parser.read(sys.argv[1:] if words is None else words).as_dict()
            chosen |= {key: tuple(filter(None, chosen[key].split(","))) for key in listed}
            settings = config(**{f.name: chosen[f.name] for f in fields(config)})
            require_folder(settings.out)
            print(run(settings))
        except (ValueError, OSError) as error:
            print(f"experiments.{name}: {error}", file=sys.stderr)
            return 2
        return 0

    return main
