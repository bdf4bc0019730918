"""Makes mx.float64 on the CPU what its name says, for tests that compare it with NumPy.

In MLX 0.32 exp, sin, cos, sigmoid, softmax, logsumexp, logaddexp and all of `mx.fast` have float32's accuracy (about
1e-7) in a float64 array, whereas products, sums, tanh, power, sqrt, log are exact to float64. Inside
`exact_float64()` the former are written with the latter. Arrays of other dtypes go to MLX's own functions. Compile
nothing before that is used inside: a compiled function keeps what it once traced.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.activations as activations
import numpy as np

from duet_mlx.swiglu import swiglu


def exp(x: mx.array) -> mx.array:
    return mx.power(mx.array(math.e, dtype=mx.float64), x)


def sigmoid(x: mx.array) -> mx.array:
    return 0.5 * (1 + mx.tanh(0.5 * x))


def gelu(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: mx.array, axis: Any = None, **_: Any) -> mx.array:
    p = exp(x - mx.stop_gradient(x.max(axis=axis, keepdims=True)))
    return p / p.sum(axis=axis, keepdims=True)


def logsumexp(x: mx.array, axis: Any = None, keepdims: bool = False) -> mx.array:
    most = mx.stop_gradient(x.max(axis=axis, keepdims=True))
    total = mx.log(exp(x - most).sum(axis=axis, keepdims=True)) + most
    return total if keepdims else total.squeeze(axis)


def logaddexp(a: mx.array, b: mx.array) -> mx.array:
    low, high = mx.minimum(a, b), mx.maximum(a, b)
    value = mx.stop_gradient(high + mx.log1p(exp(low - high)))
    # Its gradient by hand: that of the maximum knows no middle where a = b.
    by_a, by_b = (mx.stop_gradient(exp(x - value)) for x in (a, b))
    return value + by_a * (a - mx.stop_gradient(a)) + by_b * (b - mx.stop_gradient(b))


def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
    y = x * mx.rsqrt(mx.square(x).mean(axis=-1, keepdims=True) + eps)
    return y if weight is None else y * weight


def rope(
    x: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: Any,
    freqs: Any = None,
    **_,
) -> mx.array:
    inverse = base ** (-np.arange(0, dims, 2) / dims) if freqs is None else 1 / np.array(freqs, dtype=np.float64)
    start = np.array(offset).reshape(-1, 1)  # one for all rows, or one a row
    angles = scale * (start + np.arange(x.shape[-2]))[..., None] * inverse  # [1 or B, S, dims/2]
    angles = angles.reshape(len(start), *[1] * (x.ndim - 3), *angles.shape[1:])
    cos, sin = mx.array(np.cos(angles), dtype=mx.float64), mx.array(np.sin(angles), dtype=mx.float64)
    turning, rest = x[..., :dims], x[..., dims:]
    if traditional:
        a, b = turning[..., ::2], turning[..., 1::2]
        turned = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(turning.shape)
    else:
        a, b = turning[..., : dims // 2], turning[..., dims // 2 :]
        turned = mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return mx.concatenate([turned, rest], axis=-1) if rest.size else turned


def attend(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **_: Any) -> mx.array:
    share = q.shape[1] // k.shape[1]
    k, v = mx.repeat(k, share, axis=1), mx.repeat(v, share, axis=1)
    scores = scale * (q @ k.swapaxes(-1, -2))
    if isinstance(mask, str):
        total, new = k.shape[2], q.shape[2]
        mask = mx.arange(total)[None] <= mx.arange(total - new, total)[:, None]
    if mask is not None and mask.dtype == mx.bool_:
        scores = mx.where(mask, scores, -mx.inf)
    elif mask is not None:
        scores = scores + mask
    return softmax(scores, axis=-1) @ v


@contextmanager
def exact_float64() -> Iterator[None]:
    """Inside, the CPU computes float64 arrays to float64's accuracy, mlx-lm's dense models included."""

    def choose(exact: Any, original: Any) -> Any:
        return lambda x, *args, **options: (exact if x.dtype == mx.float64 else original)(x, *args, **options)

    places = [(mx.fast, "rms_norm", rms_norm), (mx.fast, "rope", rope)]
    places += [(mx.fast, "scaled_dot_product_attention", attend)]
    places += [(mx, "exp", exp), (mx, "sigmoid", sigmoid), (mx, "softmax", softmax)]
    places += [(mx, "logsumexp", logsumexp), (mx, "logaddexp", logaddexp)]
    places += [(nn, "silu", lambda x: x * sigmoid(x)), (nn, "gelu_approx", gelu)]
    models = [m for name, m in list(sys.modules.items()) if name.startswith("mlx_lm.models.")]
    own = (activations.swiglu, swiglu)  # mlx-lm's, or what stands in its place on CPUs
    places += [
        (m, "swiglu", lambda gate, x: gate * sigmoid(gate) * x) for m in models if getattr(m, "swiglu", None) in own
    ]
    patches = [patch.object(where, name, choose(exact, getattr(where, name))) for where, name, exact in places]
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()
        mx.set_default_device(device)
