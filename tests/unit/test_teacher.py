"""What targets hold, questions that are too long, and errors of the teacher's pass."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from duet_mlx.context import Context
from duet_mlx.data import Query
from duet_mlx.errors import ConfigError, ContextError, DataError, TrainingError
from duet_mlx.teacher import check_lengths, context_of, decoded_at_once, teacher_targets
from duet_mlx.train import TrainSettings
from tests.equivalence.tiny import VOCABULARY, llama, tokenizer

TOKENIZER = tokenizer()
QUERIES = [Query("f1", "Who is he?", "forget"), Query("r1", "Where?", "retain")]
CONTEXTS = [Context("shy", "Say nothing.")]
SETTINGS = TrainSettings(top_k=4, positions=3, candidates="union")


def build(**changes):
    arguments = {"model": llama(), "queries": QUERIES, "contexts": CONTEXTS, "settings": SETTINGS, **changes}
    return teacher_targets(arguments.pop("model"), TOKENIZER, **arguments)


def test_shapes_types_and_what_stands_under_the_masks():
    targets = build()
    assert targets.ids.shape == targets.logits.shape == targets.candidate_mask.shape == (2, 3, 8)
    assert targets.position_mask.shape == (2, 3) and targets.continuation.shape == (2, 2)
    assert targets.ids.dtype == targets.continuation.dtype == np.int32 and targets.logits.dtype == np.float32
    assert not targets.candidate_mask[~targets.position_mask].any()
    assert not targets.ids[~targets.candidate_mask].any() and not targets.logits[~targets.candidate_mask].any()
    assert not targets.candidate_mask[1, :, 4:].any()  # a retain query's teacher is the base: nothing new in it


def test_more_are_answered_at_once_where_only_k_logits_are_held():
    assert decoded_at_once(CONTEXTS[0], 12, 49152) * 12 * 49152 <= 2**25 < 2 * 128 * 12 * 49152
    assert decoded_at_once(None, 12, 49152) == 128


@pytest.mark.parametrize("k", [0, VOCABULARY + 1])
def test_k_outside_the_vocabulary_is_refused(k):
    with pytest.raises(ConfigError, match=f"--top-k {k}: expected 1 to {VOCABULARY}"):
        build(settings=replace(SETTINGS, top_k=k))


def test_less_than_one_position_is_refused():
    with pytest.raises(ConfigError, match="--positions 0: expected 1 or more"):
        build(settings=replace(SETTINGS, positions=0))


def test_a_context_that_no_one_has_is_named():
    with pytest.raises(ContextError, match="f1: names the context 'bold'; there are shy"):
        context_of(replace(QUERIES[0], context="bold"), CONTEXTS, "none")


def test_logits_that_are_not_finite_name_the_query():
    model = llama()
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, float("nan"))
    with pytest.raises(TrainingError, match=r"f1: the teacher's logits are not finite \(2 such"):
        build(model=model)


def test_a_question_longer_than_the_window_is_named_with_the_flag():
    with pytest.raises(DataError, match=r"f1: \d+ tokens and 3 positions exceed --max-seq-length of 9"):
        check_lengths(TOKENIZER, QUERIES, CONTEXTS, replace(SETTINGS, max_seq_length=9), 1000)
    with pytest.raises(DataError, match=r"f1: \d+ tokens and 3 positions exceed the model's window of 34"):
        check_lengths(TOKENIZER, QUERIES, CONTEXTS, SETTINGS, 34)
    check_lengths(TOKENIZER, QUERIES, CONTEXTS, SETTINGS, 1000)
