"""The benchmarks' metrics of the backend equal the reference's on any input where both are defined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from duet_mlx import benchmark_metrics as ours
from reference import metrics as ref

WORDS = ["the", "boy", "lived", "lives", "castles", "castle", "flies", "Question:", "\n\n", "\nQuestion", "a", "7", "é"]
texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
text_pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=5)
shares = st.floats(0, 1)
# A token's log-probability: down to where float32 has e^x = 0.
log_probs = st.lists(st.floats(-120, 0), min_size=1, max_size=12).map(np.array)
several_log_probs = st.lists(log_probs, min_size=1, max_size=5)
ratios = st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=9).map(np.array)
# Few values, so that samples have ties.
samples = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=12).map(np.array)
tokens = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=9)


@given(text_pairs)
@example([("...", "a")])
def test_rouge_knowmem_and_verbmem(pairs):
    targets, answers = zip(*pairs, strict=True)
    assert ours.knowmem(targets, answers) == pytest.approx(ref.knowmem(targets, answers))
    assert ours.mean_rouge_f1(targets, answers) == pytest.approx(ref.mean_rouge_f1(targets, answers))
    for target, answer in pairs:
        assert ours.rouge_recall(target, answer) == ref.rouge_recall(target, answer)
        assert ours.knowmem_cut(answer) == ref.knowmem_cut(answer)


@given(text_pairs, texts)
def test_the_knowmem_prompt(shots, question):
    assert ours.knowmem_prompt(shots, question) == ref.knowmem_prompt(shots, question)


@given(several_log_probs, several_log_probs)
def test_min_k_and_the_leak(forget, holdout):
    scores = [[ours.min_k(text) for text in side] for side in (forget, holdout)]
    assert scores[0] == pytest.approx([ref.min_k(text) for text in forget])
    assert ours.leak_auc(*scores) == pytest.approx(ref.leak_auc(forget, holdout))


@given(samples, samples)
def test_auc_with_ties(positives, negatives):
    assert ours.auc(positives, negatives) == pytest.approx(ref.auc(positives, negatives))


@given(shares, st.floats(0.01, 1))
def test_privleak(unlearned, retrained):
    assert ours.privleak(unlearned, retrained) == pytest.approx(ref.privleak(unlearned, retrained))


@given(log_probs, several_log_probs)
def test_tofus_probabilities_and_truth_ratio(answer, others):
    assert ours.probability(answer) == pytest.approx(ref.probability(answer))
    assert ours.truth_ratio(answer, others) == pytest.approx(ref.truth_ratio(answer, others))
    expected = ref.option_probability(answer, others)
    assert ours.option_probability(answer, others) == pytest.approx(expected)


@given(ratios)
def test_truth_ratios_read_both_ways(values):
    assert ours.forget_truth_ratio(values.tolist()) == pytest.approx(ref.forget_truth_ratio(values))
    assert ours.utility_truth_ratio(values.tolist()) == pytest.approx(ref.utility_truth_ratio(values))


@given(samples, samples)
@example(np.array([1.0]), np.array([1.0]))
@example(np.arange(60.0), np.arange(60.0) + 60)
def test_the_ks_p_value(first, second):
    assert ours.ks_distance(first, second) == ref.ks_distance(first, second)
    assert ours.ks_p_value(first, second) == pytest.approx(ref.ks_p_value(first, second), rel=1e-10)
    assert ours.forget_quality(first.tolist(), second.tolist()) == ours.ks_p_value(first, second)


@given(st.lists(shares, min_size=1, max_size=9))
def test_model_utility(values):
    assert ours.model_utility(values) == pytest.approx(ref.model_utility(values))


@given(tokens)
def test_memorisation(pairs):
    predicted, labels = map(np.array, zip(*pairs, strict=True))
    assert ours.exact_memorisation(predicted, labels) == ref.exact_memorisation(predicted, labels)
    assert ours.extraction_strength(predicted, labels) == pytest.approx(ref.extraction_strength(predicted, labels))


@given(st.lists(st.integers(0, 3).map(float), min_size=6, max_size=9), st.permutations(range(6)), st.integers(2, 5))
def test_multiple_choice_with_ties(logits, order, options):
    assert ours.multiple_choice(logits, order[:options]) == ref.multiple_choice(logits, order[:options])


@given(st.lists(st.tuples(shares, shares), max_size=4), st.lists(st.tuples(shares, shares), max_size=4))
def test_the_performance_shift(forget, utility):
    assert ours.performance_shift(forget, utility) == ref.performance_shift(forget, utility)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8))
@example([(0, 0)])
def test_the_paired_p_value_by_all_sign_flips(pairs):
    first, second = ([value / 3 for value in side] for side in zip(*pairs, strict=True))
    assert ours.paired_p_value(first, second) == pytest.approx(ref.paired_p_value(first, second))
