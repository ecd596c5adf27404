"""The tables of benchmarks/hybrid_transfer.py, against numbers worked out by hand."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from transfer_report import METRICS, Results, differences_table, draw_chart, means_table, paired


def _results() -> Results:
    jaccard = {
        ("hybrid", "vanilla"): [0.80, 0.70, 0.90],
        ("supervised", "vanilla"): [0.79, 0.72, 0.84],
        ("hybrid", "ledm"): [0.70, 0.70, 0.70],
    }
    return {
        (arm, method, 20, seed): dict.fromkeys(METRICS, 0.5) | {"test_jaccard": value}
        for (arm, method), values in jaccard.items()
        for seed, value in enumerate(values)
    }


def test_differences_are_taken_seed_by_seed() -> None:
    # Differences 0.01, -0.02, 0.06: mean 0.05 / 3, sum of squares about it 0.0032667, standard error sqrt(./2/3).
    mean, error, n = paired({0: 0.80, 1: 0.70, 2: 0.90}, {0: 0.79, 1: 0.72, 2: 0.84, 3: 0.1})
    assert [mean, error, float(n)] == pytest.approx([0.05 / 3, (0.0098 / 3 / 6) ** 0.5, 3])
    table = differences_table(_results())
    assert "| 20 | hybrid - supervised, vanilla | +0.0167 | 0.0233 | 3 |" in table
    assert "| 20 | ledm - vanilla, hybrid | -0.1000 | 0.0577 | 3 |" in table
    assert len(table.splitlines()) == 4


def test_means_come_with_their_standard_deviation() -> None:
    rows = means_table(_results()).splitlines()
    assert rows[2].startswith("| 20 | vanilla | hybrid | 0.8000 ± 0.1000 | 0.5000 ± 0.0000 |")
    assert rows[2].endswith("| 0.8000, 0.7000, 0.9000 |")
    assert [row.split(" | ")[1:3] for row in rows[2:]] == [
        ["vanilla", "hybrid"],
        ["vanilla", "supervised"],
        ["ledm", "hybrid"],
    ]


def test_the_chart_has_a_point_for_each_group() -> None:
    svg = ElementTree.fromstring(draw_chart(_results()))
    circles = svg.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 3 + 2  # groups, and the arms of the legend
    y = {c.get("fill"): float(c.get("cy", "nan")) for c in circles[:2]}
    assert y["#7f7f7f"] < y["#bcbd22"], "hybrid is better, so it is higher up"
