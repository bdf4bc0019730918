"""The table of an evaluation: a line a measure, a column a model, and in a sentence what happened."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from .measures import ARROWS, BY_KEY, MEASURES
from .metrics import FORGET, METRICS

Row = dict[str, Any]
# Behind a reverse prompt only these are shown; results.json has all.
SHOWN_REVERSE = ("recall", "refused")
COLUMNS = {
    "base": "the model before",
    "base + context": "the same model reading instructions to forget: the teacher, which sets the limit",
    "unlearned": "the model with the adapter, without instructions",
    "retrained": "a model that never saw what should go",
}
LEGEND = (
    "Mean over questions [95 % bootstrap interval]. ↓ lower is better, ↑ higher is better, – undefined. The "
    "base's answer is its own, greedy and without context; the chance floor is what unrelated answers share "
    "with it. A model that refuses everything is told by what it refuses where answers should stay; one that "
    "babbles, by broken answers or by a perplexity far above that of the base's own answers."
)
REVERSE = (
    "Reverse: behind a prompt that tells the model to ignore such instructions; worst reverse: of these prompts the "
    "one under which a model gives most of the base's answers."
)


def models_of(rows: Sequence[Row]) -> list[str]:
    """The models of the rows, in the table's order."""
    return list(dict.fromkeys(row["model"] for row in rows))


def _groups(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["group"] for row in rows))


def cell(row: Row | None) -> str:
    """`0.12 [0.08, 0.17]`, or – where the value is undefined or was not measured."""
    if row is None or row["value"] is None:
        return "–"
    interval = row.get("ci")
    return _figure(row["value"]) + (f" [{_figure(interval[0])}, {_figure(interval[1])}]" if interval else "")


def _figure(value: float) -> str:
    """Two decimals; of the perplexity of no language at all, which may have any number of digits, three digits."""
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.2e}"


def _count(rows: Sequence[Row], group: str) -> int:
    """How many questions a group has in this evaluation; in another, whose column stands beside, if it has none."""
    here = [row for row in rows if row["group"] == group]
    return max(row["n"] for row in [row for row in here if "source" not in row] or here)


def _heading(rows: Sequence[Row], group: str) -> str:
    """The group, how many questions it has, and whether their answers should go or stay, if they should either."""
    here = [row for row in rows if row["group"] == group]
    count = _count(rows, group)
    wanted = ""
    if any(metric.forget != metric.keep for row in here if (metric := BY_KEY.get(row["metric"]))):
        wanted = ": should go" if group.startswith(FORGET) else ": should stay"
    return f"{group} ({count} question{'s' * (count != 1)}){wanted}"


def legend(rows: Sequence[Row]) -> list[str]:
    """What the columns are, and how to read the figures."""
    columns = "; ".join(f"{model}: {COLUMNS[model]}" for model in models_of(rows) if model in COLUMNS)
    reverse = any("reverse" in group for group in _groups(rows))
    return [f"Columns. {columns}."] * bool(columns) + [REVERSE] * reverse + [LEGEND]


def _lines(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """(label, a cell for each model) of every line; a group's heading has no cells."""
    models = models_of(rows)
    by_key = {(row["model"], row["group"], row["metric"]): row for row in rows}
    lines: list[tuple[str, list[str]]] = []
    for group in _groups(rows):
        count = _count(rows, group)
        lines.append((_heading(rows, group), []))
        for metric in MEASURES:
            found = [by_key.get((model, group, metric.key)) for model in models]
            if all(row is None for row in found):
                continue
            if ", reverse" in group and metric.key not in SHOWN_REVERSE:
                continue
            # Only where it says more than "refused": the base itself refuses some.
            if metric.key == "refused_all" and not (found[0] or {}).get("value"):
                continue
            if all(row is None or row["value"] is None for row in found) and metric in METRICS:
                continue  # results.json has the reason; what a benchmark is asked for is looked for here
            label = f"{metric.label} {ARROWS[metric.direction(group)]}".rstrip()
            if metric.key in ("recall_gold", "refused", "forget_quality"):
                asked = max(row["n"] for row in found if row)
                label += f" (n = {asked})" if asked != count else ""
            lines.append((label, [cell(row) for row in found]))
    return lines


def format_table(rows: Sequence[Row]) -> str:
    """The table for a terminal: a line a measure, a column a model."""
    models, lines = models_of(rows), _lines(rows)
    first = max(len(label) for label, _ in lines) + 4  # two before a measure's label, two behind it
    widths = [max([len(m), *(len(cells[i]) for _, cells in lines if cells)]) for i, m in enumerate(models)]
    out = [" " * first + "  ".join(m.ljust(w) for m, w in zip(models, widths, strict=True))]
    for label, cells in lines:
        if not cells:
            out += ["", label]
        else:
            padded = (c.ljust(w) for c, w in zip(cells, widths, strict=True))
            out.append("  " + label.ljust(first - 2) + "  ".join(padded))
    for text in (in_a_sentence(rows), *legend(rows)):
        out += ["", *textwrap.wrap(text, 110)] if text else []
    return "\n".join(line.rstrip() for line in out)


def on_trained(results: dict[str, Any]) -> str:
    """Which groups the adapter was trained on, by the hashes of its files (provenance.trained_on); '' for none."""
    meta = results.get("meta")
    found = meta.get("trained_on") if isinstance(meta, dict) else None
    named = "; ".join(
        f"{group} ({', '.join(map(str, files))})"
        for group, files in (found.items() if isinstance(found, dict) else ())
        if isinstance(files, list)  # a file that was changed by hand may hold anything
    )
    return named and f"The adapter was trained on these very files: {named}. All other groups are of other files."


def markdown_table(results: dict[str, Any]) -> str:
    """The same table in Markdown, with the legend under it."""
    rows = results["rows"]
    models = models_of(rows)
    out = ["| | " + " | ".join(model.replace("|", "\\|") for model in models) + " |", "|---" * (len(models) + 1) + "|"]
    for label, cells in _lines(rows):
        text = (label.strip() if cells else f"**{label}**").replace("|", "\\|")
        out.append(f"| {text} | " + " | ".join(cells or [""] * len(models)) + " |")
    return "\n\n".join(
        text for text in ("\n".join(out), in_a_sentence(rows), on_trained(results), *legend(rows)) if text
    )


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
        own, new = (values.get((model, group, "perplexity")) for model in ("base", "unlearned"))
        if own is not None and new is not None:
            found.append(f"perplexity {_figure(new)}, {_figure(own)} before")
        said.append(f"{group}: {', '.join(found)}")
    return f"After unlearning, {'; '.join(said)}." if said else ""
