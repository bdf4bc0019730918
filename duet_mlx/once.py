"""Training that keeps what is there: an adapter of the same settings and questions is kept, another is set aside."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .files import as_json, json_of, new_name
from .methods import unread
from .resume import BOOKKEEPING, load_state
from .train import TrainSettings, prepare, train

if TYPE_CHECKING:
    from .lower import LowerStates


def saved_config(folder: Path) -> dict[str, Any] | None:
    """The adapter_config.json of a folder that holds an adapter, else None."""
    return json_of(folder / "adapter_config.json") if (folder / "adapters.safetensors").is_file() else None


def essence(settings: TrainSettings) -> dict[str, Any]:
    """The settings that decide the adapter, as JSON gives them back."""
    left_out = BOOKKEEPING | unread(settings)
    return as_json({k: v for k, v in asdict(settings).items() if k not in left_out})


def is_same(settings: TrainSettings, saved: Any) -> bool:
    """Whether a run of `saved` settings, as JSON gives them back, came to the adapter that `settings` come to.

    One that is newer than that run had its default's effect.
    """
    wanted = essence(settings)
    earlier = as_json({**asdict(TrainSettings()), **(saved if isinstance(saved, dict) else {})})
    return wanted == {name: earlier[name] for name in wanted}


def set_aside(folder: Path) -> Path:
    """Rename an adapter folder, and leave the teacher's targets to the next run, which checks them itself.

    Raises:
        ConfigError: it is where the program was started, and others may stand there too.
    """
    if not folder.name or folder.resolve() == Path.cwd():
        raise ConfigError(f"--adapter-path {folder}: another adapter is there; name a folder that can be renamed")
    aside = new_name(folder)
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


def train_once(settings: TrainSettings, earlier: LowerStates | None = None) -> int:
    """Keep, resume, or set aside and train; how many of its steps were there already.

    Args:
        earlier: as in `lower.run_lower`.

    Raises:
        DuetError: as `prepare` and `train`; a folder that holds other things than an adapter is refused as there.
    """
    if settings.dry_run:
        from .dry_run import dry_run

        dry_run(settings)
        return 0
    folder = Path(settings.adapter_path)
    saved = saved_config(folder)
    # `overwrite` here only lets prepare() into an adapter's folder; it writes the targets and nothing of an adapter.
    prepared = prepare(settings if saved is None else replace(settings, overwrite=True))
    step = 0
    if saved is not None:
        if not is_same(settings, saved.get("settings")) or saved.get("targets") != prepared.manifest:
            print(f"settings or questions have changed: the earlier adapter is kept in {set_aside(folder)}")
        elif (step := steps_done(folder)) >= settings.iters:
            print(f"adapter: {folder} is complete and of these settings and questions; nothing to train")
            return step
        elif step:
            settings = replace(settings, resume_adapter_file=str(folder / "adapters.safetensors"))
    train(settings, prepared, earlier)
    return step
