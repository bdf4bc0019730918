"""Batches of training queries: the same for the same seed, little padding, few shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .teacher import Targets

if TYPE_CHECKING:
    from .kept_states import KeptStates
    from .train_settings import TrainSettings

# On a GPU batch widths are multiples of this: mx.compile keeps a trace for each shape. On a CPU steps are not compiled.
WIDTHS = 4
# Steps whose queries are sorted together. On the demo's questions 10.3 % of the tokens are padding on a GPU, and 3.0 %
# on a CPU, which runs a batch's short and long rows apart (`python -m benchmarks --only padding`). Windows of 64 gave
# less still, but batches of questions more alike: the one run made so kept less (general F1 0.76 after 700 steps of
# 4 + 16, 0.80 after 500 with windows of 16).
WINDOW = 16


class Stream:
    """Batches of the training queries, the same for the same seed, with nothing computed twice."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], targets: Targets, prefix: int, forget: Sequence[int] | np.ndarray = ()
    ):
        """N prompts; if there are targets for more rows, these are the refusals of the `forget` queries, in order."""
        from .model import on_gpu

        self.targets, self.forget = targets, np.array(forget, dtype=int)
        second = [prompts[i] for i in forget] if len(targets.ids) > len(prompts) else []
        self.refusals = {row: len(prompts) + place for place, row in enumerate(forget)} if second else {}
        self.suffixes = [list(prompt[prefix:]) for prompt in [*prompts, *second]]
        supervised = targets.position_mask.sum(axis=1)
        # The student reads its question and, up to the last supervised position, the teacher's words.
        self.sequences = [
            [*suffix, *row[: count - 1].tolist()]
            for suffix, row, count in zip(self.suffixes, targets.continuation, supervised, strict=True)
        ]
        self.lengths = np.array([len(s) for s in self.sequences])
        self.hidden: KeptStates | None = None  # lower.hidden_states of the sequences
        self.multiple = WIDTHS if on_gpu() else 1
        self.widths: list[int] = []  # of the batches of the first epoch

    def width(self, rows: np.ndarray) -> int:
        """The width that these query indices are padded to: after the first epoch none that was not there in it."""
        rows, _ = self._with_refusals(rows)
        width = -(-int(self.lengths[rows].max()) // self.multiple) * self.multiple
        return width if self.multiple == 1 else min((w for w in self.widths if w >= width), default=width)

    def _with_refusals(self, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """Rows of the targets for these query indices, forget queries first, and how many of these there are."""
        count = int(np.isin(rows, self.forget).sum())
        if self.refusals:
            again = np.array([self.refusals[row] for row in rows[:count]], dtype=int)
            rows = np.concatenate([rows[:count], again, rows[count:]])
        return rows, count

    def batch(self, rows: np.ndarray):
        """The batch of these query indices, forget queries first."""
        import mlx.core as mx

        from .generate import pad
        from .losses import Batch

        width = self.width(rows)
        rows, count = self._with_refusals(rows)
        start = np.array([len(self.suffixes[row]) - 1 for row in rows])
        n = self.targets.position_mask.shape[1]
        positions = np.minimum(start[:, None] + np.arange(n), self.lengths[rows][:, None] - 1)
        t = self.targets
        kind = mx.float64 if t.logits.dtype == np.float64 else mx.float32
        return Batch(
            pad([self.sequences[row] for row in rows], width),
            mx.array(positions.astype(np.int32)),
            mx.array(t.ids[rows]),
            # Left alone, MLX would make float32 of a float64 model's targets.
            mx.array(t.logits[rows], dtype=kind),
            mx.array(t.candidate_mask[rows]),
            mx.array(t.position_mask[rows]),
            self.hidden.batch(rows, width) if self.hidden else None,
            None if t.states is None else mx.array(t.states[rows], dtype=kind),
            count,
        )

    def schedule(self, forget: np.ndarray, kept: np.ndarray, settings: TrainSettings) -> list[np.ndarray]:
        """Query indices of every step: both roles in epochs of their own, batches of like length.

        Draws of WINDOW steps are sorted by length before they are cut, and the batches shuffled again: padding stays
        low, every batch has its share of both roles, and every query still comes once an epoch. A window is no longer
        than an epoch, or the copies of one query would lie side by side in it and share a batch.
        """
        random = np.random.default_rng(settings.seed)
        f, r = settings.forget_per_batch, settings.batch_size - settings.forget_per_batch
        r = r if len(kept) else 0  # some baselines read no retain questions
        draws = [_epochs(random, role) for role in (forget, kept)]
        epochs = [len(role) / each for role, each in ((forget, f), (kept, r)) if each]  # in steps
        window = max(1, min(WINDOW, int(min(epochs))))
        steps: list[np.ndarray] = []
        while len(steps) < settings.iters:
            parts = []
            for draw, each in zip(draws, (f, r), strict=True):
                if each:
                    rows = np.array([next(draw) for _ in range(window * each)])
                    parts.append(rows[np.argsort(self.lengths[rows], kind="stable")].reshape(window, each))
            steps += list(random.permutation(np.concatenate(parts, axis=1)))
        steps = steps[: settings.iters]
        first = steps[: math.ceil(max(epochs) / window) * window]  # whole windows: the longest query is among them
        self.widths = []
        self.widths = sorted({self.width(rows) for rows in first})
        return steps


def _epochs(random: np.random.Generator, rows: np.ndarray) -> Iterator[int]:
    while True:
        yield from random.permutation(rows)
