"""One process against two through mlx.launch, which divide the machine's threads between them.

mlx.launch -n 2 --backend ring -- python -m benchmarks.scaling MODEL TOP_K QUERIES BATCH REPEATS
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from duet_mlx.model import on_gpu

from .bench import Bench, long_context
from .measure import Row, once, seconds

ROOT = Path(__file__).resolve().parents[1]


def scaling(bench: Bench) -> Iterator[Row]:
    """The teacher pass and a training step of the same global batch, by one process and by two."""
    if on_gpu():
        yield Row("two processes", "", "", None, note="not measured on one GPU: it has no threads to divide")
        return
    threads = os.cpu_count() or 1
    one, two = (measured(bench, processes, max(1, threads // processes)) for processes in (1, 2))
    for name, reading in (("teacher", "teacher pass"), ("step", "training step")):
        yield Row(
            f"two processes against one, {threads} threads divided, {reading}", seconds(two[name]),
            seconds(one[name]), one[name] / two[name], "", "1: sharing out costs nothing",
        )  # fmt: skip


def measured(bench: Bench, processes: int, threads: int) -> dict[str, float]:
    """Seconds of the teacher pass and of a step, as rank 0 prints them."""
    sizes = [bench.settings.top_k, bench.asked, bench.settings.batch_size, bench.repeats]
    command = [sys.executable, "-m", "benchmarks.scaling", bench.model_name, *map(str, sizes)]
    if processes > 1:  # a ring of one is refused
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launch = str(Path(sys.executable).with_name("mlx.launch"))
        ring = ["-n", str(processes), "--backend", "ring", "--starting-port", port]
        command = [launch, *ring, "--env", f"OPENBLAS_NUM_THREADS={threads}", "--", *command]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    found = [line for line in ran.stdout.splitlines() if line.startswith('{"teacher"')]
    if ran.returncode or len(found) != 1:
        raise RuntimeError(f"{' '.join(command)}: {ran.stderr}")
    return json.loads(found[0])


def main(name: str, top_k: int, asked: int, batch: int, repeats: int) -> None:
    """Read the teacher for `asked` queries, take steps of `batch` of them, and print what it took."""
    import mlx.core as mx
    import numpy as np

    from duet_mlx import parallel
    from duet_mlx.context import render
    from duet_mlx.data import load_queries
    from duet_mlx.generate import common_prefix
    from duet_mlx.head import find_head
    from duet_mlx.loop import make_optimizer, make_step
    from duet_mlx.methods import method_loss
    from duet_mlx.model import add_lora, load_model, lora_keys
    from duet_mlx.stream import Stream
    from duet_mlx.teacher import teacher_targets
    from duet_mlx.train_settings import TrainSettings

    data = ROOT / "examples" / "harry_potter" / "data" / "general_train.jsonl"
    queries = load_queries([str(data)], "retain")[:asked]
    settings = TrainSettings(positions=4, top_k=top_k, candidates="teacher", retain_context="teacher")
    model, tokenizer, _ = load_model(name)
    head, context = find_head(model), long_context(tokenizer, queries[0].question, 50)

    def read(part):
        return teacher_targets(model, tokenizer, part, [context], settings, head)

    parallel.summed(np.zeros(1))  # all are there
    targets = []
    teacher, _ = once(lambda: targets.append(parallel.built(read, queries, settings)))
    mx.random.seed(0)
    add_lora(model, -1, **{**settings.lora_parameters, "keys": lora_keys(model)})
    model.train()
    prompts = [render(tokenizer, query.question) for query in queries]
    prefix = common_prefix(prompts)
    part = Stream(prompts, targets[0], prefix).batch(parallel.mine(np.arange(batch)))
    optimizer = make_optimizer(settings)
    optimizer.init(model.trainable_parameters())
    step = make_step(model, optimizer, method_loss(settings, prompts[0][:prefix], head), settings, compiled=False)

    def run():
        value, norm, _ = step(part, None, 1)
        return model.trainable_parameters(), optimizer.state, value, norm

    taken = [once(run)[0] for _ in range(1 + repeats)][1:]
    if mx.distributed.init().rank() == 0:
        print(json.dumps({"teacher": teacher, "step": statistics.median(taken)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
