"""What a comparison runs: every combination of a grid as one run, with a folder and a config.yaml of its own."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from .compare_table import label_of
from .data import digest
from .errors import ConfigError, nearest
from .evaluate import BASE, IN_CONTEXT, RETRAINED, UNLEARNED
from .files import write_text
from .methods import METHODS, numbers_of, unread
from .once import essence
from .settings import read_yaml, setting
from .train_settings import LORA, TrainSettings, parse_settings

CONTEXT = "context"  # in-context unlearning: the base behind the context, nothing to train
ROWS = (BASE, IN_CONTEXT, UNLEARNED, RETRAINED)  # what no method or sweep may be called
NOT_FOR_A_GRID = {"adapter_path", "resume_adapter_file", "dry_run", "overwrite"}


@dataclass(frozen=True)
class CompareSettings:
    """Settings of a comparison. `methods` and `sweeps` are for the YAML file."""

    train: str = setting("", "YAML of duet_mlx.train: what all runs share, validation questions included")
    evaluate: str = setting("", "YAML of duet_mlx.evaluate: the test questions")
    methods: dict = setting({}, "NAME: {method: M, SETTING: [values to try]}; the best on validation is reported")
    sweeps: dict = setting({}, "the same, but every combination is reported")
    valid_questions: int = setting(0, "validation questions of each role that a trial is asked, evenly spread (0: all)")
    valid_neighbours: tuple[str, ...] = setting(
        (), "which of the train YAML's valid_retain files ask about neighbours: a group of their own, as in the test"
    )
    sweep_questions: int = setting(
        0, "test questions of each role that a run of a sweep is asked, evenly spread (0: all); no reverse prompts"
    )
    seeds: int = setting(1, "seeds in all for the best methods; the first is that of the train YAML")
    best: int = setting(4, "how many methods are run with the other seeds")
    only: tuple[str, ...] = setting((), "run these methods and sweeps alone and make no table: a part of the whole")
    also: tuple[str, ...] = setting((), "GROUP=questions.jsonl: as in duet_mlx.evaluate, beside the test questions")
    trained: bool = setting(
        False, "ask methods forget questions of training as well: a run's forget_questions, else some hundred"
    )
    quick: bool = setting(False, "first trial of each grid, one seed, test questions alone, by quick_settings")
    quick_settings: dict = setting({"iters": 40}, "settings of duet_mlx.train for --quick")
    quick_evaluate: dict = setting({}, "settings of duet_mlx.evaluate for --quick")
    dry_run: bool = setting(
        False, "load the base and check all; print which runs are there, and how many are to come; stop"
    )
    made_by: str = setting("", "command that makes the files that are read here; said where one of them is missing")
    out: str = setting("", "folder for the runs, results.json, table.md and pictures")


class Trial(NamedTuple):
    """One run."""

    name: str  # the row of the table
    values: dict[str, Any]  # what sets it apart from the others of its grid
    folder: Path
    settings: TrainSettings
    config: dict[str, Any]  # the same as YAML, for config.yaml
    base: dict[str, str] = {}  # hashes of the base's weights and of its tokenizer, as a manifest has them


class Grid(NamedTuple):
    """What is tried under one name; nothing for in-context unlearning."""

    method: str
    combinations: list[dict[str, Any]]
    varied: list[str]  # the settings that are not the same in all of them


def all_trials(settings: CompareSettings) -> tuple[dict[str, list[Trial]], dict[str, list[Trial]]]:
    """The trials of each method and of each sweep that are to be run, checked before the first of them is.

    Raises:
        ConfigError: as `names_to_run`, `grid_of`, `same_budget` and `trial_of`.
    """
    names = names_to_run(settings)
    grids = {name: grid_of(settings, name, grid) for name, grid in (settings.methods | settings.sweeps).items()}
    # With --only as well: that the whole is refused is better known before its parts are run.
    same_budget({name: len(grids[name].combinations) for name in settings.methods if grids[name].combinations})
    methods, sweeps = (
        {name: trials_of(settings, name, grids[name]) for name in part if name in names}
        for part in (settings.methods, settings.sweeps)
    )
    for part in (methods, sweeps):
        labels = [label_of(trial.name, trial.values) for trials in part.values() for trial in trials]
        if pair := _alike(labels):
            raise ConfigError(f"methods and sweeps: two runs would be the row {labels[pair[0]]!r}; rename one of them")
    for trials in methods.values():
        if any(trial.settings.seed + settings.seeds > 2**64 for trial in trials):
            raise ConfigError(f"--seeds {settings.seeds}: from seed {trials[0].settings.seed} on they pass 2^64")
    return methods, sweeps


def names_to_run(settings: CompareSettings) -> list[str]:
    """The names of all grids, or those of --only.

    Raises:
        ConfigError: a name that is a number, that of another row, or of another grid; one in --only that there is not.
    """
    for name in (*settings.methods, *settings.sweeps):
        if not isinstance(name, str):
            raise ConfigError(f"methods and sweeps: expected names, found {name!r}; put it in quotes")
        if name in ROWS:
            raise ConfigError(f"methods and sweeps: {name!r} is the name of another row; choose another name")
        if not name.strip(".") or name == "runs":
            raise ConfigError(
                f"methods and sweeps: {name!r} cannot be the name of a folder of runs; choose another name"
            )
    if both := settings.methods.keys() & settings.sweeps.keys():
        raise ConfigError(f"methods and sweeps: {min(both)} names a grid in each; choose another name for one")
    names = [*settings.methods, *settings.sweeps]
    if pair := _alike([_folded(folder_of(settings, name)) for name in names]):
        one, other = (names[number] for number in pair)
        raise ConfigError(f"methods and sweeps: {one!r} and {other!r} would share a folder; rename one of them")
    for name in settings.only:
        if name not in names:
            more = " (--quick runs no sweeps)" if settings.quick else ""
            raise ConfigError(f"--only: no method or sweep {name!r}{nearest(name, names)}; there are {names}{more}")
    return list(dict.fromkeys(settings.only)) or names


def grid_of(settings: CompareSettings, name: str, grid: Any) -> Grid:
    """Every combination of the lists of one name; the first of them with --quick, whose settings go before the lists.

    Raises:
        ConfigError: no mapping, an unknown method, an empty list, or one value twice in a list.
    """
    if grid is None:
        grid = {}
    if not isinstance(grid, dict):
        raise ConfigError(f"methods {name}: expected settings with lists of values, found {grid!r}")
    lists = {key: value if isinstance(value, list) else [value] for key, value in grid.items() if key != "method"}
    if empty := [key for key, values in lists.items() if not values]:
        raise ConfigError(f"methods {name}: {empty[0]}: an empty list; name one value at least")
    for key, values in lists.items():
        if twice := [value for value in values if list(map(_number, values)).count(_number(value)) > 1]:
            raise ConfigError(f"methods {name}: {key}: {twice[0]!r} stands there twice; it is one trial")
    method = grid.get("method", name)
    if not isinstance(method, str):
        raise ConfigError(f"methods {name}: method: expected a name, found {method!r}; each has an entry of its own")
    if method == CONTEXT:
        if lists:
            raise ConfigError(f"methods {name}: {min(lists)}: {CONTEXT} trains nothing; its context is --evaluate's")
        return Grid(method, [], [])
    if method not in METHODS:
        known = [*METHODS, CONTEXT]
        raise ConfigError(f"methods {name}: no method {method!r}{nearest(str(method), known)}; there are {known}")
    if settings.quick:
        lists |= {key: [value] for key, value in settings.quick_settings.items()}
    combinations = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    varied = [key for key, values in lists.items() if len(values) > 1]
    return Grid(method, combinations[: 1 if settings.quick else None], varied)


def trials_of(settings: CompareSettings, name: str, grid: Grid) -> list[Trial]:
    """Each combination of a grid as a run.

    Raises:
        ConfigError: as `trial_of`; two that would share a folder, or are one run; a setting without effect on any.
    """
    trials = [trial_of(settings, name, grid.method, values, grid.varied) for values in grid.combinations]
    own = () if settings.quick else (settings.methods | settings.sweeps)[name] or ()  # quick_settings are for all
    for key in own:
        if name in settings.methods and key in ("valid_forget", "valid_retain"):
            raise ConfigError(f"methods {name}: {key}: all methods are chosen by the same questions, those of --train")
        if trials and all(key in unread(trial.settings) for trial in trials):
            raise ConfigError(f"methods {name}: {key}: {grid.method} does not read it here; take it out")
    if pair := _alike([essence(trial.settings) for trial in trials]):
        one, other = (trials[number].values for number in pair)
        raise ConfigError(f"methods {name}: {one} and {other} are one run; each trial is to be another")
    if pair := _alike([_folded(trial.folder) for trial in trials]):
        one, other = (trials[number].values for number in pair)
        raise ConfigError(f"methods {name}: {one} and {other} would share a folder; rename a file, or use two entries")
    return trials


def trial_of(settings: CompareSettings, name: str, method: str, values: dict[str, Any], varied: list[str]) -> Trial:
    """One combination as a run, with the settings that `duet_mlx.train` would read from its config.yaml.

    Raises:
        ConfigError: an unknown setting, one that is not for a grid, or what `duet_mlx.train` refuses.
    """
    shared = read_yaml(settings.train, "--train")
    over: dict[str, Any] = {"method": method}
    known = {field.name for field in fields(TrainSettings)}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        listed = [k for k, v in value.items() if isinstance(v, list) and k != "keys"] if isinstance(value, dict) else []
        if listed and str(key).endswith("_parameters"):
            raise ConfigError(f"methods {name}: {key}: {listed[0]}: a list; to try its values, put it beside {key}")
        if key in known - NOT_FOR_A_GRID:
            over[key] = value
        elif key in METHODS[method].defaults or key in LORA:
            group = "method_parameters" if key in METHODS[method].defaults else "lora_parameters"
            inner.setdefault(group, {})[key] = _number(value)
        elif key in NOT_FOR_A_GRID:
            raise ConfigError(f"methods {name}: {key}: each run has its own; take it out")
        else:
            own = numbers_of(method) or "no numbers"
            hint = nearest(str(key), [*known, *METHODS[method].defaults, *LORA])
            raise ConfigError(f"methods {name}: unknown setting {key!r}{hint}; {method} has {own} of its own")
    for group, given in inner.items():  # beside those of a whole group, wherever that stands
        whole = over.get(group, shared.get(group) or {})
        over[group] = {**whole, **given} if isinstance(whole, dict) else whole
    apart = {key: values[key] for key in varied}
    place = f"methods {name}{f' {apart}' if apart else ''}"
    folder = folder_of(settings, name) / _file_name(",".join(f"{key}={value}" for key, value in apart.items()))
    over |= {"adapter_path": str(folder / "adapters"), "resume_adapter_file": None, "dry_run": False}
    if "steps_per_eval" not in {*shared, *over}:
        over["steps_per_eval"] = 0  # it chooses by evaluations of its own, and watching would count as time
    try:
        parsed = parse_settings("python -m duet_mlx.train", "Train.", ["-c", settings.train], over, place)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith((place, "-c ")) else f"{place}: {text}") from error
    return Trial(name, apart, folder, parsed, {**shared, **over})


def folder_of(settings: CompareSettings, name: str) -> Path:
    """The folder of all runs of one name."""
    return Path(settings.out, "runs", _file_name(name))


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value  # YAML takes 1e-4 for text
    except ValueError:
        return value


def write_config(trial: Trial) -> None:
    """The run's config.yaml, for `python -m duet_mlx.train -c`."""
    import yaml

    trial.folder.mkdir(parents=True, exist_ok=True)
    write_text(trial.folder / "config.yaml", yaml.safe_dump(trial.config, sort_keys=False, allow_unicode=True))


def _alike(of: list[Any]) -> tuple[int, int] | None:
    """The places of the first two that are equal."""
    pairs = itertools.combinations(range(len(of)), 2)
    return next(((one, other) for one, other in pairs if of[one] == of[other]), None)


def _folded(folder: Path) -> str:
    """The same for two folders that are one on a disk that takes A for a."""
    return str(folder).casefold()


def _file_name(text: str) -> str:
    name = re.sub(r"[^\w.=,+ -]", "_", text) or "run"
    return name if len(name.encode()) < 200 else f"{name[:40]}-{digest(text)[:12]}"  # lists of files; most are ASCII


def same_budget(counts: dict[str, int]) -> None:
    """Raise ConfigError unless every method may try as many settings as any other: else it is no comparison."""
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ConfigError(f"methods: unlike numbers of trials ({listed}); give every method as many, or use sweeps")


def other_seed(trial: Trial, k: int) -> Trial:
    """The same run with the k-th next seed."""
    seed, folder = trial.settings.seed + k, trial.folder / f"seed={trial.settings.seed + k}"
    own: dict[str, Any] = {"seed": seed, "adapter_path": str(folder / "adapters")}
    return trial._replace(folder=folder, settings=replace(trial.settings, **own), config={**trial.config, **own})
