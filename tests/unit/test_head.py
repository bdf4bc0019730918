"""The K-row head: what it gathers, what still applies after it, when it is refused."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from duet_mlx.head import check_head, find_head, head_rows, logits_at
from tests.equivalence.tiny import VOCABULARY, llama

TOKENS = mx.array([[1, 2, 3, 4]])
POSITIONS = mx.array([[1, 3]])
IDS = mx.array([[[5, 0, 5], [VOCABULARY - 1, 7, 2]]])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_gathered_logits_are_those_of_the_full_head(tied, quantized):
    model = llama(tied=tied)
    if quantized:
        nn.quantize(model, group_size=32, bits=4)
    head, reason = check_head(model, TOKENS)
    assert head is find_head(model) and not reason
    full = logits_at(model, TOKENS, POSITIONS)
    assert full.shape == (1, 2, VOCABULARY) and full.dtype == mx.float32
    got = logits_at(model, TOKENS, POSITIONS, IDS, head=head)
    np.testing.assert_allclose(np.array(got), np.array(mx.take_along_axis(full, IDS, axis=-1)), atol=1e-4)
    np.testing.assert_allclose(np.array(logits_at(model, TOKENS, POSITIONS, head=head)), np.array(full), atol=1e-4)


def test_a_heads_bias_is_gathered_with_its_rows():
    model = llama(tied=False)
    model.lm_head.bias = mx.arange(VOCABULARY).astype(mx.float32)
    head, reason = check_head(model, TOKENS)
    assert head is model.lm_head, reason


def test_what_a_pass_gathered_is_given_back_without_waiting_for_pythons_collector():
    model = llama()
    head, _ = check_head(model, TOKENS)

    def gather() -> None:
        mx.eval(logits_at(model, TOKENS, POSITIONS, mx.zeros((1, 2, 50_000), dtype=mx.int32), head=head))

    gather()  # cuBLAS takes its workspace, and keeps it
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        for _ in range(3):
            gather()
        assert mx.get_active_memory() - before < 100_000
    finally:
        gc.enable()


def test_half_precision_meets_in_float32():
    """bf16 has steps of 0.125 at a logit of 20; the gathered product must not."""
    model = llama(dtype=mx.bfloat16)
    head, _ = check_head(model, TOKENS)
    got = logits_at(model, TOKENS, POSITIONS, IDS, head=head)
    assert got.dtype == mx.float32
    hidden = model.model(TOKENS)[0, POSITIONS[0]].astype(mx.float32)  # [n, D]
    rows = model.model.embed_tokens.weight[IDS[0]].astype(mx.float32)  # [n, C, D]
    np.testing.assert_allclose(np.array(got)[0], np.einsum("ncd,nd->nc", np.array(rows), np.array(hidden)), rtol=1e-5)


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_other_quantization_modes_are_gathered_as_well(mode, bits, group_size):
    linear = nn.Linear(64, 9, bias=False).to_quantized(group_size=group_size, bits=bits, mode=mode)
    ids = mx.array([[3, 3, 8]])
    whole = mx.dequantize(linear.weight, linear.scales, None, group_size=group_size, bits=bits, mode=mode)
    rows, bias = head_rows(linear, ids)
    assert bias is None
    np.testing.assert_array_equal(np.array(rows.astype(mx.float32)), np.array(whole.astype(mx.float32))[np.array(ids)])


def test_what_comes_after_the_head_still_applies():
    """As Gemma 2 does, which caps its logits softly after the tied embedding."""

    class Capped(type(llama())):
        def __call__(self, tokens, cache=None):
            return 0.5 * mx.tanh(super().__call__(tokens, cache=cache) / 0.5)

    model = llama()
    model.__class__ = Capped
    head, reason = check_head(model, TOKENS)
    assert head is not None, reason
    ids = mx.arange(VOCABULARY)[None, None]
    got = logits_at(model, TOKENS, mx.array([[2]]), ids, head=head)
    assert 0.3 < mx.abs(got).max().item() <= 0.5
    np.testing.assert_allclose(np.array(got), np.array(model(TOKENS)[:, 2:3]), atol=1e-5)


class ByHand(nn.Module):
    """A model that multiplies by the embedding's transpose itself: the swap cannot reach it."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 8)

    def __call__(self, tokens, cache=None):
        return self.embed_tokens(tokens) @ self.embed_tokens.weight.T


def test_a_model_that_misses_the_swap_takes_the_full_head_and_says_why():
    model = ByHand()
    head, reason = check_head(model, TOKENS)
    assert head is None and reason
    got = logits_at(model, TOKENS, POSITIONS, mx.array([[[1], [2]]]))
    np.testing.assert_array_equal(np.array(got)[0, :, 0], np.array(model(TOKENS))[0, [1, 3], [1, 2]])


def test_a_head_that_gives_other_numbers_is_refused():
    class Fickle(type(llama())):
        """Doubles its logits where its embedding is what it was."""

        def __call__(self, tokens, cache=None):
            untouched = type(self.model.embed_tokens) is nn.Embedding
            return super().__call__(tokens, cache=cache) * (2.0 if untouched else 1.0)

    model = llama()
    model.__class__ = Fickle
    head, reason = check_head(model, TOKENS)
    assert head is None and "differ by" in reason


def test_a_model_that_counts_on_all_of_its_logits_is_refused_and_says_why():
    class Reshaping(type(llama())):
        def __call__(self, tokens, cache=None):
            return super().__call__(tokens, cache=cache).reshape(*tokens.shape, VOCABULARY)

    model = llama()
    model.__class__ = Reshaping
    head, reason = check_head(model, TOKENS)
    assert head is None and "does not fit this architecture" in reason


def test_no_head_by_name_takes_the_full_head():
    class Nameless(nn.Module):
        def __init__(self):
            super().__init__()
            self.strange = nn.Linear(4, 4)

    assert find_head(Nameless()) is None
    assert check_head(Nameless(), TOKENS) == (None, "no head or tied embedding found by name")


def test_the_head_is_itself_again_after_use_and_after_an_error():
    model = llama()
    head, _ = check_head(model, TOKENS)
    names = sorted(model.parameters())
    with pytest.raises(ValueError):
        logits_at(model, TOKENS, mx.array([[[0]]]), head=head)  # one dimension too many
    assert type(head) is nn.Embedding and sorted(model.parameters()) == names
