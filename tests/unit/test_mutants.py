"""The table of seeded faults does not rot: `make mutants` tries them, here it is only read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants.mutants import BACKEND, MUTANTS, REFERENCE, Mutant

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{m.file}: {m.wrong}" for m in MUTANTS])
def test_a_mutants_text_occurs_once_and_what_replaces_it_is_python(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"{mutant.file} changed: bring tests/mutants/mutants.py after it"
    changed = source.replace(mutant.old, mutant.new)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))


@pytest.mark.parametrize("tests", sorted({test for m in MUTANTS for test in m.tests.split()}))
def test_the_tests_that_should_kill_a_mutant_exist(tests: str) -> None:
    file, _, name = tests.partition("::")
    assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8")


def test_both_sides_have_mutants_and_none_stands_twice() -> None:
    assert all(m.file.startswith("reference/") for m in REFERENCE) and len(REFERENCE) >= 14
    assert all(m.file.startswith("duet_mlx/") for m in BACKEND) and len(BACKEND) >= 14
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len({(m.file, m.wrong) for m in MUTANTS}) == len(MUTANTS)
