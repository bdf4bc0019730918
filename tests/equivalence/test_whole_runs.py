"""Whole runs of DUET, backend against reference: the same drawn model, questions, settings and initial adapters.

In float64 both run free, the backend by `train` itself. Two things of MLX 0.32 would not let it: the kernels that
`exact_float64` works round, and β^t in Adam, a float32 power even for float64 parameters. Left alone, the latter moves
adapters by 2e-6 and losses by 8e-5; so the loop's own optimizer is given its betas as float64 arrays. What remains is
rounding, some 1e-16 of a gradient, of which a step of Adam makes η/ε = 1e6 times that where the gradient is 0: 20 steps
stay below 2e-9. Asked for is 1e-9; the most seen in 100 draws was 8e-13.

In float32 a free run can bound nothing, since Adam makes a whole step of a rounding error where the gradient is 0. So
each step starts from the reference's state, rounded to float32, and the update is compared with Adam's of the gradient
that was applied, within the worst case (rounding.py). Of targets, losses and gradients the bounds are what float32 may
do to the reference's own arithmetic (noisy.py), mostly 1e-5 to 1e-3 of a value's norm. To find them takes eight times
as long as the reference's step itself, so loss and gradients are held to them at two drawn steps of each run: at each
of the 20 in some 20 of 200 runs.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from duet_mlx import model as backend
from duet_mlx.checkpoint import Checkpoint
from duet_mlx.generate import common_prefix
from duet_mlx.head import check_head
from duet_mlx.lower import run_lower
from duet_mlx.teacher import Targets, teacher_targets
from duet_mlx.train import Prepared, TrainSettings, make_optimizer, make_step, train
from reference import adam, duet, lora
from reference.teacher import context_of
from tests.equivalence.noisy import Noisy, noisy, rounding_bounds
from tests.equivalence.rounding import adam_bound
from tests.equivalence.tiny import duet_loss
from tests.equivalence.twins import STEPS, TOKENIZER, Run, runs
from tests.reference.exact_float64 import exact_float64


def unshrunk(of: settings | None = None) -> settings:
    """These settings (the profile's), but a failing run is not shrunk: each try would train a model."""
    return settings(of, phases=(Phase.explicit, Phase.reuse, Phase.generate))


# --- float64: both run free ---------------------------------------------------------------------------------


def exact_adam(settings: TrainSettings) -> Any:
    """The loop's own optimizer, the powers of its betas in float64."""
    optimizer = make_optimizer(settings)
    optimizer.betas = [mx.array(beta, dtype=mx.float64) for beta in optimizer.betas]
    return optimizer


def free_run(run: Run, student: Any, read: Callable[..., Targets]) -> tuple[Targets, list[dict], dict[str, mx.array]]:
    """`train` in float64 from the student's adapters: the targets that `read` gives, its log, its last adapters."""
    add_lora = backend.add_lora
    final: dict[str, mx.array] = {}

    def put(model: Any, *_: Any, **__: Any) -> None:
        run.put_lora(model, student, mx.float64, add_lora)

    def keep(checkpoint: Checkpoint, **_: Any) -> None:  # MLX writes no float64
        final.update(checkpoint.now.adapter)

    with tempfile.TemporaryDirectory() as folder, exact_float64():
        model = run.tiny.dense(mx.float64)
        head, reason = check_head(model, mx.array([[1, 2, 3]]))
        assert head is not None, reason
        targets = read(model, TOKENIZER, run.queries, run.contexts, run.settings, head)
        manifest = {"model": backend.weights_hash(model)}
        prepared = Prepared(
            model, TOKENIZER, Path(folder), head, run.contexts, run.queries, targets, manifest, [], None
        )
        with (
            patch("duet_mlx.model.add_lora", put),
            patch("duet_mlx.train.make_optimizer", exact_adam),
            patch.object(Checkpoint, "save", keep),
        ):
            train(replace(run.settings, adapter_path=folder), prepared)
        log = [json.loads(line) for line in (Path(folder) / "train_log.jsonl").read_text().splitlines()]
    return targets, log, final


def check_run(log: list[dict], final: dict[str, mx.array], losses: list[float], after: Any) -> None:
    """Losses of all steps and the last adapters are the reference's, to 1e-9."""
    assert len(losses) == STEPS
    np.testing.assert_allclose([row["loss"] for row in log], losses, rtol=0, atol=1e-9)
    arrays = lora.parameters(after.adapters)
    assert final.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(np.array(final[name]), array, rtol=0, atol=1e-9, err_msg=name)


@given(run=runs())
@unshrunk()
def test_a_free_run_in_float64_is_the_references(run: Run) -> None:
    student = run.student()
    targets, log, final = free_run(run, student, teacher_targets)
    expected = duet.teacher_targets(student._replace(adapters={}), **run.given())
    for name in ("ids", "candidate_mask", "position_mask", "continuation"):
        np.testing.assert_array_equal(getattr(targets, name), getattr(expected, name), err_msg=name)
    atol = run.tiny.roundings * 2.0**-53 * np.abs(expected.logits).max()
    np.testing.assert_allclose(targets.logits, expected.logits, rtol=0, atol=atol)
    _, steps = run.stream(targets, 0)
    rates = [row["learning_rate"] for row in log]
    after, losses = duet.run(student, batches=[rows.tolist() for rows in steps], learning_rates=rates, **run.given())
    check_run(log, final, losses, after)


# --- float32: each step by itself ---------------------------------------------------------------------------


two_steps = st.sets(st.integers(0, STEPS - 1), min_size=2, max_size=2)


@given(run=runs(), seed=st.integers(0, 2**32), bounded=two_steps)
@unshrunk()
def test_targets_and_each_step_in_float32_are_the_references_within_rounding(
    run: Run, seed: int, bounded: set[int]
) -> None:
    Noisy.rng = random.Random(seed)
    student, asked, prompts = run.student(), run.given(), run.prompts()
    base = student._replace(adapters={})
    expected = duet.teacher_targets(base, **asked)
    with exact_float64():  # for the CPU, where it computes
        model = run.tiny.packed() if run.packed else run.tiny.dense(mx.float32)
        head, reason = check_head(model, mx.array([[1, 2, 3]]))
        assert head is not None, reason
        got = teacher_targets(model, TOKENIZER, run.queries, run.contexts, run.settings, head)
        check_targets(run, base, got, expected)

        # From here on both sides read the reference's targets, in float32.
        constant = expected._replace(logits=in_float32(expected.logits))
        length = common_prefix(prompts)
        stream, steps = run.stream(Targets(*constant)._replace(logits=constant.logits.astype(np.float32)), length)
        run.put_lora(model, student, mx.float32)
        below = 0 if run.settings.num_layers == -1 else len(model.layers) - run.settings.num_layers
        lower = run_lower(model, below, prompts[0][:length], [stream])
        assert (lower is None) == (below == 0)
        loss = partial(
            duet_loss, prefix=prompts[0][:length], head=head, delta=run.settings.delta, center=run.settings.center,
            lower=lower, first_share=run.settings.first_share,
        )  # fmt: skip
        optimizer = make_optimizer(run.settings)
        optimizer.init(model.trainable_parameters())
        step = make_step(model, optimizer, loss, run.settings, compiled=False)

        state = adam.init(lora.parameters(student.adapters))
        for number, rows in enumerate(steps):
            student, state = rounded(student, state)
            arrays = lora.parameters(student.adapters)
            of_batch, asking = type(constant)(*(part[rows] for part in constant)), [prompts[row] for row in rows]
            taken = partial(loss_and_gradients, prompts=asking, constant=of_batch, settings=asked["settings"])
            restart(model, optimizer, arrays, state)
            one = partial(step, stream.batch(rows), None, 1)
            exact = check_step(one, taken, model, optimizer, student, state, number in bounded)
            gradients = {name: exact[name] for name in arrays}
            arrays, state = adam.step(arrays, gradients, state, run.settings.learning_rate)
            student = student._replace(adapters=lora.updated(student.adapters, arrays))


def check_step(
    step: Any, taken: Any, model: Any, optimizer: Any, student: Any, state: adam.Adam, bounded: bool
) -> dict[str, Any]:
    """Adam's update of the gradients applied and, if `bounded`, loss and gradients within rounding of the reference's.

    Returns what the reference has for loss and gradients.
    """
    with applied_gradients(optimizer) as applied:
        value, _, _ = step()
        mx.eval(model.parameters(), optimizer.state, value)
    exact, before = taken(student), lora.parameters(student.adapters)
    assert applied.keys() == before.keys()
    if bounded:
        check({"loss": value.item(), **applied}, exact, rounding_bounds(taken(with_noise(student)), exact))

    gradients = {name: np.array(g, dtype=np.float64) for name, g in applied.items()}
    rate, got = optimizer.learning_rate.item(), backend.adapter_parameters(model)
    after, _ = adam.step(before, gradients, state, rate)
    still = {name: np.zeros_like(array) for name, array in before.items()}
    size, absolute = ({name: np.abs(a) for name, a in tree.items()} for tree in (gradients, state.first))
    moved, _ = adam.step(still, size, state._replace(first=absolute), rate)
    for name, array in after.items():
        error = np.abs(np.array(got[name], dtype=np.float64) - array)
        assert (error <= adam_bound(array, moved[name])).all(), f"{name}: off by {error.max():.3g}"
    return exact


def in_float32(values: np.ndarray) -> np.ndarray:
    """Rounded to float32, kept in float64."""
    return values.astype(np.float32).astype(np.float64)


def rounded(student: Any, state: adam.Adam) -> tuple[Any, adam.Adam]:
    """A state of the reference that float32 can hold."""
    trees = (lora.parameters(student.adapters), state.first, state.second)
    arrays, first, second = ({name: in_float32(a) for name, a in tree.items()} for tree in trees)
    return student._replace(adapters=lora.updated(student.adapters, arrays)), adam.Adam(first, second, state.step)


def loss_and_gradients(student: Any, **of_batch: Any) -> dict[str, Any]:
    value, gradients = duet.loss_and_gradients(student, **of_batch)
    return {"loss": value, **gradients}


def with_noise(model: Any) -> Any:
    """The reference's model, of numbers that each operation moves."""
    base, scale = (Noisy(np.array([float(x)])) for x in (model.config.rope_base, model.config.embedding_scale))
    # √D, Gemma's scale, is rounded; a factor of 1 does so here.
    return noisy(model)._replace(config=model.config._replace(rope_base=base, embedding_scale=1 * scale))


def check(got: dict[str, Any], exact: dict[str, Any], bounds: dict[str, float]) -> None:
    for name, bound in bounds.items():
        error = np.linalg.norm(np.ravel(np.array(got[name], dtype=np.float64) - exact[name]))
        assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g}"


def restart(model: Any, optimizer: Any, arrays: adam.Tree, state: adam.Adam) -> None:
    """Put adapters and optimizer of the reference into the backend's, as resuming does."""
    model.load_weights([(name, mx.array(a, dtype=mx.float32)) for name, a in arrays.items()], strict=False)
    means = [
        (f"{name}.{mean}", a) for mean, tree in (("m", state.first), ("v", state.second)) for name, a in tree.items()
    ]
    entries = [(name, mx.array(a, dtype=mx.float32)) for name, a in means]
    rate = ("learning_rate", optimizer.learning_rate)
    optimizer.state = tree_unflatten([*entries, rate, ("step", mx.array(state.step, dtype=mx.uint64))])


@contextmanager
def applied_gradients(optimizer: Any) -> Iterator[dict[str, mx.array]]:
    """While inside, what the optimizer is given, by name."""
    seen: dict[str, mx.array] = {}
    update = optimizer.update

    def record(model: Any, gradient: Any) -> None:
        seen.update(tree_flatten(gradient))
        update(model, gradient)

    with patch.object(optimizer, "update", record):
        yield seen


def check_targets(run: Run, base: Any, got: Targets, expected: Any) -> None:
    """Equal ids wherever the gap of the logits is more than rounding may close; logits within it."""
    asked, k = run.given(), run.settings.top_k
    supervised = expected.position_mask.sum(axis=1)
    words = [row[: count - 1].tolist() for row, count in zip(expected.continuation, supervised, strict=True)]
    contexts = [context_of(query, asked["contexts"], run.settings.retain_context) for query in asked["queries"]]
    taught = [asked["render"](query, context) for query, context in zip(asked["queries"], contexts, strict=True)]
    places = list(zip(*np.nonzero(expected.position_mask), strict=True))

    def logits(model: Any) -> dict[Any, np.ndarray]:  # of teacher and base at each supervised position, [V]
        sides = {"teacher": taught, "base": run.prompts()}
        read = {side: duet.logits_at(model, prompts, words, run.settings.positions) for side, prompts in sides.items()}
        return {(side, *place): values[place] for side, values in read.items() for place in places}

    exact = logits(base)
    errors = rounding_bounds(logits(with_noise(base)), exact)

    def ranked(*place: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and values [V], descending, and whether no rounding can swap a rank with the next."""
        ids = np.argsort(-exact[place], kind="stable")
        values = exact[place][ids]
        return ids, values, np.append(values[:-1] - values[1:] > 2 * errors[place], True)

    unsure: set[int] = set()
    for i, t in places:
        if i in unsure:
            continue  # another word may have been said, and this is another sequence
        assert got.position_mask[i, t]
        (ids, values, clear), (_, _, base_clear) = ranked("teacher", i, t), ranked("base", i, t)
        near = partial(np.testing.assert_allclose, rtol=0, atol=errors["teacher", i, t])
        sure = np.flatnonzero((clear & np.append(True, clear[:-1]))[:k])
        np.testing.assert_array_equal(got.ids[i, t, sure], ids[sure])
        near(got.logits[i, t, :k], values[:k])
        if clear[k - 1] and base_clear[k - 1]:
            np.testing.assert_array_equal(got.candidate_mask[i, t], expected.candidate_mask[i, t])
            np.testing.assert_array_equal(got.ids[i, t, k:], expected.ids[i, t, k:])
            near(got.logits[i, t, k:], expected.logits[i, t, k:])
        if clear[0]:
            np.testing.assert_array_equal(got.continuation[i, t : t + 1], expected.continuation[i, t : t + 1])
            after = slice(t + 1, t + 2)
            np.testing.assert_array_equal(got.position_mask[i, after], expected.position_mask[i, after])
        else:
            unsure.add(i)
