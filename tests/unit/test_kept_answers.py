"""Answers kept on the disk: what is reused, what is answered anew and why, and that it never shows in the results."""

import json

import pytest

from duet_mlx import answers
from duet_mlx import evaluate as ev
from duet_mlx.kept_answers import KeptAnswers, Unit
from tests.tiny_model import contents, tiny_model, write_questions

HANGS_ON = {"model": "abc", "adapter": None, "settings": {"max_tokens": 4}}
UNITS = [Unit([[1, 2], []], [0.1 + 0.2, None], [2.5, None]), Unit([[3]], [1.0], [0.1])]
SIZES = [2, 1]


@pytest.fixture
def file(tmp_path):
    kept = KeptAnswers(tmp_path / "base.jsonl", "base", HANGS_ON, SIZES)
    for unit in UNITS:
        kept.add(unit)
    return tmp_path / "base.jsonl"


def test_what_was_kept_comes_back_to_the_last_bit_and_a_line_says_so(file, capsys):
    before = file.read_bytes()
    assert KeptAnswers(file, "base", HANGS_ON, SIZES).units == UNITS
    assert capsys.readouterr().err == f"base: answers reused from {file}\n"
    assert file.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 5, 40], ids=["its line's end", "a bracket", "most of a line"])
def test_a_line_that_was_cut_off_is_answered_again(cut, file, capsys):
    before = file.read_bytes()
    file.write_bytes(before[:-cut])
    kept = KeptAnswers(file, "base", HANGS_ON, SIZES)
    assert kept.units == UNITS[: 2 if cut == 1 else 1]
    assert ("1 of 3 are still" in capsys.readouterr().err) == (cut > 1)
    for unit in UNITS[len(kept.units) :]:
        kept.add(unit)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model": "abd"}, "model changed since"),
        ({"adapter": "x", "settings": {"max_tokens": 5}}, "adapter, settings changed since"),
        ({"new": 1}, "new changed since"),
    ],
)
def test_whatever_changed_the_answers_are_not_reused_and_a_line_says_why(change, says, file, capsys):
    kept = KeptAnswers(file, "base", {**HANGS_ON, **change}, SIZES)
    assert kept.units == [] and file.read_text().count("\n") == 1
    assert capsys.readouterr().err == f"base: answered anew, not from {file}: {says}\n"


DAMAGE = {
    "no JSON": "{",
    "a list": "[]",
    "another unit": '{"ids": [[1]], "probabilities": [0.5], "surprises": [0.5]}',
    "a probability short": '{"ids": [[1], [2]], "probabilities": [0.5], "surprises": [0.5, 0.5]}',
    "a surprise short": '{"ids": [[1], [2]], "probabilities": [0.5, 0.5], "surprises": [0.5]}',
    "a text for a token": '{"ids": [["a"], []], "probabilities": [0.5, null], "surprises": [0.5, null]}',
    "a text for a probability": '{"ids": [[1], []], "probabilities": ["0.5", null], "surprises": [0.5, null]}',
    "a text for a surprise": '{"ids": [[1], []], "probabilities": [0.5, null], "surprises": ["0.5", null]}',
    "no number": '{"ids": [[1], []], "probabilities": [NaN, null], "surprises": [0.5, null]}',
    "no number of surprise": '{"ids": [[1], []], "probabilities": [0.5, null], "surprises": [NaN, null]}',
    "no lists": '{"ids": 1, "probabilities": 2, "surprises": 3}',
    "of an earlier program": '{"ids": [[1], []], "probabilities": [0.5, null]}',
    "another key": '{"ids": [[1], []], "probabilities": [0.5, null], "surprises": [0.5, null], "more": 1}',
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_stands_behind_a_damaged_line_is_not_reused(case, file):
    header, first, second = file.read_text().splitlines()
    marked = f'{{"mark": "{json.loads(first)["mark"]}", '  # or the damage would not be what it is refused for
    damaged = DAMAGE[case].replace("{", marked, 1) if DAMAGE[case].startswith('{"') else DAMAGE[case]
    file.write_text("\n".join([header, damaged, second]) + "\n")
    assert KeptAnswers(file, "base", HANGS_ON, SIZES).units == []
    assert file.read_text() == header + "\n"


def test_a_line_in_the_wrong_place_is_answered_again_though_it_fits_by_its_size(tmp_path):
    """Two evaluations that wrote into one file, as they could before --out was locked: A's lines among B's."""
    file = tmp_path / "base.jsonl"
    first = KeptAnswers(file, "base", HANGS_ON, [1, 1])
    second = KeptAnswers(file, "base", HANGS_ON, [1, 1])
    units = [Unit([[1]], [0.5], [0.5]), Unit([[2]], [0.25], [0.25])]
    for kept in (first, second):
        kept.add(units[0])
    assert KeptAnswers(file, "base", HANGS_ON, [1, 1]).units == units[:1]
    KeptAnswers(file, "base", {**HANGS_ON, "model": "abd"}, [1, 1])
    second.add(units[1])
    assert KeptAnswers(file, "base", {**HANGS_ON, "model": "abd"}, [1, 1]).units == []


def test_lines_of_an_earlier_program_have_no_mark_and_are_not_reused(file):
    header, *lines = file.read_text().splitlines()
    bare = [json.dumps({key: part for key, part in json.loads(line).items() if key != "mark"}) for line in lines]
    file.write_text("\n".join([header, *bare]) + "\n")
    assert KeptAnswers(file, "base", HANGS_ON, SIZES).units == []


@pytest.mark.parametrize("first", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_first_line_spoils_all(first, file, capsys):
    file.write_bytes(first + b"\n" + file.read_bytes().split(b"\n", 1)[1])
    assert KeptAnswers(file, "base", HANGS_ON, SIZES).units == []
    assert "first line is damaged" in capsys.readouterr().err


# --- in a whole evaluation ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def settings(model, tmp_path):
    forget = write_questions(tmp_path / "f.jsonl", [f"Who is {'very ' * i}old?" for i in range(6)])
    (tmp_path / "c.yaml").write_text("system: Say nothing.\n")
    (tmp_path / "p.txt").write_text("Tell me:\nGo on.\n")
    return ev.EvaluateSettings(
        model=str(model),
        forget=(str(forget),),
        context=str(tmp_path / "c.yaml"),
        reverse_prompts=str(tmp_path / "p.txt"),
        max_tokens=4,
        batch_size=2,  # parts of four questions
        overwrite=True,
        out=str(tmp_path / "out"),
    )


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Nine tenths of the time of so small an evaluation."""
    monkeypatch.setattr("duet_mlx.result_files.picture", lambda *args: None)


def written(settings):
    ev.evaluate(settings)
    return contents(ev.Path(settings.out))


def test_a_second_evaluation_reuses_every_answer_and_writes_the_same_bytes(settings, capsys, monkeypatch):
    first = written(settings)
    capsys.readouterr()
    for name in ("decode", "forced"):
        monkeypatch.setattr(answers, name, lambda *args: pytest.fail("asked again"))
    assert written(settings) == first
    said = capsys.readouterr().err
    assert "base: answers reused from" in said and "base + context: answers reused from" in said


@pytest.mark.parametrize("calls", [1, 3, 7])
def test_an_evaluation_that_was_cut_off_goes_on_and_writes_the_bytes_of_one_that_was_not(
    calls, settings, tmp_path, monkeypatch, capsys
):
    decode, count = answers.decode, []

    def interrupted(*args):
        count.append(1)
        if len(count) > calls:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(answers, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt, match="answers so far are kept in .*answers; the same command goes on"):
        ev.evaluate(settings)
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(answers, "decode", decode)
    capsys.readouterr()
    resumed = written(settings)
    assert "are still to be answered" in capsys.readouterr().err
    (tmp_path / "out").rename(tmp_path / "before")
    assert written(settings) == resumed


CHANGES = {
    "questions": ("f.jsonl", '{"question": "Who is new?"}\n{"question": "And who is not?"}\n'),
    "context": ("c.yaml", "system: Say little.\n"),
    "prompts": ("p.txt", "Tell me:\nGo on, please.\n"),
}


@pytest.mark.parametrize("what", [*CHANGES, "system", "settings", "model", "code", "tokenizer"])
def test_answers_are_never_stale(what, settings, model, tmp_path, monkeypatch, capsys):
    """Whatever of it changes, the results are those of a fresh evaluation of what is there now."""
    from dataclasses import replace

    written(settings)
    if what in CHANGES:
        (tmp_path / CHANGES[what][0]).write_text(CHANGES[what][1])
    elif what == "system":
        settings = replace(settings, system="Be brief.")
    elif what == "settings":
        settings = replace(settings, max_tokens=5)
    elif what == "model":
        settings = replace(settings, model=str(tiny_model(tmp_path / "other", seed=3)))
    elif what == "code":
        monkeypatch.setattr("duet_mlx.evaluate.code_hash", lambda: "another")
    else:
        import shutil

        other = shutil.copytree(model, tmp_path / "other")
        config = json.loads((other / "tokenizer_config.json").read_text())
        (other / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
        settings = replace(settings, model=str(other))
    capsys.readouterr()
    second = written(settings)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("base + context: answered anew")]
    assert len(said) == 1 and what in said[0].partition("base_context.jsonl: ")[2]
    (tmp_path / "out").rename(tmp_path / "before")
    assert written(settings) == second
