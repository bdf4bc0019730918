"""Faults of other people's code that METHOD's list names and that are no matter of a loss: what is said of figures.

Those of losses are in tests/equivalence/test_methods_equivalence.py and tests/reference/test_baselines.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from duet_mlx.measures import MEASURES

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OF_ROUGE = [m for m in MEASURES if "ROUGE" in m.label + m.definition and m.key != "model_utility"]


@pytest.mark.parametrize("measure", OF_ROUGE, ids=lambda measure: measure.key)
def test_a_rouge_figure_says_whether_it_is_f1_or_recall_and_whether_words_are_stemmed(measure):
    said = f"{measure.label}. {measure.definition}"
    assert "F1" in said or "recall" in said
    assert "no stemmer" in said or "stemmer on" in said


def test_there_are_rouge_figures():
    assert len(OF_ROUGE) >= 5


@pytest.mark.parametrize("example", ["compare", "harry_potter"])
def test_the_steps_that_an_examples_page_names_are_those_of_its_settings(example):
    steps = set()
    for file in (EXAMPLES / example).glob("*.yaml"):
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        steps |= {settings.get("iters"), settings.get("quick_settings", {}).get("iters")} - {None}
    named = {int(n) for n in re.findall(r"(\d+) steps", (EXAMPLES / example / "README.md").read_text(encoding="utf-8"))}
    assert named and named <= steps, (named, steps)


def test_the_comparisons_page_names_as_many_seeds_and_methods_as_are_run():
    settings = yaml.safe_load((EXAMPLES / "compare" / "config.yaml").read_text(encoding="utf-8"))
    page = (EXAMPLES / "compare" / "README.md").read_text(encoding="utf-8")
    words = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
    assert f"The {words[settings['best']]} best are run with {words[settings['seeds'] - 1]} more seeds" in page
