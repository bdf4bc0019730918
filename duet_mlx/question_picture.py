"""The picture of the single forget questions: what the teacher still says of each, and what its student says.

The teacher (base + context) is the ceiling of what an adapter can learn. The picture shows where the student falls
short of it, and names the questions where it does most. Readable without colour.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .metrics import FORGET
from .picture import ANSWERED, POINTS, legend_name, pyplot, save, short_name

TEACHER, STUDENT = "base + context", "unlearned"
NAMED = 12  # as many questions are named as have room beside the curve


class Pair(NamedTuple):
    """A forget question, and how much of the wanted-away answer teacher and student give: 0 to 1."""

    question: str
    teacher: float
    student: float

    @property
    def shortfall(self) -> float:
        """How much more the student says than its teacher; negative where it says less."""
        return self.student - self.teacher


def pairs_of(samples: Sequence[dict[str, Any]]) -> tuple[str, list[Pair]]:
    """The measure and the pairs, from the lines of samples.jsonl: held-out questions of one's own, or a benchmark's.

    [] where there is no teacher, no student, or no measure that both have.
    """
    for metric in ("recall", *ANSWERED):
        scores: dict[tuple[str, str], dict[str, float]] = {}
        questions = {}
        for sample in samples:
            if (value := sample.get(metric)) is None:
                continue
            key = (sample["group"], sample["id"])
            if key[0] == FORGET if metric == "recall" else key[0].startswith(f"{FORGET}, "):
                scores.setdefault(key, {})[sample["model"]] = value / (100 if metric in POINTS else 1)
                questions[key] = sample["question"]
        both = {key: of for key, of in scores.items() if TEACHER in of and STUDENT in of}
        if both:
            return metric, [Pair(questions[key], of[TEACHER], of[STUDENT]) for key, of in both.items()]
    return "", []


def question_picture(samples: Sequence[dict[str, Any]], *paths: str | Path) -> bool:
    """As `picture`: drawn once, written to each path; False where there is nothing to show.

    Raises:
        TrainingError: no room, or no permission.
    """
    metric, pairs = pairs_of(samples)
    if not pairs:
        return False
    plt = pyplot()
    pairs.sort(key=lambda pair: (pair.shortfall, pair.student))
    furthest = [pair for pair in pairs if pair.shortfall > 0][-NAMED:]
    figure, axes = plt.subplots(
        1,
        2 if furthest else 1,
        figsize=(15 if furthest else 7, 6),
        squeeze=False,
        width_ratios=[5, 4] if furthest else [1],
    )
    what = "recall of the base's answer" if metric == "recall" else short_name(metric)
    _all(axes[0, 0], pairs, what)
    if furthest:
        _furthest(axes[0, 1], furthest, what)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a question in a script that the font lacks
        figure.tight_layout()
        save(figure, *paths)
    return True


def _all(axis: Any, pairs: Sequence[Pair], what: str) -> None:
    """Every question, those where the student falls furthest short of its teacher on the right."""
    places = range(1, len(pairs) + 1)
    teacher, student = [pair.teacher for pair in pairs], [pair.student for pair in pairs]
    axis.vlines(places, teacher, student, color="0.6", linewidth=0.8)
    _points(axis, places, teacher, places, student, size=max(1.5, min(5.0, 400 / len(pairs))))
    more, equal = (sum(pair.shortfall > 0 for pair in pairs), sum(pair.shortfall == 0 for pair in pairs))
    if more:
        edges = len(pairs) - more + 0.5, len(pairs) + 0.5
        axis.axvspan(*edges, color="0.93", zorder=0, label="the student falls short")
    axis.set(
        xlim=(0.5, len(pairs) + 0.5),
        ylim=(-0.03, 1.03),
        xlabel="forget questions, in the order of how far the student falls short",
        ylabel=f"{what}  (down is better)",
        title=f"The student says more than its teacher on {more} of {len(pairs)} forget questions,\n"
        f"as much on {equal}, less on {len(pairs) - more - equal}",
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=9)  # no point lies under it
    axis.grid(axis="y", color="0.9")
    axis.set_axisbelow(True)


def _furthest(axis: Any, pairs: Sequence[Pair], what: str) -> None:
    """By name, those where the student falls furthest short, the worst at the top."""
    places = range(len(pairs))
    teacher, student = [pair.teacher for pair in pairs], [pair.student for pair in pairs]
    axis.hlines(places, teacher, student, color="0.6")
    _points(axis, teacher, places, student, places, size=6)
    axis.set_yticks(places, [legend_name(_cut(pair.question)) for pair in pairs], fontsize=8)
    axis.set(
        xlim=(-0.03, 1.03), ylim=(-0.7, len(pairs) - 0.3), xlabel=f"{what}  (left is better)",
        title="Where the student falls furthest short",
    )  # fmt: skip
    axis.grid(color="0.9")
    axis.set_axisbelow(True)


def _points(axis: Any, tx: Any, ty: Any, sx: Any, sy: Any, size: float) -> None:
    """Teacher hollow, student full: told apart where one lies on the other, too."""
    axis.plot(tx, ty, "o", color="black", markerfacecolor="white", markersize=size * 1.6, label=f"teacher ({TEACHER})")
    axis.plot(sx, sy, "o", color="black", markersize=size, label=f"student ({STUDENT})")


def _cut(question: str) -> str:
    words = " ".join(question.split())
    return words if len(words) <= 60 else words[:59] + "…"
