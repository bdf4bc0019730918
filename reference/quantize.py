"""Affine group quantization as MLX stores it: w ≈ scale · code + bias, codes of 2 to 8 bits, packed in words.

Each row of a weight is cut into groups of 32, 64 or 128 neighbours; each group has one scale and one bias.
All is bit for bit what `mx.quantize` and `mx.dequantize` (mode "affine") give on the CPU, so this file alone
computes in the weights' own dtype and not in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


class Packed(NamedTuple):
    """A quantized weight [..., D] as MLX stores it."""

    words: Array  # [..., D·bits/32] uint32
    scales: Array  # [..., D/group_size]
    biases: Array  # [..., D/group_size]
    group_size: int
    bits: int


def pack(codes: Array, bits: int) -> Array:
    """Codes [..., D] below 2^bits -> words [..., D·bits/32] uint32: one stream of bits, low bits first.

    Where bits divides 32 no code crosses a word; codes of 3, 5 and 6 bits do, low part first.
    """
    stream = np.unpackbits(codes[..., None].astype(np.uint8), axis=-1, count=bits, bitorder="little")
    octets = np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")  # [..., D·bits/8]
    return np.ascontiguousarray(octets).view("<u4").astype(np.uint32)  # four octets a word, the low one first


def unpack(words: Array, bits: int) -> Array:
    """The codes [..., D] of packed words [..., D·bits/32]."""
    octets = np.ascontiguousarray(words.astype("<u4")).view(np.uint8)  # [..., D·bits/8]
    stream = np.unpackbits(octets, axis=-1, bitorder="little")  # [..., D·bits]
    stream = stream.reshape(*words.shape[:-1], -1, bits)  # [..., D, bits]
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]  # [..., D]


def quantize(weight: Array, group_size: int, bits: int) -> tuple[Array, Array, Array]:
    """Words [..., D·bits/32] uint32, scales and biases [..., D/group_size] in the weight's dtype.

    The group's end of larger magnitude (`edge`) becomes the bias and is met exactly. The scale leads from
    there to the other end, and is then bent so that a whole number of steps leads from edge to 0: so 0, the
    commonest weight, is met exactly too. A scale may thus be negative.

    Args:
        weight: [..., D] float32 or float16, D a multiple of group_size. The arithmetic is float32.
    """
    groups = weight.reshape(*weight.shape[:-1], -1, group_size).astype(np.float32)  # [..., D/group, group]
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    last = np.float32(2**bits - 1)
    from_low = np.abs(low) > np.abs(high)
    edge = np.where(from_low, low, high)
    scale = np.maximum((high - low) / last, np.float32(1e-7))
    scale = np.where(from_low, scale, -scale)
    steps = np.rint(edge / scale)  # to 0
    scale = np.divide(edge, steps, out=scale, where=steps != 0)
    bias = np.where(steps != 0, edge, np.float32(0))
    codes = np.clip(np.rint((groups - bias) / scale), 0, last).reshape(weight.shape)  # [..., D]
    return pack(codes, bits), scale[..., 0].astype(weight.dtype), bias[..., 0].astype(weight.dtype)


def dequantize(words: Array, scales: Array, biases: Array, group_size: int, bits: int) -> Array:
    """scale · code + bias, [..., D] in the scales' dtype: product and sum are each rounded to it."""
    codes = unpack(words, bits)  # [..., D]
    groups = codes.reshape(*codes.shape[:-1], -1, group_size).astype(scales.dtype)  # [..., D/group, group]
    return (groups * scales[..., None] + biases[..., None]).reshape(codes.shape)
