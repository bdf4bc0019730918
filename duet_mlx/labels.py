"""What the baselines are trained on: answers and refusals in tokens, and what the frozen base says of them.

All of it is read once, before training, and saved as `Targets` with one candidate, the answer's token: so batches,
saving and reuse are those of DUET. The base's own greedy answers come first, then, for methods that set a refusal
against the answer, a row more for each forget query.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .context import Context, check_fits, render
from .data import Query, in_turn
from .errors import ConfigError, DataError, note
from .methods import METHODS, parameters, retain_kl, states_of, unread
from .tables import read_lines
from .teacher import Targets, context_of, forced_logits, teacher_targets, vocabulary_of

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from .train import TrainSettings

REFUSALS = (
    "I'm sorry, I don't know the answer to that.",
    "That is something I have no information about.",
    "I'm afraid I can't tell you; I don't know.",
    "I am not familiar with that.",
    "I don't have any knowledge of this.",
)


def refusals_of(settings: TrainSettings) -> list[str]:
    """The refusals of `--refusals`, one a line, or the ready ones. Raises ConfigError."""
    if settings.refusals is None:
        return list(REFUSALS)
    try:
        refusals = read_lines(settings.refusals)
    except DataError as error:
        raise ConfigError(f"--refusals {error}; one refusal a line is wanted here") from error
    if not refusals:
        raise ConfigError(f"--refusals {settings.refusals}: empty; expected one refusal a line")
    return refusals


def gold_answer(query: Query) -> str | None:
    """The first answer that the question's file gives, or None."""
    return query.answer[0] if isinstance(query.answer, tuple) else query.answer


def check_answers(queries: Sequence[Query], settings: TrainSettings) -> None:
    """Raise DataError where the method trains on gold answers and a question has none."""
    method = METHODS[settings.method]
    asked = [q for q in queries if method.labels in ("answers", "both") or q.role != "forget"]
    if method.labels == "teacher" or settings.answers == "base":
        return
    without = [query.place or query.id for query in asked if query.answer is None]
    if without:
        raise DataError(
            f"{without[0]}: has no answer, and neither have {len(without) - 1} more; --answers gold needs the field "
            '"answer" in each question, --answers base takes what the model itself says'
        )


def check_model(
    settings: TrainSettings, model: nn.Module, found: tuple[nn.Module | None, str]
) -> tuple[list[str], nn.Module | None]:
    """The modules that LoRA goes on, and the head to gather from; None, with a note that says why: the full head.

    Args:
        found: what `check_head` gives; of a model without weights, what `find_head` gives, and why it may be None.

    Raises:
        ConfigError, ModelError: this model does not allow the method, or LoRA as it is asked for.
    """
    from .model import check_lora, lora_keys, outside_layers

    check_lora(model, settings.num_layers, settings.lora_parameters["rank"])
    keys = lora_keys(model, settings.lora_parameters["keys"])
    head, reason = found
    if adapted_head := outside_layers(model, keys):
        head, reason = None, f"LoRA is asked for on {', '.join(adapted_head)}"
    if head is None:
        print(f"note: full head instead of K rows ({reason})")
    check_method(settings, model, head)
    return keys, head


def check_method(settings: TrainSettings, model: nn.Module, head: nn.Module | None) -> None:
    """Raise ConfigError for a method that this model, or LoRA as it is asked for, does not allow."""
    from .lower import find_stack

    method = METHODS[settings.method]
    if method.frozen == "candidates":
        vocabulary_of(model, settings.top_k)
        if settings.top_k == 1 and settings.center:
            note(
                "note: --top-k 1 with --center: one candidate, less its mean, has no loss, so where teacher and base "
                "agree nothing is learned; --no-center takes it as it is"
            )
    if states_of(settings) == "head" and head is None:
        retain = "" if method.frozen == "logits" else " with --retain-loss kl"
        raise ConfigError(
            f"--method {settings.method}{retain}: compares all logits, by way of a head that can be called apart; "
            "this model or its LoRA allows none (see the note above)"
        )
    if method.frozen == "layer":
        if retain_kl(settings):
            raise ConfigError(f"--retain-loss kl: --method {settings.method} has a retain term of its own")
        layer, count = parameters(settings)["layer"], len(model.layers)
        first = 0 if settings.num_layers == -1 else count - settings.num_layers
        if find_stack(model) is None:
            raise ConfigError(f"--method {settings.method}: no list of layers found in this model")
        if layer not in range(first, count - 1):
            raise ConfigError(
                f"--method {settings.method}: layer {layer}: expected {first} to {count - 2}, from the first layer "
                "that --num-layers adapts to the last but one"
            )


def asked_of(queries: Sequence[Query], settings: TrainSettings) -> dict[str, Any] | None:
    """The settings and texts that such targets hang on, for the manifest; None: those of DUET's."""
    method = METHODS[settings.method]
    if method.frozen == "candidates":
        return None
    if method.labels == "teacher":
        names: tuple[str, ...] = ("positions", "retain_context")
    else:
        names = ("answers", "answer_tokens")
    asked: dict[str, Any] = {"labels": method.labels, **{name: getattr(settings, name) for name in names}}
    if states := states_of(settings):
        asked["states"] = parameters(settings)["layer"] if states == "layer" else states
    if method.labels in ("refusals", "both"):
        asked["refusals"] = refusals_of(settings)
    if method.labels != "teacher" and settings.answers == "gold":
        asked["gold"] = [gold_answer(query) for query in queries]
    return asked


def targets_of(
    model: nn.Module,
    tokenizer,
    queries: Sequence[Query],
    contexts: Sequence[Context],
    settings: TrainSettings,
    head: nn.Module | None = None,
) -> Targets:
    """What the method is trained on: the teacher's words and logits, or answers and the base's log-probabilities.

    Returns:
        Targets of N queries; for answers C is 1, `ids` the answer's tokens, end of turn included, and `logits` the
        base's log-probabilities of them. With labels "both", F rows more: the refusals of the forget queries.
    """
    method = METHODS[settings.method]
    if method.labels != "teacher":
        return answer_targets(model, tokenizer, queries, settings, head)
    if method.frozen == "candidates":
        return teacher_targets(model, tokenizer, queries, contexts, settings, head)
    from dataclasses import replace

    # All V logits are compared: one candidate is read for the sake of the teacher's words alone.
    words = replace(settings, top_k=1, candidates="teacher")
    targets = teacher_targets(model, tokenizer, queries, contexts, words, head)
    asked = [context_of(query, contexts, settings.retain_context) for query in queries]
    states = None
    for context in dict.fromkeys(asked):  # questions behind one context share its encoding
        rows = np.array([i for i, one in enumerate(asked) if one == context])
        prompts = [render(tokenizer, queries[i].question, context) for i in rows]
        part = frozen_states(model, prompts, [spoken(targets, i) for i in rows], settings.positions, settings, head)
        states = np.zeros((len(queries), *part.shape[1:]), dtype=part.dtype) if states is None else states
        states[rows] = part
    return targets._replace(states=states)


def spoken(targets: Targets, row: int) -> list[int]:
    """The tokens of a continuation that are read on the way to its last supervised position."""
    return targets.continuation[row, : targets.position_mask[row].sum() - 1].tolist()


def given_labels(
    tokenizer, queries: Sequence[Query], settings: TrainSettings
) -> tuple[list[list[int]], list[list[int] | None]]:
    """Prompts and answers in tokens, a row each, as far as they are known without the model; None: its own answer.

    With labels "both", F rows more: the refusals of the forget queries.

    Raises:
        DataError: an answer that is too long behind its question; one of the model's own is known to fit.
    """
    from .probe import answer_ids

    method = METHODS[settings.method]
    refusals = [] if "refusals" in unread(settings) else refusals_of(settings)
    prompts = [render(tokenizer, query.question, place=query.place) for query in queries]
    labels: list[list[int] | None] = []
    for query in queries:
        text = gold_answer(query) or "" if settings.answers == "gold" else None
        if query.role == "forget" and method.labels == "refusals":
            text = in_turn(query, refusals)
        labels.append(None if text is None else answer_ids(tokenizer, text))
    if method.labels == "both":
        forget = [i for i, query in enumerate(queries) if query.role == "forget"]
        labels += [answer_ids(tokenizer, in_turn(queries[i], refusals)) for i in forget]
        prompts += [prompts[i] for i in forget]
        queries = [*queries, *(queries[i] for i in forget)]
    for query, prompt, words in zip(queries, prompts, labels, strict=True):
        if words is not None:
            place = query.place or query.id
            check_fits(place, query.question, len(prompt), len(words), "--max-seq-length", settings.max_seq_length)
    return prompts, labels


def answer_targets(model: nn.Module, tokenizer, queries: Sequence[Query], settings: TrainSettings, head) -> Targets:
    """Answers as targets: see `targets_of`."""
    import mlx.core as mx

    from .baselines import Answers, token_log_probs

    prompts, given = given_labels(tokenizer, queries, settings)
    own = [prompt for prompt, words in zip(prompts, given, strict=True) if words is None]
    said = iter(base_answers(model, tokenizer, own, settings.answer_tokens, head))
    labels = [next(said) if words is None else words for words in given]
    n = max(map(len, labels))
    ids = np.zeros((len(labels), n, 1), dtype=np.int32)
    mask = np.zeros((len(labels), n), dtype=bool)
    for row, words in enumerate(labels):
        ids[row, : len(words), 0] = words
        mask[row, : len(words)] = True
    continuation = np.where(mask[:, 1:], ids[:, :-1, 0], 0)
    log_probs, kind = np.zeros(ids.shape), np.dtype(np.float32)
    for rows, logits in forced_logits(model, prompts, [words[:-1] for words in labels], n, head):
        answers = Answers(logits, mx.array(ids[rows, :, 0]), mx.array(mask[rows]))
        values = np.array(token_log_probs(answers))
        log_probs[rows, :, 0], kind = values, values.dtype
    targets = Targets(ids, log_probs.astype(kind), mask[..., None], mask, continuation)
    if states_of(settings):
        states = frozen_states(model, prompts, [words[:-1] for words in labels], n, settings, head)
        targets = targets._replace(states=states)
    return targets


def base_answers(model: nn.Module, tokenizer, prompts: Sequence[list[int]], n: int, head) -> list[list[int]]:
    """The base's greedy answers of at most n tokens, end of turn included where it comes within them."""
    import mlx.core as mx
    from tqdm import tqdm

    from .generate import decode, stop_ids

    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return answers
    with tqdm(total=len(prompts), desc="answers", unit="q", file=sys.stdout, leave=False) as bar:
        chosen = decode(
            model, prompts, n, stop_ids(tokenizer), head=head, keep=lambda logits: np.array(mx.argmax(logits, axis=-1))
        )
        for batch in chosen:
            assert batch.kept is not None
            for row, tokens, every in zip(batch.rows, batch.tokens, batch.kept, strict=True):
                answers[row] = every[: len(tokens) + 1].tolist()
            bar.update(len(batch.rows))
    return answers


def frozen_states(
    model: nn.Module, prompts: Sequence[list[int]], words: Sequence[list[int]], n: int, settings: TrainSettings, head
) -> np.ndarray:
    """Hidden states [N, n, D] of the frozen model at the first n positions of given continuations.

    Those that the head reads, so that all V logits need not be kept; or, for methods of one layer, its output.
    """
    from .head import states_at
    from .lower import layer_output

    def of_layer(model, tokens: mx.array, positions: mx.array, cache, head) -> mx.array:
        return layer_output(model, parameters(settings)["layer"], tokens, positions, cache)

    read = of_layer if states_of(settings) == "layer" else states_at
    states: np.ndarray | None = None
    for rows, values in forced_logits(model, prompts, words, n, head, read=read):
        part = np.array(values)
        states = np.zeros((len(prompts), *part.shape[1:]), dtype=part.dtype) if states is None else states
        states[rows] = part
    assert states is not None
    return states
