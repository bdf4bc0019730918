"""Unlearning contexts x_ic, and the tokens of x and x_ic ⊕ x: one rendering each, through the chat template.

What must hold, for the student to learn from the teacher: from the question's first token onward both read
the same tokens. `render` makes sure of it, and raises ContextError where a template cannot give it.
"""

import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from duet_mlx.context_file import READY, read_contexts
from duet_mlx.errors import ContextError, DataError

__all__ = [
    "DATE",
    "READY",
    "Context",
    "check_fits",
    "check_renders",
    "load_contexts",
    "plain_ids",
    "plain_text",
    "render",
    "shared_prefix",
]

# Templates that print today's date (Llama 3.2, Granite, Mistral Small, gpt-oss) print this one instead, or
# the same run would give other tokens tomorrow. Manifests record it.
DATE = datetime.date(2026, 1, 1)

Message = dict[str, str]


@dataclass(frozen=True)
class Context:
    """What the teacher reads before a question: system text, (user, assistant) turns. Both may be empty."""

    name: str
    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()


def load_contexts(source: str | Path, topic: str | None = None) -> list[Context]:
    """Contexts of a YAML file (context_file.py describes it) or one ready context by name, {topic} filled in.

    `topic` replaces the file's own top-level topic. Raises ContextError naming file, line or entry.
    """
    return [Context(name, system, turns) for name, system, turns in read_contexts(source, topic)]


def render(
    tokenizer: Any, question: str, context: Context | None = None, system: str = "", place: str = ""
) -> list[int]:
    """Token ids of x ([T]) or, with a context, of x_ic ⊕ x ([P+T]), up to where the answer begins.

    `tokenizer` is mlx-lm's TokenizerWrapper or a Hugging Face tokenizer; `system` is the user's own system
    prompt, read by student and teacher alike (the context's comes before it); `place`, the question's file:line,
    is for messages. One rendering through the chat
    template, with the generation prompt, thinking switched off or its block closed, and DATE for today.
    System text moves to the front of the first user turn where the template has no place for it. Without a
    template: `Question: …` and `Answer:`, each on its line. Never two BOS. Space around a text is taken off.

    Raises DataError for a question, ContextError for a context, that holds one of the model's control tokens
    as text; ContextError where the template refuses, drops or alters a part, or where the question's tokens
    behind the context would differ from those of the bare question.
    """
    question, frame = question.strip(), _frame(tokenizer, _template(tokenizer))
    turns = [(user.strip(), answer.strip()) for user, answer in context.turns] if context else []
    system = "\n\n".join(t.strip() for t in (context.system if context else "", system) if t.strip())
    owner = f'context "{context.name}"' if context else "the system prompt"
    parts = [text for text in (system, *(text for turn in turns for text in turn)) if text]
    _refuse_control_tokens(frame.control, question, parts, owner, place)

    bare = frame.encode(frame.head + question + frame.tail)
    faults: list[str] = []
    for messages in _attempts(question, turns, system):
        try:
            text = frame.write(messages)
        except ContextError as error:  # the template's own refusal, such as "System role not supported"
            faults.append(str(error))
            continue
        missing = [part for part in parts if part not in text]
        if not text.endswith(question + frame.tail):
            faults.append(f"the template alters the question {_short(question)}")
        elif missing:
            faults.append(f"the template drops or alters {_short(missing[0])}")
        else:
            ids = frame.encode(text)
            if ids == bare or _equal_tail(tokenizer, bare, ids, question + frame.tail):
                return ids
            faults.append(f"the question {_short(question)} becomes other tokens behind the context")
    raise ContextError(f"{owner} cannot be rendered for this model: {'; '.join(dict.fromkeys(faults))}")


def check_renders(tokenizer: Any, question: str, context: Context | None, system: str = "") -> int:
    """How many last tokens student and teacher read alike: those of the question and of all that follows it.

    Raises ContextError, showing the first difference, if the question is not wholly among them.
    """
    student = render(tokenizer, question, None, system)
    teacher = render(tokenizer, question, context, system)
    tail = question.strip() + _frame(tokenizer, _template(tokenizer)).tail
    if equal := _equal_tail(tokenizer, student, teacher, tail):
        return equal
    equal = _common_suffix(student, teacher)
    ours, theirs = (tokenizer.decode(ids[max(0, len(ids) - equal - 8) :][:12]) for ids in (student, teacher))
    name = context.name if context else ""
    raise ContextError(
        f'context "{name}": student and teacher must read the question as the same tokens, '
        f"but {equal} tokens before the end the student reads {ours!r} and the teacher {theirs!r}"
    )


def plain_text(context: Context | None, system: str = "") -> str:
    """What stands before a prompt of plain text: system text and turns as base models read them; '' for neither."""
    parts = [text.strip() for text in (context.system if context else "", system) if text.strip()]
    turns = [f"Question: {user}\nAnswer: {answer}" for user, answer in (context.turns if context else ())]
    return "".join(f"{part}\n\n" for part in (*parts, *turns))


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt of plain text, behind the tokenizer's own BOS, if it has one, and no end."""
    return _frame(tokenizer, None).encode(text)


def check_fits(
    place: str,
    question: str,
    tokens: int,
    n: int,
    name: str,
    limit: int,
    way_out: str = "shorten or drop the question",
) -> None:
    """Raise DataError if a prompt of so many tokens and n positions of its answer exceed the limit of this name."""
    if tokens + n - 1 > limit:  # the last token of an answer is never read
        raise DataError(
            f"{place}: {tokens} tokens and {n} positions exceed {name} of {limit}: {question[:60]!r}…; {way_out}"
        )


def shared_prefix(token_lists: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix of all lists (0 for none); may be all of the shortest."""
    if not token_lists:
        return 0
    first, shortest = token_lists[0], min(map(len, token_lists))
    return next((i for i in range(shortest) if any(ids[i] != first[i] for ids in token_lists)), shortest)


def _attempts(question: str, turns: list[tuple[str, str]], system: str) -> Iterable[list[Message]]:
    """Ways to send the parts, best first: as a system message, then at the front of the first user turn."""
    talk = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    talk.append({"role": "user", "content": question})
    if not system:
        yield talk
        return
    yield [{"role": "system", "content": system}, *talk]
    # SentencePiece joins a word with the space before it: where the bare question follows a space, as in
    # "[INST] Who", only the last of these separators keeps its first token.
    for gap in ("\n\n", "\n", " "):
        yield [{"role": "user", "content": system + gap + talk[0]["content"]}, *talk[1:]]


@dataclass(frozen=True)
class _Frame:
    """What stands around a bare question, how messages become text, and how text becomes tokens."""

    head: str
    tail: str
    write: Callable[[list[Message]], str]
    encode: Callable[[str], list[int]]
    control: re.Pattern[str]  # matches text that would be read as a control token


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
    bos = getattr(tokenizer, "bos_token_id", None)
    eos = getattr(tokenizer, "eos_token_id", None)
    control = _control_tokens(tokenizer, template or "")

    def encode(text: str) -> list[int]:
        # A template writes its own BOS; in the plain form the tokenizer adds it, if it is one that does.
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
        raise ContextError(f"the chat template drops or alters the user's message: {_short(text)}")
    head, _, tail = text.rpartition(stand_in)
    closing = _close_thinking(head, tail)
    return _Frame(
        head,
        tail + closing,
        lambda messages: _apply(tokenizer, template, messages) + closing,
        encode,
        control,
    )


def _plain(messages: list[Message]) -> str:
    """The form of base models, as few-shot evaluations write it; system text is a paragraph in front."""
    before = {"system": "", "user": "Question: ", "assistant": "Answer: "}
    after = {"system": "\n\n", "user": "\n", "assistant": "\n\n"}
    return "".join(before[m["role"]] + m["content"] + after[m["role"]] for m in messages) + "Answer:"


def _apply(tokenizer: Any, template: str, messages: list[Message]) -> str:
    switches: dict[str, Any] = {"enable_thinking": False}
    if "strftime_now" in template:
        switches["chat_template"] = _dated(template)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switches))
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise ContextError(f"the chat template raises {type(error).__name__}: {error}") from error


def _dated(template: str) -> str:
    """The template behind a macro that stands in for the clock.

    A function passed in as a variable does not arrive: transformers hands templates plain data alone.
    `date_string` is not set: templates that know it ask the clock for it, or print a date of their own that
    mlx_lm.generate prints as well.
    """
    steps = "".join(f'.replace("%{d}", "{DATE.strftime("%" + d)}")' for d in "YymdBbAaejHMSIp")
    # The newline is the one that jinja drops behind a block, so that the template's own first one stays.
    return "{% macro strftime_now(format) %}{{ format" + steps + " }}{% endmacro %}\n" + template


_THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
)


def _close_thinking(head: str, tail: str) -> str:
    """Text that ends thinking before it starts, for templates that know no switch; else ''.

    Three kinds are known. DeepSeek-R1's opens the block itself: it is closed, empty, as Qwen3's switch writes
    it. Ministral's default system text asks for a block: an empty one is written. gpt-oss lets the model
    choose a channel: the final one is chosen.
    """
    for start, end in _THINKING:
        if tail.rfind(start) > tail.rfind(end):
            return f"\n{end}\n\n" if tail.endswith("\n") else f"\n\n{end}\n\n"
        if start == "[THINK]" and start in head and start not in tail:
            return start + end
    return "<|channel|>final<|message|>" if tail.endswith("<|start|>assistant") else ""


def _control_tokens(tokenizer: Any, template: str) -> re.Pattern[str]:
    """Matches the tokenizer's special tokens, and those added tokens that the template writes."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {str(token) for token in added if getattr(token, "special", False) or str(token) in template}
    names |= set(getattr(tokenizer, "all_special_tokens", ()))
    longest_first = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _refuse_control_tokens(control: re.Pattern[str], question: str, parts: list[str], owner: str, place: str) -> None:
    """Text such as "<|im_end|>" would become the token itself and end the turn: better no run than that."""
    if found := control.search(question):
        where = f"{place}: " if place else ""
        raise DataError(
            f"{where}question {_short(question)} holds {found[0]!r}, a control token of this model; reword it"
        )
    for part in parts:
        if found := control.search(part):
            raise ContextError(f"{owner} holds {found[0]!r}, a control token of this model: {_short(part)}")


def _equal_tail(tokenizer: Any, one: list[int], other: list[int], tail: str) -> int:
    """Length of the common suffix of two token lists if it spells at least `tail`, else 0."""
    equal = _common_suffix(one, other)
    wanted = list(tokenizer.encode(tail, add_special_tokens=False))
    spelled, needed = ("".join(tokenizer.decode(ids).split()) for ids in (one[len(one) - equal :], wanted))
    return equal if spelled.endswith(needed) else 0  # without spaces: decoding drops or adds some at the edges


def _common_suffix(one: list[int], other: list[int]) -> int:
    return shared_prefix([one[::-1], other[::-1]])


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")
