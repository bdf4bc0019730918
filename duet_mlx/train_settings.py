"""The settings of a training run, and what can be checked of them without a model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .errors import ConfigError, nearest
from .methods import METHODS, given_numbers, numbers_of, parameters, reads_retain
from .settings import number, parse, require, setting

LISTED = "; ".join(f"{name} {numbers_of(name)}" for name in METHODS if METHODS[name].defaults)
NUMBERS = {name for method in METHODS.values() for name in method.defaults}
LORA = {"rank": 8, "scale": 4.0, "dropout": 0.0, "keys": None}

# What the paper fixes; everything else of it is ours (reference/README.md): one position, the teacher's candidates,
# raw logits, the context before retain queries too.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "positions": 1,
        "candidates": "teacher",
        "retain_context": "teacher",
        "center": False,
        "first_share": 0.0,
    },
}


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run. Defaults are measured on the demo (examples/harry_potter); none is the paper's."""

    model: str = setting("", "hub id, MLX folder or .gguf file")
    forget: tuple[str, ...] = setting((), "JSONL files of questions to forget")
    retain: tuple[str, ...] = setting((), "JSONL files of questions whose answers must stay")
    neighbours: tuple[str, ...] = setting((), "JSONL files of retain questions close to the topic")
    forget_questions: int = setting(0, "train on only so many of these, evenly spread over the files (0: all)")
    retain_questions: int = setting(0, "the same for the questions of --retain")
    neighbour_questions: int = setting(0, "the same for the questions of --neighbours")
    valid_forget: tuple[str, ...] = setting((), "JSONL files of forget questions to watch, never trained on")
    valid_retain: tuple[str, ...] = setting((), "JSONL files of retain questions to watch, never trained on")
    context: str = setting("", "unlearning context: a YAML file, or specific, refuse-all, unrelated (with --topic)")
    topic: str | None = setting(None, "what {topic} stands for in the context")
    adapter_path: str = setting("adapters", "folder for adapters.safetensors and adapter_config.json")
    recipe: str = setting("default", "paper: what the paper fixes; default: what we measured", tuple(RECIPES))
    method: str = setting("duet", "training method", tuple(METHODS))
    method_parameters: dict = setting({}, f"a baseline's numbers, here with their defaults: {LISTED}", names=NUMBERS)
    retain_loss: str = setting("nll", "retain term of baselines: NLL of the answer, or KL to the base", ("nll", "kl"))
    answers: str = setting("base", "what baselines train on: the base's own answers, or the files'", ("base", "gold"))
    answer_tokens: int = setting(32, "longest answer of the base's own to train on: as long as is evaluated")
    refusals: str | None = setting(None, "text file, one refusal a line, for refusal, idkdpo, flat; else ready ones")
    top_k: int = setting(100, "K, candidate tokens of the teacher at each position")
    candidates: str = setting("union", "teacher: its top K; union: the base's own top K too", ("teacher", "union"))
    positions: int = setting(8, "n, supervised positions along the teacher's answer (to its end of turn)")
    delta: float = setting(1.0, "Huber's δ in logits")
    center: bool = setting(True, "compare logits less their mean at each position: softmax ignores the level")
    first_share: float = setting(0.5, "what the first position counts in its question's loss (0: as each other)")
    retain_context: str = setting("none", "what the teacher of retain queries reads", ("teacher", "none"))
    num_layers: int = setting(-1, "last layers to adapt (-1: all)")
    lora_parameters: dict = setting(LORA, "LoRA, as in mlx-lm", names=LORA)
    iters: int = setting(600, "training steps")
    batch_size: int = setting(8, "queries a step")
    forget_per_batch: int = setting(2, "of these, forget queries; the rest retain")
    learning_rate: float = setting(3e-4, "peak of Adam's step size")
    lr_schedule: dict = setting(
        {}, "schedule as in mlx-lm's YAML; by default warm-up over a tenth of the steps, 10 at most, then cosine to 0"
    )
    grad_accumulation_steps: int = setting(1, "steps whose gradients are averaged into one update")
    max_grad_norm: float = setting(0.0, "clip the gradient's norm to this (0: off; Huber already bounds it)")
    grad_checkpoint: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    max_seq_length: int = setting(2048, "longest question in tokens; a longer one is an error, never cut")
    seed: int = setting(0, "seed of LoRA's start and of the order of batches")
    steps_per_report: int = setting(10, "steps between log lines")
    steps_per_eval: int = setting(200, "steps between validation losses and sample answers (0: never)")
    save_every: int = setting(200, "steps between saved checkpoints (0: at the end alone)")
    resume_adapter_file: str | None = setting(None, "adapters.safetensors to go on from, step and optimizer included")
    dry_run: bool = setting(False, "print parameters, tokens, steps and memory that the run will take, and stop")
    overwrite: bool = setting(False, "write into an adapter folder that already holds an adapter")
    trust_remote_code: bool = setting(False, "run Python code that the model's repository brings")


def parse_settings(
    prog: str, description: str, argv: list[str] | None = None, over: dict[str, Any] | None = None, named: str = ""
) -> TrainSettings:
    """Settings from flags and YAML, checked as far as that goes without a model.

    Args:
        over, named: as in `settings.parse`.

    Raises:
        ConfigError: something missing, out of range or contradictory, named by its flag.
    """
    settings = parse(TrainSettings, prog, description, argv, RECIPES, over, named)
    settings = replace(settings, method_parameters=given_numbers(settings))
    parameters(settings)
    require(settings, "model", "forget", *(["context"] if METHODS[settings.method].labels == "teacher" else []))
    for name, least in (("positions", 1), ("top_k", 1), ("iters", 1), ("batch_size", 1), ("max_seq_length", 1),
                        ("grad_accumulation_steps", 1), ("steps_per_report", 1), ("steps_per_eval", 0),
                        ("save_every", 0), ("max_grad_norm", 0), ("seed", 0), ("answer_tokens", 1),
                        ("forget_questions", 0), ("retain_questions", 0), ("neighbour_questions", 0)):  # fmt: skip
        if getattr(settings, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected {least} or more")
        bits = 64 if name == "seed" else 31
        if getattr(settings, name) >= 2**bits:  # not shown: it may have thousands of digits
            raise ConfigError(f"--{name.replace('_', '-')}: expected a number below 2^{bits}")
    for name in ("delta", "learning_rate"):
        if not getattr(settings, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected more than 0")
    if not 0 <= settings.first_share < 1:
        raise ConfigError(f"--first-share {settings.first_share}: expected 0 or more and less than 1")
    for name in ("learning_rate", "max_grad_norm"):  # an infinite delta has a meaning: half the squared error
        if not math.isfinite(getattr(settings, name)):
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected a finite number")
    settings = replace(
        settings, lora_parameters=_lora(settings.lora_parameters), lr_schedule=_schedule(settings.lr_schedule)
    )
    if not (settings.retain or settings.neighbours):
        # Allowed (reference/README.md has such a row), but then every query of a batch is a forget query.
        return replace(settings, forget_per_batch=settings.batch_size)
    most = settings.batch_size - reads_retain(settings)
    if not 1 <= settings.forget_per_batch <= most:
        why = ", or no retain question would ever be trained on" if reads_retain(settings) else ""
        raise ConfigError(
            f"--forget-per-batch {settings.forget_per_batch} of --batch-size {settings.batch_size}: expected 1 or "
            f"more, and at most {most}{why}"
        )
    return settings


def _lora(given: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm's lora_parameters, whole and checked."""
    _known_keys("lora_parameters", given, LORA)
    lora = {**LORA, **given}
    if not isinstance(lora["rank"], int) or isinstance(lora["rank"], bool) or not 1 <= lora["rank"] < 2**31:
        raise ConfigError(f"lora_parameters rank: expected a whole number of 1 or more, found {lora['rank']!r}")
    for key in ("scale", "dropout"):
        value = number(lora[key])
        if value is None or not math.isfinite(value):
            raise ConfigError(f"lora_parameters {key}: expected a number, found {lora[key]!r}")
        lora[key] = value
    if not 0 <= lora["dropout"] < 1:
        raise ConfigError(f"lora_parameters dropout: expected 0 or more and less than 1, found {lora['dropout']}")
    keys = lora["keys"]
    if keys is not None and not (keys and isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise ConfigError(f"lora_parameters keys: expected a list of names of modules, found {keys!r}")
    return lora


def _schedule(given: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm's lr_schedule with its numbers as numbers: YAML reads 1e-5 as text."""
    _known_keys("lr_schedule", given, ("name", "arguments", "warmup", "warmup_init"))
    schedule = dict(given)
    if not isinstance(schedule.get("name", ""), str):
        raise ConfigError(f"lr_schedule name: expected text, found {schedule['name']!r}")
    for key in ("warmup", "warmup_init"):
        if key in schedule:
            schedule[key] = _finite(f"lr_schedule {key}", schedule[key])
    if "arguments" in schedule:
        if not isinstance(schedule["arguments"], list):
            raise ConfigError(f"lr_schedule arguments: expected a list of numbers, found {schedule['arguments']!r}")
        schedule["arguments"] = [_finite("lr_schedule arguments", value) for value in schedule["arguments"]]
    return schedule


def _finite(name: str, value: Any) -> float:
    """A whole number stays one: mlx-lm counts the steps of a schedule with it."""
    found = number(value)
    if found is None or not math.isfinite(found):
        raise ConfigError(f"{name}: expected a number, found {value!r}")
    return value if isinstance(value, int) else found


def _known_keys(name: str, given: dict[Any, Any], known: Iterable[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{name}: unknown key {key!r}{nearest(str(key), known)}")
