"""Benchmarks of an evaluation: which items are asked, what each model replies, kept on disk until all is written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .benchmarks import load_benchmark
from .context import DATE, Context
from .errors import ConfigError
from .items import Item

if TYPE_CHECKING:
    import mlx.nn as nn

    from .probe import Reply

Benchmarks = dict[str, list[Item]]
KEPT = ".replies"  # in --out: replies of a run that was cut off


def load_benchmarks(specs: Sequence[str], questions: int = 0) -> Benchmarks:
    """Items by the benchmark's name, the spec without its folder; `questions`: at most so many a group, evenly spread.

    Raises:
        ConfigError: a spec, or one name twice.  DataError: files.
    """
    benchmarks: Benchmarks = {}
    for spec in specs:
        name = spec.partition("@")[0]
        if name in benchmarks:
            raise ConfigError(f"--benchmark {spec}: {name} stands there twice; name its part, as in tofu:forget05")
        groups: dict[tuple[str, str], list[Item]] = {}
        for item in load_benchmark(spec):
            groups.setdefault((item.group, item.kind), []).append(item)
        benchmarks[name] = []
        for items in groups.values():
            count = min(questions or len(items), len(items))
            benchmarks[name] += [items[i * len(items) // count] for i in range(count)]
    return benchmarks


def describe(benchmarks: Benchmarks) -> dict[str, Any]:
    """For results.json: how many items of each benchmark are asked, and their hash."""
    return {name: {"questions": len(items), "sha256": _digest(items)} for name, items in benchmarks.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=asdict).encode()).hexdigest()


def replies_of(
    column: str,
    model: nn.Module,
    tokenizer: Any,
    benchmarks: Benchmarks,
    context: Context | None,
    settings: Any,
    identity: Sequence[str],
    same_base: bool = True,
) -> dict[str, list[Reply]]:
    """What one model replies to all items, by benchmark.

    Args:
        column: the model's name in the table.  settings: of the evaluation.
        identity: what tells the model apart (hashes): replies are taken from disk only for the very same.
        same_base: whether the model without its adapter is the base, so that the base can judge its answers.
    """
    from tqdm import tqdm

    from .probe import Reply, ask

    found: dict[str, list[Reply]] = {}
    for name, items in benchmarks.items():
        asked = [settings.system, settings.max_tokens, same_base, context, items]
        digest = _digest([__version__, DATE.isoformat(), column, *identity, *asked])
        kept = Path(settings.out) / KEPT / f"{digest[:32]}.json"
        if kept.is_file():
            found[name] = [Reply(**reply) for reply in json.loads(kept.read_text(encoding="utf-8"))]
            print(f"{column}, {name}: replies of an earlier run that was cut off", file=sys.stderr)
            continue
        with tqdm(desc=f"{column}, {name}", unit="q", file=sys.stderr, disable=None) as bar:
            replies = ask(
                model, tokenizer, items, context, settings.system, settings.max_tokens, settings.batch_size, bar.update
            )
            if same_base:
                judge(model, tokenizer, items, replies, settings.system)
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps([asdict(reply) for reply in replies]), encoding="utf-8")
        os.replace(partial, kept)
        found[name] = replies
    return found


def judge(model: nn.Module, tokenizer: Any, items: Sequence[Item], replies: Sequence[Reply], system: str = "") -> None:
    """Give each "qa" reply its mean negative log-probability under the base, which reads the question alone."""
    from .probe import log_probs, prompt_of

    rows = [i for i, (item, reply) in enumerate(zip(items, replies, strict=True)) if item.kind == "qa" and reply.ids]
    prompts = [prompt_of(tokenizer, items[i], None, system) for i in rows]
    with without_adapter(model):
        found = log_probs(model, prompts, [replies[i].ids for i in rows])
    for i, (values, _) in zip(rows, found, strict=True):
        replies[i].surprise = -sum(values) / len(values)


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """While inside, LoRA adds nothing, and the model is its base."""
    layers = [module for _, module in model.named_modules() if "lora_a" in module]
    scales = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


def rows_and_samples(
    benchmarks: Benchmarks, replies: dict[str, dict[str, list[Reply]]], seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of results.json and lines of samples.jsonl, from replies by model and benchmark."""
    from .benchmark_scores import group_of, rows_of, score

    rows: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for name, items in benchmarks.items():
        scores = {
            model: [score(item, reply) for item, reply in zip(items, of[name], strict=True)]
            for model, of in replies.items()
        }
        rows += rows_of(name, items, scores, seed)
        for model, of in replies.items():
            for item, reply, scored in zip(items, of[name], scores[model], strict=True):
                said = reply.answer if reply.choice is None else item.choices[reply.choice]
                sample = {"id": item.id, "group": group_of(item, name), "question": item.question, "model": model}
                samples.append({**sample, "answer": said, **scored})
    return rows, samples


def forget_kept(out: str | Path) -> None:
    """Remove the replies kept for a run that is now written whole."""
    shutil.rmtree(Path(out) / KEPT, ignore_errors=True)
