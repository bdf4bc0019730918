"""The picture of an evaluation: forgetting against retention, and bars of the measures; readable without colour."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import TrainingError
from .measures import ARROWS, BY_KEY
from .metrics import FORGET, GENERAL, NEIGHBOURS, TRAINED

Row = dict[str, Any]
Cells = dict[tuple[str, str, str], Row]  # by model, group and metric
Key = tuple[str, str]  # group and metric

# Told apart by shape and hatching, not by colour.
MARKERS = "osD^vP*X"
HATCHES = ("", "////", "xxxx", "....", "++++")
GREYS = ("0.95", "0.75", "0.45")
BARS = (
    (FORGET, "recall"),
    (TRAINED, "recall"),
    (f"{FORGET}, worst reverse", "recall"),
    (FORGET, "probability"),
    (FORGET, "refused"),
    (FORGET, "broken"),
    (GENERAL, "f1"),
    (GENERAL, "refused"),
    (GENERAL, "broken"),
    (NEIGHBOURS, "f1"),
    (NEIGHBOURS, "refused"),
    (NEIGHBOURS, "broken"),
)
# Of a benchmark's groups these are drawn; those in points are drawn as shares.
BENCHMARK_BARS = (
    "rouge_recall", "answer_probability", "truth_ratio", "knowmem", "verbmem", "accuracy", "refusals", "broken",
    "model_utility", "forget_quality",
)  # fmt: skip
POINTS = ("knowmem", "verbmem")
# What tells forgetting and retention of a benchmark, where there are no questions of one's own.
ANSWERED = ("rouge_recall", "accuracy", "knowmem")
SHORT = {
    "recall": "recall",
    "probability": "probability of\nthe base's words",
    "refused": "refused",
    "f1": "F1 with base",
    "broken": "broken",
    "rouge_recall": "ROUGE-L recall",
    "answer_probability": "probability",
    "truth_ratio": "truth ratio",
    "knowmem": "KnowMem / 100",
    "verbmem": "VerbMem / 100",
    "refusals": "refused",
}
FILLS = ("black", "white", "0.6")


def picture(results: dict[str, Any], *paths: str | Path) -> None:
    """Draw the picture once, and write it to each path as PNG or SVG, by its suffix, whole or not at all.

    Raises:
        TrainingError: no room, or no permission.
    """
    plt = pyplot()
    rows: Cells = {(row["model"], row["group"], row["metric"]): row for row in results["rows"]}
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    gone, stays = _axes(list(dict.fromkeys(key[1:] for key in rows)))
    shown = [key for key in (*BARS, *_benchmark_bars(rows)) if any((model, *key) in rows for model in models)]
    height = max(7.0, 1.5 + 0.13 * len(shown) * (1 + len(models)))
    width = 13 if stays else 7
    figure, axes = plt.subplots(1, 2 if stays else 1, figsize=(width, height), squeeze=False)
    if gone and stays:
        _scatter(axes[0, 0], rows, models, gone, stays)
    _bars(axes[0, -1], rows, models, shown)
    figure.tight_layout()
    save(figure, *paths)


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files alone."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, and none is looked for
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, *paths: str | Path) -> None:
    """Write a figure to each path as PNG or SVG, by its suffix, whole or not at all, and close it.

    Raises:
        TrainingError: no room, or no permission.
    """
    from matplotlib import pyplot as plt

    try:
        for path in map(Path, paths):
            partial = path.with_name(f".{path.name}.partial")
            kind = path.suffix.removeprefix(".")
            # No software version, date or random name inside: the same figures give the same bytes.
            nothing = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
            with plt.rc_context({"svg.hashsalt": "duet_mlx"}):
                figure.savefig(partial, format=kind, dpi=120, metadata=nothing)
            os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        plt.close(figure)


def _axes(keys: Sequence[Key]) -> tuple[Key | None, list[Key]]:
    """What forgetting is read from, and what retention: one's own questions, or else a benchmark's."""
    own = [(group, "f1") for group in (GENERAL, NEIGHBOURS) if (group, "f1") in keys]
    if (FORGET, "recall") in keys:
        return (FORGET, "recall"), own
    for metric in ANSWERED:
        forget = [key for key in keys if key[1] == metric and key[0].startswith(FORGET)]
        others = [key for key in keys if key[1] == metric and not key[0].startswith(FORGET)]
        if forget and others:
            return forget[0], others[: len(FILLS)]
    return None, []


def _benchmark_bars(rows: Iterable[tuple[str, str, str]]) -> list[Key]:
    groups = dict.fromkeys(group for _, group, _ in rows if ", " in group or group.endswith("as a whole"))
    return [(group, metric) for group in groups if "reverse" not in group for metric in BENCHMARK_BARS]


def share(row: Row) -> tuple[float, float, float]:
    """A row's value as a share, and the lengths of its error bar below and above."""
    low, high = row.get("ci") or (row["value"], row["value"])
    unit = 100 if row["metric"] in POINTS else 1
    value = row["value"]
    return value / unit, max(0.0, value - low) / unit, max(0.0, high - value) / unit


def legend_name(model: str) -> str:
    """The name as it is: matplotlib would read $…$ as a formula, and leaves names out that begin with _."""
    return (" " if model.startswith("_") else "") + model.replace("$", r"\$")


def _scatter(axis: Any, rows: Cells, models: Sequence[str], gone_key: Key, stays_keys: Sequence[Key]) -> None:
    for key, fill in zip(stays_keys, FILLS, strict=False):
        points = {}
        for model, marker in zip(models, MARKERS * 9, strict=False):
            gone, stays = rows.get((model, *gone_key)), rows.get((model, *key))
            if not gone or not stays or gone["value"] is None or stays["value"] is None:
                continue
            (recall, below, above), (y, *y_error) = share(gone), share(stays)
            points[model] = 1 - recall, y
            axis.errorbar(
                1 - recall,
                y,
                xerr=[[above], [below]],  # forgetting is one less recall: the interval turns around
                yerr=[[length] for length in y_error],
                fmt=marker,
                markersize=10,
                color="black",
                markerfacecolor=fill,
                ecolor="0.6",
                capsize=3,
                label=f"{legend_name(model)}, {key[0]}",
            )
        if {"base", "unlearned"} <= points.keys():
            axis.annotate(
                "",
                xy=points["unlearned"],
                xytext=points["base"],
                arrowprops={"arrowstyle": "->", "color": "0.3", "shrinkA": 9, "shrinkB": 9, "linestyle": "-"},
            )
    floor = rows.get(("base", FORGET, "recall_floor"))
    if floor and floor["value"] is not None:
        axis.axvline(1 - floor["value"], color="0.5", linestyle=":", label="chance floor (base's answers shuffled)")
    own = gone_key == (FORGET, "recall")
    forgetting = (
        "recall of the base's answers to forget questions" if own else f"{short_name(gone_key[1])}, {gone_key[0]}"
    )
    retention = (
        "F1 with the base's answers to other questions" if own else f"{short_name(gone_key[1])}, other questions"
    )
    axis.set(
        xlim=(-0.05, 1.05),
        ylim=(-0.05, 1.08),
        xlabel=f"forgetting: 1 - {forgetting}  (right is better)",
        ylabel=f"retention: {retention}  (up is better)",
        title="What was forgotten, what was kept",
    )
    axis.grid(color="0.9")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best", fontsize=8, framealpha=0.9)


def short_name(metric: str) -> str:
    """What a measure is called where there is little room."""
    return SHORT.get(metric, BY_KEY[metric].label)


def _bars(axis: Any, rows: Cells, models: Sequence[str], shown: Sequence[Key]) -> None:
    height = 0.8 / len(models)
    for number, model in enumerate(models):
        found = [(place, rows.get((model, *key))) for place, key in enumerate(shown)]
        bars = [(place, *share(row)) for place, row in found if row and row["value"] is not None]
        if not bars:
            continue
        places, values, below, above = zip(*bars, strict=True)
        middles = [place + (number - (len(models) - 1) / 2) * height for place in places]
        axis.barh(
            middles,
            values,
            height * 0.92,
            xerr=[below, above],
            color=GREYS[number % len(GREYS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="black",
            linewidth=0.6,
            error_kw={"ecolor": "0.2", "elinewidth": 0.8, "capsize": 1.5},
            label=legend_name(model),
        )
        for y, value, end in zip(middles, values, above, strict=True):
            # The figure too: a bar of length 0 and one that is missing look alike.
            axis.annotate(
                f"{value:.2f}",
                (value + end, y),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.5,
            )
    arrows = [ARROWS[BY_KEY[metric].direction(group)] for group, metric in shown]
    labels = [
        f"{legend_name(group)}: {short_name(metric)} {a}" for (group, metric), a in zip(shown, arrows, strict=True)
    ]
    axis.set_yticks(range(len(shown)), labels, fontsize=9)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.08), title="Measures  (↓ lower is better, ↑ higher is better)")
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    if axis.containers:
        below_it = {"loc": "upper center", "bbox_to_anchor": (0.4, -0.05), "ncols": len(models)}
        axis.legend(fontsize=8, frameon=False, **below_it)
