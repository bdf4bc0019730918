"""Adam: the algorithm's own closed forms, and MLX's optimizer with the settings that reference/README.md fixes."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import adam as ref

seeds = st.integers(0, 2**32)


@given(seeds, st.floats(1e-6, 1e-1))
def test_the_first_step_is_the_learning_rate_against_the_gradients_sign(seed, rate) -> None:
    rng = np.random.default_rng(seed)
    gradient = {"w": rng.choice([-1, 1], 5) * rng.uniform(0.1, 10, 5)}
    moved, _ = ref.step({"w": np.zeros(5)}, gradient, ref.init({"w": np.zeros(5)}), rate)
    np.testing.assert_allclose(moved["w"], -rate * np.sign(gradient["w"]), rtol=1e-6)


def test_epsilon_stands_outside_the_root() -> None:
    parameters = {"w": np.zeros(1)}
    moved, _ = ref.step(parameters, {"w": np.array([1e-8])}, ref.init(parameters), 1.0)
    assert moved["w"] == pytest.approx([-0.5])  # 1e-8 / (1e-8 + 1e-8); inside the root it would be -1e-4


@given(seeds, st.integers(1, 6))
def test_the_means_are_weighted_sums_of_all_gradients_so_far(seed, steps) -> None:
    gradients = np.random.default_rng(seed).normal(size=(steps, 3))
    parameters = {"w": np.zeros(3)}
    state = ref.init(parameters)
    for g in gradients:
        before = parameters
        parameters, state = ref.step(parameters, {"w": g}, state, 0.1)
    age = np.arange(steps)[::-1, None]
    first = (0.9**age * gradients).sum(axis=0) / (0.9**age).sum()
    second = (0.999**age * gradients**2).sum(axis=0) / (0.999**age).sum()
    np.testing.assert_allclose(before["w"] - parameters["w"], 0.1 * first / (np.sqrt(second) + 1e-8), rtol=1e-9)
    assert state.step == steps


def test_parameters_and_state_that_come_in_are_not_changed() -> None:
    parameters, gradient = {"w": np.ones(2)}, {"w": np.ones(2)}
    state = ref.init(parameters)
    ref.step(parameters, gradient, state, 0.1)
    assert (parameters["w"] == 1).all() and not state.first["w"].any() and state.step == 0


@given(seeds)
def test_mlxs_adam_with_bias_correction_takes_the_same_steps(seed) -> None:
    """Contract with mlx/optimizers/optimizers.py, Adam: its corrections are float32 in any dtype.

    1 - β₂ᵗ ≥ 1/1000 is the difference of numbers near 1, so what float32 rounds off them (2⁻²⁴ each for β₂,
    its power and the difference) grows 1000 times: below 3000 · 2⁻²⁴ of a step, about the learning rate.
    """
    rng = np.random.default_rng(seed)
    parameters = {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)}
    state = ref.init(parameters)
    with mx.stream(mx.cpu):
        theirs = {k: mx.array(v, dtype=mx.float64) for k, v in parameters.items()}
        optimizer = optim.Adam(learning_rate=2.0**-7, betas=[0.9, 0.999], eps=1e-8, bias_correction=True)
        for _ in range(3):
            gradients = {k: rng.normal(size=v.shape) for k, v in parameters.items()}
            parameters, state = ref.step(parameters, gradients, state, 2.0**-7)
            theirs = optimizer.apply_gradients({k: mx.array(g, dtype=mx.float64) for k, g in gradients.items()}, theirs)
            mx.eval(theirs, optimizer.state)
    for name, value in parameters.items():
        np.testing.assert_allclose(np.array(theirs[name]), value, rtol=0, atol=3 * 2.0**-7 * 3000 * 2.0**-24)
