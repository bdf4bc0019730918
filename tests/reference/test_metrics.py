"""Each metric against an independent implementation where there is one, else against values by hand."""

from __future__ import annotations

import inspect
import warnings
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from duet_mlx import metrics as ours
from reference import metrics as ref
from reference.porter import IRREGULAR, STEP_2, STEP_3, STEP_4, stem

# --- ROUGE-L and its stemmer -------------------------------------------------------------------------------

VOCABULARY = [
    "the",
    "boy",
    "lived",
    "lives",
    "castles",
    "castle",
    "Ron's",
    "flies",
    "relational",
    "a",
    "7",
    "é",
]
texts = st.lists(st.sampled_from(VOCABULARY), max_size=9).map(" ".join)
suffixes = st.sampled_from(
    [suffix for suffix, _ in STEP_2 + STEP_3 + STEP_4]
    + ["", "s", "ss", "sses", "ies", "ied", "eed", "ed", "ing", "y", "e", "ll", "logi"]
)
stems = st.text(alphabet="aeiouybcdlstzwx7", max_size=6)
words = st.builds(lambda *parts: "".join(parts), stems, suffixes, suffixes).filter(bool)


@given(texts, texts, st.booleans())
@example("", "the boy", False)
@example("the boy", "", True)
@example("The BOY, who-lived!", "the boy; who lived", False)
@example("owls was", "owl wa", True)  # words of three letters are not stemmed
def test_rouge_l_equals_rouge_score(target: str, answer: str, with_stemmer: bool) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rougeL"], use_stemmer=with_stemmer).score(target, answer)["rougeL"]
    target_words, answer_words = (ref.rouge_words(text, with_stemmer) for text in (target, answer))
    recall, f1 = ref.rouge_l(target_words, answer_words)
    if not target_words:
        assert (recall, f1) == (None, None)  # rouge-score says 0 of nothing
    else:
        assert recall == pytest.approx(theirs.recall, abs=1e-15)
        assert f1 == pytest.approx(theirs.fmeasure, abs=1e-15)


@given(words)
@example("yyy")
@example("geologi")
@example("radicalli")
@example("hopping")
def test_stems_equal_nltks(word: str) -> None:
    porter = pytest.importorskip("nltk.stem.porter")
    assert stem(word) == porter.PorterStemmer().stem(word)


def test_stems_of_known_words() -> None:
    """From Porter's paper, a word a rule, and NLTK's own departures."""
    known = """caresses caress, ponies poni, cats cat, dies die, feed feed, agreed agre, plastered plaster,
        sing sing, motoring motor, conflated conflat, troubled troubl, sized size, hopping hop, falling fall,
        hissing hiss, filing file, failing fail, happy happi, enjoy enjoy, sky sky, tied tie, carried carri,
        relational relat, radically radic, electrical electr, hopeful hope, goodness good, revival reviv,
        adoption adopt, onion onion, replacement replac, probate probat, rate rate, cease ceas,
        controll control, roll roll, geology geolog, analogousli analog, by by"""
    for pair in known.split(","):
        word, expected = pair.split()
        assert stem(word) == expected
    assert all(stem(word) == expected for word, expected in IRREGULAR.items())


def test_rouge_never_leaves_open_whether_it_stems_nor_which_score_it_is() -> None:
    assert inspect.signature(ref.rouge_words).parameters["stem"].default is inspect.Parameter.empty
    target, answer = "she lives in a castle", "she lived in castles by the sea"
    assert ref.rouge_recall(target, answer) == 4 / 5  # stemmed: she, live, in, castl
    assert ref.mean_rouge_f1([target], [answer]) == pytest.approx(100 * 2 * 2 / (5 + 7))  # as it is: she, in


# --- MUSE --------------------------------------------------------------------------------------------------


def test_knowmem_prompt_ends_in_answer_colon_space() -> None:
    prompt = ref.knowmem_prompt([("Who?", "Me."), ("When?", "Now.")], "Where?")
    assert prompt == ("Question: Who?\nAnswer: Me.\n\nQuestion: When?\nAnswer: Now.\n\nQuestion: Where?\nAnswer: ")
    assert ref.knowmem_prompt([], "Where?") == "Question: Where?\nAnswer: "


@pytest.mark.parametrize("tail", ["\n\nmore", "\nQuestion", "Question: x", "Question: x\n\ny", "\n\nQuestion:", ""])
def test_knowmem_cuts_where_the_model_asks_itself_a_question(tail: str) -> None:
    assert ref.knowmem_cut("In the castle\nthere. A Question" + tail) == "In the castle\nthere. A Question"


def test_knowmem_and_verbmem_are_mean_f1_in_points() -> None:
    targets, answers = ["the owl", "red"], ["the owl\n\nQuestion: red", "blue"]
    assert ref.knowmem(targets, answers) == pytest.approx(50.0)
    assert ref.mean_rouge_f1(targets, answers) == pytest.approx(100 / 3)
    assert ref.mean_rouge_f1(["..."], ["red"]) is None
    with pytest.raises(ValueError):
        ref.mean_rouge_f1(["red"], [])


def test_min_k_is_the_mean_of_the_lowest_share() -> None:
    log_probs = np.array([-1.0, -9.0, -2.0, -7.0, -3.0, -4.0])
    assert ref.min_k(log_probs) == -8.0  # 40 % of 6 is 2 tokens
    assert ref.min_k(log_probs, share=0.5) == pytest.approx(-20 / 3)
    assert ref.min_k(np.array([-1.0, -5.0])) == -5.0  # never none


samples = st.lists(st.integers(0, 30), min_size=1, max_size=9)


@given(samples, samples)
def test_auc_equals_the_mann_whitney_statistic(positives: list[int], negatives: list[int]) -> None:
    stats = pytest.importorskip("scipy.stats")
    u = stats.mannwhitneyu(positives, negatives, method="asymptotic").statistic
    expected = u / (len(positives) * len(negatives))
    assert ref.auc(np.array(positives), np.array(negatives)) == pytest.approx(expected)


def test_auc_of_known_samples() -> None:
    assert ref.auc(np.array([3, 4]), np.array([1, 2])) == 1.0
    assert ref.auc(np.array([1, 3]), np.array([2, 3])) == (0 + 0 + 1 + 0.5) / 4


def test_privleak_is_far_below_zero_where_the_forget_texts_are_still_known() -> None:
    rng = np.random.default_rng(0)
    known, unknown = [-rng.uniform(0, 1, 10) for _ in range(5)], [-rng.uniform(2, 3, 10) for _ in range(5)]
    assert ref.leak_auc(known, unknown) == 0.0
    assert ref.leak_auc(unknown, known) == 1.0
    assert ref.leak_auc(known, known) == 0.5
    assert ref.privleak(0.0, 0.5) == -100.0
    assert ref.privleak(0.6, 0.5) == pytest.approx(20.0)


# --- TOFU --------------------------------------------------------------------------------------------------


def test_probability_is_normalised_by_length() -> None:
    assert ref.probability(np.log([0.5, 0.125])) == pytest.approx(0.25)
    others = [np.log([0.125]), np.log([0.25])]
    assert ref.option_probability(np.log([0.5, 0.125]), others) == pytest.approx(0.4)


def test_truth_ratio_takes_the_geometric_mean_of_the_perturbed_answers() -> None:
    perturbed = [np.log([0.1, 0.4]), np.log([0.8])]  # p = 0.2 and 0.8: geometric mean 0.4, arithmetic 0.5
    assert ref.truth_ratio(np.log([0.16]), perturbed) == pytest.approx(2.5)


def test_truth_ratios_are_read_both_ways() -> None:
    ratios = np.array([0.5, 1.0, 4.0])
    assert ref.forget_truth_ratio(ratios) == pytest.approx((0.5 + 1 + 0.25) / 3)
    assert ref.utility_truth_ratio(ratios) == pytest.approx(0.5 / 3)


@given(samples, samples)
@example([1], [1])
@example([1, 2, 3], [4, 5, 6])
def test_ks_p_value_equals_scipys_exact_one(first: list[int], second: list[int]) -> None:
    stats = pytest.importorskip("scipy.stats")
    with warnings.catch_warnings(record=True) as gave_up:
        warnings.simplefilter("always")
        theirs = stats.ks_2samp(first, second, method="exact")
    # Where its rounding takes an exact 1 above 1, scipy gives the asymptotic value and says so.
    expected = 1.0 if gave_up else theirs.pvalue
    distance = round(theirs.statistic * len(first) * len(second))
    assert ref.ks_distance(np.array(first), np.array(second)) == distance
    assert ref.ks_p_value(np.array(first), np.array(second)) == pytest.approx(expected, rel=1e-9)


def test_ks_p_value_is_the_share_of_all_orders_that_differ_as_much() -> None:
    first, second = np.array([1, 2, 3, 5]), np.array([4, 6, 7])
    distance, count = ref.ks_distance(first, second), 0
    orders = list(combinations(range(7), 4))
    for order in orders:
        others = [i for i in range(7) if i not in order]
        count += ref.ks_distance(np.array(order), np.array(others)) >= distance
    assert distance == 9  # at 3: three of the four, and none of the three
    assert ref.ks_p_value(first, second) == pytest.approx(float(Fraction(count, len(orders))))


def test_forget_quality_resolves_values_far_below_rounding() -> None:
    """Samples wholly apart: 2 of all the orders do that. One minus the share within would be all rounding."""
    first = np.arange(100.0)
    assert ref.forget_quality(first, first + 100) == pytest.approx(2 / comb(200, 100), rel=1e-12)  # 2e-59
    assert ref.forget_quality(first, first) == 1.0


def test_model_utility_is_a_harmonic_mean_and_nothing_makes_up_for_a_zero() -> None:
    assert ref.model_utility([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert ref.model_utility([1.0, 1.0, 0.0]) == 0.0


# --- memorisation, choice, the paper's shift ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "exact", "strength"),
    [
        ([1, 2, 3, 4], 1.0, 1.0),
        ([0, 2, 3, 4], 0.75, 0.75),
        ([1, 2, 0, 4], 0.75, 0.25),
        ([1, 2, 3, 0], 0.75, 0.25),  # the rest may not be empty
        ([0, 0, 0, 0], 0.0, 0.25),
    ],
)
def test_memorisation_of_known_answers(predicted: list[int], exact: float, strength: float) -> None:
    labels = np.array([1, 2, 3, 4])
    assert ref.exact_memorisation(np.array(predicted), labels) == exact
    assert ref.extraction_strength(np.array(predicted), labels) == strength


def test_multiple_choice_looks_at_the_letters_alone() -> None:
    logits = np.array([9.0, 1.0, 3.0, 2.0, 3.0])
    assert ref.multiple_choice(logits, [1, 2, 3]) == 1
    assert ref.multiple_choice(logits, [1, 4, 2]) == 1


@pytest.mark.parametrize(
    ("after", "shift"),
    [
        ((32.13, 39.99, 84.29, 61.46), 0.0),
        ((0.00, 0.00, 0.00, 24.87), -48.76),  # GA
        ((24.18, 26.83, 69.69, 54.79), -0.16),  # NPO
        ((0.47, 0.64, 58.33, 58.92), 42.51),  # FLAT
        ((4.27, 5.98, 78.33, 61.45), 55.90),  # DUET
    ],
)
def test_performance_shift_gives_the_papers_last_column(after: tuple[float, ...], shift: float) -> None:
    pairs = list(zip((32.13, 39.99, 84.29, 61.46), after, strict=True))
    assert ref.performance_shift(pairs[:2], pairs[2:]) == pytest.approx(shift, abs=0.005)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=7))
@example([(1, 1)])
@example([(3, 0)] * 6)
def test_the_paired_p_value_is_scipys_over_all_sign_flips(pairs: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    ours = ref.paired_p_value(first, second)
    if len(pairs) == 1:  # scipy takes none; a question alone can go either way
        assert ours == 1.0
        return

    def difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(a - b, axis=axis)

    theirs = stats.permutation_test((first, second), difference, permutation_type="samples", n_resamples=np.inf)
    assert ours == pytest.approx(theirs.pvalue)


# --- the same definitions in the backend -------------------------------------------------------------------


@given(texts, texts)
def test_the_backends_rouge_is_the_references_without_stemmer(target: str, answer: str) -> None:
    target_words, answer_words = (ref.rouge_words(text, stem=False) for text in (target, answer))
    assert (ours.rouge_words(target), ours.rouge_words(answer)) == (target_words, answer_words)
    assert ours.rouge_l(target_words, answer_words) == pytest.approx(ref.rouge_l(target_words, answer_words))


word_lists = st.lists(st.sampled_from("abc"), max_size=5)


@given(st.lists(st.tuples(word_lists, word_lists), min_size=1, max_size=5))
def test_the_backends_chance_floor_is_the_references(pairs: list[tuple[list[str], list[str]]]) -> None:
    targets, answers = zip(*pairs, strict=True)
    assert ours.chance_floor(targets, answers) == pytest.approx(ref.chance_floor(targets, answers))
    assert ours.gold_recall(targets, answers[0]) == ref.gold_recall(targets, answers[0])


def test_chance_floor_is_the_mean_over_all_shuffles_without_a_fixed_point() -> None:
    targets, answers = [["a", "b"], ["b"], ["c"]], [["b"], ["a", "c"], ["b", "c"]]
    shuffles = [(1, 2, 0), (2, 0, 1)]  # each is one of the two derangements of three
    scores = [ref.rouge_l(targets[s[i]], answers[i])[0] or 0.0 for s in shuffles for i in range(3)]
    floor = ref.mean_or_none(ref.chance_floor(targets, answers))
    assert floor == pytest.approx(sum(scores) / len(scores))
    assert ref.chance_floor(targets[:1], answers[:1]) == [None]


@given(st.lists(st.sampled_from(["a", "b", "don't", "\u2026"]), max_size=14).map(" ".join))
@example("a b c d a b c d a b c d")
@example("a b c d a b c d a b c")
@example("no no no no no no")
@example(" ... ")
def test_the_backends_broken_answers_are_the_references(answer: str) -> None:
    assert ours.is_broken(answer) == ref.is_broken(answer)


def test_broken_answers_are_empty_or_say_four_words_three_times() -> None:
    assert ref.is_broken(" ... ") and ref.is_broken("no no no no no no")
    assert ref.is_broken("a b c d a b c d a b c d") and not ref.is_broken("a b c d a b c d a b c")


@given(st.lists(st.none() | st.floats(0, 1), max_size=12), st.integers(0, 3))
@example([], 0)
@example([None, 1.0], 0)
def test_the_backends_intervals_are_the_references(scores: list[float | None], seed: int) -> None:
    value, interval, n = ref.summarise(scores, seed, resamples=50)
    their_value, their_interval, their_n = ours.summarise(scores, seed, resamples=50)
    assert n == their_n and value == pytest.approx(their_value) and interval == pytest.approx(their_interval)


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        _, interval, _ = ref.summarise(rng.random(60).tolist(), seed, resamples=200)
        assert interval is not None
        hits += interval[0] <= 0.5 <= interval[1]
    assert 0.90 <= hits / 200 <= 0.99
