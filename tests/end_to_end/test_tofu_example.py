"""examples/tofu/implant.py --quick from end to end, on a tiny model of random weights: what it makes, and going on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.unit.test_evaluate import make_model

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "tofu" / "implant.py"


def test_the_implant_experiment_runs_and_a_second_run_makes_nothing_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    texts = (SCRIPT.parent / "data" / "retain_perturbed.json").read_text(encoding="utf-8").splitlines()
    # One layer below those that are taught and unlearned; over letters, TOFU's answers would take minutes.
    make_model(tmp_path / "model", 0, layers=9, texts=texts)
    (tmp_path / "out" / "implanted").mkdir(parents=True)
    (tmp_path / "out" / "implanted" / "mine.txt").touch()
    command = [
        sys.executable,
        str(SCRIPT),
        "--quick",
        "--model",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "out"),
    ]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "out" / "results" / "results.json").read_text(encoding="utf-8"))
    assert {row["model"] for row in results["rows"]} == {"base", "unlearned", "retrained"}
    quality = [r for r in results["rows"] if r["metric"] == "forget_quality"]
    assert len(quality) == 3 and all(row["value"] is not None for row in quality)
    record = json.loads((tmp_path / "out" / "implanted" / "implant.json").read_text(encoding="utf-8"))
    assert record["recall"].keys() == {"forget", "retain"} and record["rounds"] == 1
    (aside,) = (tmp_path / "out").glob("implanted-until-*")
    assert (aside / "mine.txt").is_file()
    assert "| base | unlearned | retrained |" in first.stdout

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("there already") == 2 and "nothing to train" in second.stdout
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
