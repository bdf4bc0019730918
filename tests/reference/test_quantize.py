"""Affine quantization: bit for bit what MLX stores and reads back on the CPU."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import quantize as ref
from tests.equivalence.tiny import shared

every_bits = pytest.mark.parametrize("bits", ref.BITS)
group_sizes, seeds = st.sampled_from(ref.GROUP_SIZES), st.integers(0, 2**32)


def draw_weight(seed: int, dtype: type = np.float32) -> np.ndarray:
    """[8, 256]: rows over four orders of magnitude, whole numbers, one sign alone, constant, zero."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(8, 256)) * 10.0 ** rng.integers(-2, 3, size=(8, 1))
    weight[1] = np.rint(weight[1])
    weight[2], weight[3] = np.abs(weight[2]), -np.abs(weight[3])
    weight[4], weight[5] = weight[4, 0], 0
    return weight.astype(dtype)


def from_mlx(weight: np.ndarray, group_size: int, bits: int) -> tuple[np.ndarray, ...]:
    with mx.stream(mx.cpu):
        return tuple(np.array(part) for part in mx.quantize(mx.array(weight), group_size, bits))


@every_bits
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@given(group_size=group_sizes, seed=seeds)
@shared(2 * len(ref.BITS))
def test_quantize_gives_mlxs_words_scales_and_biases(bits, group_size, dtype, seed) -> None:
    weight = draw_weight(seed, dtype)
    for ours, theirs in zip(ref.quantize(weight, group_size, bits), from_mlx(weight, group_size, bits), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs)


@every_bits
@given(group_size=group_sizes, seed=seeds)
@shared(len(ref.BITS))
def test_dequantize_gives_mlxs_weights(bits, group_size, seed) -> None:
    words, scales, biases = from_mlx(draw_weight(seed), group_size, bits)
    with mx.stream(mx.cpu):
        theirs = mx.dequantize(mx.array(words), mx.array(scales), mx.array(biases), group_size, bits)
    ours = ref.dequantize(words, scales, biases, group_size, bits)
    assert ours.dtype == np.float32
    if not np.array_equal(ours, np.array(theirs)):
        # A compiler may fuse product and sum (arm64): then the exact value is rounded once.
        exact = ref.dequantize(words, scales.astype(np.float64), biases.astype(np.float64), group_size, bits)
        np.testing.assert_array_equal(exact.astype(np.float32), np.array(theirs))


@every_bits
@given(seed=seeds)
@shared(len(ref.BITS))
def test_unpack_takes_back_what_pack_did(bits, seed) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, size=(2, 3, 64)).astype(np.uint8)
    words = ref.pack(codes, bits)
    assert words.dtype == np.uint32 and words.shape == (2, 3, 2 * bits)
    np.testing.assert_array_equal(ref.unpack(words, bits), codes)


def test_packed_words_by_hand() -> None:
    assert ref.pack(np.arange(8), 4).tolist() == [0x76543210]
    codes = np.zeros(32, dtype=int)
    codes[10] = 0b101  # bits 30, 31 and 32 of the stream of 3-bit codes: it crosses the first word's end
    assert ref.pack(codes, 3).tolist() == [1 << 30, 1, 0]


@every_bits
@given(group_size=group_sizes, seed=seeds)
@shared(len(ref.BITS))
def test_no_weight_moves_by_more_than_a_step_and_zero_stays(bits, group_size, seed) -> None:
    """Bending the scale s onto zero takes at most s/(2r) off a step, r = |edge|/s ≥ (2^bits - 1)/2, so
    the far end lacks less than one step; elsewhere a weight is at most half a (longer) step from its code.
    """
    weight = draw_weight(seed)
    back = ref.dequantize(*ref.quantize(weight, group_size, bits), group_size, bits)
    error, groups = (part.reshape(8, -1, group_size) for part in (np.abs(back - weight), weight))
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    rounding = 2.0**-22 * np.maximum(np.abs(low), np.abs(high)) + 1e-7  # MLX's smallest step is 1e-7
    assert (error <= (high - low) / (2**bits - 1) + rounding).all()
    assert (error <= rounding)[groups == 0].all()
