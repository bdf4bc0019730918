"""A training step as `mx.compile` fuses it, which the CPU's loop never does, against the step as it is written."""

from __future__ import annotations

import shutil
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from duet_mlx import methods
from duet_mlx.lower import run_lower
from duet_mlx.model import on_gpu
from duet_mlx.stream import WIDTHS, Stream
from duet_mlx.train import TrainSettings, make_optimizer, make_step
from tests.equivalence.test_invariants import random_targets, rounding, student, upper_student
from tests.equivalence.tiny import duet_loss


@pytest.mark.skipif(not on_gpu() and not shutil.which("g++"), reason="on CPU, mx.compile calls g++")
@pytest.mark.parametrize("prefix", [[], [3]])
@pytest.mark.parametrize("below", [0, 2], ids=["all layers", "the layers below run once"])
def test_a_compiled_step_has_the_loss_and_gradient_of_the_step_as_written(below: int, prefix: list[int]) -> None:
    """Three steps of one trace. At this learning rate no adapter moves in float32, so rounding cannot add up."""
    rng = np.random.default_rng(0)
    settings = TrainSettings(iters=3, learning_rate=1e-14)
    queries, n, width = 6, 2, 3
    asked = [[*prefix, *row] for row in rng.integers(1, 9, size=(queries, 4)).tolist()]
    stream = Stream(asked, random_targets(rng, queries, n, width, mx.float32), len(prefix))
    results = []
    for compiled in (False, True):
        model = upper_student(mx.float32, True) if below else student(mx.float32)
        lower = run_lower(model, below, prefix, [stream])
        optimizer = make_optimizer(settings)
        optimizer.init(model.trainable_parameters())

        def loss(model: nn.Module, batch: Any, lower: Any = lower) -> tuple[mx.array, int]:
            return duet_loss(model, batch, prefix, None, 1.0, True, lower)

        step = make_step(model, optimizer, loss, settings, compiled)
        values = []
        for start in range(0, queries, 2):
            value, norm, carried = step(stream.batch(np.arange(start, start + 2)), None, 1)
            mx.eval(model.parameters(), optimizer.state, value, norm)
            assert carried is None
            means = {k: np.array(a) for k, a in tree_flatten(optimizer.state) if k.endswith(".m")}
            values.append((value.item(), norm.item() ** 0.5, means))
        results.append(values)
    size = n * width  # Huber terms of a query, as in test_invariants.py
    for (loss, norm, means), (fused_loss, fused_norm, fused_means) in zip(*results, strict=True):
        assert fused_loss == pytest.approx(loss, abs=size * rounding(mx.float32, 20))
        assert fused_norm == pytest.approx(norm, rel=size * rounding(mx.float32, 20))
        assert means.keys() == fused_means.keys() and means
        largest = max(np.abs(mean).max() for mean in means.values())
        for name, mean in means.items():
            atol = size * rounding(mx.float32, 20 * largest)
            np.testing.assert_allclose(fused_means[name], mean, rtol=0, atol=atol, err_msg=name)


def test_a_compiled_step_is_traced_once_for_each_shape_of_the_first_epoch_and_never_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tracing runs the Python of the loss and computes nothing, so no compiler is called here."""
    rng = np.random.default_rng(0)
    prompts = [[1] * int(length) for length in 2 + rng.geometric(0.05, size=48)]  # few of them long
    stream = Stream(prompts, random_targets(rng, 48, 2, 3, mx.float32), 0)
    stream.multiple = WIDTHS  # as on a GPU,
    monkeypatch.setattr(methods, "PART", 10**6)  # where batches stay whole
    settings = TrainSettings(iters=36, batch_size=4, forget_per_batch=2)
    steps = stream.schedule(np.arange(22), np.arange(22, 48), settings)  # windows of 11 steps, epochs of 11 and 13
    model, traced = student(mx.float32), []
    optimizer = make_optimizer(settings)
    optimizer.init(model.trainable_parameters())

    def loss(model: nn.Module, batch: Any) -> tuple[mx.array, int]:
        traced.append(batch.tokens.shape)
        return duet_loss(model, batch, [], None, 1.0, True)

    step = make_step(model, optimizer, loss, settings, compiled=True)
    for number, rows in enumerate(steps):
        step(stream.batch(rows), None, 1)
        if number == 21:
            first = list(traced)
    assert traced == first and len(first) == len(set(first)) > 1
