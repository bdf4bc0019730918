"""What a run will hold in memory: its parts, traced on a model without weights (memory.py says how).

The functions traced are those that train later, on the questions of the run. Answers are taken to be as long as they
may get, so a run whose answers are short needs a little less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .context import Context, render
from .data import Query
from .generate import Part, batches, branch, can_branch, common_prefix, encode_prefix, streams, takes_row_masks
from .head import find_head, logits_at
from .kept_targets import SHARD
from .loop import make_optimizer, make_step
from .lower import Lower, find_stack, hidden_at
from .memory import nbytes, peak_bytes
from .methods import METHODS, method_loss, reads_retain, states_of
from .model import add_lora, lora_keys
from .stream import Stream
from .teacher import Targets, context_of, decoded_at_once, rows_at_once
from .train_settings import TrainSettings


class Phase(NamedTuple):
    """Most bytes held at once in a part of the run, by what for."""

    name: str
    held: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.held.values())


class Estimate(NamedTuple):
    """What a run will take."""

    phases: list[Phase]
    numpy: int  # bytes beside MLX's: targets and the logits that they are taken from
    on_disk: int  # bytes while it trains, of what comes out of the layers that are not trained
    parameters: int
    trained: int
    keys: list[str]  # what LoRA is put on, in the last `layers`
    layers: int
    read_once: int  # tokens, contexts included
    tokens: int  # of all steps

    @property
    def peak(self) -> int:
        """What `mx.get_peak_memory()` will say at the end."""
        return max(phase.total for phase in self.phases)


def teacher_pass(
    model: nn.Module, prompts: Sequence[list[int]], n: int, size: int, head: nn.Module | None
) -> tuple[int, int]:
    """Bytes of decoding n tokens, `size` prompts at once, that begin alike: working memory, and the cache."""
    shared = can_branch(model)
    ragged = shared and takes_row_masks(model)
    length = common_prefix(prompts) if shared else 0
    prefix: list[Any] = encode_prefix(model, prompts[0][:length]) if length else []
    kept = [mx.zeros(array.shape, array.dtype) for pair in prefix for array in pair]
    most = peak_bytes(model, lambda: encode_prefix(model, prompts[0][:length])) if length else 0
    cut = list(batches([len(p) for p in prompts], size, equal=not ragged))
    largest = max(cut, key=lambda rows: len(rows) * max(len(prompts[row]) - length for row in rows))
    rows = largest[: -(-len(largest) // len(streams()))]
    suffixes = [list(prompts[row][length:]) for row in sorted(rows, key=lambda row: -len(prompts[row]))]

    def begin(*arrays: mx.array) -> Part:
        return Part(model, np.arange(len(rows)), suffixes, list(zip(arrays[::2], arrays[1::2], strict=True)), ragged)

    def first(*arrays: mx.array):
        part = begin(*arrays)
        return part.logits(model, head), [entry.state for entry in part.cache]

    first_step = len(streams()) * peak_bytes(model, first, kept)
    if not ragged:
        return max(most, nbytes(kept) + first_step), 0
    part = begin(*kept)
    part.logits(model, head)  # for the shapes of its cache
    long = [  # at the last step, which keeps all that came before
        mx.zeros((*shape[:2], shape[2] + n - 1, shape[3]), kind)
        for entry in part.cache
        for shape, kind in ((entry.keys.shape, entry.keys.dtype), (entry.values.shape, entry.values.dtype))
    ]

    def last(*arrays: mx.array):
        for entry, keys, values in zip(part.cache, arrays[::2], arrays[1::2], strict=True):
            entry.keys, entry.values = keys, values
        part.tokens, part.last = mx.zeros((len(rows), 1), mx.int32), np.zeros(len(rows), dtype=int)
        return part.logits(model, head), [(entry.keys, entry.values) for entry in part.cache]

    cache = len(streams()) * nbytes(long)
    last_step = len(streams()) * peak_bytes(model, last, long, consumed=True)
    return max(most, nbytes(kept) + max(first_step, last_step)) - cache, cache


def scoring(model: nn.Module, prompts: Sequence[list[int]], n: int, read: Callable, size: int) -> int:
    """Bytes of running given sequences in batches of `size`, n tokens longer than the prompts, without decoding."""
    length = common_prefix(prompts) if can_branch(model) else 0
    prefix: list[Any] = encode_prefix(model, prompts[0][:length]) if length else []
    kept = [mx.zeros(array.shape, array.dtype) for pair in prefix for array in pair]
    rows = min(size, len(prompts))
    tokens = mx.zeros((rows, max(map(len, prompts)) - length + n), mx.int32)

    def run(*arrays: mx.array):
        cache = branch(list(zip(arrays[::2], arrays[1::2], strict=True)), rows) or None
        return read(model, tokens, cache=cache)

    at_once = min(len(streams()), -(-len(prompts) // size))
    return nbytes(kept) + at_once * peak_bytes(model, run, kept)


def placeholder_targets(count: int, n: int, candidates: int, states: int) -> Targets:
    """Targets of the right shapes, with every position supervised, that take up no memory."""

    def filled(value: Any, *shape: int) -> np.ndarray:
        return np.broadcast_to(np.array(value), (count, *shape))

    return Targets(
        filled(np.int32(0), n, candidates), filled(np.float32(0), n, candidates), filled(True, n, candidates),
        filled(True, n), filled(np.int32(0), n - 1), filled(np.float32(0), n, states) if states else None,
    )  # fmt: skip


def training_step(
    settings: TrainSettings, model: nn.Module, head: nn.Module | None, stream: Stream, rows: np.ndarray,
    prefix: Sequence[int], first: int,
) -> int:  # fmt: skip
    """Bytes of one step on the batch `rows`, beyond weights, adapters and optimizer: `first` layer that is run in it.

    MLX does not write down checkpointed layers. Of each of them the input is held, and one is run again while what the
    one above it held is given back: so the last two layers are traced alone, and the inputs of the others are added.
    """
    count, given = len(model.layers), 0
    hidden = hidden_at(model, count - 1, mx.zeros((1, 1), mx.int32))
    method = METHODS[settings.method]
    lower = Lower(first, mx.zeros((1, len(prefix), hidden.shape[-1]), hidden.dtype)) if first else None
    if settings.grad_checkpoint and method.frozen != "layer":
        lower = Lower(max(first, count - 2), None)
    batch = stream.batch(rows)
    if lower:
        into = mx.zeros((*batch.tokens.shape, hidden.shape[-1]), hidden.dtype)
        batch, given = batch._replace(hidden=into), into.nbytes * (1 + lower.layer - first)
    optimizer = make_optimizer(settings)
    optimizer.init(model.trainable_parameters())
    state = dict(tree_flatten(optimizer.state))
    step = make_step(model, optimizer, method_loss(settings, prefix, head, lower), settings, compiled=False)

    def run(*arrays: mx.array):
        optimizer.state = tree_unflatten(list(zip(state, arrays, strict=True)))
        value, norm, carried = step(batch, None, 1)
        return model.trainable_parameters(), optimizer.state, value, norm

    mx.random.seed(settings.seed)  # tracing dropout leaves a placeholder in the generator
    try:
        return given + peak_bytes(model, run, list(state.values()))
    finally:
        mx.random.seed(settings.seed)


def frozen_pass(
    settings: TrainSettings, model: nn.Module, rendered: Callable, queries: Sequence[Query], contexts: list[Context],
    head: nn.Module | None, n: int, vocabulary: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Reading the teacher, or the base's answers: bytes of working memory and of the cache, and tokens read."""
    groups: dict[Context | None, list[Query]] = {}
    for query in queries:
        context = context_of(query, contexts, settings.retain_context) if contexts else None
        groups.setdefault(context, []).append(query)
    most, read = (0, 0), 0
    for context, members in groups.items():
        prompts = [rendered(query.question, context) for query in members]
        read += sum(map(len, prompts))
        working, cache = teacher_pass(model, prompts, n, decoded_at_once(context, n, vocabulary), head)
        # The base reads the teacher's words, or its own answers, once more.
        if not contexts or (settings.candidates == "union" and context is not None):
            bare = [rendered(query.question) for query in members]
            again = scoring(model, bare, n, partial(_logits, head, mx.zeros((min(32, len(bare)), n), mx.int32)), 32)
            working = max(working, again - cache)
        most = max(most, (working, cache), key=sum)
    return *most, read


def estimate(
    settings: TrainSettings, model: nn.Module, tokenizer: Any, queries: list[Query], valid: list[Query],
    contexts: list[Context], stored: int = 0,
) -> Estimate:  # fmt: skip
    """What the run will take, from shapes alone; the model, which need not have weights, gets LoRA.

    Args:
        stored: bytes of the files of weights; 0 where they are not there yet.
    """
    method, head = METHODS[settings.method], find_head(model)
    rendered = lru_cache(None)(partial(render, tokenizer))  # the template of a few thousand questions takes seconds
    n = settings.positions if method.labels == "teacher" else settings.answer_tokens
    token = mx.zeros((1, 1), mx.int32)
    vocabulary = logits_at(model, token, token).shape[-1]
    weights, parameters = nbytes(model.parameters()), _numbers(model.parameters())
    asked = [part for part in (queries, valid if settings.steps_per_eval else []) if part]
    read = [frozen_pass(settings, model, rendered, part, contexts, head, n, vocabulary) for part in asked]
    working, of_cache, _ = max(read, key=lambda one: one[0] + one[1])
    name = "teacher" if method.labels == "teacher" else "answers"
    phases = [Phase(name, {"weights": weights, "cache": of_cache, "working memory": working})]
    if 0 < stored < weights:  # dequantized while it is loaded, one array after the other, each by way of a copy
        largest = max(array.nbytes for _, array in tree_flatten(model.parameters()))
        phases.insert(0, Phase("loading", {"weights": weights, "as stored": stored, "working memory": largest}))

    keys = lora_keys(model, settings.lora_parameters["keys"])
    inside = {name for layer in model.layers for name, _ in layer.named_modules()}
    in_layers = set(keys) <= inside
    add_lora(model, settings.num_layers, **{**settings.lora_parameters, "keys": keys})
    adapters = nbytes(model.trainable_parameters())
    layers = len(model.layers) if settings.num_layers == -1 else settings.num_layers
    first = len(model.layers) - layers if in_layers and can_branch(model) and find_stack(model) else 0

    prompts = [rendered(query.question) for query in queries]
    watched = [rendered(query.question) for query in valid]
    prefix = common_prefix(prompts + watched) if can_branch(model) and not settings.grad_checkpoint else 0
    forget = np.array([i for i, q in enumerate(queries) if q.role == "forget"])
    kept = np.array([i for i, q in enumerate(queries) if q.role != "forget" and reads_retain(settings)], dtype=int)
    count = len(queries) + (len(forget) if method.labels == "both" else 0)
    into_last = hidden_at(model, len(model.layers) - 1, token)
    width = settings.top_k * (2 if settings.candidates == "union" else 1) if method.frozen == "candidates" else 1
    states = into_last.shape[-1] if states_of(settings) else 0
    stream = Stream(prompts, placeholder_targets(count, n, width, states), prefix, forget)
    steps = stream.schedule(forget, kept, settings)

    on_disk = 0
    if first:
        extra = watched if settings.steps_per_eval else []
        tokens = int(stream.lengths.sum()) + sum(len(prompt) - prefix + n - 1 for prompt in extra)
        on_disk = tokens * into_last.nbytes
        once = scoring(model, prompts + extra, n, lambda m, t, cache: hidden_at(m, first, t, cache), 32)
        phases.append(Phase("lower layers", {"weights": weights, "adapters": adapters, "working memory": once}))
    longest = max(steps, key=lambda rows: stream.lengths[rows].max())
    step = training_step(settings, model, head if in_layers else None, stream, longest, prompts[0][:prefix], first)
    # Adam has two moments; and the state before the last update is kept in case the next loss is not finite.
    held = {"weights": weights, "adapters": 2 * adapters, "optimizer": 4 * adapters}
    phases.append(Phase("training", {**held, "working memory": step}))

    rows = min(rows_at_once(n, vocabulary), len(queries))
    at_once = min(count, 2 * SHARD) if method.labels == "teacher" else count  # one is built, one is being written
    targets = at_once * n * width * 9  # an id, a logit and a mask each
    return Estimate(
        phases, targets + 2 * rows * n * vocabulary * 4, on_disk, parameters, _numbers(model.trainable_parameters()),
        keys, layers, sum(tokens for *_, tokens in read), sum(int(stream.lengths[rows].sum()) for rows in steps),
    )  # fmt: skip


def _logits(head: nn.Module | None, positions: mx.array, model: nn.Module, tokens: mx.array, cache) -> mx.array:
    return logits_at(model, tokens, positions, cache=cache, head=head)


def _numbers(tree: Any) -> int:
    return sum(array.size for _, array in tree_flatten(tree))
