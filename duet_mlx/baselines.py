"""The losses of the baselines: the twins of reference/baselines.py, which derives each of them and its gradient.

Every loss reads the answer positions alone and returns one number for each query, [B]; MLX differentiates it. The
letters for dimensions are those of reference/__init__.py. methods.py says which method uses which loss.

References:
  GA, GradDiff: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121).
  NPO: Zhang et al., "Negative Preference Optimization", 2024 (arXiv 2404.05868).
  SimNPO: Fan et al., "Simplicity Prevails: Rethinking NPO for LLM Unlearning", 2024 (arXiv 2410.07163).
  FLAT: Wang et al., "LLM Unlearning via Loss Adjustment with Only Forget Data", 2024 (arXiv 2410.11143).
  UNDIAL: Dong et al., "UNDIAL: Self-Distillation with Adjusted Logits", 2024 (arXiv 2402.10052).
  RMU: Li et al., "The WMDP Benchmark", 2024 (arXiv 2403.03218).
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np


class Answers(NamedTuple):
    """B answers under teacher forcing: the logits at a position predict that position's label."""

    logits: mx.array  # [B, S, V] float32 or float64
    labels: mx.array  # [B, S] int32, anything where the mask is false
    mask: mx.array  # [B, S] bool, true on the answer, its end of turn included


# --- what they are made of ----------------------------------------------------------------------------------


def _shifted(logits: mx.array, mask: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """z less its largest entry [B, S, V], what softmax makes of it before it divides, e^z [B, S, V], and Σ e^z [B, S].

    So log softmax(z)_i = z_i - log Σ e^z. The exponential is the dear part of a loss on a CPU (20 ns a number), and
    taken once for value and gradient both; logsumexp would take it again.
    """
    # Selected first: off the mask there may stand anything, and 0 * nan is not 0.
    z = mx.where(mask[..., None], logits, 0)
    # The maximum is taken out before all else: float32 has steps of 2e-6 at a logit of 20, and nll sums many of them.
    z = z - mx.stop_gradient(z.max(axis=-1, keepdims=True))
    powers = mx.exp(z)
    return z, powers, powers.sum(axis=-1)


def softplus(x: mx.array) -> mx.array:
    """log(1 + e^x) = -log σ(-x), without overflow."""
    return mx.logaddexp(x, mx.zeros_like(x))  # in this order: MLX's slope by the second is 1 - σ, 0 from x = -17 on


def answer_length(mask: mx.array) -> mx.array:
    """|y|, [B]: the number of answer tokens; 1 for a query without any, whose sums are 0 and stay 0."""
    return mx.maximum(mask.sum(axis=-1), 1)


def _mean_over(by_position: mx.array, mask: mx.array) -> mx.array:
    """What stands at the masked positions of [B, S], averaged: [B]."""
    return mx.where(mask, by_position, 0).sum(axis=-1) / answer_length(mask)


def token_log_probs(answers: Answers) -> mx.array:
    """The answer tokens' log-probabilities [B, S], 0 off the mask."""
    z, _, total = _shifted(answers.logits, answers.mask)
    labels = mx.where(answers.mask, answers.labels, 0)[..., None]  # [B, S] -> [B, S, 1]
    return mx.where(answers.mask, mx.take_along_axis(z, labels, axis=-1)[..., 0] - mx.log(total), 0)


def answer_nll(answers: Answers) -> mx.array:
    """nll [B], the answer's summed negative log-likelihood: -Σ_t log softmax(z_t)[y_t]."""
    return -token_log_probs(answers).sum(axis=-1)


# --- likelihood ---------------------------------------------------------------------------------------------


def mean_nll(answers: Answers) -> mx.array:
    """nll/|y|: the usual fine-tuning loss. The retain term, and refusal training."""
    return answer_nll(answers) / answer_length(answers.mask)


def refusal_training(refusals: Answers) -> mx.array:
    """Mean NLL of a refusal, given the forget query: ordinary fine-tuning, on other answers."""
    return mean_nll(refusals)


def gradient_ascent(answers: Answers) -> mx.array:
    """GA: -nll/|y|. Without a floor: it falls for ever as the answer's probability goes to 0."""
    return -mean_nll(answers)


# --- preference ---------------------------------------------------------------------------------------------


def npo(answers: Answers, reference_nll: mx.array, beta: float = 0.1) -> mx.array:
    """NPO: -(2/β) log σ(β (nll_θ - nll_ref)), of the whole answer's log-likelihoods.

    Args:
        reference_nll: [B], the base model's nll of the same answers; a constant.
    """
    return 2.0 / beta * softplus(-beta * (answer_nll(answers) - reference_nll))


def simnpo(answers: Answers, beta: float = 4.5, margin: float = 0.0) -> mx.array:
    """SimNPO: -(2/β) log σ(β (nll_θ/|y| - m)): NPO without a reference model, by mean nll. The paper's γ is β·m."""
    return 2.0 / beta * softplus(-beta * (mean_nll(answers) - margin))


def idk_dpo(
    idk: Answers, forget: Answers, idk_reference_nll: mx.array, reference_nll: mx.array, beta: float = 0.1
) -> mx.array:
    """IdkDPO: prefer "I don't know" to the answer: -(2/β) log σ(β [(nll_ref - nll_θ)_idk - (nll_ref - nll_θ)_f]).

    The factor 2/β is open-unlearning's; TOFU's own code has 1.

    Args:
        idk, forget: a refusal and the answer to the same B queries, row by row; their S may differ.
        idk_reference_nll, reference_nll: [B], the base model's nll of both; constants.
    """
    u = beta * ((idk_reference_nll - answer_nll(idk)) - (reference_nll - answer_nll(forget)))
    return 2.0 / beta * softplus(-u)


def mean_token_probability(answers: Answers) -> mx.array:
    """p̄ [B], the mean over the answer's tokens of their probability."""
    return _mean_over(mx.exp(token_log_probs(answers)), answers.mask)


def flat(forget: Answers, template: Answers) -> mx.array:
    """FLAT with total variation: ½ tanh(p̄_forget) - ½ tanh(p̄_template), row by row."""
    return 0.5 * mx.tanh(mean_token_probability(forget)) - 0.5 * mx.tanh(mean_token_probability(template))


# --- distillation -------------------------------------------------------------------------------------------


def full_vocabulary_kl(logits: mx.array, reference_logits: mx.array, mask: mx.array) -> mx.array:
    """KL(softmax g_ref ‖ softmax g_θ), averaged over masked positions. Raw logits come in.

    Args:
        logits, reference_logits: [B, S, V], the student's and the constant ones of the base or the teacher.
        mask: [B, S] bool, answer or supervised positions.
    """
    z, _, total = _shifted(logits, mask)
    target, powers, of_target = _shifted(mx.stop_gradient(reference_logits), mask)
    p = powers / of_target[..., None]  # [B, S, V]
    return _mean_over((p * (target - z)).sum(axis=-1) + (mx.log(total) - mx.log(of_target)), mask)


def undial(answers: Answers, reference_logits: mx.array, beta: float = 10.0) -> mx.array:
    """UNDIAL: CE(softmax(z_ref - β·1[y]), student), averaged over the answer positions.

    Args:
        reference_logits: [B, S, V], the base model's logits for the same answers.
    """
    labels = mx.where(answers.mask, answers.labels, 0)[..., None]
    one_hot = mx.arange(reference_logits.shape[-1]) == labels  # [B, S, V]
    lowered = mx.where(one_hot, reference_logits - beta, reference_logits)
    z, _, total = _shifted(answers.logits, answers.mask)
    _, powers, of_target = _shifted(mx.stop_gradient(lowered), answers.mask)
    return _mean_over(mx.log(total) - (powers * z).sum(axis=-1) / of_target, answers.mask)


# --- representation -----------------------------------------------------------------------------------------


def rmu_direction(width: int, seed: int) -> np.ndarray:
    """u = v/‖v‖ [D] with v ~ U[0,1)^D: RMU's random direction, drawn once and fixed for the whole run."""
    v = np.random.default_rng(seed).random(width)
    return v / np.linalg.norm(v)


def activation_error(hidden: mx.array, target: mx.array, mask: mx.array) -> mx.array:
    """(h - target)², averaged over the masked tokens and the width: RMU's two terms.

    Args:
        hidden: [B, S, D]; target: anything that broadcasts to it, a constant; mask: [B, S] bool.
    """
    on_answer = mask[..., None]
    constant = mx.broadcast_to(mx.stop_gradient(target), hidden.shape)
    difference = mx.where(on_answer, hidden, 0) - mx.where(on_answer, constant, 0)  # [B, S, D]
    return (difference**2).sum(axis=(-1, -2)) / (answer_length(mask) * hidden.shape[-1])
