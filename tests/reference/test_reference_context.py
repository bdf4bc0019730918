"""Token lists: student and teacher read the question alike and predict the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import context as ref

BOS = 1
tokens = st.lists(st.integers(2, 9), max_size=6)


@given(context=tokens, query=tokens.filter(len), bos=st.booleans(), own_bos=st.booleans())
def test_the_contextualized_query_ends_in_the_query_and_has_one_bos(context, query, bos, own_bos) -> None:
    x = [BOS, *query] if bos else query
    x_ic = [BOS, *context] if own_bos and bos else context
    both = ref.contextualize(x, x_ic, BOS)
    assert both == ([BOS] if bos else []) + context + query
    assert ref.shared_suffix(x, both) >= len(query)


def test_without_a_bos_to_look_for_the_lists_are_simply_joined() -> None:
    assert ref.contextualize([5, 6], [7]) == [7, 5, 6]
    assert ref.contextualize([BOS, 6], []) == [BOS, 6]


@given(shared=tokens, rests=st.lists(tokens, min_size=1, max_size=4))
def test_the_shared_prefix_is_the_longest_one(shared, rests) -> None:
    lists = [shared + rest for rest in rests]
    length = ref.shared_prefix(lists)
    assert length >= len(shared)
    assert all(ids[:length] == lists[0][:length] for ids in lists)
    assert any(len(ids) == length for ids in lists) or len({ids[length] for ids in lists}) > 1


def test_no_lists_share_nothing() -> None:
    assert ref.shared_prefix([]) == 0
    assert ref.shared_suffix([1, 2, 3], [4, 3]) == 1


@given(st.lists(st.tuples(tokens.filter(len), tokens, tokens), min_size=1, max_size=3), st.integers(1, 4))
def test_position_t_of_student_and_teacher_predict_the_same_token(rows, n) -> None:
    queries, contexts, words = zip(*rows, strict=True)
    continuations = [w[: n - 1] for w in words]
    student = ref.supervise(queries, continuations, n)
    teacher = ref.supervise([c + q for c, q in zip(contexts, queries, strict=True)], continuations, n)
    np.testing.assert_array_equal(student[2], teacher[2])
    for b, answer in enumerate(continuations):
        assert student[2][b].sum() == len(answer) + 1  # the end of turn is supervised too
        np.testing.assert_array_equal(teacher[1][b] - student[1][b], len(contexts[b]))
        for t in range(len(answer)):
            for ids, positions, _ in (student, teacher):
                assert ids[b, positions[b, t] + 1] == answer[t]


def test_masked_positions_repeat_the_last_one_and_padding_is_zero() -> None:
    ids, positions, mask = ref.supervise([[5, 6], [7, 8, 9]], [[4], []], n=3)
    np.testing.assert_array_equal(ids, [[5, 6, 4], [7, 8, 9]])
    np.testing.assert_array_equal(positions, [[1, 2, 2], [2, 2, 2]])
    np.testing.assert_array_equal(mask, [[True, True, False], [True, False, False]])
    np.testing.assert_array_equal(ref.pad([[3], [4, 5]], width=3), [[3, 0, 0], [4, 5, 0]])


def test_continuations_must_be_as_many_as_prompts() -> None:
    with pytest.raises(ValueError):
        ref.supervise([[5]], [[4], [3]], n=2)
