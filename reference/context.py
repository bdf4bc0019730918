"""Token lists of student and teacher: x, x_ic ⊕ x, what they share, the supervised positions, padding.

Here a text is the list of its token ids. How a chat template turns text into ids is the backend's business
(`duet_mlx.context.render`); what has to hold of the ids is written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Context(NamedTuple):
    """An unlearning context x_ic: what the teacher reads in front of a question."""

    name: str
    tokens: tuple[int, ...] = ()  # [P]


class Query(NamedTuple):
    """A question x. No answer: DUET learns from questions alone."""

    id: str
    tokens: tuple[int, ...]  # [T]
    role: str = "forget"  # forget | retain | neighbour
    context: str | None = None  # the name of a forget query's own context; None: the first


def contextualize(query: Sequence[int], context: Sequence[int], bos: int | None = None) -> list[int]:
    """x_ic ⊕ x: the context in front of the query, [P] and [T] -> [P+T]; a BOS stays first, once."""
    context, query = list(context), list(query)
    if not context:
        return query
    if bos is not None and query[:1] == [bos]:
        return [bos, *context[context[:1] == [bos] :], *query[1:]]
    return context + query


def shared_prefix(token_lists: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix: what a KV cache may hold once for all. 0 for no lists."""
    if not token_lists:
        return 0
    first, shortest = token_lists[0], min(map(len, token_lists))
    return next((i for i in range(shortest) if any(ids[i] != first[i] for ids in token_lists)), shortest)


def shared_suffix(student: Sequence[int], teacher: Sequence[int]) -> int:
    """How many last tokens student and teacher read alike: the question must be wholly among them."""
    return shared_prefix([student[::-1], teacher[::-1]])


def supervise(
    prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], n: int
) -> tuple[Array, Array, Array]:
    """One batch along given continuations: tokens [B, S], positions [B, n] in S, position_mask [B, n].

    The model reads prompt ⊕ y_teacher. Its position t is the index len(prompt) - 1 + t, and there it predicts
    y_teacher[t], for the student (prompt x) and the teacher (prompt x_ic ⊕ x) alike, though the indices
    differ by P. A continuation of m < n tokens supervises m + 1 positions: the last one predicts the end of
    turn, or the n-th token. Later positions are masked, and repeat the last index.

    Args:
        continuations: at most n - 1 tokens each, cut before the end of turn.
    """
    sequences = [[*prompt, *words] for prompt, words in zip(prompts, continuations, strict=True)]
    supervised = np.array([len(words) + 1 for words in continuations])[:, None]  # [B, 1]
    start = np.array([len(prompt) - 1 for prompt in prompts])[:, None]  # [B, 1]
    t = np.arange(n)  # [n]
    return pad(sequences), start + np.minimum(t, supervised - 1), t < supervised


def pad(sequences: Sequence[Sequence[int]], width: int | None = None) -> Array:
    """Token lists as one array [B, S], zeros on the right: a causal model never looks there."""
    width = max(map(len, sequences)) if width is None else width
    padded = np.zeros((len(sequences), width), dtype=np.int64)  # [B, S]
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = ids
    return padded
