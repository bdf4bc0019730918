"""The dry run: what it predicts is what is measured, and it needs no weights and leaves nothing behind."""

from __future__ import annotations

import gc
import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer

from duet_mlx import dry_run, memory
from duet_mlx.estimate import estimate
from duet_mlx.model import load_model, on_gpu
from duet_mlx.train import parse_settings, prepare, read_questions, train
from tests.tiny_model import tiny_data, tiny_model

MEDIUM = {
    "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
RUN = ["--batch-size", "4", "--iters", "3", "--steps-per-eval", "0", "--save-every", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.skipif(on_gpu() and not mx.metal.is_available(), reason="cuBLAS's 80 MB are more than these tiny models'")
@pytest.mark.parametrize(
    ("flags", "config"),
    [
        ([], {}),
        ([], MEDIUM),
        (["--grad-checkpoint"], MEDIUM),
        (["--grad-checkpoint", "--num-layers", "3"], MEDIUM),
        (["--num-layers", "2", "--batch-size", "8"], {**MEDIUM, "num_key_value_heads": 4}),
        (["--candidates", "teacher", "--positions", "1"], {**MEDIUM, "num_hidden_layers": 3, "vocab_size": 20000}),
        (["--method", "kl"], {**MEDIUM, "vocab_size": 20000, "tie_word_embeddings": False}),
        (["--method", "npo"], MEDIUM),
        (["--method", "npo", "--retain-loss", "kl"], MEDIUM),
        # Most while it is dequantized.
        (["--candidates", "teacher", "--positions", "1"], {"bits": 4, "vocab_size": 40000, "hidden_size": 512}),
    ],
)
def test_the_predicted_peak_is_within_15_percent_of_the_measured(flags, config, data, tmp_path):
    folder = tiny_model(tmp_path / "model", **config)
    adapter = tmp_path / "adapters"
    settings = parse_settings(
        "train", "Train.", ["--model", str(folder), *data, *RUN, "--adapter-path", str(adapter), *flags]
    )
    queries, valid, contexts = read_questions(settings)
    stored = dry_run.stored_bytes(folder)
    found = estimate(settings, dry_run.skeleton(folder), load_tokenizer(folder), queries, valid, contexts, stored)
    gc.collect()  # or what other tests left behind goes in the middle of the run, and makes it look small
    before = mx.get_active_memory()  # other tests' fixtures
    mx.reset_peak_memory()
    train(settings, prepare(settings))
    measured = mx.get_peak_memory() - before
    assert 0.85 * measured <= found.peak <= 1.15 * measured, (found.phases, measured)
    config = json.loads((adapter / "adapter_config.json").read_text())
    saved = mx.load(str(adapter / "adapters.safetensors"))
    assert found.trained == sum(array.size for array in saved.values())
    assert (found.keys, found.layers) == (config["lora_parameters"]["keys"], config["num_layers"])


def test_a_context_is_held_once_for_each_question_that_is_decoded(data, tmp_path):
    """The teacher's cache is the larger part of a long context's run."""
    folder = tiny_model(tmp_path / "model", **MEDIUM, max_position_embeddings=2048)
    (tmp_path / "long.yaml").write_text(f"system: {'You know nothing of it. ' * 40}\n")
    flags = [*RUN, "--candidates", "teacher", "--retain-context", "teacher", "--adapter-path", str(tmp_path / "a")]
    settings = parse_settings(
        "train", "Train.", ["--model", str(folder), *data, "--context", str(tmp_path / "long.yaml"), *flags]
    )
    queries, valid, contexts = read_questions(settings)
    found = estimate(settings, dry_run.skeleton(folder), load_tokenizer(folder), queries, valid, contexts).phases[0]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    prepare(settings)
    measured = mx.get_peak_memory() - before
    assert found.held["cache"] > found.held["weights"] / 2
    assert 0.85 * measured <= found.total <= 1.15 * measured, (found, measured)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_skeleton_has_the_loaded_models_parameters(bits, gpu, tmp_path, monkeypatch):
    """As they are on a GPU too, where the weights stay packed; with and without weights in the folder."""
    folder = tiny_model(tmp_path / "model", bits=bits)
    loaded, *_ = load_model(str(folder), widened=not gpu)
    monkeypatch.setattr(dry_run, "on_gpu", lambda: gpu)
    expected = {name: (array.shape, array.dtype) for name, array in tree_flatten(loaded.parameters())}
    for _ in ("with weights", "without"):
        before = mx.get_active_memory()
        model = dry_run.skeleton(folder)
        assert {name: (a.shape, a.dtype) for name, a in tree_flatten(model.parameters())} == expected
        assert mx.get_active_memory() - before < 10_000
        (folder / "model.safetensors").unlink(missing_ok=True)


def test_memory_is_given_back_after_its_last_reader(monkeypatch):
    product = memory.Operation("Matmul", ["x", "w"], {"a": 1000})
    turned = memory.Operation("Transpose", ["a"], {"view": 1000})  # takes no room
    graph = [
        product,
        turned,
        memory.Operation("Matmul", ["view", "w"], {"b": 100}),  # the last to read what `view` looks at
        memory.Operation("Exp", ["b"], {"c": 100}),  # writes over b
        memory.Operation("Matmul", ["c", "w"], {"d": 1050}),
    ]
    monkeypatch.setattr(memory, "QUEUED", 0)
    assert memory.peak_of(graph, ["d"]) == 100 + 1050
    assert memory.peak_of(graph, ["d", "view"]) == 1000 + 100 + 1050
    assert memory.peak_of(graph, ["d"], consumed={"x": 5000}) == 5000 + 1000
    monkeypatch.setattr(memory, "QUEUED", 2)  # a is still held while d is made, two operations after its last reader
    assert memory.peak_of(graph, ["d"]) == 100 + 1050
    monkeypatch.setattr(memory, "QUEUED", 3)
    assert memory.peak_of(graph, ["d"]) == 1000 + 100 + 1050
    assert memory.peak_of([product, turned, memory.Operation("Reshape", ["view"], {"copy": 1000})], ["copy"]) == 2000
    assert memory.peak_of([product, memory.Operation("Reshape", ["a"], {"view": 1000})], ["view"]) == 1000
