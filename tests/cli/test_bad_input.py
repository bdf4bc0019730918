"""Bad input: exit code 2, one line on stderr that says what, where, what was expected; nothing lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from pathlib import Path

import pytest
from tiny_model import QUESTIONS, contents, tiny_model, write_questions

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
def test_a_question_on_both_sides(refused, quick, model, data, tmp_path, name):
    file = write_questions(tmp_path / "mine.jsonl", ["A new one?", QUESTIONS["forget"][2].upper()])
    flags = quick if name == "train" else ["--model", model, *data[:4], "--out", tmp_path / "out"]
    refused(name, *flags, "--retain", file, says=("mine:2", "forget:3", "WHERE DOES THE BOY SLEEP?", "Remove"))


def test_a_validation_question_that_is_trained_on(refused, quick, tmp_path):
    file = write_questions(tmp_path / "mine.jsonl", QUESTIONS["retain"][:1])
    refused("train", *quick, "--valid-retain", file, says=("retain:1", "mine:1", QUESTIONS["retain"][0]))


def test_a_question_longer_than_the_window(refused, quick, tmp_path):
    file = write_questions(tmp_path / "mine.jsonl", ["Short?", "Who was " + "very " * 300 + "old?"])
    refused("train", *quick, "--forget", file, says=("mine:2", "window of 256", "Who was very", "shorten or drop"))


def test_a_question_longer_than_max_seq_length(refused, quick):
    refused("train", *quick, "--max-seq-length", 12, says=("--max-seq-length of 12", "forget:1", "shorten or drop"))


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
    (["--learning-rate", "-1"], ("--learning-rate -1", "more than 0")),
    (["--learning-rate", "nan"], ("--learning-rate nan", "more than 0")),
    (["--learning-rate", "inf"], ("--learning-rate inf", "finite")),
    (["--delta", "0"], ("--delta 0", "more than 0")),
    (["--max-grad-norm", "nan"], ("--max-grad-norm nan",)),
    (["--num-layers", "7"], ("--num-layers 7", "2")),
    (["--method", "duett"], ("--method", "duett", "duet")),
    (["--candidates", "untion"], ("--candidates", "untion", "union")),
    (["--recipe", "papper"], ("--recipe", "papper", "paper")),
    (["--posittions", "2"], ("--posittions", "--positions")),
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
    "an unknown method": ("method: duett\n", ("method", "'duett'", 'did you mean "duet"')),
    "text for a number": ("iters: many\n", ("iters", "int", "'many'")),
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
    "no such schedule": ("lr_schedule: {name: cosin, arguments: [1]}\n", ("lr_schedule", "cosin")),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_a_bad_config(refused, quick, tmp_path, case):
    text, says = BAD_YAML[case]
    file = tmp_path / "config.yaml"
    file.write_text(text)
    drop = {name for name in ("iters", "forget") if text.startswith(name)}  # a flag would override the YAML
    flags = list(quick)
    for name in drop:
        at = flags.index(f"--{name}")
        del flags[at : at + 2]
    refused("train", *flags, "-c", file, says=says)


# --- the model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(model, tmp_path) -> Path:
    """A copy of the model that may be spoilt."""
    return Path(shutil.copytree(model, tmp_path / "spoilt"))


def test_a_model_that_is_not_there(refused, quick, tmp_path):
    refused("train", *quick, "--model", tmp_path / "none", says=("--model", "none", "no such folder"))
    refused("train", *quick, "--model", tmp_path / "none.gguf", says=("--model", "none.gguf", "no such file"))
    refused("train", *quick, "--model", __file__, says=("--model", "plain file"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_that_lacks_a_file(refused, quick, spoilt, file):
    (spoilt / file).unlink()
    said = refused("train", *quick, "--model", spoilt, says=("--model", str(spoilt)))
    assert file.split(".")[0] in said


@pytest.mark.parametrize("left", [0, 5, 1000, 0.5, 0.99], ids=str)
def test_broken_safetensors(refused, quick, spoilt, left):
    file = spoilt / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left if left > 1 else left * len(whole))])
    refused("train", *quick, "--model", spoilt, says=("--model", str(spoilt)))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"hidden_size": 128}, ()),
        ({"num_hidden_layers": 3}, ("layers.2",)),
        ({"model_type": "lama"}, ("lama",)),
        ({"model_type": None}, ()),
    ],
    ids=lambda value: str(value),
)
def test_a_config_that_is_not_of_these_weights(refused, quick, spoilt, change, says):
    file = spoilt / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refused("train", *quick, "--model", spoilt, says=("--model", str(spoilt), *says))


def test_a_config_that_is_not_json(refused, quick, spoilt):
    (spoilt / "config.json").write_text('{"model_type": ')
    refused("train", *quick, "--model", spoilt, says=("--model", str(spoilt)))


# --- adapters ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Path:
    """A model of another width."""
    return tiny_model(tmp_path_factory.mktemp("models") / "other", hidden_size=128)


@pytest.fixture(scope="session")
def twin_model(tmp_path_factory) -> Path:
    """A model of the very same shapes, with other weights."""
    return tiny_model(tmp_path_factory.mktemp("models") / "twin", bits=4, seed=1)


def test_evaluating_an_adapter_of_another_model(refused, data, trained, other_model, twin_model, tmp_path):
    flags = [*data, "--adapter-path", trained, "--out", tmp_path / "out", "--max-tokens", 2]
    refused("evaluate", "--model", other_model, *flags, says=("--adapter-path", str(trained), "model"))
    said = refused("evaluate", "--model", twin_model, *flags, says=("--adapter-path", "another model", "tiny"))
    assert "twin" in said
    assert not (tmp_path / "out" / "results.json").exists()


def test_evaluating_a_folder_that_is_no_adapter(refused, model, data, trained, tmp_path):
    flags = ["--model", model, *data, "--adapter-path", trained, "--out", tmp_path / "out", "--max-tokens", 2]
    (trained / "adapters.safetensors").write_bytes(b"\x08" + bytes(20))
    refused("evaluate", *flags, says=("--adapter-path", str(trained)))
    (trained / "adapters.safetensors").unlink()
    refused("evaluate", *flags, says=("--adapter-path", "adapters.safetensors"))
    (trained / "adapter_config.json").write_text("{")
    refused("evaluate", *flags, says=("--adapter-path", "adapter"))
    (trained / "adapter_config.json").unlink()
    refused("evaluate", *flags, says=("--adapter-path", "adapter_config.json"))


def test_resuming_an_adapter_of_another_model(refused, quick, trained_once, other_model, twin_model, tmp_path):
    file = trained_once / "adapters.safetensors"
    before = contents(trained_once)
    for other, says in ((other_model, "does not fit"), (twin_model, "another model")):
        refused("train", *quick, "--model", other, "--resume-adapter-file", file, says=(str(file), says))
    assert contents(trained_once) == before


def test_resuming_what_cannot_be_resumed(refused, quick, trained, tmp_path):
    aside = tmp_path / "aside"
    trained.rename(aside)
    flags = [*quick, "--resume-adapter-file"]
    refused("train", *flags, aside / "none.safetensors", says=("--resume-adapter-file", "none.safetensors"))
    shutil.copy(aside / "adapters.safetensors", aside / "optimizer.safetensors")  # holds no step
    refused("train", *flags, aside / "adapters.safetensors", says=("--resume-adapter-file", "optimizer"))
    (aside / "optimizer.safetensors").unlink()
    refused("train", *flags, aside / "adapters.safetensors", says=("--resume-adapter-file", "optimizer"))
    (aside / "adapters.safetensors").write_bytes(b"broken")
    refused("train", *flags, aside / "adapters.safetensors", says=("--resume-adapter-file",))


def test_an_adapter_folder_that_is_not_empty(refused, quick, trained):
    before = contents(trained)
    refused("train", *quick, says=(str(trained), "not empty", "--overwrite", "--resume-adapter-file"))
    assert contents(trained) == before


def test_a_folder_of_other_things_is_no_adapter_to_resume(refused, quick, tmp_path):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "thesis.txt").write_text("all of it")
    said = refused("train", *quick, says=("not empty", "thesis.txt", "--overwrite"))
    assert "--resume" not in said


def test_an_adapter_path_that_is_a_file(refused, quick, tmp_path):
    (tmp_path / "adapters").write_text("mine")
    refused("train", *quick, says=("--adapter-path", "is a file"))
    refused("train", *quick, "--adapter-path", tmp_path / "adapters" / "below", says=("--adapter-path", "below"))


def test_results_are_not_replaced_unasked(refused, model, data, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    refused("evaluate", "--model", model, *data, "--out", tmp_path, says=("--out", "results.json", "--overwrite"))


# --- the machine -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(refused, quick, tmp_path):
    tmp_path.chmod(0o555)
    try:
        refused("train", *quick, says=("--adapter-path", "Permission denied"))
    finally:
        tmp_path.chmod(0o755)


def test_no_permission_as_the_system_says_it(refused, quick, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused("train", *quick, says=("--adapter-path", "adapters", "Permission denied"))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a folder where even root may not write")
def test_a_folder_that_nobody_may_write_to(refused, quick):
    refused("train", *quick, "--adapter-path", "/proc/self", "--overwrite", says=("--adapter-path /proc/self",))


@pytest.fixture
def small_disk():
    """small_disk(size): files may not grow beyond `size` bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_the_targets(refused, quick, tmp_path, small_disk):
    small_disk(1000)
    refused("train", *quick, says=("targets.safetensors", "cannot"))
    assert contents(tmp_path / "adapters") == {}


@pytest.mark.parametrize("room", [100, 20_000], ids=["config", "adapter"])
def test_no_room_for_the_adapter(refused, quick, trained, small_disk, room):
    before = contents(trained)
    small_disk(room)
    refused("train", *quick, "--overwrite", says=(str(trained), "cannot be written"))
    after = contents(trained)
    for file in ("adapters.safetensors", "adapter_config.json", "optimizer.safetensors", "targets.safetensors"):
        assert after[file] == before[file]
    assert not [name for name in after if "partial" in name]


def test_no_room_for_the_targets_on_a_second_run(refused, quick, trained, small_disk):
    before = contents(trained)
    small_disk(1000)
    refused("train", *quick, "--overwrite", "--top-k", 6, says=("targets.safetensors", "cannot"))
    assert contents(trained) == before


def test_a_loss_that_is_not_finite_leaves_the_last_good_adapter(refused, quick, tmp_path):
    import mlx.core as mx

    said = refused("train", *quick, "--learning-rate", "1e30", says=("not finite", "--learning-rate", "is kept in"))
    assert "step 2:" in said and "adapter of step 0" in said  # the first update spoilt it, the second step showed it
    weights = mx.load(str(tmp_path / "adapters" / "adapters.safetensors"))
    assert weights and all(mx.isfinite(a).all().item() and mx.abs(a).max().item() < 1 for a in weights.values())
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["step"] == 0
    state = mx.load(str(tmp_path / "adapters" / "optimizer.safetensors"))
    assert all(mx.isfinite(a).all().item() for a in state.values())


def test_after_a_loss_that_is_not_finite_a_lower_rate_goes_on(command, quick, tmp_path):
    assert command("train", *quick, "--learning-rate", "1e30").code == 2
    file = tmp_path / "adapters" / "adapters.safetensors"
    ended = command("train", *quick, "--learning-rate", "1e-4", "--resume-adapter-file", file)
    assert ended.code == 0 and "going on from step 0" in ended.out, ended


# --- as a process ------------------------------------------------------------------------------------------------


def test_a_process_of_its_own_ends_with_2_and_one_line(quick, tmp_path):
    import subprocess

    missing = tmp_path / "missing.jsonl"
    command = [sys.executable, "-m", "duet_mlx.train", *quick, "--retain", str(missing)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: {missing}: no such file\n"
