"""A Llama of two layers and random weights over a vocabulary of single characters, for properties of whole passes."""

from __future__ import annotations

import math
import string
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hypothesis import settings
from mlx.utils import tree_map
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tokenizer_utils import TokenizerWrapper

from duet_mlx.methods import method_loss
from duet_mlx.train import TrainSettings

CHARACTERS = [*string.ascii_letters, *" \n:.?<>/"]
VOCABULARY = 1 + len(CHARACTERS)  # V; id 0 ends the turn
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
# Of each activation, sums of at most D + F = 96 products, five of them in a row in each of two layers, and the head;
# RMSNorm keeps what enters them at order 1, so rounding grows with their number and with the largest logit.
ROUNDINGS = 2 * 5 * 96 + 32
FLOAT32, FLOAT64 = ROUNDINGS * 2.0**-24, ROUNDINGS * 2.0**-53


def shared(parts: int) -> settings:
    """The profile's examples in equal parts, for a property that is run for so many methods, or dtypes, in turn."""
    return settings(max_examples=math.ceil(settings().max_examples / parts))


def tokenizer() -> TokenizerWrapper:
    """A token a character, `<end>` at id 0, and a chat template."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": 0, **{letter: i for i, letter in enumerate(CHARACTERS, 1)}}
    one = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    one.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=one, eos_token="<end>")
    fast.chat_template = TEMPLATE
    return TokenizerWrapper(fast)


def llama(seed: int = 0, tied: bool = True, dtype: Any = None, **changes: Any) -> nn.Module:
    """The model, frozen, in float32 or in `dtype`. Attention is sharpened, so that context matters."""
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
        "vocab_size": VOCABULARY, "tie_word_embeddings": tied, **changes,
    }  # fmt: skip
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(config))
    model.update(tree_map(lambda a: 3 * a if a.ndim == 2 and len(a) < VOCABULARY else a, model.parameters()))
    if dtype is not None:
        model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model


def duet_loss(
    model: nn.Module, batch: Any, prefix: list[int], head: Any, delta: float, center: bool, lower: Any = None,
    first_share: float = 0.0,
):  # fmt: skip
    """DUET's loss of a batch as the loop calls it: (sum of the query losses, number of queries)."""
    return method_loss(TrainSettings(delta=delta, center=center, first_share=first_share), prefix, head, lower)(
        model, batch
    )


def plain_logits(model: nn.Module, tokens: list[int]) -> np.ndarray:
    """Logits [S, V] of one sequence by a bare call: no batch, padding, cache or gathered head."""
    return np.array(model(mx.array([tokens]))[0])


def float64(values: Any) -> mx.array:
    """An array that stays float64 on its way into MLX."""
    return mx.array(np.asarray(values, dtype=np.float64), dtype=mx.float64)
