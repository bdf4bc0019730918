"""Gradients by finite differences, for the tests of the reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STEP = 1e-3


def numerical_slope(value: Callable[[float], float], step: float = STEP) -> float:
    """The derivative at 0, by fourth-order central differences: their error falls with step⁴, so a large step
    keeps rounding small."""
    near, far = value(step) - value(-step), value(2 * step) - value(-2 * step)
    return (8 * near - far) / (12 * step)


def numerical_gradient(value: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """∂value/∂at, entry by entry."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        kick = np.zeros_like(at)
        kick[index] = 1.0
        gradient[index] = numerical_slope(lambda step, kick=kick: value(at + step * kick))  # type: ignore[misc]
    return gradient


def assert_gradient(value: Callable[[np.ndarray], float], at: np.ndarray, gradient: np.ndarray) -> None:
    """The gradient is that of `value`, to 1e-6 of its largest entry, or to rounding."""
    assert gradient.shape == at.shape
    error = np.abs(gradient - numerical_gradient(value, at)).max()
    assert error <= 1e-6 * np.abs(gradient).max() + rounding(value(at))


def rounding(value: float, step: float = STEP) -> float:
    """Error of a difference quotient whose values, sums of some numbers near theirs, are rounded 16 times."""
    return 16 * 2.0**-52 * max(1.0, abs(value)) / step
