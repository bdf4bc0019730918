"""The methods: DUET and what it is compared with, each a function of a batch and a line in the table METHODS.

One loop (train.py), one LoRA, the same questions and batches serve all. A method says what its targets follow (the
teacher's words, the base's answers, refusals), what it must know of the frozen base, and how its loss is computed
from what the student and the base give at these positions. CONTRIBUTING.md shows how one is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import ConfigError, nearest
from .settings import number

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from .baselines import Answers
    from .losses import Batch
    from .lower import Lower
    from .train import TrainSettings

# Tokens that a stream has at least: with fewer, handing out twice as many operations costs more than it saves.
PART = 64
# Logits of a loss from which on its rows are cut as well.
LARGE = 2**18
# Of the methods' numbers those that count or name something; all others may be fractions.
WHOLE = ("layer", "direction_seed")


class Reading(NamedTuple):
    """b queries of a batch as the student reads them: the letters of reference/__init__.py, b for part of B."""

    student: mx.array  # [b, n, V] logits; only the C candidates for DUET; hidden states [b, n, D] for RMU
    base: mx.array | None  # the same of the frozen model, for methods that want it
    batch: Batch

    @property
    def answers(self) -> Answers:
        """Logits, labels and mask as the losses of baselines.py read them."""
        from .baselines import Answers

        return Answers(self.student, self.batch.ids[..., 0], self.batch.position_mask)

    @property
    def base_nll(self) -> mx.array:
        """[b], the frozen base's nll of the answers."""
        return -self.batch.logits[..., 0].sum(axis=-1)  # its log-probabilities, 0 where there is no answer

    def rows(self, start: int, stop: int) -> Reading:
        """These queries alone."""
        base = None if self.base is None else self.base[start:stop]
        return Reading(self.student[start:stop], base, self.batch.rows(slice(start, stop)))


class Method(NamedTuple):
    """A line of the table. `losses` is baselines.py, handed over so that the table can be read without MLX."""

    loss: Callable[..., mx.array]  # losses [b] from (losses, Reading of what `labels` says, its numbers by name)
    labels: str  # teacher: its words, for all queries; or, for forget queries, answers, refusals, or both of them
    frozen: str  # what the frozen model must have said there: nothing, candidates, nll, logits, or layer
    defaults: dict[str, Any]  # its numbers; gamma and alpha weigh its forget loss and its retain loss
    paper: str
    retain: Callable[..., mx.array] = lambda losses, kept: losses.mean_nll(kept.answers)


def _duet(losses: Any, read: Reading, delta: float, center: bool, first_share: float) -> mx.array:
    from .losses import topk_huber

    return topk_huber(read.student, read.batch, delta, center, first_share)


def _rmu(losses: Any, read: Reading, c: float, layer: int, direction_seed: int) -> mx.array:
    import mlx.core as mx

    u = mx.array(losses.rmu_direction(read.student.shape[-1], direction_seed), dtype=read.student.dtype)
    return losses.activation_error(read.student, c * u, read.batch.position_mask)


BOTH, FORGET = {"gamma": 1.0, "alpha": 1.0}, {"gamma": 1.0, "alpha": 0.0}

# Defaults are those of the papers (reference/baselines.py) and, for the weights, of open-unlearning.
METHODS = {
    "duet": Method(_duet, "teacher", "candidates", {}, "Zhong, Yang and Zhu, ICLR 2026 (arXiv 2601.21283)"),
    "kl": Method(
        lambda losses, r: losses.full_vocabulary_kl(r.student, r.base, r.batch.position_mask),
        "teacher", "logits", {}, "distillation of the whole vocabulary, from the same teacher",
    ),
    "ga": Method(
        lambda losses, r: losses.gradient_ascent(r.answers),
        "answers", "nothing", FORGET, "Maini et al., 2024 (arXiv 2401.06121)",
    ),
    "graddiff": Method(
        lambda losses, r: losses.gradient_ascent(r.answers),
        "answers", "nothing", BOTH, "Maini et al., 2024 (arXiv 2401.06121)",
    ),
    "npo": Method(
        lambda losses, r, beta: losses.npo(r.answers, r.base_nll, beta),
        "answers", "nll", {"beta": 0.1, **BOTH}, "Zhang et al., 2024 (arXiv 2404.05868)",
    ),
    "simnpo": Method(
        lambda losses, r, beta, margin: losses.simnpo(r.answers, beta, margin),
        "answers", "nothing", {"beta": 4.5, "margin": 0.0, "gamma": 0.125, "alpha": 1.0},
        "Fan et al., 2024 (arXiv 2410.07163)",
    ),
    "idkdpo": Method(
        lambda losses, r, idk, beta: losses.idk_dpo(idk.answers, r.answers, idk.base_nll, r.base_nll, beta),
        "both", "nll", {"beta": 0.1, **BOTH}, "Maini et al., 2024 (arXiv 2401.06121)",
    ),
    "flat": Method(
        lambda losses, r, template: losses.flat(r.answers, template.answers),
        "both", "nothing", FORGET, "Wang et al., 2024 (arXiv 2410.11143)",
    ),
    "refusal": Method(
        lambda losses, r: losses.refusal_training(r.answers),
        "refusals", "nothing", BOTH, "fine-tuning on refusals; alpha 0 leaves out the retain questions",
    ),
    "undial": Method(
        lambda losses, r, beta: losses.undial(r.answers, r.base, beta),
        "answers", "logits", {"beta": 10.0, **FORGET}, "Dong et al., 2024 (arXiv 2402.10052)",
    ),
    "rmu": Method(
        _rmu, "answers", "layer", {"c": 6.5, "layer": None, "direction_seed": 0, "gamma": 1.0, "alpha": 1200.0},
        "Li et al., 2024 (arXiv 2403.03218)",
        retain=lambda losses, r: losses.activation_error(r.student, r.base, r.batch.position_mask),
    ),
}  # fmt: skip


def numbers_of(name: str) -> str:
    """The numbers of a method with their defaults, as a person reads them; one that has none is to be given."""
    return ", ".join(k if v is None else f"{k} {v:g}" for k, v in METHODS[name].defaults.items())


def given_numbers(settings: TrainSettings) -> dict[str, float]:
    """`method_parameters` as numbers: YAML reads 1e-1 as text. A whole number stays one.

    Raises:
        ConfigError: a name that the method does not have, no number, or one out of range.
    """
    name, given = settings.method, dict(settings.method_parameters)
    defaults = METHODS[name].defaults
    for key, value in given.items():
        if key not in defaults:
            has = f"{name} has {numbers_of(name) or 'none'}"
            raise ConfigError(f"method_parameters: unknown name {key!r}{nearest(str(key), list(defaults))}; {has}")
        found = number(value)
        if found is None or not math.isfinite(found):
            raise ConfigError(f"method_parameters {key}: expected a number, found {value!r}")
        if key in WHOLE and (not isinstance(value, int) or value < 0):
            raise ConfigError(f"method_parameters {key}: expected a whole number of 0 or more, found {value!r}")
        if found < 0 or (key == "beta" and found == 0):
            least = "more than" if key == "beta" else "at least"
            raise ConfigError(f"method_parameters {key}: expected {least} 0, found {value!r}")
        given[key] = value if isinstance(value, int) else found
    return given


def parameters(settings: TrainSettings) -> dict[str, Any]:
    """The method's numbers: its defaults, and over them those of `method_parameters`.

    Raises:
        ConfigError: as `given_numbers`, or a number that has no default and was not given.
    """
    name = settings.method
    numbers = {**METHODS[name].defaults, **given_numbers(settings)}
    for key, value in numbers.items():
        if value is None:
            raise ConfigError(
                f"--method {name}: give its {key}, as in `--method-parameters {key}=7`; it differs from model to model"
            )
    if name == "duet":  # its numbers are settings of their own
        return {name: getattr(settings, name) for name in ("delta", "center", "first_share")}
    return numbers


def states_of(settings: TrainSettings) -> str:
    """Which hidden states of the frozen model the loss reads: those that enter its head, a layer's, or ""."""
    method = METHODS[settings.method]
    if method.frozen == "layer":
        return "layer"
    return "head" if method.frozen == "logits" or retain_kl(settings) else ""


def reads_retain(settings: TrainSettings) -> bool:
    """Whether retain questions enter the loss."""
    return parameters(settings).get("alpha", 1.0) > 0


def retain_kl(settings: TrainSettings) -> bool:
    """Whether retain questions are held to the base's logits, not to the words of its answers."""
    return settings.retain_loss == "kl" and "retain_loss" not in unread(settings)


def unread(settings: TrainSettings) -> set[str]:
    """Settings whose values change nothing in this run: runs that differ in these alone are the same."""
    method = METHODS[settings.method]
    names: set[str] = set()
    if method.frozen != "candidates":
        names |= {"top_k", "candidates", "delta", "center", "first_share"}
    elif settings.positions == 1:
        names.add("first_share")
    if method.labels == "teacher":
        names |= {"answers", "answer_tokens", "retain_loss"}
    else:
        names |= {"context", "topic", "positions", "retain_context"}
    if method.labels not in ("refusals", "both"):
        names.add("refusals")
    if not reads_retain(settings):
        names.add("retain_loss")
    if settings.lr_schedule:
        names.add("learning_rate")
    return names


# --- a method as a function of a batch ----------------------------------------------------------------------


def method_loss(
    settings: TrainSettings, prefix: Sequence[int], head: nn.Module | None, lower: Lower | None = None
) -> Callable[[nn.Module, Batch], tuple[mx.array, int]]:
    """loss(model, batch) -> (sum of the query losses, number of queries).

    DUET and KL take all queries alike. The others: γ·mean(L_forget) + α·mean(L_retain), times the number of queries.

    Args:
        prefix: the tokens that all questions begin with, left out of the batch.
        lower: where the model begins, if what lies below was run before.
    """
    import mlx.core as mx

    from . import baselines

    method, numbers = METHODS[settings.method], parameters(settings)
    if retain_kl(settings) and method.frozen != "layer":
        method = method._replace(
            retain=lambda losses, r: losses.full_vocabulary_kl(r.student, r.base, r.batch.position_mask)
        )
    gamma, alpha = numbers.pop("gamma", 1.0), numbers.pop("alpha", 1.0)

    def loss(model: nn.Module, batch: Batch) -> tuple[mx.array, int]:
        read = reading(model, batch, method, numbers.get("layer", 0), prefix, head, lower)
        if method.labels == "teacher":
            return by_parts(partial(method.loss, baselines, **numbers), read).sum(), len(batch.tokens)
        forget, total, count = batch.forget, mx.array(0.0), 0
        first = 2 * forget if method.labels == "both" else forget  # of the retain queries
        if forget:
            sides = [read.rows(start, start + forget) for start in range(0, first, forget)]
            total = total + gamma * by_parts(partial(method.loss, baselines, **numbers), *sides).mean()
            count += forget
        if kept := len(batch.tokens) - first:
            rows = read.rows(first, first + kept)
            total = total + alpha * by_parts(partial(method.retain, baselines), rows).mean()
            count += kept
        return count * total, count

    return loss


def by_parts(losses: Callable[..., mx.array], *sides: Reading) -> mx.array:
    """losses(*sides) [b]; of many logits one part of the rows on each stream, as elementwise work has one core each."""
    import mlx.core as mx

    from .generate import on_each_stream

    if sides[0].student.size < LARGE:
        return losses(*sides)

    def of(rows: np.ndarray) -> mx.array:
        return losses(*(side.rows(rows[0], rows[-1] + 1) for side in sides))

    return mx.concatenate(on_each_stream(len(sides[0].student), of))


def reading(
    model: nn.Module,
    batch: Batch,
    method: Method,
    layer: int,
    prefix: Sequence[int],
    head: nn.Module | None,
    lower: Lower | None,
) -> Reading:
    """What the student gives at the supervised positions, and the frozen model beside it.

    The shared prefix is run once for the whole batch; its keys and values are broadcast, and gradients flow through.
    On a CPU a batch is cut into one part a stream, as decoding is: half of a step's time are kernels of one core.
    With `lower`, the model begins at its first adapted layer, from `batch.hidden`.
    """
    import mlx.core as mx

    from .generate import branch, encode_prefix, streams
    from .head import logits_at
    from .lower import entering, layer_output

    def begin(hidden):
        return entering(model, lower.layer, hidden) if lower else nullcontext()

    shared = None
    if prefix:
        with begin(lower and lower.prefix):
            shared = encode_prefix(model, prefix, whole=lower is not None)
    read = []
    parts, back = in_parts(batch)
    for part, stream in zip(parts, streams(), strict=False):
        with mx.stream(stream), begin(part.hidden):
            cache = branch(shared, len(part.tokens)) if shared else None
            if method.frozen == "layer":
                inside = layer - (lower.layer if lower else 0)
                read.append(layer_output(model, inside, part.tokens, part.positions, cache))
            else:
                ids = part.ids if method.frozen == "candidates" else None
                read.append(logits_at(model, part.tokens, part.positions, ids, cache, head, part.states))
    student = read[0] if back is None else mx.concatenate(read)[back]
    if method.frozen == "layer":
        return Reading(student, batch.states, batch)
    n = batch.positions.shape[1]
    # The frozen model's states go through the same head as the student's, so one product serves both.
    return Reading(student[:, :n], None if batch.states is None else mx.stop_gradient(student[:, n:]), batch)


def in_parts(batch: Batch) -> tuple[list[Batch], mx.array | None]:
    """A batch in two, its short rows and its long ones, each as wide as its longest, where there are two streams.

    Besides: where each row of the batch is in the two, one after the other; None if the batch is too small for that.
    It looks at numbers, so a step of two streams, a CPU's, cannot be compiled.
    """
    import mlx.core as mx

    from .generate import streams

    if len(streams()) == 1 or len(batch.tokens) == 1 or batch.tokens.size < 2 * PART:
        return [batch], None
    lengths = np.array(batch.positions).max(axis=1) + 1  # nothing looks at what comes behind
    order = np.argsort(lengths, kind="stable")
    count, widths = np.arange(1, len(order)), lengths[order]
    short = 1 + int(np.argmin(np.maximum(count * widths[:-1], count[::-1] * widths[-1])))  # equal work, nearly
    parts = [batch.rows(mx.array(rows), int(lengths[rows[-1]])) for rows in (order[:short], order[short:])]
    return parts, mx.array(np.argsort(order))
