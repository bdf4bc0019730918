"""What must change nothing for any method: shared prefix, layers run once, padding, cuts; what a run starts from."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from duet_mlx import generate, methods
from duet_mlx.context import Context, render
from duet_mlx.data import Query, in_turn
from duet_mlx.head import check_head
from duet_mlx.labels import refusals_of, targets_of
from duet_mlx.lower import run_lower
from duet_mlx.methods import METHODS, method_loss
from duet_mlx.probe import answer_ids
from duet_mlx.stream import Stream
from duet_mlx.train import TrainSettings
from tests.equivalence.test_invariants import TOKENIZER, UPPER, head_of
from tests.equivalence.tiny import FLOAT64, shared
from tests.reference.exact_float64 import exact_float64

CONTEXTS = [Context("shy", "Say nothing.", (("Who?", "No."),))]
texts = st.text(alphabet="abcWho ?", min_size=1, max_size=9).filter(str.strip)


def settings_of(method: str, **more: Any) -> TrainSettings:
    # Smaller weights than 1200: the bound below is for losses of order 1.
    numbers = {"rmu": {"layer": 2, "c": 1.0, "alpha": 1.0}, "flat": {"alpha": 1.0}, "undial": {"alpha": 0.5}}
    options = {"top_k": 4, "positions": 3, "answer_tokens": 4, "refusals": None, **more}
    return TrainSettings(method=method, method_parameters=numbers.get(method, {}), **options)


@pytest.mark.parametrize("method", METHODS)
@given(forget=st.lists(texts, min_size=1, max_size=3), kept=st.lists(texts, min_size=1, max_size=3))
@shared(len(METHODS))
def test_prefix_lower_layers_padding_and_cutting_change_no_loss_and_no_gradient(
    method: str, forget: list[str], kept: list[str]
) -> None:
    """In float64, whose rounding is so small that nothing else can hide in it.

    A log-probability moves by FLOAT64 of the largest logit, below 100. An answer sums at most 50 of them (refusals),
    and no slope of a loss is above 2; gradients are of the size of what multiplies them.
    """
    assume(not {*forget} & {*kept})  # GradDiff of one question on both sides is nothing at all
    settings = settings_of(method)
    queries = [Query(f"f{i}", text, "forget") for i, text in enumerate(forget)]
    queries += [Query(f"r{i}", text, "retain") for i, text in enumerate(kept)]
    with exact_float64():
        model = UPPER[mx.float64, True]
        head = head_of(model)
        targets = targets_of(model, TOKENIZER, queries, CONTEXTS, settings, head)
        prompts = [render(TOKENIZER, query.question) for query in queries]
        rows, first = np.arange(len(queries)), np.arange(len(forget))

        def both(length: int, once: bool, more: int, part: int = 10**6) -> tuple[float, dict[str, mx.array]]:
            stream = Stream(prompts, targets, length, first)
            with patch.object(generate, "PIECE", part + 1):  # of the prefix
                lower = run_lower(model, 2, prompts[0][:length], [stream]) if once else None
            batch = stream.batch(rows)
            if more:
                wider = {"tokens": mx.pad(batch.tokens, ((0, 0), (0, more)))}
                if batch.hidden is not None:
                    wider["hidden"] = mx.pad(batch.hidden, ((0, 0), (0, more), (0, 0)))
                batch = batch._replace(**wider)
            loss = method_loss(settings, prompts[0][:length], head, lower)
            cut = [patch.object(methods, name, part) for name in ("PART", "LARGE")]
            with cut[0], cut[1], patch.object(generate, "PIECE", part + 1):
                (total, count), gradient = nn.value_and_grad(model, loss)(model, batch)
            assert count == len(queries)
            return total.item(), dict(tree_flatten(gradient))

        total, gradient = both(0, False, 0)
        assert math.isfinite(total) and any(np.array(g).any() for g in gradient.values())
        largest = max(np.abs(np.array(g)).max() for g in gradient.values())
        atol = 2 * 50 * len(queries) * FLOAT64 * 100
        for changed in ((generate.common_prefix(prompts), False, 0, 1), (3, True, 5, 1)):
            again, other = both(*changed)
            assert again == pytest.approx(total, abs=atol)
            for name, value in gradient.items():
                np.testing.assert_allclose(np.array(other[name]), np.array(value), rtol=0, atol=atol * (1 + largest))


def started(method: str, **more: Any) -> tuple[float, list[float]]:
    """The loss of a student that is still the base, of forget and retain queries together and of each alone."""
    settings = settings_of(method, **more)
    queries = [Query("f0", "Who?", "forget"), Query("f1", "Who a?", "forget"), Query("r0", "b?", "retain")]
    model = UPPER[mx.float32, True]
    head, _ = check_head(model, mx.array([[1, 2, 3]]))
    targets = targets_of(model, TOKENIZER, queries, CONTEXTS, settings, head)
    stream = Stream([render(TOKENIZER, q.question) for q in queries], targets, 0, [0, 1])
    loss = method_loss(settings, [], head)
    values = [loss(model, stream.batch(rows)) for rows in (np.arange(3), np.arange(2), np.arange(2, 3))]
    return values[0][0].item() / 3, [total.item() / count for total, count in values[1:]]


def test_npo_and_idkdpo_start_at_the_log_of_two_since_the_frozen_numbers_are_the_students_own() -> None:
    for method in ("npo", "idkdpo"):
        both, (forget, retain) = started(method)
        assert forget == pytest.approx(2 / 0.1 * math.log(2), rel=1e-5)
        assert both == pytest.approx(forget + retain, rel=1e-5)


def test_undial_of_no_penalty_and_kl_to_a_teacher_without_context_start_at_the_base() -> None:
    """KL is 0 there; UNDIAL's cross-entropy with the base is at its least, so that its gradient is 0."""
    CONTEXTS.append(Context("empty"))
    try:
        CONTEXTS.reverse()
        assert started("kl")[0] == pytest.approx(0, abs=1e-5)
    finally:
        CONTEXTS.remove(Context("empty"))
    assert started("kl")[0] > 1e-3


def test_rmus_retain_term_starts_at_zero_and_its_forget_term_does_not() -> None:
    _, (forget, retain) = started("rmu")
    assert retain == pytest.approx(0, abs=1e-8) and forget > 1e-3


def test_a_weight_of_zero_leaves_the_retain_questions_out() -> None:
    _, (forget, retain) = started("ga")
    assert forget < 0 and retain == 0


def test_a_refusal_stands_beside_the_answer_to_its_own_question() -> None:
    settings = settings_of("idkdpo")
    queries = [Query(f"f{i}", text, "forget") for i, text in enumerate(["Who a?", "b?", "ccc?"])]
    queries.insert(1, Query("r0", "o?", "retain"))
    model, prompts = UPPER[mx.float32, True], [render(TOKENIZER, query.question) for query in queries]
    targets = targets_of(model, TOKENIZER, queries, CONTEXTS, settings, check_head(model, mx.array([[1, 2, 3]]))[0])
    batch = Stream(prompts, targets, 0, [0, 2, 3]).batch(np.array([3, 0, 1]))
    assert batch.forget == 2
    asked = [3, 0, 3, 0, 1]  # answers to two forget questions, refusals of the same, and what is kept
    refusals = refusals_of(settings)
    for row, index in enumerate(asked):
        words = batch.tokens[row].tolist()
        assert words[: len(prompts[index])] == prompts[index]
        if row in (2, 3):
            labels = batch.ids[row, :, 0].tolist()
            expected = answer_ids(TOKENIZER, in_turn(queries[index], refusals))
            assert labels[: len(expected)] == expected
