"""Proof that the tests bite: each fault of mutants.py, put into a copy of the checkout, must make a test fail.

python -m tests.mutants              # all; prints mutant -> killing test, exit code 1 if one survives
python -m tests.mutants adam rope    # those whose file or fault holds one of these words

A mutant counts as killed by a test that fails, not by one that cannot be collected; and at the end each killing test
must pass where nothing is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("duet_mlx", "reference", "tests", "pyproject.toml")
# Byte code is known by time and size of its source: a mutant could be taken for the text that it replaces.
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


def run(tests: list[str], mutant: Mutant | None = None) -> str | None:
    """The first of these tests that fails in a copy of the checkout with this fault in it; None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(folder, name))
        if mutant:
            path = Path(folder, mutant.file)
            path.write_text(mutated(path.read_text(encoding="utf-8"), mutant), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider"]
        command += ["--hypothesis-profile", "quick", "--hypothesis-seed", "0", *tests]
        environment = {**ENVIRONMENT, "PYTHONPATH": folder}
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    failed = [line.removeprefix("FAILED ") for line in ended.stdout.splitlines() if line.startswith("FAILED ")]
    if ended.returncode > 1 or (ended.returncode == 1) != bool(failed):
        sys.exit(f"{' '.join(tests)} cannot be run ({mutant and mutant.wrong}):\n{ended.stdout}{ended.stderr}")
    return failed[0].split(" - ")[0] if failed else None


def mutated(source: str, mutant: Mutant) -> str:
    """The source with the fault in it."""
    if source.count(mutant.old) != 1:
        sys.exit(f"{mutant.file}: {mutant.old!r} occurs {source.count(mutant.old)} times, expected once")
    return source.replace(mutant.old, mutant.new)


def main(words: list[str]) -> int:
    """Try the mutants that these words choose; returns the exit code."""
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.file}: {m.wrong}" for word in words)]
    width = max((len(f"{m.file}: {m.wrong}") for m in chosen), default=0)
    killers: list[str | None] = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # each waits for a pytest of its own
        tried = pool.map(lambda mutant: run(mutant.tests.split(), mutant), chosen)
        for mutant, killer in zip(chosen, tqdm(tried, total=len(chosen), unit="mutant"), strict=True):
            tqdm.write(f"{f'{mutant.file}: {mutant.wrong}':{width}} -> {killer or 'SURVIVED'}")
            killers.append(killer)
    killing = sorted({killer for killer in killers if killer})
    if killing and (broken := run(killing)):
        sys.exit(f"{broken} fails without any fault, so it proves nothing")
    print(f"{len(killers) - killers.count(None)} of {len(killers)} mutants killed")
    return int(None in killers or not chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
