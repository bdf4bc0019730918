"""A .gguf file becomes an ordinary MLX model folder: same bits, mlx-lm's names, its own tokenizer."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from .data import file_hash
from .errors import ModelError

# GGUF kinds that MLX holds without changing a bit; K-quants and i-quants have no such home.
CARRIED = ("F32", "F16", "Q4_0", "Q4_1", "Q8_0")

# mlx-lm's model_type of each GGUF architecture, and whether its q and k rows are stored for interleaved RoPE.
ARCHITECTURES = {"llama": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# `tokenizer.ggml.pre` names a pre-tokenizer by convention only; these patterns are the models' own.
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": None,
    "default": None,
    "smollm": "digits",
    "llama-bpe": LLAMA_SPLIT,
    "qwen2": LLAMA_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}


def convert_gguf(path: Path, widen: bool) -> Path:
    """Write the MLX folder of a GGUF file beside it, once, and return its path.

    Args:
        path: the .gguf file.
        widen: store scales, biases and norms as float32 (exact; fast on CPU) instead of as they are.

    Returns:
        `<stem>-mlx` or, widened, `<stem>-mlx-fp32`: config.json, model.safetensors (packed weights with the
        same bits), tokenizer.json, tokenizer_config.json with the chat template. Reused while the file's
        SHA-256, kept in config.json, still matches.

    Raises:
        ModelError: not a GGUF file, or an architecture, tensor kind or tokenizer that cannot be carried.
    """
    digest = file_hash(path)
    folder = path.with_name(path.stem + ("-mlx-fp32" if widen else "-mlx"))
    if folder.is_dir():
        try:
            if json.loads((folder / "config.json").read_text())["gguf_sha256"] == digest:
                return folder
        except (OSError, ValueError, KeyError):
            pass
        raise ModelError(f"{folder}: exists but was not converted from this {path.name}; move it away and run again")
    config, weights, tokenizer, tokenizer_config = read_gguf(path, widen)
    config["gguf_sha256"] = digest
    try:
        # Written aside and renamed, so that an interrupted conversion never looks like a model.
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=folder.name + ".partial-"))
    except OSError as error:
        raise ModelError(f"{path.parent}: cannot write the converted model here ({error.strerror})") from error
    try:
        import mlx.core as mx

        mx.save_safetensors(str(partial / "model.safetensors"), weights, metadata={"format": "mlx"})
        tokenizer.save(str(partial / "tokenizer.json"))
        for name, content in (("tokenizer_config.json", tokenizer_config), ("config.json", config)):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            return convert_gguf(path, widen)  # another process was first: its folder is looked at like any other
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{folder}: cannot write the converted model: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def read_gguf(path: Path, widen: bool):
    """Everything of a GGUF file as mlx-lm wants it: config, weights, tokenizer, tokenizer_config."""
    import mlx.core as mx
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
        kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    except (ValueError, OSError, IndexError) as error:
        raise ModelError(f"{path}: not a readable GGUF file: {error}") from error
    bad = sorted({kind for kind in kinds.values() if kind not in CARRIED})
    if bad:
        name = next(name for name, kind in kinds.items() if kind == bad[0])
        raise ModelError(
            f"{path}: tensors of kind {', '.join(bad)} (e.g. {name}) cannot be carried to MLX with the same bits; "
            f"carried are {', '.join(CARRIED)}. Use such a file, or an MLX folder of the same model"
        )
    arrays, meta = mx.load(str(path), return_metadata=True)
    meta = {key: value.tolist() if isinstance(value, mx.array) else value for key, value in meta.items()}
    architecture = meta.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{path}: architecture {architecture!r} cannot be carried; carried are {', '.join(ARCHITECTURES)}"
        )
    weights: dict[str, mx.array] = {}
    for name, array in arrays.items():
        stem, _, suffix = name.rpartition(".")
        layer, _, short = stem.rpartition(".")
        if short not in TENSORS or suffix not in ("weight", "bias", "scales", "biases"):
            raise ModelError(f"{path}: tensor {name} has no place in mlx-lm's {architecture!r}")
        prefix = layer.replace("blk.", "model.layers.") + "." if layer else ""
        if widen and array.dtype == mx.float16:
            array = array.astype(mx.float32)
        weights[f"{prefix}{TENSORS[short]}.{suffix}"] = array
    return (*_config(path, architecture, meta, weights), *_tokenizer(path, meta))


def _config(path: Path, architecture: str, meta: dict, weights: dict) -> tuple[dict, dict]:
    model_type, interleaved = ARCHITECTURES[architecture]

    def get(key, default=None):
        value = meta.get(f"{architecture}.{key}", default)
        if value is None:
            raise ModelError(f"{path}: metadata {architecture}.{key} is missing")
        return value

    heads, width = get("attention.head_count"), get("embedding_length")
    config = {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": get("block_count"),
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", width // heads),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "max_position_embeddings": get("context_length"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_traditional": interleaved,
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
    }
    if f"{architecture}.rope.scaling.type" in meta and meta[f"{architecture}.rope.scaling.type"] != "none":
        raise ModelError(f"{path}: RoPE scaling {meta[f'{architecture}.rope.scaling.type']!r} cannot be carried")
    quantization: dict = {}
    for name, scales in weights.items():
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            packed, groups = weights[f"{module}.weight"].shape[-1], scales.shape[-1]
            # GGUF's blocks are 32 wide, so the bits follow from the packed width.
            quantization[module] = {"group_size": 32, "bits": packed * 32 // (groups * 32)}
    if quantization:
        common = {"group_size": 32, "bits": min(entry["bits"] for entry in quantization.values())}
        exceptions = {module: entry for module, entry in quantization.items() if entry != common}
        config["quantization"] = {**common, **exceptions}
    return config, weights


def _tokenizer(path: Path, meta: dict):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} cannot be carried; carried is 'gpt2' with "
            f"{', '.join(PRE_TOKENIZERS)}. Use an MLX folder of the same model"
        )
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    split = PRE_TOKENIZERS[pre]
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None or split == "digits")]
    if split == "digits":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif split:
        steps.insert(0, pre_tokenizers.Split(Regex(split), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    # token_type 3 is a control token, 4 a user-defined one (llama.cpp's LLAMA_TOKEN_TYPE).
    types = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == 3]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == 4])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = meta.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{name}_token"] = tokens[index]
    if meta.get("tokenizer.ggml.add_bos_token") and "bos_token" in config:
        bos = config["bos_token"]
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
                ),
            ]
        )
    if "tokenizer.chat_template" in meta:
        config["chat_template"] = meta["tokenizer.chat_template"]
    return tokenizer, config
