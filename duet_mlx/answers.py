"""What the models say: a column of answers, and how probable each model finds the words of the base's own answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from . import metrics
from .data import digest
from .errors import note
from .fluency import surprises
from .generate import decode, is_finite, require_finite, stop_ids
from .head import check_head
from .kept_answers import KeptAnswers, Unit
from .scores import Asked, Column
from .teacher import forced_logits

if TYPE_CHECKING:
    import mlx.nn as nn

    from .context import Context
    from .evaluate import EvaluateSettings


def column(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    asked: list[Asked],
    prompts: list[list[int]],
    contexts: Sequence[Context | None],
    base: Column | None,
    judged: Sequence[Sequence[int]] | None,
    settings: EvaluateSettings,
    file: Path,
    hangs_on: dict[str, Any],
) -> Column:
    """What one model says to all prompts, and how probable it finds the words of `base` (None: its own).

    A pass over the base's answers gives both their probability and how far this model would say the same, so that
    it is decoded from there alone. Another pass shows the base those answers that are not its own, for their
    perplexity (fluency.py). Answers are kept in `file` on the way, and taken from there if nothing changed:
    neither `hangs_on`, which says what makes the model, nor what it is asked.

    Args:
        judged: what the base reads before it judges an answer: the prompts without context. None: the base is not in
            memory, as when another model is asked.

    Raises:
        ModelError: logits that are not finite.
    """
    from tqdm import tqdm

    parts = _parts(asked, prompts, contexts, 2 * settings.batch_size)
    described = {**hangs_on, **_described(asked, prompts, contexts, base, settings), "judged": digest(judged)}
    kept = KeptAnswers(file, name, described, [len(rows) for rows in parts])
    done = sum(len(rows) for rows in parts[: len(kept.units)])
    head = None
    if done < len(prompts):
        head, _ = check_head(model, mx.array([prompts[0]]))  # for each column anew: LoRA may sit on the head
    stop, start = stop_ids(tokenizer), time.perf_counter()

    def words_of(i: int, tokens: Sequence[int]) -> list[list[int]]:
        return content_words(tokenizer, tokens, asked[i].query.question)

    def answer(rows: list[int]) -> Unit:
        ids: dict[int, list[int]] = {i: [] for i in rows}
        probabilities: dict[int, float | None] = dict.fromkeys(rows)
        surprise: dict[int, float | None] = dict.fromkeys(rows)
        left = dict.fromkeys(rows, settings.max_tokens)  # prompts to be answered, and tokens left to each
        measuring = not (asked[rows[0]].prefix or settings.answers_only)
        if base is not None and measuring:
            said = [base.ids[i] for i in rows]
            found = forced(model, [prompts[i] for i in rows], said, stop, head, bar.update)
            for i, one in zip(rows, found, strict=True):
                require_finite(one.finite, name, asked[i].place)
                probabilities[i] = mean_of_words(one.probabilities, words_of(i, base.ids[i]))
                ids[i], left[i] = base.ids[i][: one.agreed], settings.max_tokens - one.agreed
                if one.ended or not left[i]:
                    del left[i]
            bar.total = (bar.total or 0) + len(left)
        going, limits = list(left), list(left.values())
        begun = [[*prompts[i], *ids[i]] for i in going]
        keep = _probability_of_the_best if base is None and measuring else is_finite
        for batch in decode(model, begun, limits, stop, settings.batch_size, head, keep) if going else ():
            assert batch.kept is not None
            for row, tokens, seen in zip(batch.rows, batch.tokens, batch.kept, strict=True):
                i = going[row]
                seen = seen[: min(len(tokens) + 1, limits[row])]  # what the end of the answer was chosen from too
                require_finite(bool(np.isfinite(seen).all()), name, asked[i].place)
                ids[i] = ids[i] + tokens
                if base is None and measuring:
                    probabilities[i] = mean_of_words(seen, words_of(i, tokens))
                    surprise[i] = -float(np.log(seen[: len(tokens)]).mean()) if tokens else None
            bar.update(len(batch.rows))
        if base is not None and measuring and judged is not None:
            surprise |= {i: base.surprises[i] for i in rows if ids[i] == base.ids[i]}
            others = [i for i in rows if ids[i] != base.ids[i]]
            bar.total = (bar.total or 0) + len(others)
            judgements = surprises(model, [judged[i] for i in others], [ids[i] for i in others], head, bar.update)
            surprise |= zip(others, judgements, strict=True)
        return Unit([ids[i] for i in rows], [probabilities[i] for i in rows], [surprise[i] for i in rows])

    with tqdm(total=len(prompts), initial=done, desc=name, unit="q", file=sys.stderr, disable=None) as bar:
        for rows in parts[len(kept.units) :]:
            kept.add(answer(rows))
    if done < len(prompts):
        count, seconds = len(prompts) - done, time.perf_counter() - start
        note(f"{name}: {count} answers in {seconds:.0f} s, {count / seconds:.1f} a second")
    by_row = {
        i: all_three
        for rows, unit in zip(parts, kept.units, strict=True)
        for i, *all_three in zip(rows, *unit, strict=True)
    }
    ids, probabilities, surprise = (list(part) for part in zip(*(by_row[i] for i in range(len(prompts))), strict=True))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in ids]
    return Column(texts, ids, probabilities, surprise)


def _parts(
    asked: Sequence[Asked], prompts: Sequence[Sequence[int]], contexts: Sequence[Context | None], size: int
) -> list[list[int]]:
    """Rows in parts of at most `size`: alike in context and reverse prompt, whose encoding they share; short first."""
    alike: dict[tuple[Context | None, str], list[int]] = {}
    for row in sorted(range(len(asked)), key=lambda row: len(prompts[row])):
        alike.setdefault((contexts[row], asked[row].prefix), []).append(row)
    return [rows[at : at + size] for rows in alike.values() for at in range(0, len(rows), size)]


def _described(
    asked: Sequence[Asked],
    prompts: Sequence[Sequence[int]],
    contexts: Sequence[Context | None],
    base: Column | None,
    settings: EvaluateSettings,
) -> dict[str, Any]:
    """What the answers of a column hang on besides the model, as hashes and plain values."""
    return {
        "questions": digest([[a.prefix, a.query.question] for a in asked]),
        "context": digest([None if c is None else [c.system, c.turns] for c in contexts]),
        "system": settings.system,
        "prompts": digest(prompts),
        "base": None if base is None else digest(base.ids),
        "settings": {name: getattr(settings, name) for name in ("max_tokens", "batch_size", "answers_only")},
    }


def content_words(tokenizer: Any, ids: Sequence[int], question: str) -> list[list[int]]:
    """For each content word of an answer, the indices into `ids` of the tokens that hold its letters."""
    # Where each token ends, by decoding ever longer beginnings: right for every kind of tokenizer.
    ends = [0, *(len(tokenizer.decode(list(ids[: t + 1]))) for t in range(len(ids)))]
    spans = metrics.content_spans(tokenizer.decode(list(ids)), question)
    words = [[t for t in range(len(ids)) if ends[t] < stop and start < ends[t + 1]] for start, stop in spans]
    return [word for word in words if word]


def mean_of_words(probabilities: Sequence[float] | np.ndarray, words: Sequence[Sequence[int]]) -> float | None:
    """Mean over words of Π_{t in word} probabilities[t]; None without words."""
    values = np.asarray(probabilities, dtype=np.float64)
    return float(np.mean([values[list(word)].prod() for word in words])) if words else None


def _probability_of_the_best(logits: mx.array) -> np.ndarray:
    """softmax(logits [B, V]) at its largest: [B]. In NumPy: MLX's exponential is a slow one on CPU."""
    values = np.array(logits)
    return 1 / np.exp(values - values.max(axis=-1, keepdims=True)).sum(axis=-1, dtype=np.float64)


class Forced(NamedTuple):
    """What a model makes of an answer that is put into its mouth."""

    probabilities: list[float]  # of each token, softmax(g(prompt ⊕ answer[:t]))[answer[t]]
    agreed: int  # how many tokens it would have said itself
    ended: bool  # whether it would have said all of them, and then have stopped
    finite: bool  # whether all logits were numbers to begin with


def forced(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    stop: Iterable[int],
    head: nn.Module | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Forced]:
    """Each answer's tokens under the model, the answer before each token being forced.

    Args:
        prompts, answers: token lists.  stop: ids that end an answer.
        head: `check_head`'s head, so that logits are computed at the answer's positions alone.
    """
    found = [Forced([], 0, False, True)] * len(prompts)
    n = max(map(len, answers), default=0) + 1
    ends = np.array(sorted(stop))
    for rows, logits in forced_logits(model, prompts, answers, n, head, progress):  # [B, n, V]
        values = np.array(logits)
        best = values.argmax(axis=-1)  # [B, n]; of equals the lower id, as in decoding
        largest = values.max(axis=-1, keepdims=True)
        total = np.exp(values - largest).sum(axis=-1, dtype=np.float64)
        for at, row in enumerate(rows):
            answer = np.array(answers[row], dtype=int)
            there = np.arange(len(answer))
            probability = np.exp(values[at, there, answer] - largest[at, there, 0]) / total[at, there]
            same = best[at, there] == answer
            agreed = len(answer) if same.all() else int(same.argmin())
            ended = bool(same.all() and best[at, len(answer)] in ends)
            found[row] = Forced(probability.tolist(), agreed, ended, bool(np.isfinite(total[at]).all()))
    return found
