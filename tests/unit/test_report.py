"""Table, Markdown, answers side by side and picture of an evaluation."""

import json
import subprocess
import sys

import pytest

from duet_mlx import report, report_table
from duet_mlx.errors import ConfigError, DataError
from duet_mlx.picture import legend_name, picture


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
    assert "forget (8 questions): should go" in lines and "general (8 questions): should stay" in lines


def test_a_sentence_says_what_became_of_each_group(results):
    sentence = (
        "After unlearning, forget: 12 % of the base's answers left, 88 % refused; "
        "general: 90 % of the base's answers kept."
    )
    assert report_table.in_a_sentence(results["rows"]) == sentence
    assert sentence in report.markdown_table(results)
    assert sentence in " ".join(report.format_table(results["rows"]).split())
    assert report_table.in_a_sentence([row for row in results["rows"] if row["model"] != "unlearned"]) == ""


def test_a_group_that_should_neither_go_nor_stay_is_not_labelled(results):
    rows = [row("base", "tofu:x as a whole", "model_utility", 0.5), row("base", "holdout, muse", "min_k", -3.0)]
    lines = report.format_table(results["rows"] + rows).splitlines()
    assert "tofu:x as a whole (8 questions)" in lines and "holdout, muse (8 questions)" in lines


def test_the_legend_says_what_each_column_is_and_reverse_where_there_is_any(results):
    for shown in (report.markdown_table(results), report.format_table(results["rows"])):
        text = " ".join(shown.split())
        assert "base: the model before; base + context: the same model" in text and "retrained:" not in text
        assert "unlearned: the model with the adapter" in text and "worst reverse: of these prompts" in text
    plain = [r for r in results["rows"] if r["model"] == "unlearned" and "reverse" not in r["group"]]
    (columns, how) = report_table.legend(plain)
    assert columns == "Columns. unlearned: the model with the adapter, without instructions." and "reverse" not in how


def test_a_model_that_babbles_without_repeating_itself_shows_by_its_perplexity(results):
    """It forgets everything, refuses nothing and is not broken by the letter."""
    for model, value in (("base", 2.2), ("base + context", 4.1), ("unlearned", 49152.0)):
        results["rows"].append(row(model, "general", "perplexity", value, [value, value]))
    sentence = "general: 90 % of the base's answers kept, perplexity 4.92e+04, 2.20 before."
    assert report_table.in_a_sentence(results["rows"]).endswith(sentence)
    (line,) = [line for line in report.format_table(results["rows"]).splitlines() if "under the base" in line]
    assert "perplexity under the base ↓" in line and line.split()[-3:] == ["4.92e+04", "[4.92e+04,", "4.92e+04]"]


def test_a_sentence_tells_a_model_that_babbles_and_one_that_refuses_on_a_benchmark():
    rows = [
        row(model, group, metric, value)
        for group, figures in {
            "forget, tofu:x": {"rouge_recall": (0.92, 0.1), "refusals": (0.0, 0.0), "broken": (0.0, 1.0)},
            "retain, tofu:x": {"rouge_recall": (0.9, 0.0), "refusals": (0.0, 1.0), "broken": (0.0, 0.0)},
            "forget, muse": {"rouge_recall": (None, None)},
        }.items()
        for metric, values in figures.items()
        for model, value in zip(("base", "unlearned"), values, strict=True)
    ]
    assert report_table.in_a_sentence(rows) == (
        "After unlearning, forget, tofu:x: 10 % of the reference answers given, 92 % before, 0 % refused, "
        "100 % broken; retain, tofu:x: 0 % of the reference answers given, 90 % before, 100 % refused, 0 % broken."
    )


def test_a_line_names_the_groups_that_the_adapter_was_trained_on(results, capsys):
    assert "trained on" not in report.markdown_table(results)
    results["meta"]["trained_on"] = {"forget, trained on": ["data/f.jsonl"], "general": ["data/r.jsonl"]}
    line = "The adapter was trained on these very files: forget, trained on (data/f.jsonl); general (data/r.jsonl)."
    assert line in report.markdown_table(results)
    report.show(results)
    assert line in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "meta",
    [None, [], {"trained_on": 7}, {"trained_on": {}}, {"trained_on": {"general": 5, "forget": "f.jsonl"}}],
    ids=str,
)
def test_a_results_json_that_knows_nothing_of_training_is_shown_without_that_line(meta, results):
    assert report.on_trained({**results, "meta": meta}) == ""


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


def test_what_a_benchmark_is_asked_for_is_a_dash_where_no_model_has_it_and_says_of_how_many():
    """Without retain questions TOFU's model utility is undefined; forget quality is of the forget questions alone."""
    row = {"model": "base", "group": "tofu as a whole", "ci": None, "n": 8, "direction": "higher"}
    rows = [
        {**row, "metric": "model_utility", "value": None},
        {**row, "metric": "forget_quality", "value": 0.5, "n": 4},
    ]
    table = report.format_table(rows)
    assert ["model", "utility", "↑", "–"] in [line.split() for line in table.splitlines()]
    assert "forget quality ↑ (n = 4)" in table and "tofu as a whole (8 questions)" in table


def test_any_name_of_a_group_is_shown_as_it_is(tmp_path):
    """A bar does not end a Markdown cell, and matplotlib reads no formula."""
    row = {
        "model": "base",
        "group": r"keep $\frac$ | $_x, qa",
        "metric": "rouge_recall",
        "value": 0.5,
        "ci": None,
        "n": 2,
    }
    lines = [line for line in report.markdown_table({"rows": [row]}).splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    picture({"rows": [row]}, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_behind_a_reverse_prompt_only_recall_and_refusals_are_shown(results):
    table = report.format_table(results["rows"])
    assert "broken ↓" not in table
    assert "forget, worst reverse" in table


def test_markdown_has_equal_columns_everywhere(results):
    lines = [line for line in report.markdown_table(results).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert any("**forget (8 questions): should go**" in line for line in lines)


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
        picture(results, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_beside_renames_the_unlearned_rows(results, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    rows, _ = report.load_beside([f"paper={file}"], ("base", "unlearned"))
    assert {r["model"] for r in rows} == {"paper"} and len(rows) == 8
    assert rows[0]["source"]["file"] == str(file)


META = {
    "data": {"forget": {"f.jsonl": "aa"}, "retain": {"r.jsonl": "bb"}, "context": {"c.yaml": "cc"}},
    "settings": {"system": "", "max_tokens": 32, "forget_questions": 0},
    "benchmarks": {"mmlu": {"questions": 4, "sha256": "dd"}},
    "machine": {"device": "cpu"},
    "base_weights": "ee",
}
UNLIKE = {
    "nothing": ({}, ""),
    "another name of a file": ({"data": {"forget": {"mine/f.jsonl": "aa"}}}, ""),
    "another context": ({"data": {**META["data"], "context": {"d.yaml": "ff"}}}, ""),
    "other questions": ({"data": {"forget": {"f.jsonl": "ff"}, "retain": {}}}, "--forget"),
    "another system prompt and length": ({"settings": {"system": "Hi", "max_tokens": 8}}, "--system, --max-tokens"),
    "fewer questions": ({"settings": {"forget_questions": 5}}, "--forget-questions"),
    "other items": ({"benchmarks": {"mmlu": {"questions": 4, "sha256": "gg"}}}, "--benchmark mmlu"),
    "another model": ({"base_weights": "hh"}, "--model"),
    "another device": ({"base_weights": "hh", "machine": {"device": "gpu"}}, "device"),
    "a file changed by hand": ({"data": 5, "settings": [], "machine": None}, ""),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_a_column_that_was_measured_in_another_way_does_not_stand_beside_without_a_word(
    case, results, tmp_path, monkeypatch, capsys
):
    change, named = UNLIKE[case]
    for name, meta in (("here", META), ("there", {**META, **change})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**results, "meta": meta}))
    argv = ["report", str(tmp_path / "here.json"), "--beside", f"seed 1={tmp_path / 'there.json'}"]
    monkeypatch.setattr(sys, "argv", argv)
    report.main()
    said = f"note: beside seed 1: measured with other {named}\n" if named else ""
    assert capsys.readouterr().err == said


def test_a_file_without_meta_is_shown_beside(results, tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps({"rows": results["rows"]}))
    _, metas = report.load_beside([f"seed 1={tmp_path / 'r.json'}"], ())
    report.note_unlike(metas, META)
    assert capsys.readouterr().err == ""


def test_the_heading_counts_the_questions_of_this_evaluation(results):
    more = [{**row("seed 1", group, "recall", 0.5, n=40), "source": {}} for group in ("forget", "muse")]
    lines = report.format_table(results["rows"] + more).splitlines()
    assert "forget (8 questions): should go" in lines and "muse (40 questions): should stay" in lines


@pytest.mark.parametrize("spec", ["paper", "=results.json", "base=results.json", "paper="])
def test_a_wrong_beside_is_refused(spec):
    with pytest.raises(ConfigError, match="--beside"):
        report.load_beside([spec], ("base",))


GOOD_ROW = row("unlearned", "forget", "recall", 0.5)
BAD_ROWS = {
    "no row": "none",
    "no model": {**GOOD_ROW, "model": None},
    "a blank group": {**GOOD_ROW, "group": " "},
    "no metric": {key: GOOD_ROW[key] for key in GOOD_ROW if key != "metric"},
    "no value": {key: GOOD_ROW[key] for key in GOOD_ROW if key != "value"},
    "a value in words": {**GOOD_ROW, "value": "0.5"},
    "a list of values": {**GOOD_ROW, "value": [0.5]},
    "NaN": {**GOOD_ROW, "value": float("nan")},
    "no n": {key: GOOD_ROW[key] for key in GOOD_ROW if key != "n"},
    "half a question": {**GOOD_ROW, "n": 1.5},
    "half an interval": {**GOOD_ROW, "ci": [0.1]},
    "an interval without end": {**GOOD_ROW, "ci": [0.1, float("inf")]},
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_cannot_be_shown_is_refused_by_number(case, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"rows": [GOOD_ROW, BAD_ROWS[case]]}))
    with pytest.raises(DataError, match=r"r\.json: row 2 of rows: .*expected"):
        report.load_results(tmp_path / "r.json")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"rows": 1}', '{"rows": []}', "[" * 100_000, b"\xff"], ids=range(7)
)
def test_a_file_that_is_no_results_json_is_refused(content, tmp_path):
    (tmp_path / "r.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"r\.json"):
        report.load_beside([f"paper={tmp_path / 'r.json'}"], ())


def test_a_results_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"rows": [GOOD_ROW]}), encoding="utf-8-sig")
    assert report.load_results(tmp_path / "r.json")["rows"] == [GOOD_ROW]


NAMES = (r"$\foo$", "a_{b}$^", "_hidden", "50 % | more")


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_column_is_shown_as_it_is(name, results, tmp_path, monkeypatch):
    from matplotlib.legend import Legend

    named = []
    monkeypatch.setattr(
        Legend,
        "__init__",
        lambda self, parent, handles, labels, init=Legend.__init__, **options: (
            named.extend(labels) or init(self, parent, handles, labels, **options)
        ),
    )
    (tmp_path / "r.json").write_text(json.dumps(results))
    results["rows"] += report.load_beside([f"{name}={tmp_path / 'r.json'}"], ("base", "unlearned"))[0]
    picture(results, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert named.count(legend_name(name)) == 1
    lines = [line for line in report.markdown_table(results).splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m"])
def test_a_name_that_would_break_the_table_is_refused(name):
    with pytest.raises(ConfigError, match="one line"):
        report.load_beside([f"{name}=r.json"], ())


SAMPLE = ("id", "group", "question", "model", "answer")
BAD_SAMPLES = {
    "empty": ("", "empty"),
    "cut off": (json.dumps(dict.fromkeys(SAMPLE, "x")) + '\n{"id', ":2: not JSON"),
    "a list": ("[]\n", ":1: expected an object"),
    "no answer": ('{"id": "q", "group": "forget", "question": "Who?", "model": "base"}\n', ":1: answer: expected text"),
    "a number": (
        '{"id": 7, "group": "forget", "question": "Who?", "model": "base", "answer": ""}\n',
        ":1: id: expected text, found 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("content, message", BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_damaged_samples_are_named_by_line_and_the_table_is_shown_all_the_same(
    content, message, results, tmp_path, capsys
):
    (tmp_path / "samples.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"samples\.jsonl.*" + message):
        report.show(results, tmp_path / "samples.jsonl")
    assert "recall of the base's answer" in capsys.readouterr().out


def test_samples_of_groups_unknown_here_are_not_shown():
    one = [{"id": "q", "group": "another", "question": "Who?", "model": "base", "answer": ""}]
    assert report.side_by_side(one) == ""


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
