"""From replies to a benchmark's items (probe.py) to scores and rows, by the definitions of benchmark_metrics.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import benchmark_metrics as bm
from . import scores as own
from .items import Item
from .measures import BY_KEY
from .metrics import FORGET, is_broken, is_refusal, summarise
from .probe import Reply

Scores = dict[str, float | None]  # one item's, by measure; "ratio" is TOFU's R itself
UTILITY_GROUPS = ("retain", "real authors", "world facts")
UTILITY = ("answer_probability", "rouge_recall", "truth_ratio")
ALL = "as a whole"


def score(item: Item, reply: Reply) -> Scores:
    """One item's scores."""
    if item.kind == "choice":
        return {"accuracy": float(reply.choice == item.correct)}
    if item.kind == "privleak":
        return {"min_k": bm.min_k(np.array(reply.text))}
    if item.kind in ("knowmem", "verbmem"):
        answer = bm.knowmem_cut(reply.answer) if item.kind == "knowmem" else reply.answer
        return {item.kind: bm.rouge_f1(item.answers[0], answer)}
    scores: Scores = {}
    if item.answers:
        recalls = [score for answer in item.answers if (score := bm.rouge_recall(answer, reply.answer)) is not None]
        scores["rouge_recall"] = max(recalls, default=None)
        reference = np.array(reply.reference)
        options = item.perturbed and item.paraphrased is None
        others = [np.array(log_probs) for log_probs in reply.perturbed]
        scores["answer_probability"] = (
            bm.option_probability(reference, others) if options else bm.probability(reference)
        )
        if item.perturbed:
            ratio = bm.truth_ratio(np.array(reply.paraphrased) if item.paraphrased is not None else reference, others)
            scores["ratio"] = ratio
            forget = item.group.startswith(FORGET)
            scores["truth_ratio"] = bm.forget_truth(ratio) if forget else bm.utility_truth(ratio)
        scores["exact_memorisation"] = bm.exact_memorisation(np.array(reply.hits), np.ones(len(reply.hits), dtype=bool))
        scores["extraction_strength"] = bm.extraction_strength(
            np.array(reply.hits), np.ones(len(reply.hits), dtype=bool)
        )
    scores["refusals"], scores["broken"] = float(is_refusal(reply.answer)), float(is_broken(reply.answer))
    scores["perplexity"] = reply.surprise
    return scores


def group_of(item: Item, name: str) -> str:
    """The item's group as the table has it: "forget, tofu:forget10", "forget, muse:News knowmem"."""
    return f"{item.group}, {name}" + ("" if item.kind in ("qa", "choice") else f" {item.kind}")


UNDEFINED = {
    "perplexity": own.UNDEFINED["perplexity"],
    "truth_ratio": "needs the probabilities of an answer and of false ones",
    "model_utility": "needs retain questions, real authors and world facts, each with false answers",
    "forget_quality": "needs the truth ratios of a retrained model (--retrained)",
    "privleak": "needs held-out texts, and a retrained model (--retrained) whose AUC is not 0",
}


def rows_of(
    name: str, items: Sequence[Item], scores: dict[str, list[Scores]], seed: int, retrained: str = "retrained"
) -> list[dict[str, Any]]:
    """Rows of results.json for one benchmark; the first model is the one that the others are compared with (`p`).

    Args:
        scores: by model, in the items' order.  retrained: which of the models never saw the forget questions.
    """
    rows: list[dict[str, Any]] = []
    groups: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(group_of(item, name), []).append(i)
    first = next(iter(scores))
    for model, of_items in scores.items():
        for group, members in groups.items():
            for key in dict.fromkeys(key for i in members for key in of_items[i] if key in BY_KEY):
                values = [of_items[i].get(key) for i in members]
                row = _row(model, group, key, *own.summary(key, values, seed))
                if model != first:
                    row["p"] = bm.paired_p_value([scores[first][i].get(key) for i in members], values, seed)
                rows.append(row)
        rows += _whole(name, items, model, scores, seed, retrained)
    return rows


def _whole(
    name: str, items: Sequence[Item], model: str, scores: dict[str, list[Scores]], seed: int, retrained: str
) -> list[dict[str, Any]]:
    """Measures of a whole benchmark: TOFU's model utility and forget quality, MUSE's PrivLeak."""
    group, rows = f"{name} {ALL}", []

    def of(which: str, key: str, side: str) -> list[float | None]:
        return [s.get(key) for item, s in zip(items, scores.get(which, ()), strict=False) if item.group == side]

    if any(item.perturbed for item in items):
        parts = [[of(model, key, side) for key in UTILITY] for side in UTILITY_GROUPS]
        value, interval = _utility(parts, seed)
        rows.append(_row(model, group, "model_utility", value, interval, sum(len(part[0]) for part in parts)))
        ratios = of(model, "ratio", FORGET)
        quality = bm.forget_quality(ratios, of(retrained, "ratio", FORGET))
        rows.append(_row(model, group, "forget_quality", quality, None, len(ratios)))
    if any(item.kind == "privleak" for item in items):
        leaks = [bm.leak_auc(of(which, "min_k", FORGET), of(which, "min_k", "holdout")) for which in (model, retrained)]
        count = len([None for item in items if item.kind == "privleak"])
        rows.append(_row(model, group, "privleak", bm.privleak(*leaks), None, count))
    return rows


def _utility(parts: Sequence[Sequence[Sequence[float | None]]], seed: int) -> tuple[float | None, list[float] | None]:
    """Model utility of [group][measure][question] and its bootstrap interval, questions drawn within each group."""
    means = [summarise(values, seed, resamples=1)[0] for part in parts for values in part]
    value = bm.model_utility(means)
    if value is None:
        return None, None
    drawn = []
    for number, part in enumerate(parts):
        scores = np.array(part, dtype=float)  # [3, questions]
        scores = scores[:, ~np.isnan(scores).any(axis=0)]  # None became NaN: such a question has no place in a draw
        if not scores.shape[1]:
            return value, None
        picks = np.random.default_rng([seed, number]).integers(scores.shape[1], size=(2000, scores.shape[1]))
        drawn.append(scores[:, picks].mean(axis=-1))  # [3, 2000]
    utilities = [bm.model_utility(values.tolist()) or 0.0 for values in np.concatenate(drawn).T]
    low, high = np.percentile(utilities, [2.5, 97.5])
    return value, [float(low), float(high)]


def _row(model: str, group: str, key: str, value: float | None, interval: list[float] | None, n: int) -> dict[str, Any]:
    row = {"model": model, "group": group, "metric": key, "value": value, "ci": interval, "n": n}
    row["direction"] = BY_KEY[key].direction(group)
    if value is None:
        row["reason"] = UNDEFINED.get(
            key, "no question has a reference answer with a word of a-z and 0-9, which are all that ROUGE counts"
        )
    return row
