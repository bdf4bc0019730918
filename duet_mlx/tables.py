"""Files of rows: JSON lists, JSON Lines, CSV, Parquet, OpenTriviaQA's text and plain lines, told apart by content.

Names mislead: TOFU's `.json` files are JSON Lines, its `idontknow.jsonl` is plain text, ULD's `refusal.jsonl` holds
quoted lines. benchmarks.py makes questions of the rows.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

from .errors import DataError

Row = tuple[int, Any]  # line number from 1, and a dict by column or field, a list of cells, or a text
log = logging.getLogger(__name__)
DAMAGED = "\N{REPLACEMENT CHARACTER}"
# Where a JSON file is one object, its rows are under one of these (TriviaQA has "Data").
INSIDE = ("Data", "data", "rows", "examples", "questions")
# Names of the field that holds the question; a CSV file whose first row has one of them has a header.
QUESTION = ("question", "query", "prompt", "instruction", "input", "problem", "text", "intro")


def read_rows(path: Path, strict: bool = False) -> list[Row]:
    """(line number from 1, row) of each row that is not blank; in a Parquet file, the row's own number.

    Args:
        path: `.csv` and `.tsv` are tables, `.parquet` needs pyarrow, all others are what they begin with: `[` or `{`
            JSON, `#Q ` OpenTriviaQA, anything else a text a line.
        strict: a row with bytes that are not UTF-8, or with a NUL, is an error; otherwise the former is left out with
            a warning, and a NUL is a sign as others are.

    Returns:
        Dicts; lists of cells for a CSV file without a header; texts for plain lines. HTML's entities become the signs
        that they stand for.

    Raises:
        DataError: with file and line.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return [(number, _whole_texts(row)) for number, row in enumerate(_parquet(path), 1)]
    text = _text_of(path)
    if strict:  # by its NULs a file of numbers is known, though they are UTF-8
        text = text.replace("\0", DAMAGED)
    if suffix in (".csv", ".tsv"):
        rows = list(_csv(path, text))
    elif text.lstrip()[:1] in ("[", "{"):
        rows = list(_json(path, text))
    elif re.match(r"\s*#Q ", text):
        rows = list(_trivia(path, text))
    else:
        rows = [(n, _unquoted(line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: the file is empty; expected rows of questions")
    whole = [(line, _whole_texts(row)) for line, row in rows if DAMAGED not in repr(row)]
    if len(whole) < len(rows):
        first = next(line for line, row in rows if DAMAGED in repr(row))
        if strict:
            raise DataError(f"{path}:{first}: not UTF-8 text; expected a text file, saved as UTF-8")
        log.warning("%s:%d: %d row(s) left out: not UTF-8 text", path, first, len(rows) - len(whole))
    if not whole:
        raise DataError(f"{path}: no row is UTF-8 text; save the file as UTF-8")
    return whole


def read_lines(path: str | Path) -> list[str]:
    """The texts of a file of one text a row (refusals): plain or quoted lines, or a CSV file of one column.

    A header is taken off if it is the word that such files use ("Refusal Response"). Raises DataError, for a line that
    is not text too: of a model named here by mistake whatever happens to be UTF-8 would be learned.
    """
    texts = []
    for line, row in read_rows(Path(path), strict=True):
        text = row[0] if isinstance(row, list) and len(row) == 1 else row
        if not isinstance(text, str):
            raise DataError(f"{path}:{line}: expected one text a line, found {str(row)[:60]}")
        texts.append(text.strip())
    return texts[1:] if texts[0].lower() in ("refusal response", "response", "text") else texts


def _text_of(path: Path) -> str:
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder; name the file itself") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if data.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        raise DataError(f"{path}: is compressed; unpack it first")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: not UTF-8 text but UTF-16, by its first bytes; save the file as UTF-8")
    # One file may mix both line ends.
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n")


def _json(path: Path, text: str) -> Iterator[Row]:
    """The values of one list, or values one after another; the one object that holds a list gives that list."""
    # pandas writes NaN where a field is missing, and "nan" is nobody's answer.
    decoder, line, seen = json.JSONDecoder(parse_constant=lambda _: None), 1, 0
    at = len(text) - len(text.lstrip())
    listed = text[at] == "["
    at += listed
    while True:
        while at < len(text) and text[at] in " \t\n\r,":
            at += 1
        line, seen = line + text.count("\n", seen, at), at
        if listed and text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                raise DataError(f"{path}:{line}: more text behind the end of the list; expected one list a file")
            return
        if at == len(text):
            if listed:
                raise DataError(f"{path}:{line}: the list has no end; the file seems to be cut off")
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            found = text[at : at + 60].split("\n")[0]
            raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno}): {found}") from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets without end
            raise DataError(f"{path}:{line}: not JSON that can be read ({error})") from error
        inside = next((value[k] for k in INSIDE if isinstance(value.get(k), list)), None) if _is_all(value) else None
        yield from [(line, row) for row in inside] if inside else [(line, value)]
        at = end


def _is_all(value: Any) -> bool:
    """Whether an object looks like a whole file: it holds no question itself."""
    return isinstance(value, dict) and not any(name.lower() in ("question", "query", "prompt") for name in value)


def _csv(path: Path, text: str) -> Iterator[Row]:
    """Rows of cells, of which a first one that has a cell "question" (or the like) names the columns."""
    # strict: a quote that is never closed would else swallow the rest of the file without a word.
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
    )
    header: list[str] | None = None
    line = 1
    try:
        for number, cells in enumerate(reader):
            if number == 0 and any(cell.strip().lower() in QUESTION for cell in cells):
                header = [cell.strip() for cell in cells]
            elif any(cell.strip() for cell in cells):
                if header and len(cells) != len(header):
                    raise DataError(f"{path}:{line}: {len(cells)} cells, expected {len(header)}: {', '.join(header)}")
                yield line, dict(zip(header, cells, strict=True)) if header else cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV ({error}); the row begins on this line") from error


def _trivia(path: Path, text: str) -> Iterator[Row]:
    """OpenTriviaQA: `#Q question`, `^ right answer`, `A …`, `B …`; a question may run over several lines."""
    line = 1
    for block in re.split(r"(?m)^(?=#Q )", text):
        found = re.fullmatch(r"#Q (.*?)\n\^ ([^\n]*)\n((?:[A-Z] [^\n]*\n?)+)\s*", block, re.DOTALL)
        if found:
            question, answer, options = found.groups()
            choices = [option[2:].strip() for option in options.splitlines()]
            # Its answer is always an option's text, "3" too.
            right: Any = choices.index(answer.strip()) if choices.count(answer.strip()) == 1 else answer.strip()
            yield line, {"question": question, "answer": right, "choices": choices}
        elif block.strip():
            begins = block.split("\n")[0][:60]
            raise DataError(f"{path}:{line}: expected `#Q`, `^ answer` and lines `A …`, `B …`, found: {begins}")
        line += block.count("\n")


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet files need pyarrow: pip install 'duet-mlx[parquet]', or save it as JSON"
        ) from error
    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from error


def _unquoted(line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        return line.strip()
    return value if isinstance(value, str) else line.strip()


def _whole_texts(value: Any) -> Any:
    """The row with HTML's entities replaced. "&amp;" needs its semicolon here: "R&D" and "?a=1&copy=2" stay."""
    if isinstance(value, str):
        return re.sub(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[A-Za-z]\w*);", lambda found: unescape(found[0]), value)
    if isinstance(value, dict):
        return {key: _whole_texts(item) for key, item in value.items()}
    return [_whole_texts(item) for item in value] if isinstance(value, list) else value
