"""Settings of a command: one frozen dataclass gives the flags, the YAML keys and what is saved with the results."""

from __future__ import annotations

import argparse
import os
import re
import typing
from collections.abc import Iterable
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError, nearest

Settings = TypeVar("Settings")


def setting(default: Any, help: str, choices: tuple[str, ...] | None = None, names: Iterable[str] = ()) -> Any:
    """A dataclass field with its meaning and the reason for its default; of a dictionary, the names it may have."""
    metadata = {"help": help, "choices": choices, "names": tuple(names)}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse(
    cls: type[Settings],
    prog: str,
    description: str,
    argv: list[str] | None = None,
    recipes: dict[str, dict[str, Any]] | None = None,
    over: dict[str, Any] | None = None,
    named: str = "",
) -> Settings:
    """Settings from, weakest first: the dataclass, the recipe of `-c`, the YAML file of `-c`, `over`, the flags.

    A recipe named by a flag is stronger than the YAML file, as every flag is, and weaker than the other flags.

    Every field is a flag (`top_k` is `--top-k`). A dictionary's takes NAME=VALUE, as often as wanted, and what YAML
    gave under other names stays.

    Args:
        over: settings of another file, as YAML reads them.  named: where they stand, for messages.

    Raises:
        ConfigError: an unknown key (with the nearest name), a wrong type or choice, a YAML file that cannot be read.
    """
    parser = _Parser(prog=prog, description=description.splitlines()[0])
    parser.add_argument("-c", "--config", metavar="YAML", help="file with any of these settings, by the same names")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type,unused-ignore]
    parser.group_of = {inner: name for name, spec in known.items() for inner in spec.metadata["names"]}
    kinds = typing.get_type_hints(cls)
    for name, spec in known.items():
        default = spec.default if spec.default is not MISSING else spec.default_factory()  # type: ignore[operator]
        flag, text = "--" + name.replace("_", "-"), spec.metadata["help"]
        text += "" if default in (None, (), False, {}) else f" (default: {default})"
        options: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": text.replace("%", "%%"),
        }
        if isinstance(default, dict):
            options |= {"nargs": "+", "action": "extend", "type": _pair, "metavar": "NAME=VALUE"}
            parser.add_argument(flag, **options)
        elif isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif isinstance(default, tuple):
            parser.add_argument(flag, nargs="+", action="extend", **options)
        else:
            choices = spec.metadata["choices"]  # checked below, which names the nearest one
            metavar = "{" + ",".join(choices) + "}" if choices else None
            parser.add_argument(flag, metavar=metavar, type=_flag_type(kinds[name]), **options)
    given = vars(parser.parse_args(argv))
    file = given.pop("config", None)
    over = over or {}
    merged = {**(read_yaml(file) if file else {}), **over}
    for name, value in given.items():
        before = merged.get(name)
        pairs = kinds[name] is dict
        merged[name] = {**(before if isinstance(before, dict) else {}), **dict(value)} if pairs else value
    for name, value in merged.items():
        where = named if name in over else f"-c {file}"
        if name not in known:
            hint = nearest(str(name), list(known))
            if group := parser.group_of.get(name):
                hint = f"; it is one of {group}"
            raise ConfigError(f"{where}: unknown key {name!r}{hint}")
        place = f"--{name.replace('_', '-')}" if name in given else f"{where}: {name}"
        merged[name] = _checked(place, value, known[name], kinds[name])
    recipe = (recipes or {}).get(merged.get("recipe", "default"), {})
    if "recipe" in given:
        merged |= {name: value for name, value in recipe.items() if name not in given}
    return cls(**{**recipe, **merged})


class _Parser(argparse.ArgumentParser):
    """argparse without the page of usage before each error."""

    group_of: dict[str, str]  # the dictionaries among the settings by the names that these have

    def error(self, message: str) -> typing.NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0] if "unrecognized" in message else ""
        hint = nearest(unknown, flags) if unknown else ""
        name, _, value = unknown.lstrip("-").partition("=")
        if group := self.group_of.get(name.replace("-", "_")):  # --alpha 5, --rank 4
            hint = f"; write --{group.replace('_', '-')} {name.replace('-', '_')}={value or '…'}"
        raise ConfigError(f"{message}{hint}; `{self.prog} --help` lists all flags")


def require(settings: Any, *names: str) -> None:
    """Raise ConfigError for the first of these settings that was not given."""
    for name in names:
        if not getattr(settings, name):
            raise ConfigError(f"--{name.replace('_', '-')} is missing: {_help(settings, name)}")


def _help(settings: Any, name: str) -> str:
    return next(f.metadata["help"] for f in fields(settings) if f.name == name)


def _flag_type(kind: Any) -> type:
    return next((t for t in (int, float) if kind in (t, t | None)), str)


def _pair(text: str) -> tuple[str, Any]:
    import yaml

    name, equals, written = text.partition("=")
    try:
        value = yaml.safe_load(written)
    except Exception:  # as in read_yaml
        equals = ""
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, float(value) if isinstance(value, str) else value  # YAML takes 1e-4 for text
    except ValueError:
        return name, value


def read_yaml(file: str, flag: str = "-c") -> dict[str, Any]:
    """The keys of a YAML file. Raises ConfigError for one that cannot be read, and for a key that stands twice."""
    import yaml

    from .context_file import Loader

    try:
        content = yaml.load(Path(file).read_bytes().decode(), Loader=Loader)  # a SafeLoader
    except OSError as error:
        raise ConfigError(f"{flag} {file}: cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{flag} {file}:{line}: not UTF-8 text; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{flag} {file}: not YAML: {' '.join(str(error).split())}") from error
    except Exception as error:  # a date of month 13, `!!int x`, `!!bool x`, brackets without end: each its own kind
        raise ConfigError(f"{flag} {file}: holds a value that YAML cannot read ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{flag} {file}: expected `key: value` lines, found {type(content).__name__}")
    return content


def number(value: Any) -> float | None:
    """The value as a number, also where YAML reads one as text (1e-4); None if it is none, or beyond all floats."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    return None


def _checked(place: str, value: Any, spec: Field, kind: Any) -> Any:
    """The value as the field's type; YAML reads 1e-4 as text and a lone file name as no list.

    A path below `~/` is made whole: the shell does so only where it begins a flag's value.
    """
    choices = spec.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{place}: {value!r} is none of {', '.join(choices)}{nearest(str(value), choices)}")
    allowed = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    if value is None:
        if type(None) in allowed:
            return None
        raise ConfigError(f"{place}: no value given")
    plain = next(k for k in allowed if k is not type(None))
    plain = typing.get_origin(plain) or plain
    expected = plain.__name__
    if plain is tuple:
        value = (value,) if isinstance(value, str) else value
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(re.sub("(^|[=@])~(?=/)", lambda at: at[1] + os.path.expanduser("~"), item) for item in value)
        one = "file name" if spec.metadata["help"].startswith("JSONL files") else "text"
        expected = f"a {one} or a list of {one}s"
    elif plain is float:
        if (as_float := number(value)) is not None:
            return as_float
    elif isinstance(value, plain) and (plain is bool or not isinstance(value, bool)):
        return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value
    found = repr(value)
    raise ConfigError(f"{place}: expected {expected}, found {found if len(found) <= 60 else found[:57] + '…'}")
