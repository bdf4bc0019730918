"""Gradients by finite differences, for the tests of the reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STEP = 1e-3


def numerical_gradient(value: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """Fourth-order central differences: the error falls with STEP⁴, so a large step keeps rounding small."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        kick = np.zeros_like(at)
        kick[index] = STEP
        near = value(at + kick) - value(at - kick)
        far = value(at + 2 * kick) - value(at - 2 * kick)
        gradient[index] = (8 * near - far) / (12 * STEP)
    return gradient


def assert_gradient(value: Callable[[np.ndarray], float], at: np.ndarray, gradient: np.ndarray) -> None:
    """The gradient is that of `value`, to 1e-6 of its largest entry, and is not all but zero."""
    largest = np.abs(gradient).max()
    assert gradient.shape == at.shape and largest > 1e-4
    assert np.abs(gradient - numerical_gradient(value, at)).max() <= 1e-6 * largest
