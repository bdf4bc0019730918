"""Targets on the disk: their manifest, shards, and what is in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save

from duet_mlx.context import Context, render
from duet_mlx.data import Query
from duet_mlx.errors import TrainingError
from duet_mlx.kept_targets import load_targets, manifest, save_targets, saved_or_built
from duet_mlx.stream import Stream
from duet_mlx.teacher import Targets, teacher_targets
from tests.equivalence.tiny import llama
from tests.small_disk import small_disk
from tests.unit.test_teacher import CONTEXTS, QUERIES, SETTINGS, TOKENIZER, build


def described(**changes):
    arguments = {"model": llama(), "queries": QUERIES, "contexts": CONTEXTS, "settings": SETTINGS, **changes}
    return manifest(arguments.pop("model"), TOKENIZER, **arguments)


def equal(one, other):
    return all(
        np.array_equal(a, b) and getattr(a, "dtype", None) == getattr(b, "dtype", None)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("n", [1, 3])
def test_targets_come_back_from_disk_as_they_were(tmp_path, n):
    targets = build(settings=replace(SETTINGS, positions=n))
    path = tmp_path / "deep" / "targets.safetensors"
    save_targets(path, [targets], 2, {"model": "a"})
    loaded = load_targets(path, {"model": "a"})
    assert isinstance(loaded, Targets) and equal(loaded, targets)
    assert [p.name for p in path.parent.iterdir()] == ["targets.safetensors"]


def test_targets_of_a_float64_model_keep_their_digits(tmp_path):
    targets = build()._replace(logits=np.random.default_rng(0).normal(size=(2, 3, 8)))
    save_targets(tmp_path / "targets.safetensors", [targets], 2, {})
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
    save_targets(path, [build()], 2, described())
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
        save_targets(tmp_path / "targets.safetensors", [build()], 2, {})


MANY = [Query(f"q{i}", "Where is the house? " * (1 + i % 3), "forget" if i % 2 else "retain") for i in range(7)]


@pytest.mark.parametrize("candidates", ["union", "teacher"])
@pytest.mark.parametrize("positions", [1, 3])
def test_the_file_of_many_shards_is_the_librarys_file_of_all_rows(tmp_path, candidates, positions):
    settings = replace(SETTINGS, candidates=candidates, positions=positions)
    rows = [build(queries=[query], settings=settings) for query in MANY]
    save_targets(tmp_path / "targets.safetensors", rows, 7, {"model": "ä"})
    whole = {name: np.concatenate([getattr(row, name) for row in rows]) for name in Targets._fields[:5]}
    expected = save({name: array for name, array in whole.items() if array.size}, {"manifest": '{"model": "\\u00e4"}'})
    assert (tmp_path / "targets.safetensors").read_bytes() == expected


def test_batches_of_targets_that_were_built_in_shards_are_those_of_targets_in_memory(tmp_path):
    """To the last byte but in the logits, which a prompt's companions may round another way."""
    given = (llama(), TOKENIZER, MANY, CONTEXTS, SETTINGS, None)
    sharded, _ = saved_or_built(tmp_path / "targets.safetensors", *given, size=3)
    reused, _ = saved_or_built(tmp_path / "targets.safetensors", *given, size=3)
    prompts = [render(TOKENIZER, query.question) for query in MANY]
    rows = np.array([5, 1, 0, 2])
    batches = [Stream(prompts, t, 0, [1, 3, 5]).batch(rows) for t in (sharded, reused, teacher_targets(*given))]
    for name, one, two, together in zip(batches[0]._fields, *batches, strict=True):
        assert np.array_equal(one, two), name
        if name == "logits":
            np.testing.assert_allclose(one, together, atol=1e-5)
        else:
            assert np.array_equal(one, together), name


def test_what_is_in_memory_hangs_on_the_shard_and_the_batch_and_not_on_the_number_of_queries(tmp_path):
    def shards(count: int) -> Iterator[Targets]:
        ones = np.ones((100, 8, 50))
        for _ in range(count):
            yield Targets(
                ones.astype(np.int32), ones.astype(np.float32), ones > 0, ones[..., 0] > 0, np.ones((100, 7), np.int32)
            )

    peaks = []
    for count in (4, 40):
        path = tmp_path / f"{count}.safetensors"
        tracemalloc.start()
        save_targets(path, shards(count), 100 * count, {})
        targets = load_targets(path, {})
        assert targets.ids[np.array([7, 100 * count - 1])].all() and len(targets.ids) == 100 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < path.stat().st_size / 2


def test_a_disk_that_fills_up_between_two_shards_leaves_what_was_there(tmp_path):
    path = tmp_path / "targets.safetensors"
    save_targets(path, [build()], 2, described())
    before = path.read_bytes()
    with small_disk(2000), pytest.raises(TrainingError, match="targets.safetensors: cannot be written"):
        save_targets(path, [build()] * 20, 40, described())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_error_of_the_teacher_is_not_laid_upon_the_disk(tmp_path):
    def shards() -> Iterator[Targets]:
        yield build()
        raise RuntimeError("no memory left")

    with pytest.raises(RuntimeError, match="no memory left"):
        save_targets(tmp_path / "targets.safetensors", shards(), 4, {})
    assert not list(tmp_path.iterdir())
