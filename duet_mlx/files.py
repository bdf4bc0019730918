"""Writing into a folder: nothing is half written, and one run at a time."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from .train_settings import TrainSettings


def partial_of(path: Path) -> Path:
    """Where a file is written before it takes its name; a dot in front hides it, the suffix stays for MLX."""
    return path.with_name(f".partial.{path.name}")


def write_files(folder: Path, writers: dict[str, Callable[[Path], object]]) -> None:
    """Write several files, all or none: each function writes one, and only when all lie on the disk they get names.

    A full disk therefore changes nothing. A kill can come between two of the renamings, which are done in the order
    given: `checkpoint.load_state` completes them.

    Raises:
        TrainingError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partials = {folder / name: partial_of(folder / name) for name in writers}
    for path, write in zip(partials, writers.values(), strict=True):
        try:
            write(partials[path])
            with partials[path].open("rb+") as file:
                os.fsync(file.fileno())  # or a power cut may leave the name without the bytes
            if path.is_dir():
                raise IsADirectoryError(21, "Is a directory")
        except (RuntimeError, OSError) as error:  # MLX raises the former
            for partial in partials.values():
                partial.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) else error
            raise TrainingError(f"{path}: cannot be written ({reason}); what was there before is untouched") from error
    for path, partial in partials.items():
        os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_files(path.parent, {path.name: lambda partial: partial.write_text(text, encoding="utf-8")})


def json_of(path: Path) -> dict[str, Any]:
    """A JSON file of ours; {} if it is not there, was cut off, or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def as_json(value: Any) -> Any:
    """As JSON gives it back: tuples are lists there, and infinity, for which it has no word, is text."""
    return json.loads(json.dumps(value), parse_constant=str)


def new_name(path: Path) -> Path:
    """A name beside a path, of this moment, that nothing has."""
    stamp = f"{path.name}-until-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (path.with_name(stamp if n == 1 else f"{stamp}-{n}") for n in count(1))  # two may fall into one second
    return next(name for name in names if not name.exists())


def append_text(path: Path, text: str) -> None:
    """Add to a file."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:  # a write that fails does not name its file
        raise TrainingError(f"{path}: cannot be written ({error.strerror})") from error


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder, or raise ConfigError: that nothing can be written is better known before all the work.

    Args:
        flag: the flag that asks for it and what it was given, for the message.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"{flag}: cannot be written to ({error.strerror})") from error


def folder_for_adapter(settings: TrainSettings) -> Path:
    """The adapter folder, made if need be. Raises ConfigError if it holds an adapter and nothing allows its loss."""
    path = Path(settings.adapter_path)
    resumed = settings.resume_adapter_file and Path(settings.resume_adapter_file).resolve().parent == path.resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--adapter-path {path}: is a file, expected a folder")
    # Names with a dot in front: what Finder leaves, or a write that was cut off.
    names = sorted(entry.name for entry in path.iterdir() if entry.name[0] != ".") if path.is_dir() else []
    foreign = [name for name in names if not name.endswith("targets.safetensors")]
    if foreign == ["train_log.jsonl"]:  # of a run that was stopped before its first save
        foreign = []
    if foreign and not settings.overwrite and not resumed:
        adapter = path / "adapters.safetensors"
        ours = adapter.is_file() and adapter.with_name("optimizer.safetensors").is_file()
        resume = f", or go on from it with --resume-adapter-file {adapter}" if ours else ""
        raise ConfigError(
            f"--adapter-path {path}: not empty (holds {foreign[0]}); choose another folder, pass --overwrite to "
            f"write into it{resume}"
        )
    make_folder(path, f"--adapter-path {path}")
    return path


@contextmanager
def only_run_in(path: Path, flag: str = "--adapter-path") -> Iterator[None]:
    """Hold a folder, so that no second run mixes its files in; the system lets go of it when the process ends.

    Args:
        flag: the flag that the folder comes from, for the message.

    Raises:
        ConfigError: another run holds it.
    """
    import fcntl  # MLX runs where there is one

    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{flag} {path}: another run is writing there; wait for its end, or choose another folder"
            ) from error
        except OSError as error:  # some network file systems
            print(f"note: {path} cannot be locked ({error.strerror}): see that no second run writes there")
        yield
    finally:
        os.close(handle)
