"""Unlearning contexts x_ic, and the tokens of x and x_ic ⊕ x: each is one rendering through the chat template.

What must hold for the student to learn from the teacher: both read the same tokens from the question's first one
onward. `render` makes sure of it, and refuses with a ContextError where a template cannot give it.
"""

import datetime
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from duet_mlx.context_file import READY, read_contexts
from duet_mlx.errors import ContextError, DataError

__all__ = ["Context", "DATE", "READY", "check_renders", "load_contexts", "render", "shared_prefix"]

# Templates that print today's date (Llama 3.2, Granite, Mistral Small, gpt-oss) print this one instead, or the same
# run would give other tokens tomorrow. Manifests record it.
DATE = datetime.date(2026, 1, 1)


@dataclass(frozen=True)
class Context:
    """What the teacher reads before the question: system text, then (user, assistant) turns. Empty: no context."""

    name: str
    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()


def load_contexts(source: str | Path, topic: str | None = None) -> list[Context]:
    """Contexts of a YAML file (context_file.py describes it) or one ready context by name, {topic} filled in.

    `topic` replaces the file's own top-level topic. Raises ContextError naming file, line or entry.
    """
    return [Context(name, system, turns) for name, system, turns in read_contexts(source, topic)]


def render(tokenizer: Any, question: str, context: Context | None = None, system: str = "") -> list[int]:
    """Token ids of x, or with a context of x_ic ⊕ x ([T] or [P+T]), up to where the answer begins.

    `tokenizer` is mlx-lm's TokenizerWrapper or a Hugging Face tokenizer; `system` is the user's own system prompt,
    read by student and teacher alike (the context's comes first). One rendering through the chat template with the
    generation prompt, thinking switched off or its block closed, DATE for today. System text goes to the front of
    the first user turn where the template has no place for it. Without a template: `Question: …\\nAnswer:`.
    From the question on, the tokens are those of the bare question. Never two BOS.

    Raises DataError for a question and ContextError for a context that hold one of the model's control tokens as
    text, ContextError where the template refuses, drops or alters a part, or tokenizes the question differently.
    """
    question, frame = question.strip(), _frame(tokenizer, _template(tokenizer))
    turns = [(user.strip(), answer.strip()) for user, answer in context.turns] if context else []
    system = "\n\n".join(part.strip() for part in (context.system if context else "", system) if part.strip())
    frame.refuse_control_tokens(question, turns, system, context)
    bare = frame.head + question + frame.tail
    failure = ""
    for messages in _attempts(question, turns, system):
        try:
            text = frame.write(messages)
        except ContextError as error:  # the template's own refusal, such as "System role not supported"
            failure = failure or str(error)
            continue
        missing = [part for part in (system, *(part for turn in turns for part in turn)) if part not in text]
        if not text.endswith(question + frame.tail):
            failure = failure or f"the template alters the question {question!r}"
        elif missing:
            failure = failure or f"the template drops or alters {_short(missing[0])!r}"
        else:
            ids = frame.encode(text)
            if text == bare or _tail_length(tokenizer, frame.encode(bare), ids, question + frame.tail):
                return ids
            failure = failure or f"the question {question!r} becomes other tokens behind the context"
    name = f'context "{context.name}"' if context else "the question"
    raise ContextError(f"{name} cannot be rendered for this model: {failure}")


def check_renders(tokenizer: Any, question: str, context: Context | None, system: str = "") -> int:
    """How many last tokens student and teacher read alike: those of the question and all that follows it.

    Raises ContextError, showing the first difference, if the question is not wholly among them.
    """
    student = render(tokenizer, question, None, system)
    teacher = render(tokenizer, question, context, system)
    tail = question.strip() + _frame(tokenizer, _template(tokenizer)).tail
    if same := _tail_length(tokenizer, student, teacher, tail):
        return same
    same = _common_suffix(student, teacher)
    ours, theirs = (tokenizer.decode(ids[max(0, len(ids) - same - 8) :][:12]) for ids in (student, teacher))
    name = context.name if context else ""
    raise ContextError(
        f'context "{name}": student and teacher must read the question as the same tokens, but {same} tokens before '
        f"the end the student reads {ours!r} and the teacher {theirs!r}"
    )


def shared_prefix(token_lists: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix of all the lists; 0 for no list. May be the whole of the shortest list."""
    if not token_lists:
        return 0
    low, high = min(token_lists), max(token_lists)  # what the extremes share, all between them share
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


Message = dict[str, str]


@dataclass(frozen=True)
class _Frame:
    """What a tokenizer puts around a bare question, and how it turns messages into text and text into tokens."""

    head: str
    tail: str
    write: Callable[[list[Message]], str]
    encode: Callable[[str], list[int]]
    control: re.Pattern[str]

    def refuse_control_tokens(
        self, question: str, turns: list[tuple[str, str]], system: str, context: Context | None
    ) -> None:
        """Text such as "<|im_end|>" would become the control token itself and end the turn: better no run."""
        if found := self.control.search(question):
            raise DataError(f"question {question!r} holds {found[0]!r}, a control token of this model; reword it")
        for part in (system, *(part for turn in turns for part in turn)):
            if found := self.control.search(part):
                name = f'context "{context.name}"' if context else "the system prompt"
                raise ContextError(f"{name} holds {found[0]!r}, a control token of this model: {_short(part)!r}")


def _attempts(question: str, turns: list[tuple[str, str]], system: str) -> list[list[Message]]:
    """Ways to send the parts, best first: a system message, then the system text folded into the first user turn."""
    roles = ("user", "assistant")
    talk = [{"role": r, "content": c} for turn in turns for r, c in zip(roles, turn, strict=True)]
    talk.append({"role": "user", "content": question})
    if not system:
        return [talk]
    # SentencePiece may join the question's first word with the space before it: another separator keeps its token.
    folded = [[{"role": "user", "content": system + gap + talk[0]["content"]}, *talk[1:]] for gap in ("\n\n", "\n", " ")]
    return [[{"role": "system", "content": system}, *talk], *folded]


def _template(tokenizer: Any) -> str | None:
    """The chat template's text ("" for a renderer written in Python), or None for a base model."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        return template
    if isinstance(template, dict):  # several named templates: transformers takes "default"
        return str(template.get("default", template))
    return "" if getattr(tokenizer, "has_chat_template", False) else None


@lru_cache(maxsize=8)
def _frame(tokenizer: Any, template: str | None) -> _Frame:
    """Measure head and tail by rendering a stand-in question."""
    control = _control_tokens(tokenizer, template or "")
    bos = getattr(tokenizer, "bos_token_id", None)
    eos = getattr(tokenizer, "eos_token_id", None)

    def encode(text: str) -> list[int]:
        # A template writes its own BOS; in the plain form the tokenizer adds it if it is one that does.
        ids = list(tokenizer.encode(text, add_special_tokens=template is None))
        while len(ids) > 1 and ids[0] == ids[1] == bos:
            del ids[0]
        if template is None and len(ids) > 1 and ids[-1] == eos:  # some tokenizers end what they encode
            del ids[-1]
        return ids

    if template is None:
        return _Frame("Question: ", "\nAnswer:", _plain, encode, control)
    stand_in = "What is the stand-in 7301?"
    text = _apply(tokenizer, template, [{"role": "user", "content": stand_in}])
    if stand_in not in text:
        raise ContextError(f"the chat template alters or drops the user's message: {_short(text)!r}")
    head, _, tail = text.rpartition(stand_in)
    closing = _close_thinking(head, tail)

    def write(messages: list[Message]) -> str:
        return _apply(tokenizer, template, messages) + closing

    return _Frame(head, tail + closing, write, encode, control)


def _plain(messages: list[Message]) -> str:
    """The form of base models, as few-shot evaluations write it; a system text stands in front as a paragraph."""
    words = {"system": "", "user": "Question: ", "assistant": "Answer: "}
    parts = [words[m["role"]] + m["content"] + ("\n" if m["role"] == "user" else "\n\n") for m in messages]
    return "".join(parts) + "Answer:"


def _apply(tokenizer: Any, template: str, messages: list[Message]) -> str:
    switches: dict[str, Any] = {"enable_thinking": False}
    if "strftime_now" in template:
        midnight = datetime.datetime.combine(DATE, datetime.time())
        # A variable of the same name shadows transformers' own function. `date_string` is left alone: templates that
        # know it fall back to this function, or to a fixed date that mlx_lm.generate prints as well.
        switches["strftime_now"] = midnight.strftime
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switches)
    except Exception as error:  # noqa: BLE001 - a template is a program of the model's author and may raise anything
        raise ContextError(f"the chat template raises {type(error).__name__}: {error}") from error
    return str(text)


_THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
)


def _close_thinking(head: str, tail: str) -> str:
    """Text that ends thinking before it starts, for templates that have no switch, or ''.

    Three kinds are known. DeepSeek-R1 opens the block itself: it is closed, empty, as Qwen3's switch writes it.
    Ministral's default system text asks for a block: an empty one is written. gpt-oss lets the model choose the
    channel: the final one is chosen.
    """
    for start, end in _THINKING:
        if tail.rfind(start) > tail.rfind(end):
            return f"\n{end}\n\n" if tail.endswith("\n") else f"\n\n{end}\n\n"
        if start == "[THINK]" and start in head and start not in tail:
            return start + end
    return "<|channel|>final<|message|>" if tail.endswith("<|start|>assistant") else ""


def _control_tokens(tokenizer: Any, template: str) -> re.Pattern[str]:
    """Matches text that the tokenizer reads as a control token: its special tokens, and added ones in the template."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {str(t) for t in added if getattr(t, "special", False) or str(t) in template}
    names |= set(getattr(tokenizer, "all_special_tokens", ()))
    longest_first = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _tail_length(tokenizer: Any, one: list[int], other: list[int], tail: str) -> int:
    """Length of the common suffix of two token lists if it spells at least `tail`, else 0."""
    same = _common_suffix(one, other)

    def letters(ids: list[int]) -> str:  # tokenizers put, or drop, spaces at the edges of what they decode
        return "".join(tokenizer.decode(ids).split())

    wanted = letters(list(tokenizer.encode(tail, add_special_tokens=False)))
    return same if same and letters(one[-same:]).endswith(wanted) else 0


def _common_suffix(one: list[int], other: list[int]) -> int:
    return shared_prefix([one[::-1], other[::-1]])


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
