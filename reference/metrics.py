"""Every metric from its definition (reference/README.md, "Metrics"), one short function each.

Scores are in [0, 1] unless a function says "in points" (×100). Log-probabilities are natural. `target` is the
text that an answer is compared with. A score that a question does not define is None, and means leave it out.

References:
  ROUGE-L: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
  TOFU: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121).
  MUSE: Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation for LMs", 2024 (arXiv 2407.06460).
  Min-K%: Shi et al., "Detecting Pretraining Data from Large Language Models", 2023 (arXiv 2310.16789).
  KS: Hodges, "The significance probability of the Smirnov two-sample test", 1958.
  Bootstrap: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993.
  Sign flips: Good, "Permutation, Parametric and Bootstrap Tests of Hypotheses", 2005.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.porter import stem as porter_stem

Array = NDArray[Any]
Words = Sequence[str]

# --- ROUGE-L -----------------------------------------------------------------------------------------------


def rouge_words(text: str, stem: bool) -> tuple[str, ...]:
    """Words of a text: lower case, runs of a-z and 0-9; `stem` cuts those above three letters to their stem.

    There is no default: a ROUGE-L value means nothing without saying which.
    """
    words = re.findall("[a-z0-9]+", text.lower())
    return tuple(porter_stem(word) if stem and len(word) > 3 else word for word in words)


def common_length(first: Words, second: Words) -> int:
    """L, the length of the longest common subsequence: the textbook recursion, a row of the table at a time.

    L(i, j) = L(i-1, j-1) + 1 if the words are equal, else max(L(i-1, j), L(i, j-1))
    """
    row = [0] * (len(second) + 1)
    for word in first:
        above = row
        row = [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]


def rouge_l(target: Words, answer: Words) -> tuple[float | None, float | None]:
    """ROUGE-L (recall, F1) of `answer` against `target`, both `rouge_words`; None for a target of no words.

    recall = L / |target|     precision = L / |answer|     F1 = 2 · precision · recall / (precision + recall)
    """
    if not target:
        return None, None
    length = common_length(target, answer)
    if length == 0:
        return 0.0, 0.0
    recall, precision = length / len(target), length / len(answer)
    return recall, 2 * precision * recall / (precision + recall)


def gold_recall(golds: Sequence[Words], answer: Words) -> float | None:
    """Best ROUGE-L recall among several accepted gold answers; None without one."""
    return max((rouge_l(gold, answer)[0] or 0.0 for gold in golds if gold), default=None)


def chance_floor(targets: Sequence[Words], answers: Sequence[Words]) -> list[float | None]:
    """For each answer, its mean ROUGE-L recall against the targets of the *other* questions.

    What recall is worth by chance: the expectation over shuffles that leave no answer in its place.
    """
    return [
        mean_or_none([rouge_l(target, answer)[0] for j, target in enumerate(targets) if j != i])
        for i, answer in enumerate(answers)
    ]


# --- MUSE: KnowMem, VerbMem, PrivLeak ----------------------------------------------------------------------


def knowmem_prompt(shots: Sequence[tuple[str, str]], question: str) -> str:
    """Few-shot prompt: `shots` are (question, answer) pairs; it ends in "Answer: ", the space included."""
    return "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in shots) + f"Question: {question}\nAnswer: "


def knowmem_cut(answer: str) -> str:
    """The answer up to where the model goes on to a question of its own."""
    return re.split(r"\n\n|\nQuestion|Question:", answer, maxsplit=1)[0]


def mean_rouge_f1(targets: Sequence[str], answers: Sequence[str]) -> float | None:
    """Mean ROUGE-L F1, no stemmer, in points. VerbMem: the answers are 128 greedy tokens after a passage."""
    scores = [
        rouge_l(rouge_words(target, stem=False), rouge_words(answer, stem=False))[1]
        for target, answer in zip(targets, answers, strict=True)
    ]
    mean = mean_or_none(scores)
    return None if mean is None else 100 * mean


def knowmem(targets: Sequence[str], answers: Sequence[str]) -> float | None:
    """KnowMem in points: `mean_rouge_f1` of 32 greedy tokens after `knowmem_prompt`, cut."""
    return mean_rouge_f1(targets, [knowmem_cut(answer) for answer in answers])


def min_k(log_probs: Array, share: float = 0.4) -> float:
    """Min-K%: mean of the lowest `share` of a text's token log-probabilities [S]; rounded down, not to 0."""
    return float(np.sort(log_probs)[: max(int(len(log_probs) * share), 1)].mean())


def auc(positives: Array, negatives: Array) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, a tie counting half."""
    difference = np.asarray(positives)[:, None] - np.asarray(negatives)[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def leak_auc(forget: Sequence[Array], holdout: Sequence[Array]) -> float:
    """MUSE's AUC: the chance that a forget text looks *less* trained on (lower Min-40%) than a held-out text.

    Near 0 where the forget texts are known, near ½ where they look like any other.

    Args:
        forget, holdout: the token log-probabilities of each text.
    """
    return auc(np.array([-min_k(text) for text in forget]), np.array([-min_k(text) for text in holdout]))


def privleak(auc_unlearned: float, auc_retrained: float) -> float:
    """(AUC_u - AUC_retrain)/AUC_retrain, in points. Below 0: it still shows; above 0: it stands out."""
    return 100 * (auc_unlearned - auc_retrained) / auc_retrained


# --- TOFU --------------------------------------------------------------------------------------------------


def probability(log_probs: Array) -> float:
    """p(answer) = exp(mean token log-probability [S]): TOFU's probability of forget and retain answers."""
    return float(np.exp(np.mean(log_probs)))


def option_probability(answer: Array, others: Sequence[Array]) -> float:
    """p(answer) / Σ p(option), the answer among the options: of real authors and world facts."""
    p = probability(answer)
    return p / (p + sum(probability(other) for other in others))


def truth_ratio(paraphrased: Array, perturbed: Sequence[Array]) -> float:
    """R = p̃/p(paraphrased): above 1 where false answers are likelier than the true one.

    p̃ is the geometric mean over the perturbed answers, as TOFU's code has it (its text has the arithmetic
    one), so log R is a difference of mean log-probabilities. Without a paraphrase, give the plain answer.
    """
    return float(np.exp(np.mean([np.mean(log_probs) for log_probs in perturbed]) - np.mean(paraphrased)))


def forget_truth_ratio(ratios: Array) -> float:
    """Mean min(R, 1/R): 1 where true and false are equally likely, that is, forgotten."""
    return float(np.minimum(ratios, 1 / np.asarray(ratios)).mean())


def utility_truth_ratio(ratios: Array) -> float:
    """Mean max(0, 1 - R): 1 where the true answer is far the likelier, that is, known."""
    return float(np.maximum(0, 1 - np.asarray(ratios)).mean())


def rouge_recall(target: str, answer: str) -> float | None:
    """TOFU's ROUGE: ROUGE-L recall with the stemmer on."""
    return rouge_l(rouge_words(target, stem=True), rouge_words(answer, stem=True))[0]


def ks_distance(first: Array, second: Array) -> int:
    """a·b·D, a whole number, so never rounded: D is the largest distance of the distribution functions.

    D = max over x of |#{first ≤ x}/a - #{second ≤ x}/b|, a and b the sizes of the samples
    """
    first, second = np.sort(first), np.sort(second)
    at = np.concatenate([first, second])
    below_first, below_second = (np.searchsorted(sample, at, side="right") for sample in (first, second))
    return int(np.abs(below_first * len(second) - below_second * len(first)).max())


def ks_p_value(first: Array, second: Array) -> float:
    """Exact two-sided p-value of the Kolmogorov-Smirnov test: how often equals would differ by D or more.

    If both samples come from one distribution, all orders of the a + b values are equally likely: each is a
    path from (0, 0) to (a, b), a step to the right for a value of the first, up for one of the second, and
    |i/a - j/b| is the distance there. p is the share of paths that touch D. With q(i, j) the share among the
    paths to (i, j), of which i/(i+j) come from the left:

        q(i, j) = 1 where |i·b - j·a| ≥ a·b·D,  else  i/(i+j) q(i-1, j) + j/(i+j) q(i, j-1),  q(0, 0) = 0

    With ties in the data p is an upper bound, as in every such test.
    """
    a, b = len(first), len(second)
    distance = ks_distance(first, second)
    column = [0.0] * (b + 1)
    for i in range(a + 1):
        for j in range(b + 1):
            if abs(i * b - j * a) >= distance:
                column[j] = 1.0
            elif i + j > 0:
                from_left, from_below = column[j], column[j - 1] if j else 0.0
                column[j] = (i * from_left + j * from_below) / (i + j)
    return column[b]


def forget_quality(unlearned: Array, retain_only: Array) -> float:
    """KS p-value of the forget questions' truth ratios, unlearned against a model that never saw them."""
    return ks_p_value(unlearned, retain_only)


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean of {probability, ROUGE-L recall, truth ratio} × {retain, authors, facts}; 0 if one is."""
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


# --- memorisation, choice, the paper's shift ---------------------------------------------------------------


def exact_memorisation(predicted: Array, labels: Array) -> float:
    """Share of the answer's tokens [S] that are the argmax, the answer so far being given."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def extraction_strength(predicted: Array, labels: Array) -> float:
    """1 - k/T, k the shortest prefix (of T tokens) after which every argmax is right.

    An empty rest is not looked at: k ≤ T - 1, so an answer with nothing right has 1/T, as upstream.
    """
    wrong = np.flatnonzero(np.asarray(predicted) != np.asarray(labels))
    k = min(wrong[-1] + 1, len(labels) - 1) if len(wrong) else 0
    return float(1 - k / len(labels))


def multiple_choice(logits: Array, letter_ids: Sequence[int]) -> int:
    """The option whose letter's logit [V] is largest after `Answer:`, by index; ties go to the earlier."""
    return int(np.argmax(np.asarray(logits)[list(letter_ids)]))


def performance_shift(forget: Sequence[tuple[float, float]], utility: Sequence[tuple[float, float]]) -> float:
    """Sum of the forget metrics' drops and the utility metrics' changes; (before, after) pairs, in points."""
    return sum(before - after for before, after in forget) + sum(after - before for before, after in utility)


# --- over questions ----------------------------------------------------------------------------------------


def is_broken(answer: str) -> bool:
    """Whether the answer has no word at all, or one 4-gram of words three times or more (overlaps count)."""
    words = re.findall(r"\w+(?:['\u2019]\w+)*", answer.lower())
    grams = [words[i : i + 4] for i in range(len(words) - 3)]
    return not words or any(grams.count(gram) >= 3 for gram in grams)


def mean_or_none(scores: Sequence[float | None]) -> float | None:
    """Mean of the defined scores; None where there is none."""
    defined = [score for score in scores if score is not None]
    return sum(defined) / len(defined) if defined else None


def summarise(
    scores: Sequence[float | None], seed: int = 0, resamples: int = 2000
) -> tuple[float | None, list[float] | None, int]:
    """Mean of the defined scores, its 95 % percentile-bootstrap interval, and their number.

    The middle 95 % of the means of `resamples` samples of as many questions, drawn with replacement.
    """
    values = np.array([score for score in scores if score is not None], dtype=np.float64)
    n = len(values)  # questions, not the legend's positions
    if n < 2:
        return mean_or_none(values.tolist()), None, n
    picks = np.random.default_rng(seed).integers(n, size=(resamples, n))
    means = [values[pick].mean() for pick in picks]
    return float(values.mean()), [float(np.quantile(means, q)) for q in (0.025, 0.975)], n


def paired_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of the mean difference of two models' scores on the same questions, by all sign flips.

    If the models were equal, each difference could as well have the other sign: the share of the 2^n patterns whose
    sum is as far from 0. With many questions the backend draws patterns instead.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    seen = abs(sum(differences)) - 1e-12 * sum(map(abs, differences))  # ties, but for rounding
    patterns = itertools.product((1, -1), repeat=len(differences))
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in patterns]
    return sum(abs(total) >= seen for total in sums) / len(sums)
