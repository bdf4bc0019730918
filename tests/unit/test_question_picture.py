"""Student against teacher, question by question: which are compared, and what the picture says."""

import warnings

import pytest

from duet_mlx.errors import TrainingError
from duet_mlx.question_picture import NAMED, Pair, pairs_of, question_picture
from tests.small_disk import small_disk

MODELS = ("base", "base + context", "unlearned")


def samples_of(scores, group="forget", metric="recall", models=MODELS):
    """Lines of samples.jsonl: of each question the figures of teacher and student; the base's is 1."""
    return [
        {"id": f"q{i}", "group": group, "question": f"Who is {i}?", "model": model, "answer": "x", metric: value}
        for i, both in enumerate(scores)
        for model, value in zip(MODELS, (1.0, *both), strict=True)
        if model in models
    ]


def test_held_out_questions_alone_are_compared_where_there_are_any():
    samples = samples_of([(0.25, 0.75), (0.5, 0.0)])
    for group in ("forget, trained on", "forget, reverse 1", "forget, worst reverse", "general"):
        samples += samples_of([(0.0, 1.0)], group=group)
    samples += samples_of([(0.0, 1.0)], group="forget, tofu:x", metric="rouge_recall")
    assert pairs_of(samples) == ("recall", [Pair("Who is 0?", 0.25, 0.75), Pair("Who is 1?", 0.5, 0.0)])
    assert [pair.shortfall for pair in pairs_of(samples)[1]] == [0.5, -0.5]


def test_a_benchmarks_forget_questions_are_compared_by_its_own_measure_as_a_share():
    samples = samples_of([(20.0, 50.0)], group="forget, muse:News knowmem", metric="knowmem")
    samples += samples_of([(0.0, 1.0)], group="retain, muse:News knowmem", metric="knowmem")
    assert pairs_of(samples) == ("knowmem", [Pair("Who is 0?", 0.2, 0.5)])


@pytest.mark.parametrize("models", [("base",), ("base", "unlearned"), ("base", "base + context")])
def test_without_teacher_or_student_there_is_no_picture(models, tmp_path):
    assert not question_picture(samples_of([(0.0, 1.0)], models=models), tmp_path / "q.png")
    assert not question_picture(samples_of([(None, 1.0)]), tmp_path / "q.png")
    assert not list(tmp_path.iterdir())


def test_the_picture_counts_who_falls_short_and_names_the_furthest_first(tmp_path):
    short = [(0.1, 0.3 + 0.01 * i) for i in range(NAMED + 1)]
    samples = samples_of([(0.5, 0.5), (0.5, 0.2), *short])
    assert question_picture(samples, tmp_path / "q.svg")
    svg = (tmp_path / "q.svg").read_text()  # matplotlib notes each text beside its curves
    assert f"says more than its teacher on {NAMED + 1} of {NAMED + 3} forget questions" in svg
    assert "as much on 1, less on 1" in svg
    places = [svg.index(f"<!-- Who is {i}? -->") for i in range(3, NAMED + 3)]
    assert places == sorted(places)  # written from the bottom up: the furthest at the top
    for not_named in (0, 1, 2):
        assert f"<!-- Who is {not_named}? -->" not in svg


def test_where_nobody_falls_short_nobody_is_named(tmp_path):
    assert question_picture(samples_of([(0.5, 0.5), (0.5, 0.0)]), tmp_path / "q.svg")
    svg = (tmp_path / "q.svg").read_text()
    assert "on 0 of 2 forget questions" in svg and "furthest" not in svg and "Who is" not in svg


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_figures_give_the_same_bytes_and_no_warning_whatever_the_script(kind, tmp_path):
    samples = samples_of([(0.0, 1.0), (0.2, 0.1)])
    for sample in samples:
        sample["question"] = f"$x^$ _{{ 平和 \n {sample['question']} " + "long " * 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("one", "two"):
            question_picture(samples, tmp_path / f"{name}.{kind}")
    assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()


def test_where_the_disk_is_full_the_file_is_named_and_nothing_half_written_stays(tmp_path):
    with small_disk(1000), pytest.raises(TrainingError, match=r"questions\.png: cannot be written"):
        question_picture(samples_of([(0.0, 1.0)]), tmp_path / "questions.png")
    assert not list(tmp_path.iterdir())
