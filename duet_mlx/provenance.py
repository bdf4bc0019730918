"""What the figures of an evaluation hang on: inputs by hash, settings, versions, kind of machine."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import BLAS, __version__, cores, measures
from .context_file import READY
from .data import file_hash
from .errors import note
from .groups import GROUPS, own_groups
from .metrics import TRAINED

if TYPE_CHECKING:
    from .evaluate import EvaluateSettings


def described(settings: EvaluateSettings, questions: dict[str, int], prompts: list[str]) -> dict[str, Any]:
    """The `meta` of results.json.

    Args:
        questions: how many each group has.  prompts: the reverse prompts.
    """
    files: dict[str, Sequence[str]] = {}
    for name in GROUPS:
        files[name] = getattr(settings, name)
    files["also"] = [file for _, file in own_groups(settings.also)]
    for name in ("context", "reverse_prompts"):
        path = getattr(settings, name)
        files[name] = (path,) if path is not None and path not in READY else ()
    adapter = Path(settings.adapter_path, "adapters.safetensors") if settings.adapter_path else None
    return {
        "model": settings.model,
        "adapter": settings.adapter_path,
        "adapter_hash": file_hash(adapter) if adapter and adapter.is_file() else "",
        "data": {name: {path: file_hash(path) for path in paths} for name, paths in files.items()},
        "questions": questions,
        "reverse_prompts": prompts,
        "settings": asdict(settings),
        "metrics": {metric.key: metric.definition for metric in measures.MEASURES},
        **provenance(),
    }


def provenance() -> dict[str, Any]:
    """Versions of what computes, and the machine."""
    import mlx.core as mx

    packages = ("mlx", "mlx-lm", "numpy", "rouge-score", "transformers")
    return {
        "versions": {
            "duet-mlx": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "processor": _processor(),
            "cores": cores(),
            "blas": BLAS,
            "device": "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu",
        },
    }


def trained_on(
    config: dict[str, Any], data: dict[str, dict[str, str]], also: Sequence[str] = ()
) -> dict[str, list[str]]:
    """By group, those files of `meta`'s data that an adapter was trained on, by the hashes in adapter_config.json.

    A note on stderr names files of --trained that are not among them.
    """
    hashes = config.get("data_hashes")
    known = list(hashes.values()) if isinstance(hashes, dict) else []
    of_groups = [(group, file) for flag, (group, _) in GROUPS.items() for file in data[flag]] + own_groups(also)
    hash_of = {file: sha for files in data.values() for file, sha in files.items()}
    found: dict[str, list[str]] = {}
    for group, file in of_groups:
        if hash_of[file] in known:
            found.setdefault(group, []).append(file)
        elif known and group == TRAINED:
            note(f"note: --trained {file}: adapter_config.json names no file of these bytes among those trained on")
    return found


def _processor() -> str:
    """The kind of processor in the system's own words."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, subprocess.CalledProcessError, StopIteration):
        return platform.processor() or "unknown"
