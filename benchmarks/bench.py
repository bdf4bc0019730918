"""What all lines of the table share: the model, the questions, and how much of each is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

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


def random_model(folder: Path, shape: Shape, layers: int) -> Path:
    """Give a llama's folder this shape and 4 random bits for each weight; returns it. No float weight is computed."""
    entries = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {
        "hidden_size": shape.width, "intermediate_size": shape.inner, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads_of_keys, "num_hidden_layers": layers, "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied, "quantization": {"group_size": 64, "bits": 4},
    }  # fmt: skip
    model = Model(ModelArgs.from_dict(entries))
    nn.quantize(model, group_size=64, bits=4)
    constant = {"scales": 0.01, "biases": -0.075}  # weights between -0.075 and 0.075
    weights = {
        name: mx.random.randint(0, 2**31 - 1, array.shape, mx.uint32) if array.dtype == mx.uint32
        else mx.full(array.shape, constant.get(name.rpartition(".")[2], 1.0), mx.float16)
        for name, array in tree_flatten(model.parameters())
    }  # fmt: skip
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


def long_context(tokenizer: Any, question: str, tokens: int) -> Context:
    """A context of about so many tokens."""
    bare, count = len(render(tokenizer, question)), 1
    while len(render(tokenizer, question, Context("long", FILLER * count))) - bare < tokens:
        count += 1
    return Context("long", FILLER * count)


def mean(values: Sequence[int]) -> float:
    return float(np.mean(values))
