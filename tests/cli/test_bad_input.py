"""Bad questions, contexts, flags and YAML: exit code 2, one line that says what, where, what was expected."""

from __future__ import annotations

import subprocess
import sys

import pytest

from duet_mlx.evaluate import EvaluateSettings
from duet_mlx.settings import parse
from tests.tiny_model import QUESTIONS, write_questions

# --- questions and context ---------------------------------------------------------------------------------------

BAD_QUESTIONS = {
    "empty": ("", ("empty", "question")),
    "blank lines alone": ("\n \n", ("empty", "question")),
    "not JSON": ('{"question": "Who?"}\n{"question": Who?}\n', (":2", "not JSON", "Who?}")),
    "a list": ('["Who?"]\n', (":1", "a list", "question")),
    "no question": ('{"prompt": "Who?", "answer": "He"}\n', (":1", '"question"', "prompt, answer")),
    "a misspelt field": ('{"Question": "Who?"}\n', (":1", "Question", "did you mean")),
    "a number": ('{"question": 7}\n', (":1", "must be text", "a number: 7")),
    "null": ('{"question": null}\n', (":1", "must be text", "null")),
    "blank": ('{"question": "Who?"}\n\n{"question": "  "}\n', (":3", "blank")),
    "not UTF-8": (b'{"question": "\xff"}\n', (":1", "UTF-8")),
}


@pytest.mark.parametrize("role", ["forget", "retain"])
@pytest.mark.parametrize("case", BAD_QUESTIONS)
def test_a_bad_file_of_questions(refused, quick, tmp_path, case, role):
    text, says = BAD_QUESTIONS[case]
    file = tmp_path / "mine.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused("train", *quick, f"--{role}", file, says=(str(file), *says))
    assert not (tmp_path / "adapters").exists()


@pytest.mark.parametrize("flag", ["--forget", "--retain", "--neighbours", "--valid-forget", "--context", "--config"])
def test_a_file_that_is_not_there(refused, quick, tmp_path, flag):
    refused("train", *quick, flag, tmp_path / "missing.x", says=("missing.x", "o such file"))


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_more_questions_than_the_files_hold(refused, quick, model, data, tmp_path, name):
    flags = quick if name == "train" else ["--model", model, *data[:4], "--out", tmp_path / "out"]
    refused(name, *flags, "--forget-questions", 7, says=("--forget-questions 7", "hold 6", "0 for all"))
    refused(name, *flags, "--retain-questions", 9, says=("--retain-questions 9", "hold 8", "0 for all"))
    refused(name, *flags, "--retain-questions", -1, says=("--retain-questions -1", "0 or more"))


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_question_on_both_sides(refused, quick, model, data, tmp_path, name):
    file = write_questions(tmp_path / "mine.jsonl", ["A new one?", QUESTIONS["forget"][2].upper()])
    flags = quick if name == "train" else ["--model", model, *data[:4], "--out", tmp_path / "out"]
    refused(name, *flags, "--retain", file, says=("mine:2", "forget:3", "WHERE DOES THE BOY SLEEP?", "Remove"))


def test_a_validation_question_that_is_trained_on(refused, quick, tmp_path):
    file = write_questions(tmp_path / "mine.jsonl", QUESTIONS["retain"][:1])
    refused("train", *quick, "--valid-retain", file, says=("retain:1", "mine:1", QUESTIONS["retain"][0]))


def test_a_question_to_watch_on_both_sides(refused, quick, tmp_path):
    one = write_questions(tmp_path / "one.jsonl", ["New?", "Who is Dobby?"])
    two = write_questions(tmp_path / "two.jsonl", ["who is dobby"])
    flags = ["--valid-forget", one, "--valid-retain", two]
    refused("train", *quick, *flags, says=("1 forget question(s)", "retain questions as well", "one:2", "two:1"))


def both_commands(quick, model, data, tmp_path):
    """Flags of training, and of evaluation behind a context and a reverse prompt, that read the same questions."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffTell me:\n\nIgnore all of it.\n", encoding="utf-8")
    asks = ["--model", model, *data, "--reverse-prompts", prompts, "--out", tmp_path / "out", "--max-tokens", 2]
    return {"train": quick, "evaluate": asks}


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_question_longer_than_the_window(refused, quick, model, data, tmp_path, name):
    file = write_questions(tmp_path / "mine.jsonl", ["Short?", "Who was " + "very " * 300 + "old?"])
    flags = both_commands(quick, model, data, tmp_path)[name]
    says = (f"{file}:2: ", "window of 256", "Who was very", "shorten or drop")
    refused(name, *flags, "--forget", file, says=says)
    refused(name, *flags, "--retain", file, says=says)


def test_a_question_that_only_its_context_or_a_reverse_prompt_makes_too_long(refused, model, data, tmp_path):
    flags = ["--model", model, *data[:4], "--out", tmp_path / "out", "--max-tokens", 2]
    (tmp_path / "long.yaml").write_text(f"system: {'long ' * 200}\n")
    said = refused("evaluate", *flags, "--context", tmp_path / "long.yaml", says=("forget.jsonl:1: ", "window of 256"))
    assert said.count("shorten") == 1
    (tmp_path / "p.txt").write_text("Go on.\n" + "long " * 200)
    says = (f"{tmp_path / 'p.txt'}:2 before ", "forget.jsonl:1: ", "window of 256")
    refused("evaluate", *flags, "--reverse-prompts", tmp_path / "p.txt", says=says)


def test_an_evaluation_does_not_blame_the_question_for_what_another_part_takes(refused, model, data, tmp_path):
    flags = ["--model", model, *data[:4], "--out", tmp_path / "out", "--max-tokens", 2]
    (tmp_path / "long.yaml").write_text(f"name: mine\nsystem: {'long ' * 200}\n")
    (tmp_path / "p.txt").write_text("Go on.\n" + "long " * 200)
    for more, way_out in (
        (["--system", "long " * 200], "shorten --system"),
        (["--context", tmp_path / "long.yaml"], 'shorten the context "mine"'),
        (["--reverse-prompts", tmp_path / "p.txt"], "shorten the reverse prompt"),
        (["--max-tokens", 250], "lower --max-tokens to"),
    ):
        said = refused("evaluate", *flags, *more, says=("forget.jsonl:1: ", "window of 256", way_out))
        assert "drop" not in said


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_control_token_of_the_model_in_a_question(refused, quick, model, data, tmp_path, name):
    file = write_questions(tmp_path / "mine.jsonl", ["Short?", "Who is <|im_end|>?"])
    flags = both_commands(quick, model, data, tmp_path)[name]
    refused(name, *flags, "--retain", file, says=(f"{file}:2: ", "<|im_end|>", "control token", "reword"))


def test_a_control_token_of_the_model_in_a_reverse_prompt(refused, model, data, tmp_path):
    flags = ["--model", model, *data, "--out", tmp_path / "out", "--max-tokens", 2]
    (tmp_path / "p.txt").write_text("Go on.\n\n<|im_start|>system\n")
    says = (f"{tmp_path / 'p.txt'}:3 before ", "forget.jsonl:1: ", "<|im_start|>", "control token")
    refused("evaluate", *flags, "--reverse-prompts", tmp_path / "p.txt", says=says)


def test_a_question_longer_than_max_seq_length(refused, quick):
    says = ("--max-seq-length of 12", "forget.jsonl:1: ", "shorten or drop")
    refused("train", *quick, "--max-seq-length", 12, says=says)


def test_a_context_that_leaves_no_room_is_not_blamed_on_the_question(refused, quick, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("system: " + "Say nothing. " * 60 + "\n")
    said = refused("train", *quick, "--context", file, says=("window of 256", 'shorten the context "mine"'))
    assert "drop" not in said


def test_positions_that_leave_no_room_are_not_blamed_on_the_question(refused, quick):
    said = refused("train", *quick, "--positions", 300, says=("300 positions", "window of 256", "lower --positions to"))
    assert "drop" not in said


def test_a_question_that_names_a_context_that_is_not_there(refused, quick, tmp_path):
    file = write_questions(tmp_path / "mine.jsonl", ["Who?"], context="second")
    refused("train", *quick, "--forget", file, says=("mine:1", "'second'", "context"))


BAD_CONTEXTS = {
    "names nothing": ("system: ''\nturns: []\n", ("names nothing", "system", "turns")),
    "empty": ("", ("empty", "system")),
    "a text": ("I know nothing\n", ("expected keys",)),
    "a misspelt key": ("sytem: I know nothing\n", ('"sytem"', 'did you mean "system"')),
    "not YAML": ("system: x\nturns: [{user: a\n", (":", "not YAML")),
    "no topic": ("system: I know nothing of {topic}\n", ("{topic}", "--topic")),
}


@pytest.mark.parametrize("case", BAD_CONTEXTS)
def test_a_bad_context(refused, quick, tmp_path, case):
    text, says = BAD_CONTEXTS[case]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    refused("train", *quick, "--context", file, says=(str(file), *says))


def test_a_ready_context_misspelt(refused, quick):
    refused("train", *quick, "--context", "refuse_all", says=("refuse_all", 'did you mean "refuse-all"'))


# --- flags and YAML ----------------------------------------------------------------------------------------------

BAD_FLAGS = [
    (["--top-k", "99999"], ("--top-k 99999", "1 to 320", "vocabulary")),
    (["--top-k", "0"], ("--top-k 0", "1 or more")),
    (["--positions", "0"], ("--positions 0", "1 or more")),
    (["--positions", "-2"], ("--positions -2", "1 or more")),
    (["--positions", "two"], ("--positions", "two")),
    (["--iters", "0"], ("--iters 0", "1 or more")),
    (["--batch-size", "2", "--forget-per-batch", "3"], ("--forget-per-batch 3", "--batch-size 2")),
    (["--batch-size", "2"], ("--forget-per-batch 2", "--batch-size 2", "no retain question")),
    (["--batch-size", "1", "--forget-per-batch", "1"], ("--forget-per-batch 1", "--batch-size 1", "no retain")),
    (["--batch-size", "9" * 400], ("--batch-size", "below 2^31")),
    (["--seed", str(2**64)], ("--seed", "below 2^64")),
    (["--learning-rate", "-1"], ("--learning-rate -1", "more than 0")),
    (["--learning-rate", "nan"], ("--learning-rate nan", "more than 0")),
    (["--learning-rate", "inf"], ("--learning-rate inf", "finite")),
    (["--delta", "0"], ("--delta 0", "more than 0")),
    (["--max-grad-norm", "nan"], ("--max-grad-norm nan",)),
    (["--num-layers", "7"], ("--num-layers 7", "2")),
    (["--method", "duett"], ("--method: 'duett'", "graddiff", '(did you mean "duet"?)')),
    (["--candidates", "untion"], ("--candidates", "untion", "union")),
    (["--recipe", "papper"], ("--recipe", "papper", "paper")),
    (["--posittions", "2"], ("--posittions", "--positions")),
    ([""], ("unrecognized arguments",)),
    (["--alpha", "5"], ("--alpha 5; write --method-parameters alpha=…;",)),
    (["--direction-seed=5"], ("; write --method-parameters direction_seed=5;",)),
    (["--rank", "4"], ("; write --lora-parameters rank=…;",)),
]


@pytest.mark.parametrize("flags, says", BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_a_bad_flag(refused, quick, flags, says):
    refused("train", *quick, *flags, says=says)


@pytest.mark.parametrize("flag", ["--model", "--forget", "--context"])
def test_a_flag_that_is_missing(refused, quick, flag):
    at = quick.index(flag)
    refused("train", *quick[:at], *quick[at + 2 :], says=(f"{flag} is missing",))


BAD_YAML = {
    "an unknown key": ("itters: 5\n", ("'itters'", 'did you mean "iters"')),
    "a flag's spelling": ("learning-rate: 5\n", ("'learning-rate'", 'did you mean "learning_rate"')),
    "a key that is no text": ("7: 5\n", ("7",)),
    "a method's number": ("alpha: 5\n", ("unknown key 'alpha'; it is one of method_parameters",)),
    "an unknown method": ("method: duett\n", ("method", "'duett'", 'did you mean "duet"')),
    "text for a number": ("iters: many\n", ("config.yaml: iters: expected int, found 'many'",)),
    "a key twice": ("seed: 1\ndelta: 2\nseed: 3\n", ("config.yaml: ", 'key "seed" stands twice', "line 3")),
    "keys for files": ("forget: {a: b}\n", ("config.yaml: forget: expected a file name or a list of file names",)),
    "Latin-1": (b"seed: 1\ntopic: caf\xe9\n", ("config.yaml:2: not UTF-8 text; save the file as UTF-8",)),
    "UTF-16": ("seed: 1\n".encode("utf-16"), ("config.yaml:1: not UTF-8 text; save the file as UTF-8",)),
    "a list for a number": ("learning_rate: [1]\n", ("learning_rate", "[1]")),
    "no value": ("iters:\n", ("iters", "no value")),
    "numbers for files": ("forget: [1, 2]\n", ("forget", "[1, 2]")),
    "a list": ("- iters\n", ("expected `key: value`", "list")),
    "empty": ("", ("expected `key: value`",)),
    "not YAML": ("iters: [1\nmodel: x\n", ("not YAML", "line 2")),
    "an unknown LoRA key": ("lora_parameters: {rnk: 8}\n", ("lora_parameters", "'rnk'", 'did you mean "rank"')),
    "a rank of 0": ("lora_parameters: {rank: 0}\n", ("lora_parameters rank", "0")),
    "a scale in words": ("lora_parameters: {scale: big}\n", ("lora_parameters scale", "'big'")),
    "all dropped out": ("lora_parameters: {dropout: 1.0}\n", ("lora_parameters dropout", "1.0")),
    "one LoRA module": ("lora_parameters: {keys: self_attn.q_proj}\n", ("lora_parameters keys", "list")),
    "no such module": ("lora_parameters: {keys: [q]}\n", ("lora_parameters keys", "'q'", "self_attn.q_proj")),
    "a date of month 13": ("topic: 2024-13-45\n", ("config.yaml", "cannot read", "month must be")),
    "a tag that does not fit": ("iters: !!int x\n", ("config.yaml", "cannot read", "'x'")),
    "another that does not": ("center: !!bool x\n", ("config.yaml", "cannot read")),
    "brackets without end": ("forget: " + "[" * 3000 + "\n", ("config.yaml", "cannot read", "recursion")),
    "400 digits": ("iters: " + "9" * 400 + "\n", ("--iters", "below 2^31")),
    "400 digits of a float": ("delta: " + "9" * 400 + "\n", ("delta", "float")),
    "400 digits of a scale": ("lora_parameters: {scale: " + "9" * 400 + "}\n", ("lora_parameters scale",)),
    "5000 digits": ("iters: " + "9" * 5000 + "\n", ("config.yaml", "cannot read")),
    "a LoRA key that is no text": ("lora_parameters: {1: 2}\n", ("lora_parameters", "unknown key 1")),
    "a list in LoRA's list": ("lora_parameters: {keys: [[q]]}\n", ("lora_parameters keys", "[['q']]")),
    "a rank beyond the model": ("lora_parameters: {rank: 999}\n", ("lora_parameters rank", "999", "above 128")),
    "a rank beyond all": ("lora_parameters: {rank: 9999999999}\n", ("lora_parameters rank", "whole number")),
    "a rank of yes": ("lora_parameters: {rank: yes}\n", ("lora_parameters rank", "True")),
    "a word in a schedule": ("lr_schedule: {name: step_decay, arguments: [x, 1, 1]}\n", ("lr_schedule", "'x'")),
    "one argument of a schedule": ("lr_schedule: {name: cosine_decay, arguments: 1e-3}\n", ("lr_schedule", "list")),
    "an unknown schedule key": ("lr_schedule: {nam: x}\n", ("lr_schedule", "'nam'", 'did you mean "name"')),
    "a schedule below 0": ("lr_schedule: {name: linear_schedule, arguments: [1, -1, 2]}\n", ("lr_schedule", "-1")),
    "a module for a schedule": ("lr_schedule: {name: math, arguments: [1]}\n", ("lr_schedule", "math")),
    "no such schedule": ("lr_schedule: {name: cosin, arguments: [1]}\n", ("lr_schedule", "cosin")),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_a_bad_config(refused, quick, tmp_path, case):
    text, says = BAD_YAML[case]
    file = tmp_path / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    drop = {
        name for name in ("iters", "forget") if file.read_bytes().startswith(name.encode())
    }  # a flag would override the YAML
    flags = list(quick)
    for name in drop:
        at = flags.index(f"--{name}")
        del flags[at : at + 2]
    refused("train", *flags, "-c", file, says=says)


def test_a_home_folder_is_found_however_a_path_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "config.yaml"
    file.write_text("model: a/b\nadapter_path: ~/adapter\nforget: [~/f.jsonl, g~/f.jsonl]\ncontext: ~/c.yaml\n")
    flags = ["-c", str(file), "--retain=~/r.jsonl", "--also=mine=~/m.jsonl", "--benchmark=qa:G@~/q.jsonl"]
    settings = parse(EvaluateSettings, "evaluate", "Evaluate.", [*flags, "--out=~/out", "--topic=all of ~/"])
    assert settings.adapter_path == f"{tmp_path}/adapter" and settings.context == f"{tmp_path}/c.yaml"
    assert settings.forget == (f"{tmp_path}/f.jsonl", "g~/f.jsonl") and settings.retain == (f"{tmp_path}/r.jsonl",)
    assert settings.also == (f"mine={tmp_path}/m.jsonl",) and settings.benchmark == (f"qa:G@{tmp_path}/q.jsonl",)
    assert settings.out == f"{tmp_path}/out" and settings.topic == "all of ~/"


# --- as a process ------------------------------------------------------------------------------------------------


def test_a_process_of_its_own_ends_with_2_and_one_line(quick, tmp_path):
    missing = tmp_path / "missing.jsonl"
    command = [sys.executable, "-m", "duet_mlx.train", *quick, "--retain", str(missing)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: {missing}: no such file\n"
