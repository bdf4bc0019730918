"""What the benchmarks' measures are called and which way is good; metrics.METRICS has those of any question.

The definitions are in benchmark_metrics.py. This file imports no NumPy, so that `--help` need not wait for it.
"""

from __future__ import annotations

from .metrics import METRICS, Metric

ARROWS = {"lower": "↓", "higher": "↑", "none": " "}
# (key, label, good on forget groups, good on the others, definition)
BENCHMARK = tuple(
    Metric(*fields)
    for fields in (
        (
            "rouge_recall",
            "ROUGE-L recall of the reference answer",
            "lower",
            "higher",
            "TOFU: recall, stemmer on; the best of several reference answers",
        ),
        (
            "answer_probability",
            "probability of the reference answer",
            "lower",
            "higher",
            "TOFU: exp of the mean log-probability of its tokens, the end of turn included, as upstream; where there "
            "are false answers and no paraphrase (real authors, world facts), its share among these",
        ),
        (
            "truth_ratio",
            "truth ratio",
            "higher",
            "higher",
            "TOFU: R = geometric mean of p(false answers) / p(paraphrase, or else the answer); forget: mean "
            "min(R, 1/R); others: mean max(0, 1 - R)",
        ),
        (
            "exact_memorisation",
            "exact memorisation",
            "lower",
            "higher",
            "share of the reference answer's tokens that are the model's first choice, those before being given",
        ),
        (
            "extraction_strength",
            "extraction strength",
            "lower",
            "higher",
            "1 - k/S: k the shortest prefix of the reference answer's S tokens after which all are first choices",
        ),
        ("knowmem", "KnowMem, points", "lower", "higher", "MUSE: ROUGE-L F1, no stemmer, 32 tokens behind few shots"),
        (
            "verbmem",
            "VerbMem, points",
            "lower",
            "higher",
            "MUSE: ROUGE-L F1, no stemmer, of 128 tokens after a passage",
        ),
        ("min_k", "Min-40%", "none", "none", "mean of a text's lowest 40 % of log-probabilities"),
        ("privleak", "PrivLeak, points (0 is best)", "none", "none", "MUSE: (AUC - AUC_retrained)/AUC_retrained"),
        (
            "accuracy",
            "accuracy",
            "lower",
            "higher",
            "share of questions whose right option's letter has the largest logit after `Answer:`",
        ),
        ("refusals", "refused, of all questions", "higher", "lower", "share of refusals (metrics.REFUSAL_PATTERNS)"),
        (
            "model_utility",
            "model utility",
            "higher",
            "higher",
            "TOFU: harmonic mean of probability, ROUGE-L recall and truth ratio on retain, real authors, world facts",
        ),
        (
            "forget_quality",
            "forget quality",
            "higher",
            "higher",
            "TOFU: p-value of the Kolmogorov-Smirnov test of R on forget questions against the retrained model's",
        ),
    )
)
# "broken" and "perplexity" are shown once for a group; the benchmarks' measures stand before those of any question.
MEASURES = (*BENCHMARK, *METRICS)
BY_KEY = {metric.key: metric for metric in MEASURES}
