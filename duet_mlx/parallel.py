"""One run on several processes or machines, started by `mlx.launch`: questions are shared out, gradients averaged.

    mlx.launch -n 2 -- python -m duet_mlx.train -c config.yaml

All processes read the same questions and draw the same batches; each takes every size-th row of them, from its rank
on. Rank 0 alone prints and writes: what the others would write goes into a folder that is deleted at the end.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .data import Query
from .errors import ConfigError
from .methods import METHODS
from .teacher import Targets
from .train_settings import TrainSettings


def size() -> int:
    """How many processes this run has."""
    return mx.distributed.init().size()


def mine(rows: Any) -> Any:
    """The part of a list or array that this process takes."""
    return rows[mx.distributed.init().rank() :: size()]


def summed(array: np.ndarray) -> np.ndarray:
    """The sum over all processes, each of which has an array of this shape."""
    return np.array(mx.distributed.all_sum(mx.array(array))).astype(array.dtype)


def anywhere(flag: bool) -> bool:
    """Whether it is so in any process: all must go the same way, or some would wait for ever."""
    return bool(flag) if size() == 1 else bool(summed(np.array([flag], dtype=np.int32))[0])


@contextmanager
def as_rank(settings: TrainSettings) -> Iterator[TrainSettings]:
    """While inside, a process other than rank 0 prints nothing, and its settings write into a folder of its own.

    Raises:
        ConfigError: a batch that cannot be shared out evenly.
    """
    group = mx.distributed.init()
    counts = {"--batch-size": settings.batch_size}
    if METHODS[settings.method].labels != "teacher":  # means over forget and retain queries apart: both must be even
        counts["--forget-per-batch"] = settings.forget_per_batch
    for flag, count in counts.items():
        if count % group.size():
            raise ConfigError(f"{flag} {count}: cannot be shared out evenly among {group.size()} processes")
    if group.rank() == 0:
        yield settings
        return
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield replace(settings, adapter_path=str(Path(folder) / "adapters"))


def built(build: Callable[[Sequence[Query]], Targets], queries: Sequence[Query], settings: TrainSettings) -> Targets:
    """Targets of all queries, in every process: of the teacher each reads its part, all else is rank 0's work."""
    if size() == 1:
        return build(queries)
    if METHODS[settings.method].frozen != "candidates" or len(queries) < size():
        return from_first(build(queries) if mx.distributed.init().rank() == 0 else None)
    part = build(mine(queries))

    def whole(array: np.ndarray | None) -> np.ndarray | None:
        if array is None:
            return None
        padded = np.zeros((len(queries), *array.shape[1:]), dtype=array.dtype)
        mine(padded)[:] = array
        return summed(padded) if padded.size else padded

    return Targets(*map(whole, part))  # type: ignore[arg-type]


def from_first(targets: Targets | None) -> Targets:
    """Rank 0's targets in every process; the others give none."""
    if size() == 1 and targets is not None:
        return targets
    kinds = (np.int32, np.float32, np.bool_, np.bool_, np.int32, np.float32)  # of the fields of Targets
    fields = targets or (None,) * len(kinds)
    shapes = np.zeros((len(kinds), 4), dtype=np.int32)  # dimensions first, 0 for a field that is not there
    for row, array in zip(shapes, fields, strict=True):
        if array is not None:
            row[: 1 + array.ndim] = array.ndim, *array.shape
    received: list[np.ndarray | None] = []
    for (dimensions, *shape), kind, array in zip(summed(shapes).tolist(), kinds, fields, strict=True):
        given = np.zeros(shape[:dimensions], dtype=kind) if array is None else array
        received.append(None if not dimensions else summed(given) if given.size else given)
    return Targets(*received)  # type: ignore[arg-type]
