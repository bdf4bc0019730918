"""A Llama-family decoder, forward and backward by hand; the base is frozen, only LoRA factors have gradients.

Every part returns its output and a function `backward` that takes ∂L/∂output to ∂L/∂input, so the two stand
side by side and what one computed the other still sees. `by_x` is short for ∂L/∂x. The gradients of LoRA
factors are put in the dictionary `gradients` on the way, by mlx-lm's names.

Which options a model has is read off its weights, by mlx-lm's names for them: a `bias` beside a `weight`, a
`q_norm` and `k_norm` in the attention, an `lm_head` or (tied) none. The rest is in `Config`.

References:
  Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023 (arXiv 2302.13971).
  Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv 1910.07467).
  Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021 (arXiv 2104.09864).
  Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", 2023 (arXiv 2305.13245).
  Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference import lora
from reference.quantize import Packed, dequantize

Array = NDArray[Any]
Tree = dict[str, Array]
Backward = Callable[[Array], Array]
KeysValues = tuple[Array, Array]  # of one layer, [B, H_kv, S, D_h] each, RoPE already in the keys
LayerBackward = Callable[[Array, KeysValues | None], tuple[Array, KeysValues]]


class Config(NamedTuple):
    """What the shapes of the weights do not tell."""

    heads: int
    kv_heads: int
    rope_base: float = 10000.0
    rope_traditional: bool = False  # pairs (0, 1), (2, 3), …; else (0, D_h/2), (1, D_h/2 + 1), …
    epsilon: float = 1e-5
    attention_scale: float | None = None  # None: 1/√D_h
    attention_softcap: float | None = None  # None: no soft-capping
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0  # multiplies; mlx-lm's Granite divides by its own


class Model(NamedTuple):
    """Frozen weights by mlx-lm's names, and a LoRA for each adapted linear layer, by that layer's name."""

    config: Config
    weights: Tree
    adapters: dict[str, lora.LoRA] = {}


def dense(weights: dict[str, Array | Packed]) -> Tree:
    """Weights as float64; packed ones by way of their scales' dtype, so they are the numbers MLX has."""
    return {
        name: (dequantize(*weight) if isinstance(weight, Packed) else weight).astype(np.float64)
        for name, weight in weights.items()
    }


# --- the parts ----------------------------------------------------------------------------------------------


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


def swiglu(gate: Array, up: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """y = silu(gate) · up with silu(z) = z σ(z); silu' = σ (1 + z (1 - σ)), as σ' = σ (1 - σ)."""
    sigmoid = 0.5 * (1 + np.tanh(0.5 * gate))  # 1 / (1 + e^-z), without overflow
    silu = gate * sigmoid

    def backward(by_y: Array) -> tuple[Array, Array]:
        return by_y * up * sigmoid * (1 + gate * (1 - sigmoid)), by_y * silu

    return silu * up, backward


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


# --- the layers ---------------------------------------------------------------------------------------------


def linear(model: Model, name: str, x: Array, gradients: Tree) -> tuple[Array, Backward]:
    """W x + s·B(A x) + bias, whichever of these the layer has (lora.py has the derivation)."""
    weight, adapter = model.weights[f"{name}.weight"], model.adapters.get(name)
    y = lora.forward(x, weight, adapter) + model.weights.get(f"{name}.bias", 0.0)

    def backward(by_y: Array) -> Array:
        by_x, by_a, by_b = lora.backward(by_y, x, weight, adapter)
        if by_a is not None and by_b is not None:
            gradients[f"{name}.lora_a"], gradients[f"{name}.lora_b"] = by_a, by_b
        return by_x

    return y, backward


def attention(
    model: Model, name: str, x: Array, past: KeysValues | None, gradients: Tree
) -> tuple[Array, KeysValues, LayerBackward]:
    """Queries, keys and values of x [B, S, D], turned by RoPE, attending to the past and to themselves.

    Args:
        past: keys and values of P earlier positions, or None for none.

    Returns:
        [B, S, D]; keys and values of all P+S positions; `backward`, which besides ∂L/∂output takes the
        gradient that later tokens sent to these keys and values, and besides by_x gives that of the past's.
    """
    c, w = model.config, model.weights
    start = 0 if past is None else past[0].shape[2]  # P

    def head_vectors(part: str, heads: int) -> tuple[Array, Backward]:  # [B, S, D] -> [B, H, S, D_h]
        y, linear_back = linear(model, f"{name}.{part}_proj", x, gradients)
        y, norm_back = rms_norm(split(y, heads), w.get(f"{name}.{part}_norm.weight"), c.epsilon)
        if part == "v":  # has neither norm nor position
            return y, lambda by_y: linear_back(merge(by_y))
        y, rope_back = rope(y, start, c.rope_base, c.rope_traditional)
        return y, lambda by_y: linear_back(merge(norm_back(rope_back(by_y))))

    q, q_back = head_vectors("q", c.heads)
    k, k_back = head_vectors("k", c.kv_heads)
    v, v_back = head_vectors("v", c.kv_heads)
    if past is not None:
        k, v = behind(past[0], k), behind(past[1], v)  # S -> P+S
    scale = q.shape[-1] ** -0.5 if c.attention_scale is None else c.attention_scale
    o, attend_back = attend(q, k, v, scale, c.attention_softcap)
    y, output_back = linear(model, f"{name}.o_proj", merge(o), gradients)

    def backward(by_y: Array, by_later: KeysValues | None) -> tuple[Array, KeysValues]:
        by_q, by_k, by_v = attend_back(split(output_back(by_y), c.heads))
        if by_later is not None:
            by_k, by_v = by_k + by_later[0], by_v + by_later[1]
        by_x = q_back(by_q) + k_back(by_k[:, :, start:]) + v_back(by_v[:, :, start:])
        return by_x, (by_k[:, :, :start], by_v[:, :, :start])

    return y, (k, v), backward


def mlp(model: Model, name: str, x: Array, gradients: Tree) -> tuple[Array, Backward]:
    """down(silu(gate(x)) · up(x))."""
    gate, gate_back = linear(model, f"{name}.gate_proj", x, gradients)
    up, up_back = linear(model, f"{name}.up_proj", x, gradients)
    hidden, swiglu_back = swiglu(gate, up)
    y, down_back = linear(model, f"{name}.down_proj", hidden, gradients)

    def backward(by_y: Array) -> Array:
        by_gate, by_up = swiglu_back(down_back(by_y))
        return gate_back(by_gate) + up_back(by_up)

    return y, backward


def block(
    model: Model, name: str, x: Array, past: KeysValues | None, gradients: Tree
) -> tuple[Array, KeysValues, LayerBackward]:
    """h = x + attention(norm(x)); y = h + mlp(norm(h)). Backwards, a sum hands its gradient to both terms."""
    w, epsilon = model.weights, model.config.epsilon
    normed, norm_back = rms_norm(x, w[f"{name}.input_layernorm.weight"], epsilon)
    attended, cache, attention_back = attention(model, f"{name}.self_attn", normed, past, gradients)
    h = x + attended
    normed, mlp_norm_back = rms_norm(h, w[f"{name}.post_attention_layernorm.weight"], epsilon)
    y, mlp_back = mlp(model, f"{name}.mlp", normed, gradients)

    def backward(by_y: Array, by_later: KeysValues | None) -> tuple[Array, KeysValues]:
        by_h = by_y + mlp_norm_back(mlp_back(by_y))
        by_attention, by_past = attention_back(by_h, by_later)
        return by_h + norm_back(by_attention), by_past

    return h + y, cache, backward


# --- the model ----------------------------------------------------------------------------------------------


def hidden_states(
    model: Model, tokens: Array, gradients: Tree, cache: list[KeysValues] | None = None, count: int | None = None
) -> tuple[Array, list[KeysValues], Callable[..., list[KeysValues]]]:
    """What the first `count` layers (None: all) make of tokens [B, S]: [B, S, D], before the last norm.

    A loss on hidden states (RMU) starts its backward here, and so the layers above get no gradient.

    Args:
        cache: of the P tokens before these, layer by layer; one row serves the whole batch.

    Returns:
        [B, S, D]; the cache with these tokens in it; `backward(by_x, by_later=None)`, which gives the gradient
        of the cache that came in (see `forward`).
    """
    x = model.config.embedding_scale * model.weights["model.embed_tokens.weight"][tokens]  # [B, S] -> [B, S, D]
    blocks: list[LayerBackward] = []
    filled: list[KeysValues] = []
    while len(blocks) != count and f"model.layers.{len(blocks)}.input_layernorm.weight" in model.weights:
        past = None if cache is None else cache[len(blocks)]
        x, keys_values, block_back = block(model, f"model.layers.{len(blocks)}", x, past, gradients)
        blocks.append(block_back)
        filled.append(keys_values)

    def backward(by_x: Array, by_later: list[KeysValues] | None = None) -> list[KeysValues]:
        by_cache = []
        for layer, block_back in reversed(list(enumerate(blocks))):
            by_x, by_past = block_back(by_x, None if by_later is None else by_later[layer])
            by_cache.append(by_past)
        return by_cache[::-1]

    return x, filled, backward


def forward(
    model: Model, tokens: Array, cache: list[KeysValues] | None = None
) -> tuple[Array, list[KeysValues], Callable[..., tuple[Tree, list[KeysValues]]]]:
    """Logits [B, S, V] of tokens [B, S], the cache with them in it, and `backward`.

    Returns:
        `backward(by_logits [B, S, V], by_later=None)` gives the gradients of all LoRA factors, by name, and
        of the cache that came in. To go on through that cache: pass the latter on as `by_later` (summed over
        the batch if one row served all) to the backward of the call that made it, and add up the former.
    """
    c, w, gradients = model.config, model.weights, Tree()
    x, filled, layers_back = hidden_states(model, tokens, gradients, cache)
    x, norm_back = rms_norm(x, w["model.norm.weight"], c.epsilon)
    if "lm_head.weight" in w:
        logits, head_back = linear(model, "lm_head", x, gradients)  # [B, S, D] -> [B, S, V]
    else:
        embedding = w["model.embed_tokens.weight"]  # [V, D], tied
        logits, head_back = x @ embedding.T, lambda by_y: by_y @ embedding
    logits, cap_back = softcap(c.logit_scale * logits, c.logit_softcap)

    def backward(by_logits: Array, by_later: list[KeysValues] | None = None) -> tuple[Tree, list[KeysValues]]:
        by_cache = layers_back(norm_back(head_back(c.logit_scale * cap_back(by_logits))), by_later)
        return gradients, by_cache

    return logits, filled, backward
