"""Evaluate an adapter on questions it was not trained on: base | base + context | unlearned.

    python -m duet_mlx.evaluate --model M --adapter-path A --forget F.jsonl --retain R.jsonl --out DIR
    python -m duet_mlx.evaluate --model M --adapter-path A --benchmark tofu:forget10 --out DIR

Every column is the same base in memory: it answers, answers behind --context, then the adapter is put on it.
Groups: forget, general (--retain), neighbours, and the forget questions behind each reverse prompt.
metrics.py says what is measured, scores.py joins answers and metrics, report.py shows them; of benchmarks, these are
measures.py, benchmark_metrics.py and benchmark_scores.py.
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

from . import __version__, measures, report
from .benchmark_run import Benchmarks, describe, forget_kept, load_benchmarks, replies_of, rows_and_samples
from .data import Query, check_disjoint, file_hash, load_queries
from .errors import ConfigError, ModelError, run_cli
from .metrics import FORGET, GENERAL, NEIGHBOURS
from .picture import picture
from .scores import Asked, Column, rows_of, score
from .settings import parse, require, setting

if TYPE_CHECKING:
    from .context import Context
    from .probe import Reply

BASE, IN_CONTEXT, UNLEARNED, RETRAINED = "base", "base + context", "unlearned", "retrained"


@dataclass(frozen=True)
class EvaluateSettings:
    """Settings of an evaluation; the flags are these fields."""

    model: str = setting("", "hub id, MLX folder or .gguf file")
    adapter_path: str | None = setting(None, "folder of the adapter; without it, no column 'unlearned'")
    forget: tuple[str, ...] = setting((), "JSONL files of questions that should be forgotten")
    retain: tuple[str, ...] = setting((), "JSONL files of general questions whose answers should stay")
    neighbours: tuple[str, ...] = setting((), "JSONL files of questions near the topic, to stay as well")
    benchmark: tuple[str, ...] = setting(
        (), "tofu:forget10, muse:News, rwku:2_Confucius, mmlu, wmdp:bio, qa:GROUP@FILE; …@FOLDER reads local files"
    )
    benchmark_questions: int = setting(0, "ask only so many questions of each group of a benchmark (0: all)")
    retrained: str | None = setting(None, "model that never saw the forget questions: TOFU's forget quality, PrivLeak")
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
    out: str = setting("", "folder for results.json, samples.jsonl, results.png and results.svg")


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Ask every model everything; write results.json, samples.jsonl and pictures; return the first.

    Raises:
        ConfigError, DataError, ContextError: before a model is loaded.  ModelError: model or adapter.
    """
    _check(settings)
    prompts = _reverse_prompts(settings)
    groups = _groups(settings)
    benchmarks = load_benchmarks(settings.benchmark, settings.benchmark_questions)
    asked = [Asked(group, query) for group, queries in groups.items() for query in queries]
    forget = groups.get(FORGET, [])
    count = len(forget)
    tried = min(settings.reverse_questions or count, count)
    spread = [forget[i * count // tried] for i in range(tried)]
    for number, prompt in enumerate(prompts, 1):
        asked += [Asked(f"{FORGET}, reverse {number}", query, prompt) for query in spread]
    contexts = _contexts(settings, forget)
    beside = report.load_beside(settings.beside, (BASE, IN_CONTEXT, UNLEARNED, RETRAINED))
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    meta = _meta(settings, groups, prompts) | {"benchmarks": describe(benchmarks)}

    columns, replies, meta["base_weights"] = _columns(settings, asked, contexts, benchmarks)
    scores = {name: score(asked, column, columns[BASE]) for name, column in columns.items()}
    rows, meta["worst_reverse"] = rows_of(asked, scores, settings.seed)
    more, benchmark_samples = rows_and_samples(benchmarks, replies, settings.seed)
    results = {"meta": meta, "rows": rows + more + beside}
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
    _write(Path(settings.out), results, samples + benchmark_samples)
    forget_kept(settings.out)
    return results


# --- what is asked ------------------------------------------------------------------------------------------


def _check(settings: EvaluateSettings) -> None:
    """Raise for what can be seen to be wrong before anything is read."""
    require(settings, "model", "out")
    if not settings.benchmark:
        require(settings, "forget")
    elif not settings.forget and (settings.retain or settings.neighbours or settings.reverse_prompts):
        raise ConfigError("--retain, --neighbours and --reverse-prompts go with --forget, which is missing")
    for name in ("max_tokens", "batch_size"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected 1 or more")
    for name in ("seed", "reverse_questions", "benchmark_questions"):
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
    groups = {FORGET: load_queries(settings.forget, "forget")} if settings.forget else {}
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


def _columns(
    settings: EvaluateSettings, asked: list[Asked], contexts: list[Context], benchmarks: Benchmarks
) -> tuple[dict[str, Column], dict[str, dict[str, list[Reply]]], str]:
    """Each model's column, its replies to the benchmarks, and the hash of the base.

    The base's weights serve all columns but "retrained": the adapter goes on last.
    """
    from .answers import column
    from .context import render
    from .model import apply_adapter, load_model, weights_hash
    from .teacher import context_of

    model, tokenizer, folder = load_model(settings.model, trust_remote_code=settings.trust_remote_code)
    base_hash = weights_hash(model)
    columns: dict[str, Column] = {}
    replies: dict[str, dict[str, list[Reply]]] = {}

    def add(name: str, chosen: Sequence[Context | None], identity: Sequence[str], same_base: bool = True) -> None:
        prompts = [render(tokenizer, a.text, c, settings.system) for a, c in zip(asked, chosen, strict=True)]
        if asked:
            columns[name] = column(name, model, tokenizer, asked, prompts, chosen, columns.get(BASE), settings)
        context = contexts[0] if name == IN_CONTEXT else None  # a benchmark's questions name none
        replies[name] = replies_of(name, model, tokenizer, benchmarks, context, settings, identity, same_base)

    no_context: list[Context | None] = [None] * len(asked)
    add(BASE, no_context, [base_hash])
    if contexts:
        named = settings.context_name is None
        chosen = [context_of(a.query, contexts, "teacher") if named else contexts[0] for a in asked]
        add(IN_CONTEXT, chosen, [base_hash])
    if settings.adapter_path is not None:
        _same_model(apply_adapter(model, settings.adapter_path), base_hash, folder, settings)
        add(UNLEARNED, no_context, [base_hash, file_hash(Path(settings.adapter_path) / "adapters.safetensors")])
    if settings.retrained is not None:
        del model  # two models need not fit into memory
        model, tokenizer, _ = load_model(settings.retrained, trust_remote_code=settings.trust_remote_code)
        add(RETRAINED, no_context, [weights_hash(model)], same_base=False)
    return columns, replies, base_hash


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
        "metrics": {metric.key: metric.definition for metric in measures.MEASURES},
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
    for name in ("results.png", "results.svg"):
        picture(results, out / name)
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
