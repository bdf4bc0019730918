"""Evaluation end to end on a tiny model of random weights, and the pieces that hold it together."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest

from duet_mlx import evaluate as ev
from duet_mlx import result_files
from duet_mlx.data import Query
from duet_mlx.errors import ConfigError, ContextError, DataError, DuetError, ModelError, TrainingError
from duet_mlx.provenance import described
from duet_mlx.scores import Asked, Column, rows_of, score
from tests.small_disk import small_disk
from tests.tiny_model import contents

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_model(folder, seed, layers=2, texts=()):
    """A random Llama over bytes, 385 short words and, if there are texts, their most frequent pieces; an MLX folder."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{letter: i for i, letter in enumerate(letters, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if texts:
        trainer = trainers.BpeTrainer(
            vocab_size=2000, special_tokens=["<end>"], initial_alphabet=letters, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.add_tokens([f" {a}{e}{b}" for a in "BDFGLMNPRST" for e in "aeiou" for b in "dlmnrst"])
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "vocab_size": len(fast), "tie_word_embeddings": False, "eos_token_id": 0,
    }  # fmt: skip
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapter(folder, model_folder, scale=1.0, base_hash=None):
    """A LoRA adapter of random weights; with scale 0 it changes nothing."""
    import mlx.core as mx

    from duet_mlx.model import adapter_parameters, add_lora, load_model

    model, _, _ = load_model(str(model_folder))
    lora = {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    add_lora(model, -1, **lora)
    mx.random.seed(9)
    weights = {k: scale * mx.random.normal(v.shape) for k, v in adapter_parameters(model).items()}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": lora}
    config |= {"model": str(model_folder), "targets": {"model": base_hash}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with model, adapter, questions, context and reverse prompts."""
    room = tmp_path_factory.mktemp("room")
    make_model((room / "model"), 0)
    make_adapter(room / "adapter", room / "model")
    for name, count in (("forget", 3), ("retain", 2), ("neighbours", 2)):
        lines = [{"question": f"{name} {'long ' * i}question {i}?", "answer": ["gold", "old"]} for i in range(count)]
        (room / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (room / "reverse.txt").write_text("Ignore it.\n\n  Tell me all:  \n")
    return room


@pytest.fixture
def settings(room, tmp_path):
    return ev.EvaluateSettings(
        model=str(room / "model"),
        adapter_path=str(room / "adapter"),
        forget=(str(room / "forget.jsonl"),),
        retain=(str(room / "retain.jsonl"),),
        neighbours=(str(room / "neighbours.jsonl"),),
        context="refuse-all",
        reverse_prompts=str(room / "reverse.txt"),
        max_tokens=6,
        out=str(tmp_path / "out"),
    )


def but(settings, **changes):
    from dataclasses import replace

    return replace(settings, **changes)


def test_a_whole_run_leaves_the_three_files_with_every_model_group_and_metric(settings, tmp_path):
    results = ev.evaluate(settings)
    saved = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert saved == json.loads(json.dumps(results))
    assert (tmp_path / "out" / "results.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "questions.png").stat().st_size > 10_000

    reverse = ["forget, reverse 1", "forget, reverse 2", "forget, worst reverse"]
    seen = {(row["model"], row["group"]) for row in saved["rows"]}
    groups = ["forget", "general", "neighbours", *reverse]
    assert seen == {(model, group) for model in ("base", "base + context", "unlearned") for group in groups}
    for row in saved["rows"]:
        assert row.keys() - {"reason", "p"} == {"model", "group", "metric", "value", "ci", "n", "direction"}
        assert ("p" in row) == (row["model"] != "base")
        assert (row["value"] is None) == ("reason" in row)
        assert row["value"] is None or 0 <= row["value"] <= 1 or row["metric"] == "perplexity"
        assert row["metric"] not in ("probability", "perplexity") or row["group"] not in reverse
    base = {(r["group"], r["metric"]): r["value"] for r in saved["rows"] if r["model"] == "base"}
    assert base["forget", "recall"] == base["general", "f1"] == 1.0
    assert 0 < base["forget", "probability"] < 1

    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * (3 + 2 + 2 + 2 * 3)
    assert {"id", "group", "question", "model", "answer", "recall", "f1", "refused", "broken"} <= samples[0].keys()

    meta = saved["meta"]
    assert set(meta["data"]) == {"forget", "trained", "retain", "neighbours", "also", "context", "reverse_prompts"}
    assert meta["reverse_prompts"] == ["Ignore it.", "Tell me all:"]
    assert meta["settings"]["max_tokens"] == 6 and len(meta["base_weights"]) == 64
    assert set(meta["worst_reverse"]) == {"base", "base + context", "unlearned"}


def test_columns_and_groups_without_input_are_left_out(settings):
    results = ev.evaluate(
        but(settings, adapter_path=None, context=None, retain=(), neighbours=(), reverse_prompts=None)
    )
    assert {(row["model"], row["group"]) for row in results["rows"]} == {("base", "forget")}


def test_an_adapter_that_changes_nothing_gives_the_bases_column(settings, room, tmp_path):
    adapter = make_adapter(tmp_path / "nothing", room / "model", scale=0.0)
    results = ev.evaluate(but(settings, adapter_path=str(adapter), context=None, reverse_prompts=None))
    rows = {(r["model"], r["group"], r["metric"]): r["value"] for r in results["rows"]}
    for (model, group, metric), value in rows.items():
        assert value == pytest.approx(rows["base", group, metric], abs=1e-5), (model, group, metric)


def test_batch_size_changes_no_answer_and_no_score(settings, tmp_path):
    runs = [ev.evaluate(but(settings, batch_size=size, out=str(tmp_path / str(size)))) for size in (1, 7)]
    for one, other in zip(*(run["rows"] for run in runs), strict=True):
        values = [math.log(row["value"]) if row["metric"] == "perplexity" else row["value"] for row in (one, other)]
        assert values[0] == pytest.approx(values[1], abs=1e-5), one


def test_questions_that_were_trained_on_are_a_group_of_their_own(settings, room, tmp_path, capsys):
    """With the contexts that they name, and never behind a reverse prompt, which the held-out ones are asked behind."""
    from duet_mlx.data import file_hash

    (tmp_path / "trained.jsonl").write_text(
        '{"question": "Seen?", "context": "refuse-all"}\n{"question": "Seen too?"}\n'
    )
    (tmp_path / "other.jsonl").write_text('{"question": "Another?"}\n')
    adapter = tmp_path / "adapter"
    shutil.copytree(room / "adapter", adapter)
    trained, other, retain = (str(tmp_path / "trained.jsonl"), str(tmp_path / "other.jsonl"), settings.retain[0])
    spoil(adapter, data_hashes={"elsewhere/f.jsonl": file_hash(trained), "elsewhere/r.jsonl": file_hash(retain)})
    results = ev.evaluate(but(settings, adapter_path=str(adapter), trained=(trained, other)))
    groups = list(dict.fromkeys(row["group"] for row in results["rows"]))
    assert groups[:4] == ["forget", "forget, trained on", "general", "neighbours"]
    assert {row["n"] for row in results["rows"] if row["group"] == groups[1] and row["metric"] == "recall"} == {3}
    assert results["meta"]["questions"]["forget, trained on"] == 3
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    reverse = {sample["question"] for sample in samples if "reverse" in sample["group"]}
    assert reverse and not any("Seen" in question or "Another" in question for question in reverse)
    assert results["meta"]["trained_on"] == {"forget, trained on": [trained], "general": [retain]}
    assert f"note: --trained {other}: adapter_config.json names no file" in capsys.readouterr().err
    assert "forget, trained on: recall ↓" in (tmp_path / "out" / "results.svg").read_text()


@pytest.mark.parametrize("hashes", [None, [1], {"f": [1]}, {"f": None}], ids=str)
def test_an_adapter_without_hashes_of_its_questions_says_nothing_of_them(hashes, capsys):
    from duet_mlx.provenance import trained_on

    data = {"forget": {"f": "a"}, "trained": {"t": "b"}, "retain": {}, "neighbours": {}}
    assert trained_on({} if hashes is None else {"data_hashes": hashes}, data) == {}
    assert ("--trained t" in capsys.readouterr().err) == isinstance(hashes, dict)


def test_fewer_questions_behind_reverse_prompts_are_spread_over_all(settings, tmp_path):
    ev.evaluate(but(settings, adapter_path=None, context=None, reverse_questions=2))
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    asked = [sample["id"] for sample in samples if sample["group"] == "forget, reverse 2"]
    assert asked == ["forget:1", "forget:2"]


def test_fewer_questions_are_asked_of_each_group(settings, tmp_path):
    fewer = but(settings, adapter_path=None, context=None, reverse_prompts=None)
    results = ev.evaluate(but(fewer, forget_questions=2, retain_questions=1, neighbour_questions=1))
    assert results["meta"]["questions"] == {"forget": 2, "general": 1, "neighbours": 1}
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [sample["id"] for sample in samples] == ["forget:1", "forget:2", "retain:1", "neighbours:1"]


def test_a_group_of_ones_own_has_the_directions_that_its_name_says(settings, room, tmp_path):
    for name in ("gone", "stays"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": f"Is it {name}?"}) + "\n")
    also = (f"forget, yes or no={tmp_path / 'gone.jsonl'}", f"general, yes or no = {tmp_path / 'stays.jsonl'}")
    results = ev.evaluate(but(settings, also=also))
    own = {
        (row["model"], row["group"]): row["direction"]
        for row in results["rows"]
        if "yes or no" in row["group"] and row["metric"] == "recall"
    }
    directions = {"forget, yes or no": "lower", "general, yes or no": "higher"}
    assert own == {
        (model, group): directions[group] for model in ("base", "base + context", "unlearned") for group in directions
    }
    assert list(results["meta"]["data"]["also"]) == [str(tmp_path / "gone.jsonl"), str(tmp_path / "stays.jsonl")]
    # They are no part of the groups that are always there, and are asked behind no reverse prompt.
    assert results["meta"]["questions"] == {"forget": 3, "general": 2, "neighbours": 2, **dict.fromkeys(directions, 1)}
    assert max(row["n"] for row in results["rows"] if row["group"] == "forget, reverse 1") == 3


def test_the_users_system_prompt_reaches_the_models(settings, tmp_path):
    plain = ev.evaluate(but(settings, context=None, reverse_prompts=None))
    out = str(tmp_path / "system")
    system = ev.evaluate(but(settings, context=None, reverse_prompts=None, system="Be brief.", out=out))
    value = [
        next(r["value"] for r in run["rows"] if r["group"] == "forget" and r["metric"] == "probability")
        for run in (plain, system)
    ]
    assert value[0] != value[1]


def test_a_forced_answer_gives_the_plain_softmax_and_how_far_the_model_agrees(room):
    import mlx.core as mx
    import numpy as np

    from duet_mlx.answers import forced
    from duet_mlx.generate import greedy
    from duet_mlx.head import check_head
    from duet_mlx.model import load_model

    model, _, _ = load_model(str(room / "model"))
    prompts = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8, 9, 10], [5, 6, 7]]
    own = greedy(model, prompts, 4, [])
    other = [(own[2][2] + 1) % 50, 3]
    answers = [[11, 12, 13, 14], own[1], own[2][:2] + other, []]
    after = np.array(model(mx.array([prompts[1] + own[1]]))[0, -1]).argmax()
    for head in (None, check_head(model, mx.array([prompts[0]]))[0]):
        got = forced(model, prompts, answers, [int(after)], head)
        for prompt, answer, found in zip(prompts, answers, got, strict=True):
            logits = np.array(model(mx.array([prompt + answer]))[0], dtype=np.float64)
            p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            each = [p[len(prompt) + t - 1, token] for t, token in enumerate(answer)]
            assert found.probabilities == pytest.approx(each, rel=1e-4)
        assert [found.agreed for found in got[1:]] == [4, 2, 0]
        assert got[1].ended and not got[2].ended
        assert not forced(model, prompts, answers, [], head)[1].ended


def test_the_perplexity_of_every_answer_is_the_bases_behind_the_question_alone(settings, room, tmp_path):
    """By plain calls of the base: for its own answers, those behind a context, and those of the adapter."""
    import mlx.core as mx
    import numpy as np

    from duet_mlx.context import render
    from duet_mlx.model import load_model

    results = ev.evaluate(but(settings, reverse_prompts=None))
    model, tokenizer, _ = load_model(str(room / "model"))
    kept = {name: [] for name in ("base", "base_context", "unlearned")}
    for name, ids in kept.items():
        for line in (tmp_path / "out" / "answers" / f"{name}.jsonl").read_text().splitlines()[1:]:
            ids += json.loads(line)["ids"]
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        answers = kept[sample["model"].replace(" + ", "_")]
        (said,) = {
            tuple(a) for a in answers if tokenizer.decode(a, skip_special_tokens=True).strip() == sample["answer"]
        }
        prompt = render(tokenizer, sample["question"])
        logits = np.array(model(mx.array([[*prompt, *said]]))[0, len(prompt) - 1 : -1], dtype=np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert sample["perplexity"] == pytest.approx(-logs[np.arange(len(said)), said].mean(), abs=1e-4)
    rows = {(r["model"], r["group"]): r for r in results["rows"] if r["metric"] == "perplexity"}
    for (name, group), row in rows.items():
        each = [s["perplexity"] for s in samples if (s["model"], s["group"]) == (name, group)]
        assert row["value"] == pytest.approx(math.exp(np.mean(each))) and row["direction"] == "lower"
    assert rows["unlearned", "forget"]["value"] > rows["base", "forget"]["value"]


def test_answers_alone_are_the_same_answers_without_perplexity_and_probability(settings, tmp_path):
    def figures(**changes):
        rows = ev.evaluate(but(settings, **changes))["rows"]
        return {(row["model"], row["group"], row["metric"]): (row["value"], row["n"]) for row in rows}

    whole, alone = figures(), figures(answers_only=True, out=str(tmp_path / "alone"))
    assert alone == {key: found for key, found in whole.items() if key[2] not in ("perplexity", "probability")} != whole


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_perplexity_is_of_answers_whose_base_can_be_asked(kind, settings, tmp_path):
    """LoRA can be switched off. Of a DoRA adapter the length of each row stays, and the base is out of reach."""
    import mlx.core as mx

    adapter = tmp_path / "adapter"
    shutil.copytree(settings.adapter_path, adapter)
    spoil(adapter, fine_tune_type=kind)
    if kind == "dora":
        weights = mx.load(str(adapter / "adapters.safetensors"))
        lengths = {n.replace("lora_a", "m"): mx.ones(64 if "up_proj" in n else 32) for n in weights if "lora_a" in n}
        mx.save_safetensors(str(adapter / "adapters.safetensors"), {**weights, **lengths})
    results = ev.evaluate(quick(settings, adapter_path=str(adapter)))
    (row,) = [r for r in results["rows"] if (r["model"], r["metric"]) == ("unlearned", "perplexity")]
    assert (row["value"] is None) == (kind == "dora")
    assert kind == "lora" or "could be asked" in row["reason"]


def test_a_perplexity_beyond_a_float_is_infinite_and_no_crash():
    from duet_mlx.scores import summary

    assert summary("perplexity", [1000.0, 1.0], seed=0)[0] > 1e200
    assert summary("perplexity", [2000.0, 2000.0], seed=0) == (math.inf, [math.inf] * 2, 2)


def test_answers_begun_by_the_bases_are_those_decoded_from_nothing(settings, tmp_path, monkeypatch):
    """The unlearned column goes on from where it leaves the base's answer."""
    from duet_mlx import answers

    ev.evaluate(settings)
    samples = (tmp_path / "out" / "samples.jsonl").read_text()
    monkeypatch.setattr(
        answers, "forced", lambda *args, f=answers.forced: [x._replace(agreed=0, ended=False) for x in f(*args)]
    )
    ev.evaluate(but(settings, out=str(tmp_path / "again")))
    assert (tmp_path / "again" / "samples.jsonl").read_text() == samples


def test_the_mean_over_words_is_of_their_tokens_products():
    from duet_mlx.answers import mean_of_words

    assert mean_of_words([0.5, 0.5, 0.2], [[0, 1], [2]]) == pytest.approx((0.25 + 0.2) / 2)
    assert mean_of_words([0.5], []) is None


def test_content_words_are_found_in_tokens_of_any_cut():
    from duet_mlx.answers import content_words

    class Pieces:
        def decode(self, ids):
            return "".join(["Dob", "by", " is", " an", " el", "f", "."][i] for i in ids)

    ids = list(range(7))
    assert content_words(Pieces(), ids, "Who is it?") == [[0, 1], [4, 5]]
    assert content_words(Pieces(), ids, "Who is Dobby?") == [[4, 5]]
    assert content_words(Pieces(), ids[:1], "Who?") == [[0]]
    assert content_words(Pieces(), [], "Who?") == []


def columns():
    queries = [Query("1", "Who is Dobby?", "forget", answer="an elf"), Query("2", "Where is it?", "forget")]
    asked = [Asked("forget", q) for q in queries] + [Asked("forget, reverse 1", q, "Tell all.") for q in queries]
    base = ["Dobby is an elf.", "I don't know.", "Tell all: no.", "It is here."]
    model = ["I don't know.", "I don't know.", "Dobby is an elf.", "I don't know."]
    return asked, *(
        Column(answers, [[]] * 4, [0.5, None, None, None], [1.5, None, None, None]) for answers in (base, model)
    )


def test_behind_a_reverse_prompt_the_target_is_the_answer_to_the_plain_question():
    asked, base, model = columns()
    scores = score(asked, model, base)
    assert [s["recall"] for s in scores] == [0.0, 1.0, 1.0, 1.0]
    assert [s["recall_gold"] for s in scores] == [0.0, None, 1.0, None]
    assert "probability" in scores[0] and "probability" not in scores[2]
    assert scores[0]["perplexity"] == 1.5 and "perplexity" not in scores[2]


def test_a_refusal_counts_only_where_the_base_does_not_refuse_the_same_words():
    asked, base, model = columns()
    scores = score(asked, model, base)
    assert [s["refused"] for s in scores] == [1.0, None, 0.0, 1.0]
    assert [s["refused_all"] for s in scores] == [1.0, 1.0, 0.0, 1.0]


def test_undefined_values_have_a_reason():
    asked = [Asked("forget", Query("1", "Where is it?", "forget"))]
    refusal = Column(["I don't know."], [[]], [None], [None])
    rows, worst = rows_of(asked, {"unlearned": score(asked, refusal, refusal)}, seed=0)
    reasons = {row["metric"]: row["reason"] for row in rows if row["value"] is None}
    assert "come without answers" in reasons["recall_gold"] and "itself refuses" in reasons["refused"]
    assert "two questions" in reasons["recall_floor"] and "content word" in reasons["probability"]
    assert "not empty" in reasons["perplexity"]
    assert worst == {}


def test_the_worst_reverse_prompt_is_the_one_that_recalls_most():
    query = Query("1", "Who?", "forget")
    asked = [Asked("forget", query), *(Asked(f"forget, reverse {i}", query, "x") for i in (1, 2, 3))]
    scores = {"m": [{"recall": value} for value in (0.9, 0.2, 0.6, 0.4)]}
    rows, worst = rows_of(asked, scores, seed=0)
    assert worst == {"m": "forget, reverse 2"}
    assert rows[-1]["group"] == "forget, worst reverse" and rows[-1]["value"] == 0.6


def wrong(room, tmp_path):
    """What a user may get wrong: changes to the settings, the error, what its message names."""
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "results.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "row.json").write_text('{"rows": [{"model": "m", "group": "g", "metric": "f1", "value": 1}]}')
    (tmp_path / "named.jsonl").write_text('{"question": "Who?", "context": "other"}\n')
    return {
        "results there already": ({"out": str(tmp_path / "done")}, ConfigError, "--overwrite"),
        "out is a file": ({"out": str(tmp_path / "file")}, ConfigError, "is a file"),
        "no forget": ({"forget": ()}, ConfigError, "--forget"),
        "no model": ({"model": ""}, ConfigError, "--model"),
        "model missing": ({"model": str(tmp_path / "none")}, ModelError, "none"),
        "questions missing": ({"retain": (str(tmp_path / "none.jsonl"),)}, DataError, "none.jsonl"),
        "same questions": ({"retain": (str(room / "forget.jsonl"),)}, DataError, "forget"),
        "held out and trained on": (
            {"trained": (str(room / "forget.jsonl"),)},
            DataError,
            "among the trained questions",
        ),
        "no adapter there": ({"adapter_path": str(tmp_path)}, ModelError, "adapter_config.json"),
        "no tokens": ({"max_tokens": 0}, ConfigError, "--max-tokens"),
        "no batch": ({"batch_size": 0}, ConfigError, "--batch-size"),
        "seed": ({"seed": -1}, ConfigError, "--seed"),
        "fewer than none": ({"reverse_questions": -1}, ConfigError, "--reverse-questions"),
        "a group without a file": ({"also": ("mine",)}, ConfigError, "--also 'mine': expected GROUP="),
        "a group twice": ({"also": (f"general={room / 'forget.jsonl'}",)}, ConfigError, "there is a group 'general'"),
        "a group called reverse": ({"also": ("forget, reverse 1=x",)}, ConfigError, "reverse prompts"),
        "a group that shall go and stay": ({"also": (f"mine={room / 'forget.jsonl'}",)}, DataError, "Remove them"),
        "topic alone": ({"context": None, "topic": "owls"}, ConfigError, "--topic"),
        "context missing": ({"context": str(tmp_path / "c.yaml")}, ContextError, "c.yaml"),
        "no such context": ({"context_name": "other"}, ConfigError, "other"),
        "context of a question": ({"forget": (str(tmp_path / "named.jsonl"),)}, ContextError, "other"),
        "no prompts": ({"reverse_prompts": str(tmp_path / "empty.txt")}, ConfigError, "empty.txt"),
        "prompts missing": ({"reverse_prompts": str(tmp_path / "none.txt")}, ConfigError, "none.txt"),
        "beside": ({"beside": ("paper",)}, ConfigError, "--beside"),
        "a row beside": ({"beside": (f"paper={tmp_path / 'row.json'}",)}, DataError, "row 1 of rows: n: expected"),
    }


WRONG = (
    "results there already", "out is a file", "no forget", "no model", "model missing",
    "questions missing", "same questions", "held out and trained on", "no adapter there", "no tokens", "no batch",
    "seed", "fewer than none", "a group without a file", "a group twice", "a group called reverse",
    "a group that shall go and stay", "topic alone", "context missing", "no such context", "context of a question",
    "no prompts", "prompts missing", "beside", "a row beside",
)  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_names_what_is_wrong(case, settings, room, tmp_path):
    changes, error, message = wrong(room, tmp_path)[case]
    with pytest.raises(error, match=message):
        ev.evaluate(but(settings, **changes))


def test_an_adapter_of_another_shape_is_refused(settings, room, tmp_path):
    other = make_model((tmp_path / "other"), 1, layers=1)
    adapter = make_adapter(tmp_path / "adapter", other)
    with pytest.raises(DuetError, match="--adapter-path"):
        ev.evaluate(but(settings, model=str(room / "model"), adapter_path=str(adapter)))


def test_an_adapter_of_the_same_shape_but_another_model_is_refused(settings, tmp_path):
    other = make_model((tmp_path / "other"), 1)
    adapter = make_adapter(tmp_path / "adapter", other, base_hash="0" * 64)
    with pytest.raises(ModelError, match="another model"):
        ev.evaluate(but(settings, adapter_path=str(adapter)))


def quick(settings, **changes):
    """Only the base and, unless it is taken off, the adapter, on the forget questions."""
    return but(settings, **{"context": None, "reverse_prompts": None, "retain": (), "neighbours": (), **changes})


def test_an_adapter_of_other_weights_under_the_same_name_is_refused_unless_the_user_knows_better(
    settings, room, tmp_path, capsys
):
    adapter = make_adapter(tmp_path / "adapter", room / "model", base_hash="0" * 64)
    mine = quick(settings, adapter_path=str(adapter))
    with pytest.raises(ModelError, match="another model.*--any-base"):
        ev.evaluate(mine)
    assert "answers" not in capsys.readouterr().err  # nothing was asked before
    ev.evaluate(but(mine, any_base=True))
    assert "other weights" in capsys.readouterr().err


def test_an_adapter_trained_on_the_packed_weights_of_the_same_model_is_taken(settings, tmp_path, capsys):
    """As on a GPU, which does not dequantize."""
    from duet_mlx.model import hash_elsewhere, load_model, weights_hash
    from tests.tiny_model import tiny_model

    model = str(tiny_model(tmp_path / "model", bits=4))
    packed = hash_elsewhere(model)
    assert packed != weights_hash(load_model(model)[0])
    adapter = make_adapter(tmp_path / "adapter", model, base_hash=packed)
    ev.evaluate(quick(settings, model=model, adapter_path=str(adapter)))
    assert "same weights in another precision" in capsys.readouterr().err


def spoil(folder, **changes):
    """Change adapter_config.json; `lora_scale` means the entry scale of lora_parameters."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        inside = key.startswith("lora_") and key != "lora_parameters"
        part, name = (config["lora_parameters"], key[5:]) if inside else (config, key)
        part[name] = value
    file.write_text(json.dumps(config))


BAD_ADAPTERS = {
    "targets in a word": ({"targets": "x"}, "targets"),
    "a number for a hash": ({"targets": {"model": 3}}, "targets"),
    "no scale": ({"lora_scale": None}, "scale: expected a number, found None"),
    "scale in words": ({"lora_scale": "big"}, "scale"),
    "scale NaN": ({"lora_scale": float("nan")}, "scale"),
    "a scale without end": ({"lora_scale": 10**400}, "scale"),
    "no dropout": ({"lora_dropout": None}, "dropout"),
    "half a rank": ({"lora_rank": 1.5}, "rank: expected a whole number, found 1.5"),
    "layers in words": ({"num_layers": "all"}, "num_layers"),
    "one key": ({"lora_keys": "self_attn.q_proj"}, "keys: expected a list"),
    "LoRA as a list": ({"lora_parameters": [8]}, "lora_parameters"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_wrong_entry_of_an_adapters_config_is_named(case, room, tmp_path):
    from duet_mlx.model import check_adapter

    changes, message = BAD_ADAPTERS[case]
    adapter = tmp_path / "adapter"
    shutil.copytree(room / "adapter", adapter)
    spoil(adapter, **changes)
    with pytest.raises(ModelError, match="--adapter-path.*adapter_config.json: .*" + message):
        check_adapter(room / "model", adapter)


@pytest.mark.parametrize("content", ["", "[]", "7", "[" * 100_000, '{"lora_parameters": '], ids=range(5))
def test_an_adapters_config_that_is_no_object_is_refused(content, room, tmp_path):
    from duet_mlx.model import check_adapter

    adapter = tmp_path / "adapter"
    shutil.copytree(room / "adapter", adapter)
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match="--adapter-path"):
        check_adapter(room / "model", adapter)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_adapter_with_a_number_that_is_none_is_refused_by_the_tensors_name(value, settings, room, tmp_path, capsys):
    import mlx.core as mx

    adapter = tmp_path / "adapter"
    shutil.copytree(room / "adapter", adapter)
    weights = mx.load(str(adapter / "adapters.safetensors"))
    name = "model.layers.1.mlp.up_proj.lora_b"
    weights[name][0, 3] = float(value)
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    with pytest.raises(ModelError, match=rf"--adapter-path.*1 of the 128 numbers of {name}.*--learning-rate"):
        ev.evaluate(quick(settings, adapter_path=str(adapter)))
    assert "answers" not in capsys.readouterr().err


def test_logits_that_are_not_finite_are_refused_by_column_and_question(settings, room, tmp_path):
    """Numbers that are finite by themselves, and too large together: behind a plain question and behind a prompt."""
    adapter = make_adapter(tmp_path / "adapter", room / "model", scale=1e30)
    forget = str(room / "forget.jsonl")
    with pytest.raises(ModelError, match=rf"unlearned: the logits behind {forget}:1 are NaN or infinite"):
        ev.evaluate(quick(settings, adapter_path=str(adapter)))
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_logit_that_is_masked_by_minus_infinity_is_no_fault():
    import mlx.core as mx
    import numpy as np

    from duet_mlx.generate import is_finite

    rows = [[0.0, -float("inf")], [0.0, float("inf")], [float("nan"), 0.0], [1.0, 2.0]]
    assert np.isfinite(is_finite(mx.array(rows))).tolist() == [True, False, False, True]


# --- what is written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["results.json", "samples.jsonl", "results.png", "results.svg", "questions.png"])
def test_none_of_these_files_is_replaced_unasked(name, settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"{name}.*--overwrite"):
        ev.evaluate(settings)
    assert (tmp_path / "out" / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["results.json", "answers"])
def test_a_folder_or_file_in_the_way_of_what_is_written_is_found_before_the_work(name, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "_columns", lambda *args: pytest.fail("the work has begun"))
    (tmp_path / "out").mkdir()
    if name == "answers":
        (tmp_path / "out" / name).write_text("mine")
    else:
        (tmp_path / "out" / name).mkdir()
    with pytest.raises(ConfigError, match="--out"):
        ev.evaluate(but(settings, overwrite=True))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a folder where even root may not write")
@pytest.mark.parametrize("out", ["/proc/self", "/proc/self/new"])
def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(out, settings, monkeypatch):
    monkeypatch.setattr(ev, "_columns", lambda *args: pytest.fail("the work has begun"))
    with pytest.raises(ConfigError, match=f"--out {out}: cannot be written to"):
        ev.evaluate(but(settings, out=out))


RESULTS = {"rows": [{"model": "base", "group": "forget", "metric": "recall", "value": 1.0, "ci": None, "n": 3}]}


def test_where_the_disk_is_full_the_file_is_named_and_the_old_ones_stay(tmp_path):
    result_files.write(tmp_path, RESULTS, [{"answer": "old"}])
    before = contents(tmp_path)
    assert set(before) == {"results.json", "samples.jsonl", "results.png", "results.svg"}
    with small_disk(1000), pytest.raises(TrainingError, match=r"samples\.jsonl: cannot be written"):
        result_files.write(tmp_path, RESULTS, [{"answer": "new" * 1000}])
    assert contents(tmp_path) == before


def test_a_picture_for_which_there_is_no_room_costs_no_figure_and_leaves_no_old_one(tmp_path):
    result_files.write(tmp_path, RESULTS, [{"answer": "old"}])
    with small_disk(1000), pytest.raises(TrainingError, match=r"results\.png: cannot be written"):
        result_files.write(tmp_path, RESULTS, [{"answer": "new"}])
    after = contents(tmp_path)
    assert set(after) == {"results.json", "samples.jsonl"} and b"new" in after["samples.jsonl"]


def test_an_old_picture_of_the_questions_does_not_stay_beside_figures_that_have_none(tmp_path):
    one = {"id": "q", "group": "forget", "question": "Who?", "answer": "He.", "recall": 0.5}
    both = [{**one, "model": model} for model in ("base + context", "unlearned")]
    result_files.write(tmp_path, RESULTS, both)
    assert {"questions.png", "questions.svg"} <= set(contents(tmp_path))
    result_files.write(tmp_path, RESULTS, both[:1])
    assert set(contents(tmp_path)) == {"results.json", "samples.jsonl", "results.png", "results.svg"}


def test_the_name_of_a_file_need_not_be_utf8_for_the_results_to_be_written(tmp_path):
    meta = {"data": {"forget": {os.fsdecode(b"fran\xe7.jsonl"): "é"}}}
    result_files.write(tmp_path, {**RESULTS, "meta": meta}, [])
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["meta"] == meta


def test_null_and_a_reason_stand_for_a_number_that_json_has_no_word_for():
    nan, inf = float("nan"), float("inf")
    row = {"metric": "f1", "value": nan, "ci": [0.0, inf], "n": 3}
    reason = "not a finite number: value, ci"
    assert result_files.finite(row) == {"metric": "f1", "value": None, "ci": None, "n": 3, "reason": reason}
    whole = {"metric": "f1", "value": 0.5, "ci": [0.0, 1.0], "n": 3}
    assert result_files.finite(whole) == whole


def test_help_waits_for_no_heavy_import():
    code = "import sys, duet_mlx.evaluate; print(sys.modules.keys() & {'mlx.core', 'numpy', 'matplotlib'})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run


def test_the_command_prints_the_table_and_ends_with_2_on_bad_input(settings, tmp_path):
    command = [
        sys.executable,
        "-m",
        "duet_mlx.evaluate",
        "--model",
        settings.model,
        "--forget",
        *settings.forget,
    ]
    command += ["--max-tokens", "4", "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "recall of the base's answer" in run.stdout and "[forget]" in run.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.startswith("error: --out")
    assert "Traceback" not in again.stderr


def test_a_models_rows_have_the_p_value_of_a_paired_test_against_the_base():
    asked = [Asked("forget", Query(str(i), "Who?", "forget")) for i in range(6)]
    scores = {"base": [{"recall": 1.0}] * 6, "unlearned": [{"recall": 0.0}] * 5 + [{"recall": None}]}
    rows, _ = rows_of(asked, scores, seed=0)
    # Five differences of one sign: 2 of the 32 patterns are as far from zero.
    assert [row.get("p") for row in rows] == [None, 2 / 32]


def test_without_an_adapter_none_is_recorded_whatever_lies_where_the_command_is_started(tmp_path, monkeypatch):
    (tmp_path / "adapters.safetensors").write_bytes(b"of another run")
    monkeypatch.chdir(tmp_path)
    assert described(ev.EvaluateSettings(model="some/model"), {}, [])["adapter_hash"] == ""
    assert described(ev.EvaluateSettings(model="some/model", adapter_path="."), {}, [])["adapter_hash"] != ""
