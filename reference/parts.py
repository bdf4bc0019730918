"""The parts of a decoder that have no trained weights: each with its backward, derived by hand.

Every part returns its output and a function `backward` that takes ∂L/∂output to ∂L/∂input, so the two stand
side by side and what one computed the other still sees. `by_x` is short for ∂L/∂x.

References:
  Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv 1910.07467).
  Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021 (arXiv 2104.09864).
  Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", 2023 (arXiv 2305.13245).
  Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Backward = Callable[[Array], Array]


def rms_norm(x: Array, weight: Array | None, epsilon: float) -> tuple[Array, Backward]:
    """y = w x / r with r = √(mean x² + ε), over the last axis, D wide. No weight: y = x.

    ∂r/∂x_j = x_j / (D r), so with u = w ∂L/∂y:
    ∂L/∂x_j = u_j / r - Σ_i u_i x_i / r² · ∂r/∂x_j = (u_j - x_j mean(u x) / r²) / r
    """
    if weight is None:
        return x, lambda by_y: by_y
    r = np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)  # [..., D] -> [..., 1]

    def backward(by_y: Array) -> Array:
        u = weight * by_y
        return (u - x * (u * x).mean(axis=-1, keepdims=True) / r**2) / r

    return weight * x / r, backward


def rope(x: Array, start: int, base: float, traditional: bool) -> tuple[Array, Backward]:
    """Turn pair i of the position s by the angle (start + s) · base^(-2i/D_h); x is [..., S, D_h].

    A rotation's transpose is the rotation by the opposite angle: so is its backward.
    """
    d_h = x.shape[-1]
    positions = np.arange(start, start + x.shape[-2])
    angles = positions[:, None] * base ** (-np.arange(0, d_h, 2) / d_h)  # [S, D_h/2]

    def rotate(pairs: Array, sign: int) -> Array:
        cos, sin = np.cos(angles), sign * np.sin(angles)
        turned = np.empty_like(pairs)
        halves = slice(0, d_h // 2), slice(d_h // 2, None)
        first, second = (slice(0, None, 2), slice(1, None, 2)) if traditional else halves
        turned[..., first] = pairs[..., first] * cos - pairs[..., second] * sin
        turned[..., second] = pairs[..., first] * sin + pairs[..., second] * cos
        return turned

    return rotate(x, 1), lambda by_y: rotate(by_y, -1)


def softcap(x: Array, cap: float | None) -> tuple[Array, Backward]:
    """y = cap · tanh(x / cap): about x near 0, and never beyond ±cap. ∂y/∂x = 1 - (y / cap)². None: y = x."""
    if cap is None:
        return x, lambda by_y: by_y
    y = cap * np.tanh(x / cap)
    return y, lambda by_y: by_y * (1 - (y / cap) ** 2)


def softmax(x: Array) -> tuple[Array, Backward]:
    """p_i = e^x_i / Σ_j e^x_j; ∂p_j/∂x_i = p_j (1[i = j] - p_i), so ∂L/∂x = p (∂L/∂p - Σ_j p_j ∂L/∂p_j)."""
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return p, lambda by_p: p * (by_p - (p * by_p).sum(axis=-1, keepdims=True))


def silu(z: Array) -> tuple[Array, Array]:
    """z σ(z), and its slope σ (1 + z (1 - σ)), as σ' = σ (1 - σ)."""
    sigmoid = 0.5 * (1 + np.tanh(0.5 * z))  # 1 / (1 + e^-z), without overflow
    return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


def gelu(z: Array) -> tuple[Array, Array]:
    """½ z (1 + tanh u) with u = √(2/π) (z + 0.044715 z³), as Gemma has it, and its slope by the product rule."""
    c = np.sqrt(2 / np.pi)
    t = np.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * c * (1 + 3 * 0.044715 * z**2)


def gated(
    gate: Array, up: Array, activation: Callable[[Array], tuple[Array, Array]]
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """y = activation(gate) · up: SwiGLU with silu, GeGLU with gelu. Gradients by gate and by up."""
    value, slope = activation(gate)
    return value * up, lambda by_y: (by_y * up * slope, by_y * value)


def behind(past: Array, x: Array) -> Array:
    """Keys or values [B, H_kv, S, D_h] behind those of the past, [B, H_kv, P, D_h] or one row for all B."""
    return np.concatenate([np.broadcast_to(past, (len(x), *past.shape[1:])), x], axis=2)


def attend(
    queries: Array, keys: Array, values: Array, scale: float, cap: float | None
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Causal attention of the last S positions on all P+S: softmax(cap(scale · q kᵀ)) v, head by head.

    H/H_kv query heads share one head of keys and values, so the gradients of the shared ones add up.
    With a = scale · q kᵀ and p the softmax, o = p v:

        ∂L/∂v = pᵀ ∂L/∂o     ∂L/∂p = ∂L/∂o vᵀ     ∂L/∂q = scale · ∂L/∂a k     ∂L/∂k = scale · (∂L/∂a)ᵀ q

    Args:
        queries: [B, H, S, D_h]; keys, values: [B, H_kv, P+S, D_h].
    """
    share = queries.shape[1] // keys.shape[1]
    k, v = np.repeat(keys, share, axis=1), np.repeat(values, share, axis=1)  # H_kv -> H
    past = keys.shape[2] - queries.shape[2]  # P
    visible = np.arange(k.shape[2]) <= past + np.arange(queries.shape[2])[:, None]  # [S, P+S]
    capped, cap_backward = softcap(scale * queries @ k.swapaxes(-1, -2), cap)  # [B, H, S, P+S]
    p, softmax_backward = softmax(np.where(visible, capped, -np.inf))

    def unshare(by_repeated: Array) -> Array:  # [B, H, P+S, D_h] -> [B, H_kv, P+S, D_h]
        return by_repeated.reshape(len(keys), -1, share, *keys.shape[2:]).sum(axis=2)

    def backward(by_o: Array) -> tuple[Array, Array, Array]:
        by_v = p.swapaxes(-1, -2) @ by_o
        by_scores = scale * cap_backward(softmax_backward(by_o @ v.swapaxes(-1, -2)))  # [B, H, S, P+S]
        return by_scores @ k, unshare(by_scores.swapaxes(-1, -2) @ queries), unshare(by_v)

    return p @ v, backward


def split(x: Array, heads: int) -> Array:
    """[B, S, H·D_h] -> [B, H, S, D_h]. Its transpose is `merge`."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def merge(x: Array) -> Array:
    """[B, H, S, D_h] -> [B, S, H·D_h]. Its transpose is `split`."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
