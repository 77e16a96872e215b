"""What comparisons beside the pipeline find: labelling strategies, views of
the teacher, searches for the best checkpoint."""

from __future__ import annotations

import statistics

from kr_ray.runs.figures import Fraction, Work
from kr_ray.runs.results import Result


class LabelRow(Result):
    """One student: validation CAS of a labelling strategy at a checkpoint and a seed."""

    labelling: str
    epoch: int
    seed: int
    val_cas: float


class LabelSummary(Result):
    """Of one strategy over all of its students."""

    labelling: str
    mean: float
    sd: float
    n: int


class LabelComparison(Result):
    rows: list[LabelRow]

    def summary(self) -> list[LabelSummary]:
        """In the order of the rows."""
        cas: dict[str, list[float]] = {}
        for row in self.rows:
            cas.setdefault(row.labelling, []).append(row.val_cas)
        return [
            LabelSummary(
                labelling=name,
                mean=statistics.fmean(found),
                sd=statistics.stdev(found) if len(found) > 1 else 0.0,
                n=len(found),
            )
            for name, found in cas.items()
        ]


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


class SearchCost(Result):
    """A search for the best checkpoint: whom it found, and what it took.

    The images are those that its students were trained on, the seconds those of
    their trainings, both summed over all of its rounds.
    """

    epoch: int
    val_cas: float
    students: int
    images_seen: float
    seconds: float


class SearchRow(Result):
    """Both searches with one seed of the students."""

    seed: int
    exhaustive: SearchCost
    halving: SearchCost
    lost_cas: float
    """The exhaustive winner's CAS minus that of halving's winner."""
    images_share: float
    """Of halving's cost in the exhaustive one's."""
    seconds_share: float


class SearchComparison(Result):
    rows: list[SearchRow]


class CheckpointRow(Result):
    """A student of a comparison of generators."""

    generator: str
    labelling: str
    epoch: int
    seed: int
    val_cas: Fraction


class CheckpointCurve(Result):
    """Of one generator and labelling: validation CAS over its checkpoints, means over seeds."""

    generator: str
    labelling: str
    epochs: list[int]
    means: list[float]
    sds: list[float]
    """Over seeds; 0 with one."""
    n: int
    """Seeds."""

    @property
    def best(self) -> int:
        """Position of the best mean; of equals, the earliest."""
        return max(range(len(self.means)), key=lambda k: (self.means[k], -k))


class GeneratorComparison(Result):
    """Figure 3 and appendix D: CAS per checkpoint, generator and labelling, with one teacher."""

    teacher: Fraction
    """Its accuracy on the validation images."""
    rows: list[CheckpointRow]

    def curves(self) -> list[CheckpointCurve]:
        """In the order of the rows."""
        found: dict[tuple[str, str], dict[int, list[float]]] = {}
        for row in self.rows:
            by_epoch = found.setdefault((row.generator, row.labelling), {})
            by_epoch.setdefault(row.epoch, []).append(row.val_cas)
        return [
            CheckpointCurve(
                generator=generator,
                labelling=labelling,
                epochs=sorted(by_epoch),
                means=[statistics.fmean(by_epoch[epoch]) for epoch in sorted(by_epoch)],
                sds=[_sd(by_epoch[epoch]) for epoch in sorted(by_epoch)],
                n=max(map(len, by_epoch.values())),
            )
            for (generator, labelling), by_epoch in found.items()
        ]


def _sd(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
