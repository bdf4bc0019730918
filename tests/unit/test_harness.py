"""lm-evaluation-harness through mlx-lm's wrapper: a task file of one's own, no network, no torch."""

import ast
import inspect
import json
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest

from duet_mlx.errors import ConfigError
from duet_mlx.harness import HarnessSettings, run
from tests.unit.test_evaluate import make_adapter, make_model

needs_the_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra lm-eval is not installed")

QUESTIONS = [
    {"question": "Dal?", "choices": [" Bel", " Fin", " Gom"], "answer": 0},
    {"question": "Mur fen?", "choices": [" Bel", " Fin", " Gom"], "answer": 2},
    {"question": "Nit", "choices": [" Tas", " Rol sun", " Gom"], "answer": 1},
]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    room = tmp_path_factory.mktemp("room")
    make_model(room / "model", 0)
    make_adapter(room / "adapter", room / "model")
    (room / "tasks").mkdir()
    (room / "tasks" / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (room / "tasks" / "mine.yaml").write_text(
        f"""task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {room / "tasks" / "q.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    return room


def command(room, *more):
    return [sys.executable, "-m", "duet_mlx.harness", "--model", str(room / "model"), "--tasks", "mine",
            "--include-path", str(room / "tasks"), "--out", str(room / "out"), *more]  # fmt: skip


@needs_the_harness
def test_a_task_file_is_run_without_a_network_and_without_torch(room):
    """The same figures as by hand, from our own log-probabilities, and the adapter is on the model."""
    from duet_mlx.model import load_model
    from duet_mlx.probe import log_probs

    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(room / "home")}
    code = (
        "import sys; from duet_mlx.harness import main; main(); "
        "print('loaded:', sorted({'torch', 'tensorflow', 'jax'} & sys.modules.keys()))"
    )
    arguments = command(room, "--adapter-path", str(room / "adapter"))[3:]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "loaded: []" in done.stdout and "mine  acc,none  " in done.stdout

    record = json.loads((room / "out" / "lm_eval.json").read_text())
    model, tokenizer, _ = load_model(str(room / "model"), str(room / "adapter"))
    hits = 0
    for sample, row in zip(record["samples"]["mine"], QUESTIONS, strict=True):
        prompt = tokenizer.encode(f"Question: {row['question']}\nAnswer:")
        texts = [tokenizer.encode(choice) for choice in row["choices"]]
        sums = [sum(values) for values, _ in log_probs(model, [prompt] * 3, texts)]
        assert [float(answer[0]) for answer in sample["filtered_resps"]] == pytest.approx(sums, abs=1e-3)
        hits += sums.index(max(sums)) == row["answer"]
    assert record["results"]["mine"]["acc,none"] == pytest.approx(hits / 3)
    assert len(record["meta"]["base_weights"]) == len(record["meta"]["adapter"]) == 64

    again = subprocess.run(command(room), capture_output=True, text=True, env=env)
    assert again.returncode == 2 and "--overwrite" in again.stderr and "Traceback" not in again.stderr


@needs_the_harness
def test_a_task_that_does_not_exist_is_named_with_its_nearest(room, tmp_path):
    settings = HarnessSettings(
        model=str(room / "model"), tasks=("mina",), include_path=str(room / "tasks"), out=str(tmp_path)
    )
    with pytest.raises(ConfigError, match='--tasks mina: no such task .did you mean "mine"'):
        run(settings)


@needs_the_harness
def test_mlx_lms_wrapper_holds_what_ours_sets():
    """If it fails: mlx_lm/evaluate.py, MLXLM.__init__, sets something else now; bring harness._wrapped after it."""
    from mlx_lm.evaluate import MLXLM

    from duet_mlx.harness import _wrapped

    tree = ast.parse(textwrap.dedent(inspect.getsource(MLXLM.__init__)))
    theirs = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.value.id == "self"
    }
    assert theirs <= vars(_wrapped(None, None, HarnessSettings())).keys()


def test_without_the_harness_the_message_says_what_to_install(room, tmp_path):
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from duet_mlx.errors import run_cli; from duet_mlx.harness import main; run_cli(main)"
    )
    arguments = ["--model", str(room / "model"), "--tasks", "mine", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'duet-mlx[lm-eval]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tasks": ()}, "--tasks is missing"), ({"include_path": "none"}, "--include-path none: no such folder")],
)
def test_wrong_settings_are_named(changes, message, tmp_path):
    settings = {"model": "m", "tasks": ("mine",), "out": str(tmp_path), **changes}
    with pytest.raises(ConfigError, match=message):
        run(HarnessSettings(**settings))
