"""The CPU's SwiGLU is mlx-lm's, by value and by gradient, and it is what a model loaded on a CPU calls."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations, gemma2
from mlx_lm.models import llama as architecture

from duet_mlx.model import load_model
from duet_mlx.swiglu import replace_swiglu, swiglu
from tests.equivalence.tiny import llama
from tests.tiny_model import tiny_model


@pytest.fixture(autouse=True)
def mlx_lms_own(monkeypatch):
    """Before each test; what was in its place comes back after it."""
    monkeypatch.setattr(architecture, "swiglu", activations.swiglu)


def test_value_and_gradient_are_mlx_lms():
    random = np.random.default_rng(0)
    gate = np.concatenate([random.normal(0, 4, 10_000), np.linspace(-85, 85, 1001)])
    x, cotangent = random.normal(size=gate.shape), random.normal(size=gate.shape)
    given = [mx.array(gate, mx.float32), mx.array(x, mx.float32)]
    (y,), gradient = mx.vjp(swiglu, given, [mx.array(cotangent, mx.float32)])
    sigmoid = 1 / (1 + np.exp(-gate))
    slope = sigmoid + gate * sigmoid * (1 - sigmoid)
    for got, want in ((y, gate * sigmoid * x), (gradient[0], cotangent * x * slope)):
        scale = np.abs(x) * (1 if got is y else np.abs(cotangent)) * np.maximum(1, np.abs(gate))
        assert (np.abs(np.array(got) - want) <= 1e-6 * scale).all()
    np.testing.assert_allclose(np.array(gradient[1]), cotangent * gate * sigmoid, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gate", [-1e30, -500.0, -89.0, 89.0, 500.0])
def test_far_from_zero_it_is_zero_or_the_gate_itself_and_so_is_its_slope(gate):
    given, one = [mx.array([gate]), mx.array([1.0])], mx.array([1.0])
    (y,), (slope, of_x) = mx.vjp(swiglu, given, [one])
    expected = max(gate, 0.0)
    for got, want in ((y, expected), (slope, float(gate > 0)), (of_x, expected)):
        assert got.item() == pytest.approx(want, abs=1e-4)


def test_nan_stays_nan():
    assert mx.isnan(swiglu(mx.array([mx.nan]), mx.array([1.0]))).all()


@pytest.mark.skipif(mx.default_device().type == mx.DeviceType.gpu, reason="a GPU keeps mlx-lm's")
def test_a_model_loaded_on_a_cpu_calls_it_and_says_the_same(tmp_path):
    model, *_ = load_model(str(tiny_model(tmp_path / "model")))
    assert architecture.swiglu is swiglu
    tokens = mx.array([[1, 2, 3, 4]])
    logits = np.array(model(tokens))
    architecture.swiglu = activations.swiglu
    np.testing.assert_allclose(logits, np.array(model(tokens)), rtol=1e-4, atol=1e-5)


def test_an_architecture_with_another_activation_is_left_alone():
    sizes = dict(hidden_size=8, num_hidden_layers=1, intermediate_size=16, vocab_size=8, head_dim=4)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5)
    replace_swiglu(gemma2.Model(gemma2.ModelArgs("gemma2", **sizes, **heads)))
    assert not hasattr(gemma2, "swiglu") and architecture.swiglu is activations.swiglu
    replace_swiglu(llama())
    assert architecture.swiglu is swiglu
