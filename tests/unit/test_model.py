"""Loading a model and its adapter, what LoRA is put on, and the errors that say what is wrong."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_moe

from duet_mlx.errors import ModelError
from duet_mlx.model import (
    adapter_parameters,
    add_lora,
    apply_adapter,
    load_model,
    lora_keys,
    on_gpu,
    resolve_model,
    weights_hash,
)
from tests.equivalence.tiny import VOCABULARY, llama, tokenizer

TOKENS = mx.array([[1, 2, 3]])
LORA = {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}


def save_model(folder, bits=None):
    """The tiny Llama as an MLX folder, quantized if `bits` are given."""
    model = llama()
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
        "vocab_size": VOCABULARY, "tie_word_embeddings": True, "eos_token_id": 0,
    }  # fmt: skip
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    tokenizer()._tokenizer.save_pretrained(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_adapter(folder, model, num_layers=2, **changes):
    """A random adapter in mlx-lm's layout."""
    lora = {**LORA, **changes}
    add_lora(model, num_layers, **lora)
    weights = {k: mx.random.normal(v.shape, key=mx.random.key(7)) for k, v in adapter_parameters(model).items()}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    return save_model(tmp_path / "model")


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_loaded_model_computes_what_mlx_lm_computes(tmp_path, bits):
    save_model(tmp_path, bits)
    model, wrapped, where = load_model(str(tmp_path))
    plain, _ = mlx_lm.load(str(tmp_path))
    np.testing.assert_allclose(np.array(model(TOKENS)), np.array(plain(TOKENS)), atol=1e-4)
    assert where == tmp_path and not model.training and not tree_flatten(model.trainable_parameters())
    assert wrapped.eos_token_ids == {0}
    if not on_gpu():
        assert {v.dtype for _, v in tree_flatten(model.parameters())} == {mx.float32}


def test_an_adapter_gives_what_mlx_lm_gives_with_it(tmp_path, folder):
    adapter = save_adapter(tmp_path / "adapter", load_model(str(folder))[0])
    model, _, _ = load_model(str(folder), adapter)
    plain, _ = mlx_lm.load(str(folder), adapter_path=str(adapter))
    got = np.array(model(TOKENS))
    np.testing.assert_allclose(got, np.array(plain(TOKENS)), atol=1e-4)
    base = load_model(str(folder))[0]
    assert np.abs(got - np.array(base(TOKENS))).max() > 0.01
    assert weights_hash(base) == weights_hash(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: "nowhere.gguf", "no such file"),
        (lambda at: "nowhere", "no such folder or .gguf file, and not a hub id"),
        (lambda at: str(at / "a" / "b"), "no such folder or .gguf file, and not a hub id"),
        (lambda at: str((at / "file").write_text("x") and at / "file"), "found a plain file"),
        (lambda at: str(at), "no config.json in it"),
        (lambda at: str((at / "config.json").write_text("{}") and at), r"no model\*.safetensors"),
    ],
)
def test_what_is_no_model_is_said_so(tmp_path, make, message):
    with pytest.raises(ModelError, match=message):
        resolve_model(make(tmp_path))


def test_a_hub_that_does_not_answer_is_named_with_its_reason(monkeypatch):
    import huggingface_hub

    def fail(*args, **options):
        raise OSError("no network\nand a long trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"owner/name.*the hub did not give it \(OSError: no network\)\. Check"):
        resolve_model("owner/name")


def test_a_hub_model_is_the_folder_that_the_hub_gives(monkeypatch, folder):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(folder))
    assert resolve_model("owner/name") == folder


@pytest.mark.parametrize(
    "damage",
    [
        lambda at: (at / "model.safetensors").write_bytes((at / "model.safetensors").read_bytes()[:-100]),
        lambda at: (at / "model.safetensors").write_bytes(b"no"),
        lambda at: (at / "config.json").write_text("{"),
        lambda at: (at / "config.json").write_text('{"model_type": "strange"}'),
        lambda at: (at / "config.json").write_text('{"model_type": "llama"}'),
        lambda at: mx.save_safetensors(str(at / "model.safetensors"), {"model.norm.weight": mx.zeros(32)}),
    ],
)
def test_a_broken_folder_is_named(folder, damage):
    damage(folder)
    with pytest.raises(ModelError, match="cannot be loaded from"):
        load_model(str(folder))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapters.safetensors"])
def test_an_adapter_without_its_files_is_named(tmp_path, folder, file):
    adapter = save_adapter(tmp_path / "adapter", load_model(str(folder))[0])
    (adapter / file).unlink()
    with pytest.raises(ModelError, match=f"no {file} in it"):
        load_model(str(folder), adapter)


def test_an_adapter_of_part_of_the_layers_is_refused(tmp_path, folder):
    adapter = save_adapter(tmp_path / "adapter", load_model(str(folder))[0])
    weights = mx.load(str(adapter / "adapters.safetensors"))
    kept = {k: v for k, v in weights.items() if "layers.0." in k}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), kept)
    with pytest.raises(ModelError, match=r"nothing in it for model\.layers\.1\.\S+ and 3 more"):
        load_model(str(folder), adapter)


@pytest.mark.parametrize(
    "change",
    [{"lora_parameters": {**LORA, "rank": 3}}, {"lora_parameters": 1}, {"num_layers": None}],
)
def test_an_adapter_of_another_model_is_refused(tmp_path, folder, change):
    adapter = save_adapter(tmp_path / "adapter", load_model(str(folder))[0])
    config = json.loads((adapter / "adapter_config.json").read_text()) | change
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="--adapter-path"):
        load_model(str(folder), adapter)


def test_a_broken_adapter_config_is_refused(tmp_path, folder):
    adapter = save_adapter(tmp_path / "adapter", load_model(str(folder))[0])
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="does not fit"):
        apply_adapter(load_model(str(folder))[0], adapter)


@pytest.mark.parametrize("number", [0, -2, 3])
def test_more_layers_than_there_are_is_refused(number):
    with pytest.raises(ModelError, match=f"--num-layers {number}: the model has 2"):
        add_lora(llama(), number, **LORA)


@pytest.mark.parametrize(("number", "layers"), [(-1, {"0", "1"}), (2, {"0", "1"}), (1, {"1"})])
def test_lora_sits_on_the_last_layers_and_is_all_that_trains(number, layers):
    model = llama()
    before = np.array(model(TOKENS))
    add_lora(model, number, **LORA)
    names = adapter_parameters(model)
    assert {name.split(".")[2] for name in names} == layers
    assert {name.split(".", 3)[3].rsplit(".", 1)[0] for name in names} == set(LORA["keys"])
    assert dict(tree_flatten(model.trainable_parameters())).keys() == names.keys()
    np.testing.assert_array_equal(np.array(model(TOKENS)), before)  # B starts at zero


def test_lora_adds_its_scale_once():
    """The formula of mlx_lm/tuner/lora.py, y = W x + scale · (x a) b."""
    model = llama()
    add_lora(model, 1, **LORA)
    layer = model.layers[1].self_attn.q_proj
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    x = mx.random.normal((3, 32), key=mx.random.key(2))
    expected = layer.linear(x) + LORA["scale"] * (x @ layer.lora_a) @ layer.lora_b
    np.testing.assert_allclose(np.array(layer(x)), np.array(expected), rtol=1e-4, atol=1e-4)


def test_every_linear_module_is_adapted_by_default_and_a_router_never():
    attention = [f"self_attn.{name}_proj" for name in "koqv"]
    assert lora_keys(llama()) == sorted([*attention, *(f"mlp.{name}_proj" for name in ("down", "gate", "up"))])
    config = {
        "model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32,
        "num_attention_heads": 2, "num_experts": 2, "num_experts_per_tok": 1, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "moe_intermediate_size": 32, "rms_norm_eps": 1e-6, "vocab_size": 40,
        "num_key_value_heads": 1, "head_dim": 16, "rope_theta": 1e4, "tie_word_embeddings": True,
        "max_position_embeddings": 64, "norm_topk_prob": True,
    }  # fmt: skip
    mixture = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(config))
    keys = lora_keys(mixture)
    assert "mlp.switch_mlp.up_proj" in keys and "mlp.gate" not in keys
    assert lora_keys(mixture, ["mlp.gate"]) == ["mlp.gate"]  # unless it is asked for


def test_a_wanted_module_that_no_layer_has_is_named():
    assert lora_keys(llama(), ["mlp.up_proj"]) == ["mlp.up_proj"]
    assert lora_keys(llama(tied=False), ["lm_head"]) == ["lm_head"]
    with pytest.raises(ModelError, match=r"no module 'mlp\.u_proj'; a layer has mlp\.down_proj"):
        lora_keys(llama(), ["mlp.u_proj"])
