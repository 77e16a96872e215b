"""How far students stay behind teachers of as much compute, with what chance alone would do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats

from kr_ray.runs.comparisons import ViewRow, ViewSummary


def gap_rows(rows: Sequence[ViewRow], reference: str) -> list[ViewSummary]:
    """One row per variant, in the order of their first appearance;
    `reference` is the variant of the teachers."""
    teachers = [row.test_accuracy for row in rows if row.variant == reference]
    summary = []
    for variant in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == variant]
        found = [row.test_accuracy for row in own]
        gap, half = difference(found, teachers)
        summary.append(
            ViewSummary(
                variant=variant,
                mean=statistics.fmean(found),
                sd=statistics.stdev(found) if len(found) > 1 else 0.0,
                n=len(found),
                gap=gap,
                gap_half_width=0.0 if variant == reference else None if math.isnan(half) else half,
                cpu_seconds=statistics.fmean(row.work.cpu_seconds for row in own),
                teacher_queries=statistics.fmean(row.work.teacher_queries or 0 for row in own),
            )
        )
    return summary


def difference(left: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """Mean of `left` minus mean of `right`, and the half width of its 95 % interval (Welch 1947).

    The half width is nan with fewer than two values on a side.
    """
    gap = statistics.fmean(left) - statistics.fmean(right)
    if min(len(left), len(right)) < 2:
        return gap, float("nan")
    parts = [statistics.variance(values) / len(values) for values in (left, right)]
    error = sum(parts)
    if error == 0:
        return gap, 0.0
    freedom = error**2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (left, right), strict=True)
    )
    return gap, float(stats.t.ppf(0.975, freedom)) * error**0.5
