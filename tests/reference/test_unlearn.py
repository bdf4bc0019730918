"""Baselines on a whole model: the gradient by finite differences, the base's answers, one step of Adam."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import adam, baselines, lora, unlearn
from reference.transformer import Model, forward
from reference.unlearn import Labelled
from tests.reference.finite_differences import numerical_slope, rounding
from tests.reference.test_duet import draw_model

FORGET = Labelled([[6, 1, 7], [2, 5]], [[3, 8], [1, 4, 0]])
RETAIN = Labelled([[3, 3, 6, 1]], [[2, 2, 5, 8]])


def npo_with_retain(forget: Any, retain: Any) -> tuple:
    return baselines.weighted_total(
        baselines.npo(forget, np.array([2.0, 5.0]), beta=0.4), baselines.mean_nll(retain), gamma=0.5, alpha=2.0
    )


@given(seed=st.integers(0, 2**32))
@settings(max_examples=10)
def test_the_gradient_of_a_baseline_agrees_with_finite_differences(seed: int) -> None:
    """Along a random direction in all LoRA factors at once."""
    student = draw_model(seed, trained=True)
    start, rng = lora.parameters(student.adapters), np.random.default_rng(seed)
    direction = {name: rng.normal(size=a.shape) for name, a in start.items()}
    norm = np.sqrt(sum((d**2).sum() for d in direction.values()))

    def loss_at(step: float) -> tuple[float, adam.Tree]:
        moved = {name: a + step / norm * direction[name] for name, a in start.items()}
        there = student._replace(adapters=lora.updated(student.adapters, moved))
        return unlearn.loss_and_gradients(there, [FORGET, RETAIN], npo_with_retain)

    value, gradients = loss_at(0.0)
    along = sum((gradients[name] * d).sum() for name, d in direction.items()) / norm
    size, step = np.sqrt(sum((g**2).sum() for g in gradients.values())), 2e-4
    assert abs(numerical_slope(lambda step: loss_at(step)[0], step) - along) <= 1e-6 * size + rounding(value, step)


def test_the_bases_answers_are_greedy_and_end_with_their_end_of_turn() -> None:
    base = draw_model(1)._replace(adapters={})
    [answer] = unlearn.base_answers(base, [[6, 1, 7]], 5)
    assert len(answer) == 5
    for t, word in enumerate(answer):
        logits, _, _ = forward(base, np.array([[6, 1, 7, *answer[:t]]]))
        assert word == logits[0, -1].argmax()
    end = answer[2]
    assert unlearn.base_answers(base, [[6, 1, 7]], 5, stop=[end]) == [answer[: answer.index(end) + 1]]


def test_the_base_gives_its_own_greedy_answer_the_largest_logits() -> None:
    base = draw_model(2)._replace(adapters={})
    prompts = [[6, 1, 7], [2, 5]]
    labels = unlearn.base_answers(base, prompts, 4)
    answers, _ = unlearn.read(base, Labelled(prompts, labels))
    np.testing.assert_array_equal(answers.logits.argmax(axis=-1), labels)
    np.testing.assert_array_equal(answers.labels, labels)


def test_fine_tuning_on_a_text_makes_it_likely_and_gradient_ascent_unlikely() -> None:
    def after(loss: Any) -> float:
        student, losses = unlearn.run(draw_model(3), [([FORGET], loss)] * 30, [0.02] * 30)
        assert losses[-1] < losses[0]
        return nll(student)

    def nll(model: Model) -> float:
        return baselines.answer_nll(unlearn.read(model, FORGET)[0])[0].sum()

    def mean(loss: Any) -> Any:
        return lambda answers: (loss(answers)[0].mean(), loss(answers)[1])

    assert after(mean(baselines.mean_nll)) < nll(draw_model(3)) < after(mean(baselines.gradient_ascent))


def test_a_layers_states_are_read_at_the_answers_positions_and_give_no_gradient_above() -> None:
    student = draw_model(5, trained=True, layers=2)
    hidden, back = unlearn.read_layer(student, FORGET, layer=0)
    assert hidden.states.shape == (2, 3, 4) and hidden.mask.tolist() == [[True, True, False], [True, True, True]]
    alone, _ = unlearn.read_layer(student, Labelled([[6, 1, 7]], [[3, 8]]), layer=0)
    np.testing.assert_allclose(hidden.states[0, :2], alone.states[0], rtol=1e-12)
    gradients = back(np.ones_like(hidden.states))
    assert gradients and all(name.startswith("model.layers.0.") for name in gradients)
    _, everywhere = unlearn.loss_and_gradients(
        student, [FORGET], lambda h: (h.states.sum(), np.ones_like(h.states)), partial(unlearn.read_layer, layer=0)
    )
    assert everywhere.keys() == lora.parameters(student.adapters).keys()
    assert not any(g.any() for name, g in everywhere.items() if name.startswith("model.layers.1."))


def test_one_step_is_adams() -> None:
    student = draw_model(4)
    arrays = lora.parameters(student.adapters)
    value, gradients = unlearn.loss_and_gradients(student, [FORGET, RETAIN], npo_with_retain)
    expected, _ = adam.step(arrays, gradients, adam.init(arrays), 0.01)
    after, losses = unlearn.run(student, [([FORGET, RETAIN], npo_with_retain)], [0.01])
    assert losses == [pytest.approx(value)]
    for name, array in lora.parameters(after.adapters).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-12)
