"""Benchmarks in an evaluation: from files to rows, samples, table and picture, with a tiny model."""

import json
import math
import shutil
from pathlib import Path

import pytest

from duet_mlx import benchmark_run, report
from duet_mlx import evaluate as ev
from duet_mlx.benchmark_scores import rows_of, score
from duet_mlx.errors import ConfigError, DataError, ModelError
from duet_mlx.items import Item
from duet_mlx.measures import BENCHMARK, BY_KEY, MEASURES
from duet_mlx.picture import picture
from duet_mlx.probe import Reply
from tests.unit.test_evaluate import make_adapter, make_model

DATA = Path(__file__).resolve().parents[1] / "data"


def first_lines(source, count, target):
    target.write_text("\n".join((DATA / source).read_text(encoding="utf-8").split("\n")[:count]), encoding="utf-8")


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Model, adapter, retrained model, and TOFU's four files of a few rows each."""
    room = tmp_path_factory.mktemp("room")
    texts = (DATA / "tofu" / "forget01_perturbed.json").read_text(encoding="utf-8").splitlines()
    make_model(room / "model", 0, texts=texts)
    make_model(room / "retrained", 5, texts=texts)
    make_adapter(room / "adapter", room / "model")
    (room / "tofu").mkdir()
    first_lines("tofu/forget01_perturbed.json", 4, room / "tofu" / "forget01_perturbed.json")
    rows = (DATA / "tofu" / "forget01_perturbed.json").read_text(encoding="utf-8").split("\n")
    (room / "tofu" / "retain_perturbed.json").write_text("\n".join(rows[20:23]), encoding="utf-8")
    for name in ("real_authors", "world_facts"):
        first_lines(f"tofu/{name}_perturbed.json", 3, room / "tofu" / f"{name}_perturbed.json")
    return room


@pytest.fixture
def settings(room, tmp_path):
    return ev.EvaluateSettings(
        model=str(room / "model"),
        adapter_path=str(room / "adapter"),
        retrained=str(room / "retrained"),
        benchmark=(f"tofu:forget01@{room / 'tofu'}",),
        max_tokens=4,
        out=str(tmp_path / "out"),
    )


def but(settings, **changes):
    from dataclasses import replace

    return replace(settings, **changes)


GROUPS = [f"{side}, tofu:forget01" for side in ("forget", "retain", "real authors", "world facts")]
WHOLE = "tofu:forget01 as a whole"


@pytest.fixture(scope="module")
def tofu(room, tmp_path_factory):
    """The folder of an evaluation on TOFU with all four columns."""
    out = tmp_path_factory.mktemp("out")
    ev.evaluate(
        ev.EvaluateSettings(
            model=str(room / "model"),
            adapter_path=str(room / "adapter"),
            retrained=str(room / "retrained"),
            context="refuse-all",
            benchmark=(f"tofu:forget01@{room / 'tofu'}",),
            max_tokens=4,
            out=str(out),
        )
    )
    return out


def test_every_model_has_every_measure_of_tofu_or_a_reason(tofu):
    results = json.loads((tofu / "results.json").read_text(), parse_constant=pytest.fail)
    rows = {(row["model"], row["group"], row["metric"]): row for row in results["rows"]}
    models = ("base", "base + context", "unlearned", "retrained")
    of_a_group = {
        "rouge_recall", "answer_probability", "truth_ratio", "exact_memorisation", "extraction_strength", "refusals",
        "broken", "perplexity",
    }  # fmt: skip
    expected = {(model, group, metric) for model in models for group in GROUPS for metric in of_a_group}
    expected |= {(model, WHOLE, metric) for model in models for metric in ("model_utility", "forget_quality")}
    assert set(rows) == expected
    for (model, _, metric), row in rows.items():
        assert (row["value"] is None) == ("reason" in row)
        assert row["value"] is None or metric == "perplexity" or 0 <= row["value"] <= 1
        assert ("p" in row) == (model != "base" and row["group"] != WHOLE)
        assert row["direction"] == BY_KEY[metric].direction(row["group"])
    assert rows["retrained", WHOLE, "forget_quality"]["value"] == 1.0
    assert rows["retrained", GROUPS[0], "perplexity"]["value"] is None
    low, high = rows["base", WHOLE, "model_utility"]["ci"]
    assert low <= rows["base", WHOLE, "model_utility"]["value"] <= high
    assert results["meta"]["benchmarks"]["tofu:forget01"]["questions"] == 4 + 3 + 3 + 3
    assert {metric.key for metric in MEASURES} == set(results["meta"]["metrics"])


def test_samples_hold_each_question_with_each_models_answer_and_scores(tofu):
    samples = [json.loads(line) for line in (tofu / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 13 and len({(s["model"], s["group"], s["id"]) for s in samples}) == len(samples)
    assert {"id", "group", "question", "model", "answer", "rouge_recall", "ratio", "truth_ratio"} <= samples[0].keys()


def test_answers_are_kept_beside_the_results_a_file_a_column(tofu):
    assert {path.name for path in tofu.iterdir() if path.is_file()} == {
        "questions.png", "questions.svg", "results.json", "results.png", "results.svg", "samples.jsonl"
    }  # fmt: skip
    columns = ("base", "base_context", "unlearned", "retrained")
    assert {path.name for path in (tofu / "answers").iterdir()} == {f"tofu_forget01_{c}.json" for c in columns}


def narrow(folder, copy, window=2048):
    """A copy of a model that was made to read only so many tokens."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": window}))
    return str(copy)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("Who? " * 3000, r"--benchmark qa:forget: q:2: \d+ tokens and 4 positions exceed the model's window of 2048"),
        ("Who is <end>?", "q:2: question .* a control token"),
    ],
)
def test_a_question_that_cannot_be_asked_is_found_before_the_first_answer(question, message, settings, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Who?"}) + "\n" + json.dumps({"question": question}))
    limited = narrow(settings.model, tmp_path / "model")
    changes = {"model": limited, "benchmark": (f"qa:forget@{tmp_path / 'q.jsonl'}",), "adapter_path": None}
    with pytest.raises(DataError, match=message):
        ev.evaluate(but(settings, **changes, retrained=None))
    assert not list((tmp_path / "out" / "answers").iterdir())


LONG = "Who? " * 600
TOO_LONG = {
    "a passage": Item("f:1", "forget", "verbmem", LONG, answers=("x",)),
    "few shots": Item("f:1", "forget", "knowmem", "Who?", answers=("x",), shots=(Item("s", "", "", LONG, ("x",)),)),
    "options": Item("f:1", "general", "choice", "Who?", choices=("x", LONG), correct=0),
    "a text": Item("f:1", "forget", "privleak", LONG),
    "a reference": Item("f:1", "forget", "qa", "Who?", answers=(LONG,)),
    "a paraphrase": Item("f:1", "forget", "qa", "Who?", answers=("x",), paraphrased=LONG),
    "a false answer": Item("f:1", "forget", "qa", "Who?", answers=("x",), perturbed=("y", LONG)),
}


@pytest.mark.parametrize("what", TOO_LONG)
def test_whatever_is_too_long_for_the_window_is_an_error_by_benchmark_file_and_row(what, settings, room):
    from duet_mlx.model import load_tokenizer

    words, _ = load_tokenizer(str(room / "model"))
    with pytest.raises(DataError, match="--benchmark b: f:1: .* exceed the model's window of 2048"):
        benchmark_run.check_prompts(words, {"b": [TOO_LONG[what]]}, [], settings, 2048)
    benchmark_run.check_prompts(words, {"b": [TOO_LONG[what]]}, [], settings, 10_000)


def test_a_question_that_fits_by_itself_and_not_behind_the_context_is_an_error_that_says_so(settings, room):
    from duet_mlx.context import Context
    from duet_mlx.model import load_tokenizer

    words, _ = load_tokenizer(str(room / "model"))
    benchmarks = {"b": [Item("f:1", "forget", "qa", "Who?")]}
    said = "--benchmark b: f:1 behind the context 'long': .* window of 2048: .* shorten the context \"long\""
    with pytest.raises(DataError, match=said):
        benchmark_run.check_prompts(words, benchmarks, [Context("long", LONG)], settings, 2048)


def test_the_retrained_models_window_is_looked_at_before_the_first_answer(settings, room, tmp_path):
    limited = narrow(room / "retrained", tmp_path / "limited", window=64)
    with pytest.raises(DataError, match="--benchmark tofu:forget01: .* exceed the model's window of 64"):
        ev.evaluate(but(settings, retrained=limited))
    assert not list((tmp_path / "out" / "answers").iterdir())


def test_the_table_and_the_markdown_say_which_way_is_good(tofu):
    results = report.load_results(tofu / "results.json")
    for table in (report.format_table(results["rows"]), report.markdown_table(results)):
        assert "probability of the reference answer ↓" in table and "probability of the reference answer ↑" in table
        assert "forget quality ↑" in table and "forget, tofu:forget01 (4 questions)" in table


def test_the_picture_shows_forgetting_against_retention_and_every_group(tofu):
    svg = (tofu / "results.svg").read_text()
    for text in ("forgetting: 1 - ROUGE-L recall, forget, tofu:forget01", "unlearned, real authors, tofu:forget01",
                 "tofu:forget01 as a whole: model utility ↑"):  # fmt: skip
        assert text in svg  # matplotlib notes each text beside its curves
    picture(report.load_results(tofu / "results.json"), tofu / "again.svg")
    assert (tofu / "again.svg").read_text() == svg
    (tofu / "again.svg").unlink()


def test_an_adapter_that_changes_nothing_gives_the_bases_figures(settings, room, tmp_path):
    adapter = make_adapter(tmp_path / "nothing", room / "model", scale=0.0)
    results = ev.evaluate(but(settings, adapter_path=str(adapter), retrained=None))
    rows = {(row["model"], row["group"], row["metric"]): row for row in results["rows"]}
    for (model, group, metric), row in rows.items():
        base = rows["base", group, metric]["value"]
        assert row["value"] == (base if base is None else pytest.approx(base, rel=1e-4)), (model, group, metric)


def test_a_run_goes_on_with_the_replies_that_it_kept(settings, room, capsys):
    from duet_mlx.model import load_model

    model, tokenizer, _ = load_model(str(room / "model"))
    benchmarks = benchmark_run.load_benchmarks(settings.benchmark, 2)
    first = benchmark_run.replies_of("base", model, tokenizer, benchmarks, None, settings, ["hash"])
    # Without a model there is nothing to ask: all of it comes from the disk.
    assert benchmark_run.replies_of("base", None, None, benchmarks, None, settings, ["hash"]) == first
    assert "answers reused from" in capsys.readouterr().err
    with pytest.raises(AttributeError):
        benchmark_run.replies_of("base", None, None, benchmarks, None, settings, ["another model"])
    with pytest.raises(AttributeError):
        more = benchmark_run.load_benchmarks(settings.benchmark, 3)
        benchmark_run.replies_of("base", None, None, more, None, settings, ["hash"])


def test_a_run_that_was_cut_off_within_a_benchmark_goes_on_where_it_stopped(settings, room, monkeypatch, capsys):
    from duet_mlx import probe
    from duet_mlx.model import load_model

    model, tokenizer, _ = load_model(str(room / "model"))
    small = but(settings, batch_size=2)  # of the 13 questions four at a time
    benchmarks = benchmark_run.load_benchmarks(small.benchmark)
    whole = but(small, out=f"{small.out}-whole")
    expected = benchmark_run.replies_of("base", model, tokenizer, benchmarks, None, whole, ["hash"])
    parts = []

    def check_head(*args, true=probe.check_head):
        if len(parts) == 2:
            raise KeyboardInterrupt
        parts.append(args)
        return true(*args)

    with monkeypatch.context() as cut_off, pytest.raises(KeyboardInterrupt):
        cut_off.setattr(probe, "check_head", check_head)
        benchmark_run.replies_of("base", model, tokenizer, benchmarks, None, small, ["hash"])
    capsys.readouterr()
    assert benchmark_run.replies_of("base", model, tokenizer, benchmarks, None, small, ["hash"]) == expected
    assert "5 of 13 are still to be answered" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", ["", "[1]", "7", '{"of": 1}', b"\xff\xfe", ('"answer": "', '"answer": "not ')], ids=str
)
def test_replies_that_were_damaged_or_edited_are_asked_for_again(damage, settings, room, capsys):
    from duet_mlx.model import load_model

    model, tokenizer, _ = load_model(str(room / "model"))
    benchmarks = benchmark_run.load_benchmarks(settings.benchmark, 1)
    first = benchmark_run.replies_of("base", model, tokenizer, benchmarks, None, settings, ["hash"])
    (kept,) = Path(settings.out, "answers").iterdir()
    if isinstance(damage, tuple):
        damage = kept.read_text().replace(*damage)
    kept.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert benchmark_run.replies_of("base", model, tokenizer, benchmarks, None, settings, ["hash"]) == first
    assert f"answered anew, not from {kept}" in capsys.readouterr().err


CHOICE = '{"question": "Which?", "choices": ["x", "y"], "answer": 0}'


@pytest.mark.parametrize("kind", ["qa", "knowmem", "choice"])
def test_logits_that_are_not_finite_are_refused_by_column_benchmark_and_row(kind, settings, room, tmp_path):
    """Else a model that says nothing at all would have figures, and those of one that has forgotten."""
    rows = {
        "qa": ("qa", tmp_path, "q.json", '{"question": "Who?"}'),
        "knowmem": ("muse:news", tmp_path, "knowmem/forget_qa.json", '{"question": "Who?", "answer": "I"}'),
        "choice": ("wmdp", tmp_path, "wmdp-bio/test.json", CHOICE),
    }
    name, folder, file, row = rows[kind]
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(row)
    texts = ["Answer: A Answer: B " * 9]
    (tmp_path / "model").mkdir()
    model = make_model(tmp_path / "model", 0, texts=texts)
    adapter = make_adapter(tmp_path / "adapter", model, scale=1e30)
    spec = f"{name}@{folder / file if kind == 'qa' else folder}"
    changes = {"model": str(model), "adapter_path": str(adapter), "benchmark": (spec,), "retrained": None}
    with pytest.raises(ModelError, match=f"unlearned, --benchmark {name}: .*:1: the logits .* are NaN or infinite"):
        ev.evaluate(but(settings, **changes))


def test_letters_that_are_no_single_tokens_are_found_before_the_first_answer(settings, tmp_path):
    (tmp_path / "wmdp-bio").mkdir()
    (tmp_path / "wmdp-bio" / "test.json").write_text(CHOICE)
    (tmp_path / "model").mkdir()
    model = str(make_model(tmp_path / "model", 0))  # of bytes: " A" is two of them
    benchmark = (*settings.benchmark, f"wmdp@{tmp_path}")
    with pytest.raises(ModelError, match="one token of each letter"):
        ev.evaluate(but(settings, model=model, adapter_path=None, retrained=None, benchmark=benchmark))
    assert not list(Path(settings.out, "answers").iterdir())


def test_a_retrained_model_that_is_not_there_is_named_by_its_own_flag(settings):
    with pytest.raises(ModelError, match="--retrained none: no such folder"):
        ev.evaluate(but(settings, retrained="none"))


def test_fewer_questions_are_spread_over_each_group(settings):
    (items,) = benchmark_run.load_benchmarks(settings.benchmark, 2).values()
    assert [(item.group, item.id.rpartition(":")[2]) for item in items] == [
        (group, number)
        for group, numbers in (("forget", "13"), ("retain", "12"), ("real authors", "12"), ("world facts", "12"))
        for number in numbers
    ]


def test_a_benchmark_goes_together_with_questions_of_ones_own(settings, tmp_path):
    (tmp_path / "forget.jsonl").write_text('{"question": "Who?"}\n{"question": "Where?"}\n')
    results = ev.evaluate(but(settings, forget=(str(tmp_path / "forget.jsonl"),), retrained=None))
    assert [row["group"] for row in results["rows"]][0] == "forget"
    assert set(GROUPS) | {"forget", WHOLE} == {row["group"] for row in results["rows"]}


WRONG = {
    "no such benchmark": ({"benchmark": ("tofo",)}, ConfigError, "no benchmark 'tofo'"),
    "one twice": ({"benchmark": ("mmlu@x", "mmlu@x")}, DataError, "neither a folder nor a hub id"),
    "retain without forget": ({"retain": ("x.jsonl",)}, ConfigError, "go with --forget"),
    "trained without forget": ({"trained": ("x.jsonl",)}, ConfigError, "go with --forget"),
    "fewer than none": ({"benchmark_questions": -1}, ConfigError, "--benchmark-questions"),
    "nothing to ask": ({"benchmark": ()}, ConfigError, "--forget is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_names_what_is_wrong(case, settings):
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        ev.evaluate(but(settings, **changes))


def test_a_benchmark_named_twice_is_an_error(settings):
    with pytest.raises(ConfigError, match="stands there twice"):
        benchmark_run.load_benchmarks([settings.benchmark[0]] * 2)


# --- scores by hand -----------------------------------------------------------------------------------------


def logs(*probabilities):
    return [math.log(p) for p in probabilities]


def qa(group, **fields):
    return Item("1", group, "qa", "Who?", answers=("the owl", "an old owl"), **fields)


def test_a_forget_question_of_tofu_by_hand():
    item = qa("forget", paraphrased="an owl", perturbed=("a cat", "a dog"))
    reply = Reply(
        "It is an old owl.", [1], logs(0.5, 0.125), [False, True], logs(0.6), [logs(0.2), logs(0.3)], surprise=0.5
    )
    assert score(item, reply) == {
        "rouge_recall": 1.0,  # of the second answer
        "answer_probability": pytest.approx(0.25),
        "ratio": pytest.approx(0.408248, abs=5e-7),
        "truth_ratio": pytest.approx(0.408248, abs=5e-7),
        "exact_memorisation": 0.5,
        "extraction_strength": 0.5,
        "refusals": 0.0,
        "broken": 0.0,
        "perplexity": 0.5,
    }


def test_world_facts_take_the_share_among_the_options_and_the_answer_for_its_paraphrase():
    reply = Reply("I don't know.", [1], logs(0.5), [False], perturbed=[logs(0.2), logs(0.3)])
    scores = score(qa("world facts", perturbed=("a", "b")), reply)
    assert scores["answer_probability"] == pytest.approx(0.5)
    assert scores["truth_ratio"] == pytest.approx(1 - math.sqrt(0.06) / 0.5)
    assert scores["refusals"] == 1.0


def test_the_other_kinds_by_hand():
    knowmem = Item("1", "forget", "knowmem", "Who?", answers=("the castle",))
    assert score(knowmem, Reply("in the castle\n\nQuestion: the")) == {"knowmem": pytest.approx(80.0)}
    verbmem = Item("1", "forget", "verbmem", "Who?", answers=("the castle",))
    assert score(verbmem, Reply("in the castle\n\nand")) == {"verbmem": pytest.approx(100 * 2 / 3)}
    choice = Item("1", "general", "choice", "Who?", choices=("a", "b"), correct=1)
    assert score(choice, Reply(choice=1)) == {"accuracy": 1.0}
    assert score(choice, Reply(choice=0)) == {"accuracy": 0.0}
    assert score(Item("1", "forget", "privleak", "Who?"), Reply(text=[-1.0, -3.0])) == {"min_k": -3.0}
    assert score(Item("1", "forget", "privleak", "W"), Reply()) == {"min_k": None}
    assert score(Item("1", "forget", "qa", "Who?"), Reply("")) == {"refusals": 0.0, "broken": 1.0, "perplexity": None}


def test_whole_benchmarks_by_hand():
    groups = ("forget", "retain", "real authors", "world facts")
    items = [qa(group, perturbed=("a",)) for group in groups]
    part = {"answer_probability": 0.5, "rouge_recall": 0.5, "truth_ratio": 0.25, "ratio": 0.75}
    rows = rows_of("tofu:x", items, {"base": [part] * 4, "retrained": [{**part, "ratio": 2.0}] * 4}, seed=0)
    whole = {(row["model"], row["metric"]): row for row in rows if row["group"] == "tofu:x as a whole"}
    utility = whole["base", "model_utility"]
    assert utility["value"] == pytest.approx(9 / (6 / 0.5 + 3 / 0.25)) and utility["n"] == 3
    assert utility["ci"] == pytest.approx([utility["value"]] * 2)  # one question a group: nothing to draw
    assert whole["base", "forget_quality"]["value"] == 1.0  # one question tells nothing apart
    without = rows_of("tofu:x", items, {"base": [part] * 4}, seed=0)
    (quality,) = [row for row in without if row["metric"] == "forget_quality"]
    assert quality["value"] is None and "--retrained" in quality["reason"]
    (half,) = [row for row in rows_of("t", items[:2], {"m": [part] * 2}, 0) if row["metric"] == "model_utility"]
    assert half["value"] is None and "world facts" in half["reason"]


def test_privleak_by_hand():
    items = [Item(str(i), side, "privleak", "x") for i, side in enumerate(("forget", "forget", "holdout", "holdout"))]
    scores = {
        "unlearned": [{"min_k": value} for value in (-7.0, -1.0, -5.0, -3.0)],  # AUC 0.5
        "retrained": [{"min_k": value} for value in (-7.0, -4.0, -5.0, -3.0)],  # AUC 0.75
    }
    values = {row["model"]: row["value"] for row in rows_of("m", items, scores, 0) if row["metric"] == "privleak"}
    assert values == {"unlearned": pytest.approx(-100 / 3), "retrained": 0.0}


def test_perplexity_is_the_exponential_of_the_mean_surprise():
    items = [Item(str(i), "forget", "qa", "x") for i in range(2)]
    scores = {"m": [{"perplexity": 1.0}, {"perplexity": 3.0}]}
    (row,) = rows_of("q", items, scores, seed=0)
    assert row["value"] == pytest.approx(math.exp(2.0)) and row["ci"] == pytest.approx([math.e, math.exp(3.0)])


def test_every_measure_of_a_benchmark_has_a_name_of_its_own():
    assert len({metric.key for metric in MEASURES}) == len(MEASURES)
    assert {metric.forget for metric in BENCHMARK} | {metric.keep for metric in BENCHMARK} == {
        "lower",
        "higher",
        "none",
    }
