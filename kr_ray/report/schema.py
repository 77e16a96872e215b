"""What report.json holds: version 1 of its schema, as typed models.

All shares (accuracies, CAS, AUC, AOP, rates) are fractions in [0, 1]; times are seconds; counts are images unless named
otherwise. A section that is null belongs to a stage that has not run. `Report.model_json_schema()` gives the JSON Schema.
Readers must refuse another `schema_version`. Measurements that are not finite numbers are written as null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_VERSION: Literal[1] = 1

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Epoch = Annotated[float, Field(ge=0)]


class ReportError(ValueError):
    """The report dict does not fit the schema. The message lists every mistake."""


class Section(BaseModel):
    """Immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class OpenSection(Section):
    """As `Section`, but further keys are kept as they are."""

    model_config = ConfigDict(extra="allow")


class Data(OpenSection):
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


class ClassifierPoint(OpenSection):
    epoch: Epoch
    train_loss: float | None = None
    val_accuracy: Fraction | None = None


class EqualCompute(Section):
    """A second teacher, trained for as many gradient steps as the student."""

    test_accuracy: Fraction
    steps: Count


class Teacher(Section):
    test_accuracy: Fraction
    val_accuracy: Fraction
    steps: Count
    equal_compute: EqualCompute | None = None
    test_loss: float | None = None
    curve: list[ClassifierPoint] = []
    confusion: list[list[Count]] | None = None
    """Test images, [true class][predicted class]."""


class GanPoint(OpenSection):
    epoch: Epoch
    loss_d: float | None = None
    loss_g: float | None = None


class CollapsePoint(OpenSection):
    epoch: Epoch
    agreement: float | None
    """Share of generated images that the teacher takes for the class they were generated for, mean over classes."""
    diversity: float | None
    """Within-class spread of teacher features over that of real images."""
    alarm: bool


class Generator(Section):
    architecture: str
    parameters_g: Count
    parameters_d: Count
    epochs: Count
    curve: list[GanPoint] = []
    collapse: list[CollapsePoint] = []


class Checkpoint(OpenSection):
    epoch: Count
    val_cas: Fraction | None


class Best(Section):
    latent_std: float
    regeneration_rate: int
    cardinality_scale: int
    val_cas: Fraction
    trial: Count


class Chosen(Section):
    """What the final student was trained with: the best trial's parameters, or the defaults if no trial beat them."""

    latent_std: float
    regeneration_rate: int
    cardinality_scale: int


class Trial(OpenSection):
    trial: Count
    latent_std: float
    regeneration_rate: int
    cardinality_scale: int
    val_cas: Fraction | None
    state: str
    """`complete`, `pruned`, `failed`, ..., in any case."""
    resource: float | None = None


class Tuning(Section):
    searcher: str
    trials: Count
    best: Best
    chosen: Chosen | None = None
    default_cas: Fraction | None = None
    """Validation CAS of the best checkpoint at the default generation parameters."""
    delta_cas: Annotated[float, Field(ge=-1, le=1)] | None = None
    images_seen: Count | None = None
    images_unpruned: Count | None = None
    """What all trials would have seen without pruning."""
    saved_share: Annotated[float, Field(ge=-1e-9, le=1)] | None = None
    """1 - images_seen / images_unpruned, which rounding can push below 0."""
    history: list[Trial] = []
    importance: dict[str, float] | None = None


class Student(Section):
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


class Roc(Section):
    fpr: list[Fraction]
    tpr: list[Fraction]

    @model_validator(mode="after")
    def _same_length(self) -> Roc:
        if len(self.fpr) != len(self.tpr):
            raise ValueError(f"`len(fpr) == len(tpr)` must hold, but got {len(self.fpr)} and {len(self.tpr)}; give pairs")
        return self


class Attacked(Section):
    """One attacked model."""

    auc: Annotated[float, Field(ge=0.5, le=1)]
    """max(auc_raw, 0.5), as the paper prints it."""
    auc_raw: Fraction
    aop: Fraction
    roc: Roc | None = None
    per_class: list[Fraction | None] = []


class AttackModel(OpenSection):
    class_index: Count = Field(alias="class")
    kind: str
    val_auc: Fraction | None = None


class KrAudit(Section):
    """The attack of Knowledge Recycling, section 3.6."""

    teacher: Attacked | None = None
    student: Attacked | None = None
    attack_models: list[AttackModel] = []
    shadow_models: Count
    members: Count
    non_members: Count


class Epsilon(OpenSection):
    """Lower bounds: with `confidence`, no (epsilon, delta)-differential privacy below them holds. Null: not computable."""

    clopper_pearson: float | None
    one_run: float | None
    delta: float
    confidence: Fraction


class AttackFigures(OpenSection):
    """What one attack finds among all pairs of a run and an audit sample (see kr_ray.privacy.rates for the intervals)."""

    tpr_at_01: Fraction | None = Field(alias="tpr_at_fpr_0.001")
    """Share of members called members where one in 1,000 non-members is; null if there are too few, `refused` then says so."""
    ci_low: Fraction | None
    ci_high: Fraction | None
    true_positives: Count | None
    false_positives: Count | None
    refused: str | None = None
    tpr_at_1: Fraction | None = Field(alias="tpr_at_fpr_0.01")
    ci_low_at_1: Fraction | None = Field(alias="ci_low_0.01")
    ci_high_at_1: Fraction | None = Field(alias="ci_high_0.01")
    auc: Fraction
    auc_low: Fraction
    auc_high: Fraction
    balanced_accuracy: Fraction | None
    epsilon: Epsilon
    n_members: Count
    n_non_members: Count
    finest_fpr: Fraction
    roc: Roc | None = None
    """Of the headline attack only."""


class LiraArm(OpenSection):
    """The worst-case audit of one arm: `models` runs, each trained on half of the canaries and half of the population samples."""

    models: Count
    queries: Count
    headline: str
    """The attack behind `population`, `canary` and `canary_true_label`, chosen beforehand."""
    population: AttackFigures
    canary: AttackFigures
    canary_true_label: AttackFigures | None = None
    """The same attack asking for the canaries' true label; success shows generalisation, not memory of the given one."""
    true_label_share: dict[str, Fraction]
    """How often a canary's true label is predicted by models that were (`in`) and were not (`out`) trained on it."""
    given_label_share: dict[str, Fraction]
    attacks: dict[str, dict[str, AttackFigures]]
    canary_kind: str
    canaries: Count
    population_samples: Count
    reference_images: Count
    test_accuracy: Fraction
    test_accuracy_sd: Annotated[float, Field(ge=0)]
    """Mean and standard deviation over the runs."""
    seconds: Annotated[float, Field(ge=0)]


class Histogram(Section):
    """Shares of images by distance: `edges` [B + 1], `generated` and `test` [B]."""

    edges: list[float]
    generated: list[Fraction]
    test: list[Fraction]


class CopySpace(Section):
    """Nearest training neighbours in one space (see kr_ray.audits.neighbours.copy_figures)."""

    threshold: float
    near_copies: Count
    near_copy_share: Fraction
    ci_low: Fraction
    ci_high: Fraction
    data_copying: float
    """Mann-Whitney z against the test images: below -2, generated images are nearer to the training images than test images are."""
    memorised_share: Fraction
    memorised_share_test: Fraction
    median_generated: float
    median_test: float
    histogram: Histogram


class Fidelity(Section):
    """See kr_ray.audits.fidelity; null where refused."""

    n_real: Count
    n_generated: Count
    fid: float | None
    fid_refused: str = ""
    kid: float | None
    kid_sd: float | None
    precision: Fraction | None
    recall: Fraction | None
    density: float | None
    coverage: Fraction | None
    refused: str = ""


class Copies(Section):
    """Generated images against the real ones; exact copies among the latter were set aside first."""

    images: Count
    train: Count
    test: Count
    quantile: Fraction
    encoder: str
    exact_copies: Count
    """Generated images that equal a training image pixel by pixel."""
    spaces: dict[Literal["pixels", "features"], CopySpace]
    fidelity: dict[Literal["generated", "test"], Fidelity]


class Audit(Section):
    kr: KrAudit | None = None
    copies: Copies | None = None
    lira: dict[str, LiraArm] = {}
    """By arm (see kr_ray.config.ArmName)."""


class Stage(OpenSection):
    wall_s: Annotated[float, Field(ge=0)]
    skipped: bool = False
    """True: its result stood from an earlier start of this run."""
    images_per_s: Annotated[float, Field(ge=0)] | None = None


class Report(Section):
    schema_version: Literal[1] = SCHEMA_VERSION
    run: str
    seed: int
    created: str
    """ISO 8601."""
    versions: dict[str, str]
    config: dict[str, Any]
    data: Data
    device: str
    teacher: Teacher | None = None
    generator: Generator | None = None
    checkpoints: list[Checkpoint] | None = None
    tuning: Tuning | None = None
    student: Student | None = None
    audit: Audit | None = None
    stages: dict[str, Stage] = {}

    @model_validator(mode="after")
    def _fits_the_classes(self) -> Report:
        k = self.data.num_classes
        for name, part in (("teacher", self.teacher), ("student", self.student)):
            matrix = part.confusion if part else None
            if matrix is not None and (len(matrix) != k or any(len(row) != k for row in matrix)):
                raise ValueError(f"`{name}.confusion` must be {k} x {k}, but got {len(matrix)} rows; count per true class")
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
            f"  - {'.'.join(str(part) for part in item['loc']) or 'report'}: {item['msg'].removeprefix('Value error, ')}, "
            f"but got {str(item['input'])[:80]!r}"
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
