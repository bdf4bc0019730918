"""Files of questions: what is read, and one message with file and line for each thing that cannot be."""

import json
import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_mlx.data import Query, check_disjoint, file_hash, load_queries, question_key, spread
from duet_mlx.errors import ConfigError, DataError


@pytest.fixture
def write(tmp_path):
    def write(content, name="q.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def ask(text):
    return json.dumps({"question": text})


def test_all_fields_are_read_and_unknown_ones_ignored(write):
    path = write(
        '{"question": " Who? ", "id": 7, "answer": ["a", "b"], "choices": ["a", "c"], "context": "x"}\n'
        '{"question": "Where?", "answer": "there", "choices": null, "subject": 3}'
    )
    assert load_queries([path], "retain") == [
        Query("7", "Who?", "retain", "x", ("a", "b"), ("a", "c")),
        Query("q:2", "Where?", "retain", None, "there", None),
    ]


def test_several_files_are_read_in_order_and_one_path_may_stand_alone(write):
    one, two = write(ask("A?"), "one.jsonl"), write(ask("B?"), "two.jsonl")
    assert [q.id for q in load_queries([one, str(two)], "forget")] == ["one:1", "two:1"]
    assert [q.id for q in load_queries(one, "forget")] == ["one:1"]


def test_each_question_knows_its_file_and_line_and_is_the_same_wherever_it_stands(write):
    one, two = load_queries(write(f"{ask('A?')}\n\n{ask('B?')}"), "forget")
    assert [one.place.rpartition("/")[2], two.place.rpartition("/")[2]] == ["q.jsonl:1", "q.jsonl:3"]
    assert one == Query("q:1", "A?", "forget")


def test_files_of_the_same_name_in_two_folders_have_different_ids(write, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    paths = [write(ask(f"{folder}?"), f"{folder}/q.jsonl") for folder in ("a", "b")]
    assert [q.id for q in load_queries(paths, "forget")] == [f"{path}:1" for path in paths]


def test_bom_crlf_blank_lines_and_a_missing_last_newline_change_nothing(write):
    path = write(b'\xef\xbb\xbf{"question": "A?"}\r\n\r\n  \n{"question": "B?"}')
    assert [(q.id, q.question) for q in load_queries([path], "forget")] == [("q:1", "A?"), ("q:4", "B?")]


def test_line_separators_inside_a_text_do_not_end_the_line(write):
    path = write('{"question": "A\u2028B\x85C?"}\n' + ask("D?"))
    assert [q.question for q in load_queries([path], "forget")] == ["A\u2028B\x85C?", "D?"]


GOOD = ask("A?") + "\n"
BAD = {
    "an empty file": ("", "q.jsonl: the file is empty"),
    "a file of blank lines": ("\n \n", "q.jsonl: the file is empty"),
    "a line that is not JSON": (
        GOOD + "Who is it?\n",
        'q.jsonl:2: not JSON (Expecting value, column 1): Who is it?; write one object a line, like {"question": "…"}',
    ),
    "a CSV file": (
        "question,answer\nA?,a\n",
        "q.jsonl:1: not JSON (Expecting value, column 1): question,answer; write one object a line",
    ),
    "one JSON list": (
        '[{"question": "A?"},\n{"question": "B?"}]',
        """q.jsonl:1: not JSON (Expecting value, column 21): [{"question": "A?"},; write one object a line""",
    ),
    "one JSON list that begins on a line of its own": (f"[\n{ask('A?')}\n]", "column 2): [; write one object a line"),
    "a whole JSON list on one line": (
        '[{"question": "A?"}]',
        """q.jsonl:1: expected an object, found a list: [{"question": "A?"}]; write one object a line""",
    ),
    "an object over several lines": ('{\n"question": "A?"\n}', "column 2): {; write one object a line"),
    "a number with too many digits": ('{"question": "A?", "n": ' + "9" * 9000 + "}", "q.jsonl:1: not JSON"),
    "brackets without end": ("[" * 100_000, "q.jsonl:1: not JSON"),
    "a bare text": (GOOD + '"A?"', "q.jsonl:2: expected an object"),
    "no question": (
        GOOD + '{"Question": "B?", "answer": "b"}',
        'q.jsonl:2: no "question" field; fields found: Question, answer',
    ),
    "no field at all": ("{}", 'q.jsonl:1: no "question" field; fields found: none'),
    "a question that is a number": (
        '{"question": 5}',
        'q.jsonl:1: "question" must be text, found a number: 5',
    ),
    "a question that is null": ('{"question": null}', 'q.jsonl:1: "question" must be text, found null'),
    "a question that is a list": ('{"question": ["A?"]}', 'q.jsonl:1: "question" must be text, found a list'),
    "a question that is true": ('{"question": true}', 'q.jsonl:1: "question" must be text, found true/false'),
    "a blank question": (GOOD + ask(" \t"), 'q.jsonl:2: "question" is blank'),
    "a question of nothing visible": (GOOD + ask("\u200b \ufeff"), 'q.jsonl:2: "question" is blank'),
    "half a surrogate pair": (
        '{"question": "A\\ud83d"}',
        'q.jsonl:1: "question" holds half a surrogate pair at character 2',
    ),
    "damaged UTF-8": (
        GOOD.encode() + b'{"question": "caf\xe9"}',
        "q.jsonl:2: not UTF-8 text at byte 18 of the line",
    ),
    "UTF-16": (GOOD.encode("utf-16"), "q.jsonl:1: not UTF-8 text but UTF-16"),
    "UTF-32": (GOOD.encode("utf-32"), "q.jsonl:1: not UTF-8 text but UTF-32"),
    "UTF-32, high bytes first": (b"\0\0\xfe\xff" + GOOD.encode("utf-32-be"), "q.jsonl:1: not UTF-8 text but UTF-32"),
    "an answer that is a number": ('{"question": "A?", "answer": 5}', 'q.jsonl:1: "answer" must be text'),
    "an empty list of answers": (
        '{"question": "A?", "answer": []}',
        'q.jsonl:1: "answer" must be a list of texts',
    ),
    "choices that are text": (
        '{"question": "A?", "choices": "ab"}',
        'q.jsonl:1: "choices" must be a list of texts, found text',
    ),
    "a context that is a list": ('{"question": "A?", "context": ["x"]}', 'q.jsonl:1: "context" must be text'),
    "an id that is true": ('{"question": "A?", "id": true}', 'q.jsonl:1: "id" must be text'),
    "two equal ids": (
        '{"question": "A?", "id": 1}\n{"question": "B?", "id": "1"}',
        'q.jsonl:2: id "1" is that of',
    ),
}


def test_a_file_name_that_is_not_utf8_gives_an_id_that_can_be_written(tmp_path):
    path = tmp_path / os.fsdecode(b"fran\xe7.jsonl")
    try:
        path.write_text(ask("A?"))
    except OSError:
        pytest.skip("this file system takes no such name")
    (query,) = load_queries([path], "forget")
    assert query.id.encode() == b"fran\\xe7:1"


def test_a_question_with_a_joined_emoji_is_not_blank(write):
    path = write(ask("\u200bWho?") + "\n" + ask("👩\u200d🚀"))
    assert len(load_queries([path], "forget")) == 2


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_bad_content_is_named_with_file_and_line(content, message, write):
    with pytest.raises(DataError) as error:
        load_queries([write(content)], "forget")
    assert message in str(error.value) and len(str(error.value)) < 500


def test_a_field_with_a_similar_name_is_offered(write):
    with pytest.raises(DataError, match='did you mean "questions"'):
        load_queries([write('{"questions": "A?"}')], "forget")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        load_queries([tmp_path / "gone.jsonl"], "forget")


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        load_queries([tmp_path], "forget")


def test_no_file_and_an_unknown_role_are_refused():
    with pytest.raises(DataError, match="no file of forget questions"):
        load_queries([], "forget")
    with pytest.raises(DataError, match="forget, retain, neighbour"):
        load_queries(["a.jsonl"], "keep")


def test_a_file_given_twice_is_refused_however_it_is_spelled(write, tmp_path):
    path = write(ask("A?"))
    with pytest.raises(DataError, match="given twice for retain questions"):
        load_queries([path, tmp_path / "sub" / ".." / "q.jsonl"], "retain")


def test_a_repeated_question_is_dropped_with_a_note_that_says_where(write, caplog):
    path = write(f"{ask('Who is it?')}\n{ask('who is  it')}\n{ask('Who else?')}")
    with caplog.at_level(logging.WARNING):
        queries = load_queries([path], "forget")
    assert [q.question for q in queries] == ["Who is it?", "Who else?"]
    assert caplog.messages == [f"1 repeated forget question(s) dropped, the first: {path}:2 repeats {path}:1"]


def test_a_question_on_both_sides_is_refused_whatever_its_case_and_punctuation():
    forget = [Query("f:1", "Who is Dobby?", "forget"), Query("f:2", "Who is Harry’s owl?", "forget")]
    retain = [Query("r:1", "Who is Hedwig?", "retain"), Query("n:9", 'who is "HARRYS" owl', "neighbour")]
    with pytest.raises(DataError) as error:
        check_disjoint(forget, retain)
    assert "1 forget question(s)" in str(error.value) and "f:2" in str(error.value) and "n:9" in str(error.value)
    check_disjoint(forget, retain[:1])


@pytest.mark.parametrize(
    "one, other",
    [("What is C?", "What is C#?"), ("C?", "C++?"), ("???", "!!!"), ("क?", "कि?"), ("Sea", "See")],
)
def test_signs_that_carry_meaning_keep_questions_apart(one, other):
    assert question_key(one) != question_key(other)


@given(st.text(min_size=1, max_size=20))
def test_case_and_spacing_never_change_a_questions_key(text):
    folded = text.casefold()
    assert question_key(f"  {folded}\n") == question_key(folded)
    assert question_key(folded.replace(" ", " \t ")) == question_key(folded)


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.lists(words, min_size=1, max_size=8, unique_by=question_key))
def test_what_is_written_as_jsonl_is_read_back(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("data") / "q.jsonl"
    for ascii_only in (True, False):
        path.write_bytes("\n".join(json.dumps({"question": t}, ensure_ascii=ascii_only) for t in texts).encode())
        assert [q.question for q in load_queries([path], "forget")] == [t.strip() for t in texts]


def test_the_hash_is_that_of_the_files_bytes(write, tmp_path):
    assert file_hash(write(b"abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(DataError, match="no such file"):
        file_hash(tmp_path / "gone")


def test_a_file_that_cannot_be_opened_says_what_the_system_says(monkeypatch, write):
    path = write(ask("A?"))

    def refused(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refused)
    with pytest.raises(DataError, match=r"q\.jsonl: cannot be read \(Permission denied\)"):
        load_queries([path], "forget")


@given(st.integers(1, 60).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size))))
def test_fewer_questions_are_so_many_in_order_and_at_even_distances(sizes):
    size, count = sizes
    queries = [Query(str(number), f"Who is {number}?", "forget") for number in range(size)]
    chosen = [int(query.id) for query in spread(queries, count, "--forget-questions")]
    assert len(chosen) == count and chosen[0] == 0
    gaps = [after - before for before, after in zip(chosen, [*chosen[1:], size], strict=True)]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_no_number_of_questions_is_all_and_more_than_there_are_is_refused():
    queries = [Query(str(number), f"Who is {number}?", "forget") for number in range(3)]
    assert spread(queries, 0, "--forget-questions") == queries
    with pytest.raises(ConfigError, match="--forget-questions 4: the files hold 3"):
        spread(queries, 4, "--forget-questions")
