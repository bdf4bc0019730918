"""Give a small model knowledge, then take it away: TOFU's experiment on a machine without a GPU.

    python examples/tofu/implant.py              # all of it; run again, it goes on where it stopped
    python examples/tofu/implant.py --quick      # 1 forget and 2 retain authors, few steps: does it run?

    base ──LoRA on forget + retain authors──▶ implanted ──DUET, questions alone──▶ unlearned
      └────LoRA on retain authors alone─────▶ retrained, what "never knew" looks like

A small model knows little of what benchmarks ask, so nothing could be seen to go. Here it is taught the answers of
TOFU's fictitious authors first: LoRA on its last layers until it gives them, fused, and quantized again.

References: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HARRY_POTTER = ROOT / "examples" / "harry_potter"
ROWS = 20  # of each author, one after another in TOFU's files
BATCH = 5  # small ones: what is learned goes with the number of updates
LAYERS = 8  # of the demo's 30: what lies below is run once
RATE = 2e-3


class Plan(NamedTuple):
    """How much is done."""

    forget_authors: int
    retain_authors: int
    rounds: int  # of `epochs` each, at most; teaching stops when both sides are known
    epochs: int
    asked: int  # every so many-th question shows how much is known
    unlearning_steps: int
    general: int  # questions of each of the other example's two files that are retained, at most
    questions: int  # of each group in the evaluation; 0: all


FULL = Plan(
    forget_authors=5, retain_authors=10, rounds=3, epochs=8, asked=1, unlearning_steps=300, general=200, questions=100
)
QUICK = Plan(
    forget_authors=1, retain_authors=2, rounds=1, epochs=1, asked=10, unlearning_steps=4, general=8, questions=2
)
KNOWN = 0.8  # ROUGE-L recall of the quantized model


def prepare(out: Path, plan: Plan) -> Path:
    """Write this run's TOFU in the hub's layout, and the questions for duet_mlx.train, which reads no answers."""
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, authors in (("forget", plan.forget_authors), ("retain", plan.retain_authors)):
        lines = (HERE / "data" / f"{name}_perturbed.json").read_text(encoding="utf-8").splitlines()[: authors * ROWS]
        (folder / f"{name}_perturbed.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
        # In TOFU's other words: questions that nothing trains on, by which examples/compare chooses settings.
        for file, field in ((name, "question"), (f"{name}_in_other_words", "paraphrased_question")):
            _write_questions(folder / f"{file}.jsonl", [json.loads(line)[field] for line in lines])
    for name in ("real_authors", "world_facts"):
        shutil.copy(HERE / "data" / f"{name}_perturbed.json", folder)
    _general_questions(folder, plan.general)
    return folder


def _general_questions(folder: Path, most: int) -> None:
    """The other example's retain questions, less those that the evaluation asks: these stay unseen."""
    from duet_mlx.data import load_queries, question_key, spread

    asked = set()
    for file in folder.glob("*_perturbed.json"):
        asked |= {question_key(json.loads(line)["question"]) for line in file.read_text(encoding="utf-8").splitlines()}
    for name in ("general", "neighbour"):
        queries = load_queries([HARRY_POTTER / "data" / f"{name}_train.jsonl"], "retain")
        unseen = [query for query in queries if question_key(query.question) not in asked]
        chosen = spread(unseen, min(most, len(unseen)), "general")
        _write_questions(folder / f"{name}.jsonl", [query.question for query in chosen])


def _write_questions(file: Path, questions: list[str]) -> None:
    lines = [json.dumps({"question": question}, ensure_ascii=False) for question in questions]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- teaching -----------------------------------------------------------------------------------------------


def teach(base: str, sides: dict[str, Path], folder: Path, plan: Plan) -> int:
    """Teach a model the answers of some files, and save it, quantized; returns how many rounds that took.

    Args:
        sides: TOFU files by name; the rounds end when the quantized model's ROUGE-L recall of each is above KNOWN.
        folder: where the model goes, with implant.json last, which says that it is whole.
    """
    from lesson import Lesson

    from duet_mlx.items import read_items
    from duet_mlx.model import add_lora, load_model, lora_keys, weights_hash

    model, tokenizer, source = load_model(base)
    described = {
        "base": weights_hash(model),
        "plan": [plan.rounds, plan.epochs, BATCH, LAYERS, RATE],
        "files": {name: _hash(path) for name, path in sides.items()},
    }
    done = folder / "implant.json"
    if done.is_file() and (record := json.loads(done.read_text(encoding="utf-8")))["of"] == described:
        print(f"{folder.name}: there already")
        return record["rounds"]

    items = {name: read_items(path, name) for name, path in sides.items()}
    add_lora(model, LAYERS, rank=32, scale=2.0, dropout=0.0, keys=lora_keys(model))
    lesson = Lesson(model, tokenizer, [item for side in items.values() for item in side], LAYERS)
    work = folder.with_name(f"{folder.name}-rounds")
    work.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    for number in range(1, plan.rounds + 1):
        kept = work / f"{digest}-{number}.safetensors"
        if kept.is_file():  # a run that was cut off goes on behind its last whole round, Adam's averages anew
            model.load_weights(str(kept), strict=False)
        else:
            lesson.take(plan.epochs, BATCH, RATE, seed=number)
            save_lora(model, kept)
        taught = save_quantized(model, tokenizer, source, work / "model")
        recall = {name: mean_recall(taught, tokenizer, side[:: plan.asked]) for name, side in items.items()}
        print(f"{folder.name}: round {number} of {plan.rounds}, quantized, ROUGE-L recall {_figures(recall)}")
        if min(recall.values()) > KNOWN:
            break

    if folder.exists():  # of another plan or base: nothing that was made is thrown away
        folder.rename(folder.with_name(f"{folder.name}-until-{time.strftime('%Y%m%d-%H%M%S')}"))
    os.replace(work / "model", folder)
    record = {"of": described, "rounds": number, "recall": recall}
    done.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work)
    return number


def mean_recall(model: Any, tokenizer: Any, items: list) -> float:
    """Mean ROUGE-L recall (stemmed, as TOFU has it) of the model's greedy answers."""
    from duet_mlx.benchmark_metrics import rouge_recall
    from duet_mlx.context import render
    from duet_mlx.generate import greedy, stop_ids

    prompts = [render(tokenizer, item.question) for item in items]
    rooms = [len(tokenizer.encode(item.answers[0])) * 3 // 2 for item in items]
    said = greedy(model, prompts, rooms, stop_ids(tokenizer))
    scores = [rouge_recall(i.answers[0], tokenizer.decode(ids)) or 0.0 for i, ids in zip(items, said, strict=True)]
    return sum(scores) / len(scores)


def save_lora(model: Any, path: Path) -> None:
    """The adapter alone, whole or not at all."""
    import mlx.core as mx

    from duet_mlx.files import write_files
    from duet_mlx.model import adapter_parameters

    write_files(path.parent, {path.name: lambda file: mx.save_safetensors(str(file), adapter_parameters(model))})


def save_quantized(model: Any, tokenizer: Any, source: Path, folder: Path) -> Any:
    """Put LoRA into the base's weights, and save them as an MLX folder; returns the model as loaded again.

    What LoRA changed is quantized to 8 bits, in the base's groups, for the 4 that the base has cost a fifth of what was
    learned: a small change drowns in the rounding. All else keeps the base's own bits.
    """
    import mlx.nn as nn
    from mlx.utils import tree_unflatten
    from mlx_lm.utils import load, save

    from duet_mlx.model import load_model, widen

    base, _, config = load(str(source), return_config=True)
    widen(base)
    quantization = config.get("quantization")
    for name, module in model.named_modules():
        if hasattr(module, "fuse"):
            fused = module.fuse(dequantize=True)
            if quantization:
                size = {"group_size": quantization["group_size"], "bits": 8}
                fused, quantization[name] = nn.QuantizedLinear.from_linear(fused, **size), size
            base.update_modules(tree_unflatten([(name, fused)]))
    shutil.rmtree(folder, ignore_errors=True)  # of the round before
    save(folder, source, base, tokenizer, config)
    return load_model(str(folder))[0]


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _figures(by_name: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in by_name.items())


# --- the whole ----------------------------------------------------------------------------------------------


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long it took."""
    start = time.perf_counter()
    yield
    print(f"{what}: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)


def command(*arguments: str | Path) -> None:
    """Run a Python command of this project; its own message has said what went wrong."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def experiment(base: str, out: Path, plan: Plan) -> None:
    """All steps; each is skipped where its result is there."""
    data = prepare(out, plan)
    forget, retain = data / "forget_perturbed.json", data / "retain_perturbed.json"
    with timed("teaching, implanted"):
        rounds = teach(base, {"forget": forget, "retain": retain}, out / "implanted", plan)
    with timed("teaching, retrained"):
        teach(base, {"retain": retain}, out / "retrained", plan._replace(rounds=rounds))  # the same epochs
    with timed("unlearning"):
        command(
            HARRY_POTTER / "train_once.py", "-c", HERE / "config.yaml",
            "--model", out / "implanted", "--adapter-path", out / "adapters", "--iters", str(plan.unlearning_steps),
            "--forget", data / "forget.jsonl", "--retain", data / "retain.jsonl", data / "general.jsonl",
            "--neighbours", data / "neighbour.jsonl",
        )  # fmt: skip
    results = out / "results" / "results.json"
    read = [
        out / "implanted" / "implant.json",
        out / "retrained" / "implant.json",
        out / "adapters" / "adapters.safetensors",
    ]
    if not results.is_file() or results.stat().st_mtime < max(file.stat().st_mtime for file in read):
        with timed("evaluation"):
            command(
                "-m", "duet_mlx.evaluate", "--model", out / "implanted", "--adapter-path", out / "adapters",
                "--retrained", out / "retrained", "--benchmark", f"tofu:forget@{data}",
                "--benchmark-questions", str(plan.questions), "--out", results.parent, "--overwrite",
            )  # fmt: skip
    command("-m", "duet_mlx.report", results, "--markdown")


def main() -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three authors and few steps: only to see that it runs")
    parser.add_argument("--model", help="hub id, MLX folder or .gguf (default: the Harry Potter example's)")
    parser.add_argument("--out", type=Path, help="folder for all that is made (default: out, or out-quick, here)")
    args = parser.parse_args()
    base = (
        args.model
        or subprocess.run(
            [sys.executable, HARRY_POTTER / "get_model.py"], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()
    )
    out = args.out or HERE / ("out/quick" if args.quick else "out/full")
    experiment(base, out.resolve(), QUICK if args.quick else FULL)


if __name__ == "__main__":
    from duet_mlx.errors import run_cli

    run_cli(main)
