"""Methods by name. A new one: its section in `kr_ray.config.methods`, a file here, a line below."""

from __future__ import annotations

from typing import Protocol, assert_never, cast, runtime_checkable

from kr_ray.config import (
    Config,
    FixedGeneratorSection,
    KnowledgeRecyclingSection,
    MethodSection,
    ParquetSection,
    TeacherSection,
)
from kr_ray.config.coreset import CoresetSection
from kr_ray.config.data_free import DataFreeSection
from kr_ray.config.distillation import DistillationSection
from kr_ray.config.dp import DpdfdSection, DpSgdSection
from kr_ray.methods.coreset.member import Coreset
from kr_ray.methods.data_free.member import DataFree
from kr_ray.methods.distillation.member import Distillation
from kr_ray.methods.dp_sgd import DpSgd
from kr_ray.methods.dpdfd.member import Dpdfd
from kr_ray.methods.fixed_generator import FixedGenerator
from kr_ray.methods.interface import Method
from kr_ray.methods.knowledge_recycling import KnowledgeRecycling
from kr_ray.methods.parquet import ParquetStudent
from kr_ray.methods.run_teacher import run_teacher
from kr_ray.methods.teacher import Teacher

BuiltIn = (
    TeacherSection
    | KnowledgeRecyclingSection
    | FixedGeneratorSection
    | ParquetSection
    | DpSgdSection
    | DpdfdSection
    | CoresetSection
    | DataFreeSection
    | DistillationSection
)
"""The union of the project's own sections: one that has no line in `_described_by` is a type error."""


@runtime_checkable
class PluginSection(Protocol):
    """A section from outside the package says itself what does the work."""

    def member(self) -> Method: ...


def method_of(name: str, config: Config) -> Method:
    """The method called so in this run: `teacher`, `kr` (its own
    student), `fixed_generator`, or one of `students`."""
    match name:
        case "teacher":
            return run_teacher(config)
        case "kr":
            return KnowledgeRecycling()
        case "fixed_generator":
            return FixedGenerator()
        case _:
            return _described_by(config.students[name])


def _described_by(section: MethodSection) -> Method:
    if isinstance(section, PluginSection):
        return section.member()
    built_in = cast("BuiltIn", section)
    match built_in:
        case TeacherSection():
            return Teacher(built_in.epochs)
        case KnowledgeRecyclingSection():
            return KnowledgeRecycling(dict(built_in.synthesis))
        case FixedGeneratorSection():
            return FixedGenerator()
        case ParquetSection():
            return ParquetStudent(built_in.path, built_in.epochs)
        case DpSgdSection():
            return DpSgd(built_in)
        case DpdfdSection():
            return Dpdfd(built_in)
        case CoresetSection():
            return Coreset(built_in)
        case DataFreeSection():
            return DataFree(built_in)
        case DistillationSection():
            return Distillation(built_in)
        case _:
            assert_never(built_in)
