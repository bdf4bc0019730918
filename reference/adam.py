"""One step of Adam, as we chose it: bias correction on, ε outside the root, no weight decay.

References:
  Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015 (arXiv 1412.6980), Algorithm 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tree = dict[str, Array]  # arrays by parameter name


class Adam(NamedTuple):
    """Running means of the gradient and of its square, each by parameter name, and the steps taken."""

    first: Tree
    second: Tree
    step: int = 0


def init(parameters: Tree) -> Adam:
    """Both means 0, no step taken."""
    zeros = {name: np.zeros_like(value) for name, value in parameters.items()}
    return Adam(zeros, zeros)


def step(
    parameters: Tree,
    gradients: Tree,
    state: Adam,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> tuple[Tree, Adam]:
    """Parameters and state after one step; what came in is not changed.

        m ← β₁ m + (1 - β₁) g        m̂ = m / (1 - β₁ᵗ)        θ ← θ - η m̂ / (√v̂ + ε)
        v ← β₂ v + (1 - β₂) g²       v̂ = v / (1 - β₂ᵗ)        t = 1 at the first step

    m and v start at 0 and are too small at first by the factors 1 - βᵗ: without the division the first step
    would be (1 - β₁)/√(1 - β₂) = 3.2 times too long.
    """
    t = state.step + 1
    first = {k: beta1 * state.first[k] + (1 - beta1) * g for k, g in gradients.items()}
    second = {k: beta2 * state.second[k] + (1 - beta2) * g**2 for k, g in gradients.items()}
    moved = {}
    for name, value in parameters.items():
        mean, square = first[name] / (1 - beta1**t), second[name] / (1 - beta2**t)
        moved[name] = value - learning_rate * mean / (np.sqrt(square) + epsilon)
    return moved, Adam(first, second, t)
