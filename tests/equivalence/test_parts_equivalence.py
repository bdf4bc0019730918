"""The parts of a decoder, MLX's own kernels against reference/parts.py: values and gradients in three dtypes.

Bounds are for the worst case, in units u of the dtype: 2^-24, 2^-11, 2^-8. A chain of k roundings moves a result by at
most γ(k) = ku / (1 - ku) of it, a sum of s products by γ(s) of the sum of their absolute values (Higham, "Accuracy and
Stability of Numerical Algorithms", 2002, chapter 3); exp, tanh, sin and cos count as 8. Inputs are drawn in the dtype
itself, so both sides start from the same numbers; where a kernel computes in more than its dtype, it has room to spare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import parts as ref

Array = np.ndarray
UNITS = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
dtypes = pytest.mark.parametrize("dtype", list(UNITS))
seeds, sizes = st.integers(0, 2**32), st.sampled_from([0.1, 1.0, 3.0])
SMALLEST = {mx.float32: 2.0**-126, mx.float16: 2.0**-14, mx.bfloat16: 2.0**-126}  # normal number


def drawn(seed: int, dtype: Any, *shapes: Sequence[int], size: float = 1.0) -> tuple[list[mx.array], list[Array]]:
    """Normal numbers of the dtype, with some -0, for MLX; and the same in float64."""
    rng = np.random.default_rng(seed)
    arrays = []
    for shape in shapes:
        values = size * rng.normal(size=shape)
        arrays.append(mx.array(np.where(rng.random(shape) < 0.05, -0.0, values)).astype(dtype))
    return arrays, [numbers(array) for array in arrays]


def numbers(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def gamma(k: Any, dtype: Any) -> Any:
    ku = np.asarray(k) * UNITS[dtype]
    assert (ku < 1).all(), "so many roundings bound nothing"
    return ku / (1 - ku)


def check(f: Callable[..., mx.array], inputs: list[mx.array], by_y: mx.array, expected: Any, bounds: Any) -> None:
    """Value and gradients of f, as MLX has them, against those expected: each entry within its own bound."""
    (value,), gradients = mx.vjp(f, inputs, [by_y])
    dtype = inputs[0].dtype
    for name, got, want, bound in zip(
        ("value", *(f"gradient {i}" for i in range(9))), [value, *gradients], expected, bounds, strict=False
    ):
        assert got.dtype == dtype and got.shape == want.shape
        error = np.abs(numbers(got) - want)
        assert (error <= bound + 4 * SMALLEST[dtype]).all(), f"{name}: {error.max()}"  # what underflows is lost


@dtypes
@given(seed=seeds, size=sizes, d=st.sampled_from([4, 32]))
def test_rms_norm(dtype: Any, seed: int, size: float, d: int) -> None:
    """r: a sum of D squares, ε, a root that halves what came before; then two products: (D + 3)/2 + 8 of y.

    Gradient: (u - x mean(u x)/r²)/r has r thrice, and a sum of D products more.
    """
    (x, by_y), (x64, g) = drawn(seed, dtype, (2, 3, d), (2, 3, d), size=size)
    (w,), (w64,) = drawn(seed + 1, dtype, (d,))
    y, backward = ref.rms_norm(x64, w64, 1e-3)
    r = np.sqrt((x64**2).mean(axis=-1, keepdims=True) + 1e-3)
    of_u = np.abs(w64 * g)
    size_x = (of_u + np.abs(x64) * (of_u * np.abs(x64)).mean(axis=-1, keepdims=True) / r**2) / r
    of_r = (d + 3) / 2 + 8
    bounds = gamma(of_r, dtype) * np.abs(y), gamma(3 * of_r + d + 4, dtype) * size_x
    check(lambda x: mx.fast.rms_norm(x, w, 1e-3), [x], by_y, [y, backward(g)], bounds)


@dtypes
@given(seed=seeds, start=st.integers(0, 300), base=st.sampled_from([100.0, 1e4, 1e6]), traditional=st.booleans())
def test_rope(dtype: Any, seed: int, start: int, base: float, traditional: bool) -> None:
    """The angle is float32's: a power by way of exp(t ln base), 8 + 4 ln(base) of it, and two products more.

    Its cosine moves by as much as it does itself, and by 8; then two products and their sum in the dtype.
    """
    shape = (2, 2, 4, 8)
    (x, by_y), (x64, g) = drawn(seed, dtype, shape, shape)
    y, backward = ref.rope(x64, start, base, traditional)
    angle = (start + np.arange(shape[2]))[:, None] * base ** (-np.arange(0, 8, 2) / 8)  # [S, D_h/2]
    by_angle = (angle * (10 + 4 * np.log(base)) + 8) * 2.0**-24

    def bound(values: Array) -> Array:
        halves = (slice(0, None, 2), slice(1, None, 2)) if traditional else (slice(0, 4), slice(4, None))
        both = np.zeros(shape)
        for half in halves:
            both[..., half] = (np.abs(values[..., halves[0]]) + np.abs(values[..., halves[1]])) * (
                by_angle + gamma(4, dtype)
            )
        return both

    def theirs(x: mx.array) -> mx.array:
        return mx.fast.rope(x, 8, traditional=traditional, base=base, scale=1.0, offset=start)

    check(theirs, [x], by_y, [y, backward(g)], [bound(x64), bound(g)])


def softmax_roundings(x: Array, p: Array) -> Array:
    """Of each p, in units u: x - max moves e^x by as much, each term of the sum too; exp, the sum, a division."""
    below = np.where(p > 0, x.max(axis=-1, keepdims=True) - np.where(p > 0, x, 0), 0)
    return below + (p * below).sum(axis=-1, keepdims=True) + x.shape[-1] + 2 * 8 + 2


@dtypes
@given(seed=seeds, size=sizes, n=st.integers(1, 9))
def test_softmax(dtype: Any, seed: int, size: float, n: int) -> None:
    """Gradient: p (g - Σ p g): p twice, a sum of n products, a difference, a product."""
    (x, by_y), (x64, g) = drawn(seed, dtype, (3, n), (3, n), size=size)
    p, backward = ref.softmax(x64)
    k = softmax_roundings(x64, p)
    size_x = p * (np.abs(g) + (p * np.abs(g)).sum(axis=-1, keepdims=True))
    bounds = gamma(k, dtype) * p, gamma(2 * k.max() + n + 3, dtype) * size_x
    check(lambda x: mx.softmax(x, axis=-1), [x], by_y, [p, backward(g)], bounds)


@dtypes
@given(seed=seeds, size=sizes)
def test_softcap(dtype: Any, seed: int, size: float) -> None:
    """x/cap and cap in the dtype: 2 of the argument, hence at most 2 of tanh, as z (1 - tanh² z) < tanh z; 8; 2 more.

    Gradient: tanh moves by 10 at most, its square by 21, the rest is three roundings.
    """
    (x, by_y), (x64, g) = drawn(seed, dtype, (4, 5), (4, 5), size=size)
    y, backward = ref.softcap(x64, 1.5)
    bounds = gamma(12, dtype) * np.abs(y), gamma(24, dtype) * np.abs(g)
    check(lambda x: 1.5 * mx.tanh(x / 1.5), [x], by_y, [y, backward(g)], bounds)


@dtypes
@given(seed=seeds, size=sizes)
def test_swiglu(dtype: Any, seed: int, size: float) -> None:
    """σ is off by 10 (exp, a sum, a quotient) of 1, as MLX takes it from 1 where z < 0; then products.

    Gradient: σ (1 + z (1 - σ)) moves by 10 (1 + 2|z|), and has five roundings of at most 1 + |z|.
    """
    (gate, up, by_y), (z, v, g) = drawn(seed, dtype, *[(4, 5)] * 3, size=size)
    y, backward = ref.gated(z, v, ref.silu)
    bounds = (
        gamma(13, dtype) * np.abs(z * v),
        gamma(28, dtype) * np.abs(g * v) * (1 + np.abs(z)),
        gamma(13, dtype) * np.abs(g * z),
    )
    check(lambda gate, up: nn.silu(gate) * up, [gate, up], by_y, [y, *backward(g)], bounds)


@dtypes
@given(seed=seeds, shared=st.sampled_from([1, 2]), past=st.integers(0, 3))
def test_attend(dtype: Any, seed: int, shared: int, past: int) -> None:
    """Scores a: sums of D_h products and the scale, so off by γ(D_h + 3) of their absolute sums A, which moves p by
    as much twice (e^a and the sum); the rest as in softmax. Then sums of n, of D_h and of S products; a head of keys
    shared by H/H_kv queries is one sum of so many times as many.
    """
    heads, s, d, scale = 2, 4, 4, 0.5
    n = past + s
    inputs, (q, k, v, g) = drawn(
        seed, dtype, (2, heads, s, d), (2, heads // shared, n, d), (2, heads // shared, n, d), (2, heads, s, d)
    )
    o, backward = ref.attend(q, k, v, scale, None)
    aq, ak, av, ag = (np.abs(x) for x in (q, np.repeat(k, shared, axis=1), np.repeat(v, shared, axis=1), g))
    visible = np.arange(n) <= past + np.arange(s)[:, None]
    scores = np.where(visible, scale * q @ np.repeat(k, shared, axis=1).swapaxes(-1, -2), -np.inf)
    p, _ = ref.softmax(scores)
    moved = gamma(d + 3, dtype) * np.where(visible, scale * aq @ ak.swapaxes(-1, -2), 0).max(axis=-1, keepdims=True)
    of_p = np.expm1(2 * moved) + gamma(softmax_roundings(scores, p), dtype) * np.exp(2 * moved)  # relative
    later = gamma(2 * n + 2 * d + 3, dtype)  # of all that comes behind p

    def off(relative: Any) -> Any:
        return (1 + relative) * (1 + later) - 1

    by_p = ag @ av.swapaxes(-1, -2)  # absolute values from here on
    mean = (p * by_p).sum(axis=-1, keepdims=True)
    worst = of_p.max(axis=-1, keepdims=True)
    by_scores = scale * p * (by_p + mean) * off(2 * worst + worst**2)

    def unshare(x: Array) -> Array:
        return x.reshape(2, -1, shared, n, d).sum(axis=2)

    bounds = [
        (p * off(of_p)) @ av,
        (1 + later) * by_scores @ ak + later * scale * (p * (by_p + mean)) @ ak,
        unshare(((1 + later) * by_scores + later * scale * p * (by_p + mean)).swapaxes(-1, -2) @ aq),
        unshare((p * off(of_p)).swapaxes(-1, -2) @ ag),
    ]

    def theirs(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")

    check(theirs, inputs[:3], inputs[3], [o, *backward(g)], bounds)
