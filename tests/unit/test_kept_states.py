"""What comes out of the layers that are not trained: what is read is what was written, and no file is left."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from duet_mlx.errors import TrainingError
from duet_mlx.generate import batches, pad
from duet_mlx.kept_states import KeptStates
from duet_mlx.lower import hidden_at, hidden_states
from tests.equivalence.tiny import llama
from tests.small_disk import small_disk

LENGTHS = [3, 1, 5, 2]
RANDOM = np.random.default_rng(0)
SEQUENCES = [RANDOM.integers(1, 9, size=size).tolist() for size in RANDOM.integers(1, 12, size=70)]


@pytest.mark.parametrize("kind", [mx.float16, mx.bfloat16, mx.float32, mx.float64], ids=str)
def test_states_come_back_as_they_were_to_the_bit(kind, tmp_path):
    """Any bits, those of numbers that are none included; written in two batches, of which one is padded with noise."""
    with mx.stream(mx.cpu):
        bits = mx.array(np.random.default_rng(0).integers(0, 256, size=(4, 5, 3 * kind.size), dtype=np.uint8))
        hidden = bits.view(kind)
        states = KeptStates(tmp_path, LENGTHS, hidden)
        states.write([2, 0], hidden[:2])
        states.write([3, 1], hidden[2:])
        read = states.batch([0, 1, 2, 3], 6)
        assert read.dtype == kind and read.shape == (4, 6, 3)
        expected = np.zeros((4, 6, 3 * kind.size), dtype=np.uint8)
        for row, place in enumerate([1, 3, 0, 2]):
            expected[row, : LENGTHS[row]] = np.array(bits)[place, : LENGTHS[row]]
        assert np.array_equal(np.array(read.view(mx.uint8)), expected)


def test_states_that_nobody_has_written_are_zeros(tmp_path):
    """What the exchange between processes adds to what one of them has run."""
    states = KeptStates(tmp_path, LENGTHS, mx.zeros((1, 2)))
    states.write([1], mx.ones((1, 1, 2)))
    assert mx.array_equal(states.batch([0, 1], 3), mx.pad(mx.ones((1, 1, 2)), ((1, 0), (0, 2), (0, 0))))


def test_a_batch_from_the_disk_is_what_the_layers_below_give(tmp_path):
    model = llama()
    lower, states = hidden_states(model, 1, [], SEQUENCES, folder=tmp_path)
    assert lower.prefix is None
    for rows in batches([len(one) for one in SEQUENCES], 32, equal=False):
        expected = hidden_at(model, 1, pad([SEQUENCES[row] for row in rows]))
        inside = np.arange(expected.shape[1]) < states.lengths[rows][:, None]
        got = states.batch(rows, expected.shape[1])
        assert mx.array_equal(got, mx.where(mx.array(inside)[..., None], expected, 0))


def test_the_states_are_not_in_memory_and_their_file_goes_with_them(tmp_path):
    model = llama(hidden_size=256)
    mx.eval(model.parameters())
    gc.collect()
    before = mx.get_active_memory()
    _, states = hidden_states(model, 1, [], SEQUENCES * 5, folder=tmp_path)
    assert mx.get_active_memory() - before < states.nbytes / 10
    assert os.fstat(states.file.fileno()).st_size == states.nbytes == states.lengths.sum() * 256 * 4
    assert not list(tmp_path.iterdir())  # without a name from the beginning: a kill leaves nothing either
    handle = states.file.fileno()
    del states
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


@pytest.mark.parametrize("reserved", [True, False], ids=["before the work", "while writing, on a Mac"])
def test_a_disk_without_room_is_an_error_that_says_how_much_is_wanted(reserved, tmp_path, monkeypatch):
    if not reserved:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    ran = []
    said = rf"{tmp_path}: .* cannot be written there, 5.58e-05 GB \(File too large\); .*--num-layers -1"
    with small_disk(2000), pytest.raises(TrainingError, match=said):
        hidden_states(llama(), 1, [], SEQUENCES, ran.append, Path(tmp_path))
    assert not list(tmp_path.iterdir())
    assert bool(ran) != (reserved and hasattr(os, "posix_fallocate"))
