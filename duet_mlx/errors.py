"""Typed errors: each carries one message a person can act on; commands print it and leave with code 2."""

import io
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import NoReturn, TextIO


class DuetError(Exception):
    """Base of all errors that are the input's or the machine's fault, not the program's."""


class DataError(DuetError):
    """A file of questions cannot be used."""


class ContextError(DuetError):
    """An unlearning context cannot be read, or the model's chat template cannot carry it."""


class ModelError(DuetError):
    """A model, tokenizer or adapter cannot be loaded or does not fit."""


class ConfigError(DuetError):
    """A flag or YAML key is unknown, contradictory or out of range."""


class TrainingError(DuetError):
    """A run cannot go on (non-finite loss, no room on the disk, …)."""


class DivergedError(TrainingError):
    """Loss or gradient is not finite any more: the settings' fault, and the last good adapter is kept."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean "…"?)' for the known name nearest to `name`, whatever its case, or ''."""
    by_lower_case = {one.lower(): one for one in known}
    close = get_close_matches(name.lower(), by_lower_case, n=1)
    return f' (did you mean "{by_lower_case[close[0]]}"?)' if close else ""


def note(text: str) -> None:
    """A line on stderr. The work goes on where nobody reads it any more (`… 2>&1 | head`)."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """What is written to this stream from now on goes nowhere: Python would write to it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 when it is done; 2, with one line on stderr, when input, machine or Ctrl-C
    stopped it. Other exceptions are faults of the program and keep their traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal has no ↓; stderr does so by itself
    try:
        main()
        print(end="", flush=True)  # unlike sys.stdout.flush() it takes a stdout that is closed
    except BrokenPipeError:  # `… | head`: the reader has left
        _discard(sys.stdout)
        sys.exit(1)
    except DuetError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in ("mlx", "mlx_lm"):
            raise
        _fail(
            f"{error.name} is not installed for {sys.executable}: activate the environment that has it (after `make "
            "install`: source .venv/bin/activate), or install duet-mlx into this one (README.md, Install)"
        )
    except OSError as error:  # no room, no permission, …: the operating system's own words name the file
        _fail(str(error))
    except KeyboardInterrupt as stop:  # its text, if any, says what was saved and how to go on
        _fail(f"interrupted (Ctrl-C): {stop}" if str(stop) else "interrupted (Ctrl-C)")
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    try:
        print(end="", flush=True)
    except OSError:  # stdout itself is what there was no room for
        _discard(sys.stdout)
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)
