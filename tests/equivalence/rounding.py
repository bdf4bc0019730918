"""How far float32 may take one step of Adam: a bound for the worst case, entry by entry."""

from __future__ import annotations

from typing import Any

import numpy as np


def adam_bound(value: Any, moved: Any, steps: int = 1) -> Any:
    """Bound on the error of a parameter after a step, where float32 has gone on by itself for `steps` steps.

    In units u = 2^-24 of the movement that absolute gradients and an absolute first mean would give: m is a sum of
    t products, each with 3 roundings a step, v likewise with 4, halved by the root: 3t + 2t. 1 - β^t is computed from
    a float32 β, whose rounding and power are t + 3 roundings of β^t: that is (t + 3)β^t / (1 - β^t) of it, below
    4 / (1 - β): 40 for β₁ and, under the root, 2,000 for β₂. 16 for the rest. The parameter itself is rounded once.

    Args:
        value: the parameter after the step.
        moved: how far it would have moved with absolute gradients and first mean.
    """
    return 1.01 * 2.0**-24 * ((2040 + 5 * steps + 16) * np.abs(moved) + np.abs(value))
