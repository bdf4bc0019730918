"""Running many prompts that begin alike: the shared prefix is encoded once, for decoding and for scoring."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, create_attention_mask, make_prompt_cache

from .context import shared_prefix
from .head import logits_at

Prefix = list[tuple[mx.array, mx.array]]  # keys and values [1, heads, P, D/H] of each layer


def stop_ids(tokenizer) -> set[int]:
    """Token ids that end the assistant's turn."""
    return set(tokenizer.eos_token_ids)


def can_branch(model: nn.Module) -> bool:
    """Whether many continuations can share the model's cache (neither rotating nor state-space)."""
    return all(type(cache) is KVCache for cache in make_prompt_cache(model))


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of what all prompts begin with, leaving at least one token to each."""
    return min(shared_prefix(prompts), min(map(len, prompts)) - 1)


def encode_prefix(model: nn.Module, tokens: Sequence[int]) -> Prefix:
    """Keys and values of a prefix of P >= 1 tokens. Differentiable; the head is never evaluated."""
    cache = [ConcatenateKVCache() for _ in model.layers]
    model(mx.array([list(tokens)]), cache=cache)
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


class Answers(NamedTuple):
    """What a batch of prompts is answered."""

    rows: np.ndarray  # [B] which prompts
    tokens: list[list[int]]  # each cut before its stop token
    kept: np.ndarray | None  # [B, max_tokens, ...] where asked for; zeros after an answer's end


def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    stop: Collection[int],
    batch_size: int = 64,
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
    length = common_prefix(prompts) if shared else 0
    prefix = encode_prefix(model, prompts[0][:length]) if length else []
    mx.eval(prefix)
    for rows in batches([len(p) for p in prompts], batch_size, equal=not shared):
        suffixes = [prompts[row][length:] for row in rows]
        last = np.array([len(s) - 1 for s in suffixes])
        if prefix:
            cache = branch(prefix, len(rows), RaggedCache)
        else:
            cache = [RaggedCache() for _ in model.layers] if shared else make_prompt_cache(model)
        logits = logits_at(model, pad(suffixes), mx.array(last[:, None]), cache=cache, head=head)
        if shared:
            for entry in cache:
                entry.settle(length, last + 1)
        answers: list[list[int]] = [[] for _ in rows]
        limits = np.broadcast_to(max_tokens, len(prompts))[rows]
        ended = np.zeros(len(rows), dtype=bool)
        alive, kept = np.arange(len(rows)), None
        for count in itertools.count():
            tokens = mx.argmax(logits[:, 0], axis=-1)
            mx.eval(tokens)
            if keep:
                seen, live = keep(logits[:, 0]), ~ended[alive]
                if kept is None:
                    kept = np.zeros((len(rows), limits.max(), *seen.shape[1:]), dtype=seen.dtype)
                kept[alive[live], count] = seen[live]
            for row, token in zip(alive, tokens.tolist(), strict=True):
                if not ended[row] and token not in stop:
                    answers[row].append(token)
                    ended[row] = len(answers[row]) == limits[row]
                else:
                    ended[row] = True
            going = ~ended[alive]
            if not going.any():
                break
            if shared and going.sum() <= len(alive) // 2:  # answers that ended are dropped by halves
                going_on = mx.array(np.flatnonzero(going))
                for entry in cache:
                    entry.keep(going_on)
                alive, tokens = alive[going], tokens[going_on]
            zero = mx.zeros((len(alive), 1), dtype=mx.int32)
            logits = logits_at(model, tokens[:, None], zero, cache=cache, head=head)
        yield Answers(rows, answers, kept)


def greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    stop: Collection[int],
    batch_size: int = 64,
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
