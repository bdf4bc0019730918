"""Architectures of mlx-lm, tiny and with random weights: targets, training, saving, and loading by mlx-lm itself.

The target logits are compared with a bare call on one sequence: no batch, padding, shared prefix or gathered head.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import MODEL_REMAPPING, save_config, save_model

from duet_mlx.context import render
from duet_mlx.model import adapter_parameters
from duet_mlx.teacher import context_of
from duet_mlx.train import Prepared, TrainSettings, parse_settings, prepare, train
from tests.tiny_model import tiny_data, tiny_model

D, F, LAYERS, K, POSITIONS = 64, 128, 2, 5, 3  # F: the width inside an MLP
COMMON = {
    "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
WHOLE_PROMPTS = "note: each prompt is read whole"
ONE_LENGTH = "note: only prompts of one length are decoded together"
FULL_HEAD = "note: full head instead of K rows"
EACH_STEP = "note: layers 0 to 0 are run in every step"


class Family(NamedTuple):
    """What config.json has beside COMMON, and the notes that a run begins with."""

    config: dict[str, Any] = {}
    notes: tuple[str, ...] = ()


FAMILIES = {
    "llama": Family(),
    "mistral": Family({"tie_word_embeddings": False}),
    "qwen2": Family(),
    "qwen3": Family({"tie_word_embeddings": True}),
    # MobileLLM: it multiplies by its tied embedding's weight, past the head that is stood in for.
    "llama4_text": Family(
        {"tie_word_embeddings": True, "intermediate_size_mlp": F, "no_rope_layers": [1, 0], "use_qk_norm": True},
        (FULL_HEAD,),
    ),
    "gemma2": Family({"query_pre_attn_scalar": 16}, (ONE_LENGTH,)),
    # The first layer sees 16 tokens back, the second all.
    "gemma3_text": Family(
        {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}, (WHOLE_PROMPTS, EACH_STEP)
    ),
    "phi3": Family(),
    "olmo2": Family(),
    "smollm3": Family({"no_rope_layer_interval": 2}),
    "granite": Family(
        {"logits_scaling": 4.0, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
         "attention_bias": False, "mlp_bias": False}
    ),
    "qwen3_moe": Family(
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
         "mlp_only_layers": [], "norm_topk_prob": True, "tie_word_embeddings": False}
    ),
    # Attention and a state-space model (Mamba-2) side by side in each layer.
    "falcon_h1": Family(
        {"mamba_d_ssm": D, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 1,
         "embedding_multiplier": 1.0, "lm_head_multiplier": 1.0},
        (WHOLE_PROMPTS, EACH_STEP),
    ),
}  # fmt: skip


def write_model(folder: Path, family: str) -> Path:
    """A model folder of this family in float32; the tokenizer is `tiny_model`'s."""
    tiny_model(folder)
    config = {"model_type": family, **COMMON, **FAMILIES[family].config}
    config["vocab_size"] = json.loads((folder / "config.json").read_text())["vocab_size"]
    code = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(family, family)}")
    mx.random.seed(0)
    model = code.Model(code.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def check_targets(prepared: Prepared, settings: TrainSettings) -> None:
    """Against a bare call on each query's whole sequence.

    Bound: each activation is a sum of at most D, F or S products, five products in a row in each layer, and the head;
    norms keep what enters them at order 1, so rounding is their number times that of the largest logit (as in tiny.py).
    """
    for i, query in enumerate(prepared.queries):
        prompt = render(
            prepared.tokenizer, query.question, context_of(query, prepared.contexts, settings.retain_context)
        )
        count = prepared.targets.position_mask[i].sum()
        words = prepared.targets.continuation[i, : count - 1].tolist()
        logits = np.array(prepared.model(mx.array([prompt + words]))[0, len(prompt) - 1 :])  # [count, V]
        roundings = LAYERS * (5 * (D + F) + len(prompt)) + D
        bound = roundings * 2.0**-24 * np.abs(logits).max()
        ids, mask = prepared.targets.ids[i, :count], prepared.targets.candidate_mask[i, :count]
        got = prepared.targets.logits[i, :count]
        np.testing.assert_allclose(got[mask], np.take_along_axis(logits, ids, axis=-1)[mask], rtol=0, atol=bound)
        np.testing.assert_allclose(got[:, :K], -np.sort(-logits)[:, :K], rtol=0, atol=bound)
        best = logits.max(axis=-1)[: len(words)]  # each word is the most probable one, or as near as rounding
        np.testing.assert_allclose(logits[np.arange(len(words)), words], best, rtol=0, atol=2 * bound)


@pytest.mark.parametrize("num_layers", [-1, 1])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_trained_adapter_gives_the_same_logits_where_mlx_lm_loads_it(
    family: str, num_layers: int, tmp_path: Path, capsys: Any
) -> None:
    folder, adapter = write_model(tmp_path / "model", family), tmp_path / "adapter"
    flags = ["--model", str(folder), *tiny_data(tmp_path / "data"), "--adapter-path", str(adapter)]
    flags += ["--iters", "4", "--batch-size", "4", "--forget-per-batch", "2", "--learning-rate", "0.01"]
    flags += ["--top-k", str(K), "--positions", str(POSITIONS), "--num-layers", str(num_layers)]
    flags += ["--steps-per-eval", "0", "--save-every", "0"]
    settings = parse_settings("train", "Train.", flags)
    prepared = prepare(settings)
    check_targets(prepared, settings)
    model: nn.Module = prepared.model
    tokens = mx.array([render(prepared.tokenizer, prepared.queries[0].question)])
    before = np.array(model(tokens))
    train(settings, prepared)

    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    expected = [note for note in FAMILIES[family].notes if note != EACH_STEP or num_layers == 1]
    assert len(notes) == len(expected) and all(any(n.startswith(e) for n in notes) for e in expected), notes
    trained = adapter_parameters(model)
    untouched = [name for name, value in trained.items() if name.endswith("lora_b") and not value.any().item()]
    assert trained and not untouched, untouched
    assert not [name for name in trained if ".gate." in name]  # Qwen3-MoE's router
    model.eval()
    after = np.array(model(tokens))
    assert np.abs(after - before).max() > 0.01 * np.abs(before).max()
    loaded, _ = mlx_lm.load(str(folder), adapter_path=str(adapter))
    np.testing.assert_array_equal(np.array(loaded(tokens)), after)  # the same operations: to the last bit
