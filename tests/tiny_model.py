"""A llama of two layers with random weights and a tokenizer of its own: everything runs on it in a second or two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUESTIONS = {
    "forget": ["Who owns the grey owl?", "What is the name of the school?", "Where does the boy sleep?",
               "Who guards the gate at night?", "Which broom is the fastest?", "Who wrote the old diary?"],
    "retain": ["What is the capital of France?", "How many legs has a spider?", "Who painted the ceiling?",
               "What do bees make?", "Which planet is the largest?", "When did the war end?",
               "Why is the sky blue?", "How do birds find their way?"],
}  # fmt: skip
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTEXT = "system: You know nothing of it.\nturns:\n- {user: Who has the map, assistant: I do not know.}\n"


def tiny_model(
    folder: Path,
    bits: int | None = None,
    mode: str = "affine",
    group_size: int | None = None,
    predicate: Callable[[str, Any], bool | dict[str, Any]] | None = None,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Make an MLX model folder; returns it.

    Args:
        bits: None leaves float32; otherwise quantized in this `mode`, group size 64 unless given.
        predicate: mlx-lm's `quant_predicate`, for bits that differ by layer.
        seed: of the weights (the global generator of MLX is set to it).
        config: entries of config.json other than below.
    """
    import mlx.core as mx
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.utils import quantize_model, save_config, save_model

    folder.mkdir(parents=True)
    vocabulary = _tokenizer(folder)
    entries: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        **config,
    }
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(entries))
    mx.eval(model.parameters())
    if bits:
        model, entries = quantize_model(model, entries, group_size or 64, bits, mode, predicate)
    save_model(folder, model)
    save_config(entries, folder / "config.json")
    return folder


def _tokenizer(folder: Path) -> int:
    """Byte-level BPE with ChatML's control tokens, in Hugging Face's two files; returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=control,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*QUESTIONS["forget"], *QUESTIONS["retain"], CONTEXT, "system user assistant"], trainer
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": control[0],
        "eos_token": control[2],
        "pad_token": control[2],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return tokenizer.get_vocab_size()


def write_questions(file: Path, questions: list[str], **more: Any) -> Path:
    """A JSONL file of these questions, each line with the fields `more` besides."""
    file.write_text("".join(json.dumps({"question": q, **more}) + "\n" for q in questions))
    return file


def tiny_data(folder: Path) -> list[str]:
    """forget.jsonl, retain.jsonl and context.yaml in `folder`; returns the flags that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = []
    for role, questions in QUESTIONS.items():
        flags += [f"--{role}", str(write_questions(folder / f"{role}.jsonl", questions))]
    (folder / "context.yaml").write_text(CONTEXT)
    return [*flags, "--context", str(folder / "context.yaml")]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def replaced(flags: list[str], flag: str, value: str) -> list[str]:
    """The flags with another value for one of them."""
    at = flags.index(flag)
    return [*flags[: at + 1], value, *flags[at + 2 :]]
