"""Answers kept on the disk: a model that was asked once is not asked again, and an evaluation cut off goes on.

One file a column, in `answers/` under --out. Its first line says what the answers hang on; each further line is what
came of one unit, a fixed part of the questions, with a mark by which a line in the wrong place is known. Units are
computed as if alone, so that it makes no difference to the last bit which of them were read from the file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from .data import digest
from .errors import note
from .files import append_text, write_text


class Unit(NamedTuple):
    """What came of some questions, one entry for each: what scores.Column holds, but for the text."""

    ids: list[list[int]]
    probabilities: list[float | None]
    surprises: list[float | None]


class KeptAnswers:
    """The units of one column that are done, first ones first, and where the next ones go."""

    def __init__(self, file: Path, column: str, hangs_on: dict[str, Any], sizes: list[int]):
        """Take from the file what was answered under the very same `hangs_on`; say what is reused, or why not.

        Args:
            sizes: how many questions each unit of the column has.
        """
        self.file = file
        header = json.dumps(hangs_on, sort_keys=True)
        saved = file.read_bytes() if file.is_file() else b""
        lines = saved.splitlines()
        reason = _why_not(lines[0], json.loads(header)) if lines else ""
        self._header = header
        self.units = [] if reason else _units(lines[1:], header, sizes)
        done, total = sum(sizes[: len(self.units)]), sum(sizes)
        if reason:
            note(f"{column}: answered anew, not from {file}: {reason}")
        elif done:
            rest = f"; {total - done} of {total} are still to be answered" if done < total else ""
            note(f"{column}: answers reused from {file}{rest}")
        text = "".join(line + "\n" for line in (header, *(self._line(n) for n in range(len(self.units)))))
        if text.encode() != saved:  # new, or with a line that was cut off
            write_text(file, text)

    def add(self, unit: Unit) -> None:
        """Keep the next unit."""
        self.units.append(unit)
        append_text(self.file, self._line(len(self.units) - 1) + "\n")

    def _line(self, number: int) -> str:
        line = {"mark": _mark(self._header, number), **self.units[number]._asdict()}
        return json.dumps(line, allow_nan=False)  # Python writes a float so that the same one is read back


def code_hash() -> str:
    """SHA-256 of this package's program text: answers of other code are not reused."""
    return digest(
        [[file.name, file.read_text(encoding="utf-8")] for file in sorted(Path(__file__).parent.glob("*.py"))]
    )


def _mark(header: str, number: int) -> str:
    """What tells a unit's line from that of any other unit, and from that of other questions or another model."""
    return digest([header, number])


def _why_not(line: bytes, hangs_on: dict[str, Any]) -> str:
    """Why the answers behind this first line cannot be taken; '' if they can."""
    try:
        saved = json.loads(line)
        changed = [name for name in hangs_on if saved.get(name) != hangs_on[name]]
    except (ValueError, AttributeError):
        return "its first line is damaged"
    return f"{', '.join(changed)} changed since" if changed else ""


def _units(lines: list[bytes], header: str, sizes: list[int]) -> list[Unit]:
    """The units of these lines, up to the first line that is not its unit's: cut off, damaged or in a wrong place."""
    units = []
    for number, (line, size) in enumerate(zip(lines, sizes, strict=False)):
        try:
            record = json.loads(line)
            marked = record.pop("mark") == _mark(header, number)
            unit = Unit(**record)
            tokens = [token for ids in unit.ids for token in ids]
            sound = marked and all(len(part) == size for part in unit) and all(type(token) is int for token in tokens)
            numbers = [*unit.probabilities, *unit.surprises]
            sound &= all(x is None or (type(x) is float and math.isfinite(x)) for x in numbers)
        except (ValueError, TypeError, LookupError, AttributeError):
            sound = False
        if not sound:
            break
        units.append(unit)
    return units
