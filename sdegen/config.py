"""A run in a page of text: what to train on what, how, and from which seed.

    seed = 0
    [data]
    name = "digits"
    [model]
    name = "vpsde"
    [network]
    name = "unet"
    channels = [24, 48]
    [train]
    seconds = 60.0

Settings that were measured come with the package as files in ``sdegen/configs`` and go by their name: ``sdegen train
--config smoke``. Where one is called after the data and the model that are asked for, it is what is not said otherwise.

``data``, ``model`` and ``network`` are things with a name and options. The options of a name are the keyword arguments
of the function or class that it stands for, read from its signature with types, defaults and docstring: they are
written down once, where they are used. Nothing in the Python API needs this page; it is for files and the command line.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import tomli_w
from jsonargparse import Namespace

from sdegen.parsing import Parser, UsageError, nearest

if TYPE_CHECKING:  # torch takes a second to import: only when something is built
    from sdegen.train import TrainConfig

__all__ = ["Choice", "RunConfig", "configure", "defaults", "last_value", "read_toml", "shipped", "source"]

DEFAULTS = {"data": "digits", "model": "vpsde", "network": "unet"}
SECONDS = 60.0  # of training, where neither steps nor seconds are asked for
GIVEN = {  # parameters that are no options: the name itself, and what build() fills in
    "data": {"name", "path"},
    "model": {"data", "network", "classes"},
    "network": {"event_shape", "outputs", "classes"},
}
SHARED = ("seed", "threads")  # said once for the whole run, not again in [train]


@dataclass(frozen=True)
class Choice:
    """A thing by its name, and its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes.

    Args:
        data: a data set by name, or a file by its path.
        model: a recipe of :mod:`sdegen.recipes`.
        network: a backbone of :mod:`sdegen.networks`; None for models with networks of their own.
        train: the settings of training, ``seed`` and ``threads`` among them.
        seed: of the initial weights, batches, noise and dropout.
        device: cpu, cuda, cuda:1, ...
        threads: CPU threads.
    """

    data: Choice
    model: Choice
    network: Choice | None
    train: TrainConfig
    seed: int = 0
    device: str = "cpu"
    threads: int = 1

    @classmethod
    def from_toml(cls, text: str, origin: Path | str = "the configuration") -> RunConfig:
        """The configuration that :meth:`to_toml` wrote.

        Raises:
            UsageError: no TOML, an unknown key, a wrong value; with the key's path and what is allowed.
        """
        return configure((), _parsed(text, origin), origin=origin)[0]

    def table(self) -> dict[str, Any]:
        """Keys and values, nested, without those that are None (TOML has no such value)."""
        train = {f.name: getattr(self.train, f.name) for f in fields(self.train) if f.name not in SHARED}
        chosen = {name: {"name": choice.name, **choice.options} for name, choice in self.choices.items()}
        sections = {n: {k: v for k, v in t.items() if v is not None} for n, t in {**chosen, "train": train}.items()}
        return {"seed": self.seed, "device": self.device, "threads": self.threads, **sections}

    @property
    def choices(self) -> dict[str, Choice]:
        """The sections that name a thing."""
        found = {"data": self.data, "model": self.model, "network": self.network}
        return {name: choice for name, choice in found.items() if choice is not None}

    def to_toml(self, *, explained: bool = False) -> str:
        """The page of text.

        Args:
            explained: say beside every key what it means, and name the keys that are not set.
        """
        table = self.table()
        keys = [key for key, _ in _flat(table)]
        meaning = {}
        if explained:
            meaning = _meanings({name: choice.name for name, choice in self.choices.items()})
            keys = sorted(
                {*keys, *meaning}, key=lambda key: (list(table).index(key.split(".")[0]), [*meaning].index(key))
            )
        values, lines, section = dict(_flat(table)), [], ""
        for key in keys:
            head, _, name = key.rpartition(".")
            if head != section:
                lines += ["", f"[{head}]"]
                section = head
            line = f"{name} = {_toml(values[key])}" if key in values else f"# {name} ="
            lines.append(f"{line:<24}  # {meaning[key]}" if meaning.get(key) else line)
        return "\n".join(lines) + "\n"

    def differences(self, begun: RunConfig) -> list[str]:
        """Keys in which a run may not change when it goes on, and does, with both values.

        Args:
            begun: the configuration it began with.
        """
        then, now = (dict(_flat(config.table())) for config in (begun, self))
        changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        renamed = {key.partition(".")[0] for key in changed if key.endswith(".name")}
        fixed = self.train.changed(begun.train)

        def counts(key: str) -> bool:
            section, _, name = key.partition(".")
            if section == "train":
                return name in fixed
            return section not in ("device", "threads") and (section not in renamed or name == "name")

        return [f"{key} was {then.get(key)}, is {now.get(key)}" for key in changed if counts(key)]


def configure(
    words: Sequence[str],
    table: Mapping[str, Any] | None = None,
    *,
    origin: Path | str = "the configuration",
    parser: Parser | None = None,
) -> tuple[RunConfig, Namespace]:
    """A configuration from a file's values and the words of a command line, which go first.

    Args:
        words: such as ``["--model", "ddpm", "--train.steps=200"]``.
        table: what :func:`read_toml` returned; a section whose name the command line changes is left out.
        origin: what to call the table in messages.
        parser: with further options of a command; the settings are added to it.

    Returns:
        The configuration, and all values of the parser.

    Raises:
        UsageError: an unknown key or name, with the nearest ones, or a wrong value, with what is allowed.
    """
    words = [re.sub(rf"^--({'|'.join(DEFAULTS)})(?==|$)", r"--\1.name", word) for word in words]
    names, sections = {}, dict(table or {})
    for section, default in DEFAULTS.items():
        if section == "network" and section not in sections and _vectors(names["data"], words, sections.get("data")):
            default = "mlp"
        if not isinstance(sections.get(section, {}), Mapping):
            raise UsageError(f'{origin}: {section} is a table such as [{section}] with name = "{default}"')
        before = sections.get(section, {}).get("name", default)
        names[section] = last_value(words, f"--{section}.name") or before
        if names[section] != before:
            sections.pop(section, None)
    if "network" not in _parameters("model", names["model"]):
        del names["network"]
        if last_value(words, "--model.name"):
            sections.pop("network", None)
        elif "network" in sections:
            raise UsageError(f"{origin}: a {names['model']} has networks of its own and no [network]")
    parser = parser or Parser("train", "[RUN] [options]", "", "")
    known = _add_settings(parser, names)
    for key, _ in _flat(sections):
        if key not in known:
            raise UsageError(f"{origin}: unknown key {key}{nearest(key, known)}")
    if {"-h", "--help"} & {*words}:  # says what is done where nothing is said; values are checked by reading them
        parser.set_defaults(dict(_flat(sections)))
    values = parser.read(words, sections)
    return _assembled(values, names), values


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "configs").glob("*.toml"))}


def defaults(words: Sequence[str]) -> dict[str, Any]:
    """Keys and values for a command line without a file: those measured for its data and model, where there are any."""
    named = {key: last_value(words, f"--{key}") or last_value(words, f"--{key}.name") for key in ("data", "model")}
    data, model = (named[key] or DEFAULTS[key] for key in named)
    file = shipped().get(f"{data}-{model}")
    table = read_toml(file) if file else {}
    if any(last_value(words, f"--train.{budget}") for budget in ("steps", "seconds")):
        # One budget that is asked for replaces the other that is not.
        table["train"] = {k: v for k, v in table.get("train", {}).items() if k not in ("steps", "seconds")}
    return table


def read_toml(path: Path | str) -> dict[str, Any]:
    """Keys and values of a configuration file, or of a :func:`shipped` one by its name.

    Raises:
        UsageError: there is no such file, or it is no TOML; with the line.
    """
    known = shipped()
    path = known.get(str(path), Path(path))
    if not path.is_file():
        raise UsageError(f"there is no file {path}, and these configurations come with sdegen: {', '.join(known)}")
    return _parsed(path.read_bytes(), path)


def _parsed(text: str | bytes, origin: Path | str) -> dict[str, Any]:
    try:
        return tomllib.loads(text if isinstance(text, str) else text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{origin} is not TOML: {error}") from None


def _assembled(values: Namespace, names: Mapping[str, str]) -> RunConfig:
    from sdegen.train import TrainConfig

    plain = values.as_dict()
    choices = {n: Choice(plain[n]["name"], {k: v for k, v in plain[n].items() if k != "name"}) for n in names}
    shared = {key: plain[key] for key in ("seed", "threads")}
    if plain["train"]["steps"] is None and plain["train"]["seconds"] is None:
        plain["train"]["seconds"] = SECONDS
    try:
        train = TrainConfig(**plain["train"], **shared)
    except ValueError as error:
        raise UsageError(f"train.{error}") from None
    return RunConfig(choices["data"], choices["model"], choices.get("network"), train, device=plain["device"], **shared)


def _add_settings(parser: Parser, names: Mapping[str, str]) -> list[str]:
    """Give a parser the options of every section, and say which keys these are."""
    from jsonargparse.typing import NonNegativeInt, PositiveInt

    from sdegen.train import TrainConfig

    before = {action.dest for action in parser._actions}
    group = parser.add_argument_group("what every run has")
    group.add_argument("--seed", type=NonNegativeInt, default=0, help="of initial weights, batches, noise and dropout")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 and so on")
    group.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads; small networks are slower on many")
    for section, name in names.items():
        group = parser.add_argument_group(f"{section} {name}")
        help = f"{', '.join(_known(section))}{', or a file .h5, .npz, .npy' if section == 'data' else ''}"
        group.add_argument(f"--{section}.name", default=name, metavar="NAME", help=f"{help}; --{section} for short")
        kind: Any = source(section, name)
        given: Any = GIVEN[section] & {*_parameters(section, name)}
        add = group.add_class_arguments if inspect.isclass(kind) else group.add_function_arguments
        add(kind, section, skip=given, as_group=False)
    group = parser.add_argument_group("training")
    group.add_class_arguments(TrainConfig, "train", skip=set(SHARED), as_group=False)
    return [action.dest for action in parser._actions if action.dest not in before]


def _meanings(names: Mapping[str, str]) -> dict[str, str]:
    """What every key means, in one line, in the order of the page."""
    parser = Parser("train", "", "", "")
    known = _add_settings(parser, names)
    return {a.dest: " ".join((a.help or "").split()).rstrip(".") for a in parser._actions if a.dest in known}


def _known(section: str) -> list[str]:
    """The names that a section may have."""
    from sdegen.data import names
    from sdegen.networks import NETWORKS
    from sdegen.recipes import MODELS

    return {"data": names(), "model": list(MODELS), "network": list(NETWORKS)}[section]


def source(section: str, name: str) -> Callable[..., Any]:
    """The function or class that a name stands for: its signature holds the options."""
    from sdegen.data import digits, from_file, toy
    from sdegen.networks import network
    from sdegen.recipes import MODELS

    if section == "network" and ":" in name:
        return network(name)
    if section == "data" and name not in _known("data") and (Path(name).suffix or "/" in name):
        return from_file
    if name not in _known(section):
        raise UsageError(f"{section}: there is no {name!r}{nearest(name, _known(section))}")
    if section == "data":
        return digits if name == "digits" else toy
    return MODELS[name] if section == "model" else network(name)


def _vectors(name: str, words: Sequence[str], options: Mapping[str, Any] | None) -> bool:
    """Whether an example is a vector and no image, for all that can be told before the data are read."""
    from sdegen.data import from_file, toy
    from sdegen.data.files import axes

    kind = source("data", name)
    if kind is from_file:
        return axes(name, last_value(words, "--data.key") or (options or {}).get("key")) == 2
    return kind is toy


def _parameters(section: str, name: str) -> list[str]:
    return list(inspect.signature(source(section, name)).parameters)


def last_value(words: Sequence[str], option: str) -> str | None:
    """The value that an option has in a command line."""
    found = [after for word, after in pairwise([*words, ""]) if word == option]
    found += [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    return found[-1] if found else None


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _toml(value: Any) -> str:
    """A value on one line; tomli_w breaks lists."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()
