"""The baselines DUET is compared with: value and hand-derived gradient of each loss (reference/README.md, "Baselines").

Every loss reads the *answer positions* alone: `mask` is true where the logits at a position predict a token
of the answer, false on the prompt and on padding, whose logits and labels may hold anything.

Every loss returns `(losses [B], gradient)`, or one gradient for each of its inputs: a query's loss depends on
nothing but itself, and the gradient is that of the batch's mean, hence the 1/B. A query without any answer
position adds no gradient. All is minimised; `weighted_total` adds a forget and a retain loss.

One fact carries most derivations. For the logits z of one position and its label y,

    -log softmax(z)[y] = logsumexp(z) - z[y]      so      its gradient is softmax(z) - 1[y],

and nll, the sum of these over the answer, has that gradient at each answer position. A loss f(nll) then has
the gradient f'(nll) (softmax(z) - 1[y]): below only f and f' change.

References:
  GA, GradDiff: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121).
  NPO: Zhang et al., "Negative Preference Optimization", 2024 (arXiv 2404.05868).
  SimNPO: Fan et al., "Simplicity Prevails: Rethinking NPO for LLM Unlearning", 2024 (arXiv 2410.07163).
  FLAT: Wang et al., "LLM Unlearning via Loss Adjustment with Only Forget Data", 2024 (arXiv 2410.11143).
  UNDIAL: Dong et al., "UNDIAL: Self-Distillation with Adjusted Logits", 2024 (arXiv 2402.10052).
  RMU: Li et al., "The WMDP Benchmark", 2024 (arXiv 2403.03218).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SIMNPO_GAMMA, SIMNPO_ALPHA = 0.125, 1.0  # SimNPO's weights of the forget and the retain loss
FLAT_ALPHA = 0.0  # FLAT needs no retain data


class Answers(NamedTuple):
    """B answers under teacher forcing: the logits at a position predict that position's label."""

    logits: Array  # [B, S, V] float64
    labels: Array  # [B, S] int, anything where the mask is false
    mask: Array  # [B, S] bool, true on the answer, its end of turn included


# --- what they are made of ----------------------------------------------------------------------------------


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis; the maximum is taken out first, so no exponential overflows."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softplus(x: Array) -> Array:
    """log(1 + e^x) = -log σ(-x), without overflow. Its derivative is σ(x)."""
    return np.logaddexp(0.0, x)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x) = exp(-softplus(-x)), without overflow."""
    return np.exp(-softplus(-x))


def answer_length(mask: Array) -> Array:
    """|y|, [B]: the number of answer tokens; 1 for a query without any, whose sums are 0 and stay 0."""
    return np.maximum(mask.sum(axis=-1), 1)


def token_log_probs(answers: Answers) -> tuple[Array, Array]:
    """Answer tokens' log-probabilities [B, S], their gradient 1[y] - softmax(z) [B, S, V]; 0 off the mask."""
    on_answer = answers.mask[..., None]
    # Selected before the softmax: off the mask there may stand anything, and 0 * nan is not 0.
    log_probs = log_softmax(np.where(on_answer, answers.logits, 0.0))  # [B, S, V]
    labels = np.where(answers.mask, answers.labels, 0)[..., None]  # [B, S] -> [B, S, 1]
    one_hot = np.arange(log_probs.shape[-1]) == labels  # [B, S, V]
    of_label = np.take_along_axis(log_probs, labels, axis=-1)[..., 0]  # [B, S]
    return np.where(answers.mask, of_label, 0.0), np.where(on_answer, one_hot - np.exp(log_probs), 0.0)


def answer_nll(answers: Answers) -> tuple[Array, Array]:
    """nll [B], the answer's summed negative log-likelihood, and each query's own gradient of it [B, S, V].

    nll = -Σ_t log softmax(z_t)[y_t]          ∂nll/∂z_t = softmax(z_t) - 1[y_t]
    """
    log_probs, gradient = token_log_probs(answers)
    return -log_probs.sum(axis=-1), -gradient


def batch_gradient(slope: Array, gradient: Array) -> Array:
    """Chain rule for the mean of B losses f(q): f'(q) [B] times the gradient of q [B, S, V], over B."""
    return slope[:, None, None] * gradient / len(slope)


def weighted_total(
    forget: tuple[Array, ...], retain: tuple[Array, ...], gamma: float = 1.0, alpha: float = 1.0
) -> tuple[Any, ...]:
    """γ·mean(L_forget) + α·mean(L_retain), then the gradients of the forget inputs and of the retain inputs.

    Args:
        forget, retain: what a loss of this file returned, (losses, gradient, ...). The two batches share no
            logits, so each gradient is only scaled by its own weight. The numbers of queries may differ.
    """
    value = gamma * forget[0].mean() + alpha * retain[0].mean()
    return value, *(gamma * g for g in forget[1:]), *(alpha * g for g in retain[1:])


# --- likelihood ---------------------------------------------------------------------------------------------


def mean_nll(answers: Answers) -> tuple[Array, Array]:
    """nll/|y|: the usual fine-tuning loss. The NLL retain term, and refusal training.

    f(nll) = nll/|y|                                   f' = 1/|y|
    """
    nll, gradient = answer_nll(answers)
    length = answer_length(answers.mask)
    return nll / length, batch_gradient(1.0 / length, gradient)


def refusal_training(refusals: Answers) -> tuple[Array, Array]:
    """Mean NLL of a refusal, given the forget query: ordinary fine-tuning, on other answers."""
    return mean_nll(refusals)


def gradient_ascent(answers: Answers) -> tuple[Array, Array]:
    """GA: -nll/|y|. Without a floor: it falls for ever as the answer's probability goes to 0."""
    losses, gradient = mean_nll(answers)
    return -losses, -gradient


def grad_diff(forget: Answers, retain: Answers, gamma: float = 1.0, alpha: float = 1.0) -> tuple[Any, ...]:
    """GradDiff: -γ·nll/|y| on forget, +α·nll/|y| on retain. Returns (total, forget and retain gradient)."""
    return weighted_total(gradient_ascent(forget), mean_nll(retain), gamma, alpha)


# --- preference ---------------------------------------------------------------------------------------------


def npo(answers: Answers, reference_nll: Array, beta: float = 0.1) -> tuple[Array, Array]:
    """NPO: -(2/β) log σ(β (nll_θ - nll_ref)).

    Both are log-likelihoods of the whole answer, not raw logits and not means over its tokens.
    With u = β (nll_θ - nll_ref):   f = (2/β) softplus(-u)     f' = (2/β)·(-σ(-u))·β = -2 σ(-u)
    At the start u = 0 and f' = -1, gradient ascent on nll; as the answer grows unlikely, u → ∞ and f' → 0.

    Args:
        reference_nll: [B], the base model's nll of the same answers; a constant.
    """
    nll, gradient = answer_nll(answers)
    u = beta * (nll - reference_nll)
    return 2.0 / beta * softplus(-u), batch_gradient(-2.0 * sigmoid(-u), gradient)


def simnpo(answers: Answers, beta: float = 4.5, margin: float = 0.0) -> tuple[Array, Array]:
    """SimNPO: -(2/β) log σ(β (nll_θ/|y| - m)): NPO without a reference model, by mean nll.

    With u = β (nll/|y| - m):   f = (2/β) softplus(-u)         f' = -2 σ(-u) / |y|
    The paper's γ is β·m, and has nothing to do with SIMNPO_GAMMA, the weight of this loss.
    """
    nll, gradient = answer_nll(answers)
    length = answer_length(answers.mask)
    u = beta * (nll / length - margin)
    return 2.0 / beta * softplus(-u), batch_gradient(-2.0 * sigmoid(-u) / length, gradient)


def idk_dpo(
    idk: Answers, forget: Answers, idk_reference_nll: Array, reference_nll: Array, beta: float = 0.1
) -> tuple[Array, Array, Array]:
    """IdkDPO: prefer "I don't know" to the answer.

    -(2/β) log σ(β [(nll_ref - nll_θ)_idk - (nll_ref - nll_θ)_f])

    The factor 2/β is open-unlearning's; TOFU's own code has 1.
    With u = β [...]:   f = (2/β) softplus(-u)    ∂f/∂u = -(2/β) σ(-u)    ∂u/∂nll_idk = -β    ∂u/∂nll_f = +β
                        ∂f/∂nll_idk = +2 σ(-u)    ∂f/∂nll_f = -2 σ(-u)

    Args:
        idk, forget: a refusal and the answer to the same B queries, row by row; their S may differ.
        idk_reference_nll, reference_nll: [B], the base model's nll of both; constants.

    Returns:
        losses [B], the gradient by the logits of `idk`, the gradient by those of `forget`.
    """
    idk_nll, idk_gradient = answer_nll(idk)
    forget_nll, forget_gradient = answer_nll(forget)
    u = beta * ((idk_reference_nll - idk_nll) - (reference_nll - forget_nll))
    slope = 2.0 * sigmoid(-u)
    losses = 2.0 / beta * softplus(-u)
    return losses, batch_gradient(slope, idk_gradient), batch_gradient(-slope, forget_gradient)


def mean_token_probability(answers: Answers) -> tuple[Array, Array]:
    """p̄ [B], the mean over the answer's tokens of their probability, and the gradient of each query's own p̄.

    p̄ = (1/|y|) Σ_t p_t,  p = softmax(z)[y]       ∂p/∂z = p ∂(log p)/∂z = p (1[y] - softmax(z))
    """
    log_probs, gradient = token_log_probs(answers)
    length = answer_length(answers.mask)
    probs = np.where(answers.mask, np.exp(log_probs), 0.0)  # [B, S]: off the mask e^0 would count as 1
    return probs.sum(axis=-1) / length, probs[..., None] * gradient / length[:, None, None]


def flat(forget: Answers, template: Answers) -> tuple[Array, Array, Array]:
    """FLAT with total variation: ½ tanh(p̄_forget) - ½ tanh(p̄_template).

    tanh' = 1 - tanh²:   ∂f/∂p̄_forget = ½ (1 - tanh² p̄_forget)    ∂f/∂p̄_template = -½ (1 - tanh² p̄_template)

    Args:
        forget, template: the answer and a template answer (a refusal) to the same B queries, row by row.

    Returns:
        losses [B], the gradient by the logits of `forget`, the gradient by those of `template`.
    """
    forget_mean, forget_gradient = mean_token_probability(forget)
    template_mean, template_gradient = mean_token_probability(template)
    forget_tanh, template_tanh = np.tanh(forget_mean), np.tanh(template_mean)
    return (
        0.5 * forget_tanh - 0.5 * template_tanh,
        batch_gradient(0.5 * (1.0 - forget_tanh**2), forget_gradient),
        batch_gradient(-0.5 * (1.0 - template_tanh**2), template_gradient),
    )


# --- distillation -------------------------------------------------------------------------------------------


def cross_entropy(logits: Array, target_logits: Array, mask: Array) -> tuple[Array, Array]:
    """-Σ_i p_i log softmax(z)_i with p = softmax(target_logits), a constant; averaged over masked positions.

    Σ_i p_i (logsumexp(z) - z_i) = logsumexp(z) - Σ_i p_i z_i, so by z:  softmax(z) - p
    """
    on_answer = mask[..., None]
    log_probs = log_softmax(np.where(on_answer, logits, 0.0))  # [B, S, V]
    target = np.exp(log_softmax(np.where(on_answer, target_logits, 0.0)))  # [B, S, V]
    length = answer_length(mask)
    losses = np.where(mask, -(target * log_probs).sum(axis=-1), 0.0).sum(axis=-1) / length
    return losses, batch_gradient(1.0 / length, np.where(on_answer, np.exp(log_probs) - target, 0.0))


def full_vocabulary_kl(logits: Array, reference_logits: Array, mask: Array) -> tuple[Array, Array]:
    """KL(softmax g_ref ‖ softmax g_θ), averaged over masked positions: the KL retain term, and distillation.

    KL(p ‖ q) = Σ_i p_i log p_i - Σ_i p_i log q_i: the cross entropy less a constant, so the same gradient,
    softmax(g_θ) - softmax(g_ref) at each position. Raw logits come in; both softmaxes are taken here.

    Args:
        logits, reference_logits: [B, S, V], the student's and the constant ones of the base or the teacher.
        mask: [B, S] bool, answer or supervised positions.
    """
    crossed, gradient = cross_entropy(logits, reference_logits, mask)
    entropy, _ = cross_entropy(reference_logits, reference_logits, mask)
    return crossed - entropy, gradient


def undial(answers: Answers, reference_logits: Array, beta: float = 10.0) -> tuple[Array, Array]:
    """UNDIAL: CE(softmax(z_ref - β·1[y]), student), averaged over the answer positions.

    The target is the base's own distribution with the answer token's logit lowered by β: a constant, so the
    gradient is softmax(z) - softmax(z_ref - β·1[y]).

    Args:
        reference_logits: [B, S, V], the base model's logits for the same answers.
    """
    labels = np.where(answers.mask, answers.labels, 0)[..., None]
    one_hot = np.arange(reference_logits.shape[-1]) == labels  # [B, S, V]
    return cross_entropy(answers.logits, reference_logits - beta * one_hot, answers.mask)


# --- representation -----------------------------------------------------------------------------------------


def rmu_direction(width: int, seed: int) -> Array:
    """u = v/‖v‖ [D] with v ~ U[0,1)^D: RMU's random direction, drawn once and fixed for the whole run."""
    v = np.random.default_rng(seed).random(width)
    return v / np.linalg.norm(v)


def activation_error(hidden: Array, target: Array, mask: Array) -> tuple[Array, Array]:
    """(h - target)², averaged over the masked tokens and the width; by h:  2 (h - target) / (|y| D).

    Args:
        hidden: [B, S, D]; target: anything that broadcasts to it; mask: [B, S] bool.
    """
    difference = np.where(mask[..., None], hidden - target, 0.0)  # [B, S, D]
    length = answer_length(mask)
    width = hidden.shape[-1]
    losses = (difference**2).sum(axis=(-1, -2)) / (length * width)
    return losses, batch_gradient(2.0 / (length * width), difference)


def rmu(
    forget_hidden: Array,
    forget_mask: Array,
    retain_hidden: Array,
    retain_reference: Array,
    retain_mask: Array,
    direction: Array,
    c: float = 6.5,
    alpha: float = 1200.0,
) -> tuple[Any, ...]:
    """RMU: mean (h_ℓ(x_f) - c·u)² + α · mean (h_ℓ(x_r) - h_ref(x_r))², on the output of layer ℓ.

    Nothing above layer ℓ enters, so nothing above it gets a gradient. The defaults are those for Zephyr-7B
    (ℓ = 7): other models and depths need their own.

    Args:
        forget_hidden, retain_hidden, retain_reference: [B, S, D], the last from the base model, a constant.
        forget_mask, retain_mask: [B, S] bool.
        direction: [D], see `rmu_direction`.

    Returns:
        The total, its gradient by `forget_hidden`, its gradient by `retain_hidden`.
    """
    forget = activation_error(forget_hidden, c * direction, forget_mask)
    retain = activation_error(retain_hidden, retain_reference, retain_mask)
    return weighted_total(forget, retain, 1.0, alpha)
