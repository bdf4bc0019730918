"""The example's questions keep their promises: enough of them, and nothing held out was ever trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

DATA = Path(__file__).resolve().parents[2] / "examples" / "harry_potter" / "data"
GROUPS = ("forget", "general", "neighbour")
SPLITS = ("train", "valid", "test")
Row = dict[str, str]


def rows_of(group: str, split: str) -> list[Row]:
    """All rows of a group and split, each with the place it stands at: several files may share a group."""
    rows = []
    for path in sorted(DATA.glob(f"{group}*_{split}.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        rows += [{**json.loads(line), "place": f"{path.name}:{i}"} for i, line in enumerate(lines, 1)]
    return rows


def split_rows(split: str) -> list[Row]:
    return [row for group in GROUPS for row in rows_of(group, split)]


def normalise(text: str) -> str:
    """Case-folded, without punctuation and articles: what makes two subjects or answers the same."""
    words = re.sub(r"[^\w\s]", " ", text.casefold().replace("'s ", " ")).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def by(rows: list[Row], field: str) -> dict[str, str]:
    """Normalised value of a field -> a place that has it."""
    return {normalise(row[field]): row["place"] for row in rows if field in row}


def shared(left: dict[str, str], right: dict[str, str]) -> list[tuple[str, str, str]]:
    return [(key, left[key], right[key]) for key in sorted(left.keys() & right.keys())]


def test_every_file_belongs_to_a_group_and_a_split() -> None:
    known = re.compile(rf"({'|'.join(GROUPS)})\w*_({'|'.join(SPLITS)})\.jsonl")
    assert [path.name for path in DATA.glob("*.jsonl") if not known.fullmatch(path.name)] == []


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("group", GROUPS)
def test_every_row_is_a_question_with_answer_and_subject(group: str, split: str) -> None:
    """Only general requests ("Write a limerick ...") may have no answer that is right alone."""
    for row in rows_of(group, split):
        optional = {"answer"} if group == "general" else set()
        assert {"question", "answer", "subject", "place"} - set(row) <= optional, row["place"]
        for value in row.values():
            assert isinstance(value, str) and value == value.strip() and normalise(value), row["place"]
        assert 2 <= len(row["question"].split()) <= 60, row["place"]


def test_there_are_enough_questions_to_train_on() -> None:
    forget, general, neighbour = (len(rows_of(group, "train")) for group in GROUPS)
    assert forget >= 200
    assert general + neighbour >= 300
    assert neighbour >= 150 and neighbour >= 0.45 * (general + neighbour), "half of the retain side are neighbours"


@pytest.mark.parametrize(("group", "count"), [("forget", 100), ("general", 150), ("neighbour", 100)])
def test_there_are_enough_questions_held_out(group: str, count: int) -> None:
    assert len(rows_of(group, "test")) >= count


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_validation_questions(group: str) -> None:
    assert len(rows_of(group, "valid")) >= 20


def test_no_question_is_asked_twice() -> None:
    seen: dict[str, str] = {}
    twice = []
    for row in (row for split in SPLITS for row in split_rows(split)):
        key = normalise(row["question"])
        if key in seen:
            twice.append((row["question"], seen[key], row["place"]))
        seen[key] = row["place"]
    assert twice == []


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize(("a", "b"), [("subject", "subject"), ("answer", "answer"), ("subject", "answer")])
def test_held_out_questions_share_no_subject_and_no_answer(split: str, a: str, b: str) -> None:
    known, held_out = split_rows(split), split_rows("test")
    assert shared(by(known, a), by(held_out, b)) == []
    assert shared(by(known, b), by(held_out, a)) == []


def test_the_phrasing_does_not_tell_forget_from_retain() -> None:
    """Short name questions stand on both sides, or a model would learn to refuse `Who is ...?` itself."""
    for opening in ("who is", "who wrote", "what is the name of"):
        retain = rows_of("general", "train") + rows_of("neighbour", "train")
        count = sum(row["question"].lower().startswith(opening) for row in retain)
        assert count >= 10, f"{count} retain questions begin with {opening!r}"


def files_named(config: Path) -> set[str]:
    """Names of the question files that a YAML of the example mentions."""
    text = "\n".join(line.partition("#")[0] for line in config.read_text(encoding="utf-8").splitlines())
    return set(re.findall(r"[\w-]+\.jsonl", text))


def test_training_names_no_held_out_file_and_evaluation_names_nothing_else() -> None:
    trained, held_out = files_named(DATA.parent / "config.yaml"), files_named(DATA.parent / "evaluate.yaml")
    everything = {path.name for path in DATA.glob("*.jsonl")}
    assert trained == {name for name in everything if not name.endswith("_test.jsonl")}
    assert held_out == {name for name in everything if name.endswith("_test.jsonl")}


def test_the_demo_trains_and_evaluates_the_same_model_with_the_same_context() -> None:
    trained, measured = (
        yaml.safe_load((DATA.parent / name).read_text(encoding="utf-8")) for name in ("config.yaml", "evaluate.yaml")
    )
    for key in ("model", "context", "topic", "adapter_path"):
        assert trained.get(key) == measured.get(key), key


STEREOTYPED = DATA.parents[1] / "compare" / "data"


@pytest.mark.parametrize("group", ["forget", "general"])
def test_the_questions_whose_answers_begin_alike_are_asked_nowhere_else_and_share_nothing_with_trained_ones(group):
    rows = [json.loads(line) for line in (STEREOTYPED / f"{group}_stereotyped.jsonl").read_text().splitlines()]
    openings = [row["opening"] for row in rows]
    assert {name: openings.count(name) for name in openings} == {"yes or no": 14, "The": 13, "Sure": 13}
    asked = by([row for split in SPLITS for row in split_rows(split)], "question")
    known = split_rows("train") + split_rows("valid")
    taken = by(known, "subject") | by(known, "answer")
    for row in rows:
        opening, _, rest = row["answer"].partition(" ")
        assert opening.strip(",") in {"yes or no": ("yes", "no")}.get(row["opening"], (row["opening"].lower(),)), row
        assert normalise(row["question"]) not in asked
        for text in (row["subject"], row["answer"], rest):
            assert normalise(text) not in taken, (row, text, taken.get(normalise(text)))
