"""Training that keeps what is there: an adapter of the same settings and questions is kept, another is set aside."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .resume import load_state
from .train import TrainSettings, prepare, train

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
    """Rename an adapter folder, and leave the teacher's targets to the next run, which checks them itself."""
    stamp = f"{folder.name}-until-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (folder.with_name(stamp if n == 1 else f"{stamp}-{n}") for n in count(1))  # two may fall into one second
    aside = next(name for name in names if not name.exists())
    folder.rename(aside)
    folder.mkdir()
    for targets in aside.glob("*targets.safetensors"):
        targets.rename(folder / targets.name)
    return aside


def going_on(settings: TrainSettings, folder: Path) -> TrainSettings:
    """The settings that go on with the adapter of a folder; if it cannot be gone on with, it is set aside."""
    file = str(folder / "adapters.safetensors")
    try:
        load_state(file)
    except ConfigError as error:
        print(f"{error}: the earlier adapter is kept in {set_aside(folder)}")
        return settings
    return replace(settings, resume_adapter_file=file)


def train_once(settings: TrainSettings) -> None:
    """Keep, resume, or set aside and train."""
    folder = Path(settings.adapter_path)
    # `overwrite` here only lets prepare() into the folder; it writes the targets and nothing of an adapter.
    prepared = prepare(replace(settings, overwrite=True))
    saved = saved_config(folder)
    if saved is not None:
        # A setting that is newer than the adapter had its default's effect.
        same = essence({**asdict(TrainSettings()), **saved.get("settings", {})}) == essence(asdict(settings))
        if not same or saved.get("targets") != prepared.manifest:
            print(f"settings or questions have changed: the earlier adapter is kept in {set_aside(folder)}")
        elif saved["step"] >= settings.iters:
            print(f"adapter: {folder} is complete and of these settings and questions; nothing to train")
            return
        else:
            settings = going_on(settings, folder)
    train(settings, prepared)
