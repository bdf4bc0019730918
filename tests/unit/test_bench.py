"""`python -m benchmarks` runs and compares what is the same; how fast it is, no test says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import PARTS
from benchmarks.sections import SECTIONS
from benchmarks.step import check_equal
from duet_mlx.model import on_gpu
from tests.tiny_model import tiny_model

ROOT = Path(__file__).resolve().parents[2]


def test_a_quick_run_measures_every_line_and_overwrites_nothing(tmp_path):
    model, out = tiny_model(tmp_path / "model", bits=4, max_position_embeddings=2048), tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--model", str(model), "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())
    rows = {row["name"].split(",")[0]: row for row in found["rows"]}
    for name in ("head forward", "padding wasted", "teacher", "one query more", "evaluation", "training step",
                 "peak memory of a step less the weights", "peak memory"):  # fmt: skip
        assert math.isfinite(rows[name]["ratio"]), name
    assert on_gpu() or math.isfinite(rows["two processes against one"]["ratio"])
    assert run.stdout.count("\n") == 2 + len(found["rows"]) and run.stdout.startswith("| measure |")
    assert {"device", "blas", "threads"} <= set(found["meta"]["machine"])
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "is there already" in again.stderr


def test_sides_that_compute_different_losses_are_not_compared():
    check_equal({"ours": 10.0, "plain": 10.001})
    with pytest.raises(AssertionError, match="different losses"):
        check_equal({"ours": 10.0, "plain": 11.0 if on_gpu() else 10.1})


def test_the_step_comes_last_for_it_adapts_the_model():
    assert PARTS[-1] == "step" and tuple(SECTIONS) == PARTS
