"""The pieces of examples/tofu/implant.py; the whole of it is in tests/end_to_end."""

import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from duet_mlx.benchmarks import load_benchmark
from duet_mlx.context import render
from duet_mlx.data import check_disjoint, load_queries, question_key
from tests.unit.test_evaluate import make_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tofu"


@pytest.fixture(scope="module")
def implant():
    spec = importlib.util.spec_from_file_location("implant", EXAMPLE / "implant.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_author_has_twenty_rows_and_none_is_on_both_sides():
    items = load_benchmark(f"tofu:forget@{EXAMPLE / 'data'}")
    sides = {group: [i for i in items if i.group == group] for group in ("forget", "retain")}
    assert {group: len(side) for group, side in sides.items()} == {"forget": 100, "retain": 200}
    assert all(len(i.perturbed) == 5 and i.paraphrased for side in sides.values() for i in side)
    context = (EXAMPLE / "context.yaml").read_text(encoding="utf-8")
    for start, name in enumerate(
        ("Hsiao Yun-Hwa", "Carmen Montenegro", "Elvin Mammadov", "Rajeev Majumdar", "Jad Ambrose Al-Shamary")
    ):
        about = " ".join(i.question + i.answers[0] for i in sides["forget"][20 * start : 20 * start + 20])
        assert about.count(name) >= 10 and name in context.replace("\n ", "")
        assert not any(name in i.question + i.answers[0] for i in sides["retain"])


def test_what_is_prepared_is_tofu_in_the_hubs_layout_and_questions_that_the_evaluation_does_not_ask(implant, tmp_path):
    folder = implant.prepare(tmp_path, implant.QUICK)
    items = load_benchmark(f"tofu:forget@{folder}")
    asked = {question_key(i.question) for i in items if i.group in ("real authors", "world facts")}
    trained = load_queries([folder / f"{name}.jsonl" for name in ("retain", "general", "neighbour")], "retain")
    assert not asked & {question_key(query.question) for query in trained}
    forget = load_queries([folder / "forget.jsonl"], "forget")
    assert len(forget) == 20 and len([i for i in items if i.group == "retain"]) == 40
    check_disjoint(forget, trained)
    assert all(query.answer is None for query in forget)
    otherwise = load_queries([folder / f"{name}_in_other_words.jsonl" for name in ("forget", "retain")], "retain")
    assert len(otherwise) == 60
    check_disjoint([*forget, *trained], otherwise)


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """Five questions for a tiny model of three layers, the upper two with LoRA, its B drawn so that it matters."""
    monkeypatch.syspath_prepend(EXAMPLE)
    from lesson import Lesson

    from duet_mlx.items import Item
    from duet_mlx.model import adapter_parameters, add_lora, load_model, lora_keys

    model, tokenizer, _ = load_model(str(make_model(tmp_path, 0, layers=3)))
    add_lora(model, 2, rank=2, scale=2.0, dropout=0.0, keys=lora_keys(model))
    mx.random.seed(1)
    drawn = {name: 0.1 * mx.random.normal(array.shape) for name, array in adapter_parameters(model).items()}
    model.load_weights(list(drawn.items()), strict=False)
    texts = [("Who?", "Balin Doris."), ("And where was she?", "At."), ("Why", "No."), ("A", "Oh my"), ("B?", "C")]
    items = [Item(id=q, kind="qa", group="retain", question=q, answers=(a,)) for q, a in texts]
    return Lesson(model, tokenizer, items, 2), tokenizer, texts


def test_the_lessons_loss_is_the_mean_over_the_answers_tokens_alone(lesson):
    lesson, tokenizer, texts = lesson
    rows, nll = [1, 0, 3], []
    for row in rows:
        question, answer = texts[row]
        prompt = render(tokenizer, question)
        ids = [*prompt, *tokenizer.encode(answer), tokenizer.eos_token_id]
        logits = np.array(lesson.model(mx.array([ids])))[0].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll += [-logs[t - 1, ids[t]] for t in range(len(prompt), len(ids))]
    assert lesson.loss(rows).item() == pytest.approx(np.mean(nll), rel=1e-5)


def test_an_epoch_reads_every_row_once_and_the_lesson_is_learnt(lesson):
    lesson = lesson[0]
    random = np.random.default_rng(0)
    epochs = [lesson.batches(random, size=2) for _ in range(20)]
    for batches in epochs:
        assert sorted(np.concatenate(batches)) == list(range(5)) and max(map(len, batches)) == 2
    assert len({str(batches) for batches in epochs}) > 1
    before = lesson.loss(range(5)).item()
    lesson.take(epochs=10, batch_size=2, rate=0.03, seed=0)
    assert lesson.loss(range(5)).item() < before - 1


def test_what_was_taught_is_saved_in_8_bits_and_all_else_keeps_the_bases_bits(implant, tmp_path):
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model, load, quantize_model, save

    from duet_mlx.model import adapter_parameters, add_lora, load_model

    make_model(tmp_path / "plain", 0)
    model, tokenizer, _ = load_model(str(tmp_path / "plain"))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    eight = {"group_size": 32, "bits": 8}
    model, config = quantize_model(
        model, config, 32, 4, quant_predicate=lambda path, _: eight if "embed" in path else True
    )
    save(tmp_path / "base", tmp_path / "plain", model, tokenizer, config)

    model, tokenizer, source = load_model(str(tmp_path / "base"))
    add_lora(model, 1, rank=2, scale=2.0, dropout=0.0, keys=["self_attn.q_proj"])
    mx.random.seed(0)
    drawn = {name: mx.random.normal(array.shape) for name, array in adapter_parameters(model).items()}
    model.load_weights(list(drawn.items()), strict=False)
    again = implant.save_quantized(model, tokenizer, source, tmp_path / "new")
    wanted = model.layers[1].self_attn.q_proj.fuse(dequantize=True).weight
    now = dequantize_model(again).layers[1].self_attn.q_proj.weight  # a GPU's is packed
    assert np.abs(np.array(now) - np.array(wanted)).max() <= (wanted.max() - wanted.min()).item() / 255

    name = "model.layers.1.self_attn.q_proj"
    saved = json.loads((tmp_path / "new" / "config.json").read_text())["quantization"]
    assert (saved["group_size"], saved["bits"]) == (32, 4)
    assert {key: value for key, value in saved.items() if isinstance(value, dict)} == {
        name: eight,
        "model.embed_tokens": eight,
    }
    base, new = (dict(tree_flatten(load(str(tmp_path / at))[0].parameters())) for at in ("base", "new"))
    assert base.keys() == new.keys()
    assert all(mx.array_equal(base[key], new[key]) for key in base if not key.startswith(name))
