"""Shows an evaluation: a table, a Markdown table, answers side by side, a picture.

python -m duet_mlx.report DIR/results.json               # the table and sample answers once more
python -m duet_mlx.report DIR/results.json --markdown    # the table to paste into a paper or a model card
python -m duet_mlx.report DIR/results.json --beside seed1=OTHER/results.json    # another run's column beside it
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .data import file_hash, read_jsonl
from .errors import ConfigError, DataError, note, run_cli
from .metrics import FORGET, GENERAL, NEIGHBOURS
from .report_table import format_table, markdown_table, models_of, on_trained

Row = dict[str, Any]
# Settings that figures hang on, besides the questions themselves.
ASKED = (
    "system", "max_tokens", "forget_questions", "retain_questions", "neighbour_questions", "reverse_questions",
    "benchmark_questions",
)  # fmt: skip


def load_beside(specs: Sequence[str], taken: Sequence[str]) -> tuple[list[Row], dict[str, Any]]:
    """The 'unlearned' rows of other evaluations, from "NAME=results.json" each, and each one's `meta` by its name.

    Raises:
        ConfigError: not of that form, a name twice, or one of `taken`.  DataError: not such a file.
    """
    rows: list[Row] = []
    metas: dict[str, Any] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        name = name.strip()
        if not (equals and name and name.isprintable() and path):
            raise ConfigError(f"--beside {spec!r}: expected NAME=results.json, the name on one line")
        if name in taken or name in metas:
            raise ConfigError(f"--beside {spec}: there is a column {name!r} already; choose another name")
        results = load_results(path)
        metas[name] = results.get("meta")
        found = [row for row in results["rows"] if row["model"] == "unlearned"]
        if not found:
            raise DataError(f"{path}: no rows of a model 'unlearned', so nothing to show as {name!r}")
        rows += [{**row, "model": name, "source": {"file": path, "sha256": file_hash(path)}} for row in found]
    return rows, metas


def note_unlike(others: dict[str, Any], meta: Any) -> None:
    """A line on stderr for each column beside that was measured in another way than this evaluation's."""
    here = _hangs_on(meta)
    for name, other in others.items():
        unlike = [what for what, value in _hangs_on(other).items() if here.get(what, value) != value]
        if "device" in unlike and "--model" in unlike:
            unlike.remove("--model")  # a GPU holds the same weights packed, and so they have another hash there
        if unlike:
            note(f"note: beside {name}: measured with other {', '.join(unlike)}")


def _hangs_on(meta: Any) -> dict[str, Any]:
    """What the figures of a column hang on, by the flag that sets it, as far as `meta` says it."""
    meta = meta if isinstance(meta, dict) else {}

    def part(name: str) -> dict[str, Any]:
        return meta[name] if isinstance(meta.get(name), dict) else {}

    files: dict[str, Any] = {
        name: sorted(map(str, of.values())) for name, of in part("data").items() if isinstance(of, dict) and of
    }
    settings = {name: part("settings").get(name) for name in ASKED}
    files.pop("context", None)  # the column "unlearned" is asked without
    said = {f"--{name.replace('_', '-')}": value for name, value in (files | settings).items()}
    said |= {f"--benchmark {name}": value for name, value in part("benchmarks").items()}
    said |= {"device": part("machine").get("device"), "--model": meta.get("base_weights")}
    return {what: value for what, value in said.items() if value is not None}


def load_results(path: str | Path) -> dict[str, Any]:
    """A results.json whose rows a table and a picture can be made of. Raises DataError naming file and row."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    rows = results.get("rows") if isinstance(results, dict) else None
    if not isinstance(rows, list) or not rows:
        raise DataError(f'{path}: not a results.json: expected "rows" and at least one of them')
    for number, row in enumerate(rows, 1):
        if fault := _fault(row):
            raise DataError(f"{path}: row {number} of rows: {fault}; duet_mlx.evaluate writes no such row")
    return results


def _fault(row: Any) -> str:
    """What is wrong with a row of results.json; '' where nothing is."""
    if not isinstance(row, dict):
        return f"expected model, group, metric, value and n, found {row!r:.60}"
    for key in ("model", "group", "metric"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            return f"{key}: expected a name, found {row.get(key)!r:.60}"
    if row.get("value", "nothing") is not None and not _is_number(row.get("value")):
        return f"value: expected a number or null, found {row.get('value', 'nothing')!r:.60}"
    if not isinstance(row.get("n"), int) or isinstance(row["n"], bool) or row["n"] < 0:
        return f"n: expected a number of questions, found {row.get('n')!r:.60}"
    interval = row.get("ci")
    if interval is None or (isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval))):
        return ""
    return f"ci: expected null or [low, high], found {interval!r:.60}"


def _is_number(value: Any) -> bool:
    """Python's JSON reads NaN, Infinity and whole numbers of any length too; those are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def load_samples(path: Path) -> list[dict[str, Any]]:
    """A samples.jsonl. Raises DataError with file:line for a line that cannot be shown."""
    samples = []
    for line, sample in read_jsonl(path):
        for key in ("id", "group", "question", "model", "answer"):
            if not isinstance(sample.get(key), str):
                raise DataError(f"{path}:{line}: {key}: expected text, found {sample.get(key)!r:.60}")
        samples.append(sample)
    return samples


def side_by_side(samples: Sequence[dict[str, Any]], count: int = 5) -> str:
    """What each model answers to a few questions, forget ones first, spread evenly over each group."""
    by_question: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for sample in samples:
        by_question.setdefault((sample["group"], sample["id"]), []).append(sample)
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in by_question:
        groups.setdefault(key[0], []).append(key)
    plain = [group for group in (FORGET, GENERAL, NEIGHBOURS) if group in groups]
    plain = plain or [group for group in groups if ", " in group and "reverse" not in group][:3]  # a benchmark's
    if not plain:
        return ""
    chosen: list[tuple[str, str]] = []
    for place in range(count):
        group = plain[max(0, place - 1) % len(plain)]
        keys = [key for key in groups[group] if key not in chosen]
        if keys:
            chosen.append(keys[place * len(keys) // count])
    out = []
    for group, identity in sorted(chosen, key=lambda key: plain.index(key[0])):
        answers = by_question[group, identity]
        out += ["", f"[{group}] {answers[0]['question']}"]
        width = max(len(sample["model"]) for sample in answers)
        for sample in answers:
            text = " ".join(sample["answer"].split()) or "(empty)"
            out.append(f"    {sample['model'].ljust(width)}  {text}")
    return "\n".join(out)


# --- the command --------------------------------------------------------------------------------------------


def show(results: dict[str, Any], samples: Path | None = None) -> None:
    """Print the table, and a few answers side by side from samples.jsonl where there is one."""
    print(format_table(results["rows"]))
    if trained := on_trained(results):
        print("\n" + textwrap.fill(trained, 110, break_long_words=False, break_on_hyphens=False))
    if samples is not None and samples.is_file():
        print(side_by_side(load_samples(samples)))


def main() -> None:
    """Print what an evaluation found."""
    parser = argparse.ArgumentParser("python -m duet_mlx.report", description="Print an evaluation again.")
    parser.add_argument("results", help="the results.json that duet_mlx.evaluate wrote")
    parser.add_argument("--markdown", action="store_true", help="the table alone, in Markdown")
    parser.add_argument("--beside", nargs="+", default=[], metavar="NAME=FILE", help="columns of other results.json")
    args = parser.parse_args()
    results = load_results(args.results)
    rows, metas = load_beside(args.beside, models_of(results["rows"]))
    results["rows"] += rows
    note_unlike(metas, results.get("meta"))
    if args.markdown:
        print(markdown_table(results))
    else:
        show(results, Path(args.results).with_name("samples.jsonl"))


if __name__ == "__main__":
    run_cli(main)
