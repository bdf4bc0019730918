"""The optimizer, one step, and the loop over steps: report, validate and save between two updates."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from .checkpoint import Checkpoint
from .errors import ConfigError, DivergedError
from .files import append_text
from .stream import Stream
from .train_settings import TrainSettings
from .watch import report, validate

if TYPE_CHECKING:
    import mlx.nn as nn

    from .train import Prepared


def make_optimizer(settings: TrainSettings):
    """Adam as reference/README.md has it (bias correction on, ε outside the root, no decay), with its schedule."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.utils import build_schedule

    updates = math.ceil(settings.iters / settings.grad_accumulation_steps)
    warmup = min(10, updates // 10)
    schedule = settings.lr_schedule or {
        "name": "cosine_decay",
        "warmup": warmup,
        "arguments": [settings.learning_rate, max(1, updates - warmup)],
    }
    try:
        rate = build_schedule(schedule)
        rates = [float(rate(mx.array(step))) for step in (0, updates)]
    except Exception as error:  # whatever MLX's functions say of arguments that are not theirs
        raise ConfigError(f"lr_schedule {schedule}: mlx-lm cannot build it ({error!r})") from error
    if settings.lr_schedule and not all(math.isfinite(one) and one >= 0 for one in rates):
        raise ConfigError(f"lr_schedule {schedule}: from {rates[0]} to {rates[1]}, expected numbers of 0 or more")
    return optim.Adam(learning_rate=rate, betas=[0.9, 0.999], eps=1e-8, bias_correction=True)


def make_step(model: nn.Module, optimizer, loss, settings: TrainSettings, compiled: bool = True):
    """step(batch, gradient so far, of) -> (mean loss, squared gradient norm, gradient carried on).

    `of`: 0 to carry the gradient on, otherwise the number of steps whose mean gradient makes the update now.
    """
    from functools import partial

    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.nn.utils import average_gradients
    from mlx.utils import tree_map, tree_reduce

    from . import parallel

    processes = parallel.size()

    def mean_loss(model, batch):
        total, count = loss(model, batch)
        return total / count

    def step(batch, carried, of: int):
        value, gradient = nn.value_and_grad(model, mean_loss)(model, batch)
        if carried is not None:
            gradient = tree_map(mx.add, gradient, carried)
        if of:
            gradient = average_gradients(gradient)  # over the processes, where there are several
            if of > 1:
                gradient = tree_map(lambda g: g / of, gradient)
            if settings.max_grad_norm:
                gradient, _ = optim.clip_grad_norm(gradient, settings.max_grad_norm)
            optimizer.update(model, gradient)
        norm = tree_reduce(lambda total, g: total + (g * g).sum(), gradient, mx.array(0.0))
        if processes > 1:  # one number for all, so that all go the same way
            value, norm = mx.distributed.all_sum(mx.stack([value, norm])) / processes
        return value, norm, None if of else gradient

    if not compiled:
        return step
    state = [model.state, optimizer.state, mx.random.state]
    return partial(mx.compile, inputs=state, outputs=state)(step)


@contextmanager
def checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """While inside, layers are run again in the backward pass. mlx-lm patches their class: for one run, not for all."""
    from mlx_lm.tuner.trainer import grad_checkpoint

    block = type(model.layers[0])
    call = block.__call__
    if wanted:
        grad_checkpoint(model.layers[0])
    try:
        yield
    finally:
        block.__call__ = call


def run_steps(
    settings: TrainSettings, prepared: Prepared, checkpoint: Checkpoint, step, loss,
    stream: Stream, batches: list[np.ndarray], valid_stream: Stream | None, interrupted: list[int],
) -> None:  # fmt: skip
    """Take the steps that are left, report, validate and save on the way, always between two updates.

    Raises:
        DivergedError: a number is not finite; the last state whose loss was finite has been saved.
        KeyboardInterrupt: `interrupted` holds something, or a second Ctrl-C came.
    """
    import mlx.core as mx
    from tqdm import tqdm

    from . import parallel

    model, optimizer = checkpoint.model, checkpoint.optimizer
    carried, waiting, due, losses, tokens = None, 0, False, [], 0
    since = time.perf_counter()  # not tqdm's clock, which stands where the bar is turned off
    done, last = checkpoint.now.step, settings.iters
    with tqdm(total=last, initial=done, desc="train", unit="step", file=sys.stdout) as bar:
        for it in range(done + 1, last + 1):
            batch = stream.batch(parallel.mine(batches[it - 1]))
            waiting += 1
            update = waiting == settings.grad_accumulation_steps or it == last  # the last takes those that are left
            value, norm, carried = step(batch, carried, waiting if update else 0)
            mx.eval(model.trainable_parameters(), optimizer.state, value, norm, carried)
            if not math.isfinite(value.item()) or not math.isfinite(norm.item()):
                # A loss is that of the weights before the step: if it is not finite, the update before spoilt them.
                checkpoint.go_back(checkpoint.now if math.isfinite(value.item()) else checkpoint.before)
                raise _not_finite(it, f"loss {value.item()}, squared gradient norm {norm.item()}", checkpoint)
            losses.append(value.item())
            tokens += int(stream.lengths[batches[it - 1]].sum())
            bar.update()
            if it % settings.steps_per_report == 0 or it == last:
                seconds = time.perf_counter() - since
                row = report(it, losses, norm.item(), optimizer.learning_rate.item(), batch, tokens, seconds, bar)
                append_text(checkpoint.path / "train_log.jsonl", json.dumps(row) + "\n")
                losses, tokens, since = [], 0, time.perf_counter()
            due = due or bool(settings.save_every) and it % settings.save_every == 0
            if update:
                waiting = 0
                checkpoint.updated(it)
                stopped = parallel.anywhere(bool(interrupted))
                if due or stopped or it == last:
                    finite = checkpoint.now.is_finite() and math.isfinite(_loss_without_dropout(model, loss, batch))
                    if parallel.anywhere(not finite):
                        checkpoint.go_back(checkpoint.before)
                        raise _not_finite(it, "loss or weights after its update", checkpoint)
                    checkpoint.save(copy=due)
                    due = False
                if stopped and it < last:
                    raise KeyboardInterrupt
            if settings.steps_per_eval and (it % settings.steps_per_eval == 0 or it == last):
                before = time.perf_counter()
                validate(model, prepared, valid_stream, loss, bar)
                since += time.perf_counter() - before  # no steps were taken meanwhile


def _not_finite(it: int, what: str, checkpoint: Checkpoint) -> DivergedError:
    kept = "earlier adapter" if checkpoint.saved is None else f"adapter of step {checkpoint.saved}"
    return DivergedError(
        f"step {it}: {what}: not finite. The {kept} is kept in {checkpoint.path}; lower --learning-rate or set "
        "--max-grad-norm"
    )


def _loss_without_dropout(model: nn.Module, loss, batch) -> float:
    model.eval()  # dropout would draw numbers that the steps to come should draw
    value = loss(model, batch)[0].item()
    model.train()
    return value
