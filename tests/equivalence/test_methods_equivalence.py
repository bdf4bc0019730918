"""The baselines' losses, backend against reference: values and gradients, and the known faults of public code.

Both files have the same functions with the same arguments, so one table of calls serves both. The bounds come from
running the reference on numbers that carry their rounding errors (running_error.py).
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_mlx import baselines as backend
from reference import baselines as ref
from tests.equivalence.running_error import Bounded
from tests.reference.exact_float64 import exact_float64

GARBAGE = np.array([np.nan, np.inf, -np.inf, 3e38, 0.0], dtype=np.float32)


class Case(NamedTuple):
    """All that any loss reads, in float32 numbers: two answers to the same queries, and what the base says of them."""

    logits: np.ndarray  # [B, S, V]
    labels: np.ndarray  # [B, S]
    mask: np.ndarray  # [B, S]
    other_logits: np.ndarray  # as these three, of another answer; S is the same, its masks are not
    other_labels: np.ndarray
    other_mask: np.ndarray
    reference_logits: np.ndarray  # [B, S, V]
    nll: np.ndarray  # [B], of the base
    other_nll: np.ndarray
    direction: np.ndarray  # [V], RMU's
    beta: float
    margin: float


KEPT = ("labels", "mask", "other_labels", "other_mask", "beta", "margin")  # not among the logits' dtype

# name -> (how many answers' logits it reads, its call in either room, on two answers a and b and the case x)
LOSSES: dict[str, tuple[int, Any]] = {
    "mean_nll": (1, lambda room, a, b, x: room.mean_nll(a)),
    "refusal_training": (1, lambda room, a, b, x: room.refusal_training(a)),
    "gradient_ascent": (1, lambda room, a, b, x: room.gradient_ascent(a)),
    "npo": (1, lambda room, a, b, x: room.npo(a, x.nll, x.beta)),
    "simnpo": (1, lambda room, a, b, x: room.simnpo(a, x.beta, x.margin)),
    "idk_dpo": (2, lambda room, a, b, x: room.idk_dpo(a, b, x.nll, x.other_nll, x.beta)),
    "flat": (2, lambda room, a, b, x: room.flat(a, b)),
    "full_vocabulary_kl": (1, lambda room, a, b, x: room.full_vocabulary_kl(a.logits, x.reference_logits, a.mask)),
    "undial": (1, lambda room, a, b, x: room.undial(a, x.reference_logits, x.beta)),
    "activation_error": (1, lambda room, a, b, x: room.activation_error(a.logits, x.reference_logits, a.mask)),
    "activation_error of one": (1, lambda room, a, b, x: room.activation_error(a.logits, x.beta * x.direction, a.mask)),
}


@st.composite
def masks(draw: Any, rng: Any, B: int, S: int) -> np.ndarray:  # noqa: N803
    """A prompt, an answer and padding in each row; or answers of any shape, or none."""
    if draw(st.booleans()):
        start, stop = np.sort(rng.integers(0, S + 1, size=(2, B, 1)), axis=0)
        return (start <= np.arange(S)) & (np.arange(S) < stop)
    return rng.random((B, S)) < draw(st.sampled_from([0.0, 0.5, 1.0]))


@st.composite
def cases(draw: Any) -> Case:
    """Logits from nearly level to 1e4; labels likely and unlikely; anything off the masks, in logits and labels."""
    B, S, V = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 12)))  # noqa: N806
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))

    def answers() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        logits = (scale * rng.normal(size=(B, S, V))).astype(np.float32)
        if draw(st.booleans()):  # ties, also for the largest
            logits = np.round(logits / scale).astype(np.float32) * np.float32(scale)
        likely = rng.random((B, S)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
        labels = np.where(likely, logits.argmax(axis=-1), rng.integers(V, size=(B, S)))
        mask = draw(masks(rng, B, S))
        logits[~mask] = rng.choice(GARBAGE, size=(np.count_nonzero(~mask), V))
        return logits, np.where(mask, labels, rng.choice([-100, 2**30, 0], size=(B, S))), mask

    one, other = answers(), answers()
    reference = one[0].copy()  # a trained student is close to the base, or far from it
    spread = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
    reference[one[2]] += (spread * rng.normal(size=reference[one[2]].shape)).astype(np.float32)
    nll = [ref.answer_nll(ref.Answers(*answer))[0] + spread * rng.normal(size=B) for answer in (one, other)]
    beta, margin = draw(st.sampled_from([0.1, 0.4, 4.5, 10.0])), draw(st.sampled_from([0.0, 0.3, 2.0]))
    constants = (c.astype(np.float32) for c in (reference, *nll, rng.random(V)))
    return Case(*one, *other, *constants, beta, margin)


def of_reference(name: str, case: Case, unit: float) -> tuple[np.ndarray, list[np.ndarray], Bounded, list[Bounded]]:
    """Losses and gradients exactly, and the same with bounds."""
    count, call = LOSSES[name]
    wide = case._replace(**{k: v.astype(np.float64) for k, v in case._asdict().items() if k not in KEPT})
    bounded = wide._replace(**{k: Bounded(v, 0.0, unit) for k, v in wide._asdict().items() if k not in KEPT})

    def run(x: Any) -> tuple[Any, list[Any]]:
        a = ref.Answers(x.logits, x.labels, x.mask)
        losses, *gradients = call(ref, a, ref.Answers(x.other_logits, x.other_labels, x.other_mask), x)
        assert len(gradients) == count
        return losses, gradients

    with np.errstate(invalid="ignore"):  # inf - inf off the mask
        return *run(wide), *run(bounded)


def of_backend(name: str, case: Case, dtype: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Losses, and the gradients of their mean as MLX differentiates them."""
    count, call = LOSSES[name]
    narrow = {k: mx.array(v.astype(np.float64), dtype=dtype) for k, v in case._asdict().items() if k not in KEPT}
    kept = {k: mx.array(getattr(case, k)) for k in KEPT[:4]}
    x = case._replace(**narrow, **kept)

    def losses(logits: mx.array, other: mx.array) -> mx.array:
        a = backend.Answers(logits, x.labels, x.mask)
        return call(backend, a, backend.Answers(other, x.other_labels, x.other_mask), x)

    gradients = mx.grad(lambda *z: losses(*z).mean(), argnums=(0, 1))(x.logits, x.other_logits)
    value = losses(x.logits, x.other_logits)
    assert value.dtype == dtype and all(g.dtype == dtype for g in gradients)
    assert value.shape == (len(case.mask),)
    return np.array(value).astype(np.float64), [np.array(g).astype(np.float64) for g in gradients[:count]]


def check(name: str, case: Case, dtype: Any, unit: float, share: float) -> None:
    losses, gradients, bounded, bounded_gradients = of_reference(name, case, unit)
    got, got_gradients = of_backend(name, case, dtype)
    for have, want, bound in zip(
        [got, *got_gradients], [losses, *gradients], [bounded, *bounded_gradients], strict=True
    ):
        error, most = np.abs(have - want), share * bound.error
        assert np.isfinite(have).all() and np.isfinite(most).all()
        assert (error <= most).all(), f"{name}: off by {error[error > most]}, allowed {most[error > most]}"


@pytest.mark.parametrize("name", LOSSES)
@given(case=cases())
def test_float32_value_and_gradient_are_the_references_within_the_bound(name: str, case: Case) -> None:
    check(name, case, mx.float32, 2.0**-24, 1.0)


@pytest.mark.parametrize("name", LOSSES)
@given(case=cases())
def test_float64_value_and_gradient_are_the_references_within_the_bound(name: str, case: Case) -> None:
    with exact_float64():
        check(name, case, mx.float64, 2.0**-53, 2.0)  # the reference rounds as well


# --- the same functions in both files -----------------------------------------------------------------------


def test_losses_have_the_references_names_arguments_and_defaults() -> None:
    def signature(function: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    mine = {name: f for name, f in vars(backend).items() if inspect.isfunction(f) and not name.startswith("_")}
    assert {call.split()[0] for call in LOSSES} <= mine.keys()
    for name, function in mine.items():
        assert signature(function) == signature(getattr(ref, name)), name


def test_rmus_direction_is_the_references() -> None:
    np.testing.assert_array_equal(backend.rmu_direction(64, seed=3), ref.rmu_direction(64, seed=3))


# --- known faults of public code ----------------------------------------------------------------------------


def drawn(seed: int, size: float = 2.0) -> Case:
    """Three answers of 4, 2 and 1 tokens, with a prompt before and padding behind."""
    rng = np.random.default_rng(seed)
    mask = np.array([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 0, 0, 0]], dtype=bool)
    other_mask = np.array([[0, 0, 0, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=bool)
    logits, other, reference = (size * rng.normal(size=(3, 3, 5, 6))).astype(np.float32)
    labels, other_labels = rng.integers(6, size=(2, 3, 5))
    nll, other_nll = rng.uniform(2, 9, size=(2, 3)).astype(np.float32)
    direction = rng.random(6).astype(np.float32)
    return Case(logits, labels, mask, other, other_labels, other_mask, reference, nll, other_nll, direction, 0.4, 2.0)


OF_LOGITS = [name for name in LOSSES if not name.startswith("activation")]


@pytest.mark.parametrize("name", OF_LOGITS)
def test_raw_logits_are_never_taken_for_log_probabilities(name: str) -> None:
    """A constant added to a position's logits changes no model; NPO, SimNPO or KL on raw logits would notice."""
    case, shift = drawn(0), 64.0  # a power of two, so that little is rounded off
    moved = case._replace(
        logits=case.logits + shift, other_logits=case.other_logits - shift, reference_logits=case.reference_logits + 1
    )
    before, after = of_backend(name, case, mx.float32), of_backend(name, moved, mx.float32)
    # Logits near 64 are rounded to 2^-18 at most; in nll five of them, beside the largest of their position.
    np.testing.assert_allclose(after[0], before[0], rtol=0, atol=10 * 2.0**-18)
    for gradient, other in zip(before[1], after[1], strict=True):
        np.testing.assert_allclose(other, gradient, rtol=0, atol=10 * 2.0**-18)
        np.testing.assert_allclose(gradient.sum(axis=-1), 0, atol=1e-6)


def test_kl_does_not_take_log_targets_for_targets_nor_reverse_its_direction() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
    by_hand = 0.7 * np.log(7.0) + 0.2 * np.log(2 / 3) + 0.1 * np.log(1 / 6)  # KL(p ‖ q); the reverse is 0.963
    logits, targets = (mx.array(np.log(x)[None, None] + shift) for x, shift in ((q, 5.0), (p, -3.0)))
    value = backend.full_vocabulary_kl(logits, targets, mx.array([[True]]))
    assert value.item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_prompt_and_padding_change_no_loss_and_get_no_gradient(name: str, garbage: float) -> None:
    """FLAT's mean probability too: e^0 = 1 at each padding position is no part of the answer's mean."""
    case = drawn(1)

    def dirty(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.where(mask[..., None], logits, garbage).astype(np.float32)

    spoilt = case._replace(
        logits=dirty(case.logits, case.mask), labels=np.where(case.mask, case.labels, -100),
        other_logits=dirty(case.other_logits, case.other_mask),
        reference_logits=dirty(case.reference_logits, case.mask),
    )  # fmt: skip
    before, after = of_backend(name, case, mx.float32), of_backend(name, spoilt, mx.float32)
    np.testing.assert_array_equal(after[0], before[0])
    for mask, gradient, other in zip([case.mask, case.other_mask], before[1], after[1], strict=False):
        np.testing.assert_array_equal(other, gradient)
        assert not gradient[~mask].any()
        assert (gradient[mask] != 0).any(axis=-1).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_querys_loss_depends_on_nothing_but_itself(name: str) -> None:
    """Neither on the batch it is in nor on the padding that the batch's longest answer gives it."""
    case = drawn(2)
    together, _ = of_backend(name, case, mx.float32)
    for b in range(3):
        end = 1 + np.flatnonzero(case.mask[b] | case.other_mask[b])[-1]
        rows = {k: v[b : b + 1] for k, v in case._asdict().items() if np.ndim(v) and k != "direction"}
        rows = {k: v[:, :end] if v.ndim > 1 else v for k, v in rows.items()}
        alone, _ = of_backend(name, case._replace(**rows), mx.float32)
        np.testing.assert_allclose(alone, together[b : b + 1], rtol=1e-6)


@pytest.mark.parametrize("name", ["full_vocabulary_kl", "undial", "activation_error"])
def test_no_gradient_reaches_what_the_base_said(name: str) -> None:
    case = drawn(3)
    answers = backend.Answers(*map(mx.array, (case.logits, case.labels, case.mask)))

    def loss(reference: mx.array) -> mx.array:
        return LOSSES[name][1](backend, answers, None, case._replace(reference_logits=reference)).mean()

    assert not np.array(mx.grad(loss)(mx.array(case.reference_logits))).any()
