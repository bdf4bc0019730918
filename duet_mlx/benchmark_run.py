"""Benchmarks of an evaluation: which items are asked, what each model replies, kept on disk until all is written."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .benchmarks import load_benchmark
from .context import DATE, Context, check_fits
from .errors import ConfigError, ModelError, note
from .files import write_text
from .items import Item
from .kept_answers import code_hash
from .result_files import KEPT

if TYPE_CHECKING:
    import mlx.nn as nn

    from .probe import Reply

Benchmarks = dict[str, list[Item]]


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


def check_prompts(
    tokenizer: Any, benchmarks: Benchmarks, contexts: Sequence[Context], settings: Any, limit: int
) -> None:
    """Render every question, so that no fault is found after the first answer.

    Raises:
        DataError: a prompt that, with the answers behind it, is too long for the model's window of `limit`, or holds a
            control token; with benchmark, file and row.  ContextError.
        ModelError: letters of options that are no single tokens.
    """
    from .probe import letter_ids, longest, prompt_of

    for name, items in benchmarks.items():
        letter_ids(tokenizer, max((len(item.choices) for item in items if item.kind == "choice"), default=0))
        for item in items:
            n = longest(tokenizer, item, settings.max_tokens)
            for context in (None, *contexts[:1]):
                tokens = len(prompt_of(tokenizer, item, context, settings.system))
                behind = f" behind the context {context.name!r}" if context else ""
                place = f"--benchmark {name}: {item.id}{behind}"
                # Without the context it has fitted: that was asked first.
                way_out = f'shorten the context "{context.name}"' if context else "shorten or drop the question"
                check_fits(place, item.question, tokens, n, "the model's window", limit, way_out)


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

    They are kept in --out, a file each, as they come, and taken from there where nothing has changed that they hang on.

    Args:
        column: the model's name in the table.  settings: of the evaluation.
        identity: what tells the model apart (hashes).
        same_base: whether the model with LoRA switched off is the base, so that the base can judge its answers.

    Raises:
        ModelError: logits that are not finite.
    """
    from tqdm import tqdm

    from .probe import ask

    found: dict[str, list[Reply]] = {}
    judged = same_base and not settings.answers_only
    for name, items in benchmarks.items():
        asked = [settings.system, settings.max_tokens, judged, context, items]
        digest = _digest([code_hash(), DATE.isoformat(), column, *identity, *asked])
        slug = re.sub(r"[^\w-]+", "_", f"{name} {column}")
        kept = Path(settings.out) / KEPT / f"{slug}.json"
        replies = _kept(kept, digest, f"{column}, {name}", len(items)) if kept.is_file() else []
        kept.parent.mkdir(parents=True, exist_ok=True)
        size, limits = 2 * settings.batch_size, (settings.max_tokens, settings.batch_size)
        silent = True if len(replies) == len(items) else None
        with tqdm(desc=f"{column}, {name}", unit="q", file=sys.stderr, disable=silent) as bar:
            for at in range(len(replies), len(items), size):
                part = items[at : at + size]
                try:
                    more = ask(model, tokenizer, part, context, settings.system, *limits, bar.update)
                except ModelError as error:
                    raise ModelError(f"{column}, --benchmark {name}: {error}") from error
                if judged:
                    judge(model, tokenizer, part, more, settings.system)
                replies += more
                given = [asdict(reply) for reply in replies]
                write_text(kept, json.dumps({"of": digest, "sha256": _digest(given), "replies": given}))
        found[name] = replies
    return found


def _kept(file: Path, digest: str, column: str, count: int) -> list[Reply]:
    """The replies of this file, if they were made for this digest and are as they were written; a line says so.

    Args:
        column: for the line.  count: how many replies there are to be.
    """
    from .probe import Reply

    reason = "it is damaged"
    try:
        saved = json.loads(file.read_bytes())
        if saved["of"] != digest:
            reason = "what they hang on changed since"
        elif saved["sha256"] == _digest(saved["replies"]):
            left = count - len(saved["replies"])
            rest = f"; {left} of {count} are still to be answered" if left else ""
            note(f"{column}: answers reused from {file}{rest}")
            return [Reply(**reply) for reply in saved["replies"]]
    except (ValueError, TypeError, LookupError):
        pass
    note(f"{column}: answered anew, not from {file}: {reason}")
    return []


def judge(model: nn.Module, tokenizer: Any, items: Sequence[Item], replies: Sequence[Reply], system: str = "") -> None:
    """Give each "qa" reply its mean negative log-probability under the base, which reads the question alone."""
    from .fluency import surprises
    from .probe import prompt_of

    rows = [i for i, (item, reply) in enumerate(zip(items, replies, strict=True)) if item.kind == "qa" and reply.ids]
    prompts = [prompt_of(tokenizer, items[i], None, system) for i in rows]
    for i, surprise in zip(rows, surprises(model, prompts, [replies[i].ids for i in rows]), strict=True):
        replies[i].surprise = surprise


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
