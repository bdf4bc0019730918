"""The comparison's table: performance shift, the Pareto front, seeds, by hand."""

from __future__ import annotations

import pytest

from duet_mlx.compare_table import Result, front, points_of, report_of, shift, table_of


def rows_of(model, forget, general=None, neighbours=None, worst=None):
    figures = {
        ("forget", "recall"): forget, ("general", "f1"): general, ("neighbours", "f1"): neighbours,
        ("forget, worst reverse", "recall"): worst,
    }  # fmt: skip
    return [
        {"model": model, "group": group, "metric": metric, "value": value, "ci": None, "n": 3}
        for (group, metric), value in figures.items()
        if value is not None
    ]


BASE = rows_of("base", 1.0, 1.0, 1.0, 0.8)


def test_shift_is_the_drop_of_forget_recall_plus_the_changes_of_what_is_kept_in_points():
    assert shift(BASE + rows_of("a", 0.25, 0.9, 0.8), "a") == pytest.approx(75 - 10 - 20)
    assert shift(BASE + rows_of("a", 0.25, 0.9), "a") == pytest.approx(75 - 10)
    assert shift(BASE, "base") == 0


def test_the_front_holds_those_that_no_other_beats_and_counts_the_worst_reverse_prompt():
    rows = [
        *BASE,
        *rows_of("good", 0.2, 0.9, 0.9, 0.3),
        *rows_of("keeps less", 0.2, 0.8, 0.9, 0.3),
        *rows_of("forgets less", 0.4, 0.9, 0.9, 0.3),
        *rows_of("gives way", 0.0, 0.9, 0.9, 0.5),
        *rows_of("burnt", 0.0, 0.0, 0.0, 0.0),
    ]
    assert front(points_of(rows)) == {"base", "good", "burnt"}


def test_equals_share_the_front_and_a_model_without_figures_is_not_on_it():
    rows = rows_of("a", 0.2, 0.9) + rows_of("b", 0.2, 0.9) + rows_of("c", None, 0.9)
    assert front(points_of(rows)) == {"a", "b"}


def result(name, seed, forget):
    return Result(name, {"beta": 0.5}, seed, BASE + rows_of("unlearned", forget, 1.0, 1.0), {})


def test_the_table_has_a_line_a_model_and_its_seeds_below():
    one = result("npo", 0, 0.5)._replace(cost={"seconds": 61.2, "peak_memory_gb": 1.5})
    rows = BASE + rows_of(one.label, 0.5, 1.0, 1.0)
    again = [result("npo", 1, 0.3), result("npo", 2, 0.4), result("simnpo", 1, 0.0)]
    lines = report_of(rows, [one], again, [], []).splitlines()
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == [
        "npo, beta 0.5", "0.50", "–", "1.00", "1.00", "50.0", "●", "61", "1.50"
    ]  # fmt: skip
    assert len({len(line) for line in lines[:4]}) == 1
    head, _, seeds = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[-3:])
    assert head == ["", "seeds", "forget ↓", "neighbours ↑", "general ↑", "shift ↑"]  # no reverse prompt was asked
    assert seeds == [
        "npo, beta 0.5", "0, 1, 2", "0.40 [0.30, 0.50]", "1.00 [1.00, 1.00]", "1.00 [1.00, 1.00]", "60.0 [50.0, 70.0]"
    ]  # fmt: skip


def test_groups_of_ones_own_and_the_main_figures_of_benchmarks_have_columns_behind_the_others():
    own = [
        ("forget, stereotyped", "recall"), ("forget, stereotyped", "f1"), ("general, stereotyped", "recall"),
        ("general, stereotyped", "f1"), ("forget, reverse 1", "recall"), ("tofu all", "forget_quality"),
        ("tofu retain", "rouge_recall"), ("forget, wmdp:bio", "accuracy"), ("retain, muse:News knowmem", "knowmem"),
        ("holdout, muse:News privleak", "min_k"), ("muse:News as a whole", "privleak"),
    ]  # fmt: skip
    rows = BASE + [
        {"model": "base", "group": group, "metric": metric, "value": i / 10, "ci": None, "n": 3}
        for i, (group, metric) in enumerate(own)
    ]
    head, _, line = ([cell.strip() for cell in line.strip("|").split("|")] for line in table_of(rows, [])[:3])
    assert head[5:] == [
        "forget quality ↑", "PrivLeak (0 is best)", "forget, wmdp:bio ↓", "retain, muse:News knowmem ↑",
        "forget, stereotyped ↓", "general, stereotyped ↑", "shift ↑", "front", "seconds", "GB",
    ]  # fmt: skip
    assert line[5:11] == ["0.50", "1.00", "0.70", "0.80", "0.00", "0.30"]
    assert shift(rows, "base") == 0


def test_a_name_with_a_bar_or_a_line_end_is_one_cell_and_what_failed_is_said():
    one = result("a|b\nc", 0, 0.5)
    failed = [{"name": "npo", "values": {"beta": 9}, "reason": "step 3: not finite"}]
    text = report_of(BASE + rows_of(one.label, 0.5), [one], [], [], [], failed=failed)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1 and "a\\|b c, beta 0.5" in lines[-1]
    assert "- Failed: npo {'beta': 9}: step 3: not finite" in text


def test_no_shift_is_told_of_models_that_were_asked_none_of_its_questions():
    rows = [{"model": m, "group": "forget, qa:mine", "metric": "rouge_recall", "value": 0.5, "ci": None, "n": 3}
            for m in ("base", "npo")]  # fmt: skip
    assert shift(rows, "npo") is None
    head, _, _, line = ([cell.strip() for cell in line.strip("|").split("|")] for line in table_of(rows, []))
    assert head[1:3] == ["forget, qa:mine ↓", "shift ↑"] and line[1:3] == ["0.50", "–"]


def test_sweeps_have_a_table_of_their_own_with_the_base_on_their_questions_and_no_front():
    one, swept = result("npo", 0, 0.5), result("beta", 0, 0.25)
    rows, ablations = BASE + rows_of(one.label, 0.5, 1.0, 1.0), rows_of("base", 0.9) + rows_of(swept.label, 0.25)
    _, below = report_of(rows, [one], [], ablations, [swept]).split("Sweeps, ")
    head, _, base, line = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in below.splitlines() if line.startswith("|")
    )
    assert head == ["", "forget ↓", "shift ↑", "seconds", "GB"]
    assert base[:3] == ["base", "0.90", "–"] and line[:3] == ["beta, beta 0.5", "0.25", "65.0"]
