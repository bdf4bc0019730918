"""One drawn run for both sides: a tiny quantized model of the Llama family with adapters, questions, settings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from mlx_lm.models import gemma2, granite, llama, qwen2, qwen3
from mlx_lm.utils import dequantize_model

from duet_mlx.context import Context, render
from duet_mlx.data import Query
from duet_mlx.model import adapter_parameters, add_lora
from duet_mlx.stream import Stream
from duet_mlx.teacher import Targets
from duet_mlx.train import TrainSettings
from reference import context as ref_context
from reference import duet, lora, parts, transformer
from reference.quantize import BITS, GROUP_SIZES, Packed
from tests.equivalence.tiny import VOCABULARY, tokenizer

TOKENIZER = tokenizer()
STEPS = 20
MATRICES = [*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))]


class Tiny(NamedTuple):
    """A drawn model: its class and arguments in mlx-lm, what the reference is told, its quantization, its seed."""

    module: Any
    arguments: dict[str, Any]
    config: transformer.Config
    bits: int
    group_size: int
    seed: int

    @property
    def roundings(self) -> int:
        """Of a logit, as in tiny.py: in each layer 5 products in a row of at most D + F terms, and the head."""
        sizes = self.arguments
        width = sizes["hidden_size"]
        return sizes["num_hidden_layers"] * 5 * (width + sizes["intermediate_size"]) + width

    def packed(self) -> nn.Module:
        """In MLX, every matrix quantized, the rest float32."""
        rng = np.random.default_rng(self.seed)

        def value(name: str, like: mx.array) -> mx.array:
            values = rng.normal(size=like.shape)
            if like.ndim == 1:  # norms near 1, biases near 0
                values = 0.1 * values + (not name.endswith("bias")) - self.config.norm_offset
            else:
                values *= 1.5 / np.sqrt(like.shape[-1])
            return mx.array(values.astype(np.float32))

        model = self.module.Model(self.module.ModelArgs.from_dict(self.arguments))
        model.update(tree_map_with_path(value, model.parameters()))
        nn.quantize(model, self.group_size, self.bits)
        model.freeze()
        model.eval()
        return model

    def dense(self, dtype: Any) -> nn.Module:
        """The same numbers dequantized, as on CPU."""
        model = dequantize_model(self.packed())
        model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
        model.freeze()
        return model

    def reference(self) -> transformer.Model:
        """The same in the reference, from the packed words."""
        stored = {name: np.array(a) for name, a in tree_flatten(self.packed().parameters())}
        weights: dict[str, Any] = {}
        for name, array in stored.items():
            base, kind = name.rsplit(".", 1)
            if f"{base}.scales" not in stored:
                weights[name] = array
            elif kind == "weight":
                scales, biases = stored[f"{base}.scales"], stored[f"{base}.biases"]
                weights[name] = Packed(array, scales, biases, self.group_size, self.bits)
            elif kind == "bias":
                weights[name] = array
        return transformer.Model(self.config, transformer.dense(weights))


@st.composite
def tiny_models(draw: Any, layers: Sequence[int]) -> Tiny:
    """So many layers, D from 32 to 128, whatever a family leaves open. Constants but Gemma's are exact in float32.

    Most are the smallest: a run of 20 steps of these costs a third, and so more runs are tried. No layer is told apart
    but the last one, so two of them show what three would.
    """
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3", "granite", "gemma2"]))
    width = draw(st.sampled_from([32, 32, *GROUP_SIZES]))  # so that a group may be as wide as the model
    heads = max(4 if family == "qwen3" else 2, width // 16)  # 16 wide each; Qwen3's are wider than D = 32 together
    kv_heads = draw(st.sampled_from([h for h in (1, 2, 4) if h <= heads]))
    base = draw(st.sampled_from([100.0, 10000.0]))
    arguments: dict[str, Any] = dict(
        model_type=family, hidden_size=width, num_hidden_layers=draw(st.sampled_from(layers)),
        intermediate_size=max(64, width),
        num_attention_heads=heads, num_key_value_heads=kv_heads, rms_norm_eps=1e-5, vocab_size=VOCABULARY,
        tie_word_embeddings=draw(st.booleans()), max_position_embeddings=256, rope_theta=base,
    )  # fmt: skip
    config = transformer.Config(heads, kv_heads, rope_base=base)
    modules: dict[str, Any] = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "granite": granite, "gemma2": gemma2}
    if family in ("llama", "granite"):
        arguments |= dict(attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))
    if family == "llama":
        arguments |= dict(rope_traditional=draw(st.booleans()))
        config = config._replace(rope_traditional=arguments["rope_traditional"])
    elif family == "qwen3":
        arguments |= dict(head_dim=16)
    elif family == "granite":
        scales = dict(logits_scaling=2.0, attention_multiplier=0.125, embedding_multiplier=3.0)
        arguments |= dict(**scales, residual_multiplier=0.5)
        config = config._replace(attention_scale=0.125, embedding_scale=3.0, logit_scale=0.5, residual_scale=0.5)
    elif family == "gemma2":
        caps = dict(attn_logit_softcapping=3.0, final_logit_softcapping=5.0)
        arguments |= dict(**caps, head_dim=16, query_pre_attn_scalar=4.0)
        config = config._replace(
            attention_scale=0.5, attention_softcap=3.0, logit_softcap=5.0, embedding_scale=width**0.5,
            norm_offset=1.0, activation=parts.gelu,
        )  # fmt: skip
    bits, group_size = draw(st.sampled_from(BITS)), draw(st.sampled_from([g for g in GROUP_SIZES if g <= width]))
    return Tiny(modules[family], arguments, config, bits, group_size, draw(st.integers(0, 2**32)))


@lru_cache(maxsize=1000)
def rendered(question: str, context: Context | None = None) -> list[int]:
    """The backend's rendering, once: a run asks for the same questions in each of its 20 steps. Not to be changed."""
    return render(TOKENIZER, question, context)


class Run(NamedTuple):
    """A model, questions, contexts and settings."""

    tiny: Tiny
    queries: list[Query]
    contexts: list[Context]
    settings: TrainSettings
    packed: bool  # whether MLX computes with the packed weights, as on a GPU; float64 cannot

    def student(self) -> transformer.Model:
        """The reference's, with drawn adapters on the `keys` of the last `num_layers`; B is 0 or not."""
        model, options = self.tiny.reference(), self.settings.lora_parameters
        layers, rng = self.tiny.arguments["num_hidden_layers"], np.random.default_rng(self.tiny.seed)
        first = 0 if self.settings.num_layers == -1 else layers - self.settings.num_layers
        adapters = {}
        for name in (f"model.layers.{layer}.{key}" for layer in range(first, layers) for key in options["keys"]):
            d_out, d_in = model.weights[f"{name}.weight"].shape
            one = lora.init(rng, d_in, d_out, options["rank"], options["scale"])
            adapters[name] = one._replace(b=self.tiny.seed % 2 * 0.1 * rng.normal(size=one.b.shape))
        return model._replace(adapters=adapters)

    def put_lora(self, model: nn.Module, student: transformer.Model, dtype: Any, put: Any = add_lora) -> None:
        """LoRA of the backend (by `put`) with the numbers of the reference's student, in `dtype`."""
        put(model, self.settings.num_layers, **self.settings.lora_parameters)
        arrays = lora.parameters(student.adapters)
        assert adapter_parameters(model).keys() == arrays.keys()
        model.load_weights([(name, mx.array(array, dtype=dtype)) for name, array in arrays.items()], strict=False)

    def prompts(self) -> list[list[int]]:
        return [rendered(query.question) for query in self.queries]

    def stream(self, targets: Targets, prefix: int) -> tuple[Stream, list[np.ndarray]]:
        """The backend's batches, and which queries each step of training has."""
        stream, roles = Stream(self.prompts(), targets, prefix), np.array([q.role for q in self.queries])
        return stream, stream.schedule(
            np.flatnonzero(roles == "forget"), np.flatnonzero(roles != "forget"), self.settings
        )

    def given(self) -> dict[str, Any]:
        """What the reference's functions ask for, by the names of their arguments."""
        s = self.settings
        questions = {query.id: query.question for query in self.queries}
        contexts = {context.name: context for context in self.contexts}

        def of_query(query: ref_context.Query, context: ref_context.Context | None) -> list[int]:
            return rendered(questions[query.id], context and contexts[context.name])

        stop = tuple(TOKENIZER.eos_token_ids)
        return {
            "queries": [ref_context.Query(q.id, (), q.role, q.context) for q in self.queries],
            "contexts": [ref_context.Context(name) for name in contexts],
            "settings": duet.Settings(
                s.top_k, s.positions, s.candidates, s.retain_context, s.delta, s.center, s.first_share, stop
            ),
            "render": of_query,
        }


@st.composite
def runs(draw: Any, layers: Sequence[int] = (1, 1, 2)) -> Run:
    """2 to 6 questions of both roles, two contexts, 20 steps' settings, a model of one of these numbers of layers."""
    texts = st.text(alphabet="abcWho ?", min_size=1, max_size=9).filter(str.strip)
    roles = ["forget", "retain", *draw(st.lists(st.sampled_from(["forget", "retain", "neighbour"]), max_size=4))]
    named = st.sampled_from([None, "shy", "odd"])
    queries = [Query(f"q{i}", draw(texts), role, context=draw(named)) for i, role in enumerate(roles)]
    contexts = [Context("shy", "Say nothing.", (("Who?", "No."),)), Context("odd", "Be odd")]
    # One run in five adapts every matrix, the others few: more than half of a step's operations are the adapters'.
    keys = draw(st.permutations(MATRICES))[: draw(st.sampled_from([1, 1, 2, 2, len(MATRICES)]))]
    settings = TrainSettings(
        top_k=draw(st.sampled_from([2, 5, VOCABULARY])),  # a single centred candidate has no loss
        candidates=draw(st.sampled_from(["teacher", "union"])),
        positions=draw(st.integers(1, 3)),
        delta=draw(st.sampled_from([0.25, 1.0, float("inf")])),
        center=draw(st.booleans()),
        first_share=draw(st.sampled_from([0.0, 0.5])),
        retain_context=draw(st.sampled_from(["teacher", "none"])),
        num_layers=draw(st.sampled_from([-1, 1])),
        lora_parameters={"rank": draw(st.integers(1, 3)), "scale": 2.0, "dropout": 0.0, "keys": keys},
        iters=STEPS,
        batch_size=draw(st.integers(2, 4)),
        forget_per_batch=1,
        learning_rate=draw(st.sampled_from([1e-3, 1e-2])),
        seed=draw(st.integers(0, 99)),
        steps_per_report=1,
        steps_per_eval=0,
        save_every=0,
    )
    return Run(draw(tiny_models(layers)), queries, contexts, settings, draw(st.booleans()))
