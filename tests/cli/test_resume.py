"""Saving and going on: a checkpoint is whole or not there, and goes on as the run that it is of, or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from duet_mlx.files import only_run_in, partial_of
from tests.cli.test_bad_model_or_machine import small_disk
from tests.tiny_model import contents, replaced, write_questions

ADAPTER, OPTIMIZER, CONFIG = "adapters.safetensors", "optimizer.safetensors", "adapter_config.json"


@pytest.fixture
def resumed(quick, trained) -> list[str]:
    """Flags that go on from `trained`, in its own folder, to step 6."""
    return [*quick, "--resume-adapter-file", str(trained / ADAPTER), "--iters", "6"]


def step_of(folder: Path) -> int:
    return json.loads((folder / CONFIG).read_text())["step"]


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "train_log.jsonl").read_text().splitlines()]


# --- whole or not there ------------------------------------------------------------------------------------------


def test_a_disk_that_has_room_for_the_adapter_alone_leaves_the_checkpoint_as_it_was(refused, resumed, trained):
    before = contents(trained)
    assert len(before[ADAPTER]) + 5000 < len(before[OPTIMIZER])
    with small_disk(len(before[ADAPTER]) + 5000):
        refused("train", *resumed, says=(OPTIMIZER, "cannot be written", "untouched"))
    after = contents(trained)
    assert [name for name in before if before[name] != after.get(name)] == ["train_log.jsonl"]
    assert after.keys() == before.keys()


class Killed(BaseException):
    """The process is gone: nothing after it is done."""


@pytest.mark.parametrize("renamed", [0, 1, 2, 3])
def test_a_kill_between_two_files_of_a_checkpoint_loses_nothing(command, quick, tmp_path, monkeypatch, renamed):
    flags = [*replaced(quick, "--iters", "6"), "--save-every", "3"]
    folder, whole, seen = tmp_path / "adapters", tmp_path / "whole", []
    replace = os.replace

    def until_killed(source, target):
        seen.append(Path(target).name)
        # After the targets and the log, 4 files are saved at step 3, and 4 at step 6.
        if len(seen) > 6 + renamed:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", until_killed)
    with pytest.raises(Killed):
        command("train", *flags)
    monkeypatch.undo()
    assert seen[:3] == ["targets.safetensors", "train_log.jsonl", OPTIMIZER] and seen[5] == ADAPTER
    ended = command("train", *flags, "--resume-adapter-file", folder / ADAPTER)
    if renamed:  # the optimizer of step 6 lies there: what was left to rename is
        assert ended.code == 2 and "is at step 6" in ended.err and "was completed" in ended.out, ended
    else:
        assert ended.code == 0 and "going on from step 3 of 6" in ended.out, ended
    assert logged(folder) == [1, 2, 3, 4, 5, 6] and step_of(folder) == 6
    assert command("train", *replaced(flags, "--adapter-path", str(whole))).code == 0
    for file in (ADAPTER, OPTIMIZER):
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


def test_an_adapter_beside_the_optimizer_of_another_step_is_not_gone_on_with(command, refused, resumed, trained):
    earlier = (trained / ADAPTER).read_bytes()
    assert command("train", *resumed).code == 0
    (trained / ADAPTER).write_bytes(earlier)
    partial_of(trained / ADAPTER).write_bytes(earlier[:100])  # of a save that was cut off, of no use
    before = contents(trained)
    refused("train", *resumed, "--iters", 8, says=(str(trained / ADAPTER), "another adapter", "step 6"))
    assert contents(trained) == before


def test_a_numbered_copy_is_refused_with_the_name_of_what_can_be_gone_on_from(command, refused, quick, tmp_path):
    assert command("train", *quick, "--save-every", 2).code == 0
    file = tmp_path / "adapters" / f"0000002_{ADAPTER}"
    last = tmp_path / "adapters" / ADAPTER
    refused("train", *quick, "--iters", 6, "--resume-adapter-file", file, says=(str(file), "step 4", f"is {last}"))


# --- the same run ------------------------------------------------------------------------------------------------

OTHER_RUNS = {
    "seed": (["--seed", "1"], ("seed 0", "it is 1")),
    "batch size": (["--batch-size", "5"], ("batch_size 4", "it is 5")),
    "share of forget queries": (["--forget-per-batch", "1"], ("forget_per_batch 2", "it is 1")),
    "accumulation": (["--grad-accumulation-steps", "2"], ("grad_accumulation_steps 1", "it is 2")),
    "K": (["--top-k", "6"], ("top_k 5", "it is 6")),
    "positions": (["--positions", "2"], ("positions 3", "it is 2")),
    "delta": (["--delta", "2"], ("delta 1.0", "it is 2.0")),
    "centring": (["--no-center"], ("center True", "it is False")),
    "layers": (["--num-layers", "1"], ("num_layers 2", "it is 1")),
    "rank": ("lora_parameters: {rank: 4}", ("lora_parameters rank 8", "it is 4")),
    "scale": ("lora_parameters: {scale: 2}", ("lora_parameters scale 4.0", "it is 2.0")),
    "modules": ("lora_parameters: {keys: [mlp.up_proj]}", ("lora_parameters keys", "it is ['mlp.up_proj']")),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_another_run_is_refused_by_what_differs(refused, resumed, trained, tmp_path, case):
    flags, says = OTHER_RUNS[case]
    if isinstance(flags, str):
        (tmp_path / "c.yaml").write_text(flags)
        flags = ["-c", tmp_path / "c.yaml"]
    before = contents(trained)
    refused("train", *resumed, *flags, says=(str(trained / ADAPTER), *says))
    assert contents(trained) == before


def test_other_questions_or_another_context_are_refused(refused, resumed, trained, tmp_path):
    before, context = contents(trained), tmp_path / "c.yaml"
    context.write_text("system: Say nothing.\n")
    refused("train", *resumed, "--context", context, says=("the context is not what it was trained with",))
    file = write_questions(tmp_path / "retain.jsonl", ["Who is new?"])
    refused("train", *resumed, "--retain", file, says=("the questions are not what it was trained with",))
    assert contents(trained) == before


def test_what_shapes_the_steps_to_come_may_change_and_is_said(command, resumed, trained):
    ended = command("train", *resumed, "--learning-rate", "1e-5", "--save-every", 5, "--num-layers", 2)
    assert ended.code == 0, ended
    assert "going on from step 4 of 6, with iters 6 (was 4), learning_rate 1e-05 (was 0.0003)\n" in ended.out
    assert step_of(trained) == 6 and logged(trained) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_has_all_its_steps_is_refused_also_elsewhere(refused, quick, trained, tmp_path):
    file, before = trained / ADAPTER, contents(trained)
    says = ("is at step 4", "--iters is 4", "nothing is left")
    refused("train", *quick, "--resume-adapter-file", file, says=says)
    refused(
        "train", *replaced(quick, "--adapter-path", str(tmp_path / "new")), "--resume-adapter-file", file, says=says
    )
    assert contents(trained) == before


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b'{"settings": 3}', b"[" * 9999, None], ids=repr)
def test_a_damaged_config_is_refused(refused, resumed, trained, text):
    (trained / CONFIG).write_bytes(text) if text is not None else (trained / CONFIG).unlink()
    refused("train", *resumed, says=(str(trained / ADAPTER), CONFIG, "cannot be read"))


def test_an_optimizer_of_other_shapes_is_refused(refused, resumed, trained):
    import mlx.core as mx

    state, meta = mx.load(str(trained / OPTIMIZER), return_metadata=True)
    name = next(name for name in state if name.endswith(".m"))
    for spoilt in ({**state, name: state[name][:1]}, {**state, "random_state": mx.zeros(3, dtype=mx.uint32)}):
        mx.save_safetensors(str(trained / OPTIMIZER), spoilt, meta)
        refused("train", *resumed, says=(OPTIMIZER, "does not fit"))
    del state[name]
    mx.save_safetensors(str(trained / OPTIMIZER), state, meta)
    refused("train", *resumed, says=(OPTIMIZER, "does not fit", name))


# --- updates of several steps ------------------------------------------------------------------------------------


def test_the_last_update_takes_the_steps_that_are_left(command, quick, tmp_path):
    """One step of an accumulation of four is an update like any other, of the mean over one step."""
    results = []
    for every in (1, 4):
        folder = tmp_path / str(every)
        flags = [*replaced(quick, "--adapter-path", str(folder)), "--iters", 1, "--grad-accumulation-steps", every]
        assert command("train", *flags).code == 0
        results.append((folder / ADAPTER).read_bytes())
    assert results[0] == results[1]


def test_what_is_saved_on_the_way_is_always_a_whole_update(command, quick, tmp_path):
    """Due at step 3, in the middle of an update, it is saved at step 4; the run that goes on from it is the same."""
    flags = [*replaced(quick, "--iters", "7"), "--grad-accumulation-steps", 2, "--save-every", 3]
    whole, folder = tmp_path / "adapters", tmp_path / "stopped"
    assert command("train", *flags).code == 0
    assert sorted(f.name for f in whole.glob(f"[0-9]*{ADAPTER}")) == [f"000000{n}_{ADAPTER}" for n in (4, 6)]
    flags = replaced(flags, "--adapter-path", str(folder))
    assert command("train", *replaced(flags, "--iters", "4")).code == 0  # its rates are others: adapters are not equal
    ended = command("train", *flags, "--resume-adapter-file", folder / ADAPTER)
    assert ended.code == 0 and "going on from step 4 of 7" in ended.out and step_of(folder) == 7


# --- numbers that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["1e39", "1e30"], ids=["weights", "loss"])
@pytest.mark.parametrize("flags", [["--iters", 1], ["--iters", 4, "--save-every", 1]], ids=["at the end", "on the way"])
def test_an_update_that_spoils_the_weights_is_never_saved(refused, quick, tmp_path, rate, flags):
    import mlx.core as mx

    refused("train", *quick, "--learning-rate", rate, *flags, says=("step 1:", "not finite", "adapter of step 0"))
    saved = list((tmp_path / "adapters").glob(f"*{ADAPTER}"))
    assert [file.name for file in saved] == [ADAPTER] and step_of(tmp_path / "adapters") == 0
    assert all((mx.abs(a) < 1).all().item() for a in mx.load(str(saved[0])).values())


def test_one_that_spoils_it_at_once_does_not_cost_the_earlier_adapter(refused, quick, trained):
    before = (trained / ADAPTER).read_bytes()
    flags = ["--overwrite", "--learning-rate", "1e30", "--iters", 4]
    refused("train", *quick, *flags, says=("not finite", "earlier adapter is kept"))
    assert (trained / ADAPTER).read_bytes() == before


# --- one run, one folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=repr)
def test_a_second_run_into_the_same_folder_is_refused_as_long_as_the_first_goes_on(
    refused, command, quick, tmp_path, flags
):
    folder = tmp_path / "adapters"
    folder.mkdir()
    with only_run_in(folder):
        refused("train", *quick, *flags, says=(f"--adapter-path {folder}", "another run is writing there"))
        assert contents(folder) == {}
    assert command("train", *quick, *flags).code == 0


def test_a_run_that_was_killed_holds_no_folder(tmp_path):
    program = (
        f"import sys, time; from pathlib import Path; from duet_mlx.files import only_run_in\n"
        f"with only_run_in(Path({str(tmp_path)!r})):\n    print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(Exception, match="another run is writing there"), only_run_in(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    with only_run_in(tmp_path):
        pass


def test_overwriting_removes_the_numbered_copies_of_the_run_before_and_says_so(command, quick, tmp_path):
    folder = tmp_path / "adapters"
    assert command("train", *quick, "--save-every", 1).code == 0
    ended = command("train", *quick, "--save-every", 3, "--overwrite", "--seed", 1)
    assert ended.code == 0 and "overwritten: " in ended.out and f"0000004_{ADAPTER}" in ended.out, ended
    assert [file.name for file in folder.glob(f"[0-9]*{ADAPTER}")] == [f"0000003_{ADAPTER}"]


def test_going_on_keeps_the_numbered_copies(command, quick, tmp_path):
    folder = tmp_path / "adapters"
    assert command("train", *quick, "--save-every", 2).code == 0
    assert command("train", *quick, "--iters", 5, "--resume-adapter-file", folder / ADAPTER).code == 0
    assert len(list(folder.glob(f"[0-9]*{ADAPTER}"))) == 2


def test_the_teacher_looks_at_a_trained_folder_and_writes_nothing(command, quick, trained):
    before = contents(trained)
    for flags, said in (([], "targets: reused"), (["--top-k", "6", "--overwrite"], "not saved")):
        ended = command("teacher", *quick, *flags)
        assert ended.code == 0 and said in ended.out and "teacher: '" in ended.out, ended
        assert contents(trained) == before


# --- stopped from outside ----------------------------------------------------------------------------------------


def test_a_second_ctrl_c_stops_at_once_and_loses_no_update(command, quick, tmp_path, monkeypatch):
    from duet_mlx.stream import Stream

    flags, batch, calls = replaced(quick, "--iters", "8"), Stream.batch, []

    def interrupting(self, rows):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return batch(self, rows)

    monkeypatch.setattr(Stream, "batch", interrupting)
    ended = command("train", *flags)
    monkeypatch.undo()
    folder = tmp_path / "adapters"
    assert ended.code == 2 and "stopped at step 2; saved" in ended.err and step_of(folder) == 2, ended
    assert command("train", *flags, "--resume-adapter-file", folder / ADAPTER).code == 0
    whole = tmp_path / "whole"
    assert command("train", *replaced(flags, "--adapter-path", str(whole))).code == 0
    assert (folder / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def test_ctrl_c_twice_before_the_first_update_leaves_the_run_before(command, quick, trained, monkeypatch):
    def interrupted(self, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr("duet_mlx.stream.Stream.batch", interrupted)
    before = contents(trained)
    ended = command("train", *quick, "--overwrite")
    assert ended.code == 2 and "before the first update" in ended.err, ended
    assert all(contents(trained)[file] == before[file] for file in (ADAPTER, OPTIMIZER, CONFIG))


def test_a_closed_pipe_saves_and_says_so(quick, tmp_path):
    train = [sys.executable, "-m", "duet_mlx.train", *replaced(quick, "--iters", "5000")]
    process = subprocess.Popen(train, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    try:
        shown = b""
        while b"loss" not in shown and process.poll() is None:
            shown += os.read(process.stdout.fileno(), 4096)
        process.stdout.close()  # what `| head` does when it has seen enough
        error = process.stderr.read().decode()
        process.wait()
    finally:
        process.kill()
    step = step_of(tmp_path / "adapters")
    assert process.returncode == 2 and 1 <= step < 5000
    assert error.startswith("error: ") and error.count("\n") == 1
    assert f"a closed pipe): stopped at step {step}; saved" in error


def test_a_pipe_closed_before_the_first_step_is_said(quick, tmp_path):
    train = [sys.executable, "-m", "duet_mlx.train", *quick]
    with subprocess.Popen(train, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        _, error = process.communicate()
    assert process.returncode == 2 and error.count("\n") == 1
    assert error.startswith("error: nobody reads the output any more (a closed pipe): stopped before the first step")
    assert not (tmp_path / "adapters" / "adapters.safetensors").exists()
