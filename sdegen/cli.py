"""The command line: ``sdegen COMMAND`` or ``python -m sdegen COMMAND``.

A command is a module of :mod:`sdegen.commands` with a function ``prepare(words) -> job``. It reads its words, checks
everything that can be checked (files, names, budgets, shapes) and returns the work as a function; nothing is written
before that. So a mistake in the input ends with exit code 2 and no harm done, and what fails later ends with 1. Either
way it is one line; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from sdegen.parsing import UsageError, nearest

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train a model on data and keep it in a run folder; resume it",
    "sample": "draw samples from a trained model with any solver",
    "likelihood": "score held-out data: bounds, DDPM bounds for any T, probability-flow ODE",
    "audit": "move every knob of a likelihood one notch and see what drifts",
    "compare": "solvers against the truth: error, distance and time of every solver with every budget",
    "report": "a page from results: the best solver for a budget, errors against cost, orders, every cell",
    "verify": "the certificate of a solver, ours or yours: order, noise and contract, measured",
    "solvers": "the table of solvers: order, evaluations per step, noise, reference",
    "demo": "the main job on scikit-learn's digits, and a report to look at",
}

USAGE = f"""usage: sdegen COMMAND [options]

A workbench for score-based generative models.

commands:
{chr(10).join(f"  {name:<12} {what}" for name, what in COMMANDS.items())}

options:
  --help       this text; `sdegen COMMAND --help` explains a command, with examples
  --version    the version
  --debug      show the traceback of an error

examples:
  sdegen demo                                       train, sample and score; then open runs/demo/report.html
  sdegen train runs/a --data digits --model vpsde   train for a minute
  sdegen sample runs/a --n 64 --solver heun --steps 20
  sdegen likelihood runs/a --T 10,100,1000 --ode
  sdegen verify mine.py:Leapfrog                    a solver of your own: is it right?
"""

INTERRUPTED = 130


def main(words: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        words: the command line after the program's name; that of the process by default.

    Returns:
        The exit code: 0 done, 1 the work failed or its verdict is no, 2 the input is wrong, 130 interrupted.
    """
    words = list(sys.argv[1:] if words is None else words)
    # Threads that wait by spinning starve each other as soon as anything else runs on the machine: a step of a small
    # network then takes ten times as long. Read by OpenMP when torch is loaded, so it is set here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # An installed program does not look where it is called, and there people keep a solver or a model of their own.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    debug = "--debug" in words
    if words[:1] == ["--debug"]:
        words = [*words[1:], "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] == "--version":
        from sdegen.provenance import versions

        print(f"sdegen {versions().get('sdegen', '(not installed)')}")
        return 0
    name = words[0]
    try:
        job = _prepared(name, words[1:])
    except SystemExit as end:  # --help has been printed
        return int(end.code or 0)
    except KeyboardInterrupt:
        return _failed(name, "interrupted; nothing was written", INTERRUPTED, debug)
    except (ValueError, TypeError, OSError, LookupError) as error:
        return _failed(name, error, 2, debug)
    except Exception as error:
        return _failed(name, error, 1, debug)
    try:
        return job() or 0
    except KeyboardInterrupt as error:
        return _failed(name, str(error) or "interrupted", INTERRUPTED, debug)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _failed(name, error, 1, debug)


def _prepared(name: str, words: Sequence[str]) -> Callable[[], int | None]:
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UsageError(f"unknown {kind} {name}{nearest(name, COMMANDS)}")
    return importlib.import_module(f"sdegen.commands.{name}").prepare(words)


def _failed(name: str, cause: Exception | str, code: int, debug: bool) -> int:
    """Say in one line what happened."""
    if debug and isinstance(cause, Exception):
        traceback.print_exception(cause)
    message = " ".join(str(cause.args[0] if isinstance(cause, KeyError) and cause.args else cause).split())
    if isinstance(cause, OSError) and cause.strerror and cause.filename:  # the system's own: "[Errno 13] ..."
        message = f"{cause.filename}: {cause.strerror}"
    expected = (ValueError, OSError, ArithmeticError, LookupError, str)
    kind = "" if isinstance(cause, expected) and message else f"{type(cause).__name__}: "
    hint = "" if isinstance(cause, expected) or debug else " (--debug shows where)"
    where = f"sdegen {name}" if name in COMMANDS else "sdegen"
    print(f"{where}: {kind}{message}{hint}", file=sys.stderr)
    return code
