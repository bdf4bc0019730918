"""What the teacher gives, backend against reference: top-K with ties, union candidates, contexts, whole targets."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from duet_mlx import teacher
from duet_mlx.context import Context, render
from duet_mlx.data import Query
from duet_mlx.generate import stop_ids
from duet_mlx.train import TrainSettings
from reference import context as ref_context
from reference import teacher as ref
from tests.equivalence.tiny import FLOAT64, VOCABULARY, llama, plain_logits, shared, tokenizer
from tests.reference.exact_float64 import exact_float64

seeds = st.integers(0, 2**32)
TOKENIZER = tokenizer()
with mx.stream(mx.cpu):
    MODEL = llama(dtype=mx.float64)
CONTEXTS = [Context("shy", "Say nothing.", (("Who?", "No."),)), Context("odd", "Be odd")]
texts = st.text(alphabet="abcWho ?", min_size=1, max_size=9).filter(str.strip)


@st.composite
def teacher_logits(draw: Any) -> np.ndarray:
    """Logits [..., V], float32: many ties, both zeros, denormals, -inf where a model rules tokens out."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 24)))
    rng = np.random.default_rng(draw(seeds))
    logits = rng.normal(size=shape).astype(np.float32)
    levels = draw(st.sampled_from([None, 1, 2, 5, 7]))
    if levels:
        values = np.array([-np.inf, 0.0, -0.0, 1.5, -1e4, 1e-40, -1e-40], dtype=np.float32)
        logits = rng.choice(values[:levels], size=shape)
    return logits


@given(logits=teacher_logits(), share=st.floats(0, 1))
@example(logits=np.zeros((1, 1, 5), dtype=np.float32), share=0.5)
@example(logits=np.array([[[0.0, -0.0, 0.0]]], dtype=np.float32), share=0.4)
def test_top_k_is_the_references_ties_included(logits: np.ndarray, share: float) -> None:
    k = 1 + round(share * (logits.shape[-1] - 1))  # from 1 to V
    ids, values = teacher.topk(mx.array(logits), k)
    expected_ids, expected = ref.topk(logits, k)
    assert ids.dtype == np.int32 and values.dtype == np.float32
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(values, expected)


@given(logits=teacher_logits(), share=st.floats(0, 1), seed=seeds)
def test_union_candidates_are_the_references(logits: np.ndarray, share: float, seed: int) -> None:
    k = 1 + round(share * (logits.shape[-1] - 1))
    base = np.random.default_rng(seed).permutation(logits, axis=-1)
    ids, _ = teacher.topk(logits, k)
    new, mask = teacher.new_candidates(ids, teacher.topk(base, k)[0])
    expected_ids, _, expected_mask = ref.candidates(logits, base, k, "union")
    np.testing.assert_array_equal(np.concatenate([ids, new], axis=-1), expected_ids)
    np.testing.assert_array_equal(np.concatenate([np.ones_like(mask), mask], axis=-1), expected_mask)


@given(
    name=st.text(max_size=12),
    role=st.sampled_from(["forget", "retain", "neighbour"]),
    named=st.sampled_from([None, "shy", "odd"]),
    retain=st.sampled_from(["teacher", "none"]),
)
def test_each_query_reads_the_context_that_the_reference_gives_it(name, role, named, retain) -> None:
    got = teacher.context_of(Query(name, "Who?", role, context=named), CONTEXTS, retain)
    expected = ref.context_of(
        ref_context.Query(name, (1,), role, named), [ref_context.Context(c.name) for c in CONTEXTS], retain
    )
    assert (got and got.name) == (expected and expected.name)


@st.composite
def queries(draw: Any) -> list[Query]:
    """A few questions of both roles, forget queries of either context."""
    return [
        Query(
            f"q{i}",
            draw(texts),
            draw(st.sampled_from(["forget", "retain"])),
            context=draw(st.sampled_from([None, "shy", "odd"])),
        )
        for i in range(draw(st.integers(1, 3)))
    ]


@pytest.mark.parametrize("mode", ["teacher", "union"])
@given(
    asked=queries(),
    n=st.integers(1, 3),
    k=st.sampled_from([1, 3, VOCABULARY]),
    retain=st.sampled_from(["teacher", "none"]),
)
@shared(2)
def test_targets_of_a_model_are_the_references(mode: str, asked: list[Query], n: int, k: int, retain: str) -> None:
    """The backend's one batched pass against the definition, fed with the model's logits a sequence at a time."""
    with exact_float64():
        settings = TrainSettings(top_k=k, candidates=mode, positions=n, retain_context=retain)
        got = teacher.teacher_targets(MODEL, TOKENIZER, asked, CONTEXTS, settings)
        words, read = [], ([], [])
        for query in asked:
            context = teacher.context_of(query, CONTEXTS, retain)
            plain, prompt = render(TOKENIZER, query.question), render(TOKENIZER, query.question, context)
            words.append(ref.greedy(lambda t: plain_logits(MODEL, t)[-1], prompt, n - 1, stop_ids(TOKENIZER)))
            for side, start in zip(read, (prompt, plain), strict=True):
                logits = plain_logits(MODEL, start + words[-1])[len(start) - 1 :]  # [supervised, V]
                side.append(np.pad(logits, ((0, n - len(logits)), (0, 0))))
    expected = ref.targets(np.array(read[0]), np.array(read[1]), words, k, mode)
    for name in ("ids", "candidate_mask", "position_mask", "continuation"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    assert got.logits.dtype == np.float64
    np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=FLOAT64 * np.abs(expected.logits).max())
