"""What the models say: a column of answers, and how probable each model finds the words of the base's own answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from . import metrics
from .generate import decode, stop_ids
from .head import check_head
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
    settings: EvaluateSettings,
) -> Column:
    """What one model says to all prompts, and how probable it finds the words of `base` (None: its own).

    A pass over the base's answers gives both their probability and how far this model would say the same, so that
    it is decoded from there alone.
    """
    from tqdm import tqdm

    head, _ = check_head(model, mx.array([prompts[0]]))  # for each column anew: LoRA may sit on the head
    stop, start = stop_ids(tokenizer), time.perf_counter()
    ids: list[list[int]] = [[] for _ in prompts]
    probabilities: list[float | None] = [None] * len(prompts)
    left = dict.fromkeys(range(len(prompts)), settings.max_tokens)  # prompts to be answered, and tokens left to each

    def words_of(i: int, tokens: Sequence[int]) -> list[list[int]]:
        return content_words(tokenizer, tokens, asked[i].query.question)

    with tqdm(total=len(prompts), desc=name, unit="q", file=sys.stderr, disable=None) as bar:
        if base is not None:
            plain = [i for i, a in enumerate(asked) if not a.prefix]
            for rows in _alike(asked, contexts, plain):
                said = [base.ids[i] for i in rows]
                for i, found in zip(
                    rows, forced(model, [prompts[i] for i in rows], said, stop, head, bar.update), strict=True
                ):
                    probabilities[i] = mean_of_words(found.probabilities, words_of(i, base.ids[i]))
                    ids[i], left[i] = base.ids[i][: found.agreed], settings.max_tokens - found.agreed
                    if found.ended or not left[i]:
                        del left[i]
            bar.total = len(plain) + len(left)
        keep = _probability_of_the_best if base is None else None
        for rows in _alike(asked, contexts, left):
            begun, limits = [[*prompts[i], *ids[i]] for i in rows], [left[i] for i in rows]
            for batch in decode(model, begun, limits, stop, settings.batch_size, head, keep):
                for at, (row, tokens) in enumerate(zip(batch.rows, batch.tokens, strict=True)):
                    i = rows[row]
                    ids[i] = ids[i] + tokens
                    if batch.kept is not None and not asked[i].prefix:
                        probabilities[i] = mean_of_words(batch.kept[at], words_of(i, tokens))
                bar.update(len(batch.rows))
    seconds = time.perf_counter() - start
    print(f"{name}: {len(prompts)} answers in {seconds:.0f} s, {len(prompts) / seconds:.1f} a second", file=sys.stderr)
    return Column([tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in ids], ids, probabilities)


def _alike(asked: Sequence[Asked], contexts: Sequence[Context | None], rows: Iterable[int]) -> list[list[int]]:
    """Rows that begin alike, by context and reverse prompt: what they share is then encoded once."""
    parts: dict[tuple[Context | None, str], list[int]] = {}
    for row in rows:
        parts.setdefault((contexts[row], asked[row].prefix), []).append(row)
    return list(parts.values())


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
    found = [Forced([], 0, False)] * len(prompts)
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
            found[row] = Forced(probability.tolist(), agreed, bool(same.all() and best[at, len(answer)] in ends))
    return found
