"""The objective: Huber on the teacher's candidate logits (reference/README.md)."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Batch(NamedTuple):
    """What a training step reads: B queries along the teacher's continuation, with their targets."""

    tokens: mx.array  # [B, T] int32, the shared prefix left out, zeros on the right
    positions: mx.array  # [B, n] int32, indices into T
    ids: mx.array  # [B, n, C] int32
    logits: mx.array  # [B, n, C] float32
    candidate_mask: mx.array  # [B, n, C] bool
    position_mask: mx.array  # [B, n] bool
    hidden: mx.array | None = None  # [B, T, D], what comes into the first adapted layer, where those below are not run
    states: mx.array | None = None  # [B, n, D], hidden states of the frozen model, for methods that read them
    forget: int = 0  # how many rows, the first ones, are forget queries (methods with refusals: as many rows more)

    def rows(self, chosen: slice | mx.array, width: int | None = None) -> Batch:
        """These queries alone, the first `width` tokens of each; `forget` stays what it is of the whole batch."""
        few = {name: part[chosen] for name, part in self._asdict().items() if isinstance(part, mx.array)}
        return self._replace(**few | {name: few[name][:, :width] for name in ("tokens", "hidden") if name in few})


def topk_huber(
    student_logits: mx.array, targets, delta: float, center: bool = False, first_share: float = 0.0
) -> mx.array:
    """Each query's loss: Huber summed over its candidates, averaged over its supervised positions.

    Args:
        student_logits: [B, n, C], float32 or float64.
        targets: anything with `logits` and `candidate_mask` [B, n, C] and `position_mask` [B, n].
        delta: where the loss turns from quadratic to linear, in logits; inf gives half the squared error.
        center: compare the candidates less their mean at each position (ours: softmax ignores the level).
        first_share: 0, or what the first position counts in its query's loss, the others sharing the rest (ours).

    Returns:
        [B] losses. No gradient reaches masked candidates or positions.
    """
    mask = targets.candidate_mask & targets.position_mask[..., None]  # [B, n, C]
    target_logits = mx.stop_gradient(targets.logits)
    # Selected before the difference: a masked entry may hold anything, and 0 * inf is not 0.
    difference = mx.where(mask, student_logits, 0) - mx.where(mask, target_logits, 0)  # [B, n, C]
    if center:
        count = mx.maximum(mask.sum(axis=-1, keepdims=True), 1)
        difference = mx.where(mask, difference - difference.sum(axis=-1, keepdims=True) / count, 0)
    size = mx.abs(difference)
    quadratic = mx.minimum(size, delta)
    huber = quadratic * (size - 0.5 * quadratic)  # both branches in one: no inf - inf at delta = inf
    return (position_weights(targets.position_mask, first_share, huber.dtype) * huber.sum(axis=-1)).sum(axis=-1)


def position_weights(position_mask: mx.array, first_share: float, dtype: mx.Dtype = mx.float32) -> mx.array:
    """What each position counts in its query's loss, [B, n], 0 under the mask: 1/n_q, or by `first_share`."""
    mask = position_mask.astype(dtype)
    supervised = mx.maximum(mask.sum(axis=-1, keepdims=True), 1)  # [B, 1]
    if not first_share:
        return mask / supervised
    # A bare number in `where` would be rounded to float32 whatever the dtype.
    first = mx.where(supervised > 1, mx.array(first_share, dtype), mx.array(1, dtype)) * mask[:, :1]
    return mx.concatenate([first, (1 - first_share) * mask[:, 1:] / mx.maximum(supervised - 1, 1)], axis=-1)
