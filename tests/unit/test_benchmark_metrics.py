"""The benchmarks' metrics: examples worked by hand to six digits, and None for what is undefined."""

import numpy as np
import pytest

from duet_mlx import benchmark_metrics as metrics


def six_digits(value):
    return pytest.approx(value, abs=5e-7)


def logs(*probabilities):
    return np.log(probabilities)


def test_tofus_probability_by_hand():
    assert metrics.probability(logs(0.5, 0.25, 0.8)) == six_digits(0.464159)  # the cube root of 0.1
    # 0.464159 / 0.964159
    assert metrics.option_probability(logs(0.5, 0.25, 0.8), [logs(0.2), logs(0.3, 0.3)]) == six_digits(0.481413)


def test_tofus_truth_ratio_by_hand():
    # p(paraphrased) = sqrt(0.36) = 0.6; perturbed 0.2 and sqrt(0.09) = 0.3, geometric mean sqrt(0.06) = 0.244949.
    # The arithmetic mean, TOFU's text, would give 0.416667.
    ratio = metrics.truth_ratio(logs(0.4, 0.9), [logs(0.2), logs(0.5, 0.18)])
    assert ratio == six_digits(0.408248)
    assert metrics.forget_truth(ratio) == six_digits(0.408248)
    assert metrics.forget_truth(1 / ratio) == six_digits(0.408248)
    assert metrics.utility_truth(ratio) == six_digits(0.591752)
    assert metrics.utility_truth_ratio([ratio, 2.5]) == six_digits(0.295876)


def test_tofus_rouge_by_hand():
    # Stems: the author write about love famili / she wrote of love and the famili. In order: love, famili; 2 of 6.
    target, answer = "The author writes about loving families.", "She wrote of love and the family"
    assert metrics.rouge_recall(target, answer) == six_digits(0.333333)


def test_model_utility_by_hand():
    # 9 / (1/0.9 + 1/0.8 + 1/0.7 + 1/0.6 + 1/0.5 + 1/0.4 + 1/0.5 + 1/0.6 + 1/0.7) = 9 / 15.051587
    assert metrics.model_utility([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.5, 0.6, 0.7]) == six_digits(0.597944)


def test_forget_quality_by_hand():
    # At 0.3 three of the four lie below and none of the three: D = 3/4. Of the C(7, 3) = 35 orders of four a and three
    # b, 4 begin with aaa, and in 4 others all b stand before the second a: 8 differ as much.
    assert metrics.forget_quality([0.1, 0.2, 0.3, 0.5], [0.4, 0.6, 0.7]) == six_digits(0.228571)


def test_knowmem_by_hand():
    # "the castle" of "in the old castle": 2 · 2 / (4 + 2) = 0.666667.
    # "It was 1472", cut there, of "1472": 2 · 1 / (1 + 3) = 0.5.
    targets = ["in the old castle", "1472"]
    answers = ["The castle.", "It was 1472\n\nQuestion: Who? Answer: 1472"]
    assert metrics.knowmem(targets, answers) == six_digits(58.333333)


def test_privleak_by_hand():
    # Min-40% of five tokens is the mean of the two lowest.
    assert metrics.min_k(np.array([-1.0, -9.0, -2.0, -6.0, -3.0])) == -7.5
    # A forget text of -7 and one of -1 against held-out ones of -5 and -3: less likely than both, and than neither.
    assert metrics.leak_auc([-7.0, -1.0], [-5.0, -3.0]) == 0.5
    assert metrics.privleak(0.3, 0.45) == six_digits(-33.333333)


def test_a_p_value_of_many_questions_is_drawn_and_the_same_again():
    generator = np.random.default_rng(0)
    first = generator.random(80)
    same, better = first + generator.normal(0, 0.1, 80), first + 0.1 + generator.normal(0, 0.1, 80)
    p = metrics.paired_p_value(first, same)
    assert 0.05 < p <= 1 and p == metrics.paired_p_value(first, same)
    assert metrics.paired_p_value(first, better) == pytest.approx(1 / 10_001)
    assert metrics.paired_p_value([None, *first], [0.0, *first]) == 1.0


def test_drawn_sign_flips_come_close_to_all_of_them():
    first, second = [1.0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1], [0.0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0]
    every = metrics.paired_p_value(first, second)  # 2^10 patterns
    drawn = metrics.paired_p_value(first, second, resamples=1000)
    assert drawn == pytest.approx(every, abs=3 * (every * (1 - every) / 1000) ** 0.5)


def test_equal_models_differ_by_chance_in_one_of_twenty_cases():
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        scores = generator.random((2, 40))
        hits += metrics.paired_p_value(*scores, seed=trial, resamples=400) <= 0.05
    assert hits / 200 <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


NOTHING = np.array([])
UNDEFINED = {
    "an answer of no tokens": lambda: metrics.probability(NOTHING),
    "an option of no tokens": lambda: metrics.option_probability(logs(0.5), [NOTHING]),
    "options of probability 0": lambda: metrics.option_probability(np.array([-1e4]), [np.array([-1e4])]),
    "no perturbed answers": lambda: metrics.truth_ratio(logs(0.5), []),
    "a perturbed answer of no tokens": lambda: metrics.truth_ratio(logs(0.5), [NOTHING]),
    "no paraphrase": lambda: metrics.truth_ratio(NOTHING, [logs(0.5)]),
    "no ratio": lambda: metrics.forget_truth(None),
    "no ratios": lambda: metrics.forget_truth_ratio([None]),
    "no ratios to keep": lambda: metrics.utility_truth_ratio([]),
    "a text of no tokens": lambda: metrics.min_k(NOTHING),
    "one class alone": lambda: metrics.leak_auc([-1.0], [None]),
    "no AUC to compare with": lambda: metrics.privleak(0.5, None),
    "an AUC of 0 to compare with": lambda: metrics.privleak(0.5, 0.0),
    "no retrained model": lambda: metrics.forget_quality([0.5], []),
    "utility without a part": lambda: metrics.model_utility([0.5, None]),
    "utility of nothing": lambda: metrics.model_utility([]),
    "nothing memorised": lambda: metrics.exact_memorisation(NOTHING, NOTHING),
    "nothing to extract": lambda: metrics.extraction_strength(NOTHING, NOTHING),
    "a reference without a word": lambda: metrics.rouge_recall("...", "a"),
    "KnowMem of nothing": lambda: metrics.knowmem(["..."], ["a"]),
    "no pair of scores": lambda: metrics.paired_p_value([None], [1.0]),
}


@pytest.mark.parametrize("case", UNDEFINED)
@pytest.mark.filterwarnings("error")
def test_what_is_undefined_is_none(case):
    assert UNDEFINED[case]() is None


@pytest.mark.filterwarnings("error")
def test_a_true_answer_beyond_all_bounds_is_no_division_by_zero():
    assert metrics.forget_truth(0.0) == 0.0
    assert metrics.forget_truth(metrics.truth_ratio(np.array([-1.0]), [np.array([-800.0])])) == 0.0
    assert metrics.forget_truth(float("inf")) == 0.0
