"""Whole runs of the baselines, backend against reference, as test_whole_runs.py has them for DUET.

In float64 both run free for 20 steps, the backend by `train` itself, from its own answers and frozen numbers. The
bound is that file's, and so are its reasons: rounding of some 1e-16 of a gradient, of which a step of Adam makes
η/ε = 1e6 times that where the gradient is 0. In float32 each step starts from the reference's state, and the frozen
numbers are the backend's own; the bounds are what float32 may do to the reference's arithmetic (noisy.py). Answers are
given there: greedy ones would hang on rounding where two words are as likely; runs of KL where they do are left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from duet_mlx.data import in_turn
from duet_mlx.generate import common_prefix
from duet_mlx.head import check_head
from duet_mlx.labels import gold_answer, refusals_of, targets_of
from duet_mlx.methods import method_loss, parameters, reads_retain
from duet_mlx.probe import answer_ids
from duet_mlx.stream import Stream
from duet_mlx.train import TrainSettings, make_optimizer, make_step
from reference import adam, duet, lora, unlearn
from reference import baselines as ref
from reference.teacher import context_of
from reference.unlearn import Labelled
from tests.equivalence.noisy import Noisy
from tests.equivalence.test_whole_runs import check_run, check_step, free_run, restart, rounded, two_steps, unshrunk
from tests.equivalence.tiny import shared
from tests.equivalence.twins import TOKENIZER, Run, runs
from tests.reference.exact_float64 import exact_float64

METHODS: dict[str, dict[str, float]] = {  # the numbers that a run has: the defaults, where they are not told
    "graddiff": {"gamma": 0.7, "alpha": 1.3},
    "npo": {"beta": 0.4},
    "npo, retain kl": {"beta": 0.4, "alpha": 2.0},
    "simnpo": {"margin": 0.5},
    "idkdpo": {},
    "flat": {"alpha": 0.5},
    "refusal": {},
    "undial": {"beta": 3.0, "alpha": 0.2},
    "rmu": {"layer": 0, "c": 2.0, "alpha": 3.0},
    "kl": {},
}


def drawn(data: st.DataObject, method: str) -> Run:
    return data.draw(runs(layers=(2,)) if method == "rmu" else runs())  # RMU's layer is not the last one


def settings_of(run: Run, name: str, **more: Any) -> TrainSettings:
    """The run's settings for a method of this name."""
    method, _, retain = name.partition(", retain ")
    return replace(run.settings, method=method, method_parameters=METHODS[name], retain_loss=retain or "nll", **more)


def steps_of(
    run: Run, base: Any, rows: list[np.ndarray], spoken: Any = None
) -> list[tuple[list[Labelled], unlearn.Loss]]:
    """What the reference reads at each step, and its loss; KL reads the words of `spoken`, by default the base's."""
    prompts, stop, name = run.prompts(), tuple(TOKENIZER.eos_token_ids), run.settings.method
    numbers = parameters(run.settings)
    gamma, alpha = numbers.pop("gamma", None), numbers.pop("alpha", None)
    if run.settings.answers == "gold":
        answers = [answer_ids(TOKENIZER, gold_answer(query) or "") for query in run.queries]
    else:
        answers = unlearn.base_answers(base, prompts, run.settings.answer_tokens, stop)
    reader = partial(unlearn.read_layer, layer=0)
    refusals = [answer_ids(TOKENIZER, in_turn(query, refusals_of(run.settings))) for query in run.queries]

    def side(labels: list[list[int]], chosen: list[int]) -> Labelled:
        return Labelled([prompts[i] for i in chosen], [labels[i] for i in chosen])

    def step(chosen: list[int]) -> tuple[list[Labelled], unlearn.Loss]:
        forget = [i for i in chosen if run.queries[i].role == "forget"]
        said, kept = side(answers, forget), [i for i in chosen if i not in forget]
        if name == "rmu":
            sides = [side(answers, chosen) for chosen in (forget, kept) if chosen]
            still = [reader(base, one)[0].states for one in sides]

            def rmu(*read: unlearn.Hidden) -> tuple[Any, ...]:
                direction = ref.rmu_direction(read[0].states.shape[-1], seed=0)
                of_forget = ref.activation_error(read[0].states, numbers["c"] * direction, read[0].mask)
                of_kept = ref.activation_error(read[1].states, still[1], read[1].mask) if kept else (np.zeros(1),)
                return ref.weighted_total(of_forget, of_kept, gamma, alpha)

            return sides, rmu
        refused, frozen = side(refusals, forget), unlearn.read(base, said)[0]
        nll = ref.answer_nll(frozen)[0]
        losses: dict[str, tuple[list[Labelled], Callable[..., tuple]]] = {
            "graddiff": ([said], ref.gradient_ascent),
            "npo": ([said], lambda a: ref.npo(a, nll, **numbers)),
            "simnpo": ([said], lambda a: ref.simnpo(a, **numbers)),
            "idkdpo": ([refused, said], lambda idk, a: ref.idk_dpo(
                idk, a, ref.answer_nll(unlearn.read(base, refused)[0])[0], nll, **numbers
            )),
            "flat": ([said, refused], ref.flat),
            "refusal": ([refused], ref.refusal_training),
            "undial": ([said], lambda a: ref.undial(a, frozen.logits, **numbers)),
        }  # fmt: skip
        sides, of_forget = losses[name]
        count = len(sides)

        def retain(a: ref.Answers) -> tuple[Any, ...]:
            if run.settings.retain_loss == "nll":
                return ref.mean_nll(a)
            return ref.full_vocabulary_kl(a.logits, unlearn.read(base, side(answers, kept))[0].logits, a.mask)

        def total(*read: ref.Answers) -> tuple[Any, ...]:
            of_kept = retain(read[count]) if kept else (np.zeros(1),)
            return ref.weighted_total(of_forget(*read[:count]), of_kept, gamma, alpha)

        return [*sides, *([side(answers, kept)] if kept else [])], total

    if name != "kl":
        return [step(chosen.tolist()) for chosen in rows]

    asked = run.given()
    constant = spoken or duet.teacher_targets(base, **asked)
    counts = constant.position_mask.sum(axis=1) - 1
    words = [[*row[:count].tolist(), 0] for row, count in zip(constant.continuation, counts, strict=True)]
    contexts = [context_of(query, asked["contexts"], run.settings.retain_context) for query in asked["queries"]]
    taught = [asked["render"](query, context) for query, context in zip(asked["queries"], contexts, strict=True)]

    def kl_step(chosen: list[int]) -> tuple[list[Labelled], unlearn.Loss]:
        teacher, _ = unlearn.read(base, Labelled([taught[i] for i in chosen], [words[i] for i in chosen]))

        def loss(a: ref.Answers) -> tuple[Any, ...]:
            losses, gradient = ref.full_vocabulary_kl(a.logits, teacher.logits, a.mask)
            return losses.mean(), gradient

        return [side(words, chosen)], loss

    return [kl_step(chosen.tolist()) for chosen in rows]


@pytest.mark.parametrize("method", METHODS)  # 20 runs of each in CI, 2 in quick
@given(data=st.data())
@unshrunk(shared(len(METHODS)))
def test_a_free_run_in_float64_is_the_references(method: str, data: st.DataObject) -> None:
    run = drawn(data, method)
    settings = settings_of(run, method, answer_tokens=4)
    if method == "rmu":  # its layer must be an adapted one
        settings = replace(settings, num_layers=-1)
    run = run._replace(settings=settings)
    student = run.student()
    targets, log, final = free_run(run, student, targets_of)
    roles = np.array([query.role for query in run.queries])
    forget, kept = np.flatnonzero(roles == "forget"), np.flatnonzero(roles != "forget")
    stream = Stream(run.prompts(), targets, 0, forget)
    rows = stream.schedule(forget, kept if reads_retain(settings) else kept[:0], settings)
    steps = steps_of(run, student._replace(adapters={}), rows)
    reader = partial(unlearn.read_layer, layer=0) if method == "rmu" else unlearn.read
    after, losses = unlearn.run(student, steps, [row["learning_rate"] for row in log], reader)
    check_run(log, final, losses, after)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data(), seed=st.integers(0, 2**32), bounded=two_steps)
@unshrunk(shared(len(METHODS)))
def test_steps_in_float32_are_the_references_within_rounding(
    method: str, data: st.DataObject, seed: int, bounded: set[int]
) -> None:
    Noisy.rng, run = random.Random(seed), drawn(data, method)
    settings = settings_of(run, method, answers="gold", num_layers=-1)
    answered = [replace(query, answer=("Who", "a b", "?")[i % 3]) for i, query in enumerate(run.queries)]
    run = run._replace(settings=settings, queries=answered)
    student, prompts = run.student(), run.prompts()
    reader = partial(unlearn.read_layer, layer=0) if method == "rmu" else unlearn.read
    with exact_float64():  # for the CPU, where it computes
        model = run.tiny.packed() if run.packed else run.tiny.dense(mx.float32)
        head, reason = check_head(model, mx.array([[1, 2, 3]]))
        assert head is not None, reason
        targets = targets_of(model, TOKENIZER, run.queries, run.contexts, settings, head)
        spoken = duet.teacher_targets(student._replace(adapters={}), **run.given()) if method == "kl" else None
        if spoken:  # where two words are as likely, rounding may choose another
            assume(np.array_equal(spoken.continuation, targets.continuation))
            assume(np.array_equal(spoken.position_mask, targets.position_mask))
        roles = np.array([query.role for query in run.queries])
        forget, kept = np.flatnonzero(roles == "forget"), np.flatnonzero(roles != "forget")
        length = common_prefix(prompts)
        stream = Stream(prompts, targets, length, forget)
        steps = stream.schedule(forget, kept if reads_retain(settings) else kept[:0], settings)
        run.put_lora(model, student, mx.float32)
        optimizer = make_optimizer(settings)
        optimizer.init(model.trainable_parameters())
        step = make_step(model, optimizer, method_loss(settings, prompts[0][:length], head), settings, compiled=False)

        state = adam.init(lora.parameters(student.adapters))
        for number, rows in enumerate(steps):
            student, state = rounded(student, state)

            def taken(student: Any, rows: np.ndarray = rows) -> dict[str, Any]:
                [(sides, loss)] = steps_of(run, student._replace(adapters={}), [rows], spoken)
                value, gradients = unlearn.loss_and_gradients(student, sides, loss, reader)
                return {"loss": value, **gradients}

            restart(model, optimizer, lora.parameters(student.adapters), state)
            one = partial(step, stream.batch(rows), None, 1)
            exact = check_step(one, taken, model, optimizer, student, state, number in bounded)
            arrays = lora.parameters(student.adapters)
            gradients = {name: exact[name] for name in arrays}
            arrays, state = adam.step(arrays, gradients, state, settings.learning_rate)
            student = student._replace(adapters=lora.updated(student.adapters, arrays))
