"""What must change nothing, on a tiny model: padding, company in a batch, shared prefix, gathered head.

In float32 the backend's own kernels run; in float64 rounding is so small that nothing else can hide in it. A query's
loss is a sum of C Huber terms whose slope is δ = 1 at most, so it may move by C times what its logits may.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from duet_mlx import generate, lower
from duet_mlx.context import Context, render
from duet_mlx.data import Query
from duet_mlx.errors import TrainingError
from duet_mlx.head import check_head, logits_at
from duet_mlx.kept_states import KeptStates
from duet_mlx.labels import base_answers
from duet_mlx.losses import topk_huber
from duet_mlx.lower import LENT, run_lower
from duet_mlx.model import adapter_parameters, add_lora, lora_keys, weights_hash
from duet_mlx.stream import Stream
from duet_mlx.teacher import Targets, teacher_targets
from duet_mlx.train import TrainSettings, make_optimizer, make_step
from reference import teacher as ref
from tests.equivalence.tiny import FLOAT32, FLOAT64, VOCABULARY, duet_loss, llama, plain_logits, shared, tokenizer
from tests.reference.exact_float64 import exact_float64

TOKENIZER = tokenizer()
CONTEXT = Context("shy", "Say nothing.", (("Who?", "No."),))
precisions = pytest.mark.parametrize("dtype", [mx.float32, mx.float64])
prompts = st.lists(st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=7), min_size=1, max_size=4)
seeds = st.integers(0, 2**32)
# Of seven, in attention before and behind the scores, and in the MLP; whole runs draw any of them (twins.py).
KEYS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]


def student(dtype: Any, tied: bool = True, trained: bool = True) -> nn.Module:
    """The tiny model with LoRA in every layer; `trained`: away from the base."""
    model = llama(tied=tied, dtype=dtype)
    add_lora(model, -1, rank=2, scale=2.0, dropout=0.0, keys=KEYS)
    for index, (name, value) in enumerate(adapter_parameters(model).items()):
        random = mx.random.normal(value.shape, key=mx.random.key(index))
        new = 0.3 * random if trained or name.endswith("lora_a") else mx.zeros(value.shape)
        model.load_weights([(name, new.astype(dtype))], strict=False)
    mx.eval(model.parameters())
    return model


with mx.stream(mx.cpu):
    STUDENTS = {(dtype, tied): student(dtype, tied) for dtype in (mx.float32, mx.float64) for tied in (True, False)}
    SAME_AS_BASE = {dtype: student(dtype, trained=False) for dtype in (mx.float32, mx.float64)}
    BASES = {dtype: llama(dtype=dtype) for dtype in (mx.float32, mx.float64)}
    STEPPING = student(mx.float64)  # takes steps; where it started is in STUDENTS, the same numbers
HEADS: dict[int, nn.Module] = {}


def head_of(model: nn.Module) -> nn.Module:
    """The K-row head of one of these models, which is checked once."""
    if id(model) not in HEADS:
        head, reason = check_head(model, mx.array([[1, 2, 3]]))
        assert head is not None, reason
        HEADS[id(model)] = head
    return HEADS[id(model)]


def rounding(dtype: Any, size: float = 1.0) -> float:
    return (FLOAT32 if dtype == mx.float32 else FLOAT64) * max(1.0, size)


def random_targets(rng: np.random.Generator, count: int, n: int, width: int, dtype: Any) -> Targets:
    """Targets of some queries, their continuations of unlike length."""
    supervised = rng.integers(1, n + 1, size=count)
    position_mask = np.arange(n) < supervised[:, None]
    ids = np.argsort(rng.random((count, n, VOCABULARY)), axis=-1)[..., :width].astype(np.int32)
    logits = rng.normal(size=ids.shape).astype(np.float32 if dtype == mx.float32 else np.float64)
    mask = (rng.random(ids.shape) < 0.8) & position_mask[..., None]
    words = rng.integers(1, VOCABULARY, size=(count, n - 1)) * position_mask[:, 1:]
    return Targets(np.where(mask, ids, 0), np.where(mask, logits, 0), mask, position_mask, words.astype(np.int32))


@precisions
@given(
    rows=prompts, seed=seeds, n=st.integers(1, 3), width=st.integers(1, 8), tied=st.booleans(), more=st.integers(0, 9)
)
@shared(2)
def test_a_querys_loss_hangs_on_nothing_but_itself(
    dtype: Any, rows: list[list[int]], seed: int, n: int, width: int, tied: bool, more: int
) -> None:
    """Alone without padding, prefix, or gathered head, against the whole batch, padded, with each of these."""
    with exact_float64():
        model = STUDENTS[dtype, tied]
        start = rows[0][: seed % 4]
        asked = [start + row for row in rows]
        targets = random_targets(np.random.default_rng(seed), len(asked), n, width, dtype)
        head = head_of(model)
        plain = Stream(asked, targets, 0)
        alone = [
            duet_loss(model, plain.batch(np.array([i])), [], None, 1.0, False)[0].item() for i in range(len(asked))
        ]
        tolerance = width * rounding(dtype, 20)
        for prefix in {0, generate.common_prefix(asked)}:
            for chosen in (head, None):
                batch = Stream(asked, targets, prefix).batch(np.arange(len(asked)))
                batch = batch._replace(tokens=mx.pad(batch.tokens, ((0, 0), (0, more))))
                cache = None
                if prefix:
                    cache = generate.branch(generate.encode_prefix(model, asked[0][:prefix]), len(asked))
                logits = logits_at(model, batch.tokens, batch.positions, batch.ids, cache=cache, head=chosen)
                losses = np.array(topk_huber(logits, batch, 1.0))
                np.testing.assert_allclose(losses, alone, rtol=0, atol=tolerance)
                total, count = duet_loss(model, batch, asked[0][:prefix], chosen, 1.0, False)
                assert count == len(asked)
                assert total.item() == pytest.approx(sum(alone), abs=count * tolerance)


def upper_student(dtype: Any, tied: bool) -> nn.Module:
    """Four layers, the last two adapted."""
    model = llama(tied=tied, dtype=dtype, num_hidden_layers=4)
    add_lora(model, 2, rank=2, scale=2.0, dropout=0.0, keys=KEYS)
    for index, (name, value) in enumerate(adapter_parameters(model).items()):
        model.load_weights(
            [(name, (0.3 * mx.random.normal(value.shape, key=mx.random.key(index))).astype(dtype))], False
        )
    return model


with mx.stream(mx.cpu):
    UPPER = {(dtype, tied): upper_student(dtype, tied) for dtype in (mx.float32, mx.float64) for tied in (True, False)}


@precisions
@given(rows=prompts, seed=seeds, n=st.integers(1, 3), width=st.integers(1, 8), tied=st.booleans())
@shared(2)
def test_layers_run_once_give_the_loss_and_gradient_of_layers_run_each_time(
    dtype: Any, rows: list[list[int]], seed: int, n: int, width: int, tied: bool
) -> None:
    with exact_float64():
        model = UPPER[dtype, tied]
        asked = [rows[0][: seed % 4] + row for row in rows]
        targets = random_targets(np.random.default_rng(seed), len(asked), n, width, dtype)
        head = head_of(model)
        for length in {0, generate.common_prefix(asked)}:
            prefix, stream = asked[0][:length], Stream(asked, targets, length)

            def both(below: Any, stream: Stream = stream, prefix: list[int] = prefix) -> tuple[float, dict]:
                batch = stream.batch(np.arange(len(asked)))
                value, gradient = nn.value_and_grad(
                    model, lambda model: duet_loss(model, batch, prefix, head, 1.0, True, below)[0]
                )(model)
                return value.item(), dict(tree_flatten(gradient))

            loss, gradient = both(None)
            below = run_lower(model, 2, prefix, [stream])
            assert below is not None and stream.hidden is not None
            again, once = both(below)
            size = len(asked) * width * n
            assert again == pytest.approx(loss, abs=size * rounding(dtype, 20))
            assert once.keys() == gradient.keys()
            largest = max(np.abs(np.array(g)).max() for g in gradient.values())
            for name, value in gradient.items():
                np.testing.assert_allclose(
                    np.array(once[name]), np.array(value), rtol=0, atol=size * rounding(dtype, 20 * largest)
                )
        assert len(model.layers) == 4  # nothing stays stood in for


def test_states_from_the_lower_layers_are_lent_for_the_same_words_and_base_alone_and_not_for_ever(capsys: Any) -> None:
    model, earlier = upper_student(mx.float32, True), {}

    def states(last: int, base: str = "one") -> KeptStates:
        stream = Stream([[1, 2, last]], random_targets(np.random.default_rng(0), 1, 1, 2, mx.float32), 0)
        run_lower(model, 2, [], [stream], earlier=earlier, base=base)
        assert stream.hidden is not None and len(earlier) <= LENT
        return stream.hidden

    first = states(0)
    assert states(0) is first and states(0, "another base") is not first
    for last in range(1, LENT):
        states(last)
    assert states(0) is not first and states(LENT - 1) is not None
    assert capsys.readouterr().out.count("were run before") == 2
    np.testing.assert_array_equal(np.array(first.batch([0], 3)), np.array(states(0).batch([0], 3)))


def test_where_the_disk_is_full_states_of_earlier_runs_make_room(monkeypatch: Any) -> None:
    model, earlier, run = upper_student(mx.float32, True), {}, lower.hidden_states

    def hidden_states(*asked: Any) -> Any:
        if earlier or full:
            raise TrainingError("no space left")
        return run(*asked)

    def states(last: int) -> None:
        stream = Stream([[1, 2, last]], random_targets(np.random.default_rng(0), 1, 1, 2, mx.float32), 0)
        run_lower(model, 2, [], [stream], earlier=earlier)

    monkeypatch.setattr(lower, "hidden_states", hidden_states)
    full = False
    states(0)
    states(1)
    assert len(earlier) == 1
    full = True
    with pytest.raises(TrainingError):
        states(2)
    assert not earlier


def test_layers_below_are_run_in_each_step_where_the_architecture_does_not_allow_otherwise(capsys: Any) -> None:
    model = upper_student(mx.float32, True)
    stream = Stream([[1, 2, 3]], random_targets(np.random.default_rng(0), 1, 1, 2, mx.float32), 0)
    assert run_lower(model, 0, [], [stream]) is None  # all layers are adapted

    class Counting(type(model.model)):  # type: ignore[misc]
        """Its output hangs on how many layers there are."""

        def __call__(self, *args: Any, **more: Any) -> mx.array:
            return super().__call__(*args, **more) * len(self.layers)

    model.model.__class__ = Counting
    assert run_lower(model, 2, [], [stream]) is None and stream.hidden is None
    assert "layers 0 to 1 are run in every step (logits differ" in capsys.readouterr().out


@precisions
@given(seed=seeds, n=st.integers(1, 3), mode=st.sampled_from(["teacher", "union"]))
@shared(2)
def test_a_querys_targets_hang_on_nothing_but_itself(dtype: Any, seed: int, n: int, mode: str) -> None:
    rng = np.random.default_rng(seed)
    asked = [
        Query(f"q{i}", "".join(rng.choice(list("abcd ef?"), size=rng.integers(1, 9))) + "?", role)
        for i, role in enumerate(rng.choice(["forget", "retain"], size=3))
    ]
    settings = TrainSettings(top_k=4, candidates=mode, positions=n, retain_context="teacher")
    with exact_float64():
        model = BASES[dtype]
        head = head_of(model)
        together = teacher_targets(model, TOKENIZER, asked, [CONTEXT], settings, head)
        for i, query in enumerate(asked):
            alone = teacher_targets(model, TOKENIZER, [query], [CONTEXT], settings)
            if dtype == mx.float64:  # in float32 two logits may be nearer to each other than rounding
                np.testing.assert_array_equal(alone.ids[0], together.ids[i])
                np.testing.assert_array_equal(alone.continuation[0], together.continuation[i])
            if (alone.continuation[0] == together.continuation[i]).all():
                np.testing.assert_allclose(
                    np.sort(alone.logits[0, :, :4]),
                    np.sort(together.logits[i, :, :4]),
                    rtol=0,
                    atol=rounding(dtype, 10),
                )
                np.testing.assert_array_equal(alone.position_mask[0], together.position_mask[i])


@precisions
@given(rows=prompts, count=st.integers(1, 5), size=st.integers(1, 3), seed=seeds)
@shared(2)
def test_greedy_in_batches_is_greedy_alone_and_the_references(
    dtype: Any, rows: list[list[int]], count: int, size: int, seed: int
) -> None:
    """Compared up to the first step whose two best logits are nearer than rounding: there either may win."""
    with exact_float64():
        model, stop = BASES[dtype], {0, seed % VOCABULARY}
        asked = [rows[0][: seed % 3] + row for row in rows]
        head = head_of(model)
        got = generate.greedy(model, asked, count, stop, batch_size=size, head=head)
        for prompt, answer in zip(asked, got, strict=True):
            gaps = []

            def next_logits(tokens: list[int], gaps: list[float] = gaps) -> np.ndarray:
                logits = plain_logits(model, tokens)[-1]
                gaps.append(np.diff(np.sort(logits)[-2:])[0])
                return logits

            expected = ref.greedy(next_logits, prompt, count, stop)
            close = [i for i, gap in enumerate(gaps) if gap < 2 * rounding(dtype, 10)]
            sure = close[0] if close else count
            assert answer[:sure] == expected[:sure]


@given(rows=prompts, n=st.integers(1, 4), seed=seeds)
def test_the_bases_answers_are_greedy_to_the_end_of_turn_which_is_a_part_of_them(
    rows: list[list[int]], n: int, seed: int
) -> None:
    """A turn ends with a word that the first answer has, so that some answer ends."""
    with exact_float64():
        model = BASES[mx.float64]

        def said(prompt: list[int], stop: Any = ()) -> list[int]:
            return ref.greedy(lambda tokens: plain_logits(model, tokens)[-1], prompt, n, stop)

        ending = TokenizerWrapper(TOKENIZER._tokenizer, eos_token_ids=[said(rows[0])[seed % n]])
        stop = generate.stop_ids(ending)
        for prompt, answer in zip(rows, base_answers(model, ending, rows, n, head_of(model)), strict=True):
            assert answer == said(prompt)[: len(said(prompt, stop)) + 1]


@precisions
@given(
    text=st.text(alphabet="abcd ?", min_size=1, max_size=8).filter(str.strip), n=st.integers(1, 3), center=st.booleans()
)
@shared(2)
def test_an_empty_context_and_a_fresh_adapter_give_no_loss_and_no_gradient(
    dtype: Any, text: str, n: int, center: bool
) -> None:
    asked = [Query("a", text, "forget"), Query("b", "a" + text, "retain")]
    settings = TrainSettings(top_k=5, positions=n, retain_context="teacher")
    with exact_float64():
        model = SAME_AS_BASE[dtype]
        targets = teacher_targets(BASES[dtype], TOKENIZER, asked, [Context("empty")], settings)
        batch = Stream([render(TOKENIZER, q.question) for q in asked], targets, 0).batch(np.arange(2))

        def loss(model: nn.Module) -> mx.array:
            return duet_loss(model, batch, [], None, 1.0, center)[0]

        value, gradient = nn.value_and_grad(model, loss)(model)
        error = rounding(dtype, 10)  # of a logit
        assert value.item() <= 2 * 10 * error**2
        # Behind the loss each logit difference, of that size, meets activations and weights of order 10.
        norm = max(mx.abs(g).max().item() for _, g in tree_flatten(gradient))
        assert norm <= 2 * 10 * 100 * error


@given(seed=seeds)
def test_all_candidates_without_delta_are_half_the_squared_error_of_all_logits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    asked = [Query(f"{i}", "".join(rng.choice(list("abc?"), size=i + 1)), "forget") for i in range(2)]
    settings = TrainSettings(top_k=VOCABULARY, candidates="teacher", positions=1)
    with exact_float64():
        model, base = STUDENTS[mx.float64, True], BASES[mx.float64]
        targets = teacher_targets(base, TOKENIZER, asked, [CONTEXT], settings)
        plain = [render(TOKENIZER, q.question) for q in asked]
        total, _ = duet_loss(model, Stream(plain, targets, 0).batch(np.arange(2)), [], None, float("inf"), False)
        errors = [
            plain_logits(model, x)[-1] - plain_logits(base, render(TOKENIZER, q.question, CONTEXT))[-1]
            for x, q in zip(plain, asked, strict=True)
        ]
        assert total.item() == pytest.approx(0.5 * sum((e**2).sum() for e in errors), rel=1e-9)


@given(quantized=st.booleans(), seed=seeds)
@example(quantized=False, seed=754)  # masks that leave no candidate, had they not been lifted below
def test_lora_and_training_steps_leave_the_bases_hash_as_it_was(quantized: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = llama(seed % 1000, num_hidden_layers=1)
    if quantized:
        nn.quantize(model, group_size=32, bits=4)
    before = weights_hash(model)
    add_lora(model, -1, rank=2, scale=2.0, dropout=0.0, keys=lora_keys(model))
    assert weights_hash(model) == before
    started = {k: np.array(v) for k, v in adapter_parameters(model).items()}
    settings = TrainSettings(iters=3, learning_rate=0.01)
    optimizer = make_optimizer(settings)
    optimizer.init(model.trainable_parameters())
    targets = random_targets(rng, 2, 2, 3, mx.float32)
    targets = targets._replace(candidate_mask=np.repeat(targets.position_mask[..., None], 3, axis=-1))
    stream = Stream([[1, 2, 3], [4, 5]], targets, 0)
    step = make_step(model, optimizer, lambda m, b: duet_loss(m, b, [], None, 1.0, True), settings, compiled=False)
    for _ in range(2):
        mx.eval(step(stream.batch(np.arange(2)), None, 1), model.trainable_parameters())
    assert weights_hash(model) == before
    now = adapter_parameters(model)
    assert any((np.array(now[k]) != v).any() for k, v in started.items())
    assert now.keys() == started.keys() == dict(tree_flatten(model.trainable_parameters())).keys()


def test_lora_on_the_embedding_leaves_the_bases_hash_as_it_was() -> None:
    """mlx-lm wraps an embedding under another name than a linear module."""
    model = llama()
    before = weights_hash(model)
    add_lora(model, -1, rank=2, scale=2.0, dropout=0.0, keys=["model.embed_tokens"])
    assert sorted(adapter_parameters(model)) == ["model.embed_tokens.lora_a", "model.embed_tokens.lora_b"]
    assert weights_hash(model) == before


def test_the_hash_sees_a_single_changed_bit_of_the_base() -> None:
    model = llama()
    before = weights_hash(model)
    weight = np.array(model.model.norm.weight)
    weight.view(np.uint32)[3] ^= 1
    model.model.norm.weight = mx.array(weight)
    assert weights_hash(model) != before


@given(every=st.integers(2, 3), seed=seeds)
def test_accumulated_steps_are_one_step_of_the_mean_gradient(every: int, seed: int) -> None:
    """Batches of equal size, one after the other without an update, then one batch of them all."""
    rng = np.random.default_rng(seed)
    asked = [rng.integers(1, VOCABULARY, size=4).tolist() for _ in range(2 * every)]
    model, started = STEPPING, adapter_parameters(STUDENTS[mx.float64, True])
    with exact_float64():
        stream = Stream(asked, random_targets(rng, len(asked), 2, 3, mx.float64), 0)
        moved = []
        for parts in (every, 1):
            model.load_weights(list(started.items()), strict=False)
            settings = TrainSettings(iters=1, grad_accumulation_steps=parts, learning_rate=0.01)
            optimizer = make_optimizer(settings)
            optimizer.init(model.trainable_parameters())
            step = make_step(model, optimizer, lambda m, b: duet_loss(m, b, [], None, 1.0, True), settings, False)
            carried = None
            for i, rows in enumerate(np.array_split(np.arange(len(asked)), parts)):
                _, _, carried = step(stream.batch(rows), carried, parts if i + 1 == parts else 0)
            moved.append(tree_flatten(optimizer.state))
            assert carried is None
        for (name, one), (_, other) in zip(*moved, strict=True):
            if name.endswith((".m", ".v")):  # of the gradient and of its square: no division that magnifies rounding
                np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-7, atol=1e-12, err_msg=name)
