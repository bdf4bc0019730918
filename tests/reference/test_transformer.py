"""The decoder: forward against mlx-lm's models, backward by finite differences and against MLX's autodiff."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import gemma2, granite, llama, qwen2, qwen3
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import dequantize_model

from reference import baselines, lora, parts
from reference import transformer as ref
from reference.quantize import Packed
from tests.equivalence.tiny import shared
from tests.reference.exact_float64 import exact_float64
from tests.reference.finite_differences import STEP, assert_gradient, numerical_slope, rounding

# The legend's sizes; 4 query heads share 2 heads of keys and values.
D, H, H_KV, V = 32, 4, 2, 11
SIZES = dict(
    hidden_size=D, num_hidden_layers=2, intermediate_size=32, num_attention_heads=H, rms_norm_eps=1e-5,
    vocab_size=V, num_key_value_heads=H_KV, max_position_embeddings=64, model_type="tiny",
)  # fmt: skip
LINEARS = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
ROUNDING = 1e-12  # some thousand operations of relative error 1.1e-16 on numbers near 1, with room to spare


def families() -> dict[str, tuple[Any, dict[str, Any], ref.Config]]:
    """Model class, its own arguments, and the reference's configuration of the same thing."""
    plain = ref.Config(H, H_KV)
    scales = dict(logits_scaling=4.0, attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.4)
    of_granite = scales | dict(attention_bias=True, mlp_bias=True, rope_theta=1e4)
    return {
        "llama": (llama, {}, plain),
        "llama, traditional RoPE, untied": (
            llama,
            dict(rope_traditional=True, tie_word_embeddings=False, rope_theta=500.0),
            plain._replace(rope_traditional=True, rope_base=500.0),
        ),
        "llama, biases": (llama, dict(attention_bias=True, mlp_bias=True), plain),
        "qwen2, biases of q, k, v": (qwen2, {}, plain._replace(rope_base=1e6)),
        "qwen3, q and k norm, wide heads": (
            qwen3,
            dict(head_dim=16, tie_word_embeddings=False, rope_theta=1e4),
            plain,
        ),
        "granite, scales": (
            granite,
            of_granite,
            plain._replace(attention_scale=0.2, embedding_scale=3.0, logit_scale=0.25, residual_scale=0.4),
        ),
        "gemma2": (
            gemma2,
            dict(head_dim=8, query_pre_attn_scalar=4.0, attn_logit_softcapping=0.7, final_logit_softcapping=1.5),
            plain._replace(
                attention_scale=0.5,
                attention_softcap=0.7,
                logit_softcap=1.5,
                embedding_scale=D**0.5,
                norm_offset=1.0,
                activation=parts.gelu,
            ),
        ),
    }


every_family = pytest.mark.parametrize("family", list(families()))


def as_float64(rng: np.random.Generator, like: mx.array, offset: float = 0.0) -> mx.array:
    """Norm weights (with their offset) and biases near 1, other weights of a size that keeps activations near 1."""
    values = rng.normal(size=like.shape)
    values = 1 - offset + 0.1 * values if like.ndim == 1 else values / np.sqrt(like.shape[-1]) * 1.5
    return mx.array(values, dtype=mx.float64)


def twins(family: str, seed: int, rank: int = 2) -> tuple[nn.Module, ref.Model]:
    """An mlx-lm model in float64 with LoRA (B not 0) on all its linear layers, and the reference's copy."""
    module, options, config = families()[family]
    rng = np.random.default_rng(seed)
    model = module.Model(module.ModelArgs.from_dict(SIZES | options))
    with mx.stream(mx.cpu):
        model.update(tree_map(lambda a: as_float64(rng, a, config.norm_offset), model.parameters()))
        weights = {name: np.array(a) for name, a in tree_flatten(model.parameters())}
        keys = LINEARS + ["lm_head"] * ("lm_head.weight" in weights)
        model.freeze()
        linear_to_lora_layers(model, -1, {"rank": rank, "scale": 0.7, "dropout": 0.0, "keys": set(keys)})
        model.update(tree_map(lambda a: as_float64(rng, a), model.trainable_parameters()))
        arrays = {name: np.array(a) for name, a in tree_flatten(model.trainable_parameters())}
    names = {name.rsplit(".", 1)[0] for name in arrays}
    adapters = {k: lora.LoRA(arrays[f"{k}.lora_a"], arrays[f"{k}.lora_b"], 0.7) for k in sorted(names)}
    assert len(adapters) == len(LINEARS) * 2 + ("lm_head.weight" in weights)
    return model, ref.Model(config, weights, adapters)


@every_family
@given(seed=st.integers(0, 2**32), size=st.tuples(st.integers(1, 3), st.integers(1, 6)))
@shared(len(families()))
def test_logits_are_mlx_lms(family: str, seed: int, size: tuple[int, int]) -> None:
    theirs, ours = twins(family, seed)
    tokens = np.random.default_rng(seed).integers(V, size=size)
    logits, _, _ = ref.forward(ours, tokens)
    with exact_float64():
        expected = np.array(theirs(mx.array(tokens)))
    assert expected.dtype == np.float64
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


@every_family
@given(seed=st.integers(0, 2**32), cut=st.integers(1, 4))
@shared(len(families()))
def test_logits_after_a_cache_are_mlx_lms(family: str, seed: int, cut: int) -> None:
    theirs, ours = twins(family, seed)
    tokens = np.random.default_rng(seed).integers(V, size=(2, 5))
    _, cache, _ = ref.forward(ours, tokens[:, :cut])
    logits, _, _ = ref.forward(ours, tokens[:, cut:], cache)
    with exact_float64():
        cache = make_prompt_cache(theirs)
        theirs(mx.array(tokens[:, :cut]), cache=cache)
        expected = np.array(theirs(mx.array(tokens[:, cut:]), cache=cache))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


@every_family
@given(seed=st.integers(0, 2**32))
@shared(len(families()))
def test_gradients_are_those_of_mlxs_autodiff(family: str, seed: int) -> None:
    theirs, ours = twins(family, seed)
    rng = np.random.default_rng(seed)
    tokens, by_logits = rng.integers(V, size=(2, 4)), rng.normal(size=(2, 4, V))
    gradients, _ = ref.forward(ours, tokens)[2](by_logits)
    with exact_float64():
        theirs.train()

        def loss(model: nn.Module) -> mx.array:
            return (model(mx.array(tokens)) * mx.array(by_logits, dtype=mx.float64)).sum()

        _, expected = nn.value_and_grad(theirs, loss)(theirs)
        expected = {name: np.array(a) for name, a in tree_flatten(expected)}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        atol = 10 * ROUNDING * np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=atol, err_msg=name)


def loss_of(model: ref.Model, tokens: np.ndarray, by_logits: np.ndarray):
    """A loss whose gradient by the logits is `by_logits`, as a function of the adapters' arrays."""

    def value(arrays: dict[str, np.ndarray]) -> float:
        moved = model._replace(adapters=lora.updated(model.adapters, arrays))
        return float((ref.forward(moved, tokens)[0] * by_logits).sum())

    return value


def assert_slopes(value: Any, arrays: dict[str, np.ndarray], gradients: dict[str, np.ndarray], rng: Any) -> None:
    """Finite differences of `value` along a random direction in each array; without a gradient, the slope is 0."""
    for name, array in arrays.items():
        direction = rng.normal(size=array.shape)
        direction /= np.linalg.norm(direction)

        def along(step: float, name: str = name, direction: np.ndarray = direction) -> float:
            return value(arrays | {name: arrays[name] + step * direction})

        gradient, step = gradients.get(name, np.zeros_like(array)), STEP / 4
        error = abs(numerical_slope(along, step) - (gradient * direction).sum())
        assert error <= 1e-6 * np.linalg.norm(gradient) + rounding(along(0.0), step), name


@every_family
@given(seed=st.integers(0, 2**32))
@settings(max_examples=5)
def test_the_gradient_of_each_array_agrees_with_finite_differences(family: str, seed: int) -> None:
    """Along a random direction in each array: a fault of any entry shows."""
    _, model = twins(family, seed, rank=1)
    rng = np.random.default_rng(seed)
    tokens, by_logits = rng.permutation(V)[None, :3], rng.normal(size=(1, 3, V))  # equal tokens: slope 0
    gradients, _ = ref.forward(model, tokens)[2](by_logits)
    arrays = lora.parameters(model.adapters)
    assert gradients.keys() == arrays.keys()
    assert_slopes(loss_of(model, tokens, by_logits), arrays, gradients, rng)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=10)
def test_every_entry_of_a_small_models_gradient_agrees_with_finite_differences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d, shapes = 4, {}
    for part, (d_out, d_in) in zip(LINEARS, [(4, d), (2, d), (2, d), (d, 4), (3, d), (3, d), (d, 3)], strict=True):
        shapes[f"model.layers.0.{part}"] = (d_out, d_in)
    weights = {f"{name}.weight": rng.normal(size=shape) / 2 for name, shape in shapes.items()}
    weights |= {f"{name}.weight": rng.normal(size=d) for name in ("model.norm", "model.layers.0.input_layernorm")} | {
        "model.layers.0.post_attention_layernorm.weight": rng.normal(size=d),
        "model.embed_tokens.weight": rng.normal(size=(5, d)),
    }
    adapters = {
        name: lora.LoRA(rng.normal(size=(d_in, 1)) / 2, rng.normal(size=(1, d_out)) / 2, 0.5)
        for name, (d_out, d_in) in shapes.items()
    }
    config = ref.Config(2, 1, rope_traditional=bool(seed % 2), attention_softcap=2.0, epsilon=0.1)
    model = ref.Model(config, weights, adapters)
    tokens = np.stack([rng.permutation(5)[:3] for _ in range(2)])
    by_logits = rng.normal(size=(2, 3, 5))
    gradients, _ = ref.forward(model, tokens)[2](by_logits)
    arrays, value = lora.parameters(adapters), loss_of(model, tokens, by_logits)
    for name, array in arrays.items():
        assert_gradient(lambda a, name=name: value(arrays | {name: a}), array, gradients[name])


@every_family
def test_a_loss_on_hidden_states_reaches_the_layers_below_and_none_above(family: str) -> None:
    """RMU behind layer 0: its gradient by each array agrees with finite differences, the state is mlx-lm's."""
    theirs, model = twins(family, 3, rank=1)
    rng = np.random.default_rng(3)
    forget, retain = (rng.permutation(V)[None, :4] for _ in range(2))
    mask = np.ones((1, 4), dtype=bool)
    constants = rng.normal(size=(1, 4, D)), mask, baselines.rmu_direction(D, 0)

    def states(arrays: dict[str, np.ndarray], tokens: np.ndarray, gradients: dict) -> tuple:
        moved = model._replace(adapters=lora.updated(model.adapters, arrays))
        return ref.hidden_states(moved, tokens, gradients, count=1)

    def value(arrays: dict[str, np.ndarray]) -> tuple:
        of_forget, of_retain = (states(arrays, tokens, {})[0] for tokens in (forget, retain))
        return baselines.rmu(of_forget, mask, of_retain, *constants, alpha=3.0)

    arrays, found = lora.parameters(model.adapters), []
    _, *by_states = value(arrays)
    for tokens, by_state in zip((forget, retain), by_states, strict=True):
        gradients: dict[str, np.ndarray] = {}
        states(arrays, tokens, gradients)[2](by_state)
        found.append(gradients)
    assert found[0].keys() == {name for name in arrays if name.startswith("model.layers.0.")}
    total = {name: found[0][name] + found[1][name] for name in found[0]}
    assert_slopes(lambda moved: value(moved)[0], arrays, total, rng)

    with exact_float64():
        layer, embedded = theirs.layers[0], theirs.model.embed_tokens(mx.array(forget))
        causal = mx.arange(4)[None] <= mx.arange(4)[:, None]
        expected = np.array(layer(model.config.embedding_scale * embedded, causal))
    state = states(arrays, forget, {})[0]
    np.testing.assert_allclose(state, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


def test_a_layer_without_lora_is_one_whose_b_is_zero_and_has_no_gradient() -> None:
    _, model = twins("llama", 0)
    dropped = [f"model.layers.0.{part}" for part in LINEARS[::2]]
    zero = {k: a._replace(b=0 * a.b) if k in dropped else a for k, a in model.adapters.items()}
    fewer = {k: a for k, a in model.adapters.items() if k not in dropped}
    rng = np.random.default_rng(0)
    tokens, by_logits = rng.integers(V, size=(2, 3)), rng.normal(size=(2, 3, V))
    expected, _ = ref.forward(model._replace(adapters=zero), tokens)[2](by_logits)
    gradients, _ = ref.forward(model._replace(adapters=fewer), tokens)[2](by_logits)
    assert gradients.keys() == lora.parameters(fewer).keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=ROUNDING * np.abs(gradient).max())


# --- the cache ----------------------------------------------------------------------------------------------


@every_family
def test_tokens_behind_a_shared_prefix_have_the_logits_and_gradients_of_the_whole(family: str) -> None:
    """The prefix is run once, as one row; gradients through it are those of running it in every row."""
    _, model = twins(family, 0)
    rng = np.random.default_rng(1)
    prefix, rest = rng.integers(V, size=(1, 3)), rng.integers(V, size=(2, 4))
    by_logits = rng.normal(size=(2, 4, V))
    whole = np.concatenate([np.repeat(prefix, 2, axis=0), rest], axis=1)
    logits, _, backward = ref.forward(model, whole)
    expected, nothing = backward(np.concatenate([np.zeros((2, 3, V)), by_logits], axis=1))
    assert all(part.size == 0 for keys_values in nothing for part in keys_values)

    _, cache, prefix_backward = ref.forward(model, prefix)
    split_logits, _, rest_backward = ref.forward(model, rest, cache)
    np.testing.assert_allclose(split_logits, logits[:, 3:], rtol=0, atol=ROUNDING * np.abs(logits).max())
    behind, by_cache = rest_backward(by_logits)
    by_cache = [tuple(part.sum(axis=0, keepdims=True) for part in layer) for layer in by_cache]
    through, _ = prefix_backward(np.zeros((1, 3, V)), by_cache)
    stopped = 0.0
    for name, gradient in expected.items():
        largest = np.abs(gradient).max()
        np.testing.assert_allclose(behind[name] + through[name], gradient, rtol=0, atol=10 * ROUNDING * largest)
        stopped = max(stopped, np.abs(behind[name] - gradient).max() / largest)
    assert stopped > 0.1  # a gradient stopped at the cache would be another gradient


@given(seed=st.integers(0, 2**32))
@settings(max_examples=10)
def test_padding_on_the_right_changes_no_logit(seed: int) -> None:
    _, model = twins("llama", seed)
    tokens = np.random.default_rng(seed).integers(V, size=(2, 3))
    padded = np.concatenate([tokens, np.zeros((2, 4), dtype=int)], axis=1)
    logits = ref.forward(model, tokens)[0]
    np.testing.assert_allclose(ref.forward(model, padded)[0][:, :3], logits, rtol=1e-12, atol=1e-13)


# --- packed weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 32), (4, 32), (5, 32), (6, 32), (8, 32)])
def test_packed_weights_are_the_numbers_that_mlx_lm_computes_with(bits: int, group_size: int) -> None:
    model = llama.Model(llama.ModelArgs(**SIZES))
    with mx.stream(mx.cpu):
        nn.quantize(model, group_size, bits)
        stored = {name: np.array(a) for name, a in tree_flatten(model.parameters())}
        expected = {name: np.array(a) for name, a in tree_flatten(dequantize_model(model).parameters())}
    weights: dict[str, Any] = {}
    for name, array in stored.items():
        base, kind = name.rsplit(".", 1)
        if kind == "weight" and f"{base}.scales" in stored:
            array = Packed(array, stored[f"{base}.scales"], stored[f"{base}.biases"], group_size, bits)
        if kind == "weight":
            weights[name] = array
    dense = ref.dense(weights)
    assert dense.keys() == expected.keys()
    for name, array in dense.items():
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, expected[name])
