"""Running many prompts that begin alike: the shared prefix is encoded once, for decoding and for scoring."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, create_attention_mask, make_prompt_cache

from . import cores
from .context import shared_prefix
from .errors import ModelError
from .head import logits_at

# Prompts decoded at once. On CPU a matrix product rearranges its weights in every call, whatever the number of rows:
# with 64 that was a fifth of the time, on two streams of 32.
ROWS = 128
# Tokens of a prefix that are encoded at once on CPU. A layer of one piece runs beside the layer below of the next, and
# no piece looks at what comes after it: 2,041 tokens of the demo's model took 14 s, not 40; by 128 or 512 16 to 18 s.
PIECE = 256

Prefix = list[tuple[mx.array, mx.array]]  # keys and values [1, heads, P, D/H] of each layer


@lru_cache
def _cpu_streams() -> list[mx.Stream]:
    return [mx.new_stream(mx.cpu) for _ in range(min(2, cores()))]


def streams() -> list[mx.Stream]:
    """Where parts of a batch, or batches, are computed side by side: two streams on a CPU of two cores, else one.

    MLX's own CPU kernels use one core each. On two cores two streams gave 1.6 times the speed of one that had both
    for its matrix products, and 1.2 times that of a training step; on one core, two took 1.3 times the time of one.
    """
    device = mx.default_device()
    return [mx.default_stream(device)] if device.type == mx.DeviceType.gpu else _cpu_streams()


def stop_ids(tokenizer) -> set[int]:
    """Token ids that end the assistant's turn."""
    return set(tokenizer.eos_token_ids)


def can_branch(model: nn.Module) -> bool:
    """Whether many continuations can share the model's cache (neither rotating nor state-space)."""
    return all(type(cache) is KVCache for cache in make_prompt_cache(model))


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of what all prompts begin with, leaving at least one token to each."""
    return min(shared_prefix(prompts), min(map(len, prompts)) - 1)


def encode_prefix(model: nn.Module, tokens: Sequence[int], whole: bool = False) -> Prefix:
    """Keys and values of a prefix of P >= 1 tokens. Differentiable; the head is never evaluated.

    Args:
        whole: in one call of the model, not in pieces on each stream in turn, as a CPU has them; see `lower.entering`.
    """
    cache = [ConcatenateKVCache() for _ in model.layers]
    size = len(tokens) if whole or len(streams()) == 1 else PIECE
    for start, stream in zip(range(0, len(tokens), size), itertools.cycle(streams()), strict=False):
        with mx.stream(stream):
            model(mx.array([list(tokens[start : start + size])]), cache=cache)
    return [(entry.keys, entry.values) for entry in cache]


class RaggedCache(ConcatenateKVCache):
    """A cache of B rows of one prefix and suffixes of unlike length, to decode with.

    mlx-lm's batch cache rolls every row to the right edge after the prefill, which on CPU costs as much as the
    prefill. Here the padding stays where it is, between a row's suffix and its new tokens, behind a mask.
    """

    keys: mx.array
    values: mx.array
    offset: int | mx.array

    def update_and_fetch(self, keys: mx.array, values: mx.array):
        offset = self.offset + keys.shape[2]  # the upstream one counts padding too
        grown = super().update_and_fetch(keys, values)
        self.offset = offset
        return grown

    def settle(self, before: int, lengths: np.ndarray) -> None:
        """After the prefill: row b holds `before` + lengths[b] tokens, then padding up to the common width."""
        self.offset = mx.array(before + lengths)  # [B]: RoPE counts each row's own tokens
        self.visible = mx.arange(self.keys.shape[2])[None] < self.offset[:, None]  # [B, S]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):  # noqa: N803
        """Causal while the suffixes come in; afterwards all that is visible, [B, 1, 1, S+1]."""
        if self.keys is None or isinstance(self.offset, int):
            return create_attention_mask(N, self.offset, return_array, window_size)
        new = mx.ones((len(self.offset), self.keys.shape[2] + N - self.visible.shape[1]), dtype=mx.bool_)
        return mx.concatenate([self.visible, new], axis=1)[:, None, None]

    def keep(self, rows: mx.array) -> None:
        """Drop all rows but these."""
        assert not isinstance(self.offset, int), "settle comes first"
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.offset, self.visible = self.offset[rows], self.visible[rows]


def branch(prefix: Prefix, size: int, kind: type = ConcatenateKVCache) -> list:
    """A cache of `size` rows that all begin with `prefix`."""
    cache = []
    for keys, values in prefix:
        entry = kind()
        entry.keys = mx.broadcast_to(keys, (size, *keys.shape[1:]))
        entry.values = mx.broadcast_to(values, (size, *values.shape[1:]))
        entry.offset = keys.shape[2]
        cache.append(entry)
    return cache


def pad(rows: Sequence[Sequence[int]], width: int | None = None) -> mx.array:
    """Token lists as one [B, T] int32 array, zeros on the right (a causal model never looks there)."""
    width = width or max(map(len, rows))
    return mx.array([[*row, *[0] * (width - len(row))] for row in rows], dtype=mx.int32)


def batches(lengths: Sequence[int], size: int, equal: bool) -> Iterator[np.ndarray]:
    """Indices in batches of at most `size`, shortest first; `equal`: only equal lengths share a batch."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    for stop in range(1, len(order) + 1):
        full = stop - start == size
        if stop == len(order) or full or (equal and lengths[order[stop]] != lengths[order[start]]):
            yield order[start:stop]
            start = stop


def side_by_side(
    cut: Iterable[np.ndarray], compute: Callable[[np.ndarray], mx.array]
) -> Iterator[tuple[np.ndarray, mx.array]]:
    """Each batch of rows with its `compute(rows)`, evaluated, as many at once as there are streams."""
    waiting = iter(cut)
    while group := list(itertools.islice(waiting, len(streams()))):
        done = []
        for rows, stream in zip(group, streams(), strict=False):
            with mx.stream(stream):
                done.append(compute(rows))
        mx.eval(done)  # together: of two evaluations MLX hands out all of the first one's work first
        yield from zip(group, done, strict=True)


def on_each_stream(count: int, compute: Callable[[np.ndarray], mx.array]) -> list[mx.array]:
    """compute(rows) of each part of `count` rows, one part a stream; nothing is evaluated."""
    done = []
    for rows, stream in zip(np.array_split(np.arange(count), len(streams())), streams(), strict=True):
        if len(rows):
            with mx.stream(stream):
                done.append(compute(rows))
    return done


class Answers(NamedTuple):
    """What a batch of prompts is answered."""

    rows: np.ndarray  # [B] which prompts
    tokens: list[list[int]]  # each cut before its stop token
    kept: np.ndarray | None  # [B, max_tokens, ...] where asked for; zeros after an answer's end


class Part:
    """Rows of a batch that are decoded on one stream, and those of them whose answers go on."""

    def __init__(self, model: nn.Module, rows: np.ndarray, suffixes: list[list[int]], prefix: Prefix, ragged: bool):
        self.rows, self.ragged = rows, ragged
        if prefix:
            self.cache = branch(prefix, len(rows), RaggedCache if ragged else ConcatenateKVCache)
        else:
            self.cache = [RaggedCache() for _ in model.layers] if ragged else make_prompt_cache(model)
        self.last = np.array([len(suffix) - 1 for suffix in suffixes])
        self.tokens = pad(suffixes)

    def logits(self, model: nn.Module, head: nn.Module | None) -> mx.array:
        """What comes after `tokens` [B, T]: [B, V]."""
        before = self.cache[0].offset if self.ragged else None
        logits = logits_at(model, self.tokens, mx.array(self.last[:, None]), cache=self.cache, head=head)[:, 0]
        if isinstance(before, int):  # that was the prefill
            for entry in self.cache:
                entry.settle(before, self.last + 1)
        self.last = np.zeros(len(self.rows), dtype=int)
        return logits

    def go_on(self, tokens: mx.array, going: np.ndarray) -> None:
        """Feed these tokens [B] next; rows whose answers have ended are dropped by halves."""
        if self.ragged and going.sum() <= len(going) // 2:
            keep = mx.array(np.flatnonzero(going))
            for entry in self.cache:
                entry.keep(keep)
            self.rows, self.last, tokens = self.rows[going], self.last[going], tokens[keep]
        self.tokens = tokens[:, None]


def takes_row_masks(model: nn.Module) -> bool:
    """Whether rows of unlike length can be decoded together. Nothing is computed: MLX checks shapes before it does.

    Gemma 2's attention in mlx-lm, written out for groups of query heads, cannot take a mask of each row's own. With as
    many rows as heads of keys the mask would fit, wrongly: hence seven, which no model has.
    """
    part = Part(model, np.arange(7), [[0]] * 7, [], ragged=True)
    try:
        for _ in range(2):  # the prefill, whose mask is one for all, and a token more
            part.go_on(mx.argmax(part.logits(model, None), axis=-1), np.ones(7, dtype=bool))
    except ValueError:
        return False
    return True


def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    stop: Collection[int],
    batch_size: int = ROWS,
    head: nn.Module | None = None,
    keep: Callable[[mx.array], np.ndarray] | None = None,
) -> Iterator[Answers]:
    """Greedy continuations of many prompts, a batch at a time, shortest prompts first.

    Args:
        prompts: token lists.  max_tokens: most new tokens, at least 1, of all or of each.
        stop: ids that end an answer (`stop_ids`); the answer is cut before them. Ties go to the lower id.
        head: `check_head`'s head, so that the prefill computes one position's logits.
        keep: what to keep [b, ...] of the logits [b, V] that each token, the stop token included, was chosen from.
    """
    shared = can_branch(model)
    ragged = shared and takes_row_masks(model)
    length = common_prefix(prompts) if shared else 0
    prefix = encode_prefix(model, prompts[0][:length]) if length else []
    mx.eval(prefix)
    for rows in batches([len(p) for p in prompts], batch_size, equal=not ragged):
        places = np.array_split(np.arange(len(rows)), min(len(rows), len(streams())))
        parts = [Part(model, at, [list(prompts[row][length:]) for row in rows[at]], prefix, ragged) for at in places]
        answers: list[list[int]] = [[] for _ in rows]
        limits = np.broadcast_to(max_tokens, len(prompts))[rows]
        ended, kept = np.zeros(len(rows), dtype=bool), None
        for count in itertools.count():
            chosen = []
            for part, stream in zip(parts, streams(), strict=False):
                with mx.stream(stream):
                    logits = part.logits(model, head)
                    chosen.append((part, stream, logits, mx.argmax(logits, axis=-1)))
            mx.eval([both[2:] for both in chosen])
            for part, stream, logits, tokens in chosen:
                if keep:
                    seen, live = keep(logits), ~ended[part.rows]
                    if kept is None:
                        kept = np.zeros((len(rows), limits.max(), *seen.shape[1:]), dtype=seen.dtype)
                    kept[part.rows[live], count] = seen[live]
                for row, token in zip(part.rows, tokens.tolist(), strict=True):
                    if not ended[row] and token not in stop:
                        answers[row].append(token)
                        ended[row] = len(answers[row]) == limits[row]
                    else:
                        ended[row] = True
                with mx.stream(stream):
                    part.go_on(tokens, ~ended[part.rows])
            parts = [part for part in parts if not ended[part.rows].all()]
            if not parts:
                break
        del part, chosen, logits, tokens  # the cache of a batch should not outlive it while the caller works on
        yield Answers(rows, answers, kept)


def is_finite(logits: mx.array) -> np.ndarray:
    """0 where no logit of a row [B, V] is NaN or +inf, else NaN: [B]. A masked token may have -inf."""
    return np.where(np.array((logits < mx.inf).all(axis=-1)), 0.0, np.nan)


def require_finite(finite: bool, place: str, behind: str) -> None:
    """Raise ModelError, which begins with `place`, unless the logits behind a question are finite."""
    if not finite:
        raise ModelError(
            f"{place}: the logits behind {behind} are NaN or infinite, so there is no answer to measure: the weights "
            "are broken, or too large for this model"
        )


def greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    stop: Collection[int],
    batch_size: int = ROWS,
    head: nn.Module | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """`decode`'s answers in the prompts' order; `progress` is called with the number of prompts in each batch."""
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts or np.min(max_tokens) < 1:
        return answers
    for batch in decode(model, prompts, max_tokens, stop, batch_size, head):
        for row, tokens in zip(batch.rows, batch.tokens, strict=True):
            answers[row] = tokens
        if progress:
            progress(len(batch.rows))
    return answers
