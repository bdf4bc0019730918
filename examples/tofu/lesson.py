"""Teaching a model answers: fine-tuning of LoRA out of the parts that duet_mlx trains with.

Nothing that stays the same is run twice: what all prompts begin with is read once a step, and what lies below the
layers that learn once and for all. Only the positions of answers have logits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from tqdm import tqdm

from duet_mlx.context import render
from duet_mlx.generate import branch, common_prefix, encode_prefix, on_each_stream, pad
from duet_mlx.head import check_head, logits_at
from duet_mlx.items import Item
from duet_mlx.lower import entering, hidden_states
from duet_mlx.probe import answer_ids


class Lesson:
    """The questions and answers that one model learns."""

    def __init__(self, model: nn.Module, tokenizer: Any, items: Sequence[Item], layers: int):
        """Run what lies below the last `layers`, which alone have LoRA, for all items."""
        prompts = [render(tokenizer, item.question) for item in items]
        self.answers = [answer_ids(tokenizer, item.answers[0]) for item in items]  # the end of turn comes last
        self.model, self.head = model, check_head(model, mx.array([prompts[0]]))[0]
        self.prefix = prompts[0][: common_prefix(prompts)]
        self.suffixes = [prompt[len(self.prefix) :] for prompt in prompts]
        self.sequences = [[*s, *answer[:-1]] for s, answer in zip(self.suffixes, self.answers, strict=True)]
        first = len(model.layers) - layers
        self.lower, self.hidden = hidden_states(model, first, self.prefix, self.sequences)

    def loss(self, rows: Sequence[int]) -> mx.array:
        """Mean negative log-likelihood of the tokens of these rows' answers; each stream has a part of the rows."""
        with entering(self.model, self.lower.layer, self.lower.prefix):
            shared = encode_prefix(self.model, self.prefix, whole=True)
        parts = on_each_stream(len(rows), lambda part: self.summed([rows[i] for i in part], shared))
        return sum(parts) / sum(len(self.answers[row]) for row in rows)

    def summed(self, rows: Sequence[int], shared: list) -> mx.array:
        """The sum over the tokens of B rows' answers, behind the shared prefix."""
        labels, tokens = pad([self.answers[row] for row in rows]), pad([self.sequences[row] for row in rows])
        lengths = mx.array([[len(self.answers[row])] for row in rows])
        mask = mx.arange(labels.shape[1]) < lengths  # [B, n]
        start = mx.array([[len(self.suffixes[row]) - 1] for row in rows])
        positions = mx.minimum(start + mx.arange(labels.shape[1]), tokens.shape[1] - 1)
        with entering(self.model, self.lower.layer, self.hidden.batch(rows, tokens.shape[1])):
            logits = logits_at(self.model, tokens, positions, cache=branch(shared, len(rows)), head=self.head)
        return (nn.losses.cross_entropy(logits, labels) * mask).sum()  # of [B, n, V] and [B, n]

    def take(self, epochs: int, batch_size: int, rate: float, seed: int) -> None:
        """Adam over all answers `epochs` times, at a rate that falls to zero."""
        random = np.random.default_rng(seed)
        steps = epochs * len(self.batches(np.random.default_rng(seed), batch_size))
        optimizer = optim.Adam(optim.cosine_decay(rate, steps), bias_correction=True)
        gradient_of = nn.value_and_grad(self.model, lambda _, rows: self.loss(rows))
        self.model.train()
        with tqdm(total=steps, unit="step", file=sys.stdout, mininterval=5) as bar:
            for _ in range(epochs):
                for rows in self.batches(random, batch_size):
                    value, gradient = gradient_of(self.model, rows)
                    optimizer.update(self.model, gradient)
                    mx.eval(self.model.trainable_parameters(), optimizer.state, value)
                    bar.set_postfix_str(f"loss {value.item():.3f}", refresh=False)
                    bar.update()
        self.model.eval()

    def batches(self, random: np.random.Generator, size: int) -> list[np.ndarray]:
        """Every row once, those of a batch of like length, but not the same ones in every epoch."""
        lengths = np.array([len(sequence) for sequence in self.sequences])
        order = np.argsort(lengths * random.uniform(0.9, 1.1, len(lengths)))
        batches = np.array_split(order, -(-len(lengths) // size))
        random.shuffle(batches)
        return batches
