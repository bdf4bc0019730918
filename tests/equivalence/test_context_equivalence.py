"""Token lists of student and teacher, as the backend renders them and as the reference joins them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from duet_mlx.context import Context, check_renders, render, shared_prefix
from reference import context as ref
from tests.equivalence.tiny import tokenizer

TOKENIZER = tokenizer()
texts = st.text(alphabet="abcWho ?", min_size=1, max_size=9).filter(str.strip)
turns = st.lists(st.tuples(texts, texts), max_size=2)


def in_front(context: Context) -> list[int]:
    """The context's own tokens: TOKENIZER's template written out by hand, a token a character."""
    text = f"<s>{context.system}\n" if context.system else ""
    for question, answer in context.turns:
        text += f"<u>{question.strip()}\n<a>{answer.strip()}\n"
    return TOKENIZER.encode(text, add_special_tokens=False)


@given(question=texts, system=st.one_of(st.just(""), texts.map(str.strip)), turns=turns)
def test_the_teacher_reads_the_references_context_and_query_in_one(
    question: str, system: str, turns: list[tuple[str, str]]
) -> None:
    context = Context("drawn", system, tuple(turns))
    query, teacher = render(TOKENIZER, question), render(TOKENIZER, question, context)
    assert teacher == ref.contextualize(query, in_front(context))
    shared = ref.shared_suffix(query, teacher)
    assert shared == len(query)  # nothing stands in front of this template's question but its role
    assert check_renders(TOKENIZER, question, context) == shared


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=5))
def test_the_shared_prefix_is_the_references(rows: list[list[int]]) -> None:
    assert shared_prefix(rows) == ref.shared_prefix(rows)
