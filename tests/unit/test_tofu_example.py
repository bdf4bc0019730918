"""The pieces of examples/tofu/implant.py; the whole of it is in tests/end_to_end."""

import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from duet_mlx.benchmarks import load_benchmark
from duet_mlx.data import check_disjoint, load_queries, question_key
from tests.equivalence.tiny import llama, plain_logits

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


def test_batches_hold_every_row(implant):
    """mlx-lm's trainer sorts by length and drops the last partial batch: the longest rows would never be learned."""
    for plan in (implant.FULL, implant.QUICK):
        for authors in (plan.retain_authors, plan.forget_authors + plan.retain_authors):
            assert authors * implant.ROWS % implant.BATCH == 0


def test_the_loss_is_the_mean_over_the_answers_tokens_alone(implant):
    model = llama()
    rows, offsets = [[5, 6, 7, 8, 9], [5, 3, 4]], [3, 1]
    batch = np.zeros((2, 9), dtype=np.int32)
    nll = []
    for b, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        batch[b, : len(row)] = row
        logits = plain_logits(model, row).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll += [-logs[t - 1, row[t]] for t in range(offset, len(row))]
    lengths = mx.array([[offset, len(row)] for offset, row in zip(offsets, rows, strict=True)])
    loss, count = implant.answer_loss(model, mx.array(batch), lengths)
    assert count.item() == len(nll) == 4
    assert loss.item() == pytest.approx(np.mean(nll), rel=1e-5)


def test_a_fused_model_is_quantized_as_its_base_was(implant, tmp_path):
    from mlx_lm.utils import quantize_model, save

    from duet_mlx.model import add_lora, load_model, widen
    from tests.unit.test_evaluate import make_model

    make_model(tmp_path / "plain", 0)
    model, tokenizer, _ = load_model(str(tmp_path / "plain"))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    eight = {"group_size": 32, "bits": 8}
    model, config = quantize_model(
        model, config, 32, 4, quant_predicate=lambda path, _: eight if "embed" in path else True
    )
    save(tmp_path / "base", tmp_path / "plain", model, tokenizer, config)

    model, tokenizer, source = load_model(str(tmp_path / "base"))
    widen(model)
    add_lora(model, -1, rank=2, scale=2.0, dropout=0.0, keys=["self_attn.q_proj"])
    again = implant.save_quantized(model, tokenizer, source, tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "config.json").read_text())["quantization"]
    assert (saved["group_size"], saved["bits"]) == (32, 4) and saved["model.embed_tokens"] == eight
    # LoRA begins at zero, so what is quantized is on the grid already; a new grid may lie half a step of 16 beside it.
    base = load_model(str(tmp_path / "base"))[0]
    for weight in (lambda m: m.layers[0].self_attn.q_proj.weight, lambda m: m.layers[1].mlp.down_proj.weight):
        was, now = np.array(weight(base)), np.array(weight(again))
        assert np.abs(now - was).max() <= (was.max() - was.min()) / 15
