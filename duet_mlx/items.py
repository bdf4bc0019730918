"""Rows of questions as people have them, by the field names that they use, made into one type: Item.

benchmarks.py knows which files a benchmark has, tables.py what a file of rows looks like.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import DataError
from .tables import QUESTION, read_rows

log = logging.getLogger(__name__)

# How a row is put to a model: a question to be answered, one behind few-shot examples (MUSE), a passage to be gone on
# with, a text whose probability is taken, a question with lettered options.
KINDS = ("qa", "knowmem", "verbmem", "privleak", "choice")


@dataclass(frozen=True)
class Item:
    """A row of a benchmark; what a benchmark has not is empty or None.

    `answers` are the accepted ones, of which the first is scored where only one can be; `correct` is an index into
    `choices`; `subject` is MMLU's subject or RWKU's type of probe; `shots` are the examples before the question.
    """

    id: str
    group: str
    kind: str
    question: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    correct: int | None = None
    paraphrased: str | None = None
    paraphrased_question: str | None = None
    perturbed: tuple[str, ...] = ()
    subject: str = ""
    shots: tuple[Item, ...] = ()


def read_items(path: str | Path, group: str, kind: str = "qa") -> list[Item]:
    """The rows of one file. A row that comes again in every field is dropped, with a note.

    Fields are found by the names in QUESTION, ANSWER, CHOICES and so on, whatever their case; ids are "<stem>:<row>".
    Raises DataError with file, line, the fields found and those wanted.
    """
    path = Path(path)
    stem = path.name.partition(".")[0]
    items: dict[Item, str] = {}
    repeats = []
    rows = read_rows(path)
    on_line = Counter(line for line, _ in rows)
    for number, (line, row) in enumerate(rows, 1):
        # A list is often all on one line, which then says nothing.
        place = f"{path}:{line}" if on_line[line] == 1 else f"{path}:{line}, row {number}"
        item = _item(row, place, group, kind)
        if item.subject == "" and kind == "choice" and stem.endswith(("_test", "_dev", "_val")):
            item = replace(item, subject=stem.rpartition("_")[0])
        if item in items:
            repeats.append(place)
        else:
            items[item] = f"{stem}:{number}"
    if repeats:
        log.warning(
            "%s: %d row(s) that stand there twice are asked once; the first: %s", path, len(repeats), repeats[0]
        )
    return [replace(item, id=name) for item, name in items.items()]


ANSWER = (
    "answer", "answers", "gold_answer", "correct_answer", "best_answer", "output", "response", "completion", "gt",
    "ground_truth", "target", "label", "answerkey",
)  # fmt: skip
ALIASES = ("aliases", "answer_aliases", "correct_answers")
CHOICES = ("choices", "options", "endings", "mc1_targets")
LETTERS = string.ascii_uppercase


def _item(row: Any, place: str, group: str, kind: str) -> Item:
    fields = _fields(row, place, kind)
    question = _first(fields, QUESTION)
    if question is None:
        raise DataError(f"{place}: no question; fields found: {', '.join(fields)}; wanted: {', '.join(QUESTION)}")
    text = _text(question, "the question", place)
    if fields.get("instruction") == question and str(fields.get("input") or "").strip():  # Alpaca's two halves
        text += "\n\n" + str(fields["input"]).strip()
    options, marks = _choices(fields, place)
    answer, correct = _first(fields, ANSWER), None
    if options:
        correct = _correct(answer, options, marks, _first(fields, CHOICES) is None, place)
        answers: Sequence[str] = (options[correct],)
    else:
        answers = [*_texts(answer, place), *_texts(_first(fields, ALIASES), place)]
    if kind in ("knowmem", "verbmem") and not answers:
        raise DataError(f"{place}: no answer; fields found: {', '.join(fields)}; wanted: {', '.join(ANSWER)}")
    if kind == "choice" and not options:
        raise DataError(
            f"{place}: no options; fields found: {', '.join(fields)}; wanted: {', '.join(CHOICES)}, or A, B"
        )
    examples = fields.get("examples") if kind == "choice" else None
    paraphrased, asked_again = (fields.get(name) for name in ("paraphrased_answer", "paraphrased_question"))
    return Item(
        id="",
        group=group,
        kind=kind,
        question=text,
        answers=tuple(dict.fromkeys(answers)),
        choices=tuple(options),
        correct=correct,
        paraphrased=None if paraphrased is None else _text(paraphrased, "paraphrased_answer", place),
        paraphrased_question=None if asked_again is None else _text(asked_again, "paraphrased_question", place),
        perturbed=tuple(_texts(fields.get("perturbed_answer"), place)),
        subject=str(_first(fields, ("type", "task", "subject", "category")) or ""),
        shots=tuple(_item(shot, place, group, kind) for shot in (examples if isinstance(examples, list) else ())),
    )


def _fields(row: Any, place: str, kind: str) -> dict[str, Any]:
    """The row by field name, in lower case. Rows without names are taken by their number of cells."""
    if isinstance(row, str) and kind == "privleak":
        return {"text": row}
    if isinstance(row, list):
        if len(row) == 2:
            return dict(zip(("question", "answer"), row, strict=True))
        if len(row) >= 4 and str(row[-1]).strip() in LETTERS[: len(row) - 2]:  # Hendrycks: question, options, letter
            return {"question": row[0], **dict(zip(LETTERS.lower(), row[1:-1], strict=False)), "answer": row[-1]}
        raise DataError(
            f"{place}: {len(row)} cells and no header; expected question, answer or question, A, B, …, letter, with "
            f"commas between them, found {str(row)[:60]}"
        )
    if not isinstance(row, dict):
        raise DataError(f'{place}: expected an object like {{"question": …}}, found {str(row)[:60]}')
    fields = {re.sub(r"[\s-]+", "_", str(name).strip().lower()): value for name, value in row.items()}
    if isinstance(turns := fields.get("messages"), list):  # mlx-lm's own chat format
        said = {str(turn.get("role")): turn.get("content") for turn in turns if isinstance(turn, dict)}
        fields |= {"question": said.get("user"), "answer": said.get("assistant")}
    return fields


def _first(fields: dict[str, Any], names: Iterable[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _choices(fields: dict[str, Any], place: str) -> tuple[list[str], list[Any]]:
    """The options, and what marks them: TruthfulQA's 0 and 1, ARC's own letters, or A, B, …"""
    found = _first(fields, CHOICES)
    if found is None:
        # Their own columns are what the answer's letter means, whatever the cells hold.
        cells = [
            _first(fields, (f"{before}{c}" for before in ("", "option_", "choice_"))) for c in LETTERS.lower()[:10]
        ]
        found = cells[: cells.index(None)] if None in cells else cells
        while found and not str(found[-1]).strip():  # a table has as many columns as its longest row has options
            found.pop()
        if len(found) < 2:
            return [], []
    options, marks = found, None
    if isinstance(found, dict):
        of_its_own = "choices" in found or "text" in found
        options = found.get("choices", found.get("text")) if of_its_own else list(found.values())
        marks = found.get("labels", found.get("label")) if of_its_own else list(found)  # MedQA: {"A": "red", …}
    sound = isinstance(options, list) and 2 <= len(options) <= len(LETTERS)
    if sound and marks is None:
        marks = list(LETTERS[: len(options)])
    if not sound or not isinstance(marks, list) or len(marks) != len(options):
        raise DataError(f"{place}: expected a list of two options or more, at most 26, found {str(found)[:60]}")
    return [_text(option, "an option", place) for option in options], marks


def _correct(answer: Any, options: list[str], marks: list[Any], lettered: bool, place: str) -> int:
    """The right option's index: the answer is an index from 0, an option's mark or an option's text."""
    if answer is None and marks.count(1) == 1:
        return marks.index(1)
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    readings = set()
    if isinstance(answer, int | str) and not isinstance(answer, bool):
        said = str(answer).strip().strip("().")  # "(B)", "B."
        by_mark = {i for i, mark in enumerate(marks) if str(mark) == said}
        if isinstance(answer, int):
            readings = by_mark if len(by_mark) == 1 else {answer}
        else:
            by_text = {i for i, option in enumerate(options) if option == answer.strip()}
            readings = by_mark or by_text if lettered else by_mark | by_text
            if said.isdecimal() and not by_mark and (not readings or int(said) < len(options)):
                readings = readings | {int(said)}
    # In a list of letters "A" may be a letter or a text, and in one of numbers "2": better none than the wrong one.
    if len(readings) != 1 or not 0 <= (index := readings.pop()) < len(options):
        wanted = f"an index from 0 to {len(options) - 1}, one of {', '.join(map(str, marks))}, or an option's text"
        fits = f", which fits {len(readings)} options" if len(readings) > 1 else ""
        raise DataError(f"{place}: which option is right? Found {answer!r}{fits}; expected {wanted}")
    return index


def _text(value: Any, what: str, place: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {what} must be text, found {str(value)[:60]!r}")
    return value.strip()


def _texts(value: Any, place: str) -> list[str]:
    """One text or several: a text, a list, or SQuAD's and TriviaQA's objects."""
    if value is None:
        return []
    if isinstance(value, dict):
        inner = {str(name).lower(): item for name, item in value.items()}
        if not inner.keys() & {"value", "text", "aliases"}:
            raise DataError(f"{place}: an answer must be text, found {str(value)[:60]!r}")
        value = [*_texts(_first(inner, ("value", "text")), place), *_texts(inner.get("aliases"), place)]
    if isinstance(value, str) and re.fullmatch(r"\[\s*['\"].*['\"]\s*\]", value.strip(), re.DOTALL):  # pandas, in CSV
        raise DataError(f"{place}: a list written as text: {value[:60]}; save it in JSON, as a list")
    return (
        [_text(one, "an answer", place) for one in value]
        if isinstance(value, list)
        else [_text(value, "an answer", place)]
    )
