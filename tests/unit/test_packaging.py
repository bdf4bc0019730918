"""What is installed, and what may import what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {"torch", "torchvision", "torchaudio", "tensorflow", "jax"}


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_tree(package: str, extras: tuple[str, ...] = ()) -> set[str]:
    """Names of all that an installed package pulls in here, through markers and extras, itself included."""
    from packaging.requirements import Requirement

    seen: set[tuple[str, str]] = set()
    waiting = [(normalise(package), extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            # Its name still counts: a forbidden package that is required but absent is required all the same.
            continue
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(normalise(requirement.name), e) for e in ("", *requirement.extras)]
    return {name for name, _ in seen}


def imported_modules(folder: Path) -> dict[str, list[str]]:
    """Top-level module -> places that import it, over every .py file of a folder."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                found.setdefault(name.partition(".")[0], []).append(place)
    return found


def test_nothing_that_is_installed_requires_torch() -> None:
    tree = installed_tree("duet-mlx", extras=("cpu", "cuda13", "lm-eval", "parquet"))
    assert {"mlx", "mlx-lm", "transformers", "numpy"} <= tree, "the walk did not reach the usual dependencies"
    assert not tree & FORBIDDEN


def test_the_wheel_holds_duet_mlx_alone_with_its_contexts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"duet_mlx", f"duet_mlx-{metadata.version('duet-mlx')}.dist-info"}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "duet_mlx").rglob("*")
        if path.suffix in (".py", ".yaml", ".typed")
    }
    assert any(name.startswith("duet_mlx/contexts/") and name.endswith(".yaml") for name in names)
    assert {name for name in names if name.startswith("duet_mlx/")} == sources
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_reference_imports_only_numpy_and_the_standard_library() -> None:
    modules = imported_modules(ROOT / "reference")
    assert modules, "reference/ has no Python file"
    allowed = sys.stdlib_module_names | {"numpy", "reference"}
    assert not {name: places for name, places in modules.items() if name not in allowed}


@pytest.mark.parametrize("stranger", ["reference", "tests", "torch"])
def test_duet_mlx_never_imports(stranger: str) -> None:
    assert imported_modules(ROOT / "duet_mlx").get(stranger, []) == []


def test_every_import_of_duet_mlx_is_a_declared_dependency() -> None:
    """A package that comes only by way of another may go with the next release of that other."""
    from packaging.requirements import Requirement

    declared = {normalise(Requirement(line).name) for line in metadata.requires("duet-mlx") or []}
    # tokenizers and transformers are mlx-lm's own interface: load() hands out their objects.
    declared |= {"tokenizers", "transformers"}
    distributions = {"yaml": "pyyaml", "mlx": "mlx", "lm_eval": "lm-eval"}
    unknown = {
        name: places
        for name, places in imported_modules(ROOT / "duet_mlx").items()
        if name not in sys.stdlib_module_names
        and name != "duet_mlx"
        and distributions.get(name, normalise(name)) not in declared
    }
    assert not unknown
