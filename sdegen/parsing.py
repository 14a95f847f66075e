"""The command line's parser: jsonargparse for types, files and help, and every mistake answered in one line."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jsonargparse

__all__ = ["Parser", "UsageError", "nearest"]


class UsageError(ValueError):
    """A mistake on the command line or in a configuration file: one line that names the key and what is allowed."""


class _Help(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Types and defaults of every option, where there is something to say, and the examples as they are written."""

    def _expand_help(self, action: argparse.Action) -> str:
        text = re.sub(r" \(default: (null|False)\)|(?<=\w), default: null(?=\))", "", super()._expand_help(action))
        for name, words in (("NonNegativeInt", "int ≥ 0"), ("PositiveInt", "int > 0"), ("PositiveFloat", "float > 0")):
            text = text.replace(f"type: {name}", f"type: {words}")
        return text


class Parser(jsonargparse.ArgumentParser):
    """A parser of one command.

    Args:
        command: its name.
        usage: what follows the command in the usage line.
        description: what it does.
        examples: lines to copy.
    """

    def __init__(self, command: str, usage: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"sdegen {command}",
            usage=f"%(prog)s {usage}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=_Help,
            parser_mode="toml",
            allow_abbrev=False,
            exit_on_error=False,
            print_config=None,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def read(self, words: Sequence[str], table: Mapping[str, Any] | None = None) -> jsonargparse.Namespace:
        """Parse the words of a command line, over the values of a configuration file.

        Args:
            words: the command line after the command.
            table: keys and values of a file, nested.

        Raises:
            UsageError: anything wrong with either.
        """
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                base = self.parse_object(dict(table or {}), defaults=True) if table else None
                found = self.parse_args(self._listed([_bracketed(word) for word in words]), namespace=base)
        except argparse.ArgumentError as error:
            raise UsageError(self._explained(str(error))) from None
        for key, value in found.items():
            found[key] = _plain(value)
        return found

    def _listed(self, words: Sequence[str]) -> list[str]:
        """``--T 10`` means the list ``[10]``, where an option takes a list."""
        lists = {
            option
            for action in self._actions
            if typing.get_origin(getattr(action, "_typehint", None)) in (list, tuple)
            for option in action.option_strings
        }
        found, before = [], ""
        for word in words:
            option, equals, value = word.partition("=")
            if equals and option in lists and re.fullmatch(_NUMBER, value):
                word = f"{option}=[{value}]"
            elif before in lists and re.fullmatch(_NUMBER, word):
                word = f"[{word}]"
            found.append(word)
            before = word
        return found

    def _explained(self, message: str) -> str:
        """jsonargparse's message in one line, with the type and the nearest names in words."""
        if found := re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL):
            key, detail = found.groups()
            value = re.search(
                r"(?:Given|Got) value: (.*)|Not of type \w+: (\S+) does not|invalid literal.*: (.*)", detail
            )
            hints = {action.dest: getattr(action, "_typehint", None) or action.type for action in self._actions}
            if value and hints.get(key) is not None:
                given = next(filter(None, value.groups()), "").strip("'")
                return f"{key}: expected {_spoken(hints[key])}, not {given or 'nothing'}"
        if found := re.search(r"unrecognized arguments: (.*)", message):
            wrong = next((word for word in found[1].split() if word.startswith("-")), "")
            if not wrong:
                return f"unexpected {found[1]}; {self.prog} --help says what is expected"
            options = [option for action in self._actions for option in action.option_strings]
            return (
                f"unknown option {wrong}{nearest(wrong.partition('=')[0], options, f'{self.prog} --help lists them')}"
            )
        message = re.sub(r"^argument (\S+):", r"\1:", " ".join(message.split()))
        return message[:1].lower() + message[1:]


def nearest(wrong: str, known: Iterable[str], otherwise: str = "") -> str:
    """What to say after an unknown name: the nearest ones, or all, or something else.

    >>> "unknown color bleu" + nearest("bleu", ["red", "blue"])
    'unknown color bleu; did you mean blue?'
    >>> "unknown color x" + nearest("x", ["red", "blue"])
    'unknown color x; there are red, blue'
    """
    known = list(known)
    near = difflib.get_close_matches(wrong, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; {otherwise or 'there are ' + ', '.join(known)}"


def _plain(value: Any) -> Any:
    """A number as itself: jsonargparse's positive numbers are subclasses, which safe files do not take."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return int(value) if isinstance(value, int) else float(value)
    return value


_NUMBER = r"-?[\d.]+(?:e-?\d+)?"


def _bracketed(word: str) -> str:
    """``8,16`` and ``--channels=8,16`` mean the list ``[8,16]``."""
    return re.sub(r"^(--[\w.]+=)?(-?[\d.]+(?:e-?\d+)?(?:,-?[\d.]+(?:e-?\d+)?)+),?$", r"\1[\2]", word)


def _spoken(hint: Any) -> str:
    """A type in words.

    >>> _spoken(int | None), _spoken(tuple[int, ...]), _spoken(typing.Literal["a", "b"])
    ('a whole number or null', 'a list such as [8,16]', 'a or b')
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_spoken, inner))
    if origin is typing.Literal:
        return " or ".join(filter(None, (", ".join(map(str, inner[:-1])), str(inner[-1]))))
    if origin in (tuple, list):
        each = next(filter(None, map(_limits, inner)), "")
        floats = any(isinstance(kind, type) and issubclass(kind, float) for kind in inner)
        return "a list such as " + ("[0.5,0.9]" if floats else "[8,16]") + (f", each {each}" if each else "")
    base = next((kind for kind in (bool, int, float, str) if isinstance(hint, type) and issubclass(hint, kind)), hint)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return f"{words.get(base, getattr(hint, '__name__', str(hint)))} {_limits(hint)}".strip()


def _limits(hint: Any) -> str:
    """Of one of jsonargparse.typing's numbers: ">0"."""
    return (getattr(hint, "__doc__", None) or "").partition("restricted to be ")[2]
