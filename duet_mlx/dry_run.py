"""What a run will take, before it is begun: parameters, tokens, steps, and memory against what this machine has.

    python -m duet_mlx.train -c config.yaml --dry-run

The model is built from its config.json alone: nothing is loaded, computed or written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.utils import dequantize_model, load_tokenizer
from mlx_lm.utils import load_model as load_weights

from .errors import ConfigError, ModelError
from .estimate import Estimate, estimate
from .head import NO_HEAD, find_head
from .labels import check_model, given_labels
from .methods import METHODS, reads_retain
from .model import HUB_FILES, on_gpu, resolve_model, window
from .teacher import check_lengths
from .train import read_questions
from .train_settings import TrainSettings


def dry_run(settings: TrainSettings) -> None:
    """Print what the run will take.

    Raises:
        ConfigError: it does not fit this machine; with what to lower.  DuetError: as the run itself would.
    """
    queries, valid, contexts = read_questions(settings)
    folder = folder_without_weights(settings.model)
    tokenizer = load_tokenizer(folder, {"trust_remote_code": settings.trust_remote_code})
    check_lengths(tokenizer, queries + valid, contexts, settings, window(folder))
    model = skeleton(folder, settings.trust_remote_code)
    # Whether the head can be called apart is only seen on real numbers: here it is taken for granted.
    check_model(settings, model, (find_head(model), NO_HEAD))
    if METHODS[settings.method].labels != "teacher":
        given_labels(tokenizer, queries + (valid if settings.steps_per_eval else []), settings)
    stored = stored_bytes(folder)

    def wanted(settings: TrainSettings) -> Estimate:
        model = skeleton(folder, settings.trust_remote_code)  # another one each time: it gets LoRA
        return estimate(settings, model, tokenizer, queries, valid, contexts, stored)

    found = wanted(settings)
    forget = sum(query.role == "forget" for query in queries)
    weights = found.phases[0].held["weights"]
    print(f"model      {found.parameters / 1e6:.1f} M numbers, {size(weights)} here")
    print(f"trained    {found.trained / 1e6:.2f} M, LoRA on {', '.join(found.keys)} of the last {found.layers} layers")
    print(f"questions  {len(queries)}, {forget} of them to forget; {found.read_once} tokens with contexts, read once")
    each = settings.batch_size if reads_retain(settings) else settings.forget_per_batch
    print(f"steps      {settings.iters} of {each} questions: at most {found.tokens} tokens")
    for phase in found.phases:
        parts = ", ".join(f"{name} {size(held)}" for name, held in phase.held.items() if held)
        print(f"memory     {size(phase.total)} in {phase.name}: {parts}")
    if found.on_disk:
        print(f"disk       {size(found.on_disk)} while it trains, of what comes out of the layers that are not trained")
    has, what = machine_memory()
    needs = found.peak + found.numpy
    print(f"peak       {size(needs)}, {size(found.numpy)} of it NumPy's; {what} is {size(has)}")
    if needs > has:
        raise ConfigError(
            f"--dry-run: {size(needs)} do not fit into {size(has)} ({what}); {advice(settings, found, has, wanted)}"
        )
    print("this fits")


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def machine_memory() -> tuple[int, str]:
    """Bytes that a run may take here, and which limit that is."""
    info = mx.device_info()
    for key, what in (
        ("max_recommended_working_set_size", "Metal's recommended working set"),
        ("total_memory", "the GPU's memory"),
        ("memory_size", "this machine's memory"),
    ):
        if on_gpu() and key in info:
            return int(info[key]), what
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container may be given less
        has = min(has, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return has, "this machine's memory"


def advice(settings: TrainSettings, found: Estimate, has: int, wanted: Callable[[TrainSettings], Estimate]) -> str:
    """What to lower, with what it would bring, each setting tried by itself."""
    lower = {
        "--grad-checkpoint": replace(settings, grad_checkpoint=True),
        f"--num-layers {max(1, found.layers // 2)}": replace(settings, num_layers=max(1, found.layers // 2)),
        f"--positions {max(1, settings.positions // 2)}": replace(settings, positions=max(1, settings.positions // 2)),
    }
    half = settings.batch_size // 2
    if half:  # accumulated, the update is that of the whole batch
        every = 2 * settings.grad_accumulation_steps
        forget = max(1, settings.forget_per_batch // 2)
        lower[f"--batch-size {half} --forget-per-batch {forget} --grad-accumulation-steps {every}"] = replace(
            settings, batch_size=half, forget_per_batch=forget, grad_accumulation_steps=every
        )
    tried = {flags: wanted(changed) for flags, changed in lower.items() if changed != settings}
    needs = {flags: one.peak + one.numpy for flags, one in tried.items()}
    less = [f"{flags} ({size(needs[flags])})" for flags in sorted(needs, key=lambda flags: needs[flags])
            if needs[flags] < 0.99 * (found.peak + found.numpy)]  # fmt: skip
    ways = f"with less: {', '.join(less)}" if less else "no setting brings it down"
    smaller = "" if any(one <= has for one in needs.values()) else "; or take a smaller or more tightly quantized model"
    return f"{ways}{smaller}"


def folder_without_weights(name: str) -> Path:
    """As `resolve_model`, but of a hub repository or a local folder it wants no weights."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or (not path.is_dir() and (path.exists() or name.count("/") != 1)):
        return resolve_model(name)  # a .gguf file is converted once, and every error is worded there
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        wanted = [pattern for pattern in HUB_FILES if not pattern.endswith(".safetensors")]
        try:
            path = Path(snapshot_download(name, allow_patterns=wanted))
        except Exception as error:  # as in resolve_model
            raise ModelError(f"--model {name}: the hub did not give its config ({type(error).__name__})") from error
    if not (path / "config.json").is_file():
        raise ModelError(f"--model {name}: no config.json in it, so not an MLX model folder")
    return path


def stored_bytes(folder: Path) -> int:
    """Bytes of a model's files of weights; 0 where they are not there."""
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


def skeleton(folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """The model of a folder with parameters that nobody has computed, of the types they will have on this backend."""
    there = bool(list(folder.glob("model*.safetensors")))
    # Where the weights are there, their headers say which type each has; their numbers are not read.
    try:
        model, config = load_weights(folder, lazy=True, strict=there, trust_remote_code=trust_remote_code)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"--model {folder}: config.json cannot be used: {' '.join(str(error).split())}") from error
    if not there:
        kind = str(config.get("torch_dtype") or config.get("dtype") or "float32").removeprefix("torch.")
        model.set_dtype(getattr(mx, kind, mx.float32))
        if packed := config.get("quantization"):
            nn.quantize(
                model, packed["group_size"], packed["bits"], mode=packed.get("mode", "affine"),
                class_predicate=lambda path, module: packed.get(path, hasattr(module, "to_quantized")),
            )  # fmt: skip
    if not on_gpu():  # as load_model does
        model = dequantize_model(model)
    halves = () if on_gpu() else (mx.float16, mx.bfloat16)
    model.update(
        tree_map(lambda a: mx.zeros(a.shape, mx.float32 if a.dtype in halves else a.dtype), model.parameters())
    )
    model.freeze()
    model.eval()
    return model
