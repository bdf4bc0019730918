"""One run of a comparison, and its evaluations: done once, and given what an earlier run has read already."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .benchmark_run import describe, load_benchmarks
from .compare_grid import Trial, write_config
from .data import file_hash
from .errors import DivergedError, DuetError, note
from .evaluate import UNLEARNED, EvaluateSettings, evaluate
from .files import as_json, json_of, new_name, write_files, write_text
from .kept_answers import code_hash
from .methods import METHODS, states_of, unread
from .once import essence, is_same, saved_config, train_once
from .result_files import KEPT
from .train_settings import TrainSettings

if TYPE_CHECKING:
    from .lower import LowerStates

COST = ("seconds", "peak_memory_gb")


def run(trial: Trial, earlier: LowerStates) -> str:
    """Train unless that was done; why it failed, or "". What it cost is kept in run.json.

    Args:
        earlier: what runs of this process leave to each other: what came out of the layers below the adapted ones.
    """
    import mlx.core as mx

    s, file, done = trial.settings, trial.folder / "run.json", wanted(trial)
    if there_is := record_of(trial, done):
        if there_is[0] != file:
            _copy_run(trial, *there_is)
        return there_is[1].get("failed", "")
    record = json_of(file)
    print(f"\n== {trial.name} {trial.values or ''} seed {s.seed}", flush=True)
    write_config(trial)
    _lend_targets(trial)
    # What it has cost so far, if it was this run that was cut off, or if `train_once` finds steps of it.
    there_before = is_same(s, record.get("settings")) and all(isinstance(record.get(key), float) for key in COST)
    cost_there = {key: record[key] if there_before else 0.0 for key in COST}
    same = "cut_off" in record and {key: record.get(key) for key in done} == done
    start, before = time.monotonic(), cost_there if same else dict.fromkeys(COST, 0.0)

    def cut_off(seconds: float) -> None:
        cut = {"cut_off": True, **done, **before, "seconds": seconds}
        write_text(file, json.dumps(cut, indent=1) + "\n")

    cut_off(before["seconds"])  # should this be killed, no record says of the folder that it holds a run that is whole
    mx.reset_peak_memory()
    failed, there = "", 0
    try:
        there = train_once(s, earlier)
    except DivergedError as error:  # a run that diverges is a result, and the others go on
        failed = str(error)
    except KeyboardInterrupt:
        cut_off(before["seconds"] + time.monotonic() - start)
        raise KeyboardInterrupt("what is done is kept; the same command goes on from it") from None
    cost = {"seconds": time.monotonic() - start, "peak_memory_gb": mx.get_peak_memory() / 1e9}
    if there >= s.iters and cost_there["seconds"]:
        cost = cost_there
    elif there or "cut_off" in record:
        peak = max(before["peak_memory_gb"], cost["peak_memory_gb"])
        cost = {"seconds": before["seconds"] + cost["seconds"], "peak_memory_gb": peak}
    record = {**done, **cost, **({"failed": failed} if failed else {"adapter": _adapter_hash(trial.folder)})}
    write_text(file, json.dumps(record, indent=1) + "\n")
    mx.clear_cache()
    return failed


def wanted(trial: Trial) -> dict[str, Any]:
    """What a run is known by in its run.json: the settings, and hashes of the files, that decide what comes out."""
    s = trial.settings
    listed = [*s.forget, *s.retain, *s.neighbours]
    listed += [getattr(s, name) for name in ("context", "refusals") if name not in unread(s)]
    files = [file for file in listed if file and Path(file).is_file()]
    return {"settings": essence(s), "files": {str(file): file_hash(file) for file in files}, "base": trial.base}


def record_of(trial: Trial, done: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The run.json of this run, or of the same one under another name, and what it holds, if all is as it was.

    Args:
        done: what `wanted` gives.
    """
    own = trial.folder / "run.json"
    if _is_whole(trial, own, record := json_of(own), done):
        return own, record
    for file in _newest_first(_runs(trial).glob("**/run.json")):
        if _is_whole(trial, file, record := json_of(file), done):
            return file, record
    return None


def _is_whole(trial: Trial, file: Path, record: dict[str, Any], done: dict[str, Any]) -> bool:
    """Whether a run.json is of a run of these settings, files and base that has ended, and its adapter is there."""
    s, before = trial.settings, record.get("files")
    if "cut_off" in record or not all(isinstance(record.get(key), float) for key in COST):
        return False
    if not isinstance(before, dict) or not done["files"].items() <= before.items():
        return False
    if not is_same(s, record.get("settings")) or record.get("base", trial.base) != trial.base:
        return False
    if "failed" in record:
        return not newer(s.model, file)
    if "adapter" in record and record["adapter"] != _adapter_hash(file.parent):
        return False  # trained on, spoilt, or another in its place
    saved = saved_config(file.parent / "adapters")
    if saved is None or not is_same(s, saved.get("settings")):
        return False
    targets = saved.get("targets")
    return isinstance(targets, dict) and trial.base.items() <= targets.items()


def _adapter_hash(folder: Path) -> str:
    """Of the adapter in a run's folder; "" if there is none."""
    adapter = folder / "adapters" / "adapters.safetensors"
    return file_hash(adapter) if adapter.is_file() else ""


def newer(model: str, file: Path) -> bool:
    """Whether a model on this machine was written after a file; one on the hub is not looked at."""
    path = Path(model).expanduser()
    return any(part.stat().st_mtime > file.stat().st_mtime for part in (path, *path.glob("*")) if part.is_file())


def _copy_run(trial: Trial, file: Path, record: dict[str, Any]) -> None:
    """Take the adapter and the record of the same run under another name; another adapter in this folder is kept."""
    mine = Path(trial.settings.adapter_path)
    kept = ""
    if saved_config(mine) is not None:
        kept = f"; the earlier adapter is kept in {mine.rename(new_name(mine))}"
    note(f"{trial.folder}: a copy of {file.parent}, which is the same run{kept}")
    write_config(trial)
    if "failed" not in record:
        _copy((file.parent / "adapters" / name for name in ("adapter_config.json", "adapters.safetensors")), mine)
    write_text(trial.folder / "run.json", json.dumps({**record, "same_as": str(file.parent)}, indent=1) + "\n")


# Settings that say which questions a run reads, and how; and what its targets hang on beside these and the method.
READ = (
    "forget", "retain", "neighbours", "forget_questions", "retain_questions", "neighbour_questions", "valid_forget",
    "valid_retain", "context", "topic", "answers",
)  # fmt: skip
SHAPE_TARGETS = ("model", "top_k", "candidates", "positions", "retain_context", "answer_tokens", "refusals")


def reads(settings: TrainSettings, names: tuple[str, ...] = READ) -> dict[str, Any]:
    """What is the same for all runs that read the same questions in the same way."""
    read = {name: getattr(settings, name) for name in names if name not in unread(settings)}
    return {"labels": METHODS[settings.method].labels, **read}


def _lend_targets(trial: Trial) -> None:
    """Copy targets from the last run that should have the same; `train` takes them only if it finds that they are."""
    mine = Path(trial.settings.adapter_path)
    if (mine / "targets.safetensors").is_file():
        return

    def kind(settings: TrainSettings) -> str:
        return json.dumps([states_of(settings), reads(settings, READ + SHAPE_TARGETS)])  # JSON has no tuples

    known = {field.name for field in fields(TrainSettings)}
    not_ours = (DuetError, AttributeError, KeyError, TypeError, ValueError)  # a file of another version, or spoilt
    for targets in _newest_first(_runs(trial).glob("**/adapters/targets.safetensors")):  # which a copy has not
        with suppress(*not_ours):
            saved = json_of(targets.with_name("adapter_config.json"))["settings"].items()
            if kind(TrainSettings(**{k: v for k, v in saved if k in known})) == kind(trial.settings):
                return _copy(targets.parent.glob("*targets.safetensors"), mine)


def _newest_first(files: Iterable[Path]) -> list[Path]:
    """Files by age; those that their run has taken away in the meantime are left out."""
    ages = {}
    with suppress(FileNotFoundError):  # a folder may be renamed while it is looked through
        for file in files:
            with suppress(FileNotFoundError):
                ages[file] = file.stat().st_mtime
    return sorted(ages, key=lambda file: -ages[file])


def _copy(files: Iterable[Path], folder: Path) -> None:
    """Copy files of another run, each whole or not at all: that run may be at work, in a process of its own."""
    for file in files:
        if not file.name.startswith("."):  # being written
            with suppress(FileNotFoundError):
                write_files(folder, {file.name: partial(Path.write_bytes, data=file.read_bytes())})


def _runs(trial: Trial) -> Path:
    """The folder of all runs."""
    return next(parent for parent in trial.folder.parents if parent.name == "runs")


def evaluated(trial: Trial, settings: EvaluateSettings, name: str) -> list[dict[str, Any]]:
    """The rows of an evaluation of this run under this name: those that are there if nothing has changed since."""
    adapter = Path(trial.settings.adapter_path)
    out = trial.folder / name
    settings = replace(settings, adapter_path=str(adapter), out=str(out), overwrite=True)
    results, file = json_of(out / "results.json"), out / "results.json"
    made_of = (adapter / "adapters.safetensors", settings.retrained)
    meta = results.get("meta") if "rows" in results else None
    if isinstance(meta, dict) and not any(newer(str(made), file) for made in made_of if made):
        files = {path: digest for group in (meta.get("data") or {}).values() for path, digest in group.items()}
        here = _adapter_hash(trial.folder)
        if (
            meta.get("settings") == as_json(asdict(settings))
            and meta.get("adapter_hash", here) == here
            and all(Path(path).is_file() and file_hash(path) == digest for path, digest in files.items())
            and meta.get("benchmarks") == describe(load_benchmarks(settings.benchmark, settings.benchmark_questions))
        ):
            if meta.get("code") != code_hash():
                _note_other_code()
            return results["rows"]
    _lend_answers(trial, out)
    return evaluate(settings, pictures=False)["rows"]  # a hundred runs: the comparison's own is looked at


@cache
def _note_other_code() -> None:
    """Once a process."""
    note("note: evaluations by another version of this package are kept; delete a run's folder to have it made anew")


def _lend_answers(trial: Trial, out: Path) -> None:
    """Copy what the base answered last in an evaluation of the same name; `evaluate` takes it only if it fits.

    Of a run that is a copy of another, also what the model answered there.
    """
    if (
        not (out / KEPT).exists()
        and (of_same := Path(str(json_of(trial.folder / "run.json").get("same_as", "")), out.name, KEPT)).is_dir()
    ):
        return _copy(of_same.glob("*"), out / KEPT)
    newest: dict[str, Path] = {}
    for file in _newest_first(_runs(trial).glob(f"**/{out.name}/{KEPT}/*")):
        newest.setdefault(file.name, file)
    lent = (file for name, file in newest.items() if UNLEARNED not in name and file.parent != out / KEPT)
    _copy(lent, out / KEPT)
