"""What is measured, a function for each line or two of the table, all on one model and real questions."""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer
from safetensors.numpy import load_file

from duet_mlx.context import render
from duet_mlx.data import Query
from duet_mlx.dry_run import skeleton, stored_bytes
from duet_mlx.estimate import estimate
from duet_mlx.generate import common_prefix, decode, greedy, stop_ids
from duet_mlx.head import find_head, head_rows
from duet_mlx.kept_targets import saved_or_built
from duet_mlx.methods import in_parts
from duet_mlx.model import on_gpu
from duet_mlx.stream import Stream
from duet_mlx.teacher import Targets, rows_at_once, topk
from duet_mlx.train import parse_settings, prepare, read_questions, train
from duet_mlx.train_settings import TrainSettings

from .bench import Bench, long_context, mean, random_model
from .measure import Row, in_turns, on_one_stream, once, seconds
from .plain import generate_in_a_loop
from .scaling import scaling
from .step import training_step

PAGE = 1 if sys.platform == "darwin" else 1024  # bytes in which the system counts a process's memory
DEMO = Path(__file__).resolve().parents[1] / "examples" / "harry_potter"

# --- the teacher ----------------------------------------------------------------------------------------------------


def teacher_pass(bench: Bench) -> Iterator[Row]:
    """The context encoded once against once for each query, as both grow."""
    n, k = bench.settings.positions, bench.settings.top_k
    stop, head = stop_ids(bench.tokenizer), find_head(bench.model)
    vocabulary = head.weight.shape[0]
    questions = [bench.queries[i % len(bench.queries)].question for i in range(bench.taught)]
    for tokens in (50, bench.context_tokens, 4 * bench.context_tokens):
        main = tokens == bench.context_tokens
        asked = questions if main else questions[: bench.alone]
        alone = max(1, bench.alone * bench.context_tokens // tokens) if tokens > bench.context_tokens else bench.alone
        context = long_context(bench.tokenizer, questions[0], tokens)
        prompts = [render(bench.tokenizer, question, context) for question in asked]
        shared, own = common_prefix(prompts), mean([len(prompt) for prompt in prompts])

        def read(prompts: Sequence[list[int]]) -> None:
            for batch in decode(bench.model, prompts, n, stop, rows_at_once(n, vocabulary), head, keep=np.array):
                topk(batch.kept, k)

        # A first token of its own, and nothing is shared: the same code, the same batches.
        apart = [[row + 1, *prompt] for row, prompt in enumerate(prompts[:alone])]
        if on_gpu():  # its kernels are loaded at their first use
            read(prompts[:1])
        spent, peak = once(lambda: read(prompts))  # noqa: B023
        spent_apart, peak_apart = once(lambda: read(apart))  # noqa: B023
        each, each_apart = spent / len(prompts), spent_apart / len(apart)
        yield Row(
            f"teacher, context of {shared} shared tokens, {len(prompts)} queries of {own - shared:.0f} more, n = {n}",
            f"{seconds(each)} a query, {peak / 1e9:.2f} GB",
            f"{seconds(each_apart)} a query ({len(apart)} of them), {peak_apart / 1e9:.2f} GB",
            each_apart / each, "≥ 6" if main else "",
        )  # fmt: skip


def growth(bench: Bench) -> Iterator[Row]:
    """The cost of one query more, as N grows: teacher, top-K, and the targets on the disk."""
    context = long_context(bench.tokenizer, bench.queries[0].question, 50)
    spent = []
    for count in bench.growing:
        # In strides, so that few and many questions are alike: the files go from short ones to long ones.
        many = [replace(bench.queries[997 * i % len(bench.queries)], id=str(i)) for i in range(count)]

        def read(many: list[Query]) -> None:
            with tempfile.TemporaryDirectory() as folder:
                saved_or_built(
                    Path(folder) / "targets.safetensors", bench.model, bench.tokenizer, many, [context],
                    bench.settings, find_head(bench.model),
                )  # fmt: skip

        cost = once(lambda: read(many))  # noqa: B023
        spent.append((count, *cost, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PAGE))
    (few, early, *_), (more, later, peak, whole) = spent[:2]
    for count, total, at, grown in spent[2:]:
        marginal, before = (total - later) / (count - more), (later - early) / (more - few)
        yield Row(
            f"one query more, N {more} → {count}",
            f"{seconds(marginal)}, {at / 1e9:.2f} GB", f"{seconds(before)} at N {few} → {more}, {peak / 1e9:.2f} GB",
            marginal / before, "0.9 to 1.1",
            f"the process at its largest so far: {grown / 1e9:.2f} GB, at N {more} {whole / 1e9:.2f} GB",
        )  # fmt: skip


# --- the rest ---


def head_rows_and_positions(bench: Bench) -> Iterator[Row]:
    """The head alone, on hidden states of a step: K rows against V columns, n positions against T."""
    head, settings = find_head(bench.model), bench.settings
    width = next(a.shape for name, a in tree_flatten(bench.model.parameters()) if name.endswith("norm.weight"))[0]
    b, n, t = settings.batch_size, settings.positions, 40
    hidden, few = mx.random.normal((b, t, width)), mx.random.normal((b, n, width))
    ids = mx.random.randint(0, head.weight.shape[0], (b, n, settings.top_k))
    project = head if isinstance(head, (nn.Linear, nn.QuantizedLinear)) else head.as_linear

    def rows() -> mx.array:
        weight, _ = head_rows(head, ids)
        return (weight.astype(few.dtype) @ few[..., None]).squeeze(-1)

    costs = in_turns({"rows": rows, "positions": lambda: project(few), "all": lambda: project(hidden)}, bench.repeats)
    ours = costs["rows"]
    for name, what in (("positions", f"all V at n = {n} positions"), ("all", f"all V at T = {t}")):
        yield Row(
            f"head forward, K = {settings.top_k} rows at n = {n} against {what}", seconds(ours.seconds),
            seconds(costs[name].seconds), costs[name].seconds / ours.seconds,
        )  # fmt: skip


def evaluation(bench: Bench) -> Iterator[Row]:
    """Greedy answers of 32 tokens: batches that share their prefix against `mlx_lm.generate`, one by one."""
    prompts = [render(bench.tokenizer, query.question) for query in bench.queries[: bench.asked]]
    stop, head = stop_ids(bench.tokenizer), find_head(bench.model)
    few = prompts[:: max(1, len(prompts) // 2)][:2]
    greedy(bench.model, few[:1], 2, stop, head=head)  # a GPU's kernels are loaded at their first use
    generate_in_a_loop(bench.model, bench.tokenizer, few[:1], 2)
    ours, _ = once(lambda: greedy(bench.model, prompts, 32, stop, head=head) and None)
    theirs, _ = once(on_one_stream(lambda: generate_in_a_loop(bench.model, bench.tokenizer, few, 32)))
    ours, theirs = ours / len(prompts), theirs / len(few)
    yield Row(
        f"evaluation, {len(prompts)} questions of at most 32 new tokens", f"{seconds(ours)} a question",
        f"{seconds(theirs)} ({len(few)} of them)", theirs / ours, "≥ 4",
    )  # fmt: skip


def padding(bench: Bench) -> Iterator[Row]:
    """Pad tokens among all tokens of the batches that the demo's settings make, and how many shapes these have."""
    prompts = [render(bench.tokenizer, query.question) for query in bench.queries]
    demo = replace(parse_settings("train", "Train.", ["-c", str(DEMO / "config.yaml")]), iters=400)
    n, count, prefix = demo.positions, len(prompts), common_prefix(prompts)
    forget = np.array([i for i, query in enumerate(bench.queries) if query.role == "forget"])
    kept = np.array([i for i, query in enumerate(bench.queries) if query.role != "forget"])
    masks = {"if every answer fills its positions": np.ones((count, n), dtype=bool)}
    saved = DEMO / "out" / "adapters" / "targets.safetensors"
    if saved.is_file() and (said := load_file(saved)["position_mask"]).shape == (count, n):
        masks["with the answers of the demo's teacher"] = said
    for what, mask in masks.items():
        empty, words = np.zeros((count, n, 1)), np.zeros((count, n - 1), dtype=int)
        stream = Stream(prompts, Targets(empty, empty, empty, mask, words), prefix)
        steps = stream.schedule(forget, kept, demo)
        parts = [part.tokens for rows in steps for part in in_parts(stream.batch(rows))[0]]
        wasted = 1 - sum(int(stream.lengths[rows].sum()) for rows in steps) / sum(part.size for part in parts)
        yield Row(
            f"padding wasted, 400 batches, {what}", f"{100 * wasted:.1f} %", "", wasted, "≤ 0.1",
            f"{len({part.shape for part in parts})} shapes, widths in steps of {stream.multiple}",
        )  # fmt: skip


def size(bench: Bench) -> Iterator[Row]:
    """Peak memory as the dry run says against the measured, on random weights of well-known shapes, 4 bits."""
    from tests.tiny_model import tiny_data, tiny_model

    for name, shape in bench.shapes.items():
        bytes_each = 0.5625 if on_gpu() else 4.0  # 4 bits, and a scale and a bias for 64 of them
        around = shape.vocabulary * shape.width * (1 if shape.tied else 2) * bytes_each
        attention = 2 * shape.width**2 * (1 + shape.heads_of_keys / shape.heads)
        layer = (attention + 3 * shape.width * shape.inner) * bytes_each
        # The rest of the memory is for what training adds; and more layers would take a CPU minutes.
        layers = min(shape.layers if on_gpu() else 4, int((0.6 * bench.memory - around) / layer))
        title = f"peak memory, shapes of {name}, {max(0, layers)} of {shape.layers} layers"
        if layers < 1:
            yield Row(title, "", "", None, note=f"no layer fits into {bench.memory / 1e9:.0f} GB (--memory)")
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = random_model(tiny_model(Path(folder) / "model"), shape, layers)
            flags = ["--model", str(made), *tiny_data(Path(folder) / "data"), "--iters", "2", "--batch-size", "4"]
            flags += ["--positions", "2"]
            settings = parse_settings(
                "train", "Train.", [*flags, "--steps-per-eval", "0", "--adapter-path", f"{folder}/adapters"]
            )
            asked, tokenizer = read_questions(settings), load_tokenizer(made)
            said = estimate(settings, skeleton(made), tokenizer, *asked, stored_bytes(made)).peak
            _, peak = once(partial(_train, settings))
        yield Row(
            title, f"{said / 1e9:.2f} GB by the dry run", f"{peak / 1e9:.2f} GB measured", said / peak, "0.85 to 1.15"
        )


def _train(settings: TrainSettings) -> None:
    train(settings, prepare(settings))


SECTIONS = {
    "head": head_rows_and_positions,
    "padding": padding,
    "teacher": teacher_pass,
    "growth": growth,
    "evaluation": evaluation,
    "size": size,
    "scaling": scaling,
    "step": training_step,  # the last: it puts LoRA on the model
}
