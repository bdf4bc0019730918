"""Going on with a run: what it takes from the adapter folder, and what must be as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .checkpoint import State
from .errors import ConfigError
from .files import as_json, partial_of
from .methods import unread
from .train_settings import TrainSettings

# Settings that say how a run is watched and kept, not what comes out of it; a recipe is in what it sets.
BOOKKEEPING = {
    "adapter_path", "max_seq_length", "overwrite", "recipe", "resume_adapter_file", "save_every", "steps_per_eval",
    "steps_per_report", "valid_forget", "valid_retain",
}  # fmt: skip
# These may be others as well when a run is gone on with. (What the files and --model hold is compared by hash, LoRA and
# layers as they were resolved.)
FREE = BOOKKEEPING | {
    "model", "forget", "retain", "neighbours", "context", "topic", "refusals", "num_layers", "lora_parameters",
    "grad_checkpoint", "trust_remote_code",
}  # fmt: skip
# These shape the steps still to come, and changing them is what one resumes for; it is said. All else must be the same.
FROM_HERE_ON = ("iters", "learning_rate", "lr_schedule", "max_grad_norm")


def going_on(file: str, config: dict[str, Any]) -> tuple[State, list[str]]:
    """The state that `file` and what lies beside it hold, and which settings change from there on.

    Args:
        file: adapters.safetensors, as it was saved.  config: adapter_config.json of the run that goes on.

    Raises:
        ConfigError: the files are damaged or do not belong together, the run is another one, or no step is left.
    """
    state, saved = load_state(file)
    return state, check_same_run(file, state, saved, config)


def load_state(file: str) -> tuple[State, dict[str, Any]]:
    """The state saved with an adapter, and its adapter_config.json; a save that was killed midway is completed.

    Raises:
        ConfigError: a file beside it is missing, damaged, or does not belong to this adapter.
    """
    import mlx.core as mx

    from .model import arrays_hash

    path, flag = Path(file), f"--resume-adapter-file {file}"
    beside, described = path.with_name("optimizer.safetensors"), path.with_name("adapter_config.json")
    try:
        weights = mx.load(file)
        mx.eval(weights)
        optimizer, meta = mx.load(str(beside), return_metadata=True)
        mx.eval(optimizer)
    except (RuntimeError, ValueError) as error:
        why = f"; only with the {beside.name} that duet_mlx.train saves beside it can one go on"
        raise ConfigError(f"{flag}: cannot be read ({error}){'' if beside.is_file() else why}") from error
    try:
        step, random, adapter = int(meta["step"]), optimizer.pop("random_state"), meta["adapter"]
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{flag}: the optimizer.safetensors beside it holds no {error}") from error
    if arrays_hash(weights) != adapter:
        saved = path.with_name("adapters.safetensors")
        completed = _completed(saved, adapter) if path.name == saved.name else None
        if completed is None:
            raise ConfigError(
                f"{flag}: optimizer.safetensors beside it belongs to another adapter, that of step {step}; only the "
                f"last one saved can be gone on from, and that is {saved} as it was written"
            )
        weights = completed
    shapes = {f"{name}.{mean}": array.shape for name, array in weights.items() for mean in ("m", "v")}
    shapes |= {"step": (), "learning_rate": ()}
    odd = sorted(
        name for name in shapes.keys() | optimizer.keys()
        if name not in shapes or name not in optimizer or shapes[name] != optimizer[name].shape
    )  # fmt: skip
    if odd or random.shape != (2,):
        raise ConfigError(f"{flag}: the optimizer.safetensors beside it does not fit it ({[*odd, 'random_state'][0]})")
    try:
        config = json.loads(described.read_text(encoding="utf-8"), parse_constant=str)
        parts = [config.get(key, {}) for key in ("settings", "lora_parameters", "targets")]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("its entries are not those of a run")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{flag}: {described.name} beside it cannot be read ({error})") from error
    return State(step, weights, optimizer, random), config


def _completed(adapter: Path, wanted: str) -> dict[str, Any] | None:
    """The adapter of this hash from a save that was killed before its last renamings, which are done now."""
    import mlx.core as mx

    from .model import arrays_hash

    try:
        weights = mx.load(str(partial_of(adapter)))
        if arrays_hash(weights) != wanted:
            return None
    except (RuntimeError, ValueError):
        return None
    for path in (adapter.with_name("adapter_config.json"), adapter):
        if partial_of(path).exists():
            partial_of(path).replace(path)
    print(f"{adapter}: its last save had been cut off, and was completed")
    return weights


def check_same_run(file: str, state: State, saved: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Raise ConfigError if this run (`config`) is not the one that was `saved`; what may change and does."""
    flag = f"--resume-adapter-file {file}"
    config = as_json(config)  # as it comes back from a file
    before, here = saved.get("settings", {}), config["settings"]
    lora_before, lora = saved.get("lora_parameters", {}), config["lora_parameters"]
    ignored = unread(TrainSettings(**here))
    compared = before.keys() & here.keys() - FREE - ignored - set(FROM_HERE_ON)
    same = {name: (before[name], here[name]) for name in compared}
    same |= {f"lora_parameters {name}": (lora_before.get(name), lora[name]) for name in lora}
    same["num_layers"] = (saved.get("num_layers"), config["num_layers"])
    for name, (old, new) in sorted(same.items()):
        if old != new:
            raise ConfigError(
                f"{flag}: trained with {name} {old}, here it is {new}; go on with the same, or train anew into "
                "another folder"
            )
    targets_before, targets = saved.get("targets", {}), config["targets"]
    # Hashes alone differ between a GPU and a CPU too (evaluate.py): other weights under another name are refused.
    other, name = (Path(str(c.get("model"))).name.removesuffix("-fp32") for c in (saved, config))
    if targets_before.get("model") != targets["model"] and other != name:
        raise ConfigError(f"{flag}: made for another model ({saved.get('model')}), not {config['model']}")
    parts = {
        "data": "the questions are", "context": "the context is", "tokenizer": "the tokenizer is",
        "settings": "the answers or refusals are",
    }  # fmt: skip
    for part, what in parts.items():
        if targets_before.get(part) != targets[part]:
            raise ConfigError(f"{flag}: {what} not what it was trained with; train anew into another folder")
    if state.step >= here["iters"]:
        raise ConfigError(f"{flag}: is at step {state.step}, and --iters is {here['iters']}: nothing is left to train")
    changed = [name for name in FROM_HERE_ON if name in before.keys() - ignored and before[name] != here[name]]
    return [f"{name} {here[name]} (was {before[name]})" for name in changed]


def check_fits(file: str, state: State, model) -> None:
    """Raise ConfigError if the adapter has other parameters than the model's LoRA."""
    from .model import adapter_parameters

    mine = {name: array.shape for name, array in adapter_parameters(model).items()}
    for name in sorted(mine.keys() | state.adapter.keys()):
        if name not in mine or name not in state.adapter or mine[name] != state.adapter[name].shape:
            raise ConfigError(f"--resume-adapter-file {file}: {name} does not fit this model and LoRA")


def cut_log(log: Path, step: int) -> str:
    """The rows of a log up to a step; those after it were of steps that a kill has lost, and come again."""
    kept = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # a line cut off by the kill
            continue
    return "".join(kept)
