"""From answers to scores and rows: what the models said (evaluate.py) by the definitions of metrics.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import metrics
from .data import Query
from .metrics import FORGET

Scores = dict[str, float | None]  # one question's, by metric key; None: undefined for this question
WORST = f"{FORGET}, worst reverse"


@dataclass(frozen=True)
class Asked:
    """A question of a group as it is put to the models; `prefix` is a reverse prompt, of `prefix_place`."""

    group: str
    query: Query
    prefix: str = ""
    prefix_place: str = ""

    @property
    def text(self) -> str:
        return f"{self.prefix} {self.query.question}" if self.prefix else self.query.question

    @property
    def place(self) -> str:
        """Where it was read, for messages."""
        question = self.query.place or self.query.id
        return f"{self.prefix_place} before {question}" if self.prefix_place else question


@dataclass(frozen=True)
class Column:
    """What one model said to each question: text, tokens, and its probability of the base's content words.

    `surprises` are how surprising the base finds each answer (fluency.py).
    """

    answers: list[str]
    ids: list[list[int]]
    probabilities: list[float | None]
    surprises: list[float | None]


def score(asked: Sequence[Asked], column: Column, base: Column, judged: bool = True) -> list[Scores]:
    """Each question's scores. The target is the base's answer to the plain question, behind a prompt too.

    Args:
        judged: whether perplexity and probability were taken.
    """
    plain = {a.query.id: i for i, a in enumerate(asked) if a.group == FORGET}
    words = [metrics.rouge_words(answer) for answer in column.answers]
    base_words = [metrics.rouge_words(answer) for answer in base.answers]
    targets = [base_words[plain[a.query.id] if a.prefix else i] for i, a in enumerate(asked)]
    floor: list[float | None] = [None] * len(asked)
    for group in dict.fromkeys(a.group for a in asked):
        rows = [i for i, a in enumerate(asked) if a.group == group]
        values = metrics.chance_floor([targets[i] for i in rows], [words[i] for i in rows])
        for i, value in zip(rows, values, strict=True):
            floor[i] = value
    return [
        _score_one(a, column, base, i, targets[i], words[i], judged) | {"recall_floor": floor[i]}
        for i, a in enumerate(asked)
    ]


def _score_one(
    asked: Asked, column: Column, base: Column, i: int, target: tuple[str, ...], words: tuple[str, ...], judged: bool
) -> Scores:
    recall, f1 = metrics.rouge_l(target, words)
    answer = asked.query.answer
    golds = [metrics.rouge_words(text) for text in ((answer,) if isinstance(answer, str) else answer or ())]
    base_is_right = metrics.gold_recall(golds, target) == 1.0
    refused = float(metrics.is_refusal(column.answers[i]))
    scores: Scores = {
        "recall": recall,
        "recall_floor": None,
        "recall_gold": metrics.gold_recall(golds, words) if base_is_right else None,
        "f1": f1,
        # Whether the base refuses is asked of the same words: a reverse prompt may put it off by itself.
        "refused": None if metrics.is_refusal(base.answers[i]) else refused,
        "refused_all": refused,
        "broken": float(metrics.is_broken(column.answers[i])),
    }
    if asked.prefix or not judged:  # neither is taken there
        return scores
    return {**scores, "perplexity": column.surprises[i], "probability": column.probabilities[i]}


def rows_of(
    asked: Sequence[Asked], scores: dict[str, list[Scores]], seed: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of results.json, and by model the group of the reverse prompt under which it recalls most.

    `p` is that of a paired test against the first model on the same questions (benchmark_metrics.paired_p_value).

    That group's rows stand once more under `forget, worst reverse`. The worst is chosen by each model's own
    mean, so its interval is that of one prompt and knows nothing of the choice.
    """
    from .benchmark_metrics import paired_p_value  # here, so that --help need not wait for NumPy

    groups = list(dict.fromkeys(a.group for a in asked))
    members = {group: [i for i, a in enumerate(asked) if a.group == group] for group in groups}
    first = next(iter(scores), "")
    rows: list[dict[str, Any]] = []
    worst: dict[str, str] = {}
    for model, of_questions in scores.items():
        by_group = {}
        for group in groups:
            here = [of_questions[i] for i in members[group]]
            has_gold = any(a.query.answer for a in asked if a.group == group)
            by_group[group] = [_row(model, group, metric, here, seed, has_gold) for metric in here[0]]
            if model != first:
                base = [scores[first][i] for i in members[group]]
                for row in by_group[group]:
                    before, after = ([one[row["metric"]] for one in side] for side in (base, here))
                    row["p"] = paired_p_value(before, after, seed)
            rows += by_group[group]
        reverse = [group for group in groups if group.startswith(f"{FORGET}, reverse")]
        if reverse:
            worst[model] = max(reverse, key=lambda group: by_group[group][0]["value"] or 0.0)
            rows += [{**row, "group": WORST} for row in by_group[worst[model]]]
    return rows, worst


UNDEFINED = {
    "recall": "the base's own answers hold no word of a-z and 0-9, which are all that ROUGE counts",
    "f1": "the base's own answers hold no word of a-z and 0-9, which are all that ROUGE counts",
    "recall_floor": "needs two questions to which the base has an answer",
    "recall_gold": "the base got none of these questions right",
    "refused": "the base itself refuses all of these questions",
    "perplexity": "taken only of answers that the base could be asked about: not empty, of the same model, and without "
    "--answers-only",
    "probability": "the base's own answers hold no content word",
}


def summary(key: str, scores: Sequence[float | None], seed: int) -> tuple[float | None, list[float] | None, int]:
    """A measure's figure for a group, its interval and the number of questions (metrics.summarise).

    All are means but perplexity, which is the exponential of one.
    """
    value, interval, n = metrics.summarise(scores, seed)
    if key == "perplexity" and value is not None:
        value, interval = exp(value), interval and [exp(edge) for edge in interval]
    return value, interval, n


def exp(value: float) -> float:
    """e to the power of it; infinity where a float cannot hold it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _row(model: str, group: str, key: str, here: list[Scores], seed: int, has_gold: bool) -> dict[str, Any]:
    value, interval, n = summary(key, [scores[key] for scores in here], seed)
    direction = metrics.BY_KEY[key].direction(group)
    row = {"model": model, "group": group, "metric": key, "value": value, "ci": interval, "n": n}
    row["direction"] = direction
    if value is None:
        no_gold = key == "recall_gold" and not has_gold
        row["reason"] = "the questions come without answers" if no_gold else UNDEFINED[key]
    return row
