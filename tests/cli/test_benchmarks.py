"""Benchmarks on the command line: one line of error for a spec or a file that cannot be used, and exit code 2."""

from __future__ import annotations

import pytest

WRONG = {
    "a name": ("tofo", ("no benchmark 'tofo' (did you mean \"tofu\"?)", "muse")),
    "a folder": ("tofu@{tmp}/none", ("neither a folder nor a hub id",)),
    "a part": ("tofu:forget11@{tmp}", ("no file forget11_perturbed.json", "it has q.json")),
    "a file": ("qa:forget@{tmp}/q.json", ("q.json:2", "no question; fields found: title", "wanted: question")),
    "no file": ("qa:forget", ("Expected qa:GROUP@FILE",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_benchmark_that_cannot_be_read_is_one_line(case, refused, tmp_path):
    (tmp_path / "q.json").write_text('{"question": "Who?"}\n{"title": "x"}\n')
    spec, says = WRONG[case]
    # The model is never looked at: benchmarks are read first.
    flags = ["--model", tmp_path / "model", "--out", tmp_path / "out", "--benchmark", spec.format(tmp=tmp_path)]
    refused("evaluate", *flags, says=says)
    assert not (tmp_path / "out").exists()
