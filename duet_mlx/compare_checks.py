"""What is wrong with a comparison, found before its first run: hours later it would be known too late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .compare_grid import CompareSettings, Trial
from .compare_runs import READ, SHAPE_TARGETS, reads
from .data import file_hash
from .errors import ConfigError, DataError, DuetError, ModelError, note
from .evaluate import EvaluateSettings, check_questions, check_settings
from .groups import own_groups
from .methods import METHODS
from .metrics import TRAINED
from .report import load_beside
from .settings import parse, read_yaml
from .train import read_questions


def evaluation_of(settings: CompareSettings) -> EvaluateSettings:
    """What --evaluate names, with the groups of --also; with --quick by its own settings.

    Raises:
        ConfigError: what `duet_mlx.evaluate` refuses.
    """
    read_yaml(settings.evaluate, "--evaluate")
    over = settings.quick_evaluate if settings.quick else {}
    argv = ["-c", settings.evaluate]
    test = parse(EvaluateSettings, "python -m duet_mlx.evaluate", "Evaluate.", argv, None, over, "quick_evaluate")
    also = (*test.also, *settings.also)
    if settings.trained and TRAINED in dict(own_groups(also)):
        raise ConfigError(f"--also {TRAINED}=…: --trained makes a group of this name; choose another name")
    return replace(test, also=also, trained=() if settings.quick else test.trained)


def chosen_from(settings: CompareSettings, trials: Sequence[Trial]) -> bool:
    """Whether the trials of a method are asked the validation questions."""
    return len(trials) > 1 or settings.seeds > 1


def check_validation(settings: CompareSettings, grids: dict[str, list[Trial]]) -> None:
    """Raise ConfigError where trials, or methods, are to be chosen from by validation questions that are not named."""
    for name, trials in grids.items():
        for s in (trial.settings for trial in trials if chosen_from(settings, trials)):
            if missing := [key for key in ("valid_forget", "valid_retain") if not getattr(s, key)]:
                raise ConfigError(
                    f"methods {name}: --train {settings.train} names no {missing[0]}, by which the best of several "
                    "trials is chosen, and with several seeds the best of the methods"
                )
            if strange := [file for file in settings.valid_neighbours if file not in s.valid_retain]:
                raise ConfigError(f"--valid-neighbours {strange[0]}: is none of {name}'s valid_retain files")


def note_choice(settings: CompareSettings, trials: Sequence[Trial], test: EvaluateSettings) -> None:
    """Say where settings are chosen by other means than they should be: by the test itself, or without neighbours."""
    chosen_by = {f for s in (t.settings for t in trials) for f in (*s.valid_forget, *s.valid_retain)}
    if {*map(file_hash, chosen_by)} & {*map(file_hash, (*test.forget, *test.retain, *test.neighbours))}:
        note("note: the best settings are chosen by questions of the test: valid_forget or valid_retain name its files")
    if test.neighbours and not settings.valid_neighbours:
        note(
            "note: the test has neighbours and the choice has none: name their validation files in valid_neighbours too"
        )


def check_inputs(settings: CompareSettings, trials: Sequence[Trial], test: EvaluateSettings) -> EvaluateSettings:
    """Read the questions of all trials, and those of the test, once; see that the base is there, and fits them.

    Returns:
        The test, of the model that is trained.

    Raises:
        DuetError: what is wrong with them, and what makes them if --made-by says so.
    """
    from .model import resolve_model

    models = {trial.settings.model: trial.name for trial in trials}
    check_settings(replace(test, model=trials[0].settings.model, out=settings.out, overwrite=True))
    hint = f"; `{settings.made_by}` makes it" if settings.made_by else ""
    try:
        for each in {str(reads(trial.settings)): trial.settings for trial in trials}.values():
            read_questions(each)
        load_beside(test.beside, ())
        for model in (*models, *filter(None, [test.retrained])):
            resolve_model(model)
        if test.model:
            models.setdefault(test.model, f"--evaluate {settings.evaluate}")
        if len(models) > 1:
            listed = ", ".join(f"{model} ({name})" for model, name in models.items())
            raise ConfigError(f"model: {listed}: a comparison has one base; compare others in another --out")
        test = replace(test, model=next(iter(models)))
        check_questions(test)
    except (DataError, ModelError) as error:
        raise type(error)(f"{error}{hint if 'no such' in str(error) else ''}") from error
    return test


def check_methods(trials: Sequence[Trial]) -> dict[str, str]:
    """Ask of each trial what `duet_mlx.train` asks before it trains, of the one model that is loaded; its hashes.

    Raises:
        DuetError: a method, LoRA, schedule, file or length that cannot be; the trial is named.
    """
    import mlx.core as mx

    from .head import check_head
    from .kept_targets import tokenizer_hash
    from .labels import check_model, given_labels
    from .loop import make_optimizer
    from .model import load_model, weights_hash, window
    from .teacher import check_lengths

    first = trials[0].settings
    model, tokenizer, folder = load_model(first.model, trust_remote_code=first.trust_remote_code)
    found, read = check_head(model, mx.array([[0]])), set()
    for trial in trials:
        s = trial.settings
        try:
            make_optimizer(s)
            check_model(s, model, found)
            if (asked := str(reads(s, (*READ, *SHAPE_TARGETS, "max_seq_length")))) not in read:
                read.add(asked)
                queries, valid, contexts = read_questions(s)
                check_lengths(tokenizer, queries + valid, contexts, s, window(folder))
                if METHODS[s.method].labels != "teacher":
                    given_labels(tokenizer, queries, s)
        except DuetError as error:
            raise type(error)(f"methods {trial.name}{f' {trial.values}' if trial.values else ''}: {error}") from error
    return {"model": weights_hash(model), "tokenizer": tokenizer_hash(tokenizer)}
