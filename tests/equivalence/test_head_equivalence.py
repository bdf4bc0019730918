"""The gathered head against the reference's full one: logits of chosen rows at chosen positions, and their gradient.

Whatever the dtype of the model, hidden states and rows meet in float32: so logits of a bfloat16 or float16 model are
held to float32's bound. Only the gradient, on its way back to such hidden states, is rounded to their dtype.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_mlx.head import find_head, logits_at
from reference import lora
from reference.quantize import BITS

UNITS = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
D, F32 = 32, 2.0**-24


class Head(nn.Module):
    """A head, and hidden states that come from nowhere."""

    def __init__(self, vocabulary: int, tied: bool):
        super().__init__()
        if tied:
            self.embed_tokens = nn.Embedding(vocabulary, D)
        else:
            self.lm_head = nn.Linear(D, vocabulary, bias=True)

    def __call__(self, states: mx.array, cache: Any = None) -> mx.array:
        return self.embed_tokens.as_linear(states) if "embed_tokens" in self else self.lm_head(states)


def numbers(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("dtype", list(UNITS))
@given(
    seed=st.integers(0, 2**32), tied=st.booleans(), bits=st.sampled_from([None, *BITS]), vocabulary=st.integers(1, 20),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 8)),
)  # fmt: skip
def test_gathered_logits_and_their_gradient_are_the_references(
    dtype: Any, seed: int, tied: bool, bits: int | None, vocabulary: int, shape: tuple[int, int, int, int]
) -> None:
    """Logits: sums of D products and a bias, (D + 1) u of their absolute values. Gradient: sums of C products in
    float32, rounded to the dtype, and in the dtype the sum over at most n positions that are the same: n + 1 of its u.
    """
    B, T, n, C = shape  # noqa: N806
    rng = np.random.default_rng(seed)
    model = Head(vocabulary, tied)
    model.set_dtype(dtype)
    head = find_head(model)
    assert head is not None
    head.weight = mx.array(rng.normal(size=(vocabulary, D))).astype(dtype)
    if not tied:
        head.bias = mx.array(rng.normal(size=vocabulary)).astype(dtype)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        head = find_head(model)
        assert head is not None
        rows = mx.dequantize(head.weight, head.scales, head.biases, group_size=32, bits=bits)
    else:
        rows = head.weight
    states = mx.array(rng.normal(size=(B, T, D))).astype(dtype)
    positions, ids = rng.integers(0, T, size=(B, n)), rng.integers(0, vocabulary, size=(B, n, C))
    by_logits = rng.normal(size=(B, n, C)).astype(np.float32)

    def gathered(states: mx.array) -> mx.array:
        return logits_at(model, states, mx.array(positions), mx.array(ids), head=head)

    (logits,), (by_states,) = mx.vjp(gathered, [states], [mx.array(by_logits)])
    assert logits.dtype == mx.float32 and by_states.dtype == dtype

    places = np.arange(B)[:, None, None], positions[..., None], ids
    bias = np.zeros(vocabulary) if tied else numbers(head.bias)
    h, w, g = numbers(states), numbers(rows), by_logits.astype(np.float64)

    def by_hand(h: np.ndarray, w: np.ndarray, b: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        full = np.zeros((B, T, vocabulary))
        np.add.at(full, places, g)
        return (lora.forward(h, w) + b)[places], lora.backward(full, h, w)[0]

    for got, expected, size, unit in zip(
        (np.array(logits), numbers(by_states)),
        by_hand(h, w, bias, g),
        by_hand(abs(h), abs(w), abs(bias), abs(g)),
        ((D + 1) * F32, (C + 1) * F32 + (n + 1) * UNITS[dtype]),
        strict=True,
    ):
        assert (np.abs(got - expected) <= 1.01 * unit * size + 2.0**-24).all()
