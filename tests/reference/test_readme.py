"""The map in reference/README.md leads somewhere, and the reference stands on NumPy alone."""

from __future__ import annotations

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "reference").glob("*.py"))
README = (ROOT / "reference" / "README.md").read_text(encoding="utf-8")


def test_every_test_that_the_map_names_exists() -> None:
    folders = (ROOT / "tests" / "reference", ROOT / "tests" / "equivalence")
    tests = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 40
    assert not {name for name in named if f"def {name}(" not in tests}


def test_every_function_that_the_map_names_exists() -> None:
    modules = "|".join(path.stem for path in FILES)
    named = set(re.findall(rf"`({modules})\.(\w+)", README)) - {(path.stem, "py") for path in FILES}
    assert len(named) > 30
    assert not {pair for pair in named if not hasattr(import_module(f"reference.{pair[0]}"), pair[1])}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_map_names_every_file_and_each_imports_numpy_and_the_standard_library_alone(path: Path) -> None:
    assert f"`{path.name}`" in README
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= {"numpy", "reference"} | sys.stdlib_module_names
