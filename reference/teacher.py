"""What the teacher gives: its own continuation, the candidates C_K and their raw logits. All are constants.

π_ref is the frozen base reading x_ic ⊕ x. Of its V logits at a position, only the K largest are kept, raw:
a softmax would throw their level away. No gradient flows through anything in this file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference.context import Context, Query, pad

Array = NDArray[Any]


class Targets(NamedTuple):
    """N queries (or a batch of B), n positions, C candidates: K (`teacher`) or 2K (`union`)."""

    ids: Array  # [N, n, C] int, 0 under the mask
    logits: Array  # [N, n, C] float64, g_ref of these ids; 0 under the mask
    candidate_mask: Array  # [N, n, C] bool
    position_mask: Array  # [N, n] bool
    continuation: Array  # [N, n-1] int, y_teacher, 0 past its end


def topk(logits: Array, k: int) -> tuple[Array, Array]:
    """The k largest logits, [..., V] -> ids and values [..., k], descending; of equals, the lower id."""
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :k]  # [..., V] -> [..., k]
    return ids, np.take_along_axis(logits, ids, axis=-1)


def candidates(teacher_logits: Array, base_logits: Array, k: int, mode: str) -> tuple[Array, Array, Array]:
    """C_K at each position: ids, the teacher's logits of these, and which of them count, each [..., C].

    Args:
        teacher_logits: [..., V], π_ref reading x_ic ⊕ x ⊕ y_teacher[:t].
        base_logits: [..., V], the base reading x ⊕ y_teacher[:t]: what it would say, and must fall.
        mode: `teacher`, the teacher's top K (the paper; C = K, and base_logits are not looked at), or `union`
            (ours; C = 2K): these first, then those of the base's top K that are new, by ascending id; the
            rest is padded with id 0, under the mask.
    """
    ids, _ = topk(teacher_logits, k)  # [..., K]
    mask = np.ones(ids.shape, dtype=bool)
    if mode == "union":
        base_ids, _ = topk(base_logits, k)  # [..., K]
        new_ids, new_mask = np.zeros_like(ids), np.zeros_like(mask)
        for place in np.ndindex(ids.shape[:-1]):
            new = sorted(set(base_ids[place].tolist()) - set(ids[place].tolist()))
            new_ids[place][: len(new)] = new
            new_mask[place][: len(new)] = True
        ids = np.concatenate([ids, new_ids], axis=-1)  # [..., K] -> [..., 2K]
        mask = np.concatenate([mask, new_mask], axis=-1)
    elif mode != "teacher":
        raise ValueError(f"candidates {mode!r}: expected teacher or union")
    return ids, np.where(mask, np.take_along_axis(teacher_logits, ids, axis=-1), 0.0), mask


def targets(
    teacher_logits: Array, base_logits: Array, continuations: Sequence[Sequence[int]], k: int, mode: str
) -> Targets:
    """Targets of N queries from the logits [N, n, V] of teacher and base at the supervised positions.

    Where a query has no such position (its continuation ended), all is 0 and masked, whatever the logits.
    """
    n = teacher_logits.shape[1]
    ids, logits, candidate_mask = candidates(teacher_logits, base_logits, k, mode)  # [N, n, C]
    supervised = np.array([len(words) + 1 for words in continuations])  # [N]
    position_mask = np.arange(n) < supervised[:, None]  # [N, n]
    candidate_mask = candidate_mask & position_mask[..., None]
    return Targets(
        np.where(candidate_mask, ids, 0),
        np.where(candidate_mask, logits, 0.0),
        candidate_mask,
        position_mask,
        pad(continuations, n - 1),
    )


def greedy(
    next_logits: Callable[[list[int]], Array],
    prompt: Sequence[int],
    max_tokens: int,
    stop: Collection[int] = (),
) -> list[int]:
    """y_teacher: the most probable token, again and again, at most max_tokens and cut before the end of turn.

    Args:
        next_logits: token ids -> logits [V] of the token after them.
    """
    words: list[int] = []
    while len(words) < max_tokens:
        ids, _ = topk(next_logits([*prompt, *words]), 1)
        if int(ids[0]) in stop:
            break
        words.append(int(ids[0]))
    return words


def context_of(query: Query, contexts: Sequence[Context], retain_context: str) -> Context | None:
    """The context in front of the teacher's query; None: the teacher is the base itself.

    A forget query has the one it names, or the first. Other queries take the contexts in turn by the hash of
    their id, so that the choice hangs on the query alone (`teacher`, the paper), or have none (`none`, ours).
    """
    if query.role == "forget":
        return next(c for c in contexts if query.context in (None, c.name))
    if retain_context == "none":
        return None
    return contexts[int(hashlib.sha256(query.id.encode()).hexdigest(), 16) % len(contexts)]
