"""Putting a benchmark's rows to a model: greedy answers, log-probabilities of given texts, letters of options."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .benchmark_metrics import knowmem_prompt
from .context import Context, plain_ids, plain_text, render
from .errors import ModelError
from .generate import decode, is_finite, require_finite, stop_ids
from .head import check_head
from .items import Item
from .teacher import forced_logits

if TYPE_CHECKING:
    import mlx.nn as nn

# MUSE's own numbers of new tokens. A "qa" answer may be half as long again as its reference, so that recall can be 1.
NEW_TOKENS = {"knowmem": 32, "verbmem": 128}
LETTERS = string.ascii_uppercase


@dataclass
class Reply:
    """What one model makes of an item; what was not asked is empty. Log-probabilities are natural, one a token [S]."""

    answer: str = ""
    ids: list[int] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)  # of the first accepted answer and its end of turn
    hits: list[bool] = field(default_factory=list)  # whether each of these tokens is the model's first choice
    paraphrased: list[float] = field(default_factory=list)
    perturbed: list[list[float]] = field(default_factory=list)
    text: list[float] = field(default_factory=list)  # of a PrivLeak text
    choice: int | None = None
    surprise: float | None = None  # mean negative log-probability of the answer under the base; None: not taken


def prompt_of(tokenizer: Any, item: Item, context: Context | None = None, system: str = "") -> list[int]:
    """Token ids [T] that the item's answer comes after.

    "qa" goes through the chat template. The others are plain text, as MUSE and MMLU have it, for base models and chat
    models alike; a context and the user's system prompt then stand before them as paragraphs.
    """
    if item.kind == "qa":
        return render(tokenizer, item.question, context, system, item.id)
    if item.kind == "knowmem":
        text = knowmem_prompt([(shot.question, shot.answers[0]) for shot in item.shots], item.question)
    elif item.kind == "choice":
        about = f" about {item.subject.replace('_', ' ')}" if item.subject else ""
        head = f"The following are multiple choice questions (with answers){about}.\n\n"
        text = head + "".join(f"{_options(s)} {LETTERS[s.correct or 0]}\n\n" for s in item.shots) + _options(item)
    else:
        text = item.question
    return plain_ids(tokenizer, plain_text(context, system) + text)


def _options(item: Item) -> str:
    """The question, its lettered options, and `Answer:`."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, item.choices, strict=False)]
    return "\n".join([item.question, *lines, "Answer:"])


def ask(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    context: Context | None = None,
    system: str = "",
    max_tokens: int = 32,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> list[Reply]:
    """What a model makes of each item; few-shot examples and contexts that prompts begin with are encoded once.

    Args:
        max_tokens: least room for a "qa" answer.  progress: called with the number of prompts that were run.

    Raises:
        ModelError: letters of options that are no single tokens, or logits that are not finite.
        ContextError, DataError: from `render`.
    """
    replies = [Reply() for _ in items]
    prompts = [prompt_of(tokenizer, item, context, system) for item in items]
    if not items:
        return replies
    head, _ = check_head(model, mx.array([prompts[0]]))
    stop = stop_ids(tokenizer)

    for rows in _alike(items, ("qa", "knowmem", "verbmem")):
        limits = [room(tokenizer, items[i], max_tokens) for i in rows]
        for batch in decode(model, [prompts[i] for i in rows], limits, stop, batch_size, head, is_finite):
            assert batch.kept is not None
            for row, ids, seen in zip(batch.rows, batch.tokens, batch.kept, strict=True):
                _require_numbers(seen[: len(ids) + 1], items[rows[row]])
                reply = replies[rows[row]]
                reply.ids, reply.answer = ids, tokenizer.decode(ids, skip_special_tokens=True).strip()
            if progress:
                progress(len(batch.rows))

    texts: list[tuple[int, str, list[int], list[int]]] = []  # item, what it is, prompt, tokens
    for i, item in enumerate(items):
        if item.kind == "qa" and item.answers:
            texts.append((i, "reference", prompts[i], answer_ids(tokenizer, item.answers[0])))
            if item.paraphrased is not None:
                texts.append((i, "paraphrased", prompts[i], answer_ids(tokenizer, item.paraphrased)))
            texts += [(i, "perturbed", prompts[i], answer_ids(tokenizer, text)) for text in item.perturbed]
        elif item.kind == "privleak" and len(prompts[i]) > 1:
            texts.append((i, "text", prompts[i][:1], prompts[i][1:]))  # nothing foretells the first token
    found = log_probs(model, [text[2] for text in texts], [text[3] for text in texts], head, progress)
    for (i, what, _, _), (values, hits) in zip(texts, found, strict=True):
        _require_numbers(values, items[i])
        if what == "perturbed":
            replies[i].perturbed.append(values)
        else:
            setattr(replies[i], what, values)
        if what == "reference":
            replies[i].hits = hits

    for rows in _alike(items, ("choice",)):
        letters = letter_ids(tokenizer, max(len(items[i].choices) for i in rows))
        for at, logits in forced_logits(model, [prompts[i] for i in rows], [[]] * len(rows), 1, head, progress):
            after = logits[:, 0]  # [B, V]
            for row, values, seen in zip(at, np.array(after), is_finite(after), strict=True):
                i = rows[row]
                _require_numbers(seen, items[i])
                replies[i].choice = int(values[letters[: len(items[i].choices)]].argmax())  # ties: the earlier one
    return replies


def _require_numbers(values: Any, item: Item) -> None:
    require_finite(not np.isnan(values).any(), item.id, "this question")


def room(tokenizer: Any, item: Item, max_tokens: int) -> int:
    """Most new tokens of an item's answer; 1 where nothing is decoded."""
    if item.kind in ("choice", "privleak"):
        return 1
    longest = max((len(answer_ids(tokenizer, answer)) for answer in item.answers), default=0)
    return NEW_TOKENS.get(item.kind) or max(max_tokens, longest * 3 // 2)


def longest(tokenizer: Any, item: Item, max_tokens: int) -> int:
    """Most tokens that are ever read behind an item's prompt: decoded, or of an answer that is given."""
    given = [*item.answers, *item.perturbed, *([] if item.paraphrased is None else [item.paraphrased])]
    scored = given if item.kind == "qa" and item.answers else []
    return max([room(tokenizer, item, max_tokens), *(len(answer_ids(tokenizer, text)) for text in scored)])


def _alike(items: Sequence[Item], kinds: Sequence[str]) -> Iterator[list[int]]:
    """Indices of the items of these kinds, those of one kind, subject and shots together: their prompts begin alike."""
    parts: dict[tuple[str, str, tuple[Item, ...]], list[int]] = {}
    for i, item in enumerate(items):
        if item.kind in kinds:
            parts.setdefault((item.kind, item.subject if item.shots else "", item.shots), []).append(i)
    yield from parts.values()


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """A text as the assistant would say it, and its end of turn."""
    # Without a template the prompt ends in "Answer:", and a space comes before the answer.
    said = text if tokenizer.chat_template is not None else " " + text
    return [*tokenizer.encode(said, add_special_tokens=False), *end_of_turn(tokenizer)]


@lru_cache(maxsize=8)
def end_of_turn(tokenizer: Any) -> list[int]:
    """The token that ends an answer, or [] if there is none: what the template writes behind one, else the EOS.

    They differ for some models: Gemma's turns end in <end_of_turn>, and its EOS never comes after an answer.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is None:
        return eos
    stand_in = "stand-in 7301"
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": stand_in}]
    behind = str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition(stand_in)[2]
    stop = stop_ids(tokenizer)
    return [t for t in tokenizer.encode(behind, add_special_tokens=False) if t in stop][:1] or eos


def letter_ids(tokenizer: Any, count: int) -> list[int]:
    """The tokens of " A", " B", … as they come after `Answer:`. Raises ModelError where they are no single tokens."""
    before = plain_ids(tokenizer, "Answer:")
    found = [plain_ids(tokenizer, f"Answer: {letter}") for letter in LETTERS[:count]]
    if any(ids[:-1] != before for ids in found) or len({ids[-1] for ids in found}) < count:
        raise ModelError("multiple choice: this tokenizer does not make one token of each letter after `Answer:`")
    return [ids[-1] for ids in found]


def log_probs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    head: nn.Module | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[tuple[list[float], list[bool]]]:
    """For each text's tokens [S] after its prompt: their log-probabilities, and which are the model's first choice."""
    found: list[tuple[list[float], list[bool]]] = [([], []) for _ in texts]
    by_width: dict[int, list[int]] = {}
    for i, text in enumerate(texts):  # texts of like length together: every row computes as many logits as the longest
        if len(text):
            by_width.setdefault(-(-len(text) // 16) * 16, []).append(i)
    for rows in by_width.values():
        some, said = [prompts[i] for i in rows], [texts[i] for i in rows]
        for at, logits in forced_logits(model, some, said, max(map(len, said)), head, progress):
            values = np.array(logits)  # [B, n, V]
            largest = values.max(axis=-1, keepdims=True)
            total = largest[..., 0] + np.log(np.exp(values - largest).sum(axis=-1, dtype=np.float64))
            best = values.argmax(axis=-1)  # of equals the lower id, as in decoding
            for b, row in enumerate(at):
                tokens = np.array(said[row], dtype=int)
                there = np.arange(len(tokens))
                scores = values[b, there, tokens] - total[b, there]
                found[rows[row]] = scores.tolist(), (best[b, there] == tokens).tolist()
    return found
