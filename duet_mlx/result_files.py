"""The folder of an evaluation: nothing in it is replaced unasked, and each file is whole or not there."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from .errors import ConfigError, TrainingError
from .picture import picture
from .question_picture import question_picture

RESULTS, SAMPLES, PICTURES = "results.json", "samples.jsonl", ("results.png", "results.svg")
QUESTIONS = ("questions.png", "questions.svg")
KEPT = "answers"  # kept_answers.py writes there


def check_free(out: str, overwrite: bool) -> None:
    """Raise ConfigError if the folder holds results that nothing allows to be replaced. Nothing is written."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {out}: is a file, expected a folder")
    for name in (RESULTS, SAMPLES, *PICTURES, *QUESTIONS):
        if (folder / name).is_dir():
            raise ConfigError(f"--out {out}: {name} in it is a folder, expected a file or nothing")
        if (folder / name).exists() and not overwrite:
            raise ConfigError(f"--out {out}: holds {name} already; name another folder, or add --overwrite")


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """A row or sample in which null stands for NaN and infinity, for which JSON has no word, and `reason` says so."""
    odd = [key for key, value in record.items() if _is_odd(value)]
    reason = {"reason": f"not a finite number: {', '.join(odd)}"} if odd else {}
    return {**record, **dict.fromkeys(odd), **reason}


def _is_odd(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_odd, value))
    return isinstance(value, float) and not math.isfinite(value)


def write(out: Path, results: dict[str, Any], samples: list[dict[str, Any]], pictures: bool = True) -> None:
    """Write each file whole or not at all; the pictures last, for they are drawn from what is in the others.

    Args:
        pictures: False draws none.

    Raises:
        TrainingError: no room.
    """
    contents = {
        SAMPLES: "".join(json.dumps(sample, ensure_ascii=False, allow_nan=False) + "\n" for sample in samples),
        RESULTS: json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    partials = {name: out / f".{name}.partial" for name in contents}
    try:
        for name, text in contents.items():
            # A path may hold bytes that are not UTF-8; what is written of them is JSON's own escape.
            partials[name].write_text(text, encoding="utf-8", errors="backslashreplace")
        for name in (*PICTURES, *QUESTIONS):  # with --overwrite: never an old picture beside new figures
            (out / name).unlink(missing_ok=True)
        for name, partial in partials.items():
            os.replace(partial, out / name)
    except OSError as error:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise TrainingError(f"{out / name}: cannot be written ({error.strerror}); the answers are kept") from error
    if not pictures:
        return
    picture(results, *(out / name for name in PICTURES))
    question_picture(samples, *(out / name for name in QUESTIONS))
