"""Evaluate an adapter on questions it was not trained on: base | base + context | unlearned.

    python -m duet_mlx.evaluate --model M --adapter-path A --forget F.jsonl --retain R.jsonl --out DIR
    python -m duet_mlx.evaluate --model M --adapter-path A --benchmark tofu:forget10 --out DIR

Every column is the same base in memory: it answers, answers behind --context, then the adapter is put on it.
Groups: forget, those trained on (--trained), general (--retain), neighbours, those of --also, and forget questions
behind each reverse prompt. Perplexity costs a pass of the base over every answer that is not its own, decoding nothing.
Answers are kept in DIR/answers on the way (kept_answers.py): a run that was cut off goes on from them.
metrics.py says what is measured, scores.py joins answers and metrics, report.py shows them; of benchmarks, these are
measures.py, benchmark_metrics.py and benchmark_scores.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import report
from .benchmark_run import Benchmarks, check_prompts, describe, load_benchmarks, replies_of, rows_and_samples
from .data import Query, digest, file_hash, spread
from .errors import ConfigError, ModelError, note, run_cli
from .files import make_folder, only_run_in
from .groups import groups_of, reverse_prompts
from .kept_answers import code_hash
from .metrics import FORGET, TRAINED
from .provenance import described, trained_on
from .result_files import KEPT, SAMPLES, check_free, finite, write
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
    forget: tuple[str, ...] = setting((), "JSONL files of questions that should be forgotten, held out from training")
    trained: tuple[str, ...] = setting((), "JSONL files of forget questions that the adapter was trained on")
    retain: tuple[str, ...] = setting((), "JSONL files of general questions whose answers should stay")
    neighbours: tuple[str, ...] = setting((), "JSONL files of questions near the topic, to stay as well")
    forget_questions: int = setting(0, "ask only so many of --forget, evenly spread over the files (0: all)")
    retain_questions: int = setting(0, "the same for --retain")
    neighbour_questions: int = setting(0, "the same for --neighbours")
    also: tuple[str, ...] = setting(
        (), "GROUP=questions.jsonl: a group of its own; to be forgotten if its name begins with forget, else to stay"
    )
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
    answers_only: bool = setting(False, "take neither perplexity nor probability of the base's words: half the time")
    batch_size: int = setting(128, "questions decoded together: changes speed and memory alone")
    seed: int = setting(0, "seed of the bootstrap; answers are greedy and need none")
    beside: tuple[str, ...] = setting((), "NAME=results.json: its 'unlearned' as one more column")
    any_base: bool = setting(False, "take an adapter made on other bits (a base dequantized by another processor)")
    overwrite: bool = setting(False, "replace the results that --out holds")
    trust_remote_code: bool = setting(False, "run code that comes with the model's tokenizer")
    out: str = setting("", "folder for results.json, samples.jsonl and pictures")


def evaluate(settings: EvaluateSettings, pictures: bool = True) -> dict[str, Any]:
    """Ask every model everything; write results.json, samples.jsonl and, if wanted, pictures; return the first.

    Raises:
        ConfigError, DataError, ContextError, ModelError: before anything is asked, as where another run writes to
            --out; ModelError also for a model whose logits are not finite.  TrainingError: no room to write.
        KeyboardInterrupt: with a line that says how to go on.
    """
    check_settings(settings)
    groups, prompts, asked, contexts, benchmarks = _read(settings)
    beside, metas = report.load_beside(settings.beside, (BASE, IN_CONTEXT, UNLEARNED, RETRAINED))
    for folder in (Path(settings.out), Path(settings.out) / KEPT):
        make_folder(folder, f"--out {settings.out}")
    with only_run_in(Path(settings.out), "--out"):
        check_free(settings.out, settings.overwrite)  # a run that held the folder until now has filled it
        count = {name: len(queries) for name, queries in groups.items()}
        meta = described(settings, count, [text for _, text in prompts])
        meta["benchmarks"] = describe(benchmarks)
        meta["code"] = code_hash()

        try:
            columns, replies, meta["base_weights"] = _columns(settings, asked, contexts, benchmarks, meta)
        except KeyboardInterrupt:
            kept = Path(settings.out) / KEPT
            raise KeyboardInterrupt(f"answers so far are kept in {kept}; the same command goes on from them") from None
        judged = not settings.answers_only
        scores = {name: score(asked, column, columns[BASE], judged) for name, column in columns.items()}
        rows, meta["worst_reverse"] = rows_of(asked, scores, settings.seed)
        more, benchmark_samples = rows_and_samples(benchmarks, replies, settings.seed)
        results = {"meta": meta, "rows": [*map(finite, rows + more), *beside]}
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
        report.note_unlike(metas, meta)
        write(Path(settings.out), results, [*map(finite, samples + benchmark_samples)], pictures)
        return results


# --- what is asked ------------------------------------------------------------------------------------------


def check_settings(settings: EvaluateSettings) -> None:
    """Raise for what can be seen to be wrong before anything is read."""
    require(settings, "model", "out")
    if not settings.benchmark:
        require(settings, "forget")
    elif not settings.forget and (
        settings.trained or settings.retain or settings.neighbours or settings.also or settings.reverse_prompts
    ):
        names = "--trained, --retain, --neighbours, --also and --reverse-prompts"
        raise ConfigError(f"{names} go with --forget, which is missing")
    for name in ("max_tokens", "batch_size"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected 1 or more")
    for name in (
        "seed", "reverse_questions", "benchmark_questions", "forget_questions", "retain_questions",
        "neighbour_questions",
    ):  # fmt: skip
        if getattr(settings, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected 0 or more")
    for name in ("topic", "context_name"):
        if getattr(settings, name) is not None and settings.context is None:
            raise ConfigError(f"--{name.replace('_', '-')} says something about --context, which is missing")
    check_free(settings.out, settings.overwrite)
    adapter = settings.adapter_path
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise ModelError(f"--adapter-path {adapter}: no adapter_config.json in it")


def check_questions(settings: EvaluateSettings) -> None:
    """Read all that is asked, and put it into tokens, as `evaluate` does before its first answer.

    Raises:
        ConfigError, DataError, ContextError, ModelError: what is wrong with it; no weights are read.
    """
    from .model import load_tokenizer

    _, _, asked, contexts, benchmarks = _read(settings)
    tokenizer, folder = load_tokenizer(settings.model, settings.trust_remote_code)
    _all_prompts(settings, asked, contexts, benchmarks, tokenizer, folder)


def _read(
    settings: EvaluateSettings,
) -> tuple[dict[str, list[Query]], list[tuple[str, str]], list[Asked], list[Context], Benchmarks]:
    """The groups, the (place, reverse prompt), every question that is asked, the contexts, and the benchmarks."""
    prompts = reverse_prompts(settings.reverse_prompts)
    groups = groups_of(settings)
    benchmarks = load_benchmarks(settings.benchmark, settings.benchmark_questions)
    asked = [Asked(group, query) for group, queries in groups.items() for query in queries]
    forget = groups.get(FORGET, [])  # what is held out is asked behind reverse prompts
    behind = spread(forget, min(settings.reverse_questions, len(forget)), "--reverse-questions")
    for number, (place, prompt) in enumerate(prompts, 1):
        asked += [Asked(f"{FORGET}, reverse {number}", query, prompt, place) for query in behind]
    return groups, prompts, asked, contexts_of(settings, forget + groups.get(TRAINED, [])), benchmarks


def contexts_of(settings: EvaluateSettings, forget: list[Query]) -> list[Context]:
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
    settings: EvaluateSettings,
    asked: list[Asked],
    contexts: list[Context],
    benchmarks: Benchmarks,
    meta: dict[str, Any],
) -> tuple[dict[str, Column], dict[str, dict[str, list[Reply]]], str]:
    """Each model's column, its replies to the benchmarks, and the hash of the base.

    The base's weights serve all columns but "retrained": the adapter goes on last.
    """
    from .answers import column
    from .model import apply_adapter, check_adapter, load_model, weights_hash

    model, tokenizer, folder = load_model(settings.model, trust_remote_code=settings.trust_remote_code)
    base_hash = weights_hash(model)
    if settings.adapter_path is not None:
        config = check_adapter(folder, settings.adapter_path, settings.trust_remote_code)
        _check_base(config, base_hash, settings)
        meta["trained_on"] = trained_on(config, meta["data"], settings.also)
    columns: dict[str, Column] = {}
    replies: dict[str, dict[str, list[Reply]]] = {}

    def add(
        name: str,
        chosen: Sequence[Context | None],
        rendered: list[list[int]],
        identity: Sequence[str],
        same_base: bool = True,
    ) -> None:
        if asked:
            made_by = {
                "model": identity[0],
                "adapter": identity[1:],
                "tokenizer": digest([tokenizer.get_vocab(), sorted(tokenizer.eos_token_ids)]),
                **{key: meta[key] for key in ("versions", "machine")},
                "code": code_hash(),
            }
            file = Path(settings.out) / KEPT / f"{name.replace(' + ', '_')}.jsonl"
            ask = (model, tokenizer, asked, rendered, chosen, columns.get(BASE), plain if same_base else None, settings)
            columns[name] = column(name, *ask, file, made_by)
        context = contexts[0] if name == IN_CONTEXT else None  # a benchmark's questions name none
        replies[name] = replies_of(name, model, tokenizer, benchmarks, context, settings, identity, same_base)

    no_context: list[Context | None] = [None] * len(asked)
    # All before the first answer, so that no fault is found after it.
    plain, chosen, behind, read_by_other = _all_prompts(settings, asked, contexts, benchmarks, tokenizer, folder)
    add(BASE, no_context, plain, [base_hash])
    if contexts:
        add(IN_CONTEXT, chosen, behind, [base_hash])
    if settings.adapter_path is not None:
        files = [Path(settings.adapter_path) / name for name in ("adapters.safetensors", "adapter_config.json")]
        identity = [base_hash, *map(file_hash, files)]
        kind = apply_adapter(model, settings.adapter_path).get("fine_tune_type", "lora")
        add(UNLEARNED, no_context, plain, identity, same_base=kind == "lora")  # no other kind can be switched off
    if settings.retrained is not None:
        del model  # two models need not fit into memory
        model, tokenizer, _ = load_model(
            settings.retrained, trust_remote_code=settings.trust_remote_code, flag="--retrained"
        )
        add(RETRAINED, no_context, read_by_other, [weights_hash(model)], same_base=False)
    return columns, replies, base_hash


def _all_prompts(
    settings: EvaluateSettings,
    asked: list[Asked],
    contexts: list[Context],
    benchmarks: Benchmarks,
    tokenizer: Any,
    folder: Path,
) -> tuple[list[list[int]], list[Context | None], list[list[int]], list[list[int]]]:
    """The tokens of all questions, bare; the context of each, and the tokens behind it; those that --retrained reads.

    Raises:
        DataError, ContextError: what cannot be rendered or does not fit, a benchmark's prompts included.
    """
    from .context import check_fits, render
    from .model import load_tokenizer, window
    from .teacher import context_of

    def prompts(tokenizer: Any, folder: Path, chosen: Sequence[Context | None]) -> list[list[int]]:
        rendered = [render(tokenizer, a.text, c, settings.system, a.place) for a, c in zip(asked, chosen, strict=True)]
        limit = window(folder)
        for a, c, ids in zip(asked, chosen, rendered, strict=True):
            if len(ids) + settings.max_tokens - 1 > limit:  # what to do about it costs more renderings
                way_out = _way_out(tokenizer, a, c, settings, limit)
                check_fits(a.place, a.text, len(ids), settings.max_tokens, "the model's window", limit, way_out)
        return rendered

    bare: list[Context | None] = [None] * len(asked)
    named = settings.context_name is None
    chosen: list[Context | None] = [
        context_of(a.query, contexts, "teacher") if named else contexts[0] for a in asked if contexts
    ]
    plain = prompts(tokenizer, folder, bare)
    behind = prompts(tokenizer, folder, chosen) if contexts else []
    check_prompts(tokenizer, benchmarks, contexts, settings, window(folder))
    if settings.retrained is None:
        return plain, chosen, behind, []
    words, other = load_tokenizer(settings.retrained, settings.trust_remote_code, "--retrained")
    check_prompts(words, benchmarks, [], settings, window(other))
    return plain, chosen, behind, prompts(words, other, bare)


def _way_out(tokenizer: Any, asked: Asked, context: Context | None, settings: EvaluateSettings, limit: int) -> str:
    """What to shorten of a prompt that does not fit: the part that takes it beyond the limit, each put to the last."""
    from .context import render

    parts: dict[str, tuple[str, Context | None, str]] = {
        "shorten or drop the question": (asked.query.question, None, ""),
        "shorten the reverse prompt": (asked.text, None, ""),
        "shorten --system": (asked.text, None, settings.system),
        f'shorten the context "{context.name if context else ""}"': (asked.text, context, settings.system),
    }
    sizes = {way_out: len(render(tokenizer, *part, asked.place)) for way_out, part in parts.items()}
    first, *_, whole = sizes
    for way_out, size in sizes.items():
        if size > limit:
            return way_out if way_out == first else f"{sizes[first]} of them are the question: {way_out}"
    return f"lower --max-tokens to {limit - sizes[whole] + 1}, or shorten what is asked"


def _check_base(config: dict[str, Any], base_hash: str, settings: EvaluateSettings) -> None:
    """Raise ModelError for an adapter that fits by its shapes alone: it was trained on other weights.

    A GPU holds the base as it is packed and a CPU in float32, so either hash is that of the same model. A CPU of
    another kind may round once more or less where it dequantizes; only the user can know that it was so.
    """
    from .model import hash_elsewhere

    trained_on = (config.get("targets") or {}).get("model")
    if trained_on in (None, base_hash):  # None: an adapter of another program
        return
    if trained_on == hash_elsewhere(settings.model, settings.trust_remote_code):
        note("note: the adapter was trained on the same weights in another precision")
    elif settings.any_base:
        note(
            f"note: the adapter was trained on other weights ({config.get('model')}), or on the same rounded otherwise"
        )
    else:
        raise ModelError(
            f"--adapter-path {settings.adapter_path}: made for another model: the weights that it was trained on "
            f"({config.get('model')}) are not those of --model {settings.model}. Name that model, or pass --any-base "
            "if it is the same one, dequantized by another kind of processor"
        )


def main() -> None:
    """Evaluate, then show the table and a few answers side by side."""
    settings = parse(EvaluateSettings, "python -m duet_mlx.evaluate", __doc__ or "")
    results = evaluate(settings)
    report.show(results, Path(settings.out) / SAMPLES)


if __name__ == "__main__":
    run_cli(main)
