"""The tables of a comparison: a row a method, what it forgot and kept, what it cost, and who is on the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .evaluate import BASE, RETRAINED, UNLEARNED
from .measures import ARROWS, BY_KEY
from .metrics import FORGET, GENERAL, NEIGHBOURS, TRAINED
from .report_table import cell

Row = dict[str, Any]
WORST = f"{FORGET}, worst reverse"
COLUMNS = (
    ("forget ↓", FORGET, "recall"),
    ("worst reverse ↓", WORST, "recall"),
    ("trained on ↓", TRAINED, "recall"),
    ("neighbours ↑", NEIGHBOURS, "f1"),
    ("general ↑", GENERAL, "f1"),
    ("refused, forget", FORGET, "refused"),
    ("refused, neighbours ↓", NEIGHBOURS, "refused"),
    ("refused, general ↓", GENERAL, "refused"),
    ("broken, forget ↓", FORGET, "broken"),
    ("broken, general ↓", GENERAL, "broken"),
    ("perplexity, forget ↓", FORGET, "perplexity"),
    ("perplexity, general ↓", GENERAL, "perplexity"),
)
# What stands for a benchmark: TOFU's two figures of the whole and MUSE's, and one of each group of the others.
WHOLE = {"model_utility": "model utility ↑", "forget_quality": "forget quality ↑", "privleak": "PrivLeak (0 is best)"}
OF_A_GROUP = ("accuracy", "knowmem", "verbmem")
ALWAYS_THERE = {group for _, group, _ in COLUMNS}
LEGEND = (
    "Forget questions: ROUGE-L recall of the base's own answer; neighbours and general: ROUGE-L F1 with it, no stemmer "
    "in either; [95 % bootstrap interval]. Refused: answers that became refusals; broken: that repeat themselves. "
    "Shift: points of recall lost on forget questions, plus points of F1 gained on the others. "
    "Front: ● where no other row forgets as much, reverse prompts included, and keeps as much, and more of one."
)


class Result(NamedTuple):
    """One run, asked the test questions."""

    name: str
    values: dict[str, Any]
    seed: int
    rows: list[Row]
    cost: dict[str, Any]  # seconds and peak_memory_gb of training

    @property
    def label(self) -> str:
        """Its row in the table."""
        return label_of(self.name, self.values)


def label_of(name: str, values: dict[str, Any]) -> str:
    """The row of a run in a table."""
    return ", ".join([name, *(f"{key} {value}" for key, value in values.items())])


def value(rows: Sequence[Row], model: str, group: str, metric: str) -> float | None:
    """A cell's figure; None where there is none."""
    wanted = (model, group, metric)
    return next((r["value"] for r in rows if (r["model"], r["group"], r["metric"]) == wanted), None)


def shift(rows: Sequence[Row], model: str) -> float | None:
    """Performance shift in points: what forget recall fell by, plus what F1 on the other groups rose by; or None.

    Reference: Zhong, Yang and Zhu, ICLR 2026: drops of the forget metrics plus changes of the utility metrics.
    """
    changes = []
    for group, metric, sign in ((FORGET, "recall", -1), (GENERAL, "f1", 1), (NEIGHBOURS, "f1", 1)):
        before, after = value(rows, BASE, group, metric), value(rows, model, group, metric)
        if before is not None and after is not None:
            changes.append(100 * sign * (after - before))
    return sum(changes) if changes else None


def points_of(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """What each model has forgotten and kept: 1 − the worse recall, reverse prompts included; mean F1 of the others."""
    points = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        recalls = [value(rows, model, group, "recall") for group in (FORGET, WORST)]
        shares = [value(rows, model, group, "f1") for group in (GENERAL, NEIGHBOURS)]
        gone, kept = ([one for one in part if one is not None] for part in (recalls, shares))
        if gone and kept:
            points[model] = 1 - max(gone), sum(kept) / len(kept)
    return points


def front(points: dict[str, tuple[float, float]]) -> set[str]:
    """The models that no other beats on both: forgetting and what is kept. What never knew is no way to unlearn."""
    points = {model: point for model, point in points.items() if model != RETRAINED}
    return {
        model
        for model, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    }


def rows_of(results: Sequence[Result]) -> list[Row]:
    """The rows of one table: of what was not trained here once, and of each run under its own name."""
    rows = [row for result in results[:1] for row in result.rows if row["model"] != UNLEARNED]
    return rows + [
        {**row, "model": result.label} for result in results for row in result.rows if row["model"] == UNLEARNED
    ]


def report_of(
    rows: Sequence[Row],
    shown: Sequence[Result],
    again: Sequence[Result],
    ablations: Sequence[Row],
    swept: Sequence[Result],
    questions: int = 0,
    failed: Sequence[dict[str, Any]] = (),
) -> str:
    """table.md: the methods, those of them with other seeds, and the sweeps, asked so many `questions` of each role."""
    parts = [*table_of(rows, shown), ""] if shown else []
    sizes = {row["group"]: row["n"] for row in rows if (row["model"], row["metric"]) == (BASE, "broken")}
    counts = ", ".join(f"{size} {group}" for group, size in sizes.items() if "reverse" not in group)
    parts += [f"{LEGEND} Questions: {counts}." if counts else LEGEND, *seeds_of(rows, shown, again)]
    parts += failed_lines(failed)
    if swept:
        asked = f"at most {questions} test questions of each role and" if questions else "all test questions but"
        parts += ["", f"Sweeps, asked {asked} no reverse prompts:", "", *table_of(ablations, swept, fronted=False)]
    return "\n".join(parts)


def failed_lines(failed: Sequence[dict[str, Any]]) -> list[str]:
    """What stands below a table of runs that did not come to an end."""
    lines = [f"- Failed: {one['name']} {one['values'] or ''}: {one['reason']}" for one in failed]
    return ["", *lines] if lines else []


def table_of(rows: Sequence[Row], results: Sequence[Result], fronted: bool = True) -> list[str]:
    """The table in Markdown, a row a model; `fronted`: who is on the front is told as well."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(row["model"], row["group"], row["metric"]): row for row in rows}
    columns = columns_of(rows)
    best, costs = front(points_of(rows)), {result.label: result.cost for result in results}
    lines = [["", *(c[0] for c in columns), "shift ↑", *(["front"] if fronted else []), "seconds", "GB"]]
    for model in models:
        cost = costs.get(model, {})
        lines.append([
            model,
            *(cell(cells.get((model, group, metric))) for _, group, metric in columns),
            "–" if model == BASE or (moved := shift(rows, model)) is None else f"{moved:.1f}",
            *(["●" if model in best else ""] if fronted else []),
            f"{cost['seconds']:.0f}" if cost else "",
            f"{cost['peak_memory_gb']:.2f}" if cost else "",
        ])  # fmt: skip
    return markdown(lines)


def columns_of(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Those of COLUMNS, and of groups of one's own, of which these rows have a figure."""
    there = {(row["group"], row["metric"]) for row in rows}
    return [column for column in (*COLUMNS, *own_columns(rows)) if column[1:] in there]


def markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table of these cells, the first line its heads, the columns aligned."""
    lines = [[" ".join(text.replace("|", "\\|").split()) for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *rest = (" | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) for line in lines)
    return [f"| {head} |", f"|-{'-|-'.join('-' * w for w in widths)}-|", *(f"| {line} |" for line in rest)]


def own_columns(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Columns as in COLUMNS for benchmarks, and for the groups of --also."""
    there = dict.fromkeys((row["group"], row["metric"]) for row in rows)
    own = [group for group, metric in there if metric == "recall" and group not in ALWAYS_THERE]
    whole = any(metric in WHOLE for _, metric in there)  # TOFU's groups have recall too, and two figures for all
    return [
        *((WHOLE[metric], group, metric) for group, metric in there if metric in WHOLE),
        *(_headed(group, metric) for group, metric in there if metric in OF_A_GROUP),
        *(_headed(group, metric) for group, metric in there if metric == "rouge_recall" and not whole),
        *(_headed(group, "recall" if group.startswith(FORGET) else "f1") for group in own if ", reverse" not in group),
    ]


def _headed(group: str, metric: str) -> tuple[str, str, str]:
    return f"{group} {ARROWS[BY_KEY[metric].direction(group)]}", group, metric


def seeds_of(rows: Sequence[Row], shown: Sequence[Result], again: Sequence[Result]) -> list[str]:
    """A table of the methods that were run with several seeds: of each figure the mean [lowest, highest]."""
    asked = (row for run in again for row in run.rows if row["model"] == UNLEARNED)
    there = {(row["group"], row["metric"]) for row in asked}  # not the questions that they were trained on
    columns = [column for column in columns_of(rows) if column[1:] in there]
    lines = [["", "seeds", *(head for head, _, _ in columns), "shift ↑"]]
    for one in shown:
        runs = [one, *(other for other in again if other.label == one.label)]
        if len(runs) > 1:
            figures = [[value(run.rows, UNLEARNED, *c[1:]) for run in runs] for c in columns]
            shifts = [shift(run.rows, UNLEARNED) for run in runs]
            seeds = ", ".join(str(run.seed) for run in runs)
            lines.append([one.label, seeds, *(_range(of, 2) for of in figures), _range(shifts, 1)])
    return (
        ["", "Several seeds of the best by their validation shift, mean [lowest, highest]:", "", *markdown(lines)]
        if lines[1:]
        else []
    )


def _range(values: Sequence[float | None], digits: int) -> str:
    known = [one for one in values if one is not None]
    if not known:
        return "–"
    low, high = (f"{one:.{digits}f}" for one in (min(known), max(known)))
    return f"{sum(known) / len(known):.{digits}f} [{low}, {high}]"
