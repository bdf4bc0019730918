"""Compare methods fairly: the same base, questions, LoRA and steps, and as many trials for each to find its best.

    python -m duet_mlx.compare -c examples/compare/config.yaml            # goes on where it was cut off
    python -m duet_mlx.compare -c examples/compare/config.yaml --quick    # a small form of it, into <out>-quick

Each method has a grid of settings. Every trial is trained, and scored on the validation questions; the best one is
asked the test questions. A sweep has a grid too, but each of its trials is asked them. Every run has a folder
of its own with config.yaml, for `python -m duet_mlx.train -c`, its adapter and its evaluations.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .compare_grid import CompareSettings, Trial, all_trials, other_seed
from .compare_table import Result, shift, table_of
from .data import file_hash
from .errors import ConfigError, DivergedError, TrainingError, run_cli
from .evaluate import BASE, IN_CONTEXT, UNLEARNED, EvaluateSettings, evaluate
from .files import write_text
from .methods import METHODS, states_of
from .metrics import FORGET, TRAINED
from .result_files import KEPT
from .settings import parse, require
from .train import TrainSettings


def main() -> None:
    """Run what has not been run, then show the table."""
    settings = parse(CompareSettings, "python -m duet_mlx.compare", __doc__ or "")
    results = compare(settings)
    print(results["table"])
    for failed in results["failed"]:
        print(f"failed: {failed['name']} {failed['values']}: {failed['reason']}")


def compare(settings: CompareSettings) -> dict[str, Any]:
    """Run the trials that are not there yet, and write results.json, table.md and pictures; returns the first.

    Raises:
        ConfigError, DataError, …: what is wrong with any run, before the first of them starts.
    """
    require(settings, "train", "evaluate", "methods", "out")
    if settings.seeds < 1 or settings.best < 1:
        raise ConfigError(f"--seeds {settings.seeds}, --best {settings.best}: expected 1 or more")
    if settings.quick:
        settings = replace(settings, out=settings.out.rstrip("/") + "-quick", sweeps={}, seeds=1)
    grids, swept = all_trials(settings)
    test = parse(EvaluateSettings, "python -m duet_mlx.evaluate", "Evaluate.", ["-c", settings.evaluate])
    if test.context is None and not all(grids.values()):
        raise ConfigError(f"--evaluate {settings.evaluate}: names no context, so in-context unlearning has no row")
    chosen, failed, tried = choose(grids, test)
    ranked = sorted(chosen, key=lambda trial: -tried[trial.name][tuple(trial.values.items())])
    again = [other_seed(trial, k) for trial in ranked[: settings.best] for k in range(1, settings.seeds)]

    def report(trials: Sequence[Trial]) -> list[Result]:
        results = []
        for trial in trials:
            if reason := run(trial):
                failed.append({"name": trial.name, "values": trial.values, "reason": reason})
            else:
                results.append(asked(trial, test, settings.trained))
        return results

    shown = report([*chosen, *(trial for trials in swept.values() for trial in trials)])
    if not shown:
        raise TrainingError(f"no run came to an end; the first: {failed[0]['reason']}")
    return gather(settings, shown, report(again), failed, tried)


# --- runs ---------------------------------------------------------------------------------------------------


def run(trial: Trial) -> str:
    """Train unless that was done; why it failed, or "". What it cost is kept in run.json."""
    import mlx.core as mx

    from .once import essence, train_once

    s = trial.settings
    files = [f for f in (*s.forget, *s.retain, *s.neighbours, s.context, s.refusals) if f and Path(f).is_file()]
    done = {"settings": essence(asdict(s)), "files": {str(file): file_hash(file) for file in files}}
    record = _json(trial.folder / "run.json")
    if {key: record.get(key) for key in done} == done and "seconds" in record:
        return record.get("failed", "")
    print(f"\n== {trial.name} {trial.values or ''} seed {s.seed}", flush=True)
    _lend_targets(trial)
    start, before = time.monotonic(), record.get("seconds", 0.0) if "cut_off" in record else 0.0
    mx.reset_peak_memory()
    failed = ""
    try:
        train_once(s)
    except DivergedError as error:  # a run that diverges is a result, and the others go on
        failed = str(error)
    except KeyboardInterrupt:
        spent = before + time.monotonic() - start
        write_text(trial.folder / "run.json", json.dumps({"cut_off": True, "seconds": spent}) + "\n")
        raise
    cost = {"seconds": before + time.monotonic() - start, "peak_memory_gb": mx.get_peak_memory() / 1e9}
    record = {**done, **cost, **({"failed": failed} if failed else {})}
    write_text(trial.folder / "run.json", json.dumps(record, indent=1) + "\n")
    mx.clear_cache()
    return failed


def _lend_targets(trial: Trial) -> None:
    """Copy targets from the run that was last trained; `train` reads them only if they are the very ones it needs."""
    mine = Path(trial.settings.adapter_path)
    if (mine / "targets.safetensors").is_file():
        return

    def kind(settings: TrainSettings) -> tuple[str, str]:
        return METHODS[settings.method].labels, states_of(settings)

    for config in sorted(
        _runs(trial).glob("**/adapters/adapter_config.json"), key=lambda p: p.stat().st_mtime, reverse=True
    ):
        saved = _json(config)["settings"]
        other = replace(TrainSettings(), method=saved["method"], retain_loss=saved["retain_loss"])
        if kind(other) == kind(trial.settings):
            mine.mkdir(parents=True, exist_ok=True)
            for file in config.parent.glob("*targets.safetensors"):
                shutil.copy(file, mine / file.name)
            return


def _runs(trial: Trial) -> Path:
    """The folder of all runs."""
    return next(parent for parent in trial.folder.parents if parent.name == "runs")


def evaluated(trial: Trial, settings: EvaluateSettings, name: str) -> list[dict[str, Any]]:
    """The rows of an evaluation of this run under this name: those that are there if nothing has changed since."""
    adapter = Path(trial.settings.adapter_path)
    out = trial.folder / name
    settings = replace(settings, adapter_path=str(adapter), out=str(out), overwrite=True)
    results, file = _json(out / "results.json"), out / "results.json"
    if results and file.stat().st_mtime > (adapter / "adapters.safetensors").stat().st_mtime:
        files = {path: digest for group in results["meta"]["data"].values() for path, digest in group.items()}
        same = results["meta"]["settings"] == json.loads(json.dumps(asdict(settings)))
        if same and all(Path(path).is_file() and file_hash(path) == digest for path, digest in files.items()):
            return results["rows"]
    _lend_answers(trial, out)
    return evaluate(settings)["rows"]


def _lend_answers(trial: Trial, out: Path) -> None:
    """Copy what the base answered from the last evaluation of the same name; `evaluate` takes it only if it fits."""
    if (out / KEPT).exists():
        return
    folders = sorted(_runs(trial).glob(f"**/{out.name}/{KEPT}"), key=lambda path: path.stat().st_mtime)
    for file in folders[-1].glob("*") if folders else []:
        if UNLEARNED not in file.name:
            (out / KEPT).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, out / KEPT / file.name)


def choose(grids: dict[str, list[Trial]], test: EvaluateSettings) -> tuple[list[Trial], list[dict], dict]:
    """The best trial of each method by performance shift on the validation questions; what failed; all shifts."""
    chosen, failed = [], []
    tried: dict[str, dict[tuple, float]] = {}
    for name, trials in grids.items():
        shifts: dict[tuple, float] = {}
        for trial in trials:
            if reason := run(trial):
                failed.append({"name": name, "values": trial.values, "reason": reason})
                continue
            s = trial.settings
            if not s.valid_forget and len(trials) > 1:
                raise ConfigError("--train: names no valid_forget, by which the best of several trials is chosen")
            shown = only(test, model=s.model, forget=s.valid_forget or s.forget, retain=s.valid_retain or s.retain)
            shifts[tuple(trial.values.items())] = shift(evaluated(trial, shown, "valid"), UNLEARNED)
        tried[name] = shifts
        if shifts:
            best = max(shifts, key=lambda values: shifts[values])  # of equal ones the first
            chosen.append(next(trial for trial in trials if tuple(trial.values.items()) == best))
    return chosen, failed, tried


def only(test: EvaluateSettings, **asked: Any) -> EvaluateSettings:
    """The same evaluation of the questions `asked` and of nothing else."""
    nothing: dict[str, Any] = dict.fromkeys(("trained", "retain", "neighbours", "also", "benchmark", "beside"), ())
    nothing |= dict.fromkeys(("context", "topic", "context_name", "reverse_prompts", "retrained"))
    nothing |= dict.fromkeys(("forget_questions", "retain_questions", "neighbour_questions"), 0)
    return replace(test, **{**nothing, **asked})


def asked(trial: Trial, test: EvaluateSettings, trained: bool) -> Result:
    """What a run answers to the test questions, and, if wanted, to the forget questions that it was trained on."""
    s = trial.settings
    test = replace(test, model=s.model, trained=() if trained else test.trained)
    rows = evaluated(trial, test, "test")
    if trained:
        of_trained = [row for row in evaluated(trial, only(test, forget=s.forget), "trained") if row["group"] == FORGET]
        rows = rows + [{**row, "group": TRAINED} for row in of_trained]
    return Result(trial.name, trial.values, s.seed, rows, _json(trial.folder / "run.json"))


# --- what is kept -------------------------------------------------------------------------------------------


def gather(
    settings: CompareSettings, shown: Sequence[Result], again: Sequence[Result], failed: list[dict], tried: dict
) -> dict[str, Any]:
    """results.json, table.md and pictures: a row for each result shown, lines for those run again with other seeds."""
    from .picture import picture

    rows = [row for row in shown[0].rows if row["model"] in (BASE, IN_CONTEXT)]
    for result in shown:
        rows += [{**row, "model": result.label} for row in result.rows if row["model"] == UNLEARNED]
    table = table_of(rows, shown, again)
    results = {
        "meta": {
            "settings": asdict(settings),
            "tried": {name: [{**dict(k), "shift": v} for k, v in of.items()] for name, of in tried.items()},
            "runs": [{"name": r.name, **r.values, "seed": r.seed, **r.cost} for r in (*shown, *again)],
        },
        "rows": rows,
        "table": table,
        "failed": failed,
    }
    out = Path(settings.out)
    for kind in ("png", "svg"):
        picture(results, out / f"results.{kind}")
    write_text(out / "table.md", table + "\n")
    write_text(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results


def _json(path: Path) -> dict[str, Any]:
    """A JSON file of ours; {} if it is not there or was cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    run_cli(main)
