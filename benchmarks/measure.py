"""Time and memory of several ways to do one thing, taken in turns, so that a slow minute of the machine hits all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from duet_mlx import share_cores
from duet_mlx.model import on_gpu


class Cost(NamedTuple):
    """What one run of one way costs."""

    seconds: float  # median
    spread: float  # the slowest over the fastest
    peak: int  # most bytes held beyond those that were there before


class Row(NamedTuple):
    """A line of the table: ours beside theirs, in words, and the ratio that the issue sets a reach for."""

    name: str
    ours: str
    theirs: str
    ratio: float | None
    reach: str = ""
    note: str = ""


def once(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds and peak bytes of one run; what it returns must be evaluated, or be an array that will be."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(run())
    mx.synchronize()
    return time.perf_counter() - start, mx.get_peak_memory() - before


def in_turns(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, Cost]:
    """Each way `repeats` times, one after the other; on a GPU once before, for its kernels and traces."""
    for run in ways.values() if on_gpu() else ():
        mx.eval(run())
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            taken[name].append(once(run))
    return {name: cost(runs) for name, runs in taken.items()}


def on_one_stream(run: Callable[[], object]) -> Callable[[], object]:
    """`run` with all cores for its matrix products: each of our two streams has half of them (generate.streams)."""

    def alone() -> object:
        share_cores(1)
        try:
            result = run()
            mx.eval(result)
            mx.synchronize()
            return result
        finally:
            share_cores(2)

    return alone


def cost(runs: list[tuple[float, int]]) -> Cost:
    """Median time and highest peak of some runs."""
    seconds = [one for one, _ in runs]
    return Cost(statistics.median(seconds), max(seconds) / min(seconds), max(peak for _, peak in runs))


def seconds(value: float) -> str:
    """Seconds for people."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| measure | ours | without us | ratio | reach | |", "|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"| {row.name} | {row.ours} | {row.theirs} | {ratio} | {row.reach} | {row.note} |")
    return "\n".join(lines)
