"""The objective: gradient by finite differences, values by hand, masks, limits of δ, centring."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reference import losses as ref
from reference.teacher import Targets
from tests.reference.finite_differences import STEP, assert_gradient

B, n, C = 2, 3, 4
seeds = st.integers(0, 2**32)
shares = st.sampled_from([0.0, 0.25, 0.5, 0.9])
centers = pytest.mark.parametrize("center", [False, True])


def draw(seed: int) -> tuple[np.ndarray, Targets]:
    """Student logits near the teacher's, random candidate masks, position masks as continuations have."""
    rng = np.random.default_rng(seed)
    target = rng.normal(scale=3, size=(B, n, C))
    student = target + 1.5 * rng.normal(size=(B, n, C))
    candidate_mask = rng.random((B, n, C)) < 0.8
    candidate_mask[..., 0] = True
    position_mask = np.arange(n) < np.array([n, 1])[:, None]
    return student, Targets(np.zeros((B, n, C)), target, candidate_mask, position_mask, np.zeros((B, n - 1)))


def valid(targets: Targets) -> np.ndarray:
    return targets.candidate_mask & targets.position_mask[..., None]


@pytest.mark.parametrize("delta", [0.1, 1.0, 30.0, np.inf])
@centers
@given(seed=seeds, share=shares)
@settings(max_examples=20)  # slow, and no twin to be held to
def test_gradient_agrees_with_finite_differences(delta: float, center: bool, seed: int, share: float) -> None:
    student, targets = draw(seed)
    difference = np.where(valid(targets), student - targets.logits, 0)
    if center:
        difference = ref.without_mean(difference, valid(targets))
    assume((np.abs(np.abs(difference) - delta) > 3 * STEP).all())  # at δ the second derivative jumps
    _, gradient = ref.topk_huber(student, targets, delta, center, share)

    def mean_loss(logits: np.ndarray) -> float:
        return float(ref.topk_huber(logits, targets, delta, center, share)[0].mean())

    assert_gradient(mean_loss, student, gradient)


@given(seed=seeds, delta=st.floats(1e-3, 1e3))
def test_raw_gradient_is_the_clipped_difference_over_batch_and_positions(seed: int, delta: float) -> None:
    student, targets = draw(seed)
    _, gradient = ref.topk_huber(student, targets, delta)
    for q, supervised in enumerate((n, 1)):
        expected = np.clip(student[q] - targets.logits[q], -delta, delta) / (B * supervised)
        np.testing.assert_allclose(gradient[q], np.where(valid(targets)[q], expected, 0), rtol=1e-14)


def test_values_by_hand() -> None:
    """Two positions, then one: ½·1² and 2·(3 - ½·2); ½·0.5²; and -5, linear, as a query of one position."""
    student = np.array([[[1.0, 3.0], [-0.5, 7.0]], [[-5.0, 9.0], [9.0, 9.0]]])
    candidate_mask = np.array([[[1, 1], [1, 0]], [[1, 0], [1, 1]]], dtype=bool)
    position_mask = np.array([[1, 1], [1, 0]], dtype=bool)
    targets = Targets(student, np.zeros((2, 2, 2)), candidate_mask, position_mask, np.zeros((2, 1)))
    losses, gradient = ref.topk_huber(student, targets, delta=2.0)
    assert losses == pytest.approx([(0.5 + 4 + 0.125) / 2, 2 * (5 - 1)])
    np.testing.assert_allclose(gradient, np.array([[[1, 2], [-0.5, 0]], [[-4, 0], [0, 0]]]) / 4)
    # Centred, the first position has differences -1 and 1; a lone candidate is always at its mean.
    losses, gradient = ref.topk_huber(student, targets, delta=2.0, center=True)
    assert losses == pytest.approx([(0.5 + 0.5) / 2, 0])
    np.testing.assert_allclose(gradient, np.array([[[-1, 1], [0, 0]], [[0, 0], [0, 0]]]) / 4)


@given(seed=seeds, share=shares.filter(bool), center=st.booleans())
def test_the_first_position_has_its_share_and_the_others_have_the_rest(seed: int, share: float, center: bool) -> None:
    student, targets = draw(seed)  # of n positions, and of one
    by_share, _ = ref.topk_huber(student, targets, 1.0, center, share)
    plain, _ = ref.topk_huber(student, targets, 1.0, center)
    first, _ = ref.topk_huber(student[:, :1], Targets(*(part[:, :1] for part in targets)), 1.0, center)
    rest = (n * plain[0] - first[0]) / (n - 1)
    assert by_share == pytest.approx([share * first[0] + (1 - share) * rest, plain[1]])


@given(seed=seeds)
@centers
def test_without_delta_it_is_half_the_squared_error(center: bool, seed: int) -> None:
    student, targets = draw(seed)
    everything = targets._replace(
        candidate_mask=np.ones((B, n, C), dtype=bool), position_mask=np.ones((B, n), dtype=bool)
    )
    error = student - targets.logits
    if center:
        error -= error.mean(axis=-1, keepdims=True)
    losses, _ = ref.topk_huber(student, everything, np.inf, center)
    np.testing.assert_allclose(losses, 0.5 * (error**2).sum(axis=-1).mean(axis=-1), rtol=1e-12)


@given(seed=seeds, garbage=st.sampled_from([np.nan, np.inf, -np.inf, 1e300]), of_teacher=st.booleans())
@centers
def test_what_stands_under_a_mask_changes_nothing(center: bool, seed: int, garbage: float, of_teacher: bool) -> None:
    student, targets = draw(seed)
    plain = ref.topk_huber(student, targets, 1.0, center)
    if of_teacher:
        targets = targets._replace(logits=np.where(valid(targets), targets.logits, garbage))
    else:
        student = np.where(valid(targets), student, garbage)
    for before, after in zip(plain, ref.topk_huber(student, targets, 1.0, center), strict=True):
        np.testing.assert_array_equal(after, before)
    assert not plain[1][~valid(targets)].any()


@given(seed=seeds)
@centers
def test_a_querys_loss_hangs_on_nothing_but_itself(center: bool, seed: int) -> None:
    student, targets = draw(seed)
    losses, gradient = ref.topk_huber(student, targets, 1.0, center)
    for q in range(B):
        alone = Targets(*(part[q : q + 1] for part in targets))
        loss, slope = ref.topk_huber(student[q : q + 1], alone, 1.0, center)
        np.testing.assert_allclose(loss[0], losses[q], rtol=1e-14)
        np.testing.assert_allclose(slope[0], B * gradient[q], rtol=1e-14, atol=1e-16)


@given(seed=seeds, delta=st.floats(0.01, 10))
def test_centred_a_level_common_to_all_candidates_changes_nothing(seed: int, delta: float) -> None:
    student, targets = draw(seed)
    level = np.random.default_rng(seed).normal(scale=30, size=(B, n, 1))
    losses, gradient = ref.topk_huber(student, targets, delta, center=True)
    moved, slope = ref.topk_huber(student + level, targets, delta, center=True)
    np.testing.assert_allclose(moved, losses, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(slope, gradient, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(gradient.sum(axis=-1), 0, atol=1e-14)  # so no step moves the level either


@centers
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(center: bool) -> None:
    _, targets = draw(0)
    for part in ref.topk_huber(targets.logits, targets, 1.0, center):
        assert not part.any()


@centers
def test_a_query_without_positions_or_candidates_divides_nothing_by_zero(center: bool) -> None:
    student, targets = draw(1)
    targets.position_mask[0] = False
    targets.candidate_mask[1] = False
    for part in ref.topk_huber(student, targets, 1.0, center):
        assert not part.any()


@pytest.mark.parametrize("delta", [1e-3, 1.0, 1e3])
def test_huber_is_continuous_at_delta_with_its_slope(delta: float) -> None:
    for sign in (-1, 1):
        below, above = (ref.huber(np.array(sign * delta * f), delta) for f in (1 - 1e-9, 1 + 1e-9))
        assert above[0] == pytest.approx(below[0], rel=1e-8)
        assert above[1] == pytest.approx(below[1], rel=1e-8)


def test_logits_of_ten_thousand_overflow_nothing() -> None:
    student, targets = draw(2)
    for delta in (1e-3, 1.0, np.inf):
        for part in ref.topk_huber(1e4 * student, targets, delta):
            assert np.isfinite(part).all()
