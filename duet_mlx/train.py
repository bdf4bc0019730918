"""Unlearn: a LoRA student that never sees the context learns the teacher's top-K logits, from questions alone.

    python -m duet_mlx.train --model M --forget F.jsonl --retain R.jsonl --context C.yaml --adapter-path A

DUET: Zhong, Yang and Zhu, "Distilled LLM Unlearning from an Efficiently Contextualized Teacher", ICLR 2026.
The teacher (teacher.py) was read before this starts; a step is a LoRA fine-tune with C numbers for labels.
--method takes a baseline instead (methods.py), in the same loop with the same questions, batches and LoRA.
"""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import BLAS
from .checkpoint import Checkpoint, State, adapter_config
from .context import Context, load_contexts, render
from .data import Query, check_disjoint, digest, load_queries, spread
from .errors import TrainingError, run_cli
from .files import folder_for_adapter, only_run_in, write_text
from .kept_targets import manifest, saved_or_built
from .labels import asked_of, check_answers, check_model, targets_of
from .loop import checkpointed, make_optimizer, make_step, run_steps
from .methods import METHODS, method_loss, reads_retain
from .resume import check_fits, cut_log, going_on
from .stream import Stream
from .teacher import Targets, check_lengths
from .train_settings import TrainSettings, parse_settings
from .watch import interrupts_noted

if TYPE_CHECKING:
    import mlx.nn as nn

    from .lower import LowerStates


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


def read_questions(settings: TrainSettings) -> tuple[list[Query], list[Query], list[Context]]:
    """The questions to train on, those to watch, and the contexts, checked as far as that goes without a model."""
    forget = load_queries(settings.forget, "forget")
    retain = load_queries(settings.retain, "retain") if settings.retain else []
    neighbours = load_queries(settings.neighbours, "neighbour") if settings.neighbours else []
    valid_forget = load_queries(settings.valid_forget, "forget") if settings.valid_forget else []
    valid_retain = load_queries(settings.valid_retain, "retain") if settings.valid_retain else []
    valid = valid_forget + valid_retain
    check_disjoint(forget, retain + neighbours)
    check_disjoint(valid_forget, valid_retain)
    check_disjoint(forget + retain + neighbours, valid)
    forget = spread(forget, settings.forget_questions, "--forget-questions")
    kept = spread(retain, settings.retain_questions, "--retain-questions")
    kept = kept + spread(neighbours, settings.neighbour_questions, "--neighbour-questions")
    check_answers(forget + kept + (valid if settings.steps_per_eval else []), settings)
    # Trained on answers, a method reads no context.
    taught = METHODS[settings.method].labels == "teacher"
    contexts = load_contexts(settings.context, settings.topic) if taught else []
    return forget + kept, valid, contexts


def prepare(settings: TrainSettings, keep: bool = True) -> Prepared:
    """Read questions, context and model, and get the targets: saved ones if nothing changed, else built now.

    Args:
        keep: False writes nothing.

    Raises:
        DuetError: whatever of it cannot be used; nothing has been built or written then.
    """
    queries, valid, contexts = read_questions(settings)
    if not keep:
        return _read(settings, queries, valid, contexts, keep)
    with only_run_in(folder_for_adapter(settings)):
        return _read(settings, queries, valid, contexts, keep)


def _read(
    settings: TrainSettings, queries: list[Query], valid: list[Query], contexts: list[Context], keep: bool
) -> Prepared:
    """The part of `prepare` that needs the model."""
    import mlx.core as mx

    from .generate import can_branch, takes_row_masks
    from .head import check_head
    from .model import load_model, on_gpu, window

    make_optimizer(settings)  # a schedule that cannot be built is better known before the teacher is read
    mx.random.seed(settings.seed)
    if not on_gpu() and BLAS is None and sys.platform == "linux":
        print("note: no OpenBLAS found (Debian: libopenblas0-pthread); matrix products will be about 40 times slower")
    model, tokenizer, folder = load_model(settings.model, trust_remote_code=settings.trust_remote_code)
    check_lengths(tokenizer, queries + valid, contexts, settings, window(folder))
    found = check_head(model, mx.array([render(tokenizer, queries[0].question)]))
    keys, head = check_model(settings, model, found)
    if settings.resume_adapter_file:  # refused before the targets of the run that was saved are replaced
        layers = len(model.layers) if settings.num_layers == -1 else settings.num_layers
        described = manifest(model, tokenizer, queries, contexts, settings, asked_of(queries, settings))
        going_on(settings.resume_adapter_file, adapter_config(settings, folder, described, keys, layers))
    if not can_branch(model):
        print("note: each prompt is read whole (a cache that rotates or holds a state cannot be shared)")
    elif not takes_row_masks(model):
        print("note: only prompts of one length are decoded together (the attention takes one mask for all rows)")

    def read(name: str, queries: list[Query]) -> tuple[Targets, dict[str, str]]:
        path, asked = Path(settings.adapter_path) / name, asked_of(queries, settings)
        return saved_or_built(path, model, tokenizer, queries, contexts, settings, head, asked, targets_of, keep)

    targets, described = read("targets.safetensors", queries)
    watched = valid and settings.steps_per_eval
    valid_targets = read("valid_targets.safetensors", valid)[0] if watched else None
    return Prepared(model, tokenizer, folder, head, contexts, queries, targets, described, valid, valid_targets)


def train(settings: TrainSettings, prepared: Prepared, earlier: LowerStates | None = None) -> Path:
    """Run all steps and leave the adapter folder; returns it.

    Args:
        earlier: as in `lower.run_lower`.

    Raises:
        ConfigError: the run to go on with is another one, or another process writes into the folder.
        DivergedError: loss, gradient or weights not finite; the last good adapter is kept.
        TrainingError: no room to write, or nobody reads the output.
        KeyboardInterrupt: after saving, with a line that says how to go on.
    """
    with only_run_in(folder_for_adapter(settings)):  # looked at again: another run may have filled it since `prepare`
        return _train(settings, prepared, earlier)


def _train(settings: TrainSettings, prepared: Prepared, earlier: LowerStates | None) -> Path:
    """`train`, while no other run writes into the folder."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from .generate import can_branch, common_prefix
    from .lower import run_lower
    from .model import add_lora, lora_keys, on_gpu, weights_hash

    model, tokenizer, folder, head, _, queries, targets, described, valid, valid_targets = prepared
    path, resumed = Path(settings.adapter_path), settings.resume_adapter_file
    keys = lora_keys(model, settings.lora_parameters["keys"])
    layers = len(model.layers) if settings.num_layers == -1 else settings.num_layers
    config = adapter_config(settings, folder, described, keys, layers)
    state, changed = going_on(resumed, config) if resumed else (None, [])
    mx.random.seed(settings.seed)
    add_lora(model, settings.num_layers, **{**settings.lora_parameters, "keys": keys})
    trained = sum(a.size for _, a in tree_flatten(model.trainable_parameters()))
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
    batches = stream.schedule(forget, kept, settings)
    shared = list(prompts[0][:prefix])
    streams = [s for s in (stream, valid_stream) if s]
    base = digest([described["model"], str(folder)])  # the same weights may stand beside another config
    lower = run_lower(model, len(model.layers) - layers, shared, streams, path, earlier, base)

    optimizer = make_optimizer(settings)
    optimizer.init(model.trainable_parameters())
    if state and resumed:
        check_fits(resumed, state, model)
        state.restore(model, optimizer)
        print(f"going on from step {state.step} of {settings.iters}{', with ' if changed else ''}{', '.join(changed)}")
    else:
        state = State.of(model, optimizer, 0)
    model.train()
    loss = method_loss(settings, shared, head, lower)
    # After resuming, which replaces the state that a compiled step holds on to. On CPU mx.compile would call a C++
    # compiler for seconds and gain nothing on matrix products.
    step = make_step(model, optimizer, loss, settings, compiled=on_gpu())
    same_folder = resumed is not None and Path(resumed).resolve().parent == path.resolve()
    with checkpointed(model, settings.grad_checkpoint), interrupts_noted() as interrupted:
        write_text(path / "train_log.jsonl", cut_log(path / "train_log.jsonl", state.step) if same_folder else "")
        checkpoint = Checkpoint(path, config, model, optimizer, state, same_folder)
        try:
            run_steps(settings, prepared, checkpoint, step, loss, stream, batches, valid_stream, interrupted)
        except TrainingError:  # a spoilt update, a full disk: the state is saved, or cannot be
            raise
        except BaseException as error:  # Ctrl-C, a closed pipe, no memory left: what was reached must not be lost
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            reached = checkpoint.save_reached()
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(reached) from error
            if isinstance(error, BrokenPipeError):
                raise TrainingError(f"nobody reads the output any more (a closed pipe): {reached}") from error
            print(reached, file=sys.stderr)
            raise
    if weights_hash(model) != described["model"]:
        raise TrainingError("the base weights changed while training: this is a fault of duet-mlx, please report it")
    return path


def main() -> None:
    """Train as the flags and the YAML say."""
    settings = parse_settings("python -m duet_mlx.train", __doc__ or "")
    if settings.dry_run:
        from .dry_run import dry_run

        return dry_run(settings)
    from .parallel import as_rank

    with as_rank(settings) as settings:
        try:
            prepared = prepare(settings)
            path = train(settings, prepared)
        except BrokenPipeError as error:  # before the first step: from there on `train` saves and says so
            raise TrainingError(
                "nobody reads the output any more (a closed pipe): stopped before the first step, nothing is trained"
            ) from error
        # mlx-lm does not read a .gguf: there it takes the folder that was made of it.
        model = prepared.folder if settings.model.endswith(".gguf") else settings.model
        prompt = shlex.quote(prepared.queries[0].question)
        print(f"adapter: {path}, for mlx-lm's generate, server and fuse --dequantize. To try it:")
        print(f"  mlx_lm.generate --model {model} --adapter-path {path} --prompt {prompt}")


if __name__ == "__main__":
    run_cli(main)
