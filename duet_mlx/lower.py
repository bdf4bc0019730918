"""The layers below the first adapted one are run once: what comes out of them never changes while the student learns.

The list of layers and the first of them are stood in for while the model is called, so that all else of an
architecture (masks, norms, head) stays as it is; `check_lower` finds those that this does not fit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from . import parallel
from .data import digest
from .errors import TrainingError
from .generate import batches, branch, can_branch, encode_prefix, pad, side_by_side
from .head import answering, logits_at, rounding
from .kept_states import KeptStates

if TYPE_CHECKING:
    from .stream import Stream


class Lower(NamedTuple):
    """Where the adapted layers begin, and what comes into them from the tokens that all questions begin with."""

    layer: int
    prefix: mx.array | None  # [1, P, D]


LowerStates = dict[str, tuple[Lower, KeptStates]]  # of several runs, by a hash of what they hang on
# Sets of questions whose states a process keeps for runs to come: these may take turns with two kinds of targets (KL's
# grid over `positions`), each with questions to learn and to watch.
LENT = 4


def run_lower(
    model: nn.Module,
    layer: int,
    prefix: list[int],
    streams: Sequence[Stream],
    folder: Path | None = None,
    earlier: LowerStates | None = None,
    base: str = "",
) -> Lower | None:
    """Run what lies below the first adapted layer once for all batches of these streams; None: it is run in each.

    Args:
        folder: whose disk takes what comes out; by default that of temporary files.
        earlier: what came out in earlier runs of this process; taken where it is the same, and this run's is put there.
        base: what tells the base from that of other runs, for `earlier`.

    Raises:
        TrainingError: the disk has no room.
    """
    trained = len(tree_flatten(model.trainable_parameters()))
    inside = sum(len(tree_flatten(block.trainable_parameters())) for block in model.layers[layer:])
    if layer == 0 or trained > inside:  # LoRA on head or embedding is not inside
        return None
    if reason := check_lower(model, layer, mx.array([[*prefix, *streams[0].sequences[0]]])):
        print(f"note: layers 0 to {layer - 1} are run in every step ({reason})")
        return None
    earlier = {} if earlier is None else earlier
    keys = [digest([base, layer, prefix, stream.sequences]) for stream in streams]
    others = [key for key in earlier if key not in keys]
    for key in others[: max(0, len(others) + len(keys) - LENT)]:  # before there are new ones on the disk
        del earlier[key]
    missing = [stream for key, stream in zip(keys, streams, strict=True) if key not in earlier]
    print(f"layers 0 to {layer - 1} are not trained: they {'are run once, now' if missing else 'were run before'}")
    count = sum(len(stream.sequences) for stream in missing)
    with tqdm(total=count, desc="lower layers", unit="q", file=sys.stdout, leave=False, disable=not missing) as bar:
        for key, stream in zip(keys, streams, strict=True):
            run = partial(hidden_states, model, layer, prefix, stream.sequences, bar.update, folder)
            try:
                found = earlier.pop(key, None) or run()
            except TrainingError:  # no room on the disk beside those of earlier runs
                if not earlier:
                    raise
                earlier.clear()
                found = run()
            earlier[key] = lower, stream.hidden = found  # the last that was used stands last
    return lower


def find_stack(model: nn.Module) -> tuple[nn.Module, str] | None:
    """The module that holds the list of layers, and the list's name (`layers`, `h`, `blocks`, ...)."""
    wanted, waiting = [id(layer) for layer in model.layers], [model]
    for module in waiting:  # from the outside inwards: every step looks here, and seldom past the second module
        for name, value in module.items():
            inside = value if isinstance(value, list) else [value]
            if inside is value and [id(layer) for layer in value] == wanted:
                return module, name
            waiting += [one for one in inside if isinstance(one, nn.Module)]
    return None


@contextmanager
def _standing_in(model: nn.Module, kept: slice, at: int, answer: Callable) -> Iterator[None]:
    """While inside, the model has these layers only, and the one `at` answers by `answer(its own call, x, ...)`."""
    found = find_stack(model)
    assert found is not None, "check_lower comes first"
    stack, name = found
    layers = stack[name]
    original = type(layers[at])

    def call(self, x, *rest, **more):
        return answer(partial(original.__call__, self), x, *rest, **more)

    stack[name] = layers[kept]
    try:
        with answering(layers[at], "__call__", call):
            yield
    finally:
        stack[name] = layers


@contextmanager
def entering(model: nn.Module, layer: int, hidden: mx.array) -> Iterator[None]:
    """While inside, the model begins at `layer`, where `hidden` [B, T, D] comes in; it has that many layers less.

    It comes in at each call, so what belongs to it goes through the model in one.
    """
    with _standing_in(model, slice(layer, None), layer, lambda call, x, *rest, **more: call(hidden, *rest, **more)):
        yield


def hidden_at(model: nn.Module, layer: int, tokens: mx.array, cache: list | None = None) -> mx.array:
    """What comes into `layer` for `tokens` [B, T]: [B, T, D]. Nothing above it is evaluated."""
    seen = []

    def record(call, x, *rest, **more):
        seen.append(x)
        return x

    with _standing_in(model, slice(layer + 1), layer, record):
        model(tokens, cache=cache)
    return seen[0]


def layer_output(
    model: nn.Module, layer: int, tokens: mx.array, positions: mx.array, cache: list | None = None
) -> mx.array:
    """What comes out of `layer`, not the last one, at `positions` [B, n]: [B, n, D], fp32 at least."""
    hidden = hidden_at(model, layer + 1, tokens, cache)  # [B, T, D]
    hidden = mx.take_along_axis(hidden, positions[..., None], axis=1)  # [B, T, D] -> [B, n, D]
    return hidden if hidden.dtype == mx.float64 else hidden.astype(mx.float32)


def check_lower(model: nn.Module, layer: int, tokens: mx.array) -> str:
    """Why the layers below `layer` cannot be run once and for all, tried on `tokens` [1, T]; "" if they can."""
    if find_stack(model) is None:
        return "no list of layers found"
    if not can_branch(model):
        return "its cache cannot be shared"
    tokens = tokens[:, :8]  # as in check_head
    last = mx.array([[tokens.shape[1] - 1]])
    full = logits_at(model, tokens, last)
    try:
        with entering(model, layer, hidden_at(model, layer, tokens)):
            got = logits_at(model, tokens, last)
        worst = mx.abs(got - full).max().item()
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        return f"this architecture does not allow it ({error})"
    return "" if worst <= rounding(model, full) else f"logits differ by {worst:.3g}"


def hidden_states(
    model: nn.Module,
    layer: int,
    prefix: Sequence[int],
    sequences: Sequence[Sequence[int]],
    progress: Callable[[int], object] | None = None,
    folder: Path | None = None,
) -> tuple[Lower, KeptStates]:
    """What comes into `layer` from the shared prefix [1, P, D], and from each sequence after it [T, D].

    Of several processes each runs every size-th batch and gives what comes out to the others.

    Args:
        folder: as KeptStates.

    Raises:
        TrainingError: the disk has no room.
    """
    cache = encode_prefix(model, prefix) if prefix else []
    lower = Lower(layer, hidden_at(model, layer, mx.array([list(prefix)])) if prefix else None)
    mx.eval(lower.prefix)  # what a compiled step holds must be numbers: it cannot trace what made them
    lengths = [len(s) for s in sequences]
    states = KeptStates(folder, lengths, hidden_at(model, layer, mx.array([[0]])))
    cut = list(batches(lengths, 32, equal=False))

    def run(rows: np.ndarray) -> mx.array:
        return hidden_at(model, layer, pad([sequences[row] for row in rows]), branch(cache, len(rows)) or None)

    for rows, hidden in side_by_side(parallel.mine(cut), run):
        if progress:
            progress(len(rows))
        states.write(rows, hidden)
    if parallel.size() > 1:
        exchange(states, cut, progress)
    return lower, states


def exchange(states: KeptStates, cut: Sequence[np.ndarray], progress: Callable[[int], object] | None = None) -> None:
    """Write the states that other processes have run, of all batches but `parallel.mine(cut)`."""
    own = parallel.mine(range(len(cut)))
    for number, rows in enumerate(cut):
        # One process has run this batch; the others have zeros there.
        whole = mx.distributed.all_sum(states.batch(rows, int(states.lengths[rows].max())))
        mx.eval(whole)
        if number not in own:
            states.write(rows, whole)
            if progress:
                progress(len(rows))
