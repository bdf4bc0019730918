"""Batches of training queries, backend against reference: tokens, supervised positions, padding."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from duet_mlx import generate
from duet_mlx.stream import WIDTHS, WINDOW, Stream
from duet_mlx.teacher import Targets
from duet_mlx.train import TrainSettings
from reference import context as ref


@st.composite
def supervised_queries(draw: Any) -> tuple[list[list[int]], list[list[int]], int, Targets]:
    """Prompts with a common start, continuations of 0 to n-1 tokens, n, and targets [N, n, C] that go with them."""
    tokens = st.integers(1, 9)
    start = draw(st.lists(tokens, max_size=3))
    count, n, width = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    prompts = [start + draw(st.lists(tokens, min_size=1, max_size=9)) for _ in range(count)]
    words = [draw(st.lists(tokens, max_size=n - 1)) for _ in range(count)]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    position_mask = ref.supervise(prompts, words, n)[2]
    targets = Targets(
        rng.integers(0, 9, size=(count, n, width)),
        rng.normal(size=(count, n, width)).astype(np.float32),
        rng.random((count, n, width)) < 0.8,
        position_mask,
        ref.pad(words, n - 1),
    )
    return prompts, words, n, targets


@given(case=supervised_queries(), data=st.data())
def test_tokens_and_positions_of_a_batch_are_the_references(case: Any, data: Any) -> None:
    prompts, words, n, targets = case
    prefix = data.draw(st.integers(0, generate.common_prefix(prompts)), label="prefix")
    rows = np.array(data.draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=6), label="rows"))
    stream = Stream(prompts, targets, prefix)
    stream.multiple = data.draw(st.sampled_from([1, WIDTHS]), label="multiple")  # as on a CPU, as on a GPU
    batch = stream.batch(rows)
    suffixes = [prompts[row][prefix:] for row in rows]
    tokens, positions, position_mask = ref.supervise(suffixes, [words[row] for row in rows], n)
    got = np.array(batch.tokens)
    assert got.shape[1] % stream.multiple == 0 and got.shape[1] < tokens.shape[1] + stream.multiple
    np.testing.assert_array_equal(got[:, : tokens.shape[1]], tokens)
    assert not got[:, tokens.shape[1] :].any()
    np.testing.assert_array_equal(np.array(batch.positions), positions)
    np.testing.assert_array_equal(np.array(batch.position_mask), position_mask)
    for name in ("ids", "logits", "candidate_mask"):
        np.testing.assert_array_equal(np.array(getattr(batch, name)), getattr(targets, name)[rows], err_msg=name)


@given(
    rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5), more=st.integers(0, 3)
)
def test_padding_is_the_references(rows: list[list[int]], more: int) -> None:
    width = max(map(len, rows)) + more
    np.testing.assert_array_equal(np.array(generate.pad(rows, width)), ref.pad(rows, width))
    np.testing.assert_array_equal(np.array(generate.pad(rows)), ref.pad(rows))


@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_the_common_prefix_is_the_references_less_a_token_that_each_must_keep(rows: list[list[int]]) -> None:
    assert generate.common_prefix(rows) == min(ref.shared_prefix(rows), min(map(len, rows)) - 1)


@given(
    forget=st.integers(1, 12), kept=st.integers(1, 12), size=st.integers(2, 6), data=st.data(), seed=st.integers(0, 9)
)
def test_every_query_comes_once_an_epoch_and_the_same_seed_gives_the_same_batches(
    forget: int, kept: int, size: int, data: Any, seed: int
) -> None:
    share = data.draw(st.integers(1, size - 1))
    prompts = [[1] * (1 + i % 7) for i in range(forget + kept)]
    ones = np.ones((len(prompts), 1, 1))
    targets = Targets(ones, ones, ones > 0, ones[..., 0] > 0, np.zeros((len(prompts), 0), dtype=int))
    stream = Stream(prompts, targets, 0)
    roles = np.arange(forget), forget + np.arange(kept)
    # Only whole windows draw every query as often as any other.
    window = max(1, min(WINDOW, forget // share, kept // (size - share)))
    settings = TrainSettings(iters=32 * window, batch_size=size, forget_per_batch=share, seed=seed)
    steps = stream.schedule(*roles, settings)
    assert len(steps) == settings.iters
    assert all((np.isin(rows, roles[0]) == [True] * share + [False] * (size - share)).all() for rows in steps)
    for role, each in zip(roles, (share, size - share), strict=True):
        drawn = np.concatenate([rows[np.isin(rows, role)] for rows in steps])
        assert len(drawn) == settings.iters * each
        times = np.bincount(drawn, minlength=len(prompts))[role]
        assert times.max() - times.min() <= 1
    again = stream.schedule(*roles, settings)
    assert all((a == b).all() for a, b in zip(steps, again, strict=True))


def test_another_seed_gives_other_batches() -> None:
    ones = np.ones((24, 1, 1))
    targets = Targets(ones, ones, ones > 0, ones[..., 0] > 0, np.zeros((24, 0), dtype=int))
    stream = Stream([[1]] * 24, targets, 0)
    orders = [
        np.concatenate(stream.schedule(np.arange(12), np.arange(12, 24), TrainSettings(iters=16, seed=seed))).tolist()
        for seed in range(4)
    ]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])


def mixed_stream(forget: int, kept: int) -> tuple[Stream, tuple[np.ndarray, np.ndarray]]:
    """A stream of questions of 5 to 60 tokens, most of them short, and the rows of both roles."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(5 + rng.geometric(0.08, size=forget + kept), 60)
    ones = np.ones((len(lengths), 1, 1))
    targets = Targets(ones, ones, ones > 0, ones[..., 0] > 0, np.zeros((len(lengths), 0), dtype=int))
    return Stream([[1] * length for length in lengths], targets, 0), (np.arange(forget), forget + np.arange(kept))


def test_batches_of_like_lengths_waste_less_than_a_third_of_what_chance_would() -> None:
    stream, roles = mixed_stream(300, 900)
    stream.multiple = 1

    def wasted(steps: list[np.ndarray]) -> float:
        return 1 - sum(stream.lengths[rows].sum() / (stream.width(rows) * len(rows)) for rows in steps) / len(steps)

    rng = np.random.default_rng(1)
    by_chance = [np.concatenate([rng.choice(roles[0], 2), rng.choice(roles[1], 6)]) for _ in range(300)]
    assert wasted(stream.schedule(*roles, TrainSettings(iters=300))) < wasted(by_chance) / 3


def test_a_small_set_gives_no_batch_of_one_query_twice_where_an_epoch_is_one_window() -> None:
    stream, roles = mixed_stream(12, 36)
    assert all(len(set(rows)) == 8 for rows in stream.schedule(*roles, TrainSettings(iters=60)))


def test_after_the_first_epoch_no_batch_has_a_new_shape() -> None:
    stream, roles = mixed_stream(60, 100)  # an epoch is 30 steps for one role, and for the other 17
    stream.multiple = WIDTHS
    for seed in range(5):
        steps = stream.schedule(*roles, TrainSettings(iters=300, seed=seed))
        shapes = [stream.batch(rows).tokens.shape for rows in steps]
        assert set(shapes[32:]) <= set(shapes[:32])  # two windows of 16 steps
        assert all(width >= stream.lengths[rows].max() for (_, width), rows in zip(shapes, steps, strict=True))
