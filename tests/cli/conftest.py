"""The commands as a person runs them, in this process: a fresh interpreter would spend seconds on imports."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from duet_mlx.errors import run_cli
from tests.tiny_model import tiny_data, tiny_model

# Small enough for a fraction of a second; everything a long run does happens at least once.
QUICK = [
    "--iters", "4", "--batch-size", "4", "--forget-per-batch", "2", "--top-k", "5", "--positions", "3",
    "--steps-per-report", "1", "--steps-per-eval", "0", "--save-every", "0",
]  # fmt: skip


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch, capsys) -> Command:
    """command("train", flag, …) runs `python -m duet_mlx.train flag …`."""

    def run(name: str, *flags: object) -> Ended:
        main = importlib.import_module(f"duet_mlx.{name}").main
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_cli(main)
        said = capsys.readouterr()
        return Ended(ended.value.code, said.out, said.err)

    return run


@pytest.fixture
def refused(command) -> Callable[..., str]:
    """refused("train", flag, …, says=(…)): exit code 2 and one line of error that holds all of `says`; the line."""

    def run(name: str, *flags: object, says: tuple[str, ...]) -> str:
        ended = command(name, *flags)
        assert ended.code == 2, ended
        *before, error = ended.err.splitlines()
        assert error.startswith("error: ") and "error: " not in "".join(before), ended.err
        assert not before or name == "evaluate", ended.err  # it shows its progress there
        assert "Traceback" not in ended.err + ended.out
        missing = [text for text in says if text not in error]
        assert not missing, f"{missing} not in: {error}"
        return error

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny model, 4 bits. Never written to."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", bits=4)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> list[str]:
    """Flags that name questions and a context. Never written to."""
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def quick(model, data, tmp_path) -> list[str]:
    """Flags of a run of four steps into a folder that is not there yet; a later flag overrides an earlier one."""
    return ["--model", str(model), *data, *QUICK, "--adapter-path", str(tmp_path / "adapters")]


@pytest.fixture(scope="session")
def trained_once(model, data, tmp_path_factory) -> Path:
    """The adapter folder of such a run."""
    from duet_mlx.train import parse_settings, prepare, train

    folder = tmp_path_factory.mktemp("trained") / "adapters"
    settings = parse_settings("train", "Train.", ["--model", str(model), *data, *QUICK, "--adapter-path", str(folder)])
    return train(settings, prepare(settings))


@pytest.fixture
def trained(trained_once, tmp_path) -> Path:
    """The same in a copy that may be spoilt, where `quick` writes to."""
    return Path(shutil.copytree(trained_once, tmp_path / "adapters"))
