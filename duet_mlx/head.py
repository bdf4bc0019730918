"""Logits at the supervised positions only, of the candidate tokens only: the K-row head.

Training needs C logits at n positions, not T x V. The head module (`lm_head`, or the tied embedding's
`as_linear`) is stood in for while the model is called, so that whatever an architecture does after its head
(soft-capping, logit scale) still applies. reference/README.md: hidden state and head rows meet in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

EPSILON = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
HEAD_NAMES = ("lm_head", "output")
EMBEDDING_NAMES = ("embed_tokens", "tok_embeddings", "wte", "word_embeddings", "embed_in")
NO_HEAD = "no head or tied embedding found by name"


def find_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits: an untied head, else the embedding; None if neither."""
    modules = [(name.rsplit(".", 1)[-1], module) for name, module in model.named_modules()]
    for names, kinds in (
        (HEAD_NAMES, (nn.Linear, nn.QuantizedLinear)),
        (EMBEDDING_NAMES, (nn.Embedding, nn.QuantizedEmbedding)),
    ):
        found = [module for name, module in modules if name in names and type(module) in kinds]
        if len(found) == 1:
            return found[0]
    return None


def head_rows(head: nn.Module, ids: mx.array) -> tuple[mx.array, mx.array | None]:
    """Rows `ids` [...] of the head, dequantized alone: weights [..., D] and, if the head has one, bias [...]."""
    weight = head.weight[ids]
    if isinstance(head, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        biases = head.get("biases")
        weight = mx.dequantize(
            weight,
            head.scales[ids],
            None if biases is None else biases[ids],
            group_size=head.group_size,
            bits=head.bits,
            mode=head.mode,
        )
    return weight, head.bias[ids] if "bias" in head else None


@contextmanager
def answering(module: nn.Module, method: str, answer: Callable) -> Iterator[None]:
    """While inside, `answer(module, ...)` is what this method of the module does.

    The class of this one module is swapped, not the module: parameter names and order stay what they were.
    """
    original = type(module)
    module.__class__ = standing_in = type(original.__name__, (original,), {method: answer})
    try:
        yield
    finally:
        module.__class__ = original
        # A class refers to itself: what `answer` holds on to would stay in memory until Python looks for such cycles.
        delattr(standing_in, method)


@contextmanager
def _standing_in(
    head: nn.Module,
    positions: mx.array | None,
    ids: mx.array | None = None,
    beside: mx.array | None = None,
    seen: list[mx.array] | None = None,
) -> Iterator[None]:
    """While inside, the head answers at `positions` [B, n] only and, given `ids` [B, n, C], for those rows only.

    It answers for the hidden states `beside` [B, m, D] as well, after the others, and puts in `seen` what came in.
    """
    original = type(head)
    method = "__call__" if isinstance(head, (nn.Linear, nn.QuantizedLinear)) else "as_linear"

    def gathered(self, hidden):  # [B, T, D] -> [B, n, C or V]
        if positions is not None:
            hidden = mx.take_along_axis(hidden, positions[..., None], axis=1)  # [B, T, D] -> [B, n, D]
        if hidden.dtype != mx.float64:
            hidden = hidden.astype(mx.float32)
        if seen is not None:
            seen.append(hidden)
        if beside is not None:
            hidden = mx.concatenate([hidden, beside], axis=1)  # [B, n, D] -> [B, n+m, D]
        if ids is None:
            return getattr(original, method)(self, hidden)
        weight, bias = head_rows(self, ids)  # [B, n, C, D]
        logits = (weight.astype(hidden.dtype) @ hidden[..., None]).squeeze(-1)  # [B, n, C]
        return logits if bias is None else logits + bias

    with answering(head, method, gathered):
        yield


def logits_at(
    model: nn.Module,
    tokens: mx.array,
    positions: mx.array,
    ids: mx.array | None = None,
    cache: list | None = None,
    head: nn.Module | None = None,
    beside: mx.array | None = None,
) -> mx.array:
    """Raw logits, fp32 at least, at chosen positions.

    Args:
        tokens: [B, T] int32.  positions: [B, n] int32, indices into T.
        ids: [B, n, C] int32, the candidate rows; None for all V.
        cache: mlx-lm cache with what comes before `tokens`.
        head: `find_head(model)` if it passed `check_head`; None takes the model's own full head.
        beside: [B, m, D], `states_at` of a frozen model, whose logits are wanted too; only with head, without ids.

    Returns:
        [B, n, C], or [B, n+m, V] without ids.
    """
    if head is not None:
        with _standing_in(head, positions, ids, beside):
            return model(tokens, cache=cache)
    assert beside is None, "the full head has no place for other hidden states"
    logits = model(tokens, cache=cache)  # [B, T, V]
    logits = mx.take_along_axis(logits, positions[..., None], axis=1)  # [B, n, V]
    if logits.dtype != mx.float64:
        logits = logits.astype(mx.float32)
    return logits if ids is None else mx.take_along_axis(logits, ids, axis=-1)


def states_at(
    model: nn.Module, tokens: mx.array, positions: mx.array, cache: list | None = None, head: nn.Module | None = None
) -> mx.array:
    """What comes into the head at `positions` [B, n], fp32 at least: [B, n, D], a small part of n rows of V logits."""
    seen: list[mx.array] = []
    assert head is not None, "only a head that passed check_head can be listened to"
    with _standing_in(head, positions, seen=seen):
        model(tokens, cache=cache)
    return seen[0]


def check_head(model: nn.Module, tokens: mx.array) -> tuple[nn.Module | None, str]:
    """The head to gather from, if gathering gives what the full head gives on `tokens` [1, T]; else None and why.

    Architectures that multiply by `weight.T` themselves, or whose inner model returns logits, miss the swap. Eight
    tokens show it as well as a long context would, of which all V logits are computed three times.
    """
    head = find_head(model)
    if head is None:
        return None, NO_HEAD
    tokens = tokens[:, :8]
    positions = mx.array([[0, tokens.shape[1] - 1]])
    full = logits_at(model, tokens, positions)
    vocabulary = full.shape[-1]
    ids = mx.broadcast_to(mx.array([0, vocabulary // 2, vocabulary - 1]), (1, 2, 3))
    expected = mx.take_along_axis(full, ids, axis=-1)
    try:
        got = logits_at(model, tokens, positions, ids, head=head)
        every = logits_at(model, tokens, positions, head=head)
    except (ValueError, IndexError, TypeError) as error:
        return None, f"the gathered head does not fit this architecture ({error})"
    if got.shape != expected.shape or every.shape != full.shape:
        return None, f"the gathered head gives {got.shape}, expected {expected.shape}"
    worst = max(mx.abs(got - expected).max().item(), mx.abs(every - full).max().item())
    return (head, "") if worst <= rounding(model, full) else (None, f"gathered and full head differ by {worst:.3g}")


def rounding(model: nn.Module, logits: mx.array) -> float:
    """What two ways to compute the same logits may differ by: a few epsilons of the model's dtype, of the largest."""
    epsilon = max(EPSILON.get(array.dtype, 2.0**-20) for _, array in tree_flatten(model.parameters()))
    return 8 * epsilon * max(1.0, mx.abs(logits).max().item())
