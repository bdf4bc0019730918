"""What a person sees of a run while it trains: log rows, validation, and what Ctrl-C says."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from .context import render

if TYPE_CHECKING:
    import mlx.nn as nn

    from .stream import Stream
    from .train import Prepared


@contextmanager
def interrupts_noted() -> Iterator[list[int]]:
    """While inside, Ctrl-C is noted in the list, to be acted on between two updates; a second one stops at once."""
    seen: list[int] = []

    def note(number, frame):
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print(): it may just be printing, and cannot be entered twice.
        os.write(2, b"\nstopping after this update, to save it; Ctrl-C again stops at once\n")

    handler = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, handler)


def report(
    it: int, losses: list[float], norm: float, rate: float, batch, tokens: int, seconds: float, bar
) -> dict[str, Any]:
    """One log row, shown behind the progress bar as well."""
    import mlx.core as mx

    candidates = max(1, batch.candidate_mask.sum().item() / batch.position_mask.sum().item())
    row = {
        "step": it,
        "loss": sum(losses) / len(losses),
        "loss_per_candidate": sum(losses) / len(losses) / candidates,
        "gradient_norm": math.sqrt(norm),
        "learning_rate": rate,
        "tokens_per_second": tokens / max(1e-9, seconds),
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
    }
    bar.set_postfix_str(
        f"loss {row['loss']:.3f}, {row['tokens_per_second']:.0f} tok/s, {row['peak_memory_gb']:.2f} GB",
        refresh=False,
    )
    return row


def validate(model: nn.Module, prepared: Prepared, stream: Stream | None, loss, bar) -> None:
    """Print the loss on the validation questions, and what the student answers to a few of them."""
    import mlx.core as mx

    from .generate import greedy, stop_ids

    model.eval()
    tokenizer = prepared.tokenizer
    for role in ("forget", "retain"):
        if stream is None:
            break
        rows = np.array([i for i, q in enumerate(prepared.valid_queries) if q.role == role], dtype=int)
        rows = rows[np.argsort(stream.lengths[rows], kind="stable")]
        total = sum(loss(model, stream.batch(rows[start : start + 16]))[0].item() for start in range(0, len(rows), 16))
        if len(rows):
            bar.write(f"validation loss, {role}: {total / len(rows):.3f}")
    source = prepared.valid_queries or prepared.queries
    shown = [[q for q in source if (q.role == "forget") == forget][:2] for forget in (True, False)]
    chosen = [q for part in shown for q in part]
    answers = greedy(
        model, [render(tokenizer, q.question) for q in chosen], 32, stop_ids(tokenizer), head=prepared.head
    )
    for query, answer in zip(chosen, answers, strict=True):
        bar.write(f"  [{query.role}] {query.question} -> {tokenizer.decode(answer).strip()!r}")
    mx.clear_cache()
    model.train()
