"""mlx-lm's LoRA layer and the backend's Adam against the reference.

Contracts: mlx_lm/tuner/lora.py (LoRALinear: y + scale · (x a) b) and mlx/optimizers (Adam, learning_rate after update).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tuner.lora import LoRALinear

from duet_mlx.train import TrainSettings, make_optimizer
from reference import adam, lora
from tests.equivalence.rounding import adam_bound

seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float64])
@given(
    seed=seeds,
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 4), st.sampled_from([32, 64]), st.integers(1, 9), st.integers(1, 8)
    ),
    scale=st.sampled_from([0.0, 0.5, 4.0, 20.0]),
    quantized=st.booleans(),
)
def test_lora_forward_and_gradients_are_the_references(
    dtype: Any, seed: int, shape: Any, scale: float, quantized: bool
) -> None:
    """Bound: a product of matrices over s terms is off by at most s·u of the product of their absolute values.

    Forward, the chain is D_in, R, and four single roundings; backward, D_out, R, the S rows, and as many. The reference
    on absolute values is that product. The reference's own float64 roundings double the bound for float64.
    """
    B, S, d_in, d_out, rank = shape  # noqa: N806
    rng = np.random.default_rng(seed)
    quantized = quantized and dtype == mx.float32  # MLX quantizes no float64

    def array(*size: int) -> np.ndarray:
        return rng.normal(size=size).astype(np.float32)

    with mx.stream(mx.cpu):
        linear = nn.Linear(d_in, d_out, bias=False)
        linear.weight = mx.array(array(d_out, d_in)).astype(dtype)
        weight = np.array(linear.weight)
        if quantized:
            linear = linear.to_quantized(group_size=32, bits=4)
            weight = np.array(mx.dequantize(linear.weight, linear.scales, linear.biases, group_size=32, bits=4))
        layer = LoRALinear.from_base(linear, r=rank, scale=scale)
        a, b, x, g = array(d_in, rank), array(rank, d_out), array(B, S, d_in), array(B, S, d_out)
        assert layer.lora_a.shape == a.shape and layer.lora_b.shape == b.shape
        layer.lora_a, layer.lora_b = (mx.array(v).astype(dtype) for v in (a, b))

        def weighted(parameters: dict, x: mx.array) -> mx.array:
            layer.update(parameters)
            return (layer(x) * mx.array(g).astype(dtype)).sum()

        inputs = mx.array(x).astype(dtype)
        y = np.array(layer(inputs))
        by = mx.grad(weighted, argnums=(0, 1))({"lora_a": layer.lora_a, "lora_b": layer.lora_b}, inputs)
        got = [y, *(np.array(v) for v in (by[1], by[0]["lora_a"], by[0]["lora_b"]))]
    x64, w64, g64, a64, b64 = (v.astype(np.float64) for v in (x, weight, g, a, b))
    one = lora.LoRA(a64, b64, scale)
    expected = [lora.forward(x64, w64, one), *lora.backward(g64, x64, w64, one)]
    size = lora.LoRA(abs(a64), abs(b64), scale)
    bound = [lora.forward(abs(x64), abs(w64), size), *lora.backward(abs(g64), abs(x64), abs(w64), size)]
    u = 2.0**-24 if dtype == mx.float32 else 2 * 2.0**-53
    for name, have, want, most in zip(("y", "x", "a", "b"), got, expected, bound, strict=True):
        assert (np.abs(have - want) <= 1.01 * (d_in + d_out + rank + B * S + 8) * u * most).all(), name


@given(
    seed=seeds,
    steps=st.integers(1, 6),
    rate=st.sampled_from([1e-5, 3e-4, 0.1]),
    size=st.sampled_from([1e-9, 1e-8, 1e-4, 1.0, 1e3]),
    iters=st.sampled_from([6, 40, 600]),
)
def test_adam_is_the_references_over_several_steps(seed: int, steps: int, rate: float, size: float, iters: int) -> None:
    """The bound is that of one step (rounding.py), added up."""
    rng = np.random.default_rng(seed)
    optimizer = make_optimizer(TrainSettings(learning_rate=rate, iters=iters))
    theta = {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": np.zeros(5, dtype=np.float32)}
    module = nn.Module()
    module.update({})
    for name, value in theta.items():
        setattr(module, name, mx.array(value))
    optimizer.init(module.trainable_parameters())
    expected = {k: v.astype(np.float64) for k, v in theta.items()}
    state, still = adam.init(expected), {k: np.zeros(v.shape) for k, v in theta.items()}
    absolute, bound = adam.init(still), {k: np.zeros(v.shape) for k, v in theta.items()}
    for t in range(1, steps + 1):
        gradients = {k: (size * rng.normal(size=v.shape)).astype(np.float32) for k, v in theta.items()}
        gradients["a"][0, 0] = 0.0  # nothing moves where nothing pulls
        optimizer.update(module, {k: mx.array(g) for k, g in gradients.items()})
        used = optimizer.learning_rate.item()
        wide = {k: g.astype(np.float64) for k, g in gradients.items()}
        expected, state = adam.step(expected, wide, state, used)
        moved, absolute = adam.step(still, {k: np.abs(g) for k, g in wide.items()}, absolute, used)
        for name, value in expected.items():
            bound[name] += adam_bound(value, moved[name], t)
            error = np.abs(np.array(module[name]) - value)
            assert (error <= bound[name]).all(), (t, name, error.max(), bound[name].min())
    assert expected["a"][0, 0] == theta["a"][0, 0] == module["a"][0, 0].item()
    assert optimizer.step.item() == state.step


@given(iters=st.integers(1, 120), rate=st.sampled_from([1e-4, 1e-3]))
def test_the_learning_rate_never_passes_its_peak_and_ends_near_zero(iters: int, rate: float) -> None:
    optimizer = make_optimizer(TrainSettings(learning_rate=rate, iters=iters))
    module = nn.Module()
    module.a = mx.zeros(1)
    optimizer.init(module.trainable_parameters())
    rates = []
    for _ in range(iters):
        optimizer.update(module, {"a": mx.ones(1)})
        rates.append(optimizer.learning_rate.item())
    assert all(0 <= r <= rate * (1 + 1e-6) for r in rates)
    assert max(rates) >= 0.99 * rate or iters < 3
    if iters >= 100:
        assert rates[-1] < 0.01 * rate and rates[0] < 0.2 * rate
