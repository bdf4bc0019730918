"""Running many prompts that begin alike: the shared prefix is encoded once, for decoding and for scoring."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

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


def greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop: Collection[int],
    batch_size: int = 64,
    head: nn.Module | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """Greedy continuations of many prompts, batched.

    Args:
        prompts: token lists.  max_tokens: most new tokens for each.
        stop: ids that end an answer (`stop_ids`); the answer is cut before them.
        head: `check_head`'s head, so that the prefill computes one position's logits.
        progress: called with the number of prompts that a finished batch held.

    Returns:
        The new tokens of each prompt, in the prompts' order. Ties go to the lower id.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_tokens < 1:
        return answers
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
        alive, count = rows, 0
        while True:
            tokens = mx.argmax(logits[:, 0], axis=-1)
            mx.eval(tokens)
            going = np.ones(len(alive), dtype=bool)
            for index, (row, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
                if token in stop or len(answers[row]) < count:  # ended now, or before
                    going[index] = False
                else:
                    answers[row].append(token)
            count += 1
            if count == max_tokens or not going.any():
                break
            if shared and going.sum() <= len(alive) // 2:  # answers that ended are dropped by halves
                keep = mx.array(np.flatnonzero(going))
                for entry in cache:
                    entry.keep(keep)
                alive, tokens = alive[going], tokens[keep]
            zero = mx.zeros((len(alive), 1), dtype=mx.int32)
            logits = logits_at(model, tokens[:, None], zero, cache=cache, head=head)
        if progress:
            progress(len(rows))
    return answers
