"""What comparisons beside the pipeline find: labelling strategies, views of
the teacher, searches for the best checkpoint."""

from __future__ import annotations

from kr_ray.runs.figures import Work
from kr_ray.runs.results import Result


class ViewRow(Result):
    """A student, or teacher of as many steps, of a comparison of views."""

    variant: str
    seed: int
    test_accuracy: float
    val_accuracy: float
    steps: int
    work: Work


class ViewSummary(Result):
    """Of one variant over its seeds."""

    variant: str
    mean: float
    """Of the test accuracies."""
    sd: float
    n: int
    gap: float
    """Mean minus the teachers' mean."""
    gap_half_width: float | None
    """Of the gap's 95 % interval over seeds; None with fewer than two values on a side."""
    cpu_seconds: float
    teacher_queries: float


class ViewComparison(Result):
    rows: list[ViewRow]
