"""The baselines: gradients by finite differences, values by hand, and the known faults of public code."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest

from reference import baselines as ref
from reference.baselines import Answers
from tests.reference.finite_differences import assert_gradient

B, S, V, D = 3, 5, 6, 4
# Prompt first, then the answer, then padding; the three answers have 4, 2 and 1 tokens.
MASK = np.array([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 0, 0, 0]], dtype=bool)
OTHER_MASK = np.array([[0, 0, 0, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=bool)


def draw_answers(rng: np.random.Generator, mask: np.ndarray = MASK, size: float = 2.0) -> Answers:
    return Answers(rng.normal(scale=size, size=(*mask.shape, V)), rng.integers(V, size=mask.shape), mask)


Loss = Callable[..., tuple]


def losses_of_logits(rng: np.random.Generator) -> dict[str, tuple[Loss, list[Answers]]]:
    """Each loss as a function of the logits alone, with the answers to evaluate it at; all else is drawn."""
    one, other = draw_answers(rng), draw_answers(rng, OTHER_MASK)
    reference, reference_nll, idk_nll = rng.normal(size=(B, S, V)), rng.uniform(2, 9, B), rng.uniform(2, 9, B)

    def on_one(loss: Loss) -> tuple[Loss, list[Answers]]:
        return (lambda z: loss(one._replace(logits=z))), [one]

    def on_two(loss: Loss) -> tuple[Loss, list[Answers]]:
        return (lambda z, w: loss(one._replace(logits=z), other._replace(logits=w))), [one, other]

    return {
        "mean nll": on_one(ref.mean_nll),
        "refusal training": on_one(ref.refusal_training),
        "gradient ascent": on_one(ref.gradient_ascent),
        "graddiff": on_two(lambda f, r: ref.grad_diff(f, r, gamma=0.7, alpha=1.3)),
        "npo": on_one(lambda a: ref.npo(a, reference_nll, beta=0.4)),
        "simnpo": on_one(lambda a: ref.simnpo(a, beta=1.5, margin=2.0)),
        "idk dpo": on_two(lambda i, f: ref.idk_dpo(i, f, idk_nll, reference_nll, beta=0.4)),
        "flat": on_two(ref.flat),
        "undial": on_one(lambda a: ref.undial(a, reference, beta=1.5)),
        "full vocabulary kl": on_one(lambda a: ref.full_vocabulary_kl(a.logits, reference, a.mask)),
    }


NAMES = list(losses_of_logits(np.random.default_rng(0)))


def assert_gradients(loss: Loss, inputs: list[np.ndarray]) -> None:
    """The gradients that `loss` returns are those of the mean of the losses, to 1e-6 of the largest entry."""
    gradients = loss(*inputs)[1:]
    assert len(gradients) == len(inputs)
    for i, gradient in enumerate(gradients):

        def value(at: np.ndarray, i: int = i) -> float:
            return float(np.mean(loss(*inputs[:i], at, *inputs[i + 1 :])[0]))

        assert_gradient(value, inputs[i], gradient)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_by_logits_agrees_with_finite_differences(name: str, seed: int) -> None:
    loss, answers = losses_of_logits(np.random.default_rng(seed))[name]
    assert_gradients(loss, [a.logits for a in answers])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rmu_gradient_by_hidden_states_agrees_with_finite_differences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, direction = rng.normal(size=(B, S, D)), ref.rmu_direction(D, seed)

    def loss(forget: np.ndarray, retain: np.ndarray) -> tuple:
        return ref.rmu(forget, MASK, retain, reference, OTHER_MASK, direction, alpha=3.0)

    assert_gradients(loss, [rng.normal(size=(B, S, D)), rng.normal(size=(B, S, D))])


# --- the faults of public code ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_raw_logits_are_never_taken_for_log_probabilities(name: str) -> None:
    """A constant added to a position's logits changes no model; NPO and KL on raw logits notice it."""
    rng = np.random.default_rng(3)
    loss, answers = losses_of_logits(rng)[name]
    plain = loss(*(a.logits for a in answers))
    shifted = loss(*(a.logits + rng.normal(scale=50, size=(B, S, 1)) for a in answers))
    for before, after in zip(plain, shifted, strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-10, atol=1e-12)
    for gradient in plain[1:]:
        np.testing.assert_allclose(gradient.sum(axis=-1), 0.0, atol=1e-14)


def test_kl_does_not_take_log_targets_for_targets_nor_reverse_its_direction() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
    by_hand = 0.7 * np.log(7.0) + 0.2 * np.log(2 / 3) + 0.1 * np.log(1 / 6)  # KL(p ‖ q); the reverse is 0.963
    mask = np.ones((1, 1), dtype=bool)
    value, _ = ref.full_vocabulary_kl(np.log(q)[None, None] + 5.0, np.log(p)[None, None] - 3.0, mask)
    assert value == pytest.approx([by_hand], rel=1e-12)


def test_kl_to_oneself_is_zero_and_to_any_other_positive() -> None:
    rng = np.random.default_rng(4)
    logits, other = rng.normal(size=(2, B, S, V))
    value, gradient = ref.full_vocabulary_kl(logits, logits, MASK)
    assert np.array_equal(value, np.zeros(B)) and np.array_equal(gradient, np.zeros((B, S, V)))
    assert (ref.full_vocabulary_kl(logits, other, MASK)[0] > 0).all()


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_padding_change_no_loss_and_get_no_gradient(name: str, garbage: float) -> None:
    """FLAT's mean probability too: e^0 = 1 at each padding position is no part of the answer's mean."""
    loss, answers = losses_of_logits(np.random.default_rng(5))[name]
    plain = loss(*(a.logits for a in answers))
    dirty = loss(*(np.where(a.mask[..., None], a.logits, garbage) for a in answers))
    for before, after in zip(plain, dirty, strict=True):
        np.testing.assert_array_equal(after, before)
    for a, gradient in zip(answers, plain[1:], strict=True):
        assert np.array_equal(gradient[~a.mask], np.zeros(((~a.mask).sum(), V)))
        assert (gradient[a.mask] != 0).any(axis=-1).all()


@pytest.mark.parametrize(
    "loss",
    [
        ref.mean_nll,
        ref.gradient_ascent,
        ref.simnpo,
        lambda a: ref.npo(a, np.full(1, 4.0)),
        lambda a: ref.flat(a, a._replace(labels=(a.labels + 1) % V)),
        lambda a: ref.idk_dpo(a._replace(labels=(a.labels + 1) % V), a, np.full(len(a.mask), 4.0), np.ones(1)),
        lambda a: ref.undial(a, np.cos(a.logits)),
        lambda a: ref.full_vocabulary_kl(a.logits, np.cos(a.logits), a.mask),
    ],
)
def test_a_querys_loss_depends_on_nothing_but_itself(loss: Loss) -> None:
    """Neither on the batch it is in nor on the padding that the batch's longest answer gives it."""
    answers = draw_answers(np.random.default_rng(6))
    together = loss(answers)[0]
    for b in range(B):
        end = np.flatnonzero(answers.mask[b])[-1] + 1
        alone = Answers(*(part[b : b + 1, :end] for part in answers))
        np.testing.assert_allclose(loss(alone)[0], together[b : b + 1], rtol=1e-13)


def test_labels_off_the_answer_may_be_any_number() -> None:
    answers = draw_answers(np.random.default_rng(7))
    ignored = answers._replace(labels=np.where(answers.mask, answers.labels, -100))
    reference = np.sin(answers.logits)
    for loss in (ref.mean_nll, ref.simnpo, lambda a: ref.flat(a, a), lambda a: ref.undial(a, reference)):
        for before, after in zip(loss(answers), loss(ignored), strict=True):
            np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_ten_thousand_overflow_nothing(name: str) -> None:
    loss, answers = losses_of_logits(np.random.default_rng(8))[name]
    for part in loss(*(a.logits * 1e4 for a in answers)):
        assert np.isfinite(part).all()


def test_a_query_without_answer_positions_adds_no_gradient_and_divides_nothing_by_zero() -> None:
    answers = draw_answers(np.random.default_rng(9))
    empty = answers._replace(mask=answers.mask & (np.arange(B) != 1)[:, None])
    reference = np.sin(answers.logits)
    for loss in (
        ref.mean_nll,
        ref.gradient_ascent,
        ref.simnpo,
        lambda a: ref.npo(a, np.zeros(B)),
        lambda a: ref.flat(a, a),
        lambda a: ref.undial(a, reference),
        lambda a: ref.activation_error(a.logits, 0.0, a.mask),
    ):
        losses, *gradients = loss(empty)
        assert np.isfinite(losses).all()
        assert all(np.array_equal(gradient[1], np.zeros((S, V))) for gradient in gradients)


def test_defaults_are_those_of_the_papers() -> None:
    def defaults(function: Loss) -> dict[str, float]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    assert defaults(ref.grad_diff) == {"gamma": 1.0, "alpha": 1.0}
    assert defaults(ref.npo) == defaults(ref.idk_dpo) == {"beta": 0.1}
    assert defaults(ref.simnpo) == {"beta": 4.5, "margin": 0.0}
    assert (ref.SIMNPO_GAMMA, ref.SIMNPO_ALPHA, ref.FLAT_ALPHA) == (0.125, 1.0, 0.0)
    assert defaults(ref.undial) == {"beta": 10.0}
    assert defaults(ref.rmu) == {"c": 6.5, "alpha": 1200.0}


# --- values that can be written down ------------------------------------------------------------------------


def certain(probabilities: list[float]) -> Answers:
    """One answer whose tokens, all of label 0, have these probabilities; the rest is one other token's."""
    p = np.array(probabilities)
    logits = np.log(np.stack([p, 1 - p], axis=-1))[None]  # [1, S, 2]
    return Answers(logits, np.zeros((1, len(p)), dtype=int), np.ones((1, len(p)), dtype=bool))


def test_likelihood_losses_of_a_known_answer() -> None:
    answers = certain([0.5, 0.25])
    assert ref.answer_nll(answers)[0] == pytest.approx([np.log(8)])
    assert ref.mean_nll(answers)[0] == pytest.approx([np.log(8) / 2])
    assert ref.gradient_ascent(answers)[0] == pytest.approx([-np.log(8) / 2])
    retain = certain([0.25])
    assert ref.grad_diff(answers, retain, 3.0, 5.0)[0] == pytest.approx(-3 * np.log(8) / 2 + 5 * np.log(4))


def test_preference_losses_of_a_known_answer() -> None:
    answers, idk = certain([0.5, 0.25]), certain([0.125])
    # β = 2 and nll - nll_ref = log 3: σ(2 log 3) = 9/10, so the loss is log(10/9).
    assert ref.npo(answers, np.log([8 / 3]), beta=2.0)[0] == pytest.approx([np.log(10 / 9)])
    # β = 2 and nll/|y| = ½ log 8: σ(log 8) = 8/9; a margin of ½ log 2 leaves σ(log 4) = 4/5.
    assert ref.simnpo(answers, beta=2.0)[0] == pytest.approx([np.log(9 / 8)])
    assert ref.simnpo(answers, beta=2.0, margin=np.log(2) / 2)[0] == pytest.approx([np.log(5 / 4)])
    # Refusal three times likelier than under the base, answer half as likely: σ(2 log 6) = 36/37.
    loss = ref.idk_dpo(idk, answers, np.log([24.0]), np.log([4.0]), beta=2.0)[0]
    assert loss == pytest.approx([np.log(37 / 36)])


def test_npo_starts_as_gradient_ascent_on_the_summed_nll() -> None:
    answers = draw_answers(np.random.default_rng(10))
    nll, _ = ref.answer_nll(answers)
    losses, gradient = ref.npo(answers, nll, beta=0.1)
    np.testing.assert_allclose(losses, 20 * np.log(2), rtol=1e-14)
    ascent = ref.gradient_ascent(answers)[1] * ref.answer_length(MASK)[:, None, None]
    np.testing.assert_allclose(gradient, ascent, rtol=1e-13)


def test_npo_lets_go_of_an_answer_that_is_already_unlikely() -> None:
    answers = draw_answers(np.random.default_rng(11))
    _, gradient = ref.npo(answers, np.full(B, -1e4), beta=0.1)
    assert np.abs(gradient).max() < 1e-100


def test_flat_of_known_answers() -> None:
    loss, *_ = ref.flat(certain([0.5, 0.25, 0.75]), certain([0.9, 0.7]))
    assert loss == pytest.approx([np.tanh(0.5) / 2 - np.tanh(0.8) / 2])


def test_undial_lowers_the_answer_tokens_logit_alone() -> None:
    answers = draw_answers(np.random.default_rng(12))
    reference = np.random.default_rng(13).normal(size=(B, S, V))
    lowered = reference.copy()
    for b, s in zip(*np.nonzero(MASK), strict=True):
        lowered[b, s, answers.labels[b, s]] -= 10.0
    _, gradient = ref.undial(answers._replace(logits=lowered), reference)  # the student is already there
    assert np.abs(gradient).max() < 1e-16
    # CE(½, ½ against ¼, ¾): the reference (e^β/(1+e^β), ...) less β on the label is an even coin.
    even = certain([0.25])
    coin = np.array([[[3.0, 0.0]]])
    assert ref.undial(even, coin, beta=3.0)[0] == pytest.approx([-0.5 * np.log(0.25) - 0.5 * np.log(0.75)])


def test_rmu_of_known_hidden_states() -> None:
    direction = np.array([0.6, 0.8])
    forget = np.array([[[3.9, 5.2], [1e9, 1e9]]])  # the first token is at 6.5 u, the second is padding
    retain = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    both, first = np.ones((1, 2), dtype=bool), np.array([[True, False]])
    assert ref.rmu(forget, first, retain, retain, both, direction)[0] == pytest.approx(0.0, abs=1e-12)
    assert ref.rmu(forget + 2.0, first, retain, retain, both, direction)[0] == pytest.approx(4.0)
    moved = retain + np.array([[[1.0, 0.0], [0.0, 0.0]]])  # one of four numbers is off by 1
    assert ref.rmu(forget, first, moved, retain, both, direction)[0] == pytest.approx(1200 / 4)


def test_rmu_direction_is_a_fixed_unit_vector_without_negative_entries() -> None:
    direction = ref.rmu_direction(64, seed=1)
    assert np.linalg.norm(direction) == pytest.approx(1.0)
    assert (direction >= 0).all() and len(np.unique(direction)) == 64
    np.testing.assert_array_equal(direction, ref.rmu_direction(64, seed=1))
    assert not np.array_equal(direction, ref.rmu_direction(64, seed=2))


def test_weighted_total_takes_each_sides_own_mean() -> None:
    forget = (np.array([1.0, 3.0]), np.ones((2, 1, 1)), 2 * np.ones((2, 1, 1)))
    retain = (np.array([5.0]), 3 * np.ones((1, 1, 1)))
    total, first, second, third = ref.weighted_total(forget, retain, gamma=0.125, alpha=2.0)
    assert total == 0.125 * 2 + 2 * 5
    assert (first == 0.125).all() and (second == 0.25).all() and (third == 6).all()
