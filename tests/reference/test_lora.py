"""LoRA: gradients by finite differences, mlx-lm's layout and formula."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tuner.lora import LoRALinear

from reference import lora as ref
from tests.reference.finite_differences import assert_gradient

sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
seeds = st.integers(0, 2**32)


def draw(seed: int, size: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray, ref.LoRA, np.ndarray]:
    """x [B, S, D_in], W, the factors (B not 0, as after a few steps), and ∂L/∂y [B, S, D_out]."""
    d_in, d_out, rank, s = size
    rng = np.random.default_rng(seed)
    x, weight, gradient = (rng.normal(size=shape) for shape in ((2, s, d_in), (d_out, d_in), (2, s, d_out)))
    return x, weight, ref.LoRA(rng.normal(size=(d_in, rank)), rng.normal(size=(rank, d_out)), 0.7), gradient


@given(seeds, sizes)
def test_gradients_agree_with_finite_differences(seed, size) -> None:
    x, weight, lora, gradient = draw(seed, size)
    by_x, by_a, by_b = ref.backward(gradient, x, weight, lora)
    assert_gradient(lambda v: float((gradient * ref.forward(v, weight, lora)).sum()), x, by_x)
    for name, slope in (("a", by_a), ("b", by_b)):

        def value(v: np.ndarray, name: str = name) -> float:
            return float((gradient * ref.forward(x, weight, lora._replace(**{name: v}))).sum())

        assert_gradient(value, getattr(lora, name), slope)


@given(seeds, sizes)
def test_without_lora_only_the_input_has_a_gradient(seed, size) -> None:
    x, weight, _, gradient = draw(seed, size)
    by_x, by_a, by_b = ref.backward(gradient, x, weight)
    assert_gradient(lambda v: float((gradient * ref.forward(v, weight)).sum()), x, by_x)
    assert by_a is None and by_b is None


def test_layout_and_formula_are_mlx_lms() -> None:
    """Contract with mlx_lm/tuner/lora.py, LoRALinear: lora_a [D_in, R], lora_b [R, D_out], scale direct."""
    x, weight, lora, _ = draw(0, (4, 3, 2, 2))
    with mx.stream(mx.cpu):
        linear = nn.Linear(4, 3, bias=False)
        linear.weight = mx.array(weight, dtype=mx.float64)
        layer = LoRALinear.from_base(linear, r=2, scale=lora.scale)
        assert layer.lora_a.shape == lora.a.shape and layer.lora_b.shape == lora.b.shape
        layer.lora_a, layer.lora_b = mx.array(lora.a, dtype=mx.float64), mx.array(lora.b, dtype=mx.float64)
        theirs = np.array(layer(mx.array(x, dtype=mx.float64)))
    np.testing.assert_allclose(ref.forward(x, weight, lora), theirs, rtol=1e-13)


def test_a_new_adapter_changes_nothing_and_starts_within_mlx_lms_bound() -> None:
    x, weight, _, _ = draw(1, (4, 3, 2, 2))
    lora = ref.init(np.random.default_rng(0), 4, 3, 2, scale=20.0)
    np.testing.assert_array_equal(ref.forward(x, weight, lora), ref.forward(x, weight))
    assert lora.a.shape == (4, 2) and lora.b.shape == (2, 3) and 0 < np.abs(lora.a).max() <= 0.5
