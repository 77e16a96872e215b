"""A whole run's configuration, and the rules between its sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from kr_ray.config.audit import AuditConfig
from kr_ray.config.base import Location, Section
from kr_ray.config.classifiers import ClassifierConfig
from kr_ray.config.cluster import ClusterConfig, TrackingConfig
from kr_ray.config.data import DataConfig
from kr_ray.config.frontier import FrontierConfig
from kr_ray.config.generators import GeneratorSection
from kr_ray.config.methods import (
    CheckpointsConfig,
    MethodSection,
    OwnTeacherSection,
    ScalingConfig,
    StudentConfig,
    SynthesisConfig,
    TeacherConfig,
    TuningConfig,
)
from kr_ray.config.privacy import RunPrivacyConfig, private_run_mistakes

if TYPE_CHECKING:
    from typing import Any

DEFAULT_KIND = "biggan_deep"
"""Of generator, where a file names none."""
DEFAULT_TEACHER = "classifier"
"""Of teacher, likewise."""
STUDENT_NAME = "[A-Za-z0-9][A-Za-z0-9_-]{0,99}"
"""Of a student in `students`: it is part of file names."""
OWN_ARMS = ("teacher", "kr", "fixed_generator")
"""Arms of the worst-case audit that every run has."""


class RunKeys(Section):
    """The keys of a run that are no section."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)
    """Of the run, and of its folder in `storage`."""
    seed: int = Field(0, ge=0)
    """Every random number of the run follows from it."""
    storage: Location = "runs"
    """Where all runs are kept, each in a folder of its name: a path that
    all nodes see, or a URI of an object store."""
    plugins: tuple[str, ...] = ()
    """Modules that bring further kinds of generators and students (see kr_ray/README.md). They are programs
    that are run: name only those that you trust. Workers must be able to import them too."""


class Config(RunKeys):
    """A whole run."""

    added: ClassVar[frozenset[str]] = frozenset({"privacy"})

    data: DataConfig
    classifier: ClassifierConfig = ClassifierConfig()
    teacher: SerializeAsAny[OwnTeacherSection] = TeacherConfig()
    generator: SerializeAsAny[GeneratorSection]
    synthesis: SynthesisConfig = SynthesisConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    tuning: TuningConfig = TuningConfig()
    student: StudentConfig = StudentConfig()
    students: dict[str, SerializeAsAny[MethodSection]] = {}
    """Further students beside the run's own, by name: each is trained,
    reported and may be an arm of the worst-case audit."""
    privacy: RunPrivacyConfig | None = None
    """Given: what leaves the run keeps one epsilon."""
    scaling: ScalingConfig = ScalingConfig()
    audit: AuditConfig = AuditConfig()
    frontier: FrontierConfig = FrontierConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _sections_fit_each_other(self) -> Config:
        if wrong := cross_section_mistakes({name: getattr(self, name) for name in type(self).model_fields}):
            raise ValueError("\n".join(wrong))
        return self


def cross_section_mistakes(sections: Mapping[str, Any]) -> list[str]:
    """Rules between sections, as far as the sections concerned are
    there (the others hold mistakes of their own)."""
    wrong = []
    generator, data = sections.get("generator"), sections.get("data")
    if generator and data:
        synthesis = sections.get("synthesis")
        wrong += generator.fits(data.image_size, synthesis.sampling if synthesis else None)
    if generator and generator.checkpoint_every > generator.epochs:
        wrong.append(
            "`generator.checkpoint_every <= generator.epochs` must hold, but got "
            f"checkpoint_every={generator.checkpoint_every}, "
            f"epochs={generator.epochs}; else there is no checkpoint"
        )
    cluster = sections.get("cluster")
    for name in ("classifier", "generator"):
        workers = max(cluster.workers, cluster.trial_workers) if cluster else 1
        if name in sections and sections[name].batch_size < workers:
            wrong.append(
                f"`{name}.batch_size >= cluster.workers` (and trial_workers) must hold, but "
                f"got batch_size={sections[name].batch_size}, {workers} workers; every worker "
                "takes a slice of a batch: use fewer workers"
            )
    synthesis, student = sections.get("synthesis"), sections.get("student")
    teacher = sections.get("teacher")
    private = sections.get("privacy") or (teacher and not isinstance(teacher, TeacherConfig))
    if synthesis and private and synthesis.labeller_names() != ["teacher"]:
        wrong.append(
            "`synthesis.labellers: 1` and `synthesis.labeller: teacher` must hold in a private run or with a "
            "private teacher, for further labellers are not private, but got "
            f"labellers={synthesis.labellers}, labeller={synthesis.labeller}; remove the keys"
        )
    if synthesis and student and student.from_parquet and synthesis.view == "seen":
        wrong.append(
            "`synthesis.view: clean` must hold with student.from_parquet, for an exported set holds the "
            "teacher's answers to the clean images and not the teacher itself, but got view=seen, "
            f"from_parquet={student.from_parquet!r}; use view: clean"
        )
    tuning = sections.get("tuning")
    if tuning and tuning.rungs > tuning.epochs:
        wrong.append(
            f"`tuning.rungs <= tuning.epochs` must hold, but got rungs={tuning.rungs}, "
            f"epochs={tuning.epochs}; a rung is at least one epoch long"
        )
    if tuning and (synthesis := sections.get("synthesis")):
        wrong += _space_mistakes(tuning, synthesis)
    for name, student in sections.get("students", {}).items():
        mistakes = student.fits(sections.get("classifier"), data)
        wrong += [f"students.{name}: {mistake}" for mistake in mistakes]
    wrong += private_run_mistakes(sections)
    audit = sections.get("audit")
    if audit and "students" in sections:
        wrong += _arm_mistakes(audit.worst_case.arms, sections["students"])
    return wrong


def _space_mistakes(tuning: TuningConfig, synthesis: SynthesisConfig) -> list[str]:
    """Ranges of keys that are not there, or beyond what the keys allow."""
    searchable, wrong = synthesis.searchable(), []
    for name, bounds in tuning.space.items():
        kind = searchable.get(name)
        if kind is None:
            wrong.append(
                "`tuning.space` must name numeric keys of `synthesis` "
                f"({', '.join(searchable)}), but got {name!r}; correct the name"
            )
            continue
        try:
            for bound in bounds:
                synthesis.with_values({name: kind(bound)})
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            wrong.append(
                f"`tuning.space.{name}` must lie within what the key allows, but "
                f"got {list(bounds)} ({message}); narrow it"
            )
        if kind is int and not all(isinstance(bound, int) for bound in bounds):
            wrong.append(f"`tuning.space.{name}` must hold whole numbers, but got {list(bounds)}; round them")
    return wrong


def _arm_mistakes(arms: tuple[str, ...], students: Mapping[str, MethodSection]) -> list[str]:
    known = (*OWN_ARMS, *students)
    wrong = [
        f"`audit.worst_case.arms` must be among {', '.join(known)}, but got {arm!r}; "
        + (
            "it is called fixed_generator now"
            if arm == "student_only"
            else "correct it, or add it to `students`"
        )
        for arm in arms
        if arm not in known
    ]
    return wrong + [
        "`students` must not be called like an arm that every run has "
        f"({', '.join(OWN_ARMS)}), but got {name!r}; rename it"
        for name in students
        if name in OWN_ARMS
    ]
