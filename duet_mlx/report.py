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
from .errors import ConfigError, DataError, run_cli
from .measures import ARROWS, MEASURES
from .metrics import FORGET, GENERAL, NEIGHBOURS

Row = dict[str, Any]
# Behind a reverse prompt only these are shown; results.json has all.
SHOWN_REVERSE = ("recall", "refused")
LEGEND = (
    "Mean over questions [95 % bootstrap interval]. ↓ lower is better, ↑ higher is better, – undefined. The "
    "base's answer is its own, greedy and without context; the chance floor is what unrelated answers share "
    "with it."
)


def load_beside(specs: Sequence[str], taken: Sequence[str]) -> list[Row]:
    """The 'unlearned' rows of other evaluations under other names, from "NAME=results.json" each.

    Raises:
        ConfigError: not of that form, a name twice, or one of `taken`.  DataError: not such a file.
    """
    rows: list[Row] = []
    names = list(taken)
    for spec in specs:
        name, equals, path = spec.partition("=")
        name = name.strip()
        if not (equals and name and name.isprintable() and path):
            raise ConfigError(f"--beside {spec!r}: expected NAME=results.json, the name on one line")
        if name in names:
            raise ConfigError(f"--beside {spec}: there is a column {name!r} already; choose another name")
        names.append(name)
        found = [row for row in load_results(path)["rows"] if row["model"] == "unlearned"]
        if not found:
            raise DataError(f"{path}: no rows of a model 'unlearned', so nothing to show as {name!r}")
        rows += [{**row, "model": name, "source": {"file": path, "sha256": file_hash(path)}} for row in found]
    return rows


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


# --- tables -------------------------------------------------------------------------------------------------


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _groups(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["group"] for row in rows))


def cell(row: Row | None) -> str:
    """`0.12 [0.08, 0.17]`, or – where the value is undefined or was not measured."""
    if row is None or row["value"] is None:
        return "–"
    interval = row.get("ci")
    return f"{row['value']:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _lines(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """(label, a cell for each model) of every line; a group's heading has no cells."""
    models = _models(rows)
    by_key = {(row["model"], row["group"], row["metric"]): row for row in rows}
    lines: list[tuple[str, list[str]]] = []
    for group in _groups(rows):
        count = max(row["n"] for row in rows if row["group"] == group)
        lines.append((f"{group} ({count} question{'s' * (count != 1)})", []))
        for metric in MEASURES:
            found = [by_key.get((model, group, metric.key)) for model in models]
            if all(row is None for row in found):
                continue
            if ", reverse" in group and metric.key not in SHOWN_REVERSE:
                continue
            # Only where it says more than "refused": the base itself refuses some.
            if metric.key == "refused_all" and not (found[0] or {}).get("value"):
                continue
            if all(row is None or row["value"] is None for row in found):
                continue  # results.json has the reason
            label = f"{metric.label} {ARROWS[metric.direction(group)]}".rstrip()
            if metric.key in ("recall_gold", "refused"):
                asked = max(row["n"] for row in found if row)
                label += f" (n = {asked})" if asked != count else ""
            lines.append((label, [cell(row) for row in found]))
    return lines


def format_table(rows: Sequence[Row]) -> str:
    """The table for a terminal: a line a measure, a column a model."""
    models, lines = _models(rows), _lines(rows)
    first = max(len(label) for label, _ in lines) + 4  # two before a measure's label, two behind it
    widths = [max([len(m), *(len(cells[i]) for _, cells in lines if cells)]) for i, m in enumerate(models)]
    out = [" " * first + "  ".join(m.ljust(w) for m, w in zip(models, widths, strict=True))]
    for label, cells in lines:
        if not cells:
            out += ["", label]
        else:
            padded = (c.ljust(w) for c, w in zip(cells, widths, strict=True))
            out.append("  " + label.ljust(first - 2) + "  ".join(padded))
    for text in (in_a_sentence(rows), LEGEND):
        out += ["", *textwrap.wrap(text, 110)] if text else []
    return "\n".join(line.rstrip() for line in out)


def on_trained(results: dict[str, Any]) -> str:
    """Which groups the adapter was trained on, by the hashes of its files (provenance.trained_on); '' for none."""
    meta = results.get("meta")
    found = meta.get("trained_on") if isinstance(meta, dict) else None
    if not isinstance(found, dict) or not found:
        return ""
    named = "; ".join(f"{group} ({', '.join(map(str, files))})" for group, files in found.items())
    return f"The adapter was trained on these very files: {named}. All other groups are of other files."


def markdown_table(results: dict[str, Any]) -> str:
    """The same table in Markdown, with the legend under it."""
    rows = results["rows"]
    models = _models(rows)
    out = ["| | " + " | ".join(model.replace("|", "\\|") for model in models) + " |", "|---" * (len(models) + 1) + "|"]
    for label, cells in _lines(rows):
        text = label.strip() if cells else f"**{label}**"
        out.append(f"| {text} | " + " | ".join(cells or [""] * len(models)) + " |")
    return "\n\n".join(text for text in ("\n".join(out), in_a_sentence(rows), on_trained(results), LEGEND) if text)


def in_a_sentence(rows: Sequence[Row]) -> str:
    """What became of the base in the column 'unlearned', for a reader of nothing else; '' without that column."""
    values = {(row["model"], row["group"], row["metric"]): row["value"] for row in rows}
    groups = _groups(rows)

    def percent(group: str, metric: str, model: str = "unlearned") -> str | None:
        value = values.get((model, group, metric))
        return None if value is None else f"{100 * value:.0f} %"

    said = []
    for group in groups:
        if "reverse" in group:
            continue
        forget = group.startswith(FORGET)
        before = percent(group, "rouge_recall", "base")
        now = percent(group, "recall" if forget else "f1")
        if now is not None:
            found = [f"{now} of the base's answers {'left' if forget else 'kept'}"]
        elif before is not None and (now := percent(group, "rouge_recall")):
            found = [f"{now} of the reference answers given, {before} before"]
        else:
            continue
        for name, keys in (("refused", ("refused", "refusals")), ("broken", ("broken",))):
            found += [f"{value} {name}" for key in keys if (value := percent(group, key))]
        said.append(f"{group}: {', '.join(found)}")
    return f"After unlearning, {'; '.join(said)}." if said else ""


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
    results["rows"] += load_beside(args.beside, _models(results["rows"]))
    if args.markdown:
        print(markdown_table(results))
    else:
        show(results, Path(args.results).with_name("samples.jsonl"))


if __name__ == "__main__":
    run_cli(main)
