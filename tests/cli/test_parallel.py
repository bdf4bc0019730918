"""`mlx.launch -n 2` over loopback: the run of two processes is the run of one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from duet_mlx.resume import load_state
from tests.tiny_model import contents, replaced, write_questions


def launcher(flags: list[str]) -> list[str]:
    """The command that runs `duet_mlx.train` on two processes of this machine, on ports that are free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mine = Path(sys.executable).with_name("mlx.launch")
    ring = ["-n", "2", "--backend", "ring", "--starting-port", str(port)]
    return [str(mine), *ring, "--", sys.executable, "-m", "duet_mlx.train", *flags]


def launch(flags: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(launcher(flags), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("method", "layers"), [("duet", "-1"), ("duet", "1"), ("idkdpo", "-1")])
def test_two_processes_give_the_adapter_of_one(command, quick, tmp_path, method, layers):
    rate = 3e-4
    flags = [
        *quick,
        "--method",
        method,
        "--num-layers",
        layers,
        "--grad-accumulation-steps",
        "2",
        "--learning-rate",
        str(rate),
    ]
    if layers == "1":  # what comes out of the lower layers is exchanged: 32 questions at a time, so both have some
        places = write_questions(tmp_path / "retain.jsonl", [f"Where is place {i}?" for i in range(40)])
        flags = replaced(flags, "--retain", str(places))
    one, two = tmp_path / "one", tmp_path / "two"
    assert command("train", *replaced(flags, "--adapter-path", str(one))).code == 0
    ended = launch(replaced(flags, "--adapter-path", str(two)))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("adapter: ") == 1  # rank 0 alone speaks
    assert contents(one).keys() == contents(two).keys()
    for file in ("targets.safetensors", "optimizer.safetensors"):
        for name, expected, got in pairs(one / file, two / file):
            assert abs(got - expected).max() <= 1e-4 * abs(expected).max(), name
    for name, expected, got in pairs(one / "adapters.safetensors", two / "adapters.safetensors"):
        # Adam moves every number by about the rate, and one whose gradient is all rounding moves by rounding.
        assert math.sqrt(((got - expected) ** 2).mean()) < 1e-3 * rate, name
    logs = [[json.loads(line) for line in (path / "train_log.jsonl").read_text().splitlines()] for path in (one, two)]
    for before, after in zip(*logs, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)
        assert after["gradient_norm"] == pytest.approx(before["gradient_norm"], rel=1e-3) or after["step"] % 2
    assert ("not trained: they are run once" in ended.stdout) == (layers == "1")
    if layers == "1" or method == "idkdpo":
        return  # what follows is the same for all
    again = launch([*replaced(flags, "--adapter-path", str(two)), "--overwrite"])
    assert again.returncode == 0 and again.stdout.count("targets: reused") == 1, again.stderr


def pairs(one: Path, two: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What two files hold under each name, as numbers that can be subtracted."""
    before, after = mx.load(str(one)), mx.load(str(two))
    assert before.keys() == after.keys()
    for name in before:
        yield name, np.array(before[name]).astype(np.float64), np.array(after[name]).astype(np.float64)


def test_a_batch_that_cannot_be_shared_out_is_refused(quick):
    ended = launch(replaced(quick, "--batch-size", "3"))
    assert "error: --batch-size 3: cannot be shared out evenly among 2 processes" in ended.stderr


def test_a_dead_process_ends_the_others_and_leaves_the_last_checkpoint_whole(quick, tmp_path):
    folder = tmp_path / "adapters"
    flags = [*replaced(replaced(quick, "--iters", "5000"), "--save-every", "1"), "--steps-per-report", "1000"]
    own = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(launcher(flags), **own) as run:
        try:
            while run.poll() is None and not list(folder.glob("0000003_*")):
                time.sleep(0.05)
            listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True).stdout
            ranks = [int(line.split()[0]) for line in listed.splitlines() if str(folder) in line]
            ranks.remove(run.pid)
            os.kill(max(ranks), signal.SIGKILL)
            _, said = run.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)  # the ranks too, if the test failed before they ended
    assert "exited with code -9" in said
    state, config = load_state(str(folder / "adapters.safetensors"))
    assert 3 <= state.step == config["step"] < 5000
