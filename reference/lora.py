"""LoRA on a linear layer, in mlx-lm's layout: y = W x + s·B(A x), with A and B stored as factors of a row.

References:
  Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class LoRA(NamedTuple):
    """The two trained factors of one layer. `scale` multiplies directly: it is not α/R."""

    a: Array  # [D_in, R]
    b: Array  # [R, D_out]
    scale: float


def init(rng: np.random.Generator, d_in: int, d_out: int, rank: int, scale: float) -> LoRA:
    """A ~ U(-1/√D_in, 1/√D_in), B = 0: at the start the student is the base."""
    bound = d_in**-0.5
    return LoRA(rng.uniform(-bound, bound, (d_in, rank)), np.zeros((rank, d_out)), scale)


def parameters(adapters: dict[str, LoRA]) -> dict[str, Array]:
    """All trained arrays by mlx-lm's names: `<layer>.lora_a` and `<layer>.lora_b`."""
    return {f"{name}.lora_{k}": getattr(lora, k) for name, lora in adapters.items() for k in ("a", "b")}


def updated(adapters: dict[str, LoRA], arrays: dict[str, Array]) -> dict[str, LoRA]:
    """The same adapters with these arrays, named as by `parameters`."""
    return {
        name: LoRA(arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"], lora.scale) for name, lora in adapters.items()
    }


def forward(x: Array, weight: Array, lora: LoRA | None = None) -> Array:
    """y = x Wᵀ + s (x a) b, [..., D_in] -> [..., D_out]; without LoRA, x Wᵀ. weight: [D_out, D_in]."""
    y = x @ weight.T  # [..., D_in] -> [..., D_out]
    return y if lora is None else y + lora.scale * (x @ lora.a) @ lora.b


def backward(
    gradient: Array, x: Array, weight: Array, lora: LoRA | None = None
) -> tuple[Array, Array | None, Array | None]:
    """Gradients by x [..., D_in], a [D_in, R] and b [R, D_out]; None for the last two without LoRA.

    With g = ∂L/∂y and h = x a, written for all S rows of x at once:

        y = x Wᵀ + s h b      ∂L/∂b = s hᵀ g      ∂L/∂h = s g bᵀ
        h = x a               ∂L/∂a = xᵀ ∂L/∂h    ∂L/∂x = g W + ∂L/∂h aᵀ

    W is frozen, so nothing is computed for it.

    Args:
        gradient: g, [..., D_out].
    """
    by_x = gradient @ weight  # [..., D_out] -> [..., D_in]
    if lora is None:
        return by_x, None, None
    rows, g = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])  # [S, D_in], [S, D_out]
    by_hidden = lora.scale * g @ lora.b.T  # [S, R]
    by_a, by_b = rows.T @ by_hidden, lora.scale * (rows @ lora.a).T @ g  # [D_in, R], [R, D_out]
    return by_x + (by_hidden @ lora.a.T).reshape(x.shape), by_a, by_b
