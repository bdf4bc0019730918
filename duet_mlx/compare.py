"""Compare methods fairly: the same base, questions, LoRA and steps, and as many trials for each to find its best.

    python -m duet_mlx.compare -c examples/compare/config.yaml            # goes on where it was cut off
    python -m duet_mlx.compare -c examples/compare/config.yaml --quick    # a small form of it, into <out>-quick
    python -m duet_mlx.compare -c examples/compare/config.yaml --only duet npo    # a part: several at once share a GPU
    python -m duet_mlx.compare -c examples/compare/config.yaml --dry-run  # what is there, and what is to come

Each method has a grid of settings. Every trial is trained, and scored on the validation questions; the best one is
asked the test questions. A sweep has a grid too, but each of its trials is asked some of them, for a table of its own.
Every run has a folder of its own with config.yaml, for `python -m duet_mlx.train -c`, its adapter and its evaluations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compare_checks import check_inputs, check_methods, check_validation, chosen_from, evaluation_of, note_choice
from .compare_grid import CompareSettings, Trial, all_trials, folder_of, names_to_run, other_seed
from .compare_runs import evaluated, record_of, run, wanted
from .compare_table import LEGEND, Result, failed_lines, points_of, report_of, rows_of, shift, table_of
from .data import load_queries
from .errors import ConfigError, TrainingError, note, run_cli
from .evaluate import UNLEARNED, EvaluateSettings
from .files import as_json, json_of, make_folder, new_name, only_run_in, write_text
from .groups import GROUPS, groups_of
from .metrics import FORGET, TRAINED
from .provenance import provenance
from .settings import parse, require

if TYPE_CHECKING:
    from .lower import LowerStates
    from .train_settings import TrainSettings


def main() -> None:
    """Run what has not been run, then show the table."""
    settings = parse(CompareSettings, "python -m duet_mlx.compare", __doc__ or "")
    results = compare(settings)
    print(results["table"] or f"{', '.join(settings.only)}: done; the same command without --only makes the table")
    for failed in results["failed"]:
        print(f"failed: {failed['name']} {failed['values']}: {failed['reason']}")


def compare(settings: CompareSettings) -> dict[str, Any]:
    """Run the trials that are not there yet, and write results.json, table.md and pictures; returns the first.

    With --only its table is empty, and none of these is written; with --dry-run it says what is to come.

    Raises:
        ConfigError, DataError, …: what is wrong with any run, before the first of them starts; ConfigError as well
            where another process runs one of them.
    """
    require(settings, "train", "evaluate", "methods", "out")
    if settings.seeds < 1 or settings.best < 1:
        raise ConfigError(f"--seeds {settings.seeds}, --best {settings.best}: expected 1 or more")
    for name in ("valid_questions", "sweep_questions"):
        if getattr(settings, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected 0 or more")
    if settings.quick:
        whole = settings.out if Path(settings.out).name.strip(".") else str(Path(settings.out).resolve())
        settings = replace(settings, out=whole.rstrip("/") + "-quick", sweeps={}, seeds=1, trained=False, also=())
    with ExitStack() as held:
        for name in () if settings.dry_run else names_to_run(settings):
            folder = folder_of(settings, name)
            make_folder(folder, f"--out {settings.out}")
            held.enter_context(only_run_in(folder, "--out"))
        return _compare(settings)


def _compare(settings: CompareSettings) -> dict[str, Any]:
    """`compare`, while no other process runs anything of the same names."""
    grids, swept = all_trials(settings)
    trials = [trial for part in (grids, swept) for trials in part.values() for trial in trials]
    test = evaluation_of(settings)
    if test.context is None and not all(grids.values()):
        raise ConfigError(f"--evaluate {settings.evaluate}: names no context, so in-context unlearning has no row")
    if not trials:
        raise ConfigError("methods: context alone trains nothing; duet_mlx.evaluate without an adapter shows it")
    if settings.trained:  # what `asked` asks instead
        test = replace(test, trained=())
    check_validation(settings, grids)
    test = check_inputs(settings, trials, test)
    base = check_methods(trials)
    if any(chosen_from(settings, of) for of in grids.values()):
        note_choice(settings, trials, test)
    grids, swept = (
        {name: [trial._replace(base=base) for trial in trials] for name, trials in part.items()}
        for part in (grids, swept)
    )
    if settings.dry_run:
        return {"table": planned(settings, grids, swept, test), "failed": []}
    of_sweeps = asked_of_sweeps(test, settings.sweep_questions)
    earlier: LowerStates = {}
    chosen, failed, tried = choose(settings, grids, test, earlier)

    def report(trials: Sequence[Trial], ask: Callable[[Trial], Result]) -> list[Result]:
        results = []
        for trial in trials:
            if reason := run(trial, earlier):
                failed.append({"name": trial.name, "values": trial.values, "reason": reason})
            else:
                results.append(ask(trial))
        return results

    again: list[Trial] = []
    if settings.seeds > 1 and not settings.only:
        ranked = sorted(chosen, key=lambda trial: -max(map(shift_of, tried[trial.name])))
        again = [other_seed(trial, k) for trial in ranked[: settings.best] for k in range(1, settings.seeds)]
    shown = report(chosen, lambda trial: asked(trial, test, settings.trained))
    ablations = [trial for trials in swept.values() for trial in trials]
    hours_to_come = (ablations or again) and not settings.only
    if shown and hours_to_come and not (Path(settings.out) / "results.json").exists():  # that may be of more
        gather(settings, shown, [], [], failed, tried)
        note(f"the methods are compared in {settings.out}/table.md; sweeps and other seeds follow")
    swept_results = report(ablations, lambda trial: asked(trial, of_sweeps, trained=False, name="sweep"))
    if settings.only:
        return {"table": "", "failed": failed}
    if not (shown or swept_results):
        raise TrainingError(f"no run came to an end; the first: {failed[0]['reason']}")
    seeds = report(again, lambda trial: asked(trial, test, trained=False))
    return gather(settings, shown, swept_results, seeds, failed, tried)


def planned(
    settings: CompareSettings, grids: dict[str, list[Trial]], swept: dict[str, list[Trial]], test: EvaluateSettings
) -> str:
    """What is there and what is to come, a line for each name, as --dry-run prints it."""
    lines, to_come = [], []
    for name, trials in (grids | swept).items():
        there = diverged = 0
        for trial in trials:
            done = wanted(trial)
            if found := record_of(trial, done):
                there, diverged = there + 1, diverged + ("failed" in found[1])
            elif done not in to_come:
                to_come.append(done)
        if trials:
            more = f", {diverged} of them diverged" if diverged else ""
            lines.append(f"{name}: {there} of {len(trials)} runs there{more}")
    steps = sum(done["settings"]["iters"] for done in to_come)
    lines.append(f"to train: {len(to_come)} runs, {steps:,} steps at most")
    if (best := min(settings.best, sum(map(bool, grids.values())))) and settings.seeds > 1 and not settings.only:
        lines.append(f"then {settings.seeds - 1} more seeds of the {best} best methods, those that are there left out")

    def count(asked: EvaluateSettings) -> int:
        return sum(map(len, groups_of(asked).values()))

    if tried := [trials[0] for trials in grids.values() if trials and chosen_from(settings, trials)]:
        lines.append(f"questions to choose by: {count(validation_of(settings, tried[0].settings, test))} a trial")
    if any(grids.values()):
        lines.append(
            f"questions of the test: {count(test)} a method; reverse prompts, benchmarks and --trained add to it"
        )
    if swept:
        lines.append(f"questions of a sweep: {count(asked_of_sweeps(test, settings.sweep_questions))} a run")
    return "\n".join(lines)


# --- which is best, and what it says ---------------------------------------------------------------------


def choose(
    settings: CompareSettings, grids: dict[str, list[Trial]], test: EvaluateSettings, earlier: LowerStates
) -> tuple[list[Trial], list[dict], dict]:
    """The best trial of each method by performance shift on the validation questions; what failed; all trials.

    Args:
        test: how questions are asked.  earlier: as in `compare_runs.run`.
    """
    chosen, failed = [], []
    tried: dict[str, list[Result]] = {}
    for name, trials in grids.items():
        ended: list[tuple[Trial, Result]] = []
        if not chosen_from(settings, trials):
            chosen += trials  # whether it comes to an end is seen when it is asked the test questions
            continue
        for trial in trials:
            if reason := run(trial, earlier):
                failed.append({"name": name, "values": trial.values, "reason": reason})
            else:
                rows = evaluated(trial, validation_of(settings, trial.settings, test), "valid")
                ended.append((trial, result_of(trial, rows)))
        tried[name] = [result for _, result in ended]
        if ended:
            best, result = max(ended, key=lambda one: shift_of(one[1]))  # of equal ones the first
            chosen.append(best)
            what = best.values or "its one trial"
            note(f"{name}: {what} is the best of {len(ended)}, shift {shift_of(result):.1f}")
    return chosen, failed, tried


def shift_of(result: Result) -> float:
    """The performance shift of a run; 0 where nothing was asked that it is made of."""
    return shift(result.rows, UNLEARNED) or 0.0


def result_of(trial: Trial, rows: list[dict[str, Any]]) -> Result:
    """A run with what it answered, and what its training cost."""
    return Result(trial.name, trial.values, trial.settings.seed, rows, json_of(trial.folder / "run.json"))


def validation_of(settings: CompareSettings, s: TrainSettings, test: EvaluateSettings) -> EvaluateSettings:
    """What a trial is asked to be chosen by: groups as those of the test, so that the shift adds up the same points."""
    neighbours = [file for file in s.valid_retain if file in settings.valid_neighbours]
    retain = [file for file in s.valid_retain if file not in settings.valid_neighbours]
    files = {"forget": s.valid_forget, "retain": retain, "neighbours": neighbours}
    roles = {flag: GROUPS[flag][1] for flag in files}
    counts = {f"{role}_questions": at_most(settings.valid_questions, files[flag], role) for flag, role in roles.items()}
    return only(test, model=s.model, **files, **counts)


def at_most(count: int, files: Sequence[str], role: str) -> int:
    """This many questions of these files, or all where there are fewer; 0 stays 0, which is all."""
    return min(count, len(load_queries(files, role))) if count and files else 0


def only(test: EvaluateSettings, **asked: Any) -> EvaluateSettings:
    """The same evaluation of the questions `asked` and of nothing else."""
    nothing: dict[str, Any] = dict.fromkeys(("trained", "retain", "neighbours", "also", "benchmark", "beside"), ())
    nothing |= dict.fromkeys(("context", "topic", "context_name", "reverse_prompts", "retrained"))
    nothing |= dict.fromkeys(("forget_questions", "retain_questions", "neighbour_questions"), 0)
    return replace(test, answers_only=True, **{**nothing, **asked})


def asked_of_sweeps(test: EvaluateSettings, questions: int) -> EvaluateSettings:
    """At most so many of the test questions of each role (0: all), and no reverse prompts: a sweep is many runs."""
    counts: dict[str, Any] = {}
    for role, files in (("forget", test.forget), ("retain", test.retain), ("neighbour", test.neighbours)):
        limits = [at_most(questions, files, role), getattr(test, f"{role}_questions")]
        counts[f"{role}_questions"] = min((limit for limit in limits if limit), default=0)
    return replace(test, trained=(), reverse_prompts=None, **counts)


def asked(trial: Trial, test: EvaluateSettings, trained: bool, name: str = "test") -> Result:
    """What a run answers to questions, kept under a name, and, if wanted, to forget questions that it was trained on.

    Of these all that `forget_questions` took; else as many as are held out, 100 at least, evenly spread.
    """
    s = trial.settings
    test = replace(test, model=s.model)
    rows = evaluated(trial, test, name)
    if trained:
        # A hundred have an interval that is narrow enough beside the others.
        wanted = max(100, len(groups_of(test).get(FORGET, ())))
        count = s.forget_questions or at_most(wanted, s.forget, "forget")
        seen = only(test, forget=s.forget, forget_questions=count)
        of_trained = [row for row in evaluated(trial, seen, "trained") if row["group"] == FORGET]
        rows = rows + [{**row, "group": TRAINED} for row in of_trained]
    return result_of(trial, rows)


# --- what is kept -------------------------------------------------------------------------------------------


def gather(
    settings: CompareSettings,
    shown: Sequence[Result],
    swept: Sequence[Result],
    again: Sequence[Result],
    failed: list[dict],
    tried: dict[str, list[Result]],
) -> dict[str, Any]:
    """results.json, table.md and pictures: of the methods, of those run again with other seeds, and of the sweeps.

    And trials.md, of all trials on the validation questions, where there are several to choose from.
    """
    from .compare_picture import ablations_picture, methods_picture
    from .picture import picture

    rows, ablations = rows_of(shown), rows_of(swept)
    table = report_of(rows, shown, again, ablations, swept, settings.sweep_questions, failed)
    results = {
        "meta": {
            "settings": asdict(settings),
            "made_on": provenance(),
            "tried": {name: [{**one.values, "shift": shift_of(one)} for one in of] for name, of in tried.items()},
            "runs": [{"name": r.name, **r.values, "seed": r.seed, **r.cost} for r in (*shown, *swept, *again)],
        },
        "rows": rows,
        "ablations": ablations,
        "table": table,
        "failed": failed,
    }
    out = Path(settings.out)
    pictures, of_sweeps = ([out / f"{name}.{kind}" for kind in ("png", "svg")] for name in ("results", "ablations"))
    files = [*(out / name for name in ("table.md", "trials.md", "results.json")), *pictures, *of_sweeps]
    keep_others(out, settings, files)
    write_text(out / "table.md", table + "\n")
    trials = [result for of in tried.values() for result in of]
    (out / "trials.md").unlink(missing_ok=True)
    if trials:
        lines = ["All trials, on the validation questions:", "", *table_of(rows_of(trials), trials, fronted=False), ""]
        write_text(out / "trials.md", "\n".join([*lines, LEGEND, *failed_lines(failed), ""]))
    write_text(out / "results.json", json.dumps(as_json(results), indent=1, ensure_ascii=False) + "\n")
    for file in (*pictures, *of_sweeps):  # never an old picture beside new figures
        file.unlink(missing_ok=True)
    if points_of(rows):
        methods_picture(rows, *pictures)
    elif rows:  # of benchmarks alone
        picture(results, *pictures)
    if swept:
        ablations_picture(swept, *of_sweeps)
    note(f"{out}: {', '.join(file.name for file in files if file.exists())}")
    return results


def keep_others(out: Path, settings: CompareSettings, files: Sequence[Path]) -> None:
    """Move the results of another comparison into a folder of their own: of one that had more, or other grids."""
    before = (json_of(out / "results.json").get("meta") or {}).get("settings")
    if not isinstance(before, dict):
        return
    here = as_json({**settings.methods, **settings.sweeps})
    was: dict[str, Any] = {}
    for part in ("methods", "sweeps"):
        was |= before.get(part) or {}
    changed = [repr(name) for name, grid in was.items() if name not in here or here[name] != grid]
    seeds = before.get("seeds", 1)
    if changed or seeds > settings.seeds:
        aside = new_name(out / "results")
        aside.mkdir()
        for file in files:
            if file.exists():
                file.rename(aside / file.name)
        note(f"note: {aside} has the results so far, with {changed[0] if changed else f'{seeds} seeds'}")


if __name__ == "__main__":
    run_cli(main)
