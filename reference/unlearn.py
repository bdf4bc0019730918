"""A baseline, the whole of it: answers → student's logits → loss → gradient → Adam. The counterpart of duet.py.

The answers are the base's own greedy ones, or given texts; what a loss needs of the frozen base is computed once, by
`read` with the base for the model. Losses and their gradients by the logits are in baselines.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference import adam, lora, transformer
from reference.baselines import Answers
from reference.context import pad, supervise
from reference.transformer import Model

Array = NDArray[Any]
Loss = Callable[..., tuple[Any, ...]]  # what is read of each side -> (value, gradient by the logits of each side)


class Hidden(NamedTuple):
    """B answers as a loss on hidden states reads them (RMU)."""

    states: Array  # [B, n, D], what a layer gives at the positions that predict the answer
    mask: Array  # [B, n] bool


class Labelled(NamedTuple):
    """B queries and what is to be said to each: at least one token, the end of turn included where it has one."""

    prompts: Sequence[Sequence[int]]
    labels: Sequence[Sequence[int]]


def base_answers(base: Model, prompts: Sequence[Sequence[int]], n: int, stop: Sequence[int] = ()) -> list[list[int]]:
    """The base's greedy answers, n tokens at most, the end of turn included where it comes within them."""
    answers: list[list[int]] = [[] for _ in prompts]
    for prompt, words in zip(prompts, answers, strict=True):
        while len(words) < n and not (words and words[-1] in stop):
            logits, _, _ = transformer.forward(base, np.array([[*prompt, *words]]))  # [1, S, V]
            words.append(int(np.argmax(logits[0, -1])))  # ties go to the lower id
    return answers


def read(model: Model, side: Labelled) -> tuple[Answers, Callable[[Array], adam.Tree]]:
    """Answers [B, n, V] under teacher forcing, and `backward`, from their gradient to that of the LoRA factors.

    n is the longest answer's length. The model reads prompt ⊕ y[:-1]; its position t predicts y[t].
    """
    n = max(map(len, side.labels))
    tokens, positions, mask = supervise(side.prompts, [words[:-1] for words in side.labels], n)
    logits, _, backward = transformer.forward(model, tokens)  # [B, S, V]
    places = np.arange(len(tokens))[:, None], positions  # of [B, n]

    def back(by_answers: Array) -> adam.Tree:
        by_logits = np.zeros_like(logits)
        np.add.at(by_logits, places, by_answers)  # masked positions repeat the last one, with 0: hence add, not set
        return backward(by_logits)[0]

    return Answers(logits[places], pad(side.labels, n), mask), back


def read_layer(model: Model, side: Labelled, layer: int) -> tuple[Hidden, Callable[[Array], adam.Tree]]:
    """As `read`, but what comes out of one layer: nothing above it has a part in it, nor a gradient."""
    n = max(map(len, side.labels))
    tokens, positions, mask = supervise(side.prompts, [words[:-1] for words in side.labels], n)
    gradients: adam.Tree = {}
    x, _, backward = transformer.hidden_states(model, tokens, gradients, count=layer + 1)  # [B, S, D]
    places = np.arange(len(tokens))[:, None], positions  # of [B, n]

    def back(by_states: Array) -> adam.Tree:
        by_x = np.zeros_like(x)
        np.add.at(by_x, places, by_states)
        backward(by_x)
        return gradients

    return Hidden(x[places], mask), back


def loss_and_gradients(
    student: Model, sides: Sequence[Labelled], loss: Loss, reader: Callable[..., Any] = read
) -> tuple[float, adam.Tree]:
    """The loss of one batch, and its gradient by each LoRA factor: that of each side, added up.

    Args:
        reader: `read`, or `read_layer` with a layer.
    """
    readings = [reader(student, side) for side in sides]
    value, *by_read = loss(*(one for one, _ in readings))
    gradients = {name: np.zeros_like(array) for name, array in lora.parameters(student.adapters).items()}
    for (_, back), by_one in zip(readings, by_read, strict=True):
        for name, gradient in back(by_one).items():
            gradients[name] = gradients[name] + gradient
    return value, gradients


def run(
    student: Model,
    steps: Sequence[tuple[Sequence[Labelled], Loss]],
    learning_rates: Sequence[float],
    reader: Callable[..., Any] = read,
) -> tuple[Model, list[float]]:
    """The student after these steps, and the loss of each before it was taken.

    Args:
        student: with its LoRA at the start (B = 0).
        steps: of each batch the sides that its loss reads, as forget and retain answers, and that loss.
    """
    state, losses = adam.init(lora.parameters(student.adapters)), []
    for (sides, loss), rate in zip(steps, learning_rates, strict=True):
        value, gradients = loss_and_gradients(student, sides, loss, reader)
        arrays, state = adam.step(lora.parameters(student.adapters), gradients, state, rate)
        student = student._replace(adapters=lora.updated(student.adapters, arrays))
        losses.append(value)
    return student, losses
