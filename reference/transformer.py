"""A Llama-family decoder, forward and backward by hand; the base is frozen, only LoRA factors have gradients.

As in parts.py, each function returns its output and its backward. The gradients of LoRA factors are put in the
dictionary `gradients` on the way, by mlx-lm's names.

Which options a model has is read off its weights, by mlx-lm's names for them: a `bias` beside a `weight`, a
`q_norm` and `k_norm` in the attention, norms behind attention and MLP, an `lm_head` or (tied) none. The rest is
in `Config`.

References:
  Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023 (arXiv 2302.13971).
  Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size", 2024 (arXiv 2408.00118).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference import lora, parts
from reference.parts import Backward
from reference.quantize import Packed, dequantize

Array = NDArray[Any]
Tree = dict[str, Array]
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
    residual_scale: float = 1.0  # of what attention and MLP add (Granite)
    logit_scale: float = 1.0  # multiplies; mlx-lm's Granite divides by its own
    norm_offset: float = 0.0  # Gemma stores the weights of its norms less 1
    activation: Callable[[Array], tuple[Array, Array]] = parts.silu  # Gemma: parts.gelu


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


def norm(model: Model, name: str, x: Array) -> tuple[Array, Backward]:
    """RMSNorm with the weight of this name; x itself where the model has no such norm."""
    weight = model.weights.get(f"{name}.weight")
    return parts.rms_norm(x, None if weight is None else model.config.norm_offset + weight, model.config.epsilon)


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
    c = model.config
    start = 0 if past is None else past[0].shape[2]  # P

    def head_vectors(part: str, heads: int) -> tuple[Array, Backward]:  # [B, S, D] -> [B, H, S, D_h]
        y, linear_back = linear(model, f"{name}.{part}_proj", x, gradients)
        y, norm_back = norm(model, f"{name}.{part}_norm", parts.split(y, heads))
        if part == "v":  # has neither norm nor position
            return y, lambda by_y: linear_back(parts.merge(by_y))
        y, rope_back = parts.rope(y, start, c.rope_base, c.rope_traditional)
        return y, lambda by_y: linear_back(parts.merge(norm_back(rope_back(by_y))))

    q, q_back = head_vectors("q", c.heads)
    k, k_back = head_vectors("k", c.kv_heads)
    v, v_back = head_vectors("v", c.kv_heads)
    if past is not None:
        k, v = parts.behind(past[0], k), parts.behind(past[1], v)  # S -> P+S
    scale = q.shape[-1] ** -0.5 if c.attention_scale is None else c.attention_scale
    o, attend_back = parts.attend(q, k, v, scale, c.attention_softcap)
    y, output_back = linear(model, f"{name}.o_proj", parts.merge(o), gradients)

    def backward(by_y: Array, by_later: KeysValues | None) -> tuple[Array, KeysValues]:
        by_q, by_k, by_v = attend_back(parts.split(output_back(by_y), c.heads))
        if by_later is not None:
            by_k, by_v = by_k + by_later[0], by_v + by_later[1]
        by_x = q_back(by_q) + k_back(by_k[:, :, start:]) + v_back(by_v[:, :, start:])
        return by_x, (by_k[:, :, :start], by_v[:, :, :start])

    return y, (k, v), backward


def mlp(model: Model, name: str, x: Array, gradients: Tree) -> tuple[Array, Backward]:
    """down(activation(gate(x)) · up(x)), the activation silu or gelu."""
    gate, gate_back = linear(model, f"{name}.gate_proj", x, gradients)
    up, up_back = linear(model, f"{name}.up_proj", x, gradients)
    hidden, gated_back = parts.gated(gate, up, model.config.activation)
    y, down_back = linear(model, f"{name}.down_proj", hidden, gradients)

    def backward(by_y: Array) -> Array:
        by_gate, by_up = gated_back(down_back(by_y))
        return gate_back(by_gate) + up_back(by_up)

    return y, backward


def block(
    model: Model, name: str, x: Array, past: KeysValues | None, gradients: Tree
) -> tuple[Array, KeysValues, LayerBackward]:
    """h = x + attention(norm(x)); y = h + mlp(norm(h)). Backwards, a sum hands its gradient to both terms.

    Gemma 2 has a norm behind each of the two as well, and calls `post_attention` what stands there; in Llama that
    is the name of the norm before the MLP.
    """
    scale, behind, before, after = model.config.residual_scale, "no", "post_attention", "no"
    if f"{name}.pre_feedforward_layernorm.weight" in model.weights:
        behind, before, after = "post_attention", "pre_feedforward", "post_feedforward"
    normed, norm_back = norm(model, f"{name}.input_layernorm", x)
    attended, cache, attention_back = attention(model, f"{name}.self_attn", normed, past, gradients)
    attended, behind_back = norm(model, f"{name}.{behind}_layernorm", attended)
    h = x + scale * attended
    normed, before_back = norm(model, f"{name}.{before}_layernorm", h)
    y, mlp_back = mlp(model, f"{name}.mlp", normed, gradients)
    y, after_back = norm(model, f"{name}.{after}_layernorm", y)

    def backward(by_y: Array, by_later: KeysValues | None) -> tuple[Array, KeysValues]:
        by_h = by_y + before_back(mlp_back(after_back(scale * by_y)))
        by_normed, by_past = attention_back(behind_back(scale * by_h), by_later)
        return by_h + norm_back(by_normed), by_past

    return h + scale * y, cache, backward


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
    x, norm_back = norm(model, "model.norm", x)
    if "lm_head.weight" in w:
        logits, head_back = linear(model, "lm_head", x, gradients)  # [B, S, D] -> [B, S, V]
    else:
        embedding = w["model.embed_tokens.weight"]  # [V, D], tied
        logits, head_back = x @ embedding.T, lambda by_y: by_y @ embedding
    logits, cap_back = parts.softcap(c.logit_scale * logits, c.logit_softcap)

    def backward(by_logits: Array, by_later: list[KeysValues] | None = None) -> tuple[Tree, list[KeysValues]]:
        by_cache = layers_back(norm_back(head_back(c.logit_scale * cap_back(by_logits))), by_later)
        return gradients, by_cache

    return logits, filled, backward
