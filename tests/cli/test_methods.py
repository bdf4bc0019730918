"""`--method`: every baseline from flags to adapter, what is read once and reused, what is refused before training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from duet_mlx.labels import refusals_of
from duet_mlx.methods import METHODS, numbers_of, unread
from duet_mlx.train import prepare, train
from duet_mlx.train_settings import TrainSettings, parse_settings
from tests.tiny_model import QUESTIONS, contents, replaced, write_questions

ROOT = Path(__file__).resolve().parents[2]
RMU = ["--method-parameters", "layer=0", "c=2"]


def answered(quick, *more):
    """The flags of a run without its context: methods that are trained on answers need none."""
    at = quick.index("--context")
    return [*quick[:at], *quick[at + 2 :], "--answer-tokens", "6", *more]


def test_the_page_lists_methods_with_the_numbers_and_papers_that_they_have():
    page = (ROOT / "examples" / "compare" / "README.md").read_text(encoding="utf-8").partition("## The methods")[2]
    rows = [line.strip("| ").split(" | ") for line in page.partition("\n## ")[0].splitlines() if line[:3] == "| `"]
    assert rows[0][0] == "`--method`" and len({row[0] for row in rows}) > 11
    for name, _, _, numbers, paper in ([cell.strip("`") for cell in row] for row in rows[1:]):
        assert (numbers, paper) == (numbers_of(name) or "–", METHODS[name].paper)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_from_questions_and_leaves_an_adapter_that_loads(command, quick, model, tmp_path, method):
    flags = quick if METHODS[method].labels == "teacher" else answered(quick)
    more = RMU if method == "rmu" else []
    ended = command("train", *flags, "--method", method, *more, "--steps-per-eval", 4)
    assert ended.code == 0, ended.err
    folder = tmp_path / "adapters"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["settings"]["method"] == method and config["step"] == 4
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert len(log) == 4 and all(row["gradient_norm"] > 0 for row in log)
    out = tmp_path / "out"
    ended = command(
        "evaluate", "--model", model, "--adapter-path", folder, "--forget", quick[quick.index("--forget") + 1],
        "--max-tokens", 4, "--out", out,
    )  # fmt: skip
    assert ended.code == 0, ended.err


OTHERWISE = {
    "top_k": 7, "candidates": "teacher", "delta": 0.2, "center": False, "first_share": 0.1, "positions": 2,
    "retain_context": "teacher", "context": "refuse-all", "topic": "owls", "answers": "gold", "answer_tokens": 3,
    "retain_loss": "kl", "refusals": "nowhere.txt", "learning_rate": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("schedule", [{}, {"name": "linear_schedule", "arguments": [1e-3, 1e-4, 4]}])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_does_not_read_changes_nothing(quick, tmp_path, method, schedule):
    """By it a run is taken for another: what is said to be unread here, and is not, would hand out a wrong adapter."""
    flags = ["--method", method, *(RMU if method == "rmu" else []), "--steps-per-eval", "0", "--positions", "1"]
    settings = parse_settings("train", "Train.", [*quick, *flags], {"lr_schedule": schedule})
    other = replace(settings, **{name: OTHERWISE[name] for name in unread(settings)})
    assert len(unread(settings)) >= 4 and unread(other) == unread(settings)
    adapters = []
    for number, one in enumerate((settings, other)):
        one = replace(one, adapter_path=str(tmp_path / str(number)))
        adapters.append((train(one, prepare(one)) / "adapters.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_the_bases_answers_are_read_once_for_all_methods_that_train_on_them(command, quick, tmp_path):
    assert command("train", *answered(quick), "--method", "npo").code == 0
    before = (tmp_path / "adapters" / "targets.safetensors").read_bytes()
    for method, more in (("simnpo", ["--method-parameters", "beta=1", "margin=0.1"]), ("graddiff", []), ("ga", [])):
        said = command("train", *answered(quick), "--method", method, *more, "--overwrite").out
        assert "targets: reused" in said, said
    assert (tmp_path / "adapters" / "targets.safetensors").read_bytes() == before
    for more in (["--method", "flat"], ["--method", "npo", "--answer-tokens", "5"]):
        said = command("train", *answered(quick), "--overwrite", *more).out
        assert "targets: built now (settings changed" in said, said


def test_retention_by_kl_reads_the_bases_states_once(command, quick, tmp_path):
    flags = [*answered(quick), "--method", "simnpo", "--retain-loss", "kl"]
    ended = command("train", *flags)
    assert ended.code == 0, ended.err
    import mlx.core as mx

    targets = mx.load(str(tmp_path / "adapters" / "targets.safetensors"))
    assert targets["states"].shape == (*targets["position_mask"].shape, 64)
    said = command("train", *flags, "--overwrite", "--method", "graddiff").out
    assert "targets: reused" in said


def test_validation_asks_retain_questions_of_methods_that_train_on_none(command, quick, tmp_path):
    valid = write_questions(tmp_path / "valid.jsonl", ["What do birds make?"])
    for method in (["ga"], ["rmu", *RMU, "alpha=0"]):  # at alpha 0; RMU has a retain term of its own, were there one
        flags = ["--method", *method, "--retain-loss", "kl", "--valid-retain", str(valid), "--steps-per-eval", "4"]
        ended = command("train", *answered(quick), *flags, "--overwrite")
        assert ended.code == 0 and "validation loss, retain" in ended.out, ended.err


def test_one_candidate_that_is_centred_is_noted_as_it_has_no_loss(command, quick):
    flags = replaced(quick, "--top-k", "1")
    assert "--no-center takes it as it is" in command("train", *flags).err
    assert "--no-center" not in command("train", *flags, "--no-center", "--overwrite").err


def test_gold_answers_are_those_of_the_files(command, quick, tmp_path):
    flags = list(quick)
    for role in ("forget", "retain"):
        file = write_questions(tmp_path / f"{role}.jsonl", QUESTIONS[role], answer=["a mouse", "a rat"])
        flags = replaced(flags, f"--{role}", str(file))
    ended = command("train", *answered(flags), "--method", "graddiff", "--answers", "gold")
    assert ended.code == 0, ended.err
    import mlx.core as mx
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(quick[quick.index("--model") + 1])
    targets = mx.load(str(tmp_path / "adapters" / "targets.safetensors"))
    count = targets["position_mask"][0].sum().item()
    assert tokenizer.decode(targets["ids"][0, :count, 0].tolist()) == "a mouse<|im_end|>"
    flags = replaced(flags, "--retain", str(write_questions(tmp_path / "retain.jsonl", QUESTIONS["retain"])))
    ended = command("train", *answered(flags), "--method", "graddiff", "--answers", "gold", "--overwrite")
    assert ended.code == 2 and "retain.jsonl:1: has no answer, and neither have 7 more" in ended.err


def test_refusals_are_the_users_own(command, quick, tmp_path):
    file = tmp_path / "refusals.txt"
    file.write_text("No.\n\nNever.\n")
    assert command("train", *answered(quick), "--method", "idkdpo", "--refusals", file).code == 0
    file.write_text("No.\n")
    said = command("train", *answered(quick), "--method", "idkdpo", "--refusals", file, "--overwrite").out
    assert "targets: built now (settings changed" in said


def test_refusals_are_read_as_their_files_come_quoted_or_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "refusals.txt"
    file.write_text("\"No, never.\"\n\nI'm sorry, I can't.\n", encoding="utf-8-sig")
    assert refusals_of(TrainSettings(refusals=str(file))) == ["No, never.", "I'm sorry, I can't."]


REFUSED = {
    "a number that the method has not": (["--method", "npo", "--method-parameters", "bta=1"], ("'bta'", '"beta"')),
    "numbers for DUET": (["--method-parameters", "beta=1"], ("'beta'", "duet has none")),
    "a word for a number": (["--method", "npo", "--method-parameters", "beta=big"], ("beta", "a number", "'big'")),
    "no pair": (["--method", "npo", "--method-parameters", "beta"], ("'beta'", "NAME=VALUE")),
    "beta of 0": (["--method", "npo", "--method-parameters", "beta=0"], ("beta", "more than 0, found 0")),
    "a negative weight": (["--method", "npo", "--method-parameters", "alpha=-1"], ("alpha", "at least 0, found -1")),
    **{
        f"RMU with {key}={value}": (
            ["--method", "rmu", *RMU, "--method-parameters", f"{key}={value}"],
            (f"method_parameters {key}: expected a whole number of 0 or more, found {found}",),
        )
        for key, value, found in (
            ("layer", "0.0", "0.0"), ("layer", "-1", "-1"), ("layer", "1e1", "10.0"), ("direction_seed", "0.5", "0.5"),
            ("direction_seed", "1e30", "1e+30"), ("direction_seed", "-1", "-1"),
        )
    },
    "RMU without its layer": (["--method", "rmu"], ("rmu", "layer=7")),
    "RMU above the last layer but one": (["--method", "rmu", "--method-parameters", "layer=1"], ("layer 1", "0 to 0")),
    "RMU below the adapted layers": (["--method", "rmu", *RMU, "--num-layers", "1"], ("layer 0", "--num-layers")),
    "RMU with another retain term": (["--method", "rmu", *RMU, "--retain-loss", "kl"], ("--retain-loss kl", "its own")),
    "gold answers that are missing": (["--method", "npo", "--answers", "gold"], ("forget.jsonl:1", "--answers base")),
    "no such file of refusals": (["--method", "flat", "--refusals", "missing.txt"], ("missing.txt", "o such file")),
    "an answer of no token": (["--method", "npo", "--answer-tokens", "0"], ("--answer-tokens 0", "1 or more")),
    "DUET without a context": ([], ("--context is missing",)),
    "KL without a context": (["--method", "kl"], ("--context is missing",)),
    "KL with LoRA on the embedding": (
        ["--method", "undial", "--lora-parameters", "keys=[model.embed_tokens]"], ("undial", "all logits")
    ),
}  # fmt: skip


def test_a_file_of_refusals_that_is_no_text_is_refused(refused, quick, model, tmp_path):
    file = model / "model.safetensors"
    says = (f"--refusals {file}:1: not UTF-8 text", "one refusal a line")
    refused("train", *answered(quick), "--method", "flat", "--refusals", file, says=says)
    assert not (tmp_path / "adapters" / "targets.safetensors").exists()


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_method_lacks_is_said_before_training(refused, quick, tmp_path, case):
    flags, says = REFUSED[case]
    refused("train", *answered(quick), *flags, says=says)
    assert not (tmp_path / "adapters" / "targets.safetensors").exists()


@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_refuses_what_the_run_would(refused, quick, case):
    flags, says = REFUSED[case]
    refused("train", *answered(quick), *flags, "--dry-run", says=says)


def test_the_teacher_of_a_method_without_one_is_refused(refused, quick):
    refused("teacher", *quick, "--method", "npo", says=("--method npo", "no teacher"))


def test_an_interrupted_baseline_goes_on_to_the_same_bytes(command, quick, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    for folder, iters in ((whole, 4), (half, 2)):
        flags = replaced(answered(quick), "--adapter-path", str(folder))
        schedule = ["-c", tmp_path / "constant.yaml"]
        schedule[1].write_text("lr_schedule: {name: cosine_decay, arguments: [0.001, 100]}\n")
        assert command("train", *flags, *schedule, "--method", "idkdpo", "--iters", iters).code == 0
    adapter = half / "adapters.safetensors"
    flags = replaced(answered(quick), "--adapter-path", str(half))
    ended = command("train", *flags, *schedule, "--method", "idkdpo", "--iters", 4, "--resume-adapter-file", adapter)
    assert ended.code == 0, ended.err
    assert adapter.read_bytes() == contents(whole)["adapters.safetensors"]


def test_a_dictionarys_flag_adds_to_what_the_yaml_says(command, quick, tmp_path):
    config = tmp_path / "config.yaml"
    # YAML reads 1e-1 and 1e0 as text.
    config.write_text("lora_parameters: {rank: 2, scale: 1e0}\nmethod_parameters: {alpha: 5e-1, gamma: 1}\n")
    flags = ["-c", config, "--method", "npo", "--lora-parameters", "scale=3", "--method-parameters", "beta=1e-1"]
    assert command("train", *answered(quick), *flags).code == 0
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert saved["lora_parameters"] | {"keys": None} == {"rank": 2, "scale": 3, "dropout": 0.0, "keys": None}
    assert saved["settings"]["method_parameters"] == {"alpha": 0.5, "gamma": 1, "beta": 0.1}


def test_an_answer_longer_than_max_seq_length_is_named(refused, quick, tmp_path):
    flags = list(quick)
    for role in ("forget", "retain"):
        long = "very " * 60 + "old" if role == "retain" else "short"
        flags = replaced(
            flags, f"--{role}", str(write_questions(tmp_path / f"{role}.jsonl", QUESTIONS[role], answer=long))
        )
    more = ["--method", "graddiff", "--answers", "gold", "--max-seq-length", 100]
    for mode in ([], ["--dry-run"]):
        refused("train", *answered(flags), *more, *mode, says=("retain.jsonl:1", "--max-seq-length of 100"))
