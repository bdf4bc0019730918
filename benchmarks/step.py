"""A training step against the plain loop, against mlx-lm's own, and against the least that it must do."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from duet_mlx.context import render
from duet_mlx.generate import common_prefix
from duet_mlx.head import find_head
from duet_mlx.loop import make_optimizer, make_step
from duet_mlx.methods import method_loss
from duet_mlx.model import add_lora, load_model, lora_keys, on_gpu
from duet_mlx.stream import Stream
from duet_mlx.teacher import teacher_targets

from .bench import Bench, long_context, mean
from .measure import Row, cost, in_turns, on_one_stream, seconds
from .plain import mlx_lm_steps, plain_batch, plain_loss


def training_step(bench: Bench) -> Iterator[Row]:
    """Ours against the plain loop and against mlx-lm's own, same questions, words, LoRA, optimizer and padding."""
    settings, model, tokenizer = bench.settings, bench.model, bench.tokenizer
    context = long_context(tokenizer, bench.queries[0].question, bench.context_tokens)
    by_length = sorted(bench.queries, key=lambda query: len(render(tokenizer, query.question)))
    middle = (len(by_length) - settings.batch_size) // 2
    queries = by_length[middle : middle + settings.batch_size]
    targets = teacher_targets(model, tokenizer, queries, [context], settings, find_head(model))
    words = [
        row[: count - 1].tolist()
        for row, count in zip(targets.continuation, targets.position_mask.sum(axis=1), strict=True)
    ]
    prompts = [render(tokenizer, query.question) for query in queries]
    behind = [render(tokenizer, query.question, context) for query in queries]
    teacher, *_ = load_model(bench.model_name)
    if not on_gpu():  # a compiled step takes no array both as its state and from outside
        teacher.update(model.parameters())  # one set of weights for both: kinder than a user's second model

    keys = lora_keys(model)
    lora = {**settings.lora_parameters, "keys": keys}
    mx.random.seed(0)
    add_lora(model, -1, **lora)
    model.train()
    head, length = find_head(model), common_prefix(prompts)
    rows, compiled = np.arange(len(queries)), on_gpu()

    def stepping(loss, batch):
        optimizer = make_optimizer(settings)
        optimizer.init(model.trainable_parameters())
        step = make_step(model, optimizer, loss, settings, compiled=compiled)

        def run():
            value, norm, _ = step(batch, None, 1)
            return model.trainable_parameters(), optimizer.state, value, norm

        return run

    def stream(prefix: int) -> Stream:
        return Stream(prompts, targets, prefix, rows)

    unshared = stream(0)
    whole = unshared.batch(rows)
    plain = plain_batch(prompts, behind, words, unshared.multiple)
    losses = {
        "ours": (method_loss(settings, prompts[0][:length], head), stream(length).batch(rows)),
        "ours, no prefix shared": (method_loss(settings, [], head), whole),
        "plain": (plain_loss(teacher, settings.top_k, settings.delta), plain),
    }
    check_equal({name: loss(model, batch)[0].item() for name, (loss, batch) in losses.items()})
    ways = {name: stepping(*both) for name, both in losses.items()}
    ways["plain"] = on_one_stream(ways["plain"])
    sequences = [[*prompt, *said] for prompt, said in zip(prompts, words, strict=True)]
    width = whole.tokens.shape[1]
    least = products(model, losses["ours"][1].tokens.size + length)
    costs = in_turns(ways, bench.repeats)
    costs |= in_turns({"products": on_one_stream(least)}, bench.repeats)
    optimizer = make_optimizer(settings)
    theirs = on_one_stream(lambda: mlx_lm_steps(model, optimizer, sequences, width, bench.repeats))
    costs["mlx-lm"] = cost(theirs())

    ours, tokens = costs["ours"], f"{mean([len(s) for s in sequences]):.0f} tokens a query, B = {len(queries)}"
    for name, what, reach in (
        ("plain", f"the plain loop, context of {bench.context_tokens} tokens", "≥ 4"),
        ("mlx-lm", "mlx-lm's own train", "≥ 1.2"),
        ("ours, no prefix shared", "ours without the questions' shared prefix", ""),
    ):
        theirs = costs[name]
        yield Row(
            f"training step, {tokens}, against {what}", seconds(ours.seconds), seconds(theirs.seconds),
            theirs.seconds / ours.seconds, reach, f"slowest over fastest {ours.spread:.2f}, {theirs.spread:.2f}",
        )  # fmt: skip
    yield Row(
        "peak memory of a step less the weights, share of the plain loop's",
        f"{ours.peak / 1e9:.3f} GB", f"{costs['plain'].peak / 1e9:.3f} GB", ours.peak / costs["plain"].peak, "≤ 0.4",
    )  # fmt: skip
    limit = costs["products"].seconds
    yield Row(
        "training step, share of the limit (its matrix products alone)", seconds(ours.seconds), seconds(limit),
        limit / ours.seconds, "≥ 0.6",
    )  # fmt: skip


def check_equal(losses: dict[str, float]) -> None:
    """Two ways that compute different things are not compared."""
    least, most = min(losses.values()), max(losses.values())
    if most - least > (0.05 if on_gpu() else 1e-3) * abs(most):  # packed and half-precision weights round
        raise AssertionError(f"the sides compute different losses: {losses}")


def products(model: nn.Module, tokens: int):
    """The least a step must do: each frozen linear layer's product forward, and its gradient by the input."""
    layers = [
        module.linear
        for layer in model.layers
        for _, module in layer.named_modules()
        if type(module).__name__.startswith("LoRA")
    ]

    def inputs(linear: nn.Module) -> tuple[mx.array, mx.array]:
        outside, inside = linear.weight.shape
        if isinstance(linear, nn.QuantizedLinear):
            inside = inside * 32 // linear.bits
        kind = linear.scales.dtype if isinstance(linear, nn.QuantizedLinear) else linear.weight.dtype
        return mx.ones((tokens, inside), kind), mx.ones((tokens, outside), kind)

    made: dict[tuple, tuple[mx.array, mx.array]] = {}
    for linear in layers:
        made.setdefault(tuple(linear.weight.shape), inputs(linear))
    mx.eval(made)

    def run() -> None:
        for linear in layers:
            x, gradient = made[tuple(linear.weight.shape)]
            if isinstance(linear, nn.QuantizedLinear):
                packed = {"scales": linear.scales, "biases": linear.get("biases"), "group_size": linear.group_size,
                          "bits": linear.bits, "mode": linear.mode}  # fmt: skip
                both = (
                    mx.quantized_matmul(x, linear.weight, transpose=True, **packed),
                    mx.quantized_matmul(gradient, linear.weight, transpose=False, **packed),
                )
            else:
                both = x @ linear.weight.T, gradient @ linear.weight
            mx.async_eval(both)

    return run
