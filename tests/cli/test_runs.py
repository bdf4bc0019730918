"""Good runs of the commands: same bytes for the same seed, going on after Ctrl-C, targets reused, recipes, modes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors import safe_open

from duet_mlx.train import parse_settings
from tests.tiny_model import contents, replaced, tiny_model, write_questions

ADAPTER = "adapters.safetensors"


def test_the_same_seed_gives_the_same_bytes(command, quick, trained_once, tmp_path):
    assert command("train", *quick).code == 0
    again, before = contents(tmp_path / "adapters"), contents(trained_once)
    for file in (ADAPTER, "optimizer.safetensors"):
        assert again[file] == before[file]
    assert command("train", *quick, "--overwrite", "--seed", 1).code == 0
    assert (tmp_path / "adapters" / ADAPTER).read_bytes() != before[ADAPTER]


def test_the_folder_is_what_mlx_lm_reads(trained_once, model):
    config = json.loads((trained_once / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["model"] == str(model) and config["num_layers"] == 2
    assert set(config["lora_parameters"]) == {"rank", "scale", "dropout", "keys"}
    log = [json.loads(line) for line in (trained_once / "train_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]


# --- Ctrl-C ------------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_and_the_resumed_run_equals_one_never_stopped(command, quick, tmp_path):
    flags = replaced(quick, "--iters", "120")
    log, file = tmp_path / "adapters" / "train_log.jsonl", tmp_path / "adapters" / ADAPTER
    process = subprocess.Popen(
        [sys.executable, "-m", "duet_mlx.train", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 2):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2, (out, err)
    _, note, error = err.splitlines()
    assert note.startswith("stopping after this update") and "Ctrl-C again" in note
    assert error.startswith("error: interrupted (Ctrl-C): stopped at step "), err
    step = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["step"]
    assert f"step {step};" in err and 2 <= step < 120
    printed = err.split("the same command with ")[1].split()  # what a person would copy
    assert printed == ["--resume-adapter-file", str(file)]
    ended = command("train", *flags, *printed)
    assert ended.code == 0 and f"going on from step {step} of 120" in ended.out and "targets: reused" in ended.out
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 121))
    whole = tmp_path / "whole"
    assert command("train", *replaced(flags, "--adapter-path", str(whole))).code == 0
    assert file.read_bytes() == (whole / ADAPTER).read_bytes()


def test_ctrl_c_waits_for_the_end_of_an_update(command, quick, tmp_path, monkeypatch):
    """Half of an accumulated gradient is in no file: the step is finished first, and the result is the same.

    Dropout is on: the random numbers go on where they were.
    """
    from duet_mlx.stream import Stream

    (tmp_path / "lora.yaml").write_text("lora_parameters: {dropout: 0.3}\n")
    flags = [*replaced(quick, "--iters", "8"), "--grad-accumulation-steps", "2", "-c", str(tmp_path / "lora.yaml")]
    batch, calls = Stream.batch, []

    def interrupting(self, rows):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return batch(self, rows)

    monkeypatch.setattr(Stream, "batch", interrupting)
    ended = command("train", *flags)
    assert ended.code == 2 and "stopped at step 4;" in ended.err, ended
    file = tmp_path / "adapters" / ADAPTER
    assert command("train", *flags, "--resume-adapter-file", file).code == 0
    whole = tmp_path / "whole"
    assert command("train", *replaced(flags, "--adapter-path", str(whole))).code == 0
    assert file.read_bytes() == (whole / ADAPTER).read_bytes()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was before


def test_gradient_checkpointing_changes_no_gradient(command, quick, tmp_path):
    from mlx_lm.models.llama import TransformerBlock

    call = TransformerBlock.__call__
    norms = []
    for flags in ([], ["--grad-checkpoint"]):
        folder = tmp_path / f"run{len(norms)}"
        assert command("train", *replaced(quick, "--adapter-path", str(folder)), *flags).code == 0
        norms.append(json.loads((folder / "train_log.jsonl").read_text().splitlines()[0])["gradient_norm"])
        assert TransformerBlock.__call__ is call  # mlx-lm patches it: for one run, not for those after it
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_ctrl_c_before_the_first_step_is_one_line(command, quick, monkeypatch):
    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("duet_mlx.labels.teacher_targets", interrupted)
    ended = command("train", *quick)
    assert (ended.code, ended.err) == (2, "error: interrupted (Ctrl-C)\n")


# --- targets -----------------------------------------------------------------------------------------------------


def test_targets_are_reused_or_rebuilt_with_the_reason(command, quick, trained, tmp_path):
    before = (trained / "targets.safetensors").read_bytes()
    said = command("train", *quick, "--overwrite").out
    assert "targets: reused" in said and (trained / "targets.safetensors").read_bytes() == before
    context = tmp_path / "context.yaml"
    context.write_text("system: Say nothing at all.\n")
    new = write_questions(tmp_path / "new.jsonl", ["Who is new?"])
    both = write_questions(tmp_path / "both.jsonl", ["Who is near?", "Who is nearer?"])
    for flags, changed in (
        (["--positions", "2"], "settings"),
        (["--candidates", "teacher"], "settings"),
        (["--context", str(context)], "context"),
        (["--retain", str(new)], "data"),
        (["--forget-questions", "5"], "data"),
        (["--retain-questions", "7"], "data"),
        (["--retain", str(new), "--neighbours", str(both), "--neighbour-questions", "1"], "data"),
    ):
        (trained / "targets.safetensors").write_bytes(before)
        said = command("train", *quick, "--iters", 1, *flags, "--overwrite").out
        assert f"targets: built now ({changed} changed since" in said, said
    (trained / "targets.safetensors").write_bytes(before[:200])
    assert "is damaged" in command("train", *quick, "--overwrite").out


def test_fewer_questions_of_each_kind_are_trained_on(command, quick, tmp_path):
    near = write_questions(tmp_path / "near.jsonl", ["Who is near?", "Who is nearer?", "Who is nearest?"])
    flags = ["--forget-questions", 2, "--retain-questions", 3, "--neighbours", near, "--neighbour-questions", 1]
    assert command("train", *quick, *flags).code == 0
    with safe_open(tmp_path / "adapters" / "targets.safetensors", framework="np") as file:
        assert file.get_tensor("ids").shape[0] == 2 + 3 + 1


def test_settings_of_the_student_leave_the_targets(command, quick, trained):
    said = command("train", *quick, "--overwrite", "--learning-rate", "1e-5", "--delta", 2, "--seed", 3).out
    assert "targets: reused" in said


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "teacher", "evaluate", "compare", "harness", "report"])
def test_help_loads_neither_mlx_nor_what_takes_long(name):
    """What makes --help slow is what it imports: 0.1 s without these, several with."""
    program = (
        f"import sys; sys.argv = ['x', '--help']\nfrom duet_mlx.{name} import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    slow = {'mlx', 'mlx_lm', 'transformers', 'matplotlib', 'rouge_score', 'huggingface_hub'}\n"
        "    print('END', end.code, sorted({m.split('.')[0] for m in sys.modules} & slow))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert run.rpartition("END ")[2].strip() == "0 []"
    assert "usage: python -m duet_mlx." in run
    assert name in ("compare", "report") or ("--model" in run and "default:" in run)


BASICS = ["--model", "m", "--forget", "f", "--retain", "r", "--context", "c"]


def parsed(*flags: str):
    return parse_settings("train", "Train.", [*BASICS, *flags])


def test_the_papers_recipe_and_flags_over_it(tmp_path):
    paper = parsed("--recipe", "paper")
    assert (paper.positions, paper.candidates, paper.retain_context, paper.center) == (1, "teacher", "teacher", False)
    mine = parsed("--recipe", "paper", "--positions", "4", "--center")
    assert (mine.positions, mine.candidates, mine.center) == (4, "teacher", True)
    file = tmp_path / "c.yaml"
    file.write_text("recipe: paper\npositions: 5\ntop_k: 7\n")
    both = parsed("-c", str(file), "--top-k", "9")
    assert (both.recipe, both.positions, both.top_k, both.candidates) == ("paper", 5, 9, "teacher")
    assert parsed("-c", str(file), "--recipe", "default").candidates == "union"
    file.write_text("positions: 5\ntop_k: 7\nfirst_share: 0.3\n")
    named = parsed("-c", str(file), "--recipe", "paper", "--first-share", "0.1")  # a flag is stronger than the file
    assert (named.positions, named.top_k, named.candidates, named.first_share) == (1, 7, "teacher", 0.1)


def test_yaml_reads_as_a_person_means_it(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1e-4\ndelta: 2\nneighbours: n.jsonl\nlora_parameters: {rank: 2}\n")
    mine = parsed("-c", str(file))
    assert mine.learning_rate == 1e-4 and mine.delta == 2.0 and mine.neighbours == ("n.jsonl",)
    assert mine.lora_parameters == {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": None}


def test_a_schedule_whose_numbers_yaml_reads_as_text(command, quick, tmp_path):
    """PyYAML takes 1e-3 for text; MLX computes with numbers alone."""
    file = tmp_path / "c.yaml"
    file.write_text("lr_schedule: {name: linear_schedule, arguments: [1e-3, 2e-3, 3], warmup_init: 0, warmup: 0}\n")
    assert command("train", *quick, "-c", file).code == 0
    log = [json.loads(line) for line in (tmp_path / "adapters" / "train_log.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in log] == pytest.approx([1e-3, 4e-3 / 3, 5e-3 / 3, 2e-3])


def test_the_speed_is_told_also_where_the_progress_bar_is_turned_off(quick, tmp_path):
    """A command of its own: tqdm reads the variable when it is imported."""
    subprocess.run(
        [sys.executable, "-m", "duet_mlx.train", *map(str, quick)], env={**os.environ, "TQDM_DISABLE": "1"}, check=True
    )
    log = [json.loads(line) for line in (tmp_path / "adapters" / "train_log.jsonl").read_text().splitlines()]
    assert log and all(0 < row["tokens_per_second"] < 1e7 for row in log)


def test_the_papers_recipe_trains(command, quick):
    ended = command("train", *replaced(quick, "--positions", "1"), "--recipe", "paper")
    assert ended.code == 0, ended


def test_without_retain_questions_every_query_is_a_forget_query(command, quick):
    at = quick.index("--retain")
    ended = command("train", *quick[:at], *quick[at + 2 :])
    assert ended.code == 0, ended


# --- steps -------------------------------------------------------------------------------------------------------


def test_two_halves_accumulated_equal_one_batch(model):
    """g_1 / 2 + g_2 / 2 of two batches of B/2 is the gradient of one batch of B: one update, the same weights."""
    import mlx.core as mx
    import numpy as np

    from duet_mlx.losses import Batch
    from duet_mlx.model import adapter_parameters, add_lora, load_model, lora_keys
    from duet_mlx.train import make_optimizer, make_step
    from tests.equivalence.tiny import duet_loss

    random = np.random.default_rng(0)
    tokens, ids = random.integers(3, 300, (4, 8)), random.integers(3, 300, (4, 2, 3))
    fields = [tokens, np.tile([3, 6], (4, 1)), ids, random.normal(size=ids.shape).astype(np.float32)]
    fields += [np.ones(ids.shape, dtype=bool), np.ones((4, 2), dtype=bool)]
    results = []
    for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        settings = parsed("--grad-accumulation-steps", str(len(parts)), "--iters", str(len(parts)))
        network, _, _ = load_model(str(model))
        mx.random.seed(0)
        add_lora(network, -1, 4, 4.0, 0.0, lora_keys(network))
        optimizer = make_optimizer(settings)
        step = make_step(
            network, optimizer, lambda m, b: duet_loss(m, b, [1, 5], None, 1.0, False), settings, compiled=False
        )
        carried = None
        for number, part in enumerate(parts, 1):
            batch = Batch(*(mx.array(field[part]) for field in fields))
            _, norm, carried = step(batch, carried, number if number == len(parts) else 0)
        moments = {k: v for k, v in _flat(optimizer.state) if k.endswith(".m")}
        results.append((adapter_parameters(network), moments, norm))
    (one, m_one, norm_one), (two, m_two, norm_two) = results
    assert set(m_one) == set(m_two) and len(m_one) > 4
    for name in m_one:  # the first moment is 0.1 g: no division by a root hides a difference of scale
        assert mx.allclose(m_one[name], m_two[name], rtol=1e-4, atol=1e-8).item(), name
    assert mx.allclose(norm_one, norm_two, rtol=1e-4).item()
    for name in one:  # Adam's first update is the rate times the sign of g: where g is all but 0 it may differ
        assert mx.abs(one[name] - two[name]).max().item() <= 2 * 3e-4 + 1e-6


def _flat(state):
    from mlx.utils import tree_flatten

    return tree_flatten(state)


def mixed(path: str, module) -> bool | dict:
    """Bits that differ by layer, and one module that stays as it is."""
    if not hasattr(module, "to_quantized") or path.endswith("layers.1.mlp.up_proj"):
        return False
    bits = 8 if "embed" in path else 2 if "layers.1." in path else 4
    return {"group_size": 32, "bits": bits, "mode": "affine"}


MODES = {
    "affine, 5 bits": {"bits": 5},
    "affine, 3 bits": {"bits": 3, "group_size": 32},
    "mxfp4": {"bits": 4, "mode": "mxfp4", "group_size": 32},
    "mxfp8": {"bits": 8, "mode": "mxfp8", "group_size": 32},
    "nvfp4": {"bits": 4, "mode": "nvfp4", "group_size": 16},
    "bits by layer": {"bits": 4, "predicate": mixed},
}


@pytest.mark.parametrize("case", MODES)
def test_every_mode_of_quantization_trains(command, quick, tmp_path, case):
    import mlx.core as mx
    from mlx_lm import load

    from duet_mlx.head import check_head

    folder = tiny_model(tmp_path / "model", **MODES[case])
    ended = command("train", *replaced(quick, "--model", str(folder)), "--iters", 2)
    assert ended.code == 0 and "full head" not in ended.out, ended
    weights = mx.load(str(tmp_path / "adapters" / ADAPTER))
    assert all(mx.isfinite(a).all().item() for a in weights.values())
    assert any(mx.abs(a).max().item() > 0 for name, a in weights.items() if name.endswith("lora_b"))
    # As on a GPU, where the base stays quantized: the K rows of the head give what the whole head gives.
    network, _ = load(str(folder))
    head, reason = check_head(network, mx.array([[1, 7, 40, 9]]))
    assert head is not None, reason


def test_validation_and_checkpoints_on_the_way(command, quick, tmp_path):
    watched = [
        "--valid-forget", write_questions(tmp_path / "vf.jsonl", ["Who is he?"]),
        "--valid-retain", write_questions(tmp_path / "vr.jsonl", ["Who is she?"]),
    ]  # fmt: skip
    flags = replaced(replaced(quick, "--steps-per-eval", "2"), "--save-every", "2")
    ended = command("train", *flags, *watched)
    assert ended.code == 0, ended
    for role in ("forget", "retain"):
        assert ended.out.count(f"validation loss, {role}:") == 2
    assert "Who is he? ->" in ended.out
    saved = {file.name for file in (tmp_path / "adapters").glob("*adapters.safetensors")}
    assert saved == {ADAPTER, f"0000002_{ADAPTER}", f"0000004_{ADAPTER}"}
    last = (tmp_path / "adapters" / f"0000004_{ADAPTER}").read_bytes()
    assert last == (tmp_path / "adapters" / ADAPTER).read_bytes()


def test_validating_on_the_way_changes_no_byte(command, quick, trained_once, tmp_path):
    assert command("train", *replaced(quick, "--steps-per-eval", "1")).code == 0
    assert (tmp_path / "adapters" / ADAPTER).read_bytes() == (trained_once / ADAPTER).read_bytes()


def test_the_teacher_shows_itself_beside_the_base(command, quick):
    ended = command("teacher", *quick)
    assert ended.code == 0 and ended.out.count("teacher: '") == ended.out.count("base:    '") == 14, ended
