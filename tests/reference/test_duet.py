"""The whole algorithm: its gradient by finite differences, its limits, and what may change nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import duet as ref
from reference import lora
from reference.context import Context, Query, contextualize
from reference.teacher import Targets, context_of, topk
from reference.transformer import Config, Model, forward
from tests.reference.finite_differences import numerical_slope, rounding

V, D = 9, 4
STOP = 8
CONTEXTS = [Context("refuse", (1, 2, 3, 4)), Context("other", (5, 1))]
QUERIES = [
    Query("f0", (6, 1, 7)),
    Query("f1", (2, 5), context="other"),
    Query("r0", (3, 3, 6, 1), role="retain"),
    Query("n0", (4,), role="neighbour"),
]
PLAIN = ref.Settings(top_k=3, positions=1, candidates="teacher", retain_context="teacher", delta=1.0)
OURS = ref.Settings(
    top_k=3, positions=3, candidates="union", retain_context="none", delta=0.5, center=True, stop=(STOP,)
)
both = pytest.mark.parametrize("chosen", [PLAIN, OURS], ids=["paper", "ours"])
seeds = st.integers(0, 2**32)


def draw_model(seed: int, trained: bool = False, layers: int = 1) -> Model:
    """A tiny tied decoder with LoRA on every linear layer; B is 0, or not if `trained`."""
    rng = np.random.default_rng(seed)
    weights = {"model.embed_tokens.weight": rng.normal(size=(V, D)), "model.norm.weight": 1 + rng.random(D)}
    adapters = {}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}.{norm}.weight"] = 1 + rng.random(D)
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
            weights[f"{name}.{part}_proj.weight"] = rng.normal(size=(D, D))
            adapter = lora.init(rng, D, D, 2, scale=2.0)
            adapters[f"{name}.{part}_proj"] = adapter._replace(b=rng.normal(size=(2, D))) if trained else adapter
    return Model(Config(2, 2), weights, adapters)


def prompts() -> list[list[int]]:
    return [list(query.tokens) for query in QUERIES]


@both
@given(seed=seeds)
@settings(max_examples=10)
def test_the_gradient_agrees_with_finite_differences(chosen: ref.Settings, seed: int) -> None:
    """Along a random direction in all LoRA factors at once; δ ends beyond all differences, away from its kink."""
    student = draw_model(seed, trained=True)
    chosen = chosen._replace(delta=1e3)
    constant = ref.teacher_targets(student._replace(adapters={}), QUERIES, CONTEXTS, chosen)
    loss, gradients = ref.loss_and_gradients(student, prompts(), constant, chosen)
    arrays = lora.parameters(student.adapters)
    assert gradients.keys() == arrays.keys()
    rng = np.random.default_rng(seed)
    direction = {name: rng.normal(size=array.shape) for name, array in arrays.items()}
    norm = np.sqrt(sum((d**2).sum() for d in direction.values()))

    def along(step: float) -> float:
        moved = lora.updated(student.adapters, {k: a + step / norm * direction[k] for k, a in arrays.items()})
        return ref.loss_and_gradients(student._replace(adapters=moved), prompts(), constant, chosen)[0]

    step = 2e-4
    slope = sum((gradients[k] * d).sum() for k, d in direction.items()) / norm
    size = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert abs(numerical_slope(along, step) - slope) <= 1e-6 * size + rounding(loss, step)


@both
@given(seed=seeds)
@settings(max_examples=10)
def test_an_empty_context_gives_no_loss_and_no_step(chosen: ref.Settings, seed: int) -> None:
    student = draw_model(seed)
    nothing = [Context("refuse"), Context("other")]
    after, losses = ref.run(student, QUERIES, nothing, chosen, [[0, 1, 2, 3]], [0.1])
    assert losses[0] == pytest.approx(0, abs=1e-25)
    constant = ref.teacher_targets(student._replace(adapters={}), QUERIES, nothing, chosen)
    _, gradients = ref.loss_and_gradients(student, prompts(), constant, chosen)
    assert all(np.abs(gradient).max() < 1e-12 for gradient in gradients.values())
    assert after.weights is student.weights


@both
def test_training_makes_the_student_say_without_the_context_what_the_teacher_says_with_it(chosen) -> None:
    student = draw_model(3, layers=2)
    steps = 150
    after, losses = ref.run(student, QUERIES, CONTEXTS, chosen, [[0, 1, 2, 3]] * steps, [0.02] * steps)
    assert losses[-1] < 0.05 * losses[0]
    constant = ref.teacher_targets(student._replace(adapters={}), QUERIES, CONTEXTS, chosen)
    said = ref.logits_at(after, prompts()[:2], [[], []], 1)[:, 0].argmax(axis=-1)
    np.testing.assert_array_equal(said, constant.ids[:2, 0, 0])
    assert all((after.weights[name] == weight).all() for name, weight in draw_model(3, layers=2).weights.items())


def test_one_step_is_adams_from_the_gradient_of_the_batch() -> None:
    student = draw_model(4, trained=True)
    after, losses = ref.run(student, QUERIES, CONTEXTS, OURS, [[0, 2]], [0.25])
    constant = ref.teacher_targets(student._replace(adapters={}), QUERIES, CONTEXTS, OURS)
    part = Targets(*(array[[0, 2]] for array in constant))
    loss, gradients = ref.loss_and_gradients(student, [prompts()[0], prompts()[2]], part, OURS)
    assert losses == [loss]
    before, moved = lora.parameters(student.adapters), lora.parameters(after.adapters)
    for name, gradient in gradients.items():
        expected = 0.25 * gradient / (np.abs(gradient) + 1e-8)  # the first step of Adam
        np.testing.assert_allclose(before[name] - moved[name], expected, rtol=1e-9, atol=1e-12)


@both
@given(seed=seeds)
@settings(max_examples=10)
def test_the_batchs_loss_is_the_mean_of_its_queries_whatever_their_order_and_padding(chosen, seed) -> None:
    student = draw_model(seed, trained=True)
    constant = ref.teacher_targets(student._replace(adapters={}), QUERIES, CONTEXTS, chosen)
    together, gradients = ref.loss_and_gradients(student, prompts(), constant, chosen)
    alone = [
        ref.loss_and_gradients(student, [prompts()[i]], Targets(*(part[i : i + 1] for part in constant)), chosen)
        for i in reversed(range(len(QUERIES)))
    ]
    assert together == pytest.approx(np.mean([loss for loss, _ in alone]), rel=1e-12)
    for name, gradient in gradients.items():
        mean = np.mean([single[name] for _, single in alone], axis=0)
        np.testing.assert_allclose(gradient, mean, rtol=0, atol=1e-12 * np.abs(gradient).max())


@both
@given(seed=seeds)
@settings(max_examples=10)
def test_the_other_queries_change_no_target(chosen: ref.Settings, seed: int) -> None:
    base = draw_model(seed)._replace(adapters={})
    together = ref.teacher_targets(base, QUERIES, CONTEXTS, chosen)
    for i, query in enumerate(QUERIES):
        alone = ref.teacher_targets(base, [query], CONTEXTS, chosen)
        for name, part in alone._asdict().items():
            np.testing.assert_allclose(part[0], getattr(together, name)[i], rtol=1e-12, atol=1e-13, err_msg=name)


@given(seed=seeds)
@settings(max_examples=10)
def test_targets_are_the_teachers_logits_behind_a_context_encoded_once(seed: int) -> None:
    """Each query's first position, by the cache of its context; the context is read in no other way."""
    base = draw_model(seed)._replace(adapters={})
    constant = ref.teacher_targets(base, QUERIES, CONTEXTS, PLAIN)
    for i, query in enumerate(QUERIES):
        context = context_of(query, CONTEXTS, "teacher")
        assert context is not None
        _, cache, _ = forward(base, np.array([context.tokens]))
        ids, values = topk(forward(base, np.array([query.tokens]), cache)[0][0, -1], 3)
        np.testing.assert_allclose(constant.logits[i, 0], values, rtol=1e-12, atol=1e-13)
        np.testing.assert_array_equal(constant.ids[i, 0], ids)


@given(seed=seeds)
@settings(max_examples=10)
def test_all_candidates_and_no_delta_are_half_the_squared_error(seed: int) -> None:
    student = draw_model(seed, trained=True)
    chosen = PLAIN._replace(top_k=V, delta=np.inf)
    base = student._replace(adapters={})
    constant = ref.teacher_targets(base, QUERIES, CONTEXTS, chosen)
    loss, _ = ref.loss_and_gradients(student, prompts(), constant, chosen)
    contexts = [context_of(query, CONTEXTS, "teacher") for query in QUERIES]
    taught = [contextualize(q.tokens, c.tokens if c else ()) for q, c in zip(QUERIES, contexts, strict=True)]
    error = ref.logits_at(student, prompts(), [[]] * 4, 1) - ref.logits_at(base, taught, [[]] * 4, 1)
    assert loss == pytest.approx(0.5 * (error**2).sum() / 4, rel=1e-12)


@given(seed=seeds)
@settings(max_examples=10)
def test_retain_queries_without_a_context_are_taught_by_the_base(seed: int) -> None:
    student = draw_model(seed)
    constant = ref.teacher_targets(student._replace(adapters={}), QUERIES, CONTEXTS, OURS)
    kept = Targets(*(part[2:] for part in constant))
    loss, _ = ref.loss_and_gradients(student, prompts()[2:], kept, OURS)
    assert loss == pytest.approx(0, abs=1e-25)  # B = 0: the student still is the base
    assert not kept.candidate_mask[..., OURS.top_k :].any()


def test_continuations_end_before_the_end_of_turn_and_it_is_supervised() -> None:
    base = draw_model(0)._replace(adapters={})
    free = ref.teacher_targets(base, QUERIES, CONTEXTS, OURS._replace(positions=4, stop=()))
    assert free.position_mask.all()
    stop = int(free.continuation[0, 1])  # the second word of the first query's teacher
    cut = ref.teacher_targets(base, QUERIES[:1], CONTEXTS, OURS._replace(positions=4, stop=(stop,)))
    length = free.continuation[0].tolist().index(stop)
    assert cut.continuation[0].tolist() == [*free.continuation[0, :length], *[0] * (3 - length)]
    assert cut.position_mask[0].tolist() == [True] * (length + 1) + [False] * (3 - length)
    assert cut.ids[0, length, 0] == stop


def test_a_rendering_of_ones_own_replaces_the_plain_one() -> None:
    """As a chat template does: tokens before and after the question, which student and teacher both read."""

    def render(query: Query, context: Context | None) -> list[int]:
        return [*(context.tokens if context else ()), 7, *query.tokens, 0]

    rendered = [query._replace(tokens=(7, *query.tokens, 0)) for query in QUERIES]
    student, batches = draw_model(5), [[0, 2], [1, 3]]
    ours, _ = ref.run(student, QUERIES, CONTEXTS, OURS, batches, [0.1, 0.1], render)
    theirs, _ = ref.run(student, rendered, CONTEXTS, OURS, batches, [0.1, 0.1])
    plain, _ = ref.run(student, QUERIES, CONTEXTS, OURS, batches, [0.1, 0.1])
    for name, array in lora.parameters(ours.adapters).items():
        np.testing.assert_array_equal(array, lora.parameters(theirs.adapters)[name])
    assert any((lora.parameters(plain.adapters)[k] != a).any() for k, a in lora.parameters(ours.adapters).items())


def test_each_batch_needs_its_learning_rate() -> None:
    with pytest.raises(ValueError):
        ref.run(draw_model(0), QUERIES, CONTEXTS, PLAIN, [[0], [1]], [0.1])
