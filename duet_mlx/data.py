"""Questions: one JSON object a line. Training reads the question alone; answers serve evaluation."""

import hashlib
import json
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from duet_mlx.errors import ConfigError, DataError, nearest

Choice = TypeVar("Choice")
ROLES = ("forget", "retain", "neighbour")
BYTE_ORDER_MARKS = {  # UTF-32's first: one of them begins as UTF-16's does
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"
}  # fmt: skip
WAY_OUT = '; write one object a line, like {"question": "…"}'
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Query:
    """One question; `role` and `id` together name it. `context` names the teacher's, None the first one.

    `place` is file:line, for messages; the question is the same wherever it stands.
    """

    id: str
    question: str
    role: str
    context: str | None = None
    answer: str | tuple[str, ...] | None = None
    choices: tuple[str, ...] | None = None
    place: str = field(default="", compare=False, repr=False)


def load_queries(paths: Sequence[str | Path], role: str) -> list[Query]:
    """Read all questions of one role from JSONL files, in order.

    Fields: `question`; optional `id` (default "<file stem>:<line>"), `answer` (text or list of texts),
    `choices`, `context`; others are ignored. UTF-8, with or without BOM, LF or CRLF; blank lines are skipped;
    space around a text is taken off. A question that comes again (see `question_key`) is dropped with a note
    on stderr. Raises DataError, with file:line, for everything else that is not such a file.
    """
    if role not in ROLES:
        raise DataError(f'unknown role "{role}": expected one of {", ".join(ROLES)}')
    files = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    _no_file_twice(files, role)
    stems = [path.stem for path in files]
    seen_ids: dict[str, str] = {}
    seen_questions: dict[str, str] = {}
    repeats: list[str] = []
    queries = []
    for path in files:
        # The stem makes a short id; two files of the same stem need their whole paths to be told apart.
        prefix = path.stem if stems.count(path.stem) == 1 else str(path)
        # A file's name need not be UTF-8, what is written of it must.
        prefix = prefix.encode(errors="surrogateescape").decode(errors="backslashreplace")
        for line, record in read_jsonl(path):
            place = f"{path}:{line}"
            query = _query(record, role, f"{prefix}:{line}", place)
            if query.id in seen_ids:
                raise DataError(f'{place}: id "{query.id}" is that of {seen_ids[query.id]}; ids must differ')
            seen_ids[query.id] = place
            first = seen_questions.setdefault(question_key(query.question), place)
            if first == place:
                queries.append(query)
            else:
                repeats.append(f"{place} repeats {first}")
    if repeats:
        log.warning("%d repeated %s question(s) dropped, the first: %s", len(repeats), role, repeats[0])
    return queries


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, JSON object) of each line that is not blank. Raises DataError with file:line."""
    try:
        # LF alone: JSON strings may hold U+2028 and other signs that str.splitlines() takes for line ends.
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error
    records = [(n, _record(path, n, line)) for n, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise DataError(f'{path}: the file is empty; expected one {{"question": "…"}} a line')
    return records


def spread(queries: list[Query], count: int, flag: str) -> list[Query]:
    """So many of the queries, at even distances and in their order: files go by subject, and all keep their share.

    Args:
        count: 0 for all.  flag: the flag that asks for it, for the message.

    Raises:
        ConfigError: more than there are.
    """
    if count > len(queries):
        raise ConfigError(f"{flag} {count}: the files hold {len(queries)}; expected at most as many, or 0 for all")
    return [queries[i * len(queries) // count] for i in range(count)] if count else queries


def check_disjoint(forget: Iterable[Query], retain: Iterable[Query]) -> None:
    """Raise DataError if a question stands on both sides: pulled both ways, or taught and then tested."""
    kept = {question_key(query.question): query for query in retain}
    both = [(query, kept[key]) for query in forget if (key := question_key(query.question)) in kept]
    if both:
        one, other = both[0]
        raise DataError(
            f"{len(both)} {one.role} question(s) stand among the {other.role} questions as well; the first: "
            f'{one.id} "{one.question}" and {other.id} "{other.question}". Remove them from one side'
        )


@lru_cache(maxsize=1 << 16)  # asked for again for each pair of files, and for each run of a comparison
def question_key(question: str) -> str:
    """What makes two questions the same: case, spacing, apostrophes and punctuation do not count.

    The signs # @ % & * / \\ do ("C#" is not "C"). A question of nothing but punctuation is its own key.
    """
    kept = []
    for char in unicodedata.normalize("NFKC", question).casefold():
        if char in "'’‘`":
            continue
        is_punctuation = unicodedata.category(char).startswith("P") and char not in "#@%&*/\\"
        kept.append(" " if is_punctuation else char)
    return " ".join("".join(kept).split()) or question.strip()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises DataError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(_unreadable(Path(path), error)) from error
    return digest.hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def in_turn(query: Query, choices: Sequence[Choice]) -> Choice:
    """The choice that falls to a query by its id, so that it hangs on the query alone."""
    return choices[int(hashlib.sha256(query.id.encode()).hexdigest(), 16) % len(choices)]


def _no_file_twice(files: list[Path], role: str) -> None:
    if not files:
        raise DataError(f"no file of {role} questions was named")
    seen: dict[Path, Path] = {}
    for path in files:
        first = seen.setdefault(path.resolve(), path)
        if first is not path:
            raise DataError(f"{path}: given twice for {role} questions (as {first}); name it once")


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    place = f"{path}:{number}"
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        marked = [f"but {name}, by its first bytes" for mark, name in BYTE_ORDER_MARKS.items() if line.startswith(mark)]
        fault = (marked or [f"at byte {error.start + 1} of the line"])[0]
        raise DataError(f"{place}: not UTF-8 text {fault}; save the file as UTF-8") from error
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        # A whole object has its fault inside; anything else is of another kind of file, or the object goes on below.
        whole = text.startswith("{") and text.endswith("}")
        fault = f"{error.msg}, column {error.colno}"
        raise DataError(f"{place}: not JSON ({fault}): {_short(text)}{'' if whole else WAY_OUT}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets without end
        raise DataError(f"{place}: not JSON that can be read ({error}): {_short(text)}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected an object, found {_kind(record)}: {_short(text)}{WAY_OUT}")
    return record


def _query(record: dict[str, Any], role: str, default_id: str, place: str) -> Query:
    if "question" not in record:
        found = ", ".join(record) or "none"
        raise DataError(f'{place}: no "question" field; fields found: {found}{nearest("question", record)}')
    question = _text(record["question"], "question", place)
    identity = record.get("id", default_id)
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    answer, context, choices = (record.get(field) for field in ("answer", "context", "choices"))
    answer_reader = _texts if isinstance(answer, list) else _text
    return Query(
        id=_text(identity, "id", place),
        question=question,
        role=role,
        context=None if context is None else _text(context, "context", place),
        answer=None if answer is None else answer_reader(answer, "answer", place),
        choices=None if choices is None else _texts(choices, "choices", place),
        place=place,
    )


def _text(value: Any, field: str, place: str) -> str:
    """The text without the space around it; DataError if it is another type, blank, or no valid Unicode."""
    if not isinstance(value, str):
        raise DataError(f'{place}: "{field}" must be text, found {_kind(value)}: {_short(repr(value))}')
    if all(char.isspace() or unicodedata.category(char) == "Cf" for char in value):  # "\u200b" shows nothing either
        raise DataError(f'{place}: "{field}" is blank')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud83d" alone: legal JSON, but tokenizers refuse it
        fault = f"half a surrogate pair at character {error.start + 1}"
        raise DataError(f'{place}: "{field}" holds {fault}') from error
    return value.strip()


def _texts(value: Any, field: str, place: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        found = f"{_kind(value)}: {_short(repr(value))}"
        raise DataError(f'{place}: "{field}" must be a list of texts, found {found}')
    return tuple(_text(item, field, place) for item in value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, IsADirectoryError):
        return f"{path}: is a folder; name the file itself"
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file"
    return f"{path}: cannot be read ({error.strerror})"
