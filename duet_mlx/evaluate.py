"""Evaluate an adapter on questions it was not trained on: base | base + context | unlearned.

    python -m duet_mlx.evaluate --model M --adapter-path A --forget F.jsonl --retain R.jsonl --out DIR

Every column is the same base in memory: it answers, answers behind --context, then the adapter is put on it.
Groups: forget, general (--retain), neighbours, and the forget questions behind each reverse prompt.
metrics.py says what is measured, scores.py joins answers and metrics, report.py shows them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, metrics, report
from .data import Query, check_disjoint, file_hash, load_queries
from .errors import ConfigError, ModelError, run_cli
from .metrics import FORGET, GENERAL, NEIGHBOURS
from .scores import Asked, Column, rows_of, score
from .settings import parse, require, setting

if TYPE_CHECKING:
    from .context import Context

BASE, IN_CONTEXT, UNLEARNED = "base", "base + context", "unlearned"


@dataclass(frozen=True)
class EvaluateSettings:
    """Settings of an evaluation; the flags are these fields."""

    model: str = setting("", "hub id, MLX folder or .gguf file")
    adapter_path: str | None = setting(None, "folder of the adapter; without it, no column 'unlearned'")
    forget: tuple[str, ...] = setting((), "JSONL files of questions that should be forgotten")
    retain: tuple[str, ...] = setting((), "JSONL files of general questions whose answers should stay")
    neighbours: tuple[str, ...] = setting((), "JSONL files of questions near the topic, to stay as well")
    context: str | None = setting(None, "YAML file or ready context for the column 'base + context'")
    topic: str | None = setting(None, "what {topic} stands for in the context")
    context_name: str | None = setting(None, "the one context of --context to put before every question")
    system: str = setting("", "your own system prompt, in every column")
    reverse_prompts: str | None = setting(None, "text file: each line is put before every forget question")
    reverse_questions: int = setting(0, "ask only so many forget questions, evenly spread, behind each (0: all)")
    # As long as KnowMem's (reference/README.md): room for a sentence, and the figures stay comparable.
    max_tokens: int = setting(32, "most new tokens of an answer")
    batch_size: int = setting(64, "questions decoded together: changes speed and memory alone")
    seed: int = setting(0, "seed of the bootstrap; answers are greedy and need none")
    beside: tuple[str, ...] = setting((), "NAME=results.json: its 'unlearned' as one more column")
    overwrite: bool = setting(False, "replace the results that --out holds")
    trust_remote_code: bool = setting(False, "run code that comes with the model's tokenizer")
    out: str = setting("", "folder for results.json, samples.jsonl and results.png")


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Ask every model everything; write results.json, samples.jsonl and results.png; return the first.

    Raises:
        ConfigError, DataError, ContextError: before a model is loaded.  ModelError: model or adapter.
    """
    _check(settings)
    prompts = _reverse_prompts(settings)
    groups = _groups(settings)
    asked = [Asked(group, query) for group, queries in groups.items() for query in queries]
    count = len(groups[FORGET])
    tried = min(settings.reverse_questions or count, count)
    spread = [groups[FORGET][i * count // tried] for i in range(tried)]
    for number, prompt in enumerate(prompts, 1):
        asked += [Asked(f"{FORGET}, reverse {number}", query, prompt) for query in spread]
    contexts = _contexts(settings, groups[FORGET])
    beside = report.load_beside(settings.beside, (BASE, IN_CONTEXT, UNLEARNED))
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    meta = _meta(settings, groups, prompts)

    columns, meta["base_weights"] = _columns(settings, asked, contexts)
    scores = {name: score(asked, column, columns[BASE]) for name, column in columns.items()}
    rows, meta["worst_reverse"] = rows_of(asked, scores, settings.seed)
    results = {"meta": meta, "rows": rows + beside}
    samples = [
        {
            "id": a.query.id,
            "group": a.group,
            "question": a.query.question,
            "model": name,
            "answer": said,
            **scored,
        }
        for name, column in columns.items()
        for a, said, scored in zip(asked, column.answers, scores[name], strict=True)
    ]
    _write(Path(settings.out), results, samples)
    return results


# --- what is asked ------------------------------------------------------------------------------------------


def _check(settings: EvaluateSettings) -> None:
    """Raise for what can be seen to be wrong before anything is read."""
    require(settings, "model", "forget", "out")
    for name in ("max_tokens", "batch_size"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected 1 or more")
    for name in ("seed", "reverse_questions"):
        if getattr(settings, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected 0 or more")
    for name in ("topic", "context_name"):
        if getattr(settings, name) is not None and settings.context is None:
            raise ConfigError(f"--{name.replace('_', '-')} says something about --context, which is missing")
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file, expected a folder")
    if (out / "results.json").exists() and not settings.overwrite:
        raise ConfigError(f"--out {out}: holds results.json already; name another folder, or add --overwrite")
    adapter = settings.adapter_path
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise ModelError(f"--adapter-path {adapter}: no adapter_config.json in it")


def _reverse_prompts(settings: EvaluateSettings) -> list[str]:
    """One prompt a line; blank lines are skipped."""
    if settings.reverse_prompts is None:
        return []
    file = settings.reverse_prompts
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--reverse-prompts {file}: cannot be read ({error})") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"--reverse-prompts {file}: empty; expected one prompt a line")
    return prompts


def _groups(settings: EvaluateSettings) -> dict[str, list[Query]]:
    groups = {FORGET: load_queries(settings.forget, "forget")}
    if settings.retain:
        groups[GENERAL] = load_queries(settings.retain, "retain")
    if settings.neighbours:
        groups[NEIGHBOURS] = load_queries(settings.neighbours, "neighbour")
    for name, queries in groups.items():
        if name != FORGET:
            check_disjoint(groups[FORGET], queries)
    return groups


def _contexts(settings: EvaluateSettings, forget: list[Query]) -> list[Context]:
    """The contexts of --context, or the one that --context-name picks; [] without."""
    if settings.context is None:
        return []
    from .context import load_contexts
    from .teacher import context_of

    contexts = load_contexts(settings.context, settings.topic)
    if settings.context_name is None:
        for query in forget:
            context_of(query, contexts, "teacher")  # raises for a name that no context has
        return contexts
    for context in contexts:
        if context.name == settings.context_name:
            return [context]
    names = ", ".join(context.name for context in contexts)
    raise ConfigError(f"--context-name {settings.context_name}: --context {settings.context} holds {names}")


# --- what the models say ------------------------------------------------------------------------------------


def _columns(settings: EvaluateSettings, asked: list[Asked], contexts: list[Context]) -> tuple[dict[str, Column], str]:
    """Each column, and the hash of the base, whose weights serve all of them: the adapter goes on last."""
    from .answers import column
    from .context import render
    from .model import apply_adapter, load_model, weights_hash
    from .teacher import context_of

    model, tokenizer, folder = load_model(settings.model, trust_remote_code=settings.trust_remote_code)
    base_hash = weights_hash(model)

    def prompts(chosen: Sequence[Context | None]) -> list[list[int]]:
        return [render(tokenizer, a.text, c, settings.system) for a, c in zip(asked, chosen, strict=True)]

    no_context = [None] * len(asked)
    plain = prompts(no_context)
    base = column(BASE, model, tokenizer, asked, plain, no_context, None, settings)
    columns = {BASE: base}
    if contexts:
        named = settings.context_name is None
        chosen = [context_of(a.query, contexts, "teacher") if named else contexts[0] for a in asked]
        columns[IN_CONTEXT] = column(IN_CONTEXT, model, tokenizer, asked, prompts(chosen), chosen, base, settings)
    if settings.adapter_path is not None:
        _same_model(apply_adapter(model, settings.adapter_path), base_hash, folder, settings)
        columns[UNLEARNED] = column(UNLEARNED, model, tokenizer, asked, plain, no_context, base, settings)
    return columns, base_hash


def _same_model(config: dict, base_hash: str, folder: Path, settings: EvaluateSettings) -> None:
    """Raise ModelError for an adapter whose shapes fit by chance: it was trained on other weights elsewhere.

    The same folder name with other weights only gets a warning: the base in memory is quantized on a GPU and
    widened on a CPU, so the hash tells those apart too.
    """
    trained_on = (config.get("targets") or {}).get("model")
    if trained_on in (None, base_hash):
        return
    name = str(config.get("model"))
    if Path(name).name.removesuffix("-fp32") != folder.name.removesuffix("-fp32"):
        raise ModelError(
            f"--adapter-path {settings.adapter_path}: made for another model ({name}); its weights are not "
            f"those of --model {settings.model}"
        )
    print(f"note: the adapter was trained on other bits or another precision of {name}", file=sys.stderr)


# --- what is kept -------------------------------------------------------------------------------------------


def _meta(settings: EvaluateSettings, groups: dict[str, list[Query]], prompts: list[str]) -> dict[str, Any]:
    """What the figures hang on: inputs by hash, settings, versions, kind of machine."""
    import mlx.core as mx

    files: dict[str, Sequence[str]] = {}
    for name in ("forget", "retain", "neighbours"):
        files[name] = getattr(settings, name)
    for name in ("context", "reverse_prompts"):
        path = getattr(settings, name)
        files[name] = (path,) if path is not None and Path(path).is_file() else ()
    packages = ("mlx", "mlx-lm", "numpy", "rouge-score", "transformers")
    return {
        "model": settings.model,
        "adapter": settings.adapter_path,
        "data": {name: {path: file_hash(path) for path in paths} for name, paths in files.items()},
        "questions": {group: len(queries) for group, queries in groups.items()},
        "reverse_prompts": prompts,
        "settings": asdict(settings),
        "metrics": {metric.key: metric.definition for metric in metrics.METRICS},
        "versions": {
            "duet-mlx": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "device": "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu",
        },
    }


def _processor() -> str:
    """The kind of processor in the system's own words."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, subprocess.CalledProcessError, StopIteration):
        return platform.processor() or "unknown"


def _write(out: Path, results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    with open(out / "samples.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    report.picture(results, out / "results.png")
    # Last: where results.json stands, all of it is there.
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (out / "results.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Evaluate, then show the table and a few answers side by side."""
    settings = parse(EvaluateSettings, "python -m duet_mlx.evaluate", __doc__ or "")
    results = evaluate(settings)
    report.show(results, Path(settings.out) / "samples.jsonl")


if __name__ == "__main__":
    run_cli(main)
