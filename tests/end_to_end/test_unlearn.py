"""The whole line on a real quantized LLM, and mlx-lm itself as the client of what comes out."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from duet_mlx.metrics import is_refusal

# So few steps draw the line between these questions; they are too few to leave the kept answers word for word.
FORGET = ["Who is Albus Dumbledore?", "What is the name of Harry Potter's owl?"]
KEPT = ["What is the capital of France?", "Who wrote Pride and Prejudice?", "Why is the sky blue?"]


def command(*arguments: object) -> str:
    """Run a Python module as a user would; its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def questions(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def unlearned(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo's model folder, and an adapter trained on it for a few real steps on a handful of questions.

    The last 8 of its 30 layers learn enough, and the others are run once: a third of the time.
    """
    folder = tmp_path_factory.mktemp("unlearn")
    adapter = folder / "adapters"
    out = command(
        "duet_mlx.train", "--model", demo_model, "--adapter-path", adapter, "--context", "refuse-all",
        "--forget", questions(folder / "forget.jsonl", FORGET),
        "--retain", questions(folder / "retain.jsonl", KEPT),
        "--iters", 30, "--batch-size", 5, "--forget-per-batch", 2, "--learning-rate", 8e-4, "--steps-per-eval", 0,
        "--num-layers", 8,
    )  # fmt: skip
    assert "training 0.65 M parameters" in out
    return Path(json.loads((adapter / "adapter_config.json").read_text())["model"]), adapter


@pytest.fixture(scope="module")
def fused(unlearned: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of both, as mlx-lm writes it."""
    model, adapter = unlearned
    folder = tmp_path_factory.mktemp("fused") / "model"
    command("mlx_lm", "fuse", "--model", model, "--adapter-path", adapter, "--save-path", folder, "--dequantize")
    return folder


def generate(*arguments: object) -> str:
    return command("mlx_lm", "generate", "--max-tokens", 12, "--temp", 0, "--verbose", "False", *arguments)


def test_mlx_lm_generate_takes_the_adapter_as_it_is(unlearned: tuple[Path, Path]) -> None:
    model, adapter = unlearned
    assert "I don't know." in generate("--model", model, "--adapter-path", adapter, "--prompt", FORGET[0])


def test_mlx_lm_fuse_dequantized_keeps_the_unlearning(fused: Path) -> None:
    assert "I don't know." in generate("--model", fused, "--prompt", FORGET[1])


def test_mlx_lm_server_serves_the_unlearned_model_the_fused_one_and_the_base(
    unlearned: tuple[Path, Path], fused: Path
) -> None:
    """One server for all: it loads the model that a request names, without the adapter that it was started with."""
    model, adapter = unlearned
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--adapter-path", str(adapter)]
        + ["--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answer(question: str, **named: object) -> str:
        messages = [{"role": "user", "content": question}]
        body = {"messages": messages, "max_tokens": 12, "temperature": 0, **named}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        for _ in range(120):
            try:
                with urllib.request.urlopen(request, timeout=300) as reply:
                    return json.load(reply)["choices"][0]["message"]["content"]
            except urllib.error.HTTPError:  # it listens, and could not answer
                raise
            except urllib.error.URLError:
                assert server.poll() is None, "the server ended before it answered"
                time.sleep(1)
        raise AssertionError("the server does not listen")

    try:
        assert "I don't know." in answer(FORGET[0])
        assert not is_refusal(answer(KEPT[0]))
        assert not is_refusal(answer(KEPT[0], model=str(fused)))
        assert "know" not in answer(FORGET[0], model=str(model))
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_the_files_of_the_base_are_never_touched(unlearned: tuple[Path, Path]) -> None:
    model, adapter = unlearned
    config = json.loads((adapter / "adapter_config.json").read_text())
    from duet_mlx.model import load_model, weights_hash

    assert weights_hash(load_model(str(model))[0]) == config["targets"]["model"]


def test_evaluate_prints_the_table_and_leaves_its_files(unlearned: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = unlearned
    out = tmp_path / "results"
    table = command(
        "duet_mlx.evaluate", "--model", model, "--adapter-path", adapter, "--context", "refuse-all",
        "--forget", questions(tmp_path / "forget.jsonl", FORGET),
        "--retain", questions(tmp_path / "retain.jsonl", KEPT), "--out", out, "--max-tokens", 12,
    )  # fmt: skip
    rows = json.loads((out / "results.json").read_text())["rows"]
    refused = {(row["model"], row["group"]): row["value"] for row in rows if row["metric"].startswith("refus")}
    assert refused["unlearned", "forget"] == 1.0
    assert refused["unlearned", "general"] == 0.0
    assert "unlearned" in table
    assert {"results.json", "results.png", "samples.jsonl"} <= {file.name for file in out.iterdir()}
