"""`topk_huber`, backend against reference: values and gradients, within bounds that are derived here."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_mlx.losses import topk_huber
from reference import losses as ref
from reference.teacher import Targets

SPECIAL = np.array([0.0, -0.0, 1e4, -1e4, 1e-40, -1e-40, 1.0, -1.0], dtype=np.float32)
GARBAGE = np.array([np.nan, np.inf, -np.inf, 3e38, 0.0], dtype=np.float32)


@st.composite
def cases(draw: Any) -> tuple[np.ndarray, Targets]:
    """Student logits [B, n, C] and targets, in float32 numbers: ties, -0, denormals, 1e4, masks of every kind."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 12)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
    target, student = (scale * rng.normal(size=shape) for _ in range(2))
    near = draw(st.sampled_from([None, 1e-3, 1.0]))  # a trained student is close to the teacher
    student = student if near is None else target + near * rng.normal(size=shape)
    if draw(st.booleans()):  # ties, also with the teacher
        student, target = (np.round(x / scale) * scale for x in (student, target))
    arrays = [student.astype(np.float32), target.astype(np.float32)]
    for x in arrays:
        if draw(st.booleans()):
            x[rng.random(shape) < 0.2] = rng.choice(SPECIAL)
    candidate_mask = rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    position_mask = np.arange(shape[1]) < rng.integers(0, shape[1] + 1, size=(shape[0], 1))
    if draw(st.booleans()):
        position_mask[:] = True
    masked = ~(candidate_mask & position_mask[..., None])
    for x in arrays:
        x[masked] = rng.choice(GARBAGE, size=masked.sum())
    nothing = np.zeros((shape[0], shape[1] - 1), dtype=int)
    return arrays[0], Targets(np.zeros(shape, dtype=int), arrays[1], candidate_mask, position_mask, nothing)


shares = st.one_of(st.just(0.0), st.floats(1e-3, 0.999))
deltas = st.one_of(st.floats(-3, 3).map(lambda x: 10.0**x), st.just(float("inf")))


def backend(
    student: np.ndarray, targets: Targets, delta: float, center: bool, share: float, dtype: Any
) -> tuple[Any, Any]:
    """Losses and the gradient of their mean, as MLX differentiates it."""
    arrays = [mx.array(x.astype(np.float64), dtype=dtype) for x in (student, targets.logits)]
    masks = [mx.array(m) for m in (targets.candidate_mask, targets.position_mask)]
    batch = Targets(None, arrays[1], masks[0], masks[1], None)  # type: ignore[arg-type]
    gradient = mx.grad(lambda logits: topk_huber(logits, batch, delta, center, share).mean())(arrays[0])
    losses = topk_huber(arrays[0], batch, delta, center, share)
    assert losses.dtype == gradient.dtype == dtype
    return np.array(losses).astype(np.float64), np.array(gradient).astype(np.float64)


def bounds(
    student: np.ndarray, targets: Targets, delta: float, center: bool, share: float, u: float
) -> tuple[Any, Any]:
    """How far rounding with unit u may take losses [B] and gradient [B, n, C].

    With d the difference and A the mean of |d| over the c valid candidates of a position:

    difference  fl(d) = d(1+u): ε = u|d|. Centred: the sum adds (C-1)u Σ|d| to that, its division u|mean|, the
                subtraction u(|d| + A): ε = u(2|d| + (C+2)A) in all.
    term        ℓ has slope at most min(|d| + ε, δ), and is itself evaluated with three roundings (δ into the
                dtype, size - ½q, the product): min(|d| + ε, δ)ε + 3uℓ.
    query       with weights w_t: two sums of (C-1) + (n-1) ≤ nC-1 additions, none negative; w_t itself is share
                into the dtype, 1 - share and a division, then the product: (nC+3)u of it more.
    slope       clip moves by at most ε, and by 0 where d is beyond δ for sure; then δ into the dtype, w_t (three
                roundings), 1/B and two products: 7u of it. Centred: the mean of slopes like the mean of differences.

    1.01 covers products of two roundings; what underflows is lost by at most the smallest normal number.
    """
    C = student.shape[-1]  # noqa: N806
    mask = targets.candidate_mask & targets.position_mask[..., None]
    d = np.where(mask, student, 0).astype(np.float64) - np.where(mask, targets.logits, 0)
    count = np.maximum(mask.sum(axis=-1, keepdims=True), 1)

    def after_centring(error: Any, values: Any) -> Any:
        size = np.abs(values)
        mean = size.sum(axis=-1, keepdims=True) / count
        return error + error.sum(axis=-1, keepdims=True) / count + u * (size + (C + 2) * mean)

    size, error = np.abs(d), u * np.abs(d)
    if center:
        error = np.where(mask, after_centring(error, d), 0)
        size = np.abs(ref.without_mean(d, mask))
    value, slope = ref.huber(size, delta)
    weights = ref.position_weights(targets.position_mask, share)[..., None]  # [B, n, 1]
    terms = np.minimum(size + error, delta) * error + 3 * u * value
    tiny = np.finfo(np.float32 if u > 1e-10 else np.float64).tiny
    by_loss = (weights * (terms + (d[0].size + 3) * u * (value + terms))).sum(axis=(-1, -2))
    by_slope = np.where(size - error > delta, 0, error) + 7 * u * slope
    if center:
        by_slope = np.where(mask, after_centring(by_slope, slope), 0)
    by_slope = by_slope * weights / len(d)
    return 1.01 * by_loss + d[0].size * tiny, 1.01 * by_slope + tiny


def assert_within(got: Any, expected: Any, bound: Any) -> None:
    """Every entry within its own bound; says by how much the worst one is over."""
    error = np.abs(got - expected)
    assert np.isfinite(got).all()
    assert (error <= bound).all(), f"{error[error > bound]} over {bound[error > bound]}"


@pytest.mark.parametrize("center", [False, True])
@given(case=cases(), delta=deltas, share=shares)
def test_float32_value_and_gradient_are_the_references_within_the_bound(
    center: bool, case: Any, delta: float, share: float
) -> None:
    student, targets = case
    losses, gradient = backend(student, targets, delta, center, share, mx.float32)
    expected = ref.topk_huber(student.astype(np.float64), targets, delta, center, share)
    by_loss, by_slope = bounds(student, targets, delta, center, share, 2.0**-24)
    assert_within(losses, expected[0], by_loss)
    assert_within(gradient, expected[1], by_slope)


@pytest.mark.parametrize("center", [False, True])
@given(case=cases(), delta=deltas, share=shares)
def test_float64_value_and_gradient_are_the_references_within_the_bound(
    center: bool, case: Any, delta: float, share: float
) -> None:
    student, targets = case
    with mx.stream(mx.cpu):
        losses, gradient = backend(student, targets, delta, center, share, mx.float64)
    expected = ref.topk_huber(student.astype(np.float64), targets, delta, center, share)
    # The reference rounds as well, so both may be off: 1e-14 of the sum of absolute terms, or less.
    by_loss, by_slope = (2 * b for b in bounds(student, targets, delta, center, share, 2.0**-53))
    assert_within(losses, expected[0], by_loss)
    assert_within(gradient, expected[1], by_slope)


@given(case=cases(), delta=deltas, center=st.booleans(), spread=st.integers(0, 20))
def test_gradient_by_all_logits_is_zero_outside_the_candidates(
    case: Any, delta: float, center: bool, spread: int
) -> None:
    student, targets = case
    C = student.shape[-1]  # noqa: N806
    rng = np.random.default_rng(spread)
    V = C + spread  # noqa: N806
    ids = np.argsort(rng.random((*student.shape[:-1], V)), axis=-1)[..., :C]
    full = rng.normal(size=(*student.shape[:-1], V)).astype(np.float32)
    batch = Targets(*map(mx.array, targets[:4]), None)._replace(ids=mx.array(ids))  # type: ignore[arg-type]

    def mean_loss(logits: mx.array) -> mx.array:
        return topk_huber(mx.take_along_axis(logits, batch.ids, axis=-1), batch, delta, center).mean()

    gradient = np.array(mx.grad(mean_loss)(mx.array(full)))
    wanted = np.zeros(full.shape, dtype=bool)
    np.put_along_axis(wanted, ids, targets.candidate_mask & targets.position_mask[..., None], axis=-1)
    assert not gradient[~wanted].any()


@given(seed=st.integers(0, 2**32))
def test_no_gradient_reaches_the_targets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    student, target = (mx.array(rng.normal(size=(2, 2, 3)).astype(np.float32)) for _ in range(2))
    masks = mx.ones((2, 2, 3), dtype=mx.bool_), mx.ones((2, 2), dtype=mx.bool_)

    def mean_loss(logits: mx.array) -> mx.array:
        return topk_huber(student, Targets(None, logits, *masks, None), 1.0).mean()  # type: ignore[arg-type]

    assert not np.array(mx.grad(mean_loss)(target)).any()
