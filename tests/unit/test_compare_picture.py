"""The pictures of a comparison: nothing that was measured is left out, whatever the figures."""

from __future__ import annotations

import pytest

from duet_mlx import compare_picture
from duet_mlx.compare_picture import ablations_picture, methods_picture
from duet_mlx.compare_table import Result
from tests.unit.test_compare_table import BASE, rows_of


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved."""
    figures = []
    monkeypatch.setattr(compare_picture, "save", lambda figure, *paths: figures.append(figure))
    yield figures
    from matplotlib import pyplot

    pyplot.close("all")


def labels(axis):
    return axis.get_legend_handles_labels()[1]


def test_the_methods_stand_by_their_shift_and_those_on_the_front_are_joined(drawn):
    rows = BASE + rows_of("worse", 0.6, 0.5, 0.5, 0.7) + rows_of("$best_", 0.2, 0.9, 0.9, 0.3)
    methods_picture(rows, "results.png")
    left, right = drawn[0].axes
    assert [tick.get_text() for tick in right.get_yticklabels()] == [r"\$best_  1", "base  2", "worse  3"]
    assert labels(right) == [label for label, *_ in compare_picture.MEASURES]
    x, y = left.lines[0].get_data()
    assert list(zip(x, y, strict=True)) == [pytest.approx((0, 1)), pytest.approx((0.7, 0.9))]


def test_a_benchmarks_points_are_drawn_as_shares_and_privleak_is_none(drawn):
    figures = {("retain, muse:News knowmem", "knowmem"): 40.0, ("muse:News as a whole", "privleak"): -60.0}
    own = [
        {"model": "base", "group": group, "metric": metric, "value": value, "ci": None, "n": 3}
        for (group, metric), value in figures.items()
    ]
    methods_picture(BASE + own, "results.png")
    right = drawn[0].axes[1]
    *_, last = right.containers
    assert last.get_label() == "retain, muse:News knowmem ↑" and last[0].get_xdata().tolist() == [0.4]


def test_each_sweep_has_a_panel_its_values_and_all_measures_also_those_beside_their_interval(drawn):
    groups = [f"forget, kind {i}" for i in range(7)]
    rows = [
        {"model": "unlearned", "group": group, "metric": "recall", "value": 0.5, "ci": [0.6, 0.7], "n": 3}
        for group in ["forget", *groups]
    ]
    swept = [Result("K", {"top_k": k}, 0, rows, {}) for k in (1, 10)] + [Result("none", {}, 0, [], {})]
    ablations_picture(swept, "ablations.png")
    first, second, *rest = drawn[0].axes
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["1", "10"] and first.get_title() == "K"
    assert labels(first) == ["forget: recall ↓", *(f"{group} ↓" for group in groups)]
    assert [tick.get_text() for tick in second.get_xticklabels()] == ["as given"] and not labels(second)
    assert not any(axis.axison for axis in rest)
