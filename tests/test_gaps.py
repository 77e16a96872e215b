"""Students against teachers of as many steps: means, gaps and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from kr_ray.report.gaps import difference, gap_rows
from kr_ray.runs.comparisons import ViewRow
from kr_ray.runs.figures import Work


def test_the_interval_is_welchs() -> None:
    left, right = [0.80, 0.82, 0.85, 0.79], [0.90, 0.88, 0.91]
    gap, half = difference(left, right)
    expected = stats.ttest_ind(left, right, equal_var=False).confidence_interval(0.95)
    assert (gap - half, gap + half) == pytest.approx((expected.low, expected.high))


def test_the_interval_holds_no_difference_as_often_as_it_says() -> None:
    """The null case: 95 of 100 intervals of equal populations contain 0."""
    random = np.random.default_rng(0)
    draws = random.normal(0.8, 0.02, (2000, 2, 3))
    held = [
        abs(gap) <= half for gap, half in (difference(left.tolist(), right.tolist()) for left, right in draws)
    ]
    assert np.mean(held) == pytest.approx(0.96, abs=0.015)  # Welch's is a little wide at n = 3


def test_one_seed_has_a_gap_but_no_interval() -> None:
    gap, half = difference([0.8], [0.9])
    assert gap == pytest.approx(-0.1) and math.isnan(half)
    assert difference([0.8, 0.8], [0.8, 0.8]) == (0.0, 0.0)


def test_rows_are_summed_up_by_variant() -> None:
    def row(variant: str, accuracy: float, queries: int | None = None) -> ViewRow:
        work = Work(cpu_seconds=2.0, gpu_seconds=0.0, images_trained=100, teacher_queries=queries)
        return ViewRow(
            variant=variant, seed=0, test_accuracy=accuracy, val_accuracy=accuracy, steps=1, work=work
        )

    rows = [
        row("teacher", 0.9),
        row("seen", 0.8, queries=50),
        row("teacher", 0.8),
        row("seen", 0.7, queries=70),
    ]
    teacher, seen = gap_rows(rows, "teacher")
    assert (teacher.variant, teacher.gap, teacher.gap_half_width, teacher.n) == (
        "teacher",
        0.0,
        0.0,
        2,
    )
    assert seen.mean == pytest.approx(0.75) and seen.gap == pytest.approx(-0.1) and seen.teacher_queries == 60
    assert seen.sd == pytest.approx(0.0707, abs=1e-4)
