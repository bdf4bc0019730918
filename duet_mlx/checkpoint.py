"""The adapter folder: mlx-lm's two files, and what it takes to go on from them. Nothing is half written."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .data import file_hash
from .errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from .train import Prepared, TrainSettings


def folder_for_adapter(settings: TrainSettings) -> Path:
    """The adapter folder, made if need be. Raises ConfigError if it holds an adapter and nothing allows its loss."""
    path = Path(settings.adapter_path)
    resumed = settings.resume_adapter_file and Path(settings.resume_adapter_file).resolve().parent == path.resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--adapter-path {path}: is a file, expected a folder")
    foreign = (
        []
        if not path.is_dir()
        else sorted(
            entry.name
            for entry in path.iterdir()  # names with a dot in front: what Finder leaves, or a write that was cut off
            if not entry.name.endswith("targets.safetensors") and not entry.name.startswith(".")
        )
    )
    if foreign and not settings.overwrite and not resumed:
        adapter = path / "adapters.safetensors"
        resume = f", or go on from it with --resume-adapter-file {adapter}" if adapter.is_file() else ""
        raise ConfigError(
            f"--adapter-path {path}: not empty (holds {foreign[0]}); choose another folder, pass --overwrite to "
            f"write into it{resume}"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # better known now than after the teacher was read
    except OSError as error:
        raise ConfigError(f"--adapter-path {path}: cannot be written to ({error.strerror})") from error
    return path


class Checkpoint:
    """Saving and resuming: mlx-lm's two files, and beside them the optimizer, the random state and the step."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self.config = path, config

    def save(self, model, optimizer, step: int, copy: bool = False) -> None:
        """Write the adapter whole or not at all; `copy` keeps a numbered one too, as mlx-lm does."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        from .model import adapter_parameters

        weights = adapter_parameters(model)
        _write(self.path / "adapters.safetensors", weights)
        if copy:
            _write(self.path / f"{step:07d}_adapters.safetensors", weights)
        state = {**dict(tree_flatten(optimizer.state)), "random_state": mx.random.state[0]}  # LoRA's dropout draws
        _write(self.path / "optimizer.safetensors", state, {"step": str(step)})
        write_text(self.path / "adapter_config.json", json.dumps({**self.config, "step": step}, indent=2) + "\n")

    def resume(self, model, optimizer, file: str) -> int:
        """Load adapter, optimizer and step from beside `file`; the step to go on from.

        Raises:
            ConfigError: files missing, or of another LoRA.
        """
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        from .model import adapter_parameters

        try:
            weights = mx.load(file)
            mx.eval(weights)
            state, meta = mx.load(str(Path(file).with_name("optimizer.safetensors")), return_metadata=True)
            mx.eval(state)
            step, _ = int(meta["step"]), state["random_state"]
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"--resume-adapter-file {file}: cannot be read ({error})") from error
        except KeyError as error:
            raise ConfigError(
                f"--resume-adapter-file {file}: the optimizer.safetensors beside it holds no {error}"
            ) from error
        mine = adapter_parameters(model)
        odd = sorted(
            name for name in mine.keys() | weights.keys()
            if name not in mine or name not in weights or mine[name].shape != weights[name].shape
        )  # fmt: skip
        if odd:
            raise ConfigError(f"--resume-adapter-file {file}: {odd[0]} does not fit this model and LoRA")
        beside = Path(file).with_name("adapter_config.json")
        saved = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        trained_on, here = ((config.get("targets") or {}).get("model") for config in (saved, self.config))
        # Hashes alone differ between a GPU and a CPU too (evaluate.py): other weights under another name are refused.
        other, name = (Path(str(c.get("model"))).name.removesuffix("-fp32") for c in (saved, self.config))
        if trained_on not in (None, here) and other != name:
            raise ConfigError(f"--resume-adapter-file {file}: made for another model ({saved.get('model')})")
        model.load_weights(list(weights.items()), strict=False)
        high, low = state.pop("random_state").tolist()  # MLX sets its state by a seed of 64 bits alone
        mx.random.seed(high << 32 | low)
        optimizer.state = tree_unflatten(list(state.items()))
        return step


def _write(path: Path, arrays: dict, metadata: dict[str, str] | None = None) -> None:
    import mlx.core as mx

    partial = path.with_name(f".{path.stem}.partial.safetensors")
    try:
        mx.save_safetensors(str(partial), arrays, metadata or {})
        os.replace(partial, path)
    except (RuntimeError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(f"{path}: cannot be written ({error}); what was there before is untouched") from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(
            f"{path}: cannot be written ({error.strerror}); what was there before is untouched"
        ) from error


def append_text(path: Path, text: str) -> None:
    """Add to a file."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:  # a write that fails does not name its file
        raise TrainingError(f"{path}: cannot be written ({error.strerror})") from error


def adapter_config(settings: TrainSettings, prepared: Prepared, keys: list[str], layers: int) -> dict[str, Any]:
    """What mlx-lm reads of an adapter, and beside it everything that made it."""
    import mlx.core as mx
    import mlx_lm

    files = [*settings.forget, *settings.retain, *settings.neighbours]
    return {
        "fine_tune_type": "lora",
        "model": str(prepared.folder),
        "num_layers": layers,
        "lora_parameters": {**settings.lora_parameters, "keys": keys},
        "settings": asdict(settings),
        "data_hashes": {file: file_hash(file) for file in files},
        "targets": prepared.manifest,
        "versions": {
            "duet_mlx": __version__,
            "mlx": mx.__version__,
            "mlx_lm": mlx_lm.__version__,
            "python": sys.version.split()[0],
        },
    }
