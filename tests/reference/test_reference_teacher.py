"""Targets: top-K with its tie rule, the union, masks, the greedy continuation, the choice of the context."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reference import teacher as ref
from reference.context import Context, Query

V = 7
# Few values, so that most draws hold ties; -0 ties with 0.
logits = hnp.arrays(np.float64, (2, 3, V), elements=st.sampled_from([-1e4, -1.0, -0.0, 0.0, 1.0, 1e4]))


@given(logits, st.integers(1, V))
@example(np.zeros((2, 3, V)), 3)
def test_topk_is_what_a_person_would_pick_with_ties_to_the_lower_id(values, k) -> None:
    ids, chosen = ref.topk(values, k)
    for place in np.ndindex(2, 3):
        row = values[place]
        assert ids[place].tolist() == sorted(range(V), key=lambda i: (-row[i], i))[:k]
        assert chosen[place].tolist() == row[ids[place]].tolist()


@given(logits, logits, st.integers(1, V))
def test_union_holds_the_teachers_top_first_then_what_is_new_ascending(teacher, base, k) -> None:
    ids, values, mask = ref.candidates(teacher, base, k, "union")
    assert ids.shape == values.shape == mask.shape == (2, 3, 2 * k)
    top, base_top = ref.topk(teacher, k)[0], ref.topk(base, k)[0]
    for place in np.ndindex(2, 3):
        new = ids[place][k:][mask[place][k:]].tolist()
        assert mask[place][:k].all() and ids[place][:k].tolist() == top[place].tolist()
        assert new == sorted(new) and not set(new) & set(top[place].tolist())
        assert set(new) | set(top[place].tolist()) == set(base_top[place].tolist()) | set(top[place].tolist())
        valid = mask[place]
        assert values[place][valid].tolist() == teacher[place][ids[place][valid]].tolist()
    assert (ids[~mask] == 0).all() and (values[~mask] == 0).all()


@given(logits, st.integers(1, V))
def test_a_teacher_that_is_the_base_adds_no_candidates(teacher, k) -> None:
    ids, values, mask = ref.candidates(teacher, teacher, k, "union")
    plain = ref.candidates(teacher, teacher, k, "teacher")
    assert not mask[..., k:].any()
    for part, expected in zip((ids, values, mask), plain, strict=True):
        np.testing.assert_array_equal(part[..., :k], expected)


def test_an_unknown_kind_of_candidates_is_refused() -> None:
    with pytest.raises(ValueError, match="expected teacher or union"):
        ref.candidates(np.zeros(V), np.zeros(V), 2, "all")


@given(logits, logits, st.sampled_from(["teacher", "union"]))
def test_nothing_under_a_mask_depends_on_the_logits_there(teacher, base, mode) -> None:
    continuations = [[4], [2, 0]]
    clean = ref.targets(teacher, base, continuations, 3, mode)
    teacher, base = teacher.copy(), base.copy()
    teacher[0, 2], base[0, 2] = np.arange(V), -np.arange(V)
    for name, part in ref.targets(teacher, base, continuations, 3, mode)._asdict().items():
        np.testing.assert_array_equal(part, getattr(clean, name))
    np.testing.assert_array_equal(clean.position_mask, [[True, True, False], [True, True, True]])
    np.testing.assert_array_equal(clean.continuation, [[4, 0], [2, 0]])
    for part in (clean.ids, clean.logits, clean.candidate_mask):
        assert not part[0, 2].any()


def test_one_position_has_no_continuation() -> None:
    assert ref.targets(np.eye(2)[:, None], np.eye(2)[:, None], [[], []], 1, "teacher").continuation.shape == (
        2,
        0,
    )


def test_greedy_stops_before_the_end_of_turn_or_after_the_last_token_asked_for() -> None:
    def count_up(ids: list[int]) -> np.ndarray:
        return np.eye(V)[(ids[-1] + 1) % V]

    assert ref.greedy(count_up, [0, 1], 9, stop=[5]) == [2, 3, 4]
    assert ref.greedy(count_up, [0, 1], 2, stop=[5]) == [2, 3]
    assert ref.greedy(count_up, [0, 4], 9, stop=[5]) == []
    assert ref.greedy(count_up, [1], 0) == []
    assert ref.greedy(lambda ids: np.zeros(V), [1], 2) == [0, 0]  # of equals, the lower id


def test_a_forget_query_has_the_context_it_names_or_the_first() -> None:
    contexts = [Context("a", (5,)), Context("b", (6,))]
    assert ref.context_of(Query("q", (1,)), contexts, "none") == contexts[0]
    assert ref.context_of(Query("q", (1,), context="b"), contexts, "none") == contexts[1]


def test_retain_queries_have_no_context_or_take_them_in_turn() -> None:
    contexts = [Context("a", (5,)), Context("b", (6,))]
    queries = [Query(str(i), (1,), role) for i in range(20) for role in ("retain", "neighbour")]
    assert all(ref.context_of(q, contexts, "none") is None for q in queries)
    names = [ref.context_of(q, contexts, "teacher").name for q in queries]  # type: ignore[union-attr]
    assert set(names) == {"a", "b"} and names[::2] == names[1::2]  # by the id alone, not by the role
