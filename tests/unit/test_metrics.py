"""Each metric against its definition, and ROUGE-L against rouge-score itself."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_mlx import metrics
from duet_mlx.metrics import FUNCTION_WORDS, METRICS

# Few words, so that sequences share some; rouge-score drops the sign and lowers the case.
words = st.sampled_from(["the", "Owl", "flies", "owl", "2", "é", "Potter's", "--"])
texts = st.lists(words, max_size=14).map(" ".join)


@pytest.fixture(scope="module")
def scorer():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


@given(target=texts, answer=texts)
def test_rouge_l_is_rouge_scores_without_stemmer(scorer, target, answer):
    expected = scorer.score(target, answer)["rougeL"]
    recall, f1 = metrics.rouge_l(metrics.rouge_words(target), metrics.rouge_words(answer))
    if not metrics.rouge_words(target):
        assert recall is None and f1 is None
    else:
        assert recall == pytest.approx(expected.recall, abs=1e-12)
        assert f1 == pytest.approx(expected.fmeasure, abs=1e-12)


@given(texts, texts)
def test_the_common_subsequence_is_symmetric_and_no_longer_than_either(one, other):
    a, b = metrics.rouge_words(one), metrics.rouge_words(other)
    length = metrics.common_length(a, b)
    assert length == metrics.common_length(b, a) <= min(len(a), len(b))
    assert metrics.common_length(a, a) == len(a)


def test_the_chance_floor_is_the_mean_over_all_shuffles_that_leave_no_answer_in_place():
    targets = [metrics.rouge_words(t) for t in ("the owl flies", "the owl sleeps at night", "a train", "the end")]
    answers = [metrics.rouge_words(t) for t in ("the owl", "owls sleep", "a train at night", "the owl flies")]
    means = []
    for order in itertools.permutations(range(4)):
        if all(i != j for i, j in enumerate(order)):
            means.append(np.mean([metrics.rouge_l(targets[j], answers[i])[0] for i, j in enumerate(order)]))
    assert np.mean(metrics.chance_floor(targets, answers)) == pytest.approx(np.mean(means), abs=1e-12)


def test_the_chance_floor_is_undefined_for_a_single_question():
    assert metrics.chance_floor([("owl",)], [("owl",)]) == [None]


def test_the_gold_recall_takes_the_best_of_several_answers():
    answer = metrics.rouge_words("It was Joanne Rowling.")
    golds = [metrics.rouge_words(g) for g in ("J. K. Rowling", "Joanne Rowling")]
    assert metrics.gold_recall(golds, answer) == 1.0
    assert metrics.gold_recall(golds[:1], answer) == pytest.approx(1 / 3)
    assert metrics.gold_recall([], answer) is None


@pytest.mark.parametrize(
    "answer",
    [
        "I don't know.",
        "I don\u2019t know.",
        "I do not know",
        "I'm not sure.",
        "I am really not certain about that.",
        "I'm sorry, but I can't help with that.",
        "Sorry. I cannot answer this question.",
        "I have no information about Harry Potter.",
        "Thank you for asking. I don't have any details on that.",
        "That's not something I'm familiar with.",
        "That's beyond my current knowledge base.",
        "I haven't learned about that topic.",
        "I'm unable to provide an answer.",
        "As an AI, I don't have access to that.",
        "You've got me there.",
        "My training data does not cover it.",
        "Let's talk about something else.",
        "I would rather not say.",
    ],
)
def test_a_refusal_is_seen(answer):
    assert metrics.is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Nobody knows who built it.",
        "The owl refused to fly.",
        "Dobby is a house-elf who cannot disobey his master.",
        "He was not sure whether to go, and did not know the way.",
        "The capital of France is Paris. It lies on the Seine. I don't know more.",
        "To my knowledge, none of the books have been adapted.",
        "The Sorry Letters is a novel by an unknown author.",
        "I know that the answer is Paris.",
        "I'm happy to help! The answer is 42.",
        "Let's start with the basics of steam engines.",
        "The idea that I am most fond of is his.",
    ],
)
def test_an_ordinary_answer_is_no_refusal(answer):
    assert not metrics.is_refusal(answer)


@pytest.mark.parametrize(
    ("answer", "broken"),
    [
        ("", True),
        (" \n", True),
        ("...", True),
        ("I don't know.", False),
        ("I don't know. I don't know. I don't know. I don't know.", True),
        ("a b c d a b c d", False),
        ("A b c d, a b C d; a b c d.", True),
        ("no no no no no", False),
        ("no no no no no no", True),  # three overlapping 4-grams
        ("the owl the owl the owl the owl", True),
    ],
)
def test_broken_is_empty_or_a_4_gram_three_times(answer, broken):
    assert metrics.is_broken(answer) is broken


def test_content_words_leave_out_function_words_and_the_question():
    answer = "Dobby is a house-elf who doesn't like Malfoy's socks."
    found = [answer[a:b] for a, b in metrics.content_spans(answer, "Who is DOBBY?")]
    assert found == ["house", "elf", "like", "Malfoy", "socks"]
    assert all(word == word.lower() and word.isalpha() for word in FUNCTION_WORDS)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=30), st.integers(0, 5))
def test_the_interval_holds_the_mean_of_the_defined_scores(scores, seed):
    defined = [s for s in scores if s is not None]
    value, interval, n = metrics.summarise(scores, seed, resamples=200)
    assert n == len(defined)
    if n == 0:
        assert value is None and interval is None
        return
    assert value == pytest.approx(np.mean(defined))
    if n == 1:
        assert interval is None
        return
    low, high = interval
    assert min(defined) - 1e-12 <= low <= high <= max(defined) + 1e-12
    assert metrics.summarise(scores, seed, resamples=200) == (value, interval, n)


def test_the_interval_covers_95_percent_of_a_normal_mean():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = metrics.summarise(generator.normal(0.5, 0.1, 60).tolist(), seed=trial, resamples=500)[1]
        hits += low <= 0.5 <= high
    assert 0.90 <= hits / 200 <= 0.99  # 0.95 less the percentile interval's known shortfall, and 3 sigma of 200 draws


def test_every_metric_says_what_is_good_on_both_sides():
    assert len({m.key for m in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert {metric.direction("forget, reverse 1"), metric.direction("general")} <= {
            "higher",
            "lower",
            "none",
        }
    assert metrics.BY_KEY["recall"].direction("forget") == "lower"
    assert metrics.BY_KEY["recall"].direction("neighbours") == "higher"
