"""What a user would do without us: a loss over full logits with the teacher online, and mlx-lm's own loops."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import generate
from mlx_lm.tuner import trainer

from duet_mlx.generate import pad
from duet_mlx.model import on_gpu


class PlainBatch(NamedTuple):
    """Whole sequences of student and teacher, zeros on the right, and where the n supervised positions lie."""

    student: mx.array  # [B, T]
    teacher: mx.array  # [B, P+T]
    student_positions: mx.array  # [B, n]
    teacher_positions: mx.array  # [B, n]
    position_mask: mx.array  # [B, n]


def plain_batch(
    prompts: Sequence[list[int]], taught: Sequence[list[int]], continuations: Sequence[list[int]], multiple: int
) -> PlainBatch:
    """A batch of these questions, bare and behind the context, each followed by the teacher's own words."""
    n = max(map(len, continuations)) + 1

    def side(sequences: Sequence[list[int]]) -> tuple[mx.array, mx.array]:
        whole = [[*tokens, *words] for tokens, words in zip(sequences, continuations, strict=True)]
        width = -(-max(map(len, whole)) // multiple) * multiple
        last = np.array([len(tokens) - 1 for tokens in whole])
        first = np.array([len(tokens) - 1 for tokens in sequences])
        return pad(whole, width), mx.array(np.minimum(first[:, None] + np.arange(n), last[:, None]).astype(np.int32))

    (student, at), (teacher, there) = side(prompts), side(taught)
    mask = [[place <= len(words) for place in range(n)] for words in continuations]
    return PlainBatch(student, teacher, at, there, mx.array(mask))


def plain_loss(teacher: nn.Module, k: int, delta: float) -> Callable[[nn.Module, PlainBatch], tuple[mx.array, int]]:
    """The paper's objective as it would be written down at first: both models run, all logits of both computed."""

    def loss(model: nn.Module, batch: PlainBatch) -> tuple[mx.array, int]:
        taught = mx.take_along_axis(teacher(batch.teacher), batch.teacher_positions[..., None], axis=1)  # [B, n, V]
        said = mx.take_along_axis(model(batch.student), batch.student_positions[..., None], axis=1)
        ids = mx.stop_gradient(mx.argpartition(-taught, kth=k - 1, axis=-1)[..., :k])  # [B, n, K]
        wanted = mx.stop_gradient(mx.take_along_axis(taught, ids, axis=-1)).astype(mx.float32)
        got = mx.take_along_axis(said, ids, axis=-1).astype(mx.float32)
        huber = nn.losses.huber_loss(got, wanted, delta=delta, reduction="none").sum(axis=-1)  # [B, n]
        mask = batch.position_mask
        return ((huber * mask).sum(axis=-1) / mask.sum(axis=-1)).sum(), len(mask)

    return loss


class _Times:
    """mlx-lm's callback: seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.seconds.append(1 / info["iterations_per_second"])

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        pass


def mlx_lm_steps(model: nn.Module, optimizer: Any, sequences: Sequence[list[int]], width: int, steps: int) -> list:
    """(seconds, peak bytes) of each step of mlx-lm's own `train`, the first left out, on one batch of this width."""
    tokens = pad([*sequences], width + 1)  # it leaves the last token out of what the model reads
    lengths = mx.array([[0, len(sequence)] for sequence in sequences])

    def batches(*args: Any, **more: Any):
        while True:
            yield tokens, lengths

    times, compiled = _Times(), on_gpu()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    if not compiled:  # neither is ours on a CPU: it would call a C++ compiler, and gain nothing on matrix products
        mx.disable_compile()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            args = trainer.TrainingArgs(
                batch_size=len(tokens), iters=steps + 1, steps_per_report=1, steps_per_eval=steps + 2,
                steps_per_save=steps + 2, adapter_file=str(Path(folder) / "adapters.safetensors"),
            )  # fmt: skip
            trainer.train(model, optimizer, [], None, args, iterate_batches=batches, training_callback=times)
    finally:
        mx.enable_compile()
    peak = mx.get_peak_memory() - before
    return [(one, peak) for one in times.seconds[1:]]


def generate_in_a_loop(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], tokens: int) -> None:
    """Greedy answers by `mlx_lm.generate`, one question after the other."""
    for prompt in prompts:
        generate(model, tokenizer, prompt, max_tokens=tokens)
