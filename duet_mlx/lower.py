"""The layers below the first adapted one are run once: what comes out of them never changes while the student learns.

The embedding and the list of layers are stood in for while the model is called, so that all else of an
architecture (masks, norms, head) stays as it is; `check_lower` finds those that this does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .generate import batches, branch, encode_prefix, pad
from .head import EMBEDDING_NAMES, logits_at, rounding


class Lower(NamedTuple):
    """Where the adapted layers begin, and what comes into them from the tokens that all questions begin with."""

    layer: int
    prefix: mx.array | None  # [1, P, D]


def find_stack(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The module that holds the list of layers, and the embedding beside it; None where there is no such pair."""
    for _, module in model.named_modules():
        if module.get("layers") is model.layers:
            for name in EMBEDDING_NAMES:
                if name in module:
                    return module, module[name]
    return None


@contextmanager
def _standing_in(stack: nn.Module, layers: list, part: nn.Module, answer) -> Iterator[None]:
    """While inside, the stack has these layers only, and `part` of it answers by `answer(self, x, ...)`."""
    whole, original = stack.layers, type(part)
    stack.layers = layers
    part.__class__ = type(original.__name__, (original,), {"__call__": answer})
    try:
        yield
    finally:
        part.__class__ = original
        stack.layers = whole


@contextmanager
def entering(model: nn.Module, layer: int, hidden: mx.array) -> Iterator[None]:
    """While inside, the model begins at `layer`, where `hidden` [B, T, D] comes in; it has that many layers less."""
    found = find_stack(model)
    assert found is not None, "check_lower comes first"
    stack, embedding = found
    with _standing_in(stack, stack.layers[layer:], embedding, lambda self, tokens: hidden):
        yield


def hidden_at(model: nn.Module, layer: int, tokens: mx.array, cache: list | None = None) -> mx.array:
    """What comes into `layer` for `tokens` [B, T]: [B, T, D]. Nothing above it is evaluated."""
    found = find_stack(model)
    assert found is not None, "check_lower comes first"
    stack, seen = found[0], []

    def record(self, x, *rest, **more):
        seen.append(x)
        return x

    with _standing_in(stack, stack.layers[: layer + 1], stack.layers[layer], record):
        model(tokens, cache=cache)
    return seen[0]


def check_lower(model: nn.Module, layer: int, tokens: mx.array) -> str:
    """Why the layers below `layer` cannot be run once and for all, tried on `tokens` [1, T]; "" if they can."""
    if find_stack(model) is None:
        return "no list of layers with an embedding beside it"
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
    model: nn.Module, layer: int, prefix: Sequence[int], sequences: Sequence[Sequence[int]]
) -> tuple[Lower, list[mx.array]]:
    """What comes into `layer` from the shared prefix [1, P, D], and from each sequence after it [T, D]."""
    cache = encode_prefix(model, prefix) if prefix else []
    lower = Lower(layer, hidden_at(model, layer, mx.array([list(prefix)])) if prefix else None)
    states: list[mx.array] = [mx.array([])] * len(sequences)
    for rows in batches([len(s) for s in sequences], 64, equal=False):
        hidden = hidden_at(model, layer, pad([sequences[row] for row in rows]), branch(cache, len(rows)) or None)
        for row, state in zip(rows, hidden, strict=True):
            # A copy: a slice would keep the whole batch alive.
            states[row] = mx.contiguous(state[: len(sequences[row])] + 0)
        mx.eval([states[row] for row in rows])
    return lower, states


def padded(states: Sequence[mx.array], width: int) -> mx.array:
    """States [T, D] of some sequences as one [B, width, D], zeros on the right."""
    return mx.stack([mx.pad(state, ((0, width - len(state)), (0, 0))) for state in states])
