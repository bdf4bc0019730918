"""What all lines of the table share: the model, the questions, and how much of each is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.nn as nn
import numpy as np

from duet_mlx.context import Context, render
from duet_mlx.data import Query
from duet_mlx.train_settings import TrainSettings

FILLER = "You answer briefly and truthfully, and where you do not know a thing you say so. "


class Shape(NamedTuple):
    """A llama of random weights."""

    width: int
    inner: int
    heads: int
    heads_of_keys: int
    layers: int
    vocabulary: int
    tied: bool


# From their config.json.
SHAPES = {
    "Llama-3.2-1B": Shape(2048, 8192, 32, 8, 16, 128256, True),
    "Llama-3.2-3B": Shape(3072, 8192, 24, 8, 28, 128256, True),
    "Llama-3.1-8B": Shape(4096, 14336, 32, 8, 32, 128256, False),
}


@dataclass(frozen=True)
class Bench:
    """What all lines share, and how much of it is done."""

    model_name: str
    model: nn.Module
    tokenizer: Any
    queries: list[Query]
    settings: TrainSettings  # those that are benchmarked: the paper's objective, LoRA on all layers
    context_tokens: int
    taught: int  # queries of the teacher pass
    alone: int  # of these, as many without sharing: its cost a query hangs on nothing else
    asked: int  # questions of the evaluation
    growing: tuple[int, ...]  # N whose cost is compared
    repeats: int
    memory: float  # bytes that a synthetic model may take
    shapes: dict[str, Shape]


def long_context(tokenizer: Any, question: str, tokens: int) -> Context:
    """A context of about so many tokens."""
    bare, count = len(render(tokenizer, question)), 1
    while len(render(tokenizer, question, Context("long", FILLER * count))) - bare < tokens:
        count += 1
    return Context("long", FILLER * count)


def mean(values: Sequence[int]) -> float:
    return float(np.mean(values))
