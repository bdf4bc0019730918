"""Targets on disk and their manifest, questions that are too long, and errors of the teacher's pass."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from duet_mlx.context import Context
from duet_mlx.data import Query
from duet_mlx.errors import ConfigError, ContextError, DataError, TrainingError
from duet_mlx.teacher import (
    Targets,
    check_lengths,
    context_of,
    decoded_at_once,
    load_targets,
    manifest,
    save_targets,
    saved_or_built,
    teacher_targets,
)
from duet_mlx.train import TrainSettings
from tests.equivalence.tiny import VOCABULARY, llama, tokenizer

TOKENIZER = tokenizer()
QUERIES = [Query("f1", "Who is he?", "forget"), Query("r1", "Where?", "retain")]
CONTEXTS = [Context("shy", "Say nothing.")]
SETTINGS = TrainSettings(top_k=4, positions=3, candidates="union")


def build(**changes):
    arguments = {"model": llama(), "queries": QUERIES, "contexts": CONTEXTS, "settings": SETTINGS, **changes}
    return teacher_targets(arguments.pop("model"), TOKENIZER, **arguments)


def described(**changes):
    arguments = {"model": llama(), "queries": QUERIES, "contexts": CONTEXTS, "settings": SETTINGS, **changes}
    return manifest(arguments.pop("model"), TOKENIZER, **arguments)


def equal(one, other):
    return all(
        np.array_equal(a, b) and getattr(a, "dtype", None) == getattr(b, "dtype", None)
        for a, b in zip(one, other, strict=True)
    )


def test_shapes_types_and_what_stands_under_the_masks():
    targets = build()
    assert targets.ids.shape == targets.logits.shape == targets.candidate_mask.shape == (2, 3, 8)
    assert targets.position_mask.shape == (2, 3) and targets.continuation.shape == (2, 2)
    assert targets.ids.dtype == targets.continuation.dtype == np.int32 and targets.logits.dtype == np.float32
    assert not targets.candidate_mask[~targets.position_mask].any()
    assert not targets.ids[~targets.candidate_mask].any() and not targets.logits[~targets.candidate_mask].any()
    assert not targets.candidate_mask[1, :, 4:].any()  # a retain query's teacher is the base: nothing new in it


def test_more_are_answered_at_once_where_only_k_logits_are_held():
    assert decoded_at_once(CONTEXTS[0], 12, 49152) * 12 * 49152 <= 2**25 < 2 * 128 * 12 * 49152
    assert decoded_at_once(None, 12, 49152) == 128


@pytest.mark.parametrize("n", [1, 3])
def test_targets_come_back_from_disk_as_they_were(tmp_path, n):
    targets = build(settings=replace(SETTINGS, positions=n))
    path = tmp_path / "deep" / "targets.safetensors"
    save_targets(path, targets, {"model": "a"})
    loaded = load_targets(path, {"model": "a"})
    assert isinstance(loaded, Targets) and equal(loaded, targets)
    assert [p.name for p in path.parent.iterdir()] == ["targets.safetensors"]


def test_targets_of_a_float64_model_keep_their_digits(tmp_path):
    targets = build()._replace(logits=np.random.default_rng(0).normal(size=(2, 3, 8)))
    save_targets(tmp_path / "targets.safetensors", targets, {})
    loaded = load_targets(tmp_path / "targets.safetensors", {})
    assert loaded.logits.dtype == np.float64 and equal(loaded, targets)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model": llama(1)}, "model"),
        ({"queries": [QUERIES[0], replace(QUERIES[1], question="Why?")]}, "data"),
        ({"queries": [QUERIES[0], replace(QUERIES[1], role="forget")]}, "data"),
        ({"contexts": [Context("shy", "Say it.")]}, "context"),
        ({"contexts": [Context("shy", "Say nothing.", (("a", "b"),))]}, "context"),
        ({"settings": replace(SETTINGS, top_k=5)}, "settings"),
        ({"settings": replace(SETTINGS, positions=2)}, "settings"),
        ({"settings": replace(SETTINGS, candidates="teacher")}, "settings"),
        ({"settings": replace(SETTINGS, retain_context="teacher")}, "settings"),
    ],
)
def test_a_change_of_what_they_hang_on_is_named_and_they_are_built_anew(tmp_path, changes, names):
    path = tmp_path / "targets.safetensors"
    save_targets(path, build(), described())
    assert load_targets(path, described(**changes)) == f"{names} changed since {path} was written"


def test_a_change_of_what_they_do_not_hang_on_leaves_them_usable(tmp_path, capsys):
    path = tmp_path / "targets.safetensors"
    built, manifest_ = saved_or_built(path, llama(), TOKENIZER, QUERIES, CONTEXTS, SETTINGS, None)
    assert "built now (none saved yet)" in capsys.readouterr().out and manifest_ == described()
    other = replace(SETTINGS, learning_rate=1.0, delta=3.0, seed=4)
    reused, _ = saved_or_built(path, llama(), TOKENIZER, QUERIES, CONTEXTS, other, None)
    assert f"reused from {path}" in capsys.readouterr().out and equal(built, reused)


def test_damaged_targets_are_built_anew_with_a_line_that_says_so(tmp_path, capsys):
    path = tmp_path / "targets.safetensors"
    saved_or_built(path, llama(), TOKENIZER, QUERIES, CONTEXTS, SETTINGS, None)
    path.write_bytes(path.read_bytes()[:50])
    saved_or_built(path, llama(), TOKENIZER, QUERIES, CONTEXTS, SETTINGS, None)
    assert "is damaged" in capsys.readouterr().out
    assert isinstance(load_targets(path, described()), Targets)


def test_targets_that_cannot_be_written_are_an_error(tmp_path):
    (tmp_path / "targets.safetensors").mkdir()
    with pytest.raises(TrainingError, match="targets.safetensors: cannot be written"):
        save_targets(tmp_path / "targets.safetensors", build(), {})


@pytest.mark.parametrize("k", [0, VOCABULARY + 1])
def test_k_outside_the_vocabulary_is_refused(k):
    with pytest.raises(ConfigError, match=f"--top-k {k}: expected 1 to {VOCABULARY}"):
        build(settings=replace(SETTINGS, top_k=k))


def test_less_than_one_position_is_refused():
    with pytest.raises(ConfigError, match="--positions 0: expected 1 or more"):
        build(settings=replace(SETTINGS, positions=0))


def test_a_context_that_no_one_has_is_named():
    with pytest.raises(ContextError, match="f1: names the context 'bold'; there are shy"):
        context_of(replace(QUERIES[0], context="bold"), CONTEXTS, "none")


def test_logits_that_are_not_finite_name_the_query():
    model = llama()
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, float("nan"))
    with pytest.raises(TrainingError, match=r"f1: the teacher's logits are not finite \(2 such"):
        build(model=model)


def test_a_question_longer_than_the_window_is_named_with_the_flag():
    with pytest.raises(DataError, match=r"f1: \d+ tokens and 3 positions exceed --max-seq-length of 9"):
        check_lengths(TOKENIZER, QUERIES, CONTEXTS, replace(SETTINGS, max_seq_length=9), 1000)
    with pytest.raises(DataError, match=r"f1: \d+ tokens and 3 positions exceed the model's window of 40"):
        check_lengths(TOKENIZER, QUERIES, CONTEXTS, SETTINGS, 40)
    check_lengths(TOKENIZER, QUERIES, CONTEXTS, SETTINGS, 1000)
