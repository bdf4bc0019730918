"""`compare`: from a YAML file to one table; runs that are there are not repeated; the fair part of it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from duet_mlx.compare import asked_of_sweeps, choose, gather, shift_of, validation_of
from duet_mlx.compare_checks import check_inputs, check_methods, evaluation_of
from duet_mlx.compare_grid import CompareSettings, all_trials
from duet_mlx.compare_runs import _copy, newer
from duet_mlx.errors import ConfigError
from duet_mlx.evaluate import EvaluateSettings
from duet_mlx.files import json_of, only_run_in
from duet_mlx.groups import groups_of
from duet_mlx.methods import METHODS
from duet_mlx.once import essence
from duet_mlx.report import load_results
from duet_mlx.settings import parse
from duet_mlx.stream import Stream
from tests.tiny_model import contents, tiny_model, write_questions

ROOT = Path(__file__).resolve().parents[2]
TRIED = {"learning_rate": ["1e-3", 0.05]}


@pytest.fixture
def comparison(model, data, tmp_path):
    """comparison(methods, more settings) writes the three YAML files; the path of the comparison's."""
    files = dict(zip(data[::2], data[1::2], strict=True))
    valid = [str(write_questions(tmp_path / f"{role}_valid.jsonl", [text]))
             for role, text in (("forget", "Who owns the red broom?"), ("retain", "What do birds make?"))]  # fmt: skip
    train = {
        "model": str(model), "forget": [files["--forget"]], "retain": [files["--retain"]],
        "context": files["--context"], "valid_forget": valid[0], "valid_retain": valid[1], "iters": 4,
        "batch_size": 4, "top_k": 5, "positions": 3, "steps_per_eval": 0, "save_every": 0, "answer_tokens": 6,
        "num_layers": 1,
    }  # fmt: skip
    test = {
        "model": str(model), "forget": valid[0], "retain": valid[1], "context": files["--context"], "max_tokens": 4,
    }  # fmt: skip

    def write(methods, **more):
        names = ("train", "evaluate", "compare")
        shared = {"train": str(tmp_path / "train.yaml"), "evaluate": str(tmp_path / "evaluate.yaml")}
        config = {**shared, "out": str(tmp_path / "out"), "methods": methods, **more}
        for name, content in zip(names, (train, test, config), strict=True):
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path / "compare.yaml"

    return write


def test_methods_and_sweeps_end_in_one_table_and_nothing_is_run_twice(command, comparison, tmp_path):
    methods = {"duet": TRIED, "npo, weak": {"method": "npo", "beta": [0.1, 1.0]}, "context": None}
    config = comparison(
        methods, sweeps={"K": {"method": "duet", "top_k": [1, 3, 5]}, "all": {"method": "duet"}}, sweep_questions=1,
        seeds=2, best=1, trained=True,
    )  # fmt: skip
    ended = command("compare", "-c", config)
    assert ended.code == 0 and "the methods are compared in" in ended.err, ended.err
    # Of 4 validations, 3 tests, 2 times the trained questions (the methods' alone) and 4 sweeps, the first of each kind
    # asks the base. The last run of a sweep was there under another name.
    said = ended.err.splitlines()
    assert sum(line.startswith("base: answers reused from") for line in said) == 3 + 2 + 1 + 3, ended.err
    assert [line.split("/runs/")[1] for line in said if line.startswith("unlearned: answers reused from")] == [
        "all/run/sweep/answers/unlearned.jsonl"
    ]
    assert "== all" not in ended.out
    results = load_results(tmp_path / "out" / "results.json")
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    duet, npo = models[2:4]
    assert models == ["base", "base + context", duet, npo]
    ablated = list(dict.fromkeys(row["model"] for row in results["ablations"]))
    assert ablated == ["base", "base + context", "K, top_k 1", "K, top_k 3", "K, top_k 5", "all"]
    # The row is the best of its grid on the validation questions.
    for name, label, key in (("duet", duet, "learning_rate"), ("npo, weak", npo, "beta")):
        tried = results["meta"]["tried"][name]
        assert len(tried) == 2 and label.startswith(f"{name}, {key} ")
        best = max(tried, key=lambda trial: trial["shift"])
        assert label == f"{name}, {key} {best[key]}"
    assert any(row["group"] == "forget, trained on" for row in results["rows"])
    listed = (tmp_path / "out" / "trials.md").read_text()
    assert all(f"| {name}, {key} {value}" in listed for name, key, values in (
        ("duet", "learning_rate", ("1e-3", 0.05)), ("npo, weak", "beta", (0.1, 1.0))) for value in values
    )  # fmt: skip
    assert len([run for run in results["meta"]["runs"] if run["seed"] == 1]) == 1
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in ended.out and all(model in table for model in models) and "| 0, 1  |" in table
    assert sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.png")) == [
        Path("ablations.png"), Path("results.png")
    ]  # fmt: skip
    # What comes out of the layer below the adapted one: once along the teacher's words, once along the base's answers.
    assert ended.out.count("are run once, now") == 2 and ended.out.count("were run before") == 6

    planned = command("compare", "-c", config, "--dry-run", "--seeds", "3")
    assert "K: 3 of 3 runs there" in planned.out and "to train: 0 runs" in planned.out, planned.err
    assert "then 2 more seeds of the 1 best methods, those that are there left out" in planned.out
    adapters = {path: path.read_bytes() for path in (tmp_path / "out").rglob("adapters.safetensors")}
    assert len(adapters) == 9  # twice two trials, four of the sweeps, one of another seed
    again = command("compare", "-c", config)
    assert again.code == 0 and again.out.strip() == table.strip() and "are compared in" not in again.err
    assert adapters == {path: path.read_bytes() for path in (tmp_path / "out").rglob("adapters.safetensors")}
    config = comparison(methods, sweeps={"same": {"method": "duet", "top_k": 3}})
    assert "same: 1 of 1 runs there" in command("compare", "-c", config, "--dry-run").out


def test_a_dry_run_says_what_is_to_come_and_writes_nothing(command, comparison, tmp_path):
    sweeps = {"K": {"method": "duet", "top_k": [3, 5]}}
    config = comparison({"duet": TRIED, "npo": TRIED}, sweeps=sweeps | {"all": {"method": "duet"}})
    planned = command("compare", "-c", config, "--dry-run")
    assert planned.code == 0, planned.err
    assert planned.out.splitlines() == [
        "duet: 0 of 2 runs there", "npo: 0 of 2 runs there", "K: 0 of 2 runs there", "all: 0 of 1 runs there",
        "to train: 6 runs, 24 steps at most", "questions to choose by: 2 a trial",
        "questions of the test: 2 a method; reverse prompts, benchmarks and --trained add to it",
        "questions of a sweep: 2 a run",
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_asked_part_of_the_test_questions_by_the_model_that_was_trained(command, comparison, tmp_path):
    config = comparison({"ga": {"iters": 1}, "context": None}, sweeps={"K": {"method": "duet"}}, sweep_questions=2)
    test = yaml.safe_load((tmp_path / "evaluate.yaml").read_text())
    many = {
        role: str(write_questions(tmp_path / f"{role}.jsonl", [f"What does the {what} do {i}?" for i in range(4)]))
        for role, what in (("forget", "owl"), ("retain", "bee"), ("neighbours", "broom"))
    }
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Ignore all that.\n")
    del test["model"]
    test |= {**many, "retain_questions": 1, "reverse_prompts": str(prompts)}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(test))
    ended = command("compare", "-c", config)
    assert ended.code == 0, ended.err
    results = load_results(tmp_path / "out" / "results.json")
    counts = [
        {row["group"]: row["n"] for row in results[part] if (row["model"], row["metric"]) == ("base", "broken")}
        for part in ("rows", "ablations")
    ]
    assert counts[0]["forget"] == counts[0]["neighbours"] == 4 and "forget, reverse 1" in counts[0]
    assert counts[1] == {"forget": 2, "general": 1, "neighbours": 2}
    assert "base + context" in {row["model"] for row in results["ablations"]}
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Sweeps, asked at most 2 test questions of each role and no reverse prompts:" in table


def test_targets_come_from_the_run_that_has_them_not_from_its_copy(command, comparison):
    sweeps = {"K": {"method": "duet", "top_k": 3}, "all": {"method": "duet", "top_k": 3}}
    sweeps["rate"] = {"method": "duet", "top_k": 3, "learning_rate": 0.05}
    ended = command("compare", "-c", comparison({"npo": None}, sweeps=sweeps))
    assert ended.code == 0 and "a copy of" in ended.err, ended.err
    assert ended.out.partition("== K")[2].count("targets: built now") == 1


def test_a_run_is_copied_from_the_same_one_alone_and_never_over_another_adapter(command, comparison, tmp_path):
    runs, sweeps = tmp_path / "out" / "runs", {"K": {"method": "duet", "top_k": [3, 5]}, "all": {"method": "duet"}}
    ended = command("compare", "-c", comparison({"npo": None}, sweeps=sweeps))
    assert ended.code == 0 and f"{runs / 'all' / 'run'}: a copy of {runs / 'K' / 'top_k=5'}" in ended.err, ended.err
    assert json.loads((runs / "all" / "run" / "run.json").read_text())["same_as"] == str(runs / "K" / "top_k=5")
    # Now `all` is another run, and then again the one that there is under another name.
    for iters, says in ((2, "settings or questions have changed: the earlier adapter is kept in"), (4, "a copy of")):
        before = (runs / "all" / "run" / "adapters" / "adapters.safetensors").read_bytes()
        ended = command(
            "compare", "-c", comparison({"npo": None}, sweeps=sweeps | {"all": {"method": "duet", "iters": iters}})
        )
        assert ended.code == 0 and says in ended.out + ended.err, ended.err
        assert before in [path.read_bytes() for path in runs.glob("all/run/adapters-until-*/adapters.safetensors")]
    # One whose adapter is gone is no run to copy.
    (runs / "K" / "top_k=3" / "adapters" / "adapters.safetensors").unlink()
    ended = command("compare", "-c", comparison({"npo": None}, sweeps={"three": {"method": "duet", "top_k": 3}}))
    assert ended.code == 0 and "== three" in ended.out and "a copy of" not in ended.err, ended.err


def test_the_best_on_validation_is_chosen_and_of_equals_the_first(comparison, monkeypatch):
    """Runs and evaluations are told here: what is tried is the choice."""
    config = comparison({"npo": {"beta": [1, 2, 3, 4]}}, valid_questions=3)
    settings = parse(CompareSettings, "compare", "Compare.", ["-c", str(config)])
    grids, _ = all_trials(settings)
    recall = {1: 0.5, 2: 0.2, 3: 0.2, 4: 0.9}

    asked = []

    def told(trial, settings, name):
        asked.append((settings.forget_questions, settings.retain_questions))
        figures = {"base": 1.0, "unlearned": recall[trial.values["beta"]]}
        return [{"model": m, "group": "forget", "metric": "recall", "value": v} for m, v in figures.items()]

    monkeypatch.setattr("duet_mlx.compare.run", lambda trial, _: "diverged" if trial.values["beta"] == 4 else "")
    monkeypatch.setattr("duet_mlx.compare.evaluated", told)
    [chosen], [failed], tried = choose(settings, grids, EvaluateSettings(), {})
    assert asked == [(1, 1)] * 3  # there is but one of each
    assert chosen.values == {"beta": 2} and failed["values"] == {"beta": 4}
    assert [round(shift_of(one)) for one in tried["npo"]] == [50, 80, 80]


def test_validation_has_the_groups_of_the_test(comparison, tmp_path):
    """Else what is kept would weigh less in the choice than in the table."""
    config = comparison({"npo": TRIED}, valid_questions=3)
    train = yaml.safe_load((tmp_path / "train.yaml").read_text())
    general = train["valid_retain"]
    near = str(write_questions(tmp_path / "near.jsonl", [f"Who owns broom {i}?" for i in range(4)]))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**train, "valid_retain": [general, near]}))
    flags = ["-c", str(config), "--valid-neighbours", near]
    settings = parse(CompareSettings, "compare", "Compare.", flags)
    trial = all_trials(settings)[0]["npo"][0]
    groups = groups_of(validation_of(settings, trial.settings, EvaluateSettings()))
    assert {name: len(queries) for name, queries in groups.items()} == {"forget": 1, "general": 1, "neighbours": 3}


def test_an_evaluation_that_is_older_than_the_model_is_made_again(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    weights, file = model / "model.safetensors", tmp_path / "results.json"
    for path, time in ((weights, 1), (file, 2)):
        path.write_text("{}")
        os.utime(path, (time, time))
    assert not newer(str(model), file) and not newer("hub/model", file)
    os.utime(weights, (3, 3))
    assert newer(str(model), file) and newer(str(weights), file)


def test_without_questions_to_choose_by_several_trials_are_refused(refused, comparison, tmp_path):
    config = comparison({"npo": TRIED})
    train = yaml.safe_load((tmp_path / "train.yaml").read_text())
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**train, "valid_retain": []}))
    refused("compare", "-c", config, says=("methods npo", "names no valid_retain"))


def test_an_adapter_that_is_not_the_one_that_was_left_is_made_again_and_so_is_what_it_answered(
    command, comparison, tmp_path
):
    """One that was trained on, cut off, or put in its place, however old."""
    config = comparison({"npo": {"learning_rate": 0.05}})
    assert command("compare", "-c", config).code == 0
    file = tmp_path / "out" / "runs" / "npo" / "run" / "adapters" / "adapters.safetensors"
    before, table = file.read_bytes(), (tmp_path / "out" / "table.md").read_text()
    file.write_bytes(before[:100])
    os.utime(file, (1, 1))
    ended = command("compare", "-c", config)
    assert ended.code == 0 and "the earlier adapter is kept in" in ended.out and file.read_bytes() == before, ended.err
    test = file.parents[1] / "test" / "results.json"
    results = json.loads(test.read_text())
    results["meta"]["adapter_hash"] = "that of another"
    results["rows"] = [{**row, "value": 0.123} for row in results["rows"]]
    test.write_text(json.dumps(results))
    assert command("compare", "-c", config).code == 0
    figures = [re.sub(r"[0-9.]+ *\| [0-9.]+ *\|$", "", line) for line in table.splitlines()]  # all but the costs
    again = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [re.sub(r"[0-9.]+ *\| [0-9.]+ *\|$", "", line) for line in again] == figures


def test_another_chat_template_makes_other_runs(command, comparison, tmp_path):
    base = tiny_model(tmp_path / "base")
    config = comparison({"npo": None})
    for name in ("train", "evaluate"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "model": str(base)}))
    assert command("compare", "-c", config).code == 0
    assert "npo: 1 of 1 runs there" in command("compare", "-c", config, "--dry-run").out
    for file in (base / "tokenizer_config.json", base / "chat_template.jinja"):
        if file.exists():
            file.write_text(file.read_text().replace("assistant", "helper"))
    assert "npo: 0 of 1 runs there" in command("compare", "-c", config, "--dry-run").out


def test_results_of_other_grids_or_more_seeds_are_set_aside(command, comparison, tmp_path):
    out = tmp_path / "out"
    assert command("compare", "-c", comparison({"npo": TRIED}, seeds=2)).code == 0
    for methods in ({"npo": TRIED}, {"npo": {"learning_rate": 0.05}}):
        before = (out / "table.md").read_text()
        ended = command("compare", "-c", comparison(methods))
        assert ended.code == 0 and "has the results so far" in ended.err, ended.err
        assert before in [path.read_text() for path in out.glob("results-until-*/table.md")]
    assert not (out / "trials.md").exists()  # there is but one now


def test_settings_of_a_group_stand_beside_those_of_their_own(comparison, tmp_path):
    """Wherever they stand: one that was dropped would still name its row."""
    grid = {"alpha": [1.0, 5.0], "method_parameters": {"beta": 0.2}, "rank": 2, "lora_parameters": {"scale": 3.0}}
    grids, _ = all_trials(parse(CompareSettings, "compare", "Compare.", ["-c", str(comparison({"npo": grid}))]))
    found = [trial.settings for trial in grids["npo"]]
    assert [s.method_parameters for s in found] == [{"beta": 0.2, "alpha": alpha} for alpha in (1.0, 5.0)]
    assert all((s.lora_parameters["rank"], s.lora_parameters["scale"]) == (2, 3.0) for s in found)
    assert not list(tmp_path.rglob("config.yaml"))  # a comparison that is refused changes nothing of runs that exist


def test_values_that_would_share_a_folder_are_refused(comparison):
    config = comparison({"npo": None}, sweeps={"c": {"method": "duet", "context": ["x/a.yaml", "x_a.yaml"]}})
    with pytest.raises(ConfigError, match="would share a folder"):
        all_trials(parse(CompareSettings, "compare", "Compare.", ["-c", str(config)]))


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ({7: 5}, "methods npo: unknown setting 7"),
        ({"delta": [0.2, 1.0]}, "methods npo: delta: npo does not read it"),
        ({"lr_schedule": {"name": "linear_schedule"}, "learning_rate": 1}, "learning_rate: npo does not read it here"),
        ({"lr_schedule": {"name": [1]}, "alpha": [1, 2]}, "lr_schedule name: expected text, found [1]"),
        ({"alpha": 0.0, "retain_loss": "kl"}, "methods npo: retain_loss: npo does not read it here"),
        ({"alpha": [0.0, 1.0], "retain_loss": ["nll", "kl"]}, "'retain_loss': 'kl'} are one run"),
        ({"save_every": [1, 2]}, "are one run"),
    ],
)
def test_a_trial_that_would_be_another_over_again_is_refused(comparison, grid, says):
    """Else a method would have had fewer trials than the others, and hours would go into what is known."""
    settings = parse(CompareSettings, "compare", "Compare.", ["-c", str(comparison({"npo": grid}))])
    with pytest.raises(ConfigError) as error:
        all_trials(settings)
    assert says in str(error.value)


def test_the_quick_form_takes_the_first_trial_of_a_grid_even_if_it_reads_less(comparison):
    config = comparison({"npo": {"alpha": [0.0, 1.0], "retain_loss": "kl"}}, quick_settings={"delta": 0.5})
    for more, runs in (([], 2), (["--quick"], 1)):
        grids, _ = all_trials(parse(CompareSettings, "compare", "Compare.", ["-c", str(config), *more]))
        assert len(grids["npo"]) == runs


def test_values_that_are_lists_can_be_tried(comparison, monkeypatch):
    keys = [["self_attn.q_proj"], ["self_attn.v_proj"]]
    settings = parse(CompareSettings, "compare", "Compare.", ["-c", str(comparison({"npo": {"keys": keys}}))])
    monkeypatch.setattr("duet_mlx.compare.run", lambda trial, _: "")
    monkeypatch.setattr("duet_mlx.compare.evaluated", lambda trial, settings, name: [])
    [chosen], _, tried = choose(settings, all_trials(settings)[0], EvaluateSettings(), {})
    assert chosen.values == {"keys": keys[0]} and [one.values for one in tried["npo"]] == [{"keys": k} for k in keys]


def test_what_a_run_has_cost_stays_when_there_is_nothing_left_to_train(command, comparison, tmp_path, data):
    config = comparison({"npo": None})
    assert command("compare", "-c", config).code == 0
    file, retain = tmp_path / "out" / "runs" / "npo" / "run" / "run.json", Path(data[data.index("--retain") + 1])
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "seconds": 1000.0, "peak_memory_gb": 70.0}))
    before = retain.read_text()
    try:
        retain.write_text(before.replace("}", ', "source": "none"}'))  # which no method reads
        ended = command("compare", "-c", config)
        assert ended.code == 0 and "nothing to train" in ended.out, ended.err
        assert json.loads(file.read_text())["seconds"] == 1000.0 and "| 1000" in ended.out
        # Nor has another value of what this method does not read, or a file that it does not read, made it another run.
        train = yaml.safe_load((tmp_path / "train.yaml").read_text())
        (tmp_path / "context.yaml").write_text("system: I know nothing.\n")
        other = {"delta": 0.3, "context": str(tmp_path / "context.yaml")}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump({**train, **other}))
        ended = command("compare", "-c", config)
        assert ended.code == 0 and "== npo" not in ended.out, ended.err
        # Of another run, of other questions, that was cut off here, nothing is counted.
        file.write_text(json.dumps({**json.loads(file.read_text()), "cut_off": True, "files": {}}))
        train = yaml.safe_load((tmp_path / "train.yaml").read_text())
        (tmp_path / "train.yaml").write_text(yaml.safe_dump({**train, "iters": 2}))
        assert command("compare", "-c", config).code == 0 and json.loads(file.read_text())["seconds"] < 1000.0
    finally:
        retain.write_text(before)


def as_an_earlier_version_wrote_it(folder):
    """Without the hashes of adapter and base."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k not in ("adapter", "base")}))


@pytest.mark.parametrize("earlier", [False, True])
def test_another_base_in_the_same_place_is_seen_whatever_its_age(command, comparison, tmp_path, earlier):
    config = comparison({"npo": None})
    for name in ("train", "evaluate"):
        content = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**content, "model": str(tmp_path / "base")}))
    tables = []
    for seed in (1, 2):
        folder = tiny_model(tmp_path / f"of {seed}", seed=seed)
        for file in folder.iterdir():
            os.utime(file, (1e9, 1e9))
        (tmp_path / "base").unlink(missing_ok=True)
        (tmp_path / "base").symlink_to(folder)
        ended = command("compare", "-c", config)
        assert ended.code == 0, ended.err
        tables.append({row["model"]: row for row in load_results(tmp_path / "out" / "results.json")["rows"]})
        assert "== npo" in ended.out
        meta = json.loads((tmp_path / "out" / "runs" / "npo" / "run" / "test" / "results.json").read_text())["meta"]
        tables[-1]["base"] = meta["base_weights"]
        if earlier:
            as_an_earlier_version_wrote_it(tmp_path / "out" / "runs" / "npo" / "run")
    assert tables[0]["base"] != tables[1]["base"]


@pytest.mark.parametrize("earlier", [False, True])
def test_an_adapter_of_other_settings_in_a_runs_folder_is_not_taken(command, comparison, tmp_path, earlier):
    assert command("compare", "-c", comparison({"npo": None, "ga": None})).code == 0
    npo, ga = (tmp_path / "out" / "runs" / name / "run" / "adapters" for name in ("npo", "ga"))
    before = (npo / "adapters.safetensors").read_bytes()
    for name in ("adapters.safetensors", "adapter_config.json"):
        shutil.copy(ga / name, npo / name)
    if earlier:
        as_an_earlier_version_wrote_it(npo.parent)
    ended = command("compare", "-c", comparison({"npo": None, "ga": None}))
    assert ended.code == 0 and "== npo" in ended.out and "== ga" not in ended.out, ended.err
    assert (npo / "adapters.safetensors").read_bytes() == before


def test_results_are_json_and_those_of_another_comparison_are_kept(tmp_path, capfd):
    def made(**more):
        return CompareSettings(out=str(tmp_path), sweeps={"δ": {"delta": [math.inf]}}, **more)

    (tmp_path / "results.png").write_text("of earlier methods")
    gather(made(methods={"npo": None}), [], [], [], [], {})
    assert not (tmp_path / "results.png").exists()
    text = (tmp_path / "results.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    gather(made(methods={"npo": None, "ga": None}), [], [], [], [], {})
    assert not list(tmp_path.glob("results-until-*"))  # more of the same
    gather(made(methods={"ga": None}), [], [], [], [], {})
    [aside] = tmp_path.glob("results-until-*")
    assert "'npo'" in capfd.readouterr().err and '"npo"' in (aside / "results.json").read_text()
    assert '"npo"' not in (tmp_path / "results.json").read_text()


@pytest.mark.parametrize("content", ["[]", "{", '{"meta": 1, "rows": []}'])
def test_a_file_that_is_not_ours_counts_as_none(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert json_of(tmp_path / "run.json").get("settings") is None


def test_the_base_is_asked_once_for_all_runs_also_when_the_questions_have_changed(command, comparison, tmp_path):
    near = str(write_questions(tmp_path / "near.jsonl", ["Who owns the grey cat?"]))
    config = comparison({"npo": TRIED, "ga": TRIED})
    assert command("compare", "-c", config).code == 0
    test = yaml.safe_load((tmp_path / "evaluate.yaml").read_text())
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump({**test, "neighbours": near, "max_tokens": 5}))
    ended = command("compare", "-c", config)
    assert ended.code == 0 and "the test has neighbours and the choice has none" in ended.err
    said = [line for line in ended.err.splitlines() if line.startswith("base: ")]
    assert sum(" answers in " in line for line in said) == 2, said  # of four validations one, of two tests one
    assert "is the best of 2, shift" in ended.err and "table.md, trials.md, results.json, results.png" in ended.err


def test_a_run_whose_adapter_is_gone_is_made_again(command, comparison, tmp_path):
    config = comparison({"duet": None})
    assert command("compare", "-c", config).code == 0
    adapter = tmp_path / "out" / "runs" / "duet" / "run" / "adapters" / "adapters.safetensors"
    before = adapter.read_bytes()
    shutil.rmtree(adapter.parent)
    ended = command("compare", "-c", config)
    assert ended.code == 0 and "== duet" in ended.out and adapter.read_bytes() == before, ended.err


def test_a_name_of_many_files_is_cut_and_still_that_of_one_run_alone(comparison, tmp_path):
    near = [str(write_questions(tmp_path / f"{'near' * 20}{i}.jsonl", ["Who owns broom 7?"])) for i in range(3)]
    config = comparison({"npo": None}, sweeps={"near": {"method": "duet", "neighbours": [near[:2], near[1:], near]}})
    _, sweeps = all_trials(parse(CompareSettings, "compare", "Compare.", ["-c", str(config)]))
    for trial in sweeps["near"]:
        trial.folder.mkdir(parents=True)  # a disk takes the name
    assert len({trial.folder for trial in sweeps["near"]}) == 3 and all(t.folder.is_dir() for t in sweeps["near"])


def test_a_run_can_be_repeated_by_its_own_config_to_the_same_bytes(command, comparison, tmp_path):
    assert "were run before" in command("compare", "-c", comparison({"simnpo": TRIED})).out
    folder = tmp_path / "out" / "runs" / "simnpo" / "learning_rate=0.05"  # the second: it was lent targets and states
    other = tmp_path / "other"
    ended = command("train", "-c", folder / "config.yaml", "--adapter-path", other)
    assert ended.code == 0 and "were run before" not in ended.out
    assert (other / "adapters.safetensors").read_bytes() == (folder / "adapters" / "adapters.safetensors").read_bytes()


def test_a_comparison_that_was_cut_off_goes_on_and_the_cut_run_resumes(command, comparison, tmp_path, monkeypatch):
    config = comparison({"graddiff": TRIED})
    batch, calls = Stream.batch, []

    def interrupting(self, rows):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return batch(self, rows)

    monkeypatch.setattr(Stream, "batch", interrupting)
    ended = command("compare", "-c", config)
    assert ended.code == 2 and "interrupted" in ended.err and "the same command goes on" in ended.err
    assert not (tmp_path / "out" / "results.json").exists()
    runs = tmp_path / "out" / "runs" / "graddiff"
    assert json.loads((runs / "learning_rate=1e-3" / "run.json").read_text())["cut_off"]
    ended = command("compare", "-c", config)
    assert ended.code == 0, ended.err
    assert "going on from step 2 of 4" in ended.out and len(calls) == 4 + 4
    assert "cut_off" not in json.loads((runs / "learning_rate=1e-3" / "run.json").read_text())


def test_parts_run_in_several_processes_are_gathered_by_one_and_nothing_is_run_again(command, comparison, tmp_path):
    config = comparison({"duet": None, "npo": None}, sweeps={"K": {"method": "duet", "top_k": 3}})
    parts = [
        subprocess.Popen(
            [sys.executable, "-m", "duet_mlx.compare", "-c", config, "--only", *names],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for names in (["duet", "K"], ["npo"])
    ]  # fmt: skip
    said = [part.communicate()[0] for part in parts]
    assert [part.returncode for part in parts] == [0, 0], said
    assert "duet, K: done; the same command without --only" in said[0]
    assert "== duet" in said[0] and "== duet" not in said[1] and "== npo" in said[1] and "== K" not in said[1]
    assert not (tmp_path / "out" / "results.json").exists()
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    ended = command("compare", "-c", config)
    assert ended.code == 0, ended.err
    assert "==" not in ended.out and "answers" not in ended.err  # neither trained nor asked
    assert (
        files.items() <= {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}.items()
    )
    results = load_results(tmp_path / "out" / "results.json")
    models = [list(dict.fromkeys(row["model"] for row in results[part])) for part in ("rows", "ablations")]
    assert models == [["base", "base + context", "duet", "npo"], ["base", "base + context", "K"]]


def test_a_grid_that_another_process_runs_is_left_to_it(refused, comparison, tmp_path):
    config = comparison({"duet": TRIED, "npo": TRIED})
    folder = tmp_path / "out" / "runs" / "npo"
    folder.mkdir(parents=True)
    with only_run_in(folder):
        for part in ([], ["--only", "npo"]):
            refused("compare", "-c", config, *part, says=(f"--out {folder}", "another run is writing there"))
    assert not list(tmp_path.rglob("adapters.safetensors"))


def test_targets_are_lent_by_the_run_that_has_them_and_not_by_the_last_one(command, comparison, tmp_path):
    sweeps = {"n": {"method": "duet", "positions": [1, 2]}, "δ": {"method": "duet", "positions": 1, "delta": [2.0]}}
    ended = command("compare", "-c", comparison({"duet": {"positions": 3}}, sweeps=sweeps))
    assert ended.code == 0, ended.err
    built = {run.partition(" ")[0]: "targets: built" in run for run in ended.out.split("== ")[1:-1]}
    assert ended.out.count("targets: built now") == 3  # none for validation questions, which no step watches
    assert "targets: reused" in ended.out.split("== δ")[1], built
    # One that cannot be read, or is of another version, lends nothing and stops nothing.
    spoilt = {"n/positions=1": None, "n/positions=2": {"method": "gone"}, "duet/run": {"method_parameters": 1}}
    for run, settings in spoilt.items():
        file = tmp_path / "out" / "runs" / run / "adapters" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "settings": settings}))
    sweeps = {"K": {"method": "duet", "positions": 2, "delta": 0.7}}
    ended = command("compare", "-c", comparison({"context": None}, sweeps=sweeps))
    assert ended.code == 0 and "targets: built now" in ended.out, ended.err


def test_a_file_that_is_being_written_is_not_lent(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("targets.safetensors", ".partial.valid_targets.safetensors"):
        (tmp_path / "there" / name).write_text(name)
    gone = tmp_path / "there" / "gone_targets.safetensors"
    _copy([*(tmp_path / "there").iterdir(), gone], tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"targets.safetensors": b"targets.safetensors"}


def test_a_group_of_ones_own_has_a_column_and_counts_in_no_other(command, comparison, tmp_path):
    also = []
    for role, text in (("forget", "Is the owl grey?"), ("general", "Is the bee small?")):
        also.append(f"{role}, yes or no={write_questions(tmp_path / f'{role}_own.jsonl', [text])}")
    ended = command("compare", "-c", comparison({"ga": {"iters": 1}}, also=also, trained=True))
    assert ended.code == 0, ended.err
    heads = [cell.strip() for cell in (tmp_path / "out" / "table.md").read_text().splitlines()[0].split("|")]
    assert heads[2:4] == ["forget ↓", "trained on ↓"] and heads.index("forget, yes or no ↓") + 1 == heads.index(
        "general, yes or no ↑"
    )
    results = load_results(tmp_path / "out" / "results.json")
    counts = {row["group"]: row["n"] for row in results["rows"] if row["metric"] == "broken"}
    assert counts["forget"] == counts["forget, yes or no"] == 1 and counts["forget, trained on"] == 6


def test_a_run_that_diverges_is_a_result_and_the_others_go_on(command, comparison, tmp_path):
    config = comparison({"ga": {"learning_rate": [1e-3, 1e38]}})
    for _ in range(2):  # a failed run is not repeated either
        ended = command("compare", "-c", config)
        assert ended.code == 0, ended.err
        assert "failed: ga {'learning_rate': 1e+38}: step" in ended.out and "not finite" in ended.out
    assert "== ga" not in ended.out
    models = {row["model"] for row in load_results(tmp_path / "out" / "results.json")["rows"]}
    assert "ga, learning_rate 0.001" in models
    assert "ga: 2 of 2 runs there, 1 of them diverged" in command("compare", "-c", config, "--dry-run").out
    file = tmp_path / "out" / "runs" / "ga" / "learning_rate=1e+38" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base": {"model": "another"}}))
    assert "ga: 1 of 2 runs there" in command("compare", "-c", config, "--dry-run").out


def test_a_run_that_diverged_is_not_made_again_under_another_name(command, comparison):
    diverging = {"method": "ga", "learning_rate": 1e38}
    ended = command("compare", "-c", comparison({"ga": {"iters": 1}}, sweeps={"one": diverging, "other": diverging}))
    assert ended.code == 0, ended.err
    assert "== one" in ended.out and "== other" not in ended.out
    assert all(f"failed: {name} {{}}: step" in ended.out for name in ("one", "other"))


def test_quick_runs_the_first_trial_of_each_grid_with_its_own_settings(command, comparison, tmp_path):
    config = comparison(
        {"duet": TRIED, "npo": TRIED}, sweeps={"K": {"method": "duet", "top_k": [1, 2]}}, seeds=3, trained=True,
        quick_settings={"iters": 2, "valid_forget": []},
        quick_evaluate={"retain_questions": 1, "max_tokens": 2, "answers_only": True, "benchmark": []},
    )  # fmt: skip
    test = yaml.safe_load((tmp_path / "evaluate.yaml").read_text())
    test["retain"] = str(write_questions(tmp_path / "two.jsonl", ["What do birds make?", "What do ants make?"]))
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(test))
    ended = command("compare", "-c", config, "--quick")
    assert ended.code == 0, ended.err
    assert not (tmp_path / "out").exists()
    results = load_results(tmp_path / "out-quick" / "results.json")
    assert {row["n"] for row in results["rows"] if (row["group"], row["metric"]) == ("general", "broken")} == {1}
    # A single trial need not be validated: nothing is chosen.
    assert not list((tmp_path / "out-quick").rglob("valid/results.json"))
    configs = [json.loads(p.read_text()) for p in (tmp_path / "out-quick").rglob("adapter_config.json")]
    assert sorted((c["settings"]["method"], c["step"], c["settings"]["learning_rate"]) for c in configs) == [
        ("duet", 2, 1e-3), ("npo", 2, 1e-3)
    ]  # fmt: skip


def test_the_pages_own_comparison_is_accepted(tmp_path, monkeypatch):
    model = tiny_model(tmp_path / "model", max_position_embeddings=2048)
    page = (ROOT / "examples" / "compare" / "README.md").read_text(encoding="utf-8")
    for name, text in re.findall(r"    # (\w+\.yaml)\n((?:    .*\n)+)", page):
        text = textwrap.dedent(text).replace("mlx-community/Llama-3.2-3B-Instruct-4bit", str(model))
        (tmp_path / name).write_text(text.replace("examples/", f"{ROOT}/examples/"))
    for kind in ("", "valid_", "test_"):
        for role in ("forget", "general", "near"):
            questions = [f"Who has the {role} {thing} of {kind or 'the'} school?" for thing in ("owl", "map", "cat")]
            write_questions(tmp_path / f"{kind}{role}.jsonl", questions)
    monkeypatch.chdir(tmp_path)
    settings = parse(CompareSettings, "compare", "Compare.", ["-c", "compare.yaml"])
    trials = {name: trials for part in all_trials(settings) for name, trials in part.items()}
    assert {name: len(of) for name, of in trials.items()} == {
        "duet": 4, "npo": 4, "refusal, retain kl": 4, "context": 0, "DUET, K": 2
    }  # fmt: skip
    all_of_them = [trial for of in trials.values() for trial in of]
    check_inputs(settings, all_of_them, evaluation_of(settings))
    check_methods(all_of_them)


BAD = {
    "unlike budgets": ({"duet": TRIED, "npo": {"beta": [0.1, 0.2, 0.3]}}, {}, ("duet 2, npo 3", "as many")),
    "an unknown method": ({"dpoo": {}}, {}, ("dpoo", "duet")),
    "a misspelt setting": ({"npo": {"bta": [1]}}, {}, ("npo", "'bta'", '"beta"')),
    "a setting of another method": ({"npo": {"margin": [1]}}, {}, ("npo", "'margin'")),
    "no values": ({"npo": {"beta": []}}, {}, ("npo", "beta", "empty")),
    "a list for a grid": ({"npo": [1]}, {}, ("npo", "settings with lists", "[1]")),
    "a value that is refused": ({"npo": {"beta": [1, 0]}}, {}, ("npo", "beta", "more than 0")),
    "RMU without its layer": ({"rmu": None}, {}, ("rmu", "layer")),
    "a name twice": ({"duet": None}, {"sweeps": {"duet": {"top_k": [1]}}}, ("duet", "another name")),
    "no methods": ({}, {}, ("--methods is missing",)),
    "nothing to train": ({"context": None}, {}, ("context alone trains nothing", "duet_mlx.evaluate")),
    "a part that there is not": ({"duet": None}, {"only": ["deut"]}, ("--only", "'deut'", '"duet"')),
    "a part of unlike budgets": ({"duet": TRIED, "npo": None}, {"only": ["npo"]}, ("duet 2, npo 1", "as many")),
    "more questions than there are": ({"duet": {"forget_questions": [2, 7]}}, {}, ("--forget-questions 7", "hold 6")),
    "a group without a file": ({"duet": None}, {"also": ["mine"]}, ("--also 'mine'", "GROUP=")),
    "a quick setting": ({"duet": None}, {"quick": True, "quick_evaluate": {"max_tokns": 4}}, ("quick_evaluate: unkn",)),
    "a layer that is not there": ({"rmu": {"layer": 99, "num_layers": 2}}, {}, ("methods rmu", "expected 0 to 0")),
    "a rank that cannot be": ({"npo": {"lora_parameters": {"rank": 9999}}}, {}, ("methods npo", "rank: 9999")),
    "LoRA on the head": ({"kl": {"keys": [["model.embed_tokens"]]}}, {}, ("methods kl", "all logits")),
    "other weights' rank": ({"npo": {"rank": [2, 9999]}}, {}, ("methods npo {'rank': 9999}", "rank: 9999")),
    "refusals that are not there": ({"refusal": {"refusals": "nope.txt"}}, {}, ("methods refusal", "nope.txt")),
    "more candidates than words": ({"duet": {"top_k": [5, 10**6]}}, {}, ("methods duet", "--top-k 1000000")),
    "positions beyond the window": ({"duet": {"positions": 5000}}, {}, ("methods duet", "--positions")),
    "no room for a question": ({"npo": {"max_seq_length": 5}}, {}, ("methods npo", "--max-seq-length")),
    "no such schedule": ({"npo": {"lr_schedule": {"name": "linaer"}}}, {}, ("methods npo", "linaer")),
    "an adapter of a run's own": ({"npo": {"resume_adapter_file": "a"}}, {}, ("methods npo", "resume_adapter_file")),
    "the name of a row": ({"base": {"method": "duet"}}, {}, ("'base'", "another name")),
    "names of one folder": ({"a/b": {"method": "duet"}, "A:b": {"method": "npo"}}, {}, ("'A:b'", "share a folder")),
    "a list inside": ({"npo": {"method_parameters": {"beta": [0.1, 1.0]}}}, {}, ("npo: method_parameters: beta",)),
    "one number twice": ({"npo": {"learning_rate": ["1e-3", 0.001]}}, {}, ("npo: learning_rate", "twice")),
    "several methods": ({"all": {"method": ["duet", "npo"]}}, {}, ("methods all", "['duet', 'npo']")),
    "a number for a name": ({8: {"method": "duet"}}, {}, ("found 8", "quotes")),
    "one value twice": ({"npo": {"beta": [0.5, 1.0, 0.5]}}, {}, ("methods npo", "0.5 stands there twice")),
    "settings of context": ({"context": {"topic": "owls"}, "duet": None}, {}, ("methods context", "topic")),
    "other questions to choose by": ({"npo": {**TRIED, "valid_retain": [[]]}}, {}, ("valid_retain", "same questions")),
    "two rows of one label": (
        {"duet": None}, {"sweeps": {"K": {"method": "duet", "top_k": [3, 5]},
                                    "K, top_k 3": {"method": "npo"}}}, ("two runs would be the row 'K, top_k 3'",),
    ),
    "a name that is no folder": ({"..": {"method": "duet"}}, {}, ("'..' cannot be the name of a folder",)),
    "a group that --trained makes": (
        {"duet": None}, {"trained": True, "also": ["forget, trained on=x.jsonl"]}, ("--also forget, trained on",),
    ),
    "seeds beyond all": ({"duet": {"seed": 2**64 - 1}}, {"seeds": 2}, ("--seeds 2", "2^64")),
    "other neighbours": ({"npo": TRIED}, {"valid_neighbours": ["other.jsonl"]}, ("--valid-neighbours other.jsonl",)),
    "no seed": ({"duet": None}, {"seeds": 0}, ("--seeds 0", "1 or more")),
    "a sweep of fewer than none": ({"duet": None}, {"sweep_questions": -1}, ("--sweep-questions -1", "0 or more")),
    "fewer than no questions": ({"duet": None}, {"valid_questions": -1}, ("--valid-questions -1", "0 or more")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_any_run_is_said_before_the_first(refused, comparison, tmp_path, case):
    methods, more, says = BAD[case]
    refused("compare", "-c", comparison(methods, **more), says=says)
    assert not list(tmp_path.rglob("adapters.safetensors"))


EVALUATIONS = {
    "no context": ({"context": None}, ("evaluate.yaml", "no context", "in-context")),
    "no such context": ({"context": "refuse-al"}, ("refuse-al",)),
    "no room": ({"max_tokens": 0}, ("--max-tokens 0",)),
    "nothing beside": ({"beside": ["mine=none.json"]}, ("none.json",)),
    "answers beyond the window": ({"max_tokens": 5000}, ("lower --max-tokens",)),
    "another base": ({"model": "some/other"}, ("some/other", "one base")),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_what_is_wrong_with_the_evaluation_is_said_before_the_first_run(refused, comparison, tmp_path, case):
    more, says = EVALUATIONS[case]
    config = comparison({"duet": None, "icu": {"method": "context"}})
    test = yaml.safe_load((tmp_path / "evaluate.yaml").read_text())
    test = {key: value for key, value in {**test, **more}.items() if value is not None}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(test))
    refused("compare", "-c", config, says=says)
    assert not list(tmp_path.rglob("adapters.safetensors"))


@pytest.mark.parametrize("key", ["model", "forget"])
def test_what_makes_a_missing_file_is_said(refused, comparison, tmp_path, key):
    config = comparison({"duet": None}, made_by="make tofu")
    train = yaml.safe_load((tmp_path / "train.yaml").read_text())
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**train, key: str(tmp_path / "made" / "one.gguf")}))
    refused("compare", "-c", config, says=("one.gguf: no such file; `make tofu` makes it",))


@pytest.mark.parametrize(("name", "runs"), [("config", 112), ("tofu", 60)])
def test_the_examples_grids_are_accepted_and_each_method_has_as_many_trials(tmp_path, monkeypatch, name, runs):
    monkeypatch.chdir(ROOT)
    settings = parse(CompareSettings, "compare", "Compare.", ["-c", f"examples/compare/{name}.yaml"])
    grids, sweeps = all_trials(replace(settings, out=str(tmp_path)))
    compared = {trial.settings.method for trials in grids.values() for trial in trials}
    assert compared == {"duet", "ga", "graddiff", "npo", "simnpo", "idkdpo", "flat", "refusal", "undial", "rmu", "kl"}
    assert compared <= set(METHODS)  # a new method may wait until it is worth an hour
    assert {len(trials) for name, trials in grids.items() if name != "context"} == {4}
    trials = [trial for part in (grids, sweeps) for trials in part.values() for trial in trials]
    assert len({trial.folder for trial in trials}) == len(trials) == runs
    quick, _ = all_trials(replace(settings, out=str(tmp_path), quick=True, sweeps={}))
    assert {trial.settings.iters for trials in quick.values() for trial in trials} == {8}
    evaluation_of(replace(settings, quick=True))  # raises for what duet_mlx.evaluate refuses


def test_the_examples_questions_are_there_and_as_many_as_its_sweeps_ask_for(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("duet_mlx.model.resolve_model", lambda _: None)  # the model itself is fetched by `make model`
    monkeypatch.setattr("duet_mlx.model.load_tokenizer", lambda *_: (None, None))
    monkeypatch.setattr("duet_mlx.evaluate._all_prompts", lambda *_: None)
    settings = parse(CompareSettings, "compare", "Compare.", ["-c", "examples/compare/config.yaml"])
    grids, sweeps = all_trials(replace(settings, out=str(tmp_path)))
    trials = [trial for trials in (*grids.values(), *sweeps.values()) for trial in trials]
    check_inputs(settings, trials, evaluation_of(settings))
    # The values of train.yaml, which stand in nine sweeps, are those of one run; `context` has a topic besides. Of the
    # sweeps of baselines six runs are those of others too.
    assert len({json.dumps(essence(trial.settings)) for trial in trials}) == len(trials) - 17
    asked = groups_of(asked_of_sweeps(evaluation_of(settings), settings.sweep_questions))
    assert {len(asked[group]) for group in ("forget", "general", "neighbours")} == {60}


def test_without_the_implanted_model_the_tofu_comparison_says_what_makes_it(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if (ROOT / "examples" / "tofu" / "out" / "full" / "data").exists():
        pytest.skip("the implant experiment was run here")
    says = ("examples/tofu/out/full/data/forget.jsonl", "no such file", "`make tofu` makes it")
    refused("compare", "-c", "examples/compare/tofu.yaml", "--out", tmp_path / "out", says=says)
