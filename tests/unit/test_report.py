"""Table, Markdown, answers side by side and picture of an evaluation."""

import json
import subprocess
import sys

import pytest

from duet_mlx import report
from duet_mlx.errors import ConfigError, DataError


def row(model, group, metric, value, ci=None, n=8):
    return {
        "model": model,
        "group": group,
        "metric": metric,
        "value": value,
        "ci": ci,
        "n": n,
        "direction": "none",
    }


@pytest.fixture
def results():
    rows = []
    for model, recall, f1 in (("base", 1.0, 1.0), ("base + context", 0.0, 0.1), ("unlearned", 0.1234, 0.9)):
        rows += [
            row(model, "forget", "recall", recall, [recall / 2, min(1.0, recall * 1.5)]),
            row(model, "forget", "recall_gold", None, n=0) | {"reason": "the base got none of these questions right"},
            row(model, "forget", "refused", 1 - recall, n=6),
            row(model, "forget", "refused_all", 1 - recall),
            row(model, "general", "f1", f1, [f1 - 0.05, f1]),
            row(model, "forget, reverse 1", "recall", recall),
            row(model, "forget, reverse 1", "broken", 0.0),
            row(model, "forget, worst reverse", "recall", recall),
        ]
    return {"meta": {}, "rows": rows}


def test_the_table_has_a_line_a_measure_and_a_column_a_model(results):
    lines = report.format_table(results["rows"]).splitlines()
    assert lines[0].split("  ")[-1].strip() == "unlearned" and "base + context" in lines[0]
    recall = next(line for line in lines if "recall of the base's answer" in line)
    assert "↓" in recall and recall.endswith("0.12 [0.06, 0.19]")
    f1 = next(line for line in lines if "F1" in line)
    assert "↑" in f1 and f1.startswith("  ")
    assert "forget (8 questions)" in lines


def test_a_smaller_denominator_is_shown(results):
    assert "refused ↑ (n = 6)" in report.format_table(results["rows"])


def test_all_refusals_are_shown_only_where_the_base_refuses_some(results):
    assert "of all questions" not in report.format_table(results["rows"])
    results["rows"][3]["value"] = 0.25
    assert "of all questions" in report.format_table(results["rows"])


def test_what_no_model_has_is_left_out_and_what_one_lacks_is_a_dash(results):
    assert "gold" not in report.format_table(results["rows"])
    results["rows"][1]["value"] = 0.5
    gold = next(line for line in report.format_table(results["rows"]).splitlines() if "gold" in line)
    assert gold.split()[-2:] == ["–", "–"]


def test_behind_a_reverse_prompt_only_recall_and_refusals_are_shown(results):
    table = report.format_table(results["rows"])
    assert "broken" not in table
    assert "forget, worst reverse" in table


def test_markdown_has_equal_columns_everywhere(results):
    lines = [line for line in report.markdown_table(results).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert any("**forget (8 questions)**" in line for line in lines)


def test_samples_show_every_model_once_a_question():
    samples = [
        {
            "id": f"q{i}",
            "group": group,
            "question": f"{group} {i}?",
            "model": model,
            "answer": f"{model}\n{i}",
        }
        for model in ("base", "unlearned")
        for group in ("forget", "general", "neighbours", "forget, reverse 1")
        for i in range(4)
    ]
    text = report.side_by_side(samples)
    assert text.count("?") == 5 and text.count("unlearned") == 10
    assert "[neighbours]" in text and "reverse" not in text
    assert "base 0" in text  # line breaks inside an answer are gone
    assert len({line for line in text.splitlines() if "?" in line}) == 5


def test_samples_of_fewer_questions_than_asked_for_do_not_repeat():
    one = [{"id": "q", "group": "forget", "question": "Who?", "model": "base", "answer": ""}]
    assert report.side_by_side(one).count("Who?") == 1
    assert "(empty)" in report.side_by_side(one)


@pytest.mark.parametrize("drop", [(), ("general",), ("base + context",), ("unlearned", "base + context")])
def test_the_picture_is_drawn_with_what_there_is_and_is_the_same_twice(results, drop, tmp_path):
    results["rows"] = [r for r in results["rows"] if r["group"] not in drop and r["model"] not in drop]
    for name in ("one.png", "two.png"):
        report.picture(results, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_beside_renames_the_unlearned_rows(results, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    rows = report.load_beside([f"paper={file}"], ("base", "unlearned"))
    assert {r["model"] for r in rows} == {"paper"} and len(rows) == 8
    assert rows[0]["source"]["file"] == str(file)


@pytest.mark.parametrize("spec", ["paper", "=results.json", "base=results.json", "paper="])
def test_a_wrong_beside_is_refused(spec):
    with pytest.raises(ConfigError, match="--beside"):
        report.load_beside([spec], ("base",))


@pytest.mark.parametrize("content", ["", "[]", '{"rows": 1}', '{"rows": [{"model": "unlearned"}]}', '{"rows": []}'])
def test_a_file_that_is_no_results_json_is_refused(content, tmp_path):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(DataError, match="r.json"):
        report.load_beside([f"paper={tmp_path / 'r.json'}"], ())


def test_the_command_prints_the_table_or_markdown(results, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results))
    sample = {"id": "q", "group": "forget", "question": "Who?", "model": "base", "answer": "He."}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    command = [sys.executable, "-m", "duet_mlx.report", str(tmp_path / "results.json")]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "unlearned" in table and "[forget] Who?" in table
    markdown = subprocess.run([*command, "--markdown"], capture_output=True, text=True, check=True).stdout
    assert markdown.startswith("| |") and "Who?" not in markdown
    beside = ["--markdown", "--beside", f"seed 1={tmp_path / 'results.json'}"]
    both = subprocess.run([*command, *beside], capture_output=True, text=True, check=True).stdout
    assert both.splitlines()[0] == markdown.splitlines()[0] + " seed 1 |"
    missing = subprocess.run([*command[:-1], str(tmp_path / "none.json")], capture_output=True, text=True)
    assert missing.returncode == 2 and "no such file" in missing.stderr
