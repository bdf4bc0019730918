"""Affine quantization, reference against MLX and the backend's gathered head: every bit equal."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_mlx.head import head_rows
from reference.quantize import BITS, GROUP_SIZES, dequantize, quantize, unpack
from tests.equivalence.tiny import shared


@st.composite
def weights(draw: Any, group_size: int) -> np.ndarray:
    """[V, D] float32 with constant groups, zeros, ties and outliers among the normal ones."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = rng.normal(size=(draw(st.integers(1, 5)), group_size * draw(st.integers(1, 2))))
    weight *= draw(st.sampled_from([1e-4, 0.02, 1.0, 1e3]))
    kind = draw(st.sampled_from(["plain", "zero", "constant", "coarse", "outlier", "positive", "negative"]))
    if kind in ("zero", "constant"):
        weight[0] = 0.0 if kind == "zero" else weight[0, 0]
    elif kind == "coarse":
        weight = np.round(weight, 1)
    elif kind == "outlier":
        weight[0, 0] *= 1e3
    elif kind != "plain":
        weight = np.abs(weight) if kind == "positive" else -np.abs(weight)
    return weight.astype(np.float32)


def on_cpu(weight: np.ndarray, group_size: int, bits: int) -> list[np.ndarray]:
    with mx.stream(mx.cpu):
        return [np.array(part) for part in mx.quantize(mx.array(weight), group_size=group_size, bits=bits)]


@pytest.mark.parametrize("bits", BITS)
@given(data=st.data(), group_size=st.sampled_from(GROUP_SIZES))
@shared(len(BITS))
def test_words_scales_and_biases_are_mlxs(bits: int, data: Any, group_size: int) -> None:
    weight = data.draw(weights(group_size))
    for got, expected in zip(quantize(weight, group_size, bits), on_cpu(weight, group_size, bits), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bits", BITS)
@given(
    data=st.data(),
    group_size=st.sampled_from(GROUP_SIZES),
    half=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 99),
)
@shared(len(BITS))
def test_gathered_rows_of_a_quantized_head_are_the_references(
    bits: int, data: Any, group_size: int, half: bool, tied: bool, seed: int
) -> None:
    weight = data.draw(weights(group_size))
    if half:
        weight = np.clip(weight, -1e3, 1e3).astype(np.float16)
    rows, width = weight.shape
    module = nn.Embedding(rows, width) if tied else nn.Linear(width, rows, bias=True)
    module.weight = mx.array(weight)
    with mx.stream(mx.cpu):
        head = module.to_quantized(group_size=group_size, bits=bits)
        ids = np.random.default_rng(seed).integers(0, rows, size=(2, 3))
        got, bias = head_rows(head, mx.array(ids))
        full = [np.array(head[name]) for name in ("weight", "scales", "biases")]
        np.testing.assert_array_equal(np.array(got), dequantize(*full, group_size, bits)[ids])
        assert (bias is None) == tied
        if bias is not None:
            np.testing.assert_array_equal(np.array(bias), np.array(head.bias)[ids])
    assert unpack(full[0], bits).max() < 2**bits


@pytest.mark.parametrize("bits", BITS)
@given(
    data=st.data(),
    group_size=st.sampled_from(GROUP_SIZES),
    dtype=st.sampled_from([mx.float32, mx.float16]),
    seed=st.integers(0, 99),
)
@shared(len(BITS))
def test_a_quantized_product_is_that_of_the_references_weights(
    bits: int, data: Any, group_size: int, dtype: Any, seed: int
) -> None:
    """x Wᵀ with W packed, as on a GPU. Each weight scale · code + bias has two roundings, its product with x one, the
    D sums one each, all in the dtype (MLX's CPU kernel sums there) and of Σ |x| (|scale| code + |bias|).

    No bfloat16: at D = 256 so many roundings of 2^-8 bound nothing.
    """
    weight = np.clip(data.draw(weights(group_size)), -30, 30)  # float16 ends at 65,504
    packed = quantize(weight, group_size, bits)
    x = mx.array(np.random.default_rng(seed).normal(size=(3, weight.shape[1]))).astype(dtype)
    words, *pair = (mx.array(part) for part in packed)
    scales, biases = (part.astype(dtype) for part in pair)
    got = mx.quantized_matmul(x, words, scales, biases, transpose=True, group_size=group_size, bits=bits)
    assert got.dtype == dtype
    inputs = [np.array(a).astype(np.float64) for a in (x, scales, biases)]
    expected, size = (
        x64 @ dequantize(packed[0], scales64, biases64, group_size, bits).T
        for x64, scales64, biases64 in (inputs, [abs(a) for a in inputs])
    )
    ku = (weight.shape[1] + 3) * (2.0**-24 if dtype == mx.float32 else 2.0**-11)
    underflow = (weight.shape[1] + 3) * 2.0**-25 if dtype == mx.float16 else 0.0  # half its smallest step, each time
    assert (np.abs(np.array(got) - expected) <= ku / (1 - ku) * size + underflow).all()
