"""The parts of the decoder: each backward by finite differences; what overflows; what RoPE is for."""

from __future__ import annotations

import numpy as np
import pytest

from reference import parts as ref
from tests.reference.finite_differences import assert_gradient


def draws(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in shapes]


@pytest.mark.parametrize(
    "part",
    [
        lambda x: ref.rms_norm(x, np.array([0.5, -2.0, 1.0, 3.0]), 1e-3),
        lambda x: ref.rope(x, 3, 100.0, True),
        lambda x: ref.rope(x, 3, 100.0, False),
        lambda x: ref.softcap(x, 1.5),
        lambda x: ref.softcap(x, None),
        ref.softmax,
    ],
)
def test_backward_of_each_part_agrees_with_finite_differences(part) -> None:
    x, by_y = draws((2, 3, 4), (2, 3, 4))
    assert_gradient(lambda v: float((part(v)[0] * by_y).sum()), x, part(x)[1](by_y))


@pytest.mark.parametrize("activation", [ref.silu, ref.gelu])
def test_backward_of_swiglu_and_geglu_agrees_with_finite_differences(activation) -> None:
    gate, up, by_y = draws((3, 4), (3, 4), (3, 4))
    by_gate, by_up = ref.gated(gate, up, activation)[1](by_y)
    assert_gradient(lambda v: float((ref.gated(v, up, activation)[0] * by_y).sum()), gate, by_gate)
    assert_gradient(lambda v: float((ref.gated(gate, v, activation)[0] * by_y).sum()), up, by_up)


def test_backward_of_attention_agrees_with_finite_differences() -> None:
    q, k, v, by_o = draws((2, 4, 3, 2), (2, 2, 5, 2), (2, 2, 5, 2), (2, 4, 3, 2))
    inputs = [q, k, v]
    for i, gradient in enumerate(ref.attend(q, k, v, 0.6, 1.2)[1](by_o)):

        def value(at: np.ndarray, i: int = i) -> float:
            return float((ref.attend(*inputs[:i], at, *inputs[i + 1 :], 0.6, 1.2)[0] * by_o).sum())

        assert_gradient(value, inputs[i], gradient)


def test_extreme_inputs_overflow_nothing() -> None:
    x = np.array([[-1e4, 0.0, 1e4]])
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(ref.softmax(x)[0], [[0, 0, 1]])
        for activation in (ref.silu, ref.gelu):
            np.testing.assert_allclose(ref.gated(x, np.ones_like(x), activation)[0], [[0, 0, 1e4]])
        np.testing.assert_allclose(ref.softcap(x, 30.0)[0], [[-30, 0, 30]])


def test_rope_depends_on_the_distance_alone() -> None:
    q, k = draws((1, 8), (1, 8))
    for traditional in (True, False):
        products = [
            (ref.rope(q, s + 4, 1e4, traditional)[0] * ref.rope(k, s, 1e4, traditional)[0]).sum() for s in (0, 50)
        ]
        assert products[0] == pytest.approx(products[1], rel=1e-12)
