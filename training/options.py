"""How a setting is declared, written and read: fields of a dataclass that are flags and YAML keys at once.

Flags arrive as text and YAML values as whatever YAML makes of them; both pass through convert(), so a wrong value gets
the same sentence from either. Flags are collected in order, not assigned, so that saying one thing twice can be seen.
This file knows how settings are read and none of their names: those are in config.py and in the stages.
"""

import argparse
import dataclasses
import difflib
import math
import sys
import types
import typing
from typing import Any, NamedTuple

import yaml

from data.errors import UserError


class Said(NamedTuple):
    """One setting as somebody wrote it: where (for messages), under which key, which value."""
    where: str
    key: str
    value: Any


def option(default, help: str, *, words: str = "", low: float = 0, high: float = math.inf, group: str = "",
           shown: str = "", steers: bool = True, recorded: bool = True, compare: bool = True) -> Any:
    """A dataclass field that is a flag too; its type is bool, int, float, str or list[str], or one of them with None.

    `words` are the texts allowed (beside a number if the type has one), `low` and `high` bound a number, `group` opens
    a group of --help, `shown` is what --help writes for the value. What `steers` changes the weights a run arrives at;
    what is not `recorded` is asked of one start of the program and stays out of run.yaml.
    """
    metadata = dict(help=help, words=words.split(), low=low, high=high, group=group, shown=shown, steers=steers,
                    recorded=recorded)
    value = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**value, metadata=metadata, compare=compare)


def kinds_of(field: dataclasses.Field) -> tuple:
    """The types a field may have, the one that text is read as first."""
    return typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)


def describe(field: dataclasses.Field) -> list[str]:
    """What may be written for a field, for --help and for errors."""
    rules, kind = field.metadata, kinds_of(field)[0]
    if kind is bool:
        return ["true", "false"]
    if kind in (int, float):
        bounds = f">= {rules['low']}" if rules["high"] == math.inf else f"{rules['low']} to {rules['high']}"
        return [*rules["words"], f"{'integer' if kind is int else 'number'} {bounds}"]
    return rules["words"] or ["text"]


def convert(where: str, value: Any, field: dataclasses.Field, same_word: dict[str, str]) -> Any:
    """A value, as text or as YAML gives it, in the type of its field; UserError says what is allowed instead.

    `same_word` maps other spellings of a word to ours.
    """
    wrong = UserError(f"{where} {value}: expected {' or '.join(describe(field))}")
    words = {word.lower(): word for word in field.metadata["words"]}
    kinds = kinds_of(field)
    text = str(value).strip()
    if kinds[0] == list[str]:
        parts = value if isinstance(value, list) else [text]
        names = [name.strip() for part in parts for name in str(part).split(",")]
        if not all(names) or (words and not set(names) <= set(words)):
            raise wrong
        return names
    if kinds[0] is bool:
        if text.lower() not in ("true", "false"):
            raise wrong
        return text.lower() == "true"
    if isinstance(value, bool):         # YAML reads a bare yes or no (`save_strategy: no`) as a boolean
        text = "yes" if value else "no"
    if text.lower() in ("none", "") and types.NoneType in kinds:
        return None
    word = same_word.get(text.lower(), text.lower())
    if word in words:
        return words[word]
    if kinds[0] is str:
        if words or not isinstance(value, str | int):
            raise wrong
        return text
    return convert_number(text, kinds[0], field, wrong)


def convert_number(text: str, kind: type, field: dataclasses.Field, wrong: UserError) -> int | float:
    try:
        number = float(text)
    except ValueError:
        raise wrong from None
    in_bounds = math.isfinite(number) and field.metadata["low"] <= number <= field.metadata["high"]
    if not in_bounds or (kind is int and not number.is_integer()):
        raise wrong
    return kind(number)


class Parser(argparse.ArgumentParser):
    """argparse for its help and its splitting; what it finds wrong becomes our one sentence, which names the flag nearest to
    one that there is not, and --batch-size is read as --batch_size."""

    commands = None  # what add_subparsers() made

    def add_subparsers(self, **more):
        self.commands = super().add_subparsers(**more)
        return self.commands

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        found, unknown = self.parse_known_args(args, namespace)
        if flag := next((word.partition("=")[0] for word in unknown if word.startswith("--")), None):
            door = self.door(args)
            names = [name for name in door._option_string_actions if name not in ("-h", "--help")] or ["--help"]
            nearest = difflib.get_close_matches(flag, names, n=1, cutoff=0)[0]
            raise UserError(f"{flag} is no flag of {door.prog}; the nearest is {nearest}, and --help lists all")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found

    def door(self, args: list[str]) -> "Parser":
        """The parser of the command that the arguments name, of a command of it, and so on."""
        choices = self.commands.choices if self.commands else {}
        return next((choices[word].door(args) for word in args if word in choices), self)

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(list(map(with_underscores, sys.argv[1:] if args is None else args)), namespace)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; --help lists all flags")


def with_underscores(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else arg


class CollectFlag(argparse.Action):
    """Appends what was said to namespace.said instead of setting an attribute."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.said.append(Said(option_string, self.dest, False if self.nargs == 0 else values))


def add_flag(group, name: str, field: dataclasses.Field | None, listed: bool = True) -> argparse.Action:
    """One flag. A boolean may stand alone and has a --no_ form; without a field it takes anything or nothing."""
    common = dict(action=CollectFlag, default=argparse.SUPPRESS)
    if field is None:
        return group.add_argument(f"--{name}", nargs="?", help=argparse.SUPPRESS, **common)
    if field.type is bool:
        group.add_argument(f"--no_{name}", dest=name, nargs=0, help=argparse.SUPPRESS, **common)
    shape = {bool: {"nargs": "?", "const": True}, list[str]: {"nargs": "+"}}.get(field.type, {})
    metavar = "NAME" if field.type == list[str] else field.metadata["shown"] or "|".join(describe(field))
    return group.add_argument(f"--{name}", metavar=metavar, help=help_text(field) if listed else argparse.SUPPRESS,
                              **common, **shape)


def help_text(field: dataclasses.Field) -> str:
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    if isinstance(default, list):
        default = ",".join(default)
    shown = str(default).lower() if field.type is bool else default
    return (field.metadata["help"] + ("" if default is None else f" (default {shown})")).replace("%", "%%")


def collect(parser: Parser, argv: list[str]) -> tuple[list[Said], list[str]]:
    """What the flags of a command line say, in order, and the arguments that are no known flag or its value."""
    found, rest = parser.parse_known_args(argv, argparse.Namespace(said=[]))
    return found.said, rest


def read_yaml(path: str, nests: tuple[str, ...]) -> list[Said]:
    """The keys of a YAML file in order, those inside the groups named `nests` included."""
    try:
        with open(path, encoding="utf-8") as file:
            document = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; name a YAML file of settings") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"--config {path}: found no lines of `key: value`")
    return flatten(document, f"{path}: ", nests)


def flatten(document: dict, where: str, nests: tuple[str, ...]) -> list[Said]:
    said = []
    for key, value in document.items():
        if key in nests and isinstance(value, dict | None):
            said += flatten(value or {}, f"{where}{key}.", nests)
        else:
            said.append(Said(f"{where}{key}", str(key), value))
    return said


def put(settled: dict[str, Said], name: str, said: Said) -> None:
    """Note what was said about a field; saying two different things within one source is an error."""
    first = settled.setdefault(name, said)
    if first.value != said.value:
        raise UserError(f"{first.where} and {said.where} both set {name}, to {first.value} and {said.value}; keep one")


def note(sentence: str) -> None:
    """Tell the user on stderr, which leaves stdout to --print_config."""
    print(f"note: {sentence}", file=sys.stderr)
