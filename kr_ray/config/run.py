"""A whole run's configuration, and the rules between its sections."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, model_validator

from kr_ray.config.audit import AuditConfig
from kr_ray.config.base import Location, Section
from kr_ray.config.classifiers import ClassifierConfig
from kr_ray.config.cluster import ClusterConfig, TrackingConfig
from kr_ray.config.data import DataConfig
from kr_ray.config.generators import GeneratorConfig
from kr_ray.config.methods import CheckpointsConfig, StudentConfig, SynthesisConfig, TeacherConfig, TuningConfig


class Config(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(0, ge=0)
    storage: Location = "runs"
    """Where all runs are kept, each in a folder of its name: a path that all nodes see, or a URI of an object store."""
    data: DataConfig
    classifier: ClassifierConfig = ClassifierConfig()
    teacher: TeacherConfig = TeacherConfig()
    generator: GeneratorConfig
    synthesis: SynthesisConfig = SynthesisConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    tuning: TuningConfig = TuningConfig()
    student: StudentConfig = StudentConfig()
    audit: AuditConfig = AuditConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _sections_fit_each_other(self) -> Config:
        if wrong := cross_section_mistakes({name: getattr(self, name) for name in type(self).model_fields}):
            raise ValueError("\n".join(wrong))
        return self


def cross_section_mistakes(sections: dict[str, Any]) -> list[str]:
    """Rules between sections, as far as the sections concerned are there (the others hold mistakes of their own)."""
    wrong = []
    generator, data = sections.get("generator"), sections.get("data")
    if generator and data and generator.image_size != data.image_size:
        wrong.append(
            f"`data.image_size == 4 * 2**len(generator.g_in)` must hold, but got data.image_size={data.image_size}, "
            f"generator.g_in={list(generator.g_in)} ({generator.image_size} px); choose the architecture for that size"
        )
    if generator and generator.attention_resolution:
        sides = _powers_of_two(8, generator.image_size // 2)
        if generator.attention_resolution not in sides:
            wrong.append(
                f"`generator.attention_resolution` must be a feature-map side among {sides}, "
                f"but got {generator.attention_resolution}; use 0 for none"
            )
    if generator and generator.checkpoint_every > generator.epochs:
        wrong.append(
            "`generator.checkpoint_every <= generator.epochs` must hold, but got "
            f"checkpoint_every={generator.checkpoint_every}, epochs={generator.epochs}; else there is no checkpoint"
        )
    cluster = sections.get("cluster")
    for name in ("classifier", "generator"):
        workers = max(cluster.workers, cluster.trial_workers) if cluster else 1
        if name in sections and sections[name].batch_size < workers:
            wrong.append(
                f"`{name}.batch_size >= cluster.workers` (and trial_workers) must hold, but got batch_size={sections[name].batch_size}, "
                f"{workers} workers; every worker takes a slice of a batch: use fewer workers"
            )
    tuning = sections.get("tuning")
    if tuning and tuning.rungs > tuning.epochs:
        wrong.append(
            f"`tuning.rungs <= tuning.epochs` must hold, but got rungs={tuning.rungs}, epochs={tuning.epochs}; "
            "a rung is at least one epoch long"
        )
    return wrong


def _powers_of_two(low: int, high: int) -> list[int]:
    return [2**k for k in range(int(math.log2(low)), int(math.log2(max(high, 1))) + 1)]
