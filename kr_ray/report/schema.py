"""What report.json holds: version 1 of its schema, as typed models.

All shares (accuracies, CAS, AUC, AOP, rates) are fractions in [0, 1]; times are seconds; counts are images
unless named otherwise. A section that is null belongs to a stage that has not run.
`Report.model_json_schema()` gives the JSON Schema. Readers must refuse another `schema_version`. Measurements
that are not finite numbers are written as null.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from kr_ray.runs.artifacts import Json
from kr_ray.runs.figures import (
    Best,
    Bound,
    ClassifierPoint,
    CollapsePoint,
    Confirmed,
    Copies,
    Count,
    Figures,
    Fraction,
    Frontier,
    Generation,
    GeneratorPoint,
    KrAudit,
    LiraArm,
    OpenFigures,
    ScalingRow,
    SweptCheckpoint,
    Trial,
    Work,
    by_network,
)

SCHEMA_VERSION: Literal[1] = 1


class ReportError(ValueError):
    """The report dict does not fit the schema. The message lists every mistake."""


class Data(OpenFigures):
    """The real data set. Further facts (duplicates, digest, ...) are shown as they are."""

    name: str
    num_classes: Annotated[int, Field(ge=1)]
    channels: Literal[1, 3]
    image_size: Count
    train: Count
    validation: Count
    test: Count
    class_names: list[str]

    @model_validator(mode="after")
    def _one_name_per_class(self) -> Data:
        if len(self.class_names) != self.num_classes:
            raise ValueError(
                "`len(class_names) == num_classes` must hold, but got "
                f"{len(self.class_names)} names, num_classes={self.num_classes}; name every class once"
            )
        return self


class EqualCompute(Figures):
    """A second teacher, trained for as many gradient steps as the student."""

    test_accuracy: Fraction
    steps: Count
    work: Work | None = None


class Teacher(Figures):
    test_accuracy: Fraction
    val_accuracy: Fraction
    steps: Count
    equal_compute: EqualCompute | None = None
    work: Work | None = None
    test_loss: float | None = None
    curve: list[ClassifierPoint] = []
    confusion: list[list[Count]] | None = None
    """Test images, [true class][predicted class]."""


class Generator(Figures):
    kind: str = "biggan_deep"
    architecture: str = ""
    """Preset of its size, where its kind has such."""
    parameters: dict[str, Count]
    """Trained numbers by network."""
    epochs: Count
    curve: list[GeneratorPoint] = []
    collapse: list[CollapsePoint] = []

    @model_validator(mode="before")
    @classmethod
    def _first_names(cls, value: Any) -> Any:
        return by_network(value)


class Tuning(Figures):
    searcher: str
    trials: Count
    best: Best
    chosen: dict[str, int | float] | None = None
    """Generation parameters of the final student: the best trial's, or the defaults if no trial beat them."""
    default_cas: Fraction | None = None
    """Validation CAS of the best checkpoint at the default generation parameters."""
    delta_cas: Annotated[float, Field(ge=-1, le=1)] | None = None
    delta_error: Annotated[float, Field(ge=0)] | None = None
    """Standard error of delta_cas from the number of validation images, at most (kr_ray.cluster.confirm)."""
    confirmed: Confirmed | None = None
    images_seen: Count | None = None
    images_unpruned: Count | None = None
    """What all trials would have seen without pruning."""
    saved_share: Annotated[float, Field(ge=-1e-9, le=1)] | None = None
    """1 - images_seen / images_unpruned, which rounding can push below 0."""
    history: list[Trial] = []
    importance: dict[str, float] | None = None
    """Null where the trials do not say it (see kr_ray.report.importance)."""

    @property
    def parameters(self) -> list[str]:
        """Names of the search space."""
        return list(self.best.params)

    @property
    def used(self) -> dict[str, float]:
        """Generation parameters that the student was trained with, as far as they were searched."""
        return dict(self.chosen or self.best.params)


class Student(Figures):
    test_cas: Fraction
    val_cas: Fraction
    steps: Count
    images_seen: Count
    parameters: Count
    curve: list[ClassifierPoint] = []
    confusion: list[list[Count]] | None = None
    checkpoint_epoch: Count | None = None
    images_from: str | None = None
    """`on_device` or `ray_data`: who generated the images it was trained on; `parquet`: an exported set."""
    labels: str | None = None
    """What its labels are answers to, in words (see kr_ray.report.words.labels); None of an exported set."""
    work: Work | None = None


class FurtherStudent(Figures):
    """A classifier made in another way from the same images."""

    kind: str
    title: str = ""
    """Of its method, in tables."""
    note: str = ""
    """What the method is, in a few words."""
    guarantee: Bound | None = None
    """Of a private method: what holds for this student alone, its own releases composed."""
    test_accuracy: Fraction
    val_accuracy: Fraction
    steps: Count
    images_seen: Count
    seconds: Annotated[float, Field(ge=0)]
    work: Work | None = None


class Audit(Figures):
    kr: KrAudit | None = None
    copies: Copies | None = None
    lira: dict[str, LiraArm] = {}
    """By arm (`audit.worst_case.arms`)."""


class Released(Figures):
    """All of a private run's report that may leave it: what the guarantee covers, and what was public before.
    No score is among it, for validation and test images decide scores and the guarantee covers neither."""

    run: str
    guarantee: dict[str, Bound]
    """By split: to the people of the training images, and to those of the validation images where these
    decided anything."""
    words: dict[str, str]
    """The same in a line each."""
    artefacts: list[str]
    """What it covers, as `kr export` writes it."""
    class_names: list[str]
    channels: Literal[1, 3]
    image_size: Count
    training_images: Count
    """Public under the guarantee's adjacency."""
    generator: str
    """Its kind."""
    checkpoint_epoch: Count
    synthesis: Generation | None
    """The generation parameters of the student."""
    student_parameters: Count
    versions: dict[str, str]


class Scaling(Figures):
    """Students of more and more synthetic images, without and with the real ones (`kr scaling`)."""

    rows: list[ScalingRow]

    def sizes(self) -> list[ScalingSize]:
        """Means over seeds, by rising size."""
        return [
            ScalingSize(scale=scale, alone=self._spread(scale, False), with_real=self._spread(scale, True))
            for scale in sorted({row.scale for row in self.rows})
        ]

    def _spread(self, scale: int, with_real: bool) -> Spread:
        found = [row.test_accuracy for row in self.rows if (row.scale, row.with_real) == (scale, with_real)]
        sd = statistics.stdev(found) if len(found) > 1 else None
        return Spread(mean=statistics.fmean(found), sd=sd, n=len(found))


class Spread(Figures):
    """Of test accuracies over seeds."""

    mean: Fraction
    sd: Annotated[float, Field(ge=0)] | None
    """None of one."""
    n: Count


class ScalingSize(Figures):
    scale: Count
    alone: Spread
    with_real: Spread


class Stage(OpenFigures):
    wall_s: Annotated[float, Field(ge=0)]
    skipped: bool = False
    """True: its result stood from an earlier start of this run."""
    images_per_s: Annotated[float, Field(ge=0)] | None = None


class Report(Figures):
    schema_version: Literal[1] = SCHEMA_VERSION
    run: str
    seed: int
    created: str
    """ISO 8601."""
    versions: dict[str, str]
    config: Json
    data: Data
    device: str
    teacher: Teacher | None = None
    generator: Generator | None = None
    checkpoints: list[SweptCheckpoint] | None = None
    tuning: Tuning | None = None
    student: Student | None = None
    students: dict[str, FurtherStudent] = {}
    """By name (`students` in the configuration)."""
    released: Released | None = None
    """Of a private run: what may leave it."""
    internal: list[str] = []
    """Of a private run: the other sections, which must not."""
    scaling: Scaling | None = None
    audit: Audit | None = None
    frontier: Frontier | None = None
    """Accuracy against leak of the methods that `kr frontier` compared."""
    stages: dict[str, Stage] = {}

    @model_validator(mode="after")
    def _fits_the_classes(self) -> Report:
        k = self.data.num_classes
        for name, part in (("teacher", self.teacher), ("student", self.student)):
            matrix = part.confusion if part else None
            if matrix is not None and (len(matrix) != k or any(len(row) != k for row in matrix)):
                raise ValueError(
                    f"`{name}.confusion` must be {k} x {k}, but got {len(matrix)} rows; count per true class"
                )
        return self


def validate_report(report: Mapping[str, Any]) -> Report:
    """Check a plain dict; numpy values, tuples and paths are taken, nan and inf become null.

    Raises:
        ReportError: with every mistake in one message.
    """
    try:
        return Report.model_validate(plain(report))
    except ValidationError as error:
        lines = [
            f"  - {'.'.join(str(part) for part in item['loc']) or 'report'}: "
            f"{item['msg'].removeprefix('Value error, ')}, but got {str(item['input'])[:80]!r}"
            for item in error.errors()
        ]
        raise ReportError(f"{len(lines)} mistake(s) in the report:\n" + "\n".join(lines)) from error


def plain(value: Any) -> Any:
    """The same value in JSON's types; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, PurePath) else value
