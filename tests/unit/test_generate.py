"""Greedy decoding: batches, the shared prefix, stop tokens, ties, caches that cannot be shared."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gemma2
from mlx_lm.models.cache import make_prompt_cache

from duet_mlx import generate
from duet_mlx.generate import (
    batches,
    can_branch,
    common_prefix,
    decode,
    encode_prefix,
    greedy,
    pad,
    stop_ids,
    takes_row_masks,
)
from tests.equivalence.tiny import llama, tokenizer

PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 6], [1, 2, 3, 7, 8, 9, 10], [1, 2, 9]]


def model_of_many_words():
    """Its answers to PROMPTS vary; those of seed 0 repeat a token, whatever is masked."""
    return llama(1)


def by_argmax(model, prompt, count, stop):
    """The plain loop, a whole pass for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        token = mx.argmax(model(mx.array([tokens]))[0, -1]).item()
        if token in stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("size", [1, 2, 64])
def test_batches_change_no_answer(size):
    model = model_of_many_words()
    assert greedy(model, PROMPTS, 6, {0}, batch_size=size) == [by_argmax(model, p, 6, {0}) for p in PROMPTS]


def test_prompts_with_nothing_in_common_and_equal_prompts():
    model = llama()
    for prompts in ([[3, 4], [5]], [[7]], [[1, 2], [1, 2], [1, 2]]):
        assert greedy(model, prompts, 4, set()) == [by_argmax(model, p, 4, set()) for p in prompts]


def test_an_answer_is_cut_before_its_stop_token_and_others_go_on():
    model = model_of_many_words()
    free = greedy(model, PROMPTS, 6, set())
    stop = {free[0][2]}
    got = greedy(model, PROMPTS, 6, stop)
    for answer, whole in zip(got, free, strict=True):
        cut = next((i for i, token in enumerate(whole) if token in stop), 6)
        assert answer == whole[:cut]
    assert len(got[0]) <= 2


def test_nothing_to_do_is_done():
    model = llama()
    assert greedy(model, [], 5, {0}) == []
    assert greedy(model, PROMPTS, 0, {0}) == [[]] * 4


def test_equal_logits_give_the_lower_id():
    model = llama(tied=False)
    model.lm_head.weight = mx.zeros_like(model.lm_head.weight)
    assert greedy(model, PROMPTS, 2, set()) == [[0, 0]] * 4


def test_each_prompt_has_a_limit_of_its_own():
    model = model_of_many_words()
    limits = [5, 1, 3, 2]
    expected = [by_argmax(model, p, n, {0}) for p, n in zip(PROMPTS, limits, strict=True)]
    assert greedy(model, PROMPTS, limits, {0}, batch_size=3) == expected


@pytest.mark.parametrize("size", [3, 64])  # 64: prompts of 5 and 7 tokens are decoded side by side, one padded
def test_what_is_kept_are_the_logits_that_each_token_and_the_stop_came_from(size):
    model = model_of_many_words()
    stop = {greedy(model, PROMPTS, 6, set())[0][2]}
    for batch in decode(model, PROMPTS, 6, stop, batch_size=size, keep=np.array):
        for row, tokens, kept in zip(batch.rows, batch.tokens, batch.kept, strict=True):
            sequence, start = PROMPTS[row] + tokens, len(PROMPTS[row]) - 1
            chosen = len(tokens) + (len(tokens) < 6)  # the stop token is one more
            logits = np.array(model(mx.array([sequence]))[0, start : start + chosen])
            np.testing.assert_allclose(kept[:chosen], logits, atol=1e-4)
            assert not kept[chosen:].any()


def test_progress_counts_every_prompt_once():
    seen = []
    greedy(llama(), PROMPTS, 3, {0}, batch_size=3, progress=seen.append)
    assert sum(seen) == len(PROMPTS)


def test_a_cache_that_rotates_is_not_shared_and_answers_are_the_same():
    model = llama(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    assert not can_branch(model) and can_branch(llama())
    prompts = [[1, 2, 3], [4, 5, 6], [1, 2, 3, 4, 5, 6, 7]]
    assert greedy(model, prompts, 5, set()) == [by_argmax(model, p, 5, set()) for p in prompts]


@pytest.mark.parametrize("size", [1, 2, 4, 64])
def test_where_attention_takes_one_mask_for_all_rows_no_answer_hangs_on_the_other_rows(size):
    """mlx_lm/models/gemma2.py. As many rows as heads of keys, here two, would fit a mask by row, wrongly."""
    mx.random.seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=64, vocab_size=32, query_pre_attn_scalar=1)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    model = gemma2.Model(gemma2.ModelArgs("gemma2", rms_norm_eps=1e-5, **sizes, **heads))
    assert can_branch(model) and not takes_row_masks(model) and takes_row_masks(llama())
    assert greedy(model, PROMPTS, 6, {0}, batch_size=size) == [by_argmax(model, p, 6, {0}) for p in PROMPTS]


def test_the_prefix_leaves_a_token_to_each():
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix([[1, 2], [1, 2, 3]]) == 1
    assert common_prefix([[1], [2]]) == 0


@pytest.mark.parametrize("piece", [1, 2, 256])
def test_the_prefix_is_what_a_models_own_cache_holds(piece, monkeypatch):
    monkeypatch.setattr(generate, "PIECE", piece)
    model = llama()
    prefix = encode_prefix(model, [1, 2, 3])
    cache = make_prompt_cache(model)
    model(mx.array([[1, 2, 3]]), cache=cache)
    for (keys, values), entry in zip(prefix, cache, strict=True):
        np.testing.assert_allclose(np.array(keys), np.array(entry.keys[..., :3, :]), atol=1e-6)
        np.testing.assert_allclose(np.array(values), np.array(entry.values[..., :3, :]), atol=1e-6)


def test_batches_are_shortest_first_and_of_one_length_where_asked():
    lengths = [5, 1, 3, 3, 1]
    assert [b.tolist() for b in batches(lengths, 2, equal=False)] == [[1, 4], [2, 3], [0]]
    assert [b.tolist() for b in batches([2, 1, 2, 2], 2, equal=True)] == [[1], [0, 2], [3]]


def test_padding_and_stop_ids():
    assert pad([[1, 2], [3]], 4).tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]]
    assert stop_ids(tokenizer()) == {0}
