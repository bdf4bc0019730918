"""Unlearn: a LoRA student that never sees the context learns the teacher's top-K logits, from questions alone.

    python -m duet_mlx.train --model M --forget F.jsonl --retain R.jsonl --context C.yaml --adapter-path A

DUET: Zhong, Yang and Zhu, "Distilled LLM Unlearning from an Efficiently Contextualized Teacher", ICLR 2026.
The teacher (teacher.py) was read before this starts; a step is a LoRA fine-tune with C numbers for labels.
--method takes a baseline instead (methods.py), in the same loop with the same questions, batches and LoRA.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import BLAS
from .checkpoint import Checkpoint, adapter_config, append_text, folder_for_adapter, write_text
from .context import Context, load_contexts, render
from .data import Query, check_disjoint, load_queries
from .errors import ConfigError, DivergedError, TrainingError, nearest, run_cli
from .labels import asked_of, check_answers, check_method, targets_of
from .methods import METHODS, method_loss, parameters, reads_retain
from .settings import parse, require, setting
from .stream import Stream
from .teacher import Targets, check_lengths, saved_or_built

if TYPE_CHECKING:
    import mlx.nn as nn

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
    valid_forget: tuple[str, ...] = setting((), "JSONL files of forget questions to watch, never trained on")
    valid_retain: tuple[str, ...] = setting((), "JSONL files of retain questions to watch, never trained on")
    context: str = setting("", "unlearning context: a YAML file, or specific, refuse-all, unrelated (with --topic)")
    topic: str | None = setting(None, "what {topic} stands for in the context")
    adapter_path: str = setting("adapters", "folder for adapters.safetensors and adapter_config.json")
    recipe: str = setting("default", "paper: what the paper fixes; default: what we measured", tuple(RECIPES))
    method: str = setting("duet", "training method", tuple(METHODS))
    method_parameters: dict = setting({}, "numbers of a baseline, as NAME=NUMBER: methods.py has names and defaults")
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
    lora_parameters: dict = setting({"rank": 8, "scale": 4.0, "dropout": 0.0, "keys": None}, "LoRA, as in mlx-lm")
    iters: int = setting(600, "training steps")
    batch_size: int = setting(8, "queries a step")
    forget_per_batch: int = setting(2, "of these, forget queries; the rest retain")
    learning_rate: float = setting(3e-4, "peak of Adam's step size")
    lr_schedule: dict = setting({}, "schedule as in mlx-lm's YAML; by default warm-up over 10 steps, then cosine to 0")
    grad_accumulation_steps: int = setting(1, "steps whose gradients are averaged into one update")
    max_grad_norm: float = setting(0.0, "clip the gradient's norm to this (0: off; Huber already bounds it)")
    grad_checkpoint: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    max_seq_length: int = setting(2048, "longest question in tokens; a longer one is an error, never cut")
    seed: int = setting(0, "seed of LoRA's start and of the order of batches")
    steps_per_report: int = setting(10, "steps between log lines")
    steps_per_eval: int = setting(200, "steps between validation losses and sample answers (0: never)")
    save_every: int = setting(200, "steps between saved checkpoints (0: at the end alone)")
    resume_adapter_file: str | None = setting(None, "adapters.safetensors to go on from, step and optimizer included")
    overwrite: bool = setting(False, "write into an adapter folder that already holds an adapter")
    trust_remote_code: bool = setting(False, "run Python code that the model's repository brings")


def parse_settings(prog: str, description: str, argv: list[str] | None = None) -> TrainSettings:
    """Settings from flags and YAML, checked as far as that goes without a model.

    Raises:
        ConfigError: something missing, out of range or contradictory, named by its flag.
    """
    settings = parse(TrainSettings, prog, description, argv, RECIPES)
    parameters(settings)
    require(settings, "model", "forget", *(["context"] if METHODS[settings.method].labels == "teacher" else []))
    for name, least in (("positions", 1), ("top_k", 1), ("iters", 1), ("batch_size", 1), ("max_seq_length", 1),
                        ("grad_accumulation_steps", 1), ("steps_per_report", 1), ("steps_per_eval", 0),
                        ("save_every", 0), ("max_grad_norm", 0), ("seed", 0), ("answer_tokens", 1)):  # fmt: skip
        if getattr(settings, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected {least} or more")
    for name in ("delta", "learning_rate"):
        if not getattr(settings, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected more than 0")
    if not 0 <= settings.first_share < 1:
        raise ConfigError(f"--first-share {settings.first_share}: expected 0 or more and less than 1")
    for name in ("learning_rate", "max_grad_norm"):  # an infinite delta has a meaning: half the squared error
        if not math.isfinite(getattr(settings, name)):
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected a finite number")
    lora = {**TrainSettings().lora_parameters, **settings.lora_parameters}
    for key in settings.lora_parameters:
        if key not in TrainSettings().lora_parameters:
            raise ConfigError(
                f"lora_parameters: unknown key {key!r}{nearest(key, list(TrainSettings().lora_parameters))}"
            )
    if not isinstance(lora["rank"], int) or lora["rank"] < 1:
        raise ConfigError(f"lora_parameters rank: expected a whole number of 1 or more, found {lora['rank']!r}")
    for key in ("scale", "dropout"):
        if isinstance(lora[key], bool) or not isinstance(lora[key], (int, float)) or not math.isfinite(lora[key]):
            raise ConfigError(f"lora_parameters {key}: expected a number, found {lora[key]!r}")
    if not 0 <= lora["dropout"] < 1:
        raise ConfigError(f"lora_parameters dropout: expected 0 or more and less than 1, found {lora['dropout']}")
    if lora["keys"] is not None and not (lora["keys"] and isinstance(lora["keys"], list)):
        raise ConfigError(f"lora_parameters keys: expected a list of names of modules, found {lora['keys']!r}")
    settings = replace(settings, lora_parameters=lora)
    has_retain = bool(settings.retain or settings.neighbours)
    if (
        not has_retain
    ):  # allowed (reference/README.md has such a row), but then every query of a batch is a forget query
        settings = replace(settings, forget_per_batch=settings.batch_size)
    if not 1 <= settings.forget_per_batch <= settings.batch_size:
        raise ConfigError(
            f"--forget-per-batch {settings.forget_per_batch}: expected 1 to --batch-size {settings.batch_size}"
        )
    return settings


class Prepared(NamedTuple):
    """All that training reads: the base, the questions, the contexts, and what the teacher said."""

    model: nn.Module
    tokenizer: Any
    folder: Path
    head: nn.Module | None
    contexts: list[Context]
    queries: list[Query]
    targets: Targets
    manifest: dict[str, str]
    valid_queries: list[Query]
    valid_targets: Targets | None


def prepare(settings: TrainSettings) -> Prepared:
    """Read questions, context and model, and get the targets: saved ones if nothing changed, else built now."""
    forget = load_queries(settings.forget, "forget")
    kept = load_queries(settings.retain, "retain") if settings.retain else []
    kept += load_queries(settings.neighbours, "neighbour") if settings.neighbours else []
    valid = load_queries(settings.valid_forget, "forget") if settings.valid_forget else []
    valid += load_queries(settings.valid_retain, "retain") if settings.valid_retain else []
    check_disjoint(forget, kept)
    check_disjoint(forget + kept, valid)
    check_answers(forget + kept + valid, settings)
    # Trained on answers, a method reads no context.
    taught = METHODS[settings.method].labels == "teacher"
    contexts = load_contexts(settings.context, settings.topic) if taught else []
    folder_for_adapter(settings)

    import mlx.core as mx

    from .generate import can_branch, takes_row_masks
    from .head import check_head
    from .model import load_model, lora_keys, on_gpu

    mx.random.seed(settings.seed)
    if not on_gpu() and BLAS is None and sys.platform == "linux":
        print("note: no OpenBLAS found (Debian: libopenblas0-pthread); matrix products will be about 40 times slower")
    model, tokenizer, folder = load_model(settings.model, trust_remote_code=settings.trust_remote_code)
    queries = forget + kept
    window = json.loads((folder / "config.json").read_text()).get("max_position_embeddings") or sys.maxsize
    check_lengths(tokenizer, queries + valid, contexts, settings, window)
    head, reason = check_head(model, mx.array([render(tokenizer, queries[0].question)]))
    keys = lora_keys(model, settings.lora_parameters["keys"])
    adapted_head = [key for key in keys if not any(key in dict(layer.named_modules()) for layer in model.layers)]
    if adapted_head:
        head, reason = None, f"LoRA is asked for on {', '.join(adapted_head)}"
    if head is None:
        print(f"note: full head instead of K rows ({reason})")
    check_method(settings, model, head)
    if not can_branch(model):
        print("note: each prompt is read whole (a cache that rotates or holds a state cannot be shared)")
    elif not takes_row_masks(model):
        print("note: only prompts of one length are decoded together (the attention takes one mask for all rows)")
    path = Path(settings.adapter_path)

    def read(name: str, queries: list[Query]) -> tuple[Targets, dict[str, str]]:
        asked = asked_of(queries, settings)
        return saved_or_built(
            path / name, model, tokenizer, queries, contexts, settings, head, asked=asked, build=targets_of
        )

    targets, described = read("targets.safetensors", queries)
    valid_targets = read("valid_targets.safetensors", valid)[0] if valid else None
    return Prepared(model, tokenizer, folder, head, contexts, queries, targets, described, valid, valid_targets)


def run_lower(model: nn.Module, layer: int, prefix: list[int], streams: list[Stream]):
    """Run what lies below the first adapted layer once for all batches of these streams; None: it is run in each."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from tqdm import tqdm

    from .lower import check_lower, hidden_states

    trained = len(tree_flatten(model.trainable_parameters()))
    inside = sum(len(tree_flatten(block.trainable_parameters())) for block in model.layers[layer:])
    if layer == 0 or trained > inside:  # LoRA on head or embedding is not inside
        return None
    reason = check_lower(model, layer, mx.array([[*prefix, *streams[0].sequences[0]]]))
    if reason:
        print(f"note: layers 0 to {layer - 1} are run in every step ({reason})")
        return None
    print(f"layers 0 to {layer - 1} are not trained: they are run once, now")
    count = sum(len(stream.sequences) for stream in streams)
    with tqdm(total=count, desc="lower layers", unit="q", file=sys.stdout, leave=False) as bar:
        for stream in streams:
            lower, stream.hidden = hidden_states(model, layer, prefix, stream.sequences, bar.update)
    return lower


def make_optimizer(settings: TrainSettings):
    """Adam as reference/README.md has it (bias correction on, ε outside the root, no decay), with its schedule."""
    import mlx.optimizers as optim
    from mlx_lm.tuner.utils import build_schedule

    updates = max(1, settings.iters // settings.grad_accumulation_steps)
    warmup = min(10, updates // 10)
    schedule = settings.lr_schedule or {
        "name": "cosine_decay",
        "warmup": warmup,
        "arguments": [settings.learning_rate, max(1, updates - warmup)],
    }
    try:
        rate = build_schedule(schedule)
    except (KeyError, AttributeError, TypeError, IndexError, ValueError) as error:
        raise ConfigError(f"lr_schedule {schedule}: mlx-lm cannot build it ({error!r})") from error
    return optim.Adam(learning_rate=rate, betas=[0.9, 0.999], eps=1e-8, bias_correction=True)


def make_step(model: nn.Module, optimizer, loss, settings: TrainSettings, compiled: bool = True):
    """step(batch, gradient so far, whether to update) -> (mean loss, squared gradient norm, gradient carried on)."""
    from functools import partial

    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_map, tree_reduce

    every = settings.grad_accumulation_steps

    def mean_loss(model, batch):
        total, count = loss(model, batch)
        return total / count

    def step(batch, carried, update: bool):
        value, gradient = nn.value_and_grad(model, mean_loss)(model, batch)
        if carried is not None:
            gradient = tree_map(mx.add, gradient, carried)
        if update:
            if every > 1:
                gradient = tree_map(lambda g: g / every, gradient)
            if settings.max_grad_norm:
                gradient, _ = optim.clip_grad_norm(gradient, settings.max_grad_norm)
            optimizer.update(model, gradient)
        norm = tree_reduce(lambda total, g: total + (g * g).sum(), gradient, mx.array(0.0))
        return value, norm, None if update else gradient

    if not compiled:
        return step
    state = [model.state, optimizer.state, mx.random.state]
    return partial(mx.compile, inputs=state, outputs=state)(step)


def train(settings: TrainSettings, prepared: Prepared) -> Path:
    """Run all steps and leave the adapter folder; returns it.

    Raises:
        DivergedError: loss or gradient not finite (the last good adapter is kept).  TrainingError: no room to write.
        KeyboardInterrupt: after saving, with a line that says how to go on.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from tqdm import tqdm

    from .generate import can_branch, common_prefix
    from .model import adapter_parameters, add_lora, lora_keys, on_gpu, weights_hash

    model, tokenizer, _, head, _, queries, targets, described, valid, valid_targets = prepared
    mx.random.seed(settings.seed)
    keys = lora_keys(model, settings.lora_parameters["keys"])
    add_lora(model, settings.num_layers, **{**settings.lora_parameters, "keys": keys})
    trained = sum(a.size for _, a in tree_flatten(model.trainable_parameters()))
    layers = len(model.layers) if settings.num_layers == -1 else settings.num_layers
    print(f"training {trained / 1e6:.2f} M parameters: LoRA on {', '.join(keys)} of the last {layers} layers")

    prompts = [render(tokenizer, query.question) for query in queries]
    watched = [render(tokenizer, query.question) for query in valid]
    # A checkpointed layer runs again in the backward pass and would add to the prefix's cache a second time.
    share = can_branch(model) and not settings.grad_checkpoint
    prefix = common_prefix(prompts + watched) if share else 0
    forget = np.array([i for i, q in enumerate(queries) if q.role == "forget"])
    kept = np.array([i for i, q in enumerate(queries) if q.role != "forget" and reads_retain(settings)], dtype=int)
    stream = Stream(prompts, targets, prefix, forget)
    valid_forget = [i for i, q in enumerate(valid) if q.role == "forget"]
    valid_stream = Stream(watched, valid_targets, prefix, valid_forget) if valid_targets else None
    steps = stream.schedule(forget, kept, settings)
    shared = list(prompts[0][:prefix])
    lower = run_lower(model, len(model.layers) - layers, shared, [s for s in (stream, valid_stream) if s])

    optimizer = make_optimizer(settings)
    optimizer.init(model.trainable_parameters())
    model.train()
    loss = method_loss(settings, shared, head, lower)
    config = adapter_config(settings, prepared, keys, layers)
    checkpoint = Checkpoint(Path(settings.adapter_path), config)
    done = 0
    if settings.resume_adapter_file:
        done = checkpoint.resume(model, optimizer, settings.resume_adapter_file)
        print(f"going on from step {done} of {settings.iters}")
    # After resuming, which replaces the state that a compiled step holds on to. On CPU mx.compile would call a C++
    # compiler for seconds and gain nothing on matrix products.
    step = make_step(model, optimizer, loss, settings, compiled=on_gpu())
    log = Path(settings.adapter_path) / "train_log.jsonl"
    if not done:
        write_text(log, "")
    carried, losses, tokens = None, [], 0

    def here(step: int) -> Kept:
        return Kept(step, adapter_parameters(model), dict(tree_flatten(optimizer.state)))

    good = here(done)
    bar = tqdm(total=settings.iters, initial=done, desc="train", unit="step", file=sys.stdout)
    with _interrupts_noted() as interrupted, bar, _checkpointed(model, settings.grad_checkpoint):
        for it in range(done + 1, settings.iters + 1):
            before, batch = here(it - 1), stream.batch(steps[it - 1])
            value, norm, carried = step(batch, carried, it % settings.grad_accumulation_steps == 0)
            mx.eval(model.trainable_parameters(), optimizer.state, value, norm, carried)
            if not math.isfinite(value.item()) or not math.isfinite(norm.item()):
                # A loss is that of the weights before the step: if it is not finite, the update before spoilt them.
                kept_at = before if math.isfinite(value.item()) else good
                model.load_weights(list(kept_at.adapter.items()), strict=False)
                optimizer.state = tree_unflatten(list(kept_at.optimizer.items()))
                checkpoint.save(model, optimizer, kept_at.step)
                raise DivergedError(
                    f"step {it}: loss {value.item()}, squared gradient norm {norm.item()}: not finite. The adapter of "
                    f"step {kept_at.step} is kept in {settings.adapter_path}; lower --learning-rate or set "
                    "--max-grad-norm"
                )
            good = before
            losses.append(value.item())
            tokens += int(stream.lengths[steps[it - 1]].sum())
            bar.update()
            if it % settings.steps_per_report == 0 or it == settings.iters:
                row = report(it, losses, norm.item(), optimizer.learning_rate.item(), batch, tokens, bar)
                append_text(log, json.dumps(row) + "\n")
                losses, tokens = [], 0
            if settings.steps_per_eval and (it % settings.steps_per_eval == 0 or it == settings.iters):
                validate(model, prepared, valid_stream, loss, bar)
            stop = bool(interrupted) and carried is None  # half an update cannot be gone on from
            if stop or it == settings.iters or (settings.save_every and it % settings.save_every == 0):
                checkpoint.save(model, optimizer, it, copy=bool(settings.save_every) and it % settings.save_every == 0)
            if stop:
                bar.close()
                raise KeyboardInterrupt(
                    f"stopped at step {it}; saved. To go on: the same command with --resume-adapter-file "
                    f"{Path(settings.adapter_path) / 'adapters.safetensors'}"
                )
    if weights_hash(model) != described["model"]:
        raise TrainingError("the base weights changed while training: this is a fault of duet-mlx, please report it")
    return Path(settings.adapter_path)


class Kept(NamedTuple):
    """What to go back to."""

    step: int
    adapter: dict[str, Any]
    optimizer: dict[str, Any]


@contextmanager
def _checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """While inside, layers are run again in the backward pass. mlx-lm patches their class: for one run, not for all."""
    from mlx_lm.tuner.trainer import grad_checkpoint

    block = type(model.layers[0])
    call = block.__call__
    if wanted:
        grad_checkpoint(model.layers[0])
    try:
        yield
    finally:
        block.__call__ = call


@contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """While inside, Ctrl-C is noted in the list, to be acted on between two steps; a second one stops at once."""
    seen: list[int] = []

    def note(number, frame):
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    handler = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, handler)


def report(it: int, losses: list[float], norm: float, rate: float, batch, tokens: int, bar) -> dict[str, Any]:
    """One log row, shown behind the progress bar as well."""
    import mlx.core as mx

    seconds = bar.format_dict["elapsed"]
    last = getattr(bar, "last_report", 0.0)
    bar.last_report = seconds
    candidates = max(1, batch.candidate_mask.sum().item() / batch.position_mask.sum().item())
    row = {
        "step": it,
        "loss": sum(losses) / len(losses),
        "loss_per_candidate": sum(losses) / len(losses) / candidates,
        "gradient_norm": math.sqrt(norm),
        "learning_rate": rate,
        "tokens_per_second": tokens / max(1e-9, seconds - last),
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
    }
    bar.set_postfix_str(
        f"loss {row['loss']:.3f}, {row['tokens_per_second']:.0f} tok/s, {row['peak_memory_gb']:.2f} GB",
        refresh=False,
    )
    return row


def validate(model: nn.Module, prepared: Prepared, stream: Stream | None, loss, bar) -> None:
    """Print the loss on the validation questions, and what the student answers to a few of them."""
    import mlx.core as mx

    from .generate import greedy, stop_ids

    model.eval()
    tokenizer = prepared.tokenizer
    for role in ("forget", "retain"):
        if stream is None:
            break
        rows = np.array([i for i, q in enumerate(prepared.valid_queries) if q.role == role], dtype=int)
        rows = rows[np.argsort(stream.lengths[rows], kind="stable")]
        total = sum(loss(model, stream.batch(rows[start : start + 16]))[0].item() for start in range(0, len(rows), 16))
        if len(rows):
            bar.write(f"validation loss, {role}: {total / len(rows):.3f}")
    source = prepared.valid_queries or prepared.queries
    shown = [[q for q in source if (q.role == "forget") == forget][:2] for forget in (True, False)]
    chosen = [q for part in shown for q in part]
    answers = greedy(
        model, [render(tokenizer, q.question) for q in chosen], 32, stop_ids(tokenizer), head=prepared.head
    )
    for query, answer in zip(chosen, answers, strict=True):
        bar.write(f"  [{query.role}] {query.question} -> {tokenizer.decode(answer).strip()!r}")
    mx.clear_cache()
    model.train()


def main() -> None:
    """Train as the flags and the YAML say."""
    settings = parse_settings("python -m duet_mlx.train", __doc__ or "")
    path = train(settings, prepare(settings))
    print(f"adapter: {path} (for mlx_lm.generate --adapter-path, mlx_lm.server, mlx_lm.fuse --dequantize)")


if __name__ == "__main__":
    run_cli(main)
