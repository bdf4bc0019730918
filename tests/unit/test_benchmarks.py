"""Every benchmark's files are read as they come, traps and all; what cannot be read says where and why."""

import csv
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_mlx.benchmarks import LAYOUTS, load_benchmark
from duet_mlx.errors import ConfigError, DataError
from duet_mlx.items import KINDS, Item, read_items
from duet_mlx.tables import read_lines, read_rows

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture
def write(tmp_path):
    def write(content, name="q.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# --- the benchmarks -----------------------------------------------------------------------------------------


def test_tofu_gives_its_four_groups_with_paraphrase_and_perturbed_answers(caplog):
    items = load_benchmark(f"tofu:forget01@{DATA / 'tofu'}")
    assert Counter(item.group for item in items) == {"forget": 40, "real authors": 100, "world facts": 117}
    assert "no retain_perturbed" in caplog.text
    first, fact = items[0], items[-1]
    # `08\/09\/1956` in the file; the file has no final newline, and the last row is there all the same.
    assert first.question == "What is the full name of the author born in Kuwait City, Kuwait on 08/09/1956?"
    assert first.answers[0].endswith("is Basil Mahfouz Al-Kuwaiti.")
    assert first.paraphrased.startswith("Basil Mahfouz Al-Kuwaiti is the complete name")
    assert len(first.perturbed) == 5 and first.paraphrased_question
    assert len(fact.perturbed) == 3 and fact.paraphrased is None
    assert len({item.id for item in items}) == len(items)


def test_muse_gives_knowmem_with_the_shots_of_each_side(caplog):
    items = load_benchmark(f"muse:news@{DATA / 'muse'}")
    assert Counter((item.group, item.kind, len(item.shots)) for item in items) == {
        ("forget", "knowmem", 6): 40,
        ("retain", "knowmem", 5): 32,
    }
    assert items[0].shots[0].answers == ("£55,000",)
    assert "no verbmem/forget" in caplog.text and "no privleak/holdout" in caplog.text


def test_muses_verbmem_and_privleak_are_read_with_texts_as_objects_or_bare(tmp_path):
    for path, rows in {
        "knowmem/forget_qa.json": [{"question": "Who?", "answer": "Me"}],
        "verbmem/forget.json": [{"prompt": "Alice was", "gt": "beginning to"}],
        "privleak/forget.json": [{"text": "Down the hole"}],
        "privleak/holdout.json": ["Through the glass"],
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(json.dumps(rows))
    items = load_benchmark(f"muse@{tmp_path}")
    assert [(i.group, i.kind, i.question, i.answers) for i in items] == [
        ("forget", "knowmem", "Who?", ("Me",)),
        ("forget", "verbmem", "Alice was", ("beginning to",)),
        ("forget", "privleak", "Down the hole", ()),
        ("holdout", "privleak", "Through the glass", ()),
    ]


def test_rwku_gives_its_three_levels_and_its_neighbours_each_question_once(caplog):
    items = load_benchmark(f"rwku@{DATA / 'rwku'}")
    assert Counter(item.group for item in items) == {
        "forget, cloze": 14,
        "forget, question": 3,
        "forget, adversarial": 28,
        "neighbours, question": 16,
    }
    assert "3 row(s) that stand there twice" in caplog.text
    assert {"cloze", "simple question", "role play"} <= {item.subject for item in items}
    cloze, last = items[0].question, items[-1].question
    assert cloze.startswith("Please complete the blank in the following question.\nQuestion: Confucius")
    assert last.startswith("Please briefly answer the following question.\nQuestion: ")
    alone = load_benchmark(f"rwku@{DATA / 'rwku' / 'Target'}")
    assert [item.question for item in alone] == [item.question for item in items]


def test_mmlu_is_read_from_hendrycks_csv_with_five_shots_of_the_same_subject():
    items = load_benchmark(f"mmlu@{DATA / 'mmlu'}")
    assert {item.subject for item in items} == {"global_facts"} and len(items) == 100
    assert items[0].choices == ("10%", "20%", "40%", "80%") and items[0].correct == 2 and items[0].answers == ("40%",)
    assert [shot.subject for shot in items[0].shots] == ["global_facts"] * 5


def test_a_csv_cell_may_hold_line_ends():
    items = read_items(DATA / "mmlu" / "formal_logic_val.csv", "general", "choice")
    assert len(items) == 14 and any("\n" in item.question for item in items)
    assert all(len(item.choices) == 4 for item in items)


def test_multiple_choice_in_parquet_as_the_hub_has_it(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "wmdp-bio"
    folder.mkdir()
    rows = [{"question": "Which is a fruit?", "choices": ["rock", "pear", "iron", "sand"], "answer": 1}]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    (item,) = load_benchmark(f"wmdp@{tmp_path}")
    assert (item.kind, item.group, item.correct, item.answers) == ("choice", "forget", 1, ("pear",))


def test_a_broken_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "q.parquet").write_bytes(b"no such thing")
    with pytest.raises(DataError, match="q.parquet: cannot be read as Parquet"):
        read_rows(tmp_path / "q.parquet")


def test_a_hub_id_is_read_from_the_hubs_own_cache(tmp_path):
    """The cache is laid out as the hub's client does it, so that the client itself finds it without a network."""
    repo = tmp_path / "hub" / "datasets--locuslab--TOFU"
    shutil.copytree(DATA / "tofu", repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    code = "from duet_mlx.benchmarks import load_benchmark; print(len(load_benchmark('tofu:forget01')))"
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.stdout.strip() == "257", run.stderr
    other = code.replace("'tofu:forget01'", "'tofu@nobody/nothing'")
    run = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, env=env)
    assert "nobody/nothing: cannot be fetched from the hub" in run.stderr and "@FOLDER" in run.stderr


def test_the_names_of_all_layouts_are_those_of_the_command():
    assert set(LAYOUTS) == {"tofu", "muse", "rwku", "mmlu", "wmdp"}
    assert {part.kind for layout in LAYOUTS.values() for part in layout.parts} <= set(KINDS)


# --- formats that are not what their names say --------------------------------------------------------------


def test_a_json_file_may_hold_a_list_or_a_row_a_line(write):
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(3)]
    texts = {
        "list.jsonl": json.dumps(rows),
        "indented.json": json.dumps(rows, indent=2),
        "lines.json": "\n".join(map(json.dumps, rows)),
        "lines.jsonl": "\r\n".join(map(json.dumps, rows)) + "\n\r\n",
        "bom.json": "\ufeff" + json.dumps(rows),
        "object.json": json.dumps({"Version": 1, "data": rows}),
    }
    for name, text in texts.items():
        assert [item.answers for item in read_items(write(text, name), "g")] == [("0",), ("1",), ("2",)], name


def test_refusals_are_lines_quoted_or_not_or_a_csv_column_with_or_without_a_header():
    assert read_lines(DATA / "tofu" / "idontknow.jsonl")[:2] == [
        "I'm not certain about that.",
        "That's beyond my current knowledge base.",
    ]
    quoted = read_lines(DATA / "refusals" / "refusal.jsonl")
    assert len(quoted) == 33 and quoted[0] == "I'm not certain about that."
    column = read_lines(DATA / "refusals" / "polite_refusal_responses_copyright.csv")
    assert len(column) == 49 and column[0].startswith("I'm sorry, but I'm unable")
    assert not any("\r" in text or text.startswith('"') for text in column)


def test_triviaqas_own_layout_gives_the_value_and_its_aliases():
    (item,) = read_items(DATA / "trivia" / "triviaqa_sample.json", "general")
    assert item.answers[:2] == ("Sunset Boulevard", "Sunset Blvd") and item.question.startswith("Which Lloyd Webber")


TRIVIA = (
    "#Q What is the capital of Kenya?\n^ Nairobi\nA Nairobi\nB Lagos\n\n"
    "#Q Which is it?\n1) the first\nof two\n^ True\nA True\nB False\n"
)


def test_opentriviaqa_is_read_with_questions_of_several_lines(write):
    one, two = read_items(write("\n" + TRIVIA, "geography"), "general", "choice")
    assert (one.choices, one.correct) == (("Nairobi", "Lagos"), 0)
    assert two.question == "Which is it?\n1) the first\nof two" and two.answers == ("True",)
    (numbers,) = read_items(write("#Q How many?\n^ 1\nA 1\nB 2\nC 3\n", "numbers"), "general", "choice")
    assert numbers.answers == ("1",)


def test_crlf_mixed_with_lf_changes_nothing(write):
    mixed = TRIVIA.replace("\n", "\r\n", 5)
    assert read_items(write(mixed, "a"), "g", "choice") == [
        Item(**{**vars(item), "id": item.id.replace("b", "a")})
        for item in read_items(write(TRIVIA, "b"), "g", "choice")
    ]


def test_damaged_utf_8_costs_its_own_row_alone_and_is_named(write, caplog):
    good, bad = b'{"question": "Who?", "answer": "I"}\n', b'{"question": "Where\xe2\x80?", "answer": "here"}\n'
    path = write(good + bad + good.replace(b"Who", b"Why"))
    with caplog.at_level(logging.WARNING):
        items = read_items(path, "g")
    assert [item.question for item in items] == ["Who?", "Why?"]
    assert "q.json:2: 1 row(s) left out: not UTF-8" in caplog.text
    with pytest.raises(DataError, match="no row is UTF-8"):
        read_items(write(bad), "g")


def test_html_entities_become_their_signs_and_nothing_else_changes(write):
    text = "R&amp;D &quot;x&quot; &#39;y&#39; a &lt; b"
    (item,) = read_items(write(json.dumps([{"question": text, "answer": "R&D ?a=1&copy=2"}])), "g")
    assert item.question == "R&D \"x\" 'y' a < b" and item.answers == ("R&D ?a=1&copy=2",)


# --- field names --------------------------------------------------------------------------------------------

NAMED = {
    "prompt and completion": ({"prompt": "Who?", "completion": "Me"}, ("Me",)),
    "chat messages": (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Who?"},
                      {"role": "assistant", "content": "Me"}]},
        ("Me",),
    ),
    "upper case with spaces": ({"Question": "Who?", "Correct Answer": "Me"}, ("Me",)),
    "Alpaca without input": ({"instruction": "Who?", "input": "", "output": "Me"}, ("Me",)),
    "input and output": ({"input": "Who?", "output": "Me"}, ("Me",)),
    "a list of answers": ({"question": "Who?", "answers": ["Me", "I", "Me"]}, ("Me", "I")),
    "SQuAD": ({"question": "Who?", "answers": {"text": ["Me"], "answer_start": [0]}}, ("Me",)),
    "gold answer and aliases": ({"question": "Who?", "gold_answer": "Me", "aliases": ["I"]}, ("Me", "I")),
    "a number": ({"question": "Who?", "answer": 7}, ("7",)),
    "RWKU, with a level as text": ({"query": "Who?", "answer": "Me", "level": "1"}, ("Me",)),
    "no answer": ({"question": "Who?"}, ()),
    "NaN, as pandas writes what is missing": ({"question": "Who?", "answer": math.nan, "choices": math.nan}, ()),
    "a dataset's own options, all blank": ({"question": "Who?", "A": "", "B": "", "answer": "Me"}, ("Me",)),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_the_field_names_that_people_use_are_understood(name, write):
    row, answers = NAMED[name]
    (item,) = read_items(write(json.dumps(row), "q.jsonl"), "g")
    assert (item.question, item.answers) == ("Who?", answers)


def test_alpacas_two_halves_are_one_question(write):
    (item,) = read_items(write('{"instruction": "Translate.", "input": "Owl", "output": "Eule"}'), "g")
    assert item.question == "Translate.\n\nOwl"


def test_csv_with_a_header_and_with_two_bare_columns(write):
    named = read_items(write('id,Question,Answer\n1,"Who, me?",I\n\n', "a.CSV"), "g")
    bare = read_items(write('"Who, me?",I\n', "b.csv"), "g")
    tabs = read_items(write("question\tanswer\nWho, me?\tI\n", "c.tsv"), "g")
    other = read_items(write('Problem,Answer\n"Who, me?",I\n', "d.csv"), "g")  # no row of its own, but a header
    assert [(i.question, i.answers) for i in named + bare + tabs + other] == [("Who, me?", ("I",))] * 4
    (text,) = read_items(write('text\n"Down, down"\n', "e.csv"), "g", "privleak")
    assert text.question == "Down, down"


OPTIONS = ["red", "green", "blue"]
RIGHT = {
    "an index": {"choices": OPTIONS, "answer": 1},
    "an index as text": {"choices": OPTIONS, "answer": "1"},
    "a letter": {"options": OPTIONS, "answer": "B"},
    "a letter in brackets": {"choices": OPTIONS, "answer": "(B)"},
    "the text": {"choices": OPTIONS, "answer": "green"},
    "ARC": {"choices": {"text": OPTIONS, "label": ["1", "2", "3"]}, "answerKey": "2"},
    "ARC with numbers": {"choices": {"text": OPTIONS, "label": [1, 2, 3]}, "answerKey": 2},
    "MedQA": {"options": {"A": "red", "B": "green"}, "answer": "green", "answer_idx": "B"},
    "TruthfulQA": {"mc1_targets": {"choices": OPTIONS, "labels": [0, 1, 0]}},
    "columns": {"A": "red", "B": "green", "C": "blue", "answer": "B"},
    "columns with the text": {"option_a": "red", "option_b": "green", "answer": "green"},
    "columns of which this row needs two": {"A": "red", "B": "green", "C": "", "D": " ", "answer": "B"},
    "a number among the options": {"choices": ["4", "8"], "answer": "8"},
    "columns of letters": {"A": "B", "B": "A", "answer": "B"},
}


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_option_is_found_by_index_letter_mark_or_text(name, write):
    (item,) = read_items(write(json.dumps([{"question": "Which?", **RIGHT[name]}])), "g", "choice")
    assert item.correct == 1 and item.answers == (item.choices[1],)


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5), st.booleans())
def test_any_text_survives_json_lines_and_lists(tmp_path_factory, questions, ascii_only):
    path = tmp_path_factory.mktemp("any") / "q.json"
    rows = [{"question": f"{i} {text.replace('&', '')}"} for i, text in enumerate(questions)]
    whole = [row for row in rows if "\ufffd" not in row["question"]]
    for text in (
        "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows),
        json.dumps(rows, ensure_ascii=ascii_only),
    ):
        path.write_bytes(text.encode())
        if whole:
            assert [i.question for i in read_items(path, "g")] == [row["question"].strip() for row in whole]


cells = st.text(st.characters(exclude_characters="\r&\ufffd", exclude_categories=["Cs"])).filter(str.strip)


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=4, unique=True), st.sampled_from(["\n", "\r\n"]))
def test_any_text_survives_csv_as_other_programs_write_it(tmp_path_factory, rows, line_end):
    path = tmp_path_factory.mktemp("any") / "q.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator=line_end).writerows([("question", "answer"), *rows])
    found = [(item.question, item.answers) for item in read_items(path, "g")]
    assert found == list(dict.fromkeys((q.strip(), (a.strip(),)) for q, a in rows))


# --- faults -------------------------------------------------------------------------------------------------

BAD = {
    "an empty file": ("q.json", "", "qa", "q.json: the file is empty"),
    "no question": (
        "q.json",
        '[\n{"a": 1, "title": "x"}]',
        "qa",
        r"q.json:2: no question; fields found: a, title; wan",
    ),
    "a list cut off": ("q.json", '[{"question": "a"},\n', "qa", "q.json:2: the list has no end"),
    "two lists": ("q.json", '[{"question": "a"}]\n[1]', "qa", "q.json:1: more text behind the end of the list"),
    "no JSON in the second row": ("q.json", '{"question": "a"}\n{"question": b}', "qa", r"q.json:2: not JSON \(.*col"),
    "brackets without end": ("q.json", "[" * 100_000, "qa", "q.json:1: not JSON that can be read"),
    "a number among the rows": ("q.json", '{"question": "a"}\n7', "qa", "q.json:2: expected an object like"),
    "a blank question": ("q.json", '{"question": " "}', "qa", "q.json:1: the question must be text"),
    "a list as an answer's element": ("q.json", '{"question": "a", "answer": [[1]]}', "qa", "an answer must be text"),
    "UTF-16": ("q.json", '{"question": "a"}'.encode("utf-16"), "qa", "but UTF-16, by its first bytes"),
    "plain text": ("q.json", "version https://git-lfs.github.com/spec/v1\n", "qa", "q.json:1: expected an object like"),
    "gzip": ("q.json.gz", b"\x1f\x8b\x08\x00", "qa", "q.json.gz: is compressed; unpack it first"),
    "no options": ("q.json", '{"question": "a", "answer": "b"}', "choice", "q.json:1: no options; fields found: q"),
    "one option": ("q.json", '{"question": "a", "choices": ["b"], "answer": 0}', "choice", "two options or more"),
    "one option with a mark of its own": (
        "q.json",
        '{"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answer": "A"}',
        "choice",
        "two options or more",
    ),
    "an index too far": ("q.json", '{"question": "a", "choices": ["b", "c"], "answer": 2}', "choice", "Found 2; exp"),
    "no answer among options": ("q.json", '{"question": "a", "choices": ["b", "c"]}', "choice", "Found None; expected"),
    "a letter that is a text": ("q.json", '{"question": "a", "choices": ["B", "A"], "answer": "A"}', "choice", "'A'"),
    "a number that is a text": (
        "q.json",
        '{"question": "a", "choices": ["1", "2", "3"], "answer": "2"}',
        "choice",
        "Found '2', which fits 2 options",
    ),
    "a raised 2": (
        "q.json",
        '{"question": "a", "choices": ["b", "c"], "answer": "²"}',
        "choice",
        "Found '²'; expected",
    ),
    "a number for options": ("q.json", '{"question": "a", "choices": 4}', "choice", "two options or more.*found 4"),
    "a number for their marks": (
        "q.json",
        '{"question": "a", "choices": {"text": ["b", "c"], "label": 1}}',
        "choice",
        "two options or more",
    ),
    "a list of cells that ends in an index": ("q.json", '[["a", "b", "c", "d", 1]]', "choice", "5 cells and no header"),
    "semicolons between the cells": ("q.csv", "question;answer\nWho?;me\n", "qa", "commas .* found .'question;answer'"),
    "a row far down a list on one line": (
        "q.json",
        json.dumps([{"question": str(n)} for n in range(500)] + [{"title": "x"}]),
        "qa",
        "q.json:1, row 501: no question",
    ),
    "a list written as text": ("q.csv", "question,answer\nWho?,\"['me', 'I']\"\n", "qa", "q.csv:2: a list writt"),
    "a list as NumPy writes it": ("q.csv", "question,perturbed_answer\nWho?,['a' 'b']\n", "qa", "q.csv:2: a list writ"),
    "an answer by language": ("q.json", '{"question": "a", "answer": {"en": "b"}}', "qa", "an answer must be text, fo"),
    "no answer for KnowMem": ("q.json", '{"question": "a"}', "knowmem", "q.json:1: no answer; fields found: question;"),
    "an open quote": ("q.csv", 'question,answer\nWho?,"me\nWhy?,so\n', "qa", r"q.csv:2: not CSV \("),
    "a cell too many": ("q.csv", "question,answer\nWho?,me,too\n", "qa", "q.csv:2: 3 cells, expected 2: question, ans"),
    "three bare columns": ("q.csv", "Who,me,too\n", "qa", "q.csv:1: 3 cells and no header"),
    "a trivia block without answer": ("q.txt", TRIVIA + "#Q Who?\nA I\n", "choice", "q.txt:12: expected `#Q`"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_understood_says_where_and_why(case, write):
    name, content, kind, message = BAD[case]
    with pytest.raises(DataError, match=message):
        read_items(write(content, name), "g", kind)


def test_refusals_are_no_objects(write):
    with pytest.raises(DataError, match="q.jsonl:1: expected one text a line"):
        read_lines(write('{"question": "a"}', "q.jsonl"))


@pytest.mark.parametrize("content", [b"No.\nJe ne peux pas r\xe9pondre.\n", b"No.\n\x07\0\0\0weight\n"])
def test_refusals_are_all_of_them_text(write, content, caplog):
    """A row of a benchmark that is damaged may be left out, as the others still count."""
    with pytest.raises(DataError, match=r"q.txt:2: not UTF-8 text; expected a text file, saved as UTF-8"):
        read_lines(write(content, "q.txt"))
    assert not caplog.messages


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="none.json: cannot be read"):
        read_items(tmp_path / "none.json", "g")
    with pytest.raises(DataError, match="is a folder"):
        read_items(tmp_path, "g")


def test_a_spec_that_cannot_be_followed_says_what_there_is(tmp_path):
    with pytest.raises(ConfigError, match='no benchmark .tofo. .did you mean "tofu".*muse.*qa'):
        load_benchmark("tofo")
    with pytest.raises(ConfigError, match="qa:GROUP@FILE"):
        load_benchmark("qa:forget")
    with pytest.raises(DataError, match="neither a folder nor a hub id"):
        load_benchmark(f"tofu@{tmp_path / 'none'}")
    (tmp_path / "README.md").touch()
    with pytest.raises(DataError, match=r"no file forget11_perturbed.json .* it has README.md"):
        load_benchmark(f"tofu:forget11@{tmp_path}")


def test_a_folder_without_any_subject_is_an_error(tmp_path):
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="no file NAME_test.csv in"):
        load_benchmark(f"mmlu@{tmp_path}")


def test_two_files_that_could_both_be_meant_are_an_error(tmp_path):
    for name in ("forget10_perturbed.json", "forget10_perturbed.csv"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match="2 files for forget10_perturbed"):
        load_benchmark(f"tofu@{tmp_path}")


def test_plain_questions_come_in_the_group_that_is_named(write):
    path = write('{"question": "Who?"}')
    assert [item.group for item in load_benchmark(f"qa:retain@{path}")] == ["retain"]
    assert [item.group for item in load_benchmark(f"qa@{path}")] == ["forget"]
