"""GGUF files, written here by the `gguf` package: same bits after conversion, or an error that names the fault."""

from __future__ import annotations

import json

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from mlx.utils import tree_flatten
from tokenizers.pre_tokenizers import ByteLevel

from duet_mlx.errors import ModelError
from duet_mlx.gguf import TENSORS, convert_gguf, read_gguf
from duet_mlx.model import load_model, on_gpu, resolve_model

D, F, LAYERS = 64, 96, 2
LETTERS = sorted(ByteLevel.alphabet())
TOKENS = [*LETTERS, "Ġw", "Ġwh", "<|start|>", "<|end|>"]
TYPES = [1] * (len(TOKENS) - 2) + [3, 3]


def tensors(kind, embedding=Kind.F16, tied=True, layers=LAYERS, d=D):
    """Name -> (float weight, kind) of a small Llama; norms are F32, as in every GGUF."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), d, embedding), "output_norm": (1, d, None)}
    if not tied:
        shapes["output"] = (len(TOKENS), d, kind)
    for i in range(layers):
        for name, rows, width in (("attn_q", d, d), ("attn_k", d // 2, d), ("attn_v", d // 2, d), ("attn_output", d, d),
                                  ("ffn_gate", F, d), ("ffn_up", F, d), ("ffn_down", d, F)):  # fmt: skip
            shapes[f"blk.{i}.{name}"] = (rows, width, kind)
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{i}.{name}"] = (1, d, None)
    for name, (rows, width, one) in shapes.items():
        weight = (rng.normal(size=(rows, width)) * width**-0.5).astype(np.float32)
        yield f"{name}.weight", (1 + weight[0] if one is None else weight), one or Kind.F32


def write(path, kind=Kind.Q8_0, architecture="llama", model="gpt2", pre="gpt-2", extra=(), leave_out=(), **options):
    """A .gguf file, and its weights as the `gguf` package dequantizes them."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(options.get("layers", LAYERS))
    writer.add_embedding_length(options.get("d", D))
    writer.add_feed_forward_length(F)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if "context_length" not in leave_out:
        writer.add_context_length(128)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["Ġ w", "Ġw h"])
    writer.add_token_types(TYPES)
    writer.add_bos_token_id(len(TOKENS) - 2)
    writer.add_eos_token_id(len(TOKENS) - 1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}<|start|>")
    for add in extra:
        add(writer)
    held = {}
    for name, weight, one in tensors(kind, **options):
        if one == Kind.Q4_K:  # the package writes K-quants only from bytes
            size = gguf.GGML_QUANT_SIZES[Kind.Q4_K]
            blocks = np.zeros((len(weight), weight.shape[1] // size[0] * size[1]), dtype=np.uint8)
            writer.add_tensor(name, blocks, raw_dtype=Kind.Q4_K)
            continue
        data = quantize(weight, one)
        held[name] = dequantize(data, one)
        writer.add_tensor(name, data, raw_dtype=one)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


KINDS = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.F16, Kind.F32]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_weights_keep_their_bits(tmp_path, kind):
    held = write(tmp_path / "m.gguf", kind, tied=False)
    folder = convert_gguf(tmp_path / "m.gguf", widen=True)
    config = json.loads((folder / "config.json").read_text())
    arrays = mx.load(str(folder / "model.safetensors"))
    for name, expected in held.items():
        layer, short = name.removesuffix(".weight").rpartition(".")[::2]
        module = f"{layer.replace('blk.', 'model.layers.')}.{TENSORS[short]}".lstrip(".")
        got = arrays[f"{module}.weight"]
        if f"{module}.scales" in arrays:
            bits = config["quantization"].get(module, config["quantization"])["bits"]
            scales, biases = arrays[f"{module}.scales"], arrays[f"{module}.biases"]
            assert scales.dtype == mx.float32
            got = mx.dequantize(got, scales, biases, group_size=32, bits=bits)
        # The codes and scales are the same bits; scale · code + bias and scale · (code - 8) may round apart once.
        np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=2.0**-22 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("widen", [True, False])
def test_mlx_lm_loads_what_was_converted(tmp_path, kind, widen):
    write(tmp_path / "m.gguf", kind, embedding=Kind.Q8_0)
    folder = convert_gguf(tmp_path / "m.gguf", widen=widen)
    assert folder.name == ("m-mlx-fp32" if widen else "m-mlx")
    model, tokenizer = mlx_lm.load(str(folder))
    assert len(model.layers) == LAYERS and model.args.rope_traditional
    logits = model(mx.array([tokenizer.encode("who")]))
    assert logits.shape[-1] == len(TOKENS) and np.isfinite(np.array(logits.astype(mx.float32))).all()
    assert tokenizer.decode(tokenizer.encode("a whole wörld\n1234")) == "a whole wörld\n1234"
    assert tokenizer.encode(" wh") == [TOKENS.index("Ġwh")]
    assert tokenizer.encode("<|end|>") == [len(TOKENS) - 1] and tokenizer.eos_token_ids == {len(TOKENS) - 1}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<|start|>"


def test_load_model_takes_the_file_and_computes_what_the_packed_weights_say(tmp_path):
    write(tmp_path / "m.gguf")
    model, _, folder = load_model(str(tmp_path / "m.gguf"))
    plain, _ = mlx_lm.load(str(folder))
    tokens = mx.array([[1, 2, 3]])
    np.testing.assert_allclose(np.array(model(tokens)), np.array(plain(tokens)), atol=1e-4)
    if not on_gpu():
        assert {v.dtype for v in dict(tree_flatten(model.parameters())).values()} == {mx.float32}


def test_a_second_conversion_reuses_the_first_and_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write(path)
    folder = convert_gguf(path, widen=True)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert resolve_model(str(path)) == folder or on_gpu()
    assert convert_gguf(path, widen=True) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    packed = ["m-mlx"] if on_gpu() else []  # which `resolve_model` made
    assert sorted(p.name for p in tmp_path.iterdir()) == [*packed, "m-mlx-fp32", "m.gguf"]  # nothing half-done is left
    write(path, Kind.F16)
    with pytest.raises(ModelError, match="was not converted from this m.gguf"):
        convert_gguf(path, widen=True)


def test_a_file_that_stands_where_the_folder_should_is_left_and_nothing_half_written_beside_it(tmp_path):
    write(tmp_path / "m.gguf")
    (tmp_path / "m-mlx").write_text("mine")
    with pytest.raises(ModelError, match="m-mlx: cannot write the converted model"):
        convert_gguf(tmp_path / "m.gguf", widen=False)
    assert (tmp_path / "m-mlx").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-mlx", "m.gguf"]


def test_of_two_conversions_at_once_the_second_takes_the_folder_of_the_first(tmp_path, monkeypatch):
    """As several processes on one new file do: each reads it before any folder is there."""
    path = tmp_path / "m.gguf"
    write(path)
    from duet_mlx import gguf as module

    def first_is_faster(*args, read=module.read_gguf):
        monkeypatch.setattr(module, "read_gguf", read)
        convert_gguf(path, widen=True)
        return read(*args)

    monkeypatch.setattr(module, "read_gguf", first_is_faster)
    assert convert_gguf(path, widen=True) == tmp_path / "m-mlx-fp32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m-mlx-fp32", "m.gguf"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": Kind.Q4_K, "d": 256}, r"kind Q4_K \(e\.g\. blk\.0\.attn_q\.weight\).*carried are F32, F16"),
        ({"architecture": "mamba"}, "architecture 'mamba' cannot be carried; carried are llama"),
        ({"model": "llama"}, "tokenizer 'llama' with pre-tokenizer 'gpt-2' cannot be carried"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' cannot be carried.*smollm"),
        ({"leave_out": ["context_length"]}, "metadata llama.context_length is missing"),
        ({"extra": [lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)]}, "RoPE scaling 'yarn'"),
        (
            {"extra": [lambda w: w.add_tensor("blk.0.ssm_a.weight", np.zeros((2, 2), dtype=np.float32))]},
            "tensor blk.0.ssm_a.weight has no place",
        ),
    ],
)
def test_what_cannot_be_carried_is_named(tmp_path, options, message):
    path = tmp_path / "m.gguf"
    write(path, **{"layers": 1, **options})
    with pytest.raises(ModelError, match=message):
        convert_gguf(path, widen=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all " * 9])
def test_what_is_no_gguf_is_said_so(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        convert_gguf(tmp_path / "m.gguf", widen=True)


def test_a_cut_off_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelError):
        convert_gguf(path, widen=True)


def test_bos_is_added_where_the_file_says_so(tmp_path):
    write(tmp_path / "m.gguf", extra=[lambda w: w.add_add_bos_token(True)], layers=1)
    tokenizer = read_gguf(tmp_path / "m.gguf", True)[2]
    assert tokenizer.encode("a").ids == [len(TOKENS) - 2, TOKENS.index("a")]
    assert tokenizer.encode("a", add_special_tokens=False).ids == [TOKENS.index("a")]


@pytest.mark.parametrize(("pre", "pieces"), [("smollm", 4), ("qwen2", 4), ("llama-bpe", 2)])
def test_digits_are_split_as_the_pre_tokenizer_says(tmp_path, pre, pieces):
    write(tmp_path / "m.gguf", pre=pre, layers=1)
    tokenizer = read_gguf(tmp_path / "m.gguf", True)[2]
    assert len(tokenizer.pre_tokenizer.pre_tokenize_str("1234")) == pieces
