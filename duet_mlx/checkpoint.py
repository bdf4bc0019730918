"""What a run leaves behind: mlx-lm's two files, and beside them what it takes to go on (resume.py)."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import __version__
from .data import file_hash
from .files import as_json, write_files

if TYPE_CHECKING:
    from .train_settings import TrainSettings


class State(NamedTuple):
    """A run between two updates. The arrays are never changed in place: keeping them keeps what they were."""

    step: int
    adapter: dict[str, Any]
    optimizer: dict[str, Any]
    random: Any  # MLX's random state, [2] uint32: LoRA's dropout draws from it

    @classmethod
    def of(cls, model, optimizer, step: int) -> State:
        """The state after `step` steps."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        from .model import adapter_parameters

        return cls(step, adapter_parameters(model), dict(tree_flatten(optimizer.state)), mx.random.state[0])

    def restore(self, model, optimizer) -> None:
        """Put the state into model, optimizer and MLX's generator."""
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        model.load_weights(list(self.adapter.items()), strict=False)
        optimizer.state = tree_unflatten(list(self.optimizer.items()))
        high, low = self.random.tolist()  # MLX sets its state by a seed of 64 bits alone
        mx.random.seed(high << 32 | low)

    def is_finite(self) -> bool:
        """Whether every number of the adapter is."""
        import mlx.core as mx

        return all(mx.isfinite(array).all().item() for array in self.adapter.values())


class Checkpoint:
    """The last two states of a run, and the adapter folder that they are saved in.

    Attributes:
        now: after the last update.  before: after the one before it, whose loss has been seen since.
        saved: the step of what lies in the folder; None as long as it is not of this run.
    """

    def __init__(self, path: Path, config: dict[str, Any], model, optimizer, start: State, same_folder: bool = False):
        self.path, self.config, self.model, self.optimizer = path, config, model, optimizer
        self.now = self.before = start
        self.start = start.step
        self.saved = start.step if same_folder else None
        # --overwrite allows the loss of another run's numbered copies, once there is something in their place.
        self.stale = [] if same_folder else sorted(path.glob(f"{'[0-9]' * 7}_adapters.safetensors"))

    def updated(self, step: int) -> None:
        """Note the state after an update, which step `step` has completed."""
        self.before, self.now = self.now, State.of(self.model, self.optimizer, step)

    def save(self, copy: bool = False) -> None:
        """Write the state, all of its files or none; `copy` keeps a numbered adapter too, as mlx-lm does.

        The optimizer's file names the adapter that it belongs to and comes first, the adapter itself last.
        """
        import mlx.core as mx

        from .model import arrays_hash

        now = self.now
        # Sorted: MLX writes in an order that hangs on the dictionary's, and a state that was loaded has another one.
        optimizer = {**dict(sorted(now.optimizer.items())), "random_state": now.random}
        described = {"step": str(now.step), "adapter": arrays_hash(now.adapter)}
        config = json.dumps({**as_json(self.config), "step": now.step}, indent=2) + "\n"
        adapters = [f"{now.step:07d}_adapters.safetensors"] * copy + ["adapters.safetensors"]
        write_files(
            self.path,
            {
                "optimizer.safetensors": lambda file: mx.save_safetensors(str(file), optimizer, described),
                "adapter_config.json": lambda file: file.write_text(config, encoding="utf-8"),
                **{name: lambda file: mx.save_safetensors(str(file), now.adapter) for name in adapters},
            },
        )
        self.saved = now.step
        stale, self.stale = [old for old in self.stale if old.name not in adapters], []
        for old in stale:
            old.unlink(missing_ok=True)
        if stale:
            print(f"overwritten: {', '.join(old.name for old in stale)} of the run before, removed from {self.path}")

    def go_back(self, to: State) -> None:
        """Save `to`, the last good state, in place of what came after it; one without a step in no other's place."""
        self.now = self.before = to
        if self.saved is not None or to.step > self.start or not (self.path / "adapters.safetensors").exists():
            self.save()

    def save_reached(self) -> str:
        """Save the last state that is finite, if it is not on the disk; what to tell a person of it."""
        if not self.now.is_finite():
            self.now = self.before
        if self.now.step > max(self.saved or 0, self.start):
            self.save()
        if self.saved is None:
            return f"stopped before the first update was done; nothing of it is in {self.path}"
        file = self.path / "adapters.safetensors"
        return f"stopped at step {self.saved}; saved. To go on: the same command with --resume-adapter-file {file}"


def adapter_config(
    settings: TrainSettings, folder: Path, manifest: dict[str, str], keys: list[str], layers: int
) -> dict[str, Any]:
    """What mlx-lm reads of an adapter, and beside it everything that made it.

    Args:
        folder: the base's.  manifest: what the targets hang on (kept_targets.py).  keys, layers: what LoRA adapts.
    """
    import mlx.core as mx
    import mlx_lm

    files = [*settings.forget, *settings.retain, *settings.neighbours]
    return {
        "fine_tune_type": "lora",
        "model": str(folder),
        "num_layers": layers,
        "lora_parameters": {**settings.lora_parameters, "keys": keys},
        "settings": asdict(settings),
        "data_hashes": {file: file_hash(file) for file in files},
        "targets": manifest,
        "versions": {
            "duet_mlx": __version__,
            "mlx": mx.__version__,
            "mlx_lm": mlx_lm.__version__,
            "python": sys.version.split()[0],
        },
    }
