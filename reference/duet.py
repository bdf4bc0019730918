"""DUET, the whole of it: contextualize → teacher's targets → student's logits → Huber → gradient → Adam.

    J(θ) = E_{x ∈ D_f ∪ D_r} [ Σ_{i ∈ C_K(x)} ℓ( g_θ^i(x) - g_ref^i(x_ic ⊕ x) ) ]

The teacher is the frozen base with a context in front of the question; the student is the same base with LoRA,
and never sees the context. Questions come in, no answers.

References:
  Zhong, Yang and Zhu, "DUET: Distilled LLM Unlearning from an Efficiently Contextualized Teacher", ICLR 2026
  (arXiv 2601.21283).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference import adam, lora, transformer
from reference.context import Context, Query, contextualize, supervise
from reference.losses import topk_huber
from reference.teacher import Targets, context_of, greedy, targets
from reference.transformer import Model

Array = NDArray[Any]
Render = Callable[[Query, Context | None], list[int]]  # the tokens of x, or of x_ic ⊕ x


class Settings(NamedTuple):
    """What the objective hangs on. The paper: positions 1, candidates and retain_context "teacher", no center."""

    top_k: int  # K
    positions: int  # n
    candidates: str  # teacher | union
    retain_context: str  # teacher | none
    delta: float  # δ
    center: bool = False
    first_share: float = 0.0
    stop: tuple[int, ...] = ()  # ids that end a turn


def join(query: Query, context: Context | None) -> list[int]:
    """The plainest rendering: the context's tokens in front of the query's."""
    return contextualize(query.tokens, context.tokens if context else ())


def run(
    student: Model,
    queries: Sequence[Query],
    contexts: Sequence[Context],
    settings: Settings,
    batches: Sequence[Sequence[int]],
    learning_rates: Sequence[float],
    render: Render = join,
) -> tuple[Model, list[float]]:
    """The student after one step for each batch, and the loss of each batch before its step.

    Args:
        student: with its LoRA at the start (B = 0); the teacher is the same without.
        batches: the indices of the queries of each step, forget and retain mixed.  learning_rates: η, by step.
        render: how query and context become tokens.
    """
    base = student._replace(adapters={})
    constant = teacher_targets(base, queries, contexts, settings, render)
    prompts = [render(query, None) for query in queries]
    state, losses = adam.init(lora.parameters(student.adapters)), []
    for batch, rate in zip(batches, learning_rates, strict=True):
        of_batch = Targets(*(part[list(batch)] for part in constant))
        loss, gradients = loss_and_gradients(student, [prompts[i] for i in batch], of_batch, settings)
        arrays, state = adam.step(lora.parameters(student.adapters), gradients, state, rate)
        student = student._replace(adapters=lora.updated(student.adapters, arrays))
        losses.append(loss)
    return student, losses


def teacher_targets(
    base: Model, queries: Sequence[Query], contexts: Sequence[Context], settings: Settings, render: Render = join
) -> Targets:
    """All targets, before training: what the teacher says, and its raw logits on the way, K of each V.

    Args:
        base: π_ref. (It may carry an adapter of its own: a teacher unlearned in another way.)
    """
    teacher = [render(query, context_of(query, contexts, settings.retain_context)) for query in queries]
    student = [render(query, None) for query in queries]

    def next_logits(ids: list[int]) -> Array:
        return transformer.forward(base, np.array([ids]))[0][0, -1]  # [1, S, V] -> [V]

    n = settings.positions
    words = [greedy(next_logits, prompt, n - 1, settings.stop) for prompt in teacher]
    return targets(
        logits_at(base, teacher, words, n), logits_at(base, student, words, n), words,
        settings.top_k, settings.candidates,
    )  # fmt: skip


def logits_at(model: Model, prompts: Sequence[list[int]], words: Sequence[list[int]], n: int) -> Array:
    """Logits [N, n, V] of each prompt's supervised positions along its continuation."""
    tokens, positions, _ = supervise(prompts, words, n)
    logits, _, _ = transformer.forward(model, tokens)  # [N, S, V]
    return np.take_along_axis(logits, positions[..., None], axis=1)  # [N, S, V] -> [N, n, V]


def loss_and_gradients(
    student: Model, prompts: Sequence[list[int]], constant: Targets, settings: Settings
) -> tuple[float, adam.Tree]:
    """J over one batch, and ∂J/∂(each LoRA factor).

    The logits that no candidate names have the gradient 0, so ∂J/∂logits is the candidates' gradient, put back
    in their places among all [B, S, V].
    """
    supervised = constant.position_mask.sum(axis=1)  # [B]
    words = [row[: count - 1].tolist() for row, count in zip(constant.continuation, supervised, strict=True)]
    tokens, positions, _ = supervise(prompts, words, settings.positions)
    logits, _, backward = transformer.forward(student, tokens)  # [B, S, V]
    places = np.arange(len(tokens))[:, None, None], positions[..., None], constant.ids  # of [B, n, C]
    losses, by_candidates = topk_huber(logits[places], constant, settings.delta, settings.center, settings.first_share)
    by_logits = np.zeros_like(logits)
    np.add.at(by_logits, places, by_candidates)  # masked places repeat others, with 0: hence add, not set
    gradients, _ = backward(by_logits)
    return losses.mean(), gradients
