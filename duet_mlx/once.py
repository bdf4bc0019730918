"""Training that keeps what is there: an adapter of the same settings and questions is kept, another is set aside."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dry_run import dry_run
from .errors import ConfigError
from .resume import load_state
from .train import TrainSettings, prepare, train

if TYPE_CHECKING:
    from .lower import LowerStates

# Settings that say how a run is watched and kept, not what comes out of it.
BOOKKEEPING = {
    "adapter_path", "overwrite", "resume_adapter_file", "save_every", "steps_per_eval", "steps_per_report",
    "valid_forget", "valid_retain",
}  # fmt: skip


def saved_config(folder: Path) -> dict[str, Any] | None:
    """The adapter_config.json of a folder that holds an adapter, else None."""
    if not (folder / "adapters.safetensors").is_file():
        return None
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    except (OSError, ValueError):
        return {}


def essence(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the adapter, as JSON gives them back (tuples are lists there)."""
    return json.loads(json.dumps({k: v for k, v in settings.items() if k not in BOOKKEEPING}))


def set_aside(folder: Path) -> Path:
    """Rename an adapter folder, and leave the teacher's targets to the next run, which checks them itself.

    Raises:
        ConfigError: it is where the program was started, and others may stand there too.
    """
    if not folder.name or folder.resolve() == Path.cwd():
        raise ConfigError(f"--adapter-path {folder}: another adapter is there; name a folder that can be renamed")
    stamp = f"{folder.name}-until-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (folder.with_name(stamp if n == 1 else f"{stamp}-{n}") for n in count(1))  # two may fall into one second
    aside = next(name for name in names if not name.exists())
    folder.rename(aside)
    folder.mkdir()
    for targets in aside.glob("*targets.safetensors"):
        targets.rename(folder / targets.name)
    return aside


def steps_done(folder: Path) -> int:
    """Steps of the adapter in a folder, a save that was cut off completed; 0 if it is damaged, and set aside."""
    try:
        return load_state(str(folder / "adapters.safetensors"))[0].step
    except ConfigError as error:
        print(f"{error}: the earlier adapter is kept in {set_aside(folder)}")
        return 0


def train_once(settings: TrainSettings, earlier: LowerStates | None = None) -> None:
    """Keep, resume, or set aside and train.

    Args:
        earlier: as in `lower.run_lower`.

    Raises:
        DuetError: as `prepare` and `train`; a folder that holds other things than an adapter is refused as there.
    """
    if settings.dry_run:
        return dry_run(settings)
    folder = Path(settings.adapter_path)
    saved = saved_config(folder)
    # `overwrite` here only lets prepare() into an adapter's folder; it writes the targets and nothing of an adapter.
    prepared = prepare(settings if saved is None else replace(settings, overwrite=True))
    if saved is not None:
        before = saved.get("settings")
        # A setting that is newer than the adapter had its default's effect.
        before = {**asdict(TrainSettings()), **(before if isinstance(before, dict) else {})}
        if essence(before) != essence(asdict(settings)) or saved.get("targets") != prepared.manifest:
            print(f"settings or questions have changed: the earlier adapter is kept in {set_aside(folder)}")
        elif (step := steps_done(folder)) >= settings.iters:
            print(f"adapter: {folder} is complete and of these settings and questions; nothing to train")
            return
        elif step:
            settings = replace(settings, resume_adapter_file=str(folder / "adapters.safetensors"))
    train(settings, prepared, earlier)
