"""The worked example of CONTRIBUTING.md is taken from there and runs: value, gradient, training."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest

from duet_mlx import baselines as backend
from duet_mlx import methods
from reference import baselines as ref
from tests.equivalence import test_methods_equivalence as equivalence
from tests.reference.finite_differences import assert_gradient

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def added():
    """WGA in both rooms, in the table of methods and in that of the test, for the time of a test."""
    block = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    parts = dict(re.findall(r"# (\S+\.py): [^\n]*\n(.*?)(?=\n# \S+\.py: |\Z)", block[1], re.DOTALL))
    rooms = {"reference/baselines.py": ref, "duet_mlx/baselines.py": backend}
    tables = {
        "duet_mlx/methods.py": (methods, methods.METHODS),
        "tests/equivalence/test_methods_equivalence.py": (equivalence, equivalence.LOSSES),
    }
    assert parts.keys() == rooms.keys() | tables.keys()
    functions = {}
    for path, module in rooms.items():
        scope = dict(vars(module))
        exec(parts[path], scope)
        functions[path] = patch.object(module, "wga", scope["wga"], create=True)
    rows = [
        patch.dict(table, eval("{" + parts[path] + "}", dict(vars(module)))) for path, (module, table) in tables.items()
    ]
    for one in (*functions.values(), *rows):
        one.start()
    yield
    for one in (*functions.values(), *rows):
        one.stop()


@pytest.mark.parametrize("seed", range(3))
def test_the_examples_gradient_is_that_of_its_value_and_both_rooms_agree(added, seed):
    case = equivalence.drawn(seed)
    equivalence.check("wga", case, mx.float32, 2.0**-24, 1.0)
    answers = ref.Answers(case.logits.astype(np.float64), case.labels, case.mask)
    constant = ref.token_log_probs(answers)[0]

    def value(logits):  # the weights held still, as stop_gradient does
        log_probs = ref.token_log_probs(answers._replace(logits=logits))[0]
        weights = np.where(case.mask, np.exp(0.5 * constant), 0.0)
        return float(((weights * log_probs).sum(axis=-1) / ref.answer_length(case.mask)).mean())

    assert_gradient(value, answers.logits, ref.wga(answers, 0.5)[1])


def test_the_example_trains_as_any_other_method(added):
    from tests.equivalence.test_method_invariants import started

    both, (forget, retain) = started("wga")
    assert forget < 0 < retain and both == pytest.approx(forget + retain, rel=1e-5)
