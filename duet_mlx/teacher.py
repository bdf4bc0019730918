"""The teacher is read once, before training: top-K raw logits along its own greedy continuation.

python -m duet_mlx.teacher -c config.yaml     # builds the targets, prints teacher and base side by side
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .context import Context, check_fits, check_renders, render
from .data import Query, in_turn
from .errors import ConfigError, ContextError, TrainingError, run_cli
from .methods import METHODS

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from .train_settings import TrainSettings


class Targets(NamedTuple):
    """What training needs of the teacher, in NumPy: N queries, n positions, C candidates (K, or 2K for `union`)."""

    ids: np.ndarray  # [N, n, C] int32: the teacher's K by descending logit, then the base's new ones ascending
    logits: np.ndarray  # [N, n, C] float32, the teacher's raw logits of these
    candidate_mask: np.ndarray  # [N, n, C] bool
    position_mask: np.ndarray  # [N, n] bool
    continuation: np.ndarray  # [N, n-1] int32, the teacher's own greedy tokens
    states: np.ndarray | None = None  # [N, n, D], for methods that compare all V logits: what came into the head


def topk(logits, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of the last axis, [..., V] -> ids int32 and values [..., k], descending; ties: lower id first.

    In NumPy: MLX's partition does not say which of equal values it keeps, and on CPU it is ten times slower.
    """
    logits = np.array(logits)
    ids = np.zeros((*logits.shape[:-1], k), dtype=np.int32)
    for place in np.ndindex(logits.shape[:-1]):
        row = logits[place]
        least = np.partition(row, -k)[-k]
        above, level = np.flatnonzero(row > least), np.flatnonzero(row == least)
        chosen = np.sort(np.concatenate([above, level[: k - len(above)]]))
        if len(chosen) < k:  # NaN compares with nothing; the caller refuses what is not finite
            chosen = np.arange(k)
        ids[place] = chosen[np.argsort(-row[chosen], kind="stable")]
    return ids, np.take_along_axis(logits, ids, axis=-1)


def new_candidates(teacher_ids: np.ndarray, base_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The base's ids [..., K] that the teacher lacks, ascending, padded with id 0, and their mask [..., K]."""
    ids = np.zeros_like(base_ids)
    mask = np.zeros(base_ids.shape, dtype=bool)
    for place in np.ndindex(base_ids.shape[:-1]):
        new = np.setdiff1d(base_ids[place], teacher_ids[place])
        ids[place][: len(new)] = new
        mask[place][: len(new)] = True
    return ids, mask


def context_of(query: Query, contexts: Sequence[Context], retain_context: str) -> Context | None:
    """The context that the teacher reads before a query; None: the teacher is the base itself.

    Forget queries name theirs, the first by default. Retain queries under `teacher` take the contexts in turn,
    by their id, so that the choice hangs on the query alone.

    Raises:
        ContextError: a name that no context has.
    """
    if query.role != "forget":
        if retain_context == "none":
            return None
        return in_turn(query, contexts)
    if query.context is None:
        return contexts[0]
    for context in contexts:
        if context.name == query.context:
            return context
    names = ", ".join(context.name for context in contexts)
    raise ContextError(f"{query.id}: names the context {query.context!r}; there are {names}")


def rows_at_once(n: int, vocabulary: int) -> int:
    """Queries whose logits, n by V each, are held at once: 2^25 numbers are 128 MiB, enough for speed, at most 64."""
    return max(1, min(64, (1 << 25) // (n * vocabulary)))


def decoded_at_once(context: Context | None, n: int, vocabulary: int) -> int:
    """Queries that the teacher answers at once: more where it reads no context, for there only K logits are held."""
    from .generate import ROWS

    return rows_at_once(n, vocabulary) if context else ROWS


def forced_logits(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    n: int,
    head: nn.Module | None = None,
    progress: Callable[[int], object] | None = None,
    read: Callable[..., mx.array] | None = None,
) -> Iterator[tuple[np.ndarray, mx.array]]:
    """Logits of the first n positions of given continuations: rows and their [B, n, V], a batch at a time.

    Args:
        read: what to read instead of head.logits_at, with the same arguments.
    """
    import mlx.core as mx

    from .generate import batches, branch, can_branch, common_prefix, encode_prefix, pad, side_by_side
    from .head import logits_at

    read = read or logits_at
    length = common_prefix(prompts) if can_branch(model) else 0
    prefix = encode_prefix(model, prompts[0][:length]) if length else []
    mx.eval(prefix)
    sequences = [[*p[length:], *c[: n - 1]] for p, c in zip(prompts, continuations, strict=True)]

    def run(rows: np.ndarray) -> mx.array:
        last = np.array([len(sequences[row]) - 1 for row in rows])
        start = np.array([len(prompts[row]) - length - 1 for row in rows])
        positions = np.minimum(start[:, None] + np.arange(n), last[:, None])  # past the end: masked by the caller
        tokens = pad([sequences[row] for row in rows])
        return read(model, tokens, mx.array(positions), cache=branch(prefix, len(rows)) or None, head=head)

    for rows, logits in side_by_side(batches([len(s) for s in sequences], rows_at_once(n, 1 << 17), equal=False), run):
        if progress:
            progress(len(rows))
        yield rows, logits


def vocabulary_of(model: nn.Module, k: int) -> int:
    """V of a model that is to have k candidates at each position. Raises ConfigError: k over V."""
    import mlx.core as mx

    from .head import logits_at

    token = mx.array([[0]])
    vocabulary = logits_at(model, token, token).shape[-1]  # a shape, which takes no computation
    if not 1 <= k <= vocabulary:
        raise ConfigError(f"--top-k {k}: expected 1 to {vocabulary}, the model's vocabulary")
    return vocabulary


def teacher_targets(
    model: nn.Module,
    tokenizer,
    queries: Sequence[Query],
    contexts: Sequence[Context],
    settings: TrainSettings,
    head: nn.Module | None = None,
) -> Targets:
    """Targets of all queries, from the frozen base alone: the teacher's continuation, its top-K, the union.

    Args:
        model: the base, without LoRA.  contexts: at least one.
        settings: `positions` n, `top_k` K, `candidates`, `retain_context`.
        head: `check_head`'s head, or None for the model's own.

    Raises:
        ConfigError: K over V, n < 1.  ContextError: an unknown context, or one that cannot be rendered.
        TrainingError: the teacher's logits are not finite.
    """
    from tqdm import tqdm

    from .generate import decode, stop_ids

    n, k, count = settings.positions, settings.top_k, len(queries)
    if n < 1:
        raise ConfigError(f"--positions {n}: expected 1 or more")
    vocabulary = vocabulary_of(model, k)
    union = settings.candidates == "union"
    width = 2 * k if union else k
    ids = np.zeros((count, n, width), dtype=np.int32)
    logits = np.zeros((count, n, width), dtype=np.float32 if not _is_float64(model) else np.float64)
    candidate_mask = np.zeros((count, n, width), dtype=bool)
    candidate_mask[..., :k] = True
    position_mask = np.zeros((count, n), dtype=bool)
    continuation = np.zeros((count, n - 1), dtype=np.int32)

    groups: dict[Context | None, list[int]] = {}
    for index, query in enumerate(queries):
        groups.setdefault(context_of(query, contexts, settings.retain_context), []).append(index)
    stop = stop_ids(tokenizer)

    def best(values) -> np.ndarray:  # [..., V] -> [..., K] of ids and logits
        found = np.zeros((*values.shape[:-1], k), dtype=[("ids", np.int32), ("logits", logits.dtype)])
        found["ids"], found["logits"] = topk(values, k)
        return found

    with tqdm(total=count, desc="teacher", unit="q", file=sys.stdout, leave=False) as bar:
        for context, members in groups.items():
            for index in members[:1]:
                check_renders(tokenizer, queries[index].question, context)
            prompts = [render(tokenizer, queries[i].question, context) for i in members]
            size = decoded_at_once(context, n, vocabulary)
            for batch in decode(model, prompts, n, stop, size, head, keep=np.array if context else best):
                where, words = np.array(members)[batch.rows], [answer[: n - 1] for answer in batch.tokens]
                for row, answer in zip(where, words, strict=True):
                    continuation[row, : len(answer)] = answer
                    position_mask[row, : len(answer) + 1] = True  # the end of turn is supervised too
                assert batch.kept is not None
                found = best(batch.kept) if context else batch.kept
                ids[where, :, :k], logits[where, :, :k] = found["ids"], found["logits"]
                if union and context is not None:
                    # What must fall is what the base itself would say: its top K where it reads the teacher's words.
                    plain = [render(tokenizer, queries[i].question) for i in where]
                    for rows, values in forced_logits(model, plain, words, n, head=head):
                        new = new_candidates(ids[where[rows], :, :k], topk(values, k)[0])
                        ids[where[rows], :, k:], candidate_mask[where[rows], :, k:] = new
                    logits[where, :, k:] = np.take_along_axis(batch.kept, ids[where, :, k:], axis=-1)
                bar.update(len(where))
    # Nothing unmasked may depend on what stands under a mask.
    candidate_mask &= position_mask[..., None]
    ids[~candidate_mask] = 0
    logits[~candidate_mask] = 0
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=(1, 2)))
    if len(bad):
        raise TrainingError(f"{queries[bad[0]].id}: the teacher's logits are not finite ({len(bad)} such queries)")
    return Targets(ids, logits, candidate_mask, position_mask, continuation)


def _is_float64(model: nn.Module) -> bool:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    return any(array.dtype == mx.float64 for _, array in tree_flatten(model.parameters()))


def check_lengths(tokenizer, queries: Sequence[Query], contexts, settings, window: int) -> None:
    """Raise DataError for a question that, with its context and the supervised positions, overruns the window."""
    positions = settings.positions if contexts else settings.answer_tokens  # without contexts, along an answer
    for query in queries:
        context = context_of(query, contexts, settings.retain_context) if contexts else None
        bare, whole = (len(render(tokenizer, query.question, c, place=query.place)) for c in (None, context))
        for name, tokens, limit in (
            ("--max-seq-length", bare, settings.max_seq_length),
            ("the model's window", whole, window),
        ):
            if bare > limit:
                way_out = "shorten or drop the question"
            elif context and tokens > limit:
                way_out = f'{bare} of them are the question: shorten the context "{context.name}"'
            else:
                flag = "--positions" if contexts else "--answer-tokens"
                way_out = f"lower {flag} to {limit - tokens + 1}, or shorten what is asked"
            check_fits(query.place or query.id, query.question, tokens, positions, name, limit, way_out)


def main() -> None:
    """Build the targets and show what the teacher says: the student can become no better than this."""
    from .train import parse_settings, prepare

    settings = replace(parse_settings("python -m duet_mlx.teacher", __doc__ or ""), resume_adapter_file=None)
    if METHODS[settings.method].labels != "teacher":
        raise ConfigError(f"--method {settings.method} has no teacher: it is trained on answers")
    if settings.dry_run:
        from .dry_run import dry_run

        return dry_run(settings)
    # The targets beside an adapter are those that it was trained on: they are looked at, never replaced.
    prepared = prepare(settings, keep=not (Path(settings.adapter_path) / "adapters.safetensors").exists())
    from .generate import greedy, stop_ids
    from .metrics import is_refusal

    tokenizer, stop = prepared.tokenizer, stop_ids(prepared.tokenizer)
    shown = [
        q for role in ("forget", "retain", "neighbour") for q in [p for p in prepared.queries if p.role == role][:8]
    ]
    columns = []
    for retain in (settings.retain_context, None):
        prompts = [
            render(tokenizer, q.question, context_of(q, prepared.contexts, retain) if retain else None) for q in shown
        ]
        columns.append([tokenizer.decode(a) for a in greedy(prepared.model, prompts, 32, stop, head=prepared.head)])
    for query, teacher, base in zip(shown, *columns, strict=True):
        print(f"\n[{query.role}] {query.question}\n   teacher: {teacher.strip()!r}\n   base:    {base.strip()!r}")
    forget = [is_refusal(teacher) for query, teacher in zip(shown, columns[0], strict=True) if query.role == "forget"]
    print(
        f"\n{len(shown)} of {len(prepared.queries)} questions are shown. The teacher refuses {sum(forget)} of the "
        f"{len(forget)} forget questions here, and the student can become no better: if that is too few, change the "
        "context (below a billion parameters: --context refuse-all)."
    )


if __name__ == "__main__":
    run_cli(main)
