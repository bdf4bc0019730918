"""The objective, one for forgetting and retention: Huber on raw candidate logits. Baselines: baselines.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.teacher import Targets

Array = NDArray[Any]


def huber(difference: Array, delta: float) -> tuple[Array, Array]:
    """ℓ(d), and its derivative, of the same shape.

    ℓ(d) = ½ d²            if |d| ≤ δ        ℓ'(d) = d
           δ (|d| - ½ δ)   otherwise         ℓ'(d) = δ sign(d)        so ℓ' = clip(d, -δ, δ)
    """
    size = np.abs(difference)
    value = np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
    return value, np.clip(difference, -delta, delta)


def topk_huber(
    student_logits: Array, targets: Targets, delta: float, center: bool = False, first_share: float = 0.0
) -> tuple[Array, Array]:
    """Each query's loss, and the gradient of the batch's mean by the student's logits.

    With d = g_θ - g_ref at the candidates of a query's supervised positions, and n_q their number:

        L_q = (1/n_q) Σ_t Σ_i ℓ(d_ti)       L = (1/B) Σ_q L_q       ∂L/∂g_ti = ℓ'(d_ti) / (B n_q)

    `center` (ours) takes each position's mean over its c valid candidates out of d, since a level common to
    all logits changes no probability: d̃_i = d_i - (1/c) Σ_j d_j, so ∂d̃_j/∂g_i = 1[i = j] - 1/c, and

        ∂L/∂g_ti = (ℓ'(d̃_ti) - (1/c) Σ_j ℓ'(d̃_tj)) / (B n_q)

    `first_share` s (ours) puts weights w_t in the place of 1/n_q: s at the first position, where the answer is
    chosen, (1 - s)/(n_q - 1) at each other. 0 leaves 1/n_q, the paper's n = 1 is the same under any s.

    Args:
        student_logits: [B, n, C], g_θ of `targets.ids`.
        targets: logits and candidate_mask [B, n, C], position_mask [B, n]; masked entries may hold anything.
        delta: δ > 0 in logits; inf gives half the squared error.
        first_share: 0, or 0 < s < 1.

    Returns:
        losses [B], gradient [B, n, C] (0 under the masks).
    """
    mask = targets.candidate_mask & targets.position_mask[..., None]  # [B, n, C]
    # Selected before the difference: off the mask there may stand anything, and 0 * nan is not 0.
    difference = np.where(mask, student_logits, 0.0) - np.where(mask, targets.logits, 0.0)  # [B, n, C]
    if center:
        difference = without_mean(difference, mask)
    value, slope = huber(difference, delta)  # 0 under the mask, both
    if center:
        slope = without_mean(slope, mask)
    weights = position_weights(targets.position_mask, first_share)  # [B, n]
    losses = (weights * value.sum(axis=-1)).sum(axis=-1)  # [B, n, C] -> [B]
    return losses, weights[..., None] * slope / len(losses)


def position_weights(position_mask: Array, first_share: float) -> Array:
    """w [B, n]: each row's share of its query's loss, 0 where position_mask [B, n] is; a row sums to 1."""
    supervised = np.maximum(position_mask.sum(axis=-1, keepdims=True), 1)  # [B, 1]
    weights = position_mask / supervised
    if first_share:
        weights = (1 - first_share) * position_mask / np.maximum(supervised - 1, 1)
        weights[:, 0] = np.where(supervised[:, 0] > 1, first_share, 1) * position_mask[:, 0]
    return weights


def without_mean(values: Array, mask: Array) -> Array:
    """Values [..., C], less their mean over the valid ones; 0 elsewhere. It is its own transpose."""
    count = np.maximum(mask.sum(axis=-1, keepdims=True), 1)  # [..., 1]
    return np.where(mask, values - values.sum(axis=-1, keepdims=True, where=mask) / count, 0.0)
