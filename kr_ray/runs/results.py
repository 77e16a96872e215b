"""What each stage of a run finds, typed from where it is made to the
report, and kept as JSON in the stage's done.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

from kr_ray.runs.figures import (
    AuditedKeys,
    Best,
    Bound,
    ClassifierPoint,
    CollapsePoint,
    Confirmed,
    CopySpace,
    Count,
    Fidelity,
    Fraction,
    Frontier,
    Generation,
    GeneratorPoint,
    KrAudit,
    LiraArm,
    Matched,
    PrivacyRecord,
    ScalingRow,
    SweptCheckpoint,
    Trial,
    Work,
    by_network,
)


class Result(BaseModel):
    """Of a stage or part: immutable. What an older program wrote beside these keys is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    wall_s: float = 0.0
    """Of all attempts on the stage together."""

    def headline(self) -> str:
        """The one figure that a person sees of it in the terminal."""
        return ""

    def remarks(self) -> list[str]:
        """Sentences for the person who runs it."""
        return []

    def throughput(self) -> float | None:
        """Images per second of its training, where it is one."""
        return None


class PrivateResult(Result):
    """Of work that reads private images."""

    privacy: PrivacyRecord | None = None
    """What it released of them, by a mechanism with an event; None: it may have told anything."""


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Key(Generic[R]):
    """The name under which a stage's result is kept, and its type."""

    name: str
    result: type[R]


@dataclass
class Results:
    """The results of a run's finished stages, in the order in which they came."""

    _found: dict[str, Result] = field(default_factory=dict)

    def __getitem__(self, key: Key[R]) -> R:
        found = self._found[key.name]
        assert isinstance(found, key.result)
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def get(self, key: Key[R]) -> R | None:
        return self[key] if key.name in self._found else None

    def keep(self, name: str, result: Result) -> None:
        self._found[name] = result

    def items(self) -> Iterator[tuple[str, Result]]:
        yield from self._found.items()


# --- the stages' results ------------------------------------------------------------------------------------


class Duplicates(BaseModel):
    """Exact copies among the real images."""

    within_train: Count
    validation_in_train: Count
    test_in_train: Count
    test_in_validation: Count = 0
    distinct_train: Count = 0
    """Training images that equal no other image of any split: those that can be audited."""


class DataResult(Result):
    model_config = ConfigDict(extra="allow")

    name: str
    digest: str
    num_classes: int
    class_names: list[str]
    channels: int
    image_size: int
    train: Count
    validation: Count
    test: Count
    class_counts: list[int]
    duplicates: Duplicates
    remarked: list[str] = []
    """What makes figures less than they seem: shared, empty or missing images."""

    def remarks(self) -> list[str]:
        return self.remarked

    def headline(self) -> str:
        return f"{self.name}: {self.train} / {self.validation} / {self.test} images"


class ClassifierResult(PrivateResult):
    """Of a trained classifier: teacher, student, shadow or any other."""

    test_accuracy: Fraction
    test_loss: float
    val_accuracy: Fraction
    confusion: list[list[int]]
    """Test images, [true class][predicted class]."""
    steps: Count
    images_seen: Count
    batch_size: Count
    learning_rate: float
    parameters: Count
    seconds: float
    work: Work | None = None
    curve: list[ClassifierPoint] = []
    images_from: str | None = None
    """Of a student: `on_device`, `ray_data` or `parquet`."""
    synthesis: Generation | None = None
    """Of a student of a generator: the generation parameters that it was trained with."""
    title: str = ""
    """Of the method that made it, in tables; empty where its stage says what it is."""
    note: str = ""
    """What the method is, in a few words."""

    def headline(self) -> str:
        return f"test accuracy {self.test_accuracy:.4f}"

    def throughput(self) -> float | None:
        return self.images_seen / self.seconds if self.seconds and self.images_seen else None


class StudentResult(ClassifierResult):
    def headline(self) -> str:
        return f"test CAS {self.test_accuracy:.4f}"


class SelectionResult(Result):
    """Of the training that coresets are selected by."""

    images: Count
    never_learned: Count
    """Images that were answered rightly in none of their steps."""
    mean_forgotten: float
    """Forgetting events per image."""
    val_accuracy: Fraction
    steps: Count
    images_seen: Count
    seconds: float

    def headline(self) -> str:
        return (
            f"{self.never_learned / self.images:.1%} of the images never learned, "
            f"{self.mean_forgotten:.2f} forgetting events an image"
        )

    def throughput(self) -> float | None:
        return self.images_seen / self.seconds if self.seconds else None


class CoresetResult(ClassifierResult):
    selection: str
    """The rule."""
    selected: Count
    """Images that it took."""
    selected_by_class: list[Count]
    never_learned: Literal["max", "zero"] | None = None
    """Of `forgetting`: what an image that was never learned counts as."""

    def headline(self) -> str:
        return f"{super().headline()} of {self.selected} images by {self.selection}"


class DataFreeResult(ClassifierResult):
    bank: Count
    """Images that were made."""
    bank_by_class: list[Count]
    """As the teacher answers them."""
    bank_agreement: Fraction
    """Share of them that the teacher takes for what they were to be."""


class DistillationResult(Result):
    """Of a distilled set (see kr_ray.methods.distillation)."""

    objective: str
    initialisation: str
    images: Count
    images_per_class: Count
    iterations: Count
    initial_private: Count
    """Distilled images that started as private ones."""
    moved_rms: float | None
    """How far those have moved since, per pixel, in standard deviations of the private pixels; null without
    any."""
    losses: list[float]
    """Mean over each tick's iterations."""
    seconds: float
    cpu_seconds: float
    copies: CopySpace | None = None
    """Nearest private images, by pixels; null in runs of an audit."""

    def headline(self) -> str:
        said = f"{self.images} images by {self.objective}"
        if self.moved_rms is not None:
            said += f", {self.initial_private} of them from private ones, moved by {self.moved_rms:.2f} sd"
        if self.copies is not None:
            said += f"; near-copies by pixels {self.copies.near_copy_share:.1%}"
        return said


class GeneratorResult(PrivateResult):
    checkpoints: list[int]
    """Epochs."""
    curve: list[GeneratorPoint]
    collapse: list[CollapsePoint]
    parameters: dict[str, Count]
    """Trained numbers by network."""

    @model_validator(mode="before")
    @classmethod
    def _first_names(cls, value: Any) -> Any:
        return by_network(value)

    def headline(self) -> str:
        checkpoints = f"{len(self.checkpoints)} checkpoints"
        if not self.collapse:
            return checkpoints
        return f"{checkpoints}, {sum(row.alarm for row in self.collapse)} collapse alarms"


class SweepResult(PrivateResult):
    checkpoints: list[SweptCheckpoint]
    best_epoch: int
    best_cas: Fraction
    standard_error: float | None = None
    """Of best_cas, from the number of validation images; another seed's change comes on top."""

    def headline(self) -> str:
        return (
            f"best: epoch {self.best_epoch}, validation CAS {self.best_cas:.4f}{_error(self.standard_error)}"
        )


class TuningResult(PrivateResult):
    searcher: str
    trials: Count
    best: Best
    default_cas: Fraction
    delta_cas: float
    delta_error: float | None = None
    """Standard error of delta_cas from the number of validation images, at most."""
    confirmed: Confirmed | None = None
    chosen: dict[str, int | float]
    """Generation parameters of the final student, by the names of the
    search space: the best trial's, or the defaults."""
    history: list[Trial]
    images_seen: Count
    images_unpruned: Count
    saved_share: float

    def headline(self) -> str:
        gain = f"{self.delta_cas:+.4f}{_error(self.delta_error)} over the defaults"
        said = f"validation CAS {self.best.val_cas:.4f} ({gain})"
        if found := self.confirmed:
            stay = ", defaults stay" if found.winner != found.trial else ""
            said += f"; confirmed {found.gain:+.4f}{_error(found.standard_error)}{stay}"
        return said


def _error(value: float | None) -> str:
    return "" if value is None else f" +- {value:.4f}"


class ScalingResult(Result):
    """What more synthetic images bring, without and with the real ones."""

    rows: list[ScalingRow]

    def headline(self) -> str:
        largest = max(row.scale for row in self.rows)
        found = {
            kind: [row.test_accuracy for row in self.rows if (row.scale, row.with_real) == (largest, kind)]
            for kind in (False, True)
        }
        alone, both = (statistics.fmean(values) for values in found.values())
        return f"{largest} x the real images: {alone:.4f}, with the real ones {both:.4f}"


class CopiesResult(Result):
    images: Count
    train: Count
    test: Count
    quantile: Fraction
    encoder: str
    exact_copies: Count
    spaces: dict[Literal["pixels", "features"], CopySpace]
    fidelity: dict[Literal["generated", "test"], Fidelity]

    def headline(self) -> str:
        shares = ", ".join(f"{name} {space.near_copy_share:.1%}" for name, space in self.spaces.items())
        return f"near-copies by {shares} ({self.quantile:.0%} expected)"


class ShadowsResult(Result):
    shadow_models: Count


class AuditResult(Result):
    kr: KrAudit

    def headline(self) -> str:
        models = {"teacher": self.kr.teacher, "student": self.kr.student}
        return "AUC_MIA " + ", ".join(f"{name} {found.auc:.4f}" for name, found in models.items() if found)


class WorstCaseResult(Result):
    audit: AuditedKeys
    """The keys that decided it."""
    excluded_copies: Count
    lira: dict[str, LiraArm]

    def headline(self) -> str:
        return "canary TPR at 0.1 % FPR " + ", ".join(
            f"{arm} {found.canary.tpr()}" for arm, found in self.lira.items()
        )


class GuaranteeResult(Result):
    """What a private run promises to the people of its images (see kr_ray.privacy.whole_run)."""

    bounds: dict[str, Bound]
    """By split: training, and validation where its images decided anything."""
    words: dict[str, str]
    """The same in a line each."""

    @property
    def holds(self) -> bool:
        """Whether all of it may be called a guarantee."""
        return all(bound.guarantee for bound in self.bounds.values())

    def headline(self) -> str:
        return "; ".join(f"{split} images: {said}" for split, said in self.words.items())


class MatchingResult(Result):
    matched: dict[str, Matched]
    """By method; those without a main key are not in it."""

    def headline(self) -> str:
        return ", ".join(
            f"{name} {found.key} {found.value:g}: {found.accuracy:.4f} for {found.target:.4f}"
            f"{'' if found.reached else ' (not reached)'}"
            for name, found in self.matched.items()
        )


class FrontierResult(Result):
    frontier: Frontier

    def headline(self) -> str:
        rows, found = self.frontier.rows, self.frontier.recommended
        told = [f"{sum(not row.dominated_by for row in rows)} of {len(rows)} methods on the frontier"]
        told += ["partial"] if self.frontier.partial else []
        told += [f"recommended: {found or 'none'}"] if self.frontier.leak_limit is not None else []
        return ", ".join(told)

    def remarks(self) -> list[str]:
        return [f"{row.title}: {row.alarm}" for row in self.frontier.rows if row.alarm]


class ReportResult(Result):
    page: str
    mlflow_run: str | None = None


DATA = Key("data", DataResult)
TEACHER = Key("teacher", ClassifierResult)
GENERATOR = Key("generator", GeneratorResult)
CHECKPOINTS = Key("checkpoints", SweepResult)
TUNING = Key("tuning", TuningResult)
STUDENT = Key("student", StudentResult)
COPIES = Key("copies", CopiesResult)
EQUAL_COMPUTE_TEACHER = Key("equal_compute_teacher", ClassifierResult)
SHADOWS = Key("shadows", ShadowsResult)
AUDIT = Key("audit", AuditResult)
GUARANTEE = Key("guarantee", GuaranteeResult)
WORST_CASE = Key("worst_case", WorstCaseResult)
MATCHING = Key("matching", MatchingResult)
FRONTIER = Key("frontier", FrontierResult)
SCALING = Key("scaling", ScalingResult)
REPORT = Key("report", ReportResult)
