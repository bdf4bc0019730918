"""This project against a plain mlx-lm loop, in one run: a table of ratios, and all of it as JSON.

    python -m benchmarks                       # the demo's model: `make bench`
    python -m benchmarks --only step teacher   # some of it
    python -m benchmarks --quick               # few queries and steps: whether it runs, not how fast

benchmarks/README.md says what each line means and holds the table as measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from duet_mlx import BLAS
from duet_mlx.errors import ConfigError, run_cli

ROOT = Path(__file__).resolve().parents[1]
# sections.SECTIONS, which brings MLX with it: `--help` should not wait for that.
PARTS = ("head", "padding", "teacher", "growth", "evaluation", "size", "scaling", "step")
DATA = ROOT / "examples" / "harry_potter" / "data"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    model = ROOT / "examples" / "harry_potter" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    parser.add_argument("--model", default=str(model), help="hub id, MLX folder or .gguf file (default: the demo's)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--quick", action="store_true", help="few queries and steps: whether it runs, not how fast")
    parser.add_argument("--memory", type=float, default=10.0, help="GB that a synthetic model may take (default: 10)")
    parser.add_argument("--full", action="store_true", help="N up to 10,000, many minutes more")
    parser.add_argument("--out", help="JSON file for the results (default: by date and time, in benchmarks/out)")
    given = parser.parse_args()
    out = Path(given.out or ROOT / "benchmarks" / "out" / f"{time.strftime('%Y%m%d-%H%M%S')}.json")
    if out.exists():
        raise ConfigError(f"--out {out}: is there already; name another file or move it away")
    out.parent.mkdir(parents=True, exist_ok=True)

    import mlx.core as mx

    from duet_mlx.data import load_queries
    from duet_mlx.model import load_model, on_gpu
    from duet_mlx.train_settings import TrainSettings

    from .bench import SHAPES, Bench, Shape
    from .measure import Row, table
    from .sections import SECTIONS

    queries = load_queries([str(DATA / f"forget_{kind}train.jsonl") for kind in ("", "quiz_")], "forget")
    queries += load_queries([str(DATA / f"{kind}_train.jsonl") for kind in ("general", "neighbour")], "retain")
    loaded, tokenizer, _ = load_model(given.model)
    settings = TrainSettings(
        model=given.model, positions=4, top_k=100, candidates="teacher", retain_context="teacher", center=False,
        first_share=0.0, batch_size=8,
    )  # fmt: skip
    growing = (128, 256, 384, *((1_000, 10_000) if given.full else ()))  # 128 are decoded at once
    bench = Bench(
        given.model, loaded, tokenizer, queries, settings, context_tokens=500, taught=200, alone=4, asked=48,
        growing=growing, repeats=2, memory=given.memory * 1e9, shapes=SHAPES,
    )  # fmt: skip
    if given.quick:
        small = replace(settings, top_k=5, batch_size=4)
        bench = replace(bench, settings=small, context_tokens=60, taught=6, alone=2, asked=4, growing=(2, 4, 6),
                        repeats=1, queries=queries[:6] + queries[-6:],
                        shapes={"a tiny one": Shape(128, 256, 4, 2, 3, 2000, True)})  # fmt: skip

    meta = {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "model": given.model,
        "machine": {
            "device": str(mx.default_device()), **{k: str(v) for k, v in mx.device_info().items()},
            "system": platform.platform(), "threads": os.cpu_count(), "blas": BLAS if not on_gpu() else None,
        },
        "versions": {name: version(name) for name in ("duet-mlx", "mlx", "mlx-lm", "numpy")},
    }  # fmt: skip
    rows: list[Row] = []
    start = time.perf_counter()
    for name in [name for name in PARTS if name in given.only]:
        with contextlib.redirect_stdout(sys.stderr):  # progress bars and notes: the table alone is the output
            for row in SECTIONS[name](bench):
                rows.append(row)
                ratio = "" if row.ratio is None else f": {row.ratio:.2f}"
                print(f"[{time.perf_counter() - start:4.0f} s] {row.name}{ratio}", flush=True)
                # Written anew after each line, so that a run that is stopped leaves what it has measured.
                found = {"meta": meta, "rows": [row._asdict() for row in rows]}
                out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"{out} has it as JSON", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
