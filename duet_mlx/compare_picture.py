"""The pictures of a comparison: the methods and their Pareto front, and a panel for each sweep."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from .compare_table import WORST, Result, Row, front, own_columns, points_of, shift
from .evaluate import UNLEARNED
from .metrics import FORGET, GENERAL, NEIGHBOURS
from .picture import legend_name, pyplot, save, share

# Told apart by shape and filling, not by colour: what should go is round, what should stay has corners.
MEASURES = (
    ("forget: recall ↓", FORGET, "recall", "o", "black"),
    ("worst reverse prompt: recall ↓", WORST, "recall", "o", "white"),
    ("neighbours: F1 ↑", NEIGHBOURS, "f1", "s", "0.6"),
    ("general: F1 ↑", GENERAL, "f1", "^", "white"),
)
OWN = "vDP*X"  # groups of one's own
PANELS = 4  # in a row
CLOSE = 0.04  # points that share a text


def methods_picture(rows: Sequence[Row], *paths: str | Path) -> None:
    """What each model forgot against what it kept, the front as a line; beside it the measures, the best shift first.

    Args:
        rows: of the table of the methods.  paths: PNG or SVG, by their suffix.

    Raises:
        TrainingError: no room, or no permission.
    """
    plt = pyplot()
    models = sorted(dict.fromkeys(row["model"] for row in rows), key=lambda model: -(shift(rows, model) or 0))
    height = max(5.0, 1.6 + 0.36 * len(models))
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, height), gridspec_kw={"width_ratios": [1, 1.1]})
    points = points_of(rows)
    best = sorted((points[model] for model in front(points)), key=lambda point: (point[0], -point[1]))
    left.plot([x for x, _ in best], [y for _, y in best], color="0.6", linestyle=":", drawstyle="steps-pre")
    numbered = {number: points[model] for number, model in enumerate(models, 1) if model in points}
    for point in numbered.values():
        left.plot(*point, "o", markersize=7, color="black" if point in best else "0.7")
    while numbered:  # one text above all that lie close: numbers on each other could not be read
        x, y = next(iter(numbered.values()))
        close = [number for number, (a, b) in numbered.items() if max(abs(a - x), abs(b - y)) < CLOSE]
        at = sum(numbered[number][0] for number in close) / len(close), max(numbered[number][1] for number in close)
        left.annotate(
            ", ".join(map(str, close)), at, xytext=(0, 6), textcoords="offset points", ha="center", fontsize=9
        )
        for number in close:
            del numbered[number]
    left.set(
        xlim=(-0.1, 1.1), ylim=(-0.05, 1.1), title="What was forgotten, what was kept (black: on the front)",
        xlabel="forgotten: 1 - recall of the base's answers,\nreverse prompts included (right is better)",
        ylabel="kept: mean F1 of neighbours and general questions\n(up is better)",
    )  # fmt: skip
    left.grid(color="0.9")
    _measures(right, [[row for row in rows if row["model"] == model] for model in models], sideways=True)
    names = [f"{legend_name(model)}  {number}" for number, model in enumerate(models, 1)]
    right.set_yticks(range(len(models)), names, fontsize=8)
    right.invert_yaxis()
    right.set(xlim=(-0.03, 1.03), title="Measures, with 95 % intervals; the best shift first")
    right.grid(color="0.9")
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.3, -0.05), ncols=4, frameon=False)
    figure.tight_layout()
    save(figure, *paths)


def ablations_picture(swept: Sequence[Result], *paths: str | Path) -> None:
    """A panel for each sweep: the measures of each of its values, with their intervals.

    Args:
        swept: the runs of all sweeps, each in the order of its values.  paths: PNG or SVG, by their suffix.

    Raises:
        TrainingError: no room, or no permission.
    """
    plt = pyplot()
    names = list(dict.fromkeys(result.name for result in swept))
    lines = -(-len(names) // PANELS)
    figure, axes = plt.subplots(
        lines, PANELS, figsize=(3.6 * PANELS, 0.6 + 2.9 * lines), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, name in zip(axes.flat, names, strict=False):
        runs = [result for result in swept if result.name == name]
        _measures(axis, [[row for row in run.rows if row["model"] == UNLEARNED] for run in runs], sideways=False)
        values = [", ".join(str(value) for value in run.values.values()) or "as given" for run in runs]
        axis.set_xticks(range(len(runs)), [legend_name(value) for value in values], fontsize=8)
        axis.set(xlim=(-0.5, len(runs) - 0.5), ylim=(-0.03, 1.03))
        axis.set_xlabel(", ".join(runs[0].values), fontsize=8)
        axis.set_title(legend_name(name), fontsize=10)
        axis.grid(axis="y", color="0.9")
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    save(figure, *paths)


def _measures(axis: Any, runs: Sequence[Sequence[Row]], sideways: bool) -> None:
    """Each run's measures as points with intervals, runs along one axis; beside each other where they are the same."""
    columns = own_columns([row for rows in runs for row in rows])
    shares = [column for column in columns if column[2] != "privleak"]  # which may be anything from -100 on
    own = zip(shares, cycle(OWN), strict=False)
    measures = [*MEASURES, *((*column, marker, "white") for column, marker in own)]
    for offset, (label, group, metric, marker, fill) in enumerate(measures):
        places, values, errors = [], [], []
        for place, rows in enumerate(runs):
            row = next((row for row in rows if (row["group"], row["metric"]) == (group, metric)), None)
            if row and row["value"] is not None:
                figure, *error = share(row)
                places.append(place + (offset - (len(measures) - 1) / 2) * 0.7 / len(measures))
                values.append(figure)
                errors.append(error)
        if values:
            x, y, which = (values, places, "xerr") if sideways else (places, values, "yerr")
            axis.errorbar(
                x, y, **{which: list(zip(*errors, strict=True))}, fmt=marker, markersize=5, color="black",
                markerfacecolor=fill, ecolor="0.6", elinewidth=1, label=label,
            )  # fmt: skip
