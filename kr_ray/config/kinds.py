"""The sections of the project's own kinds, by the names that a configuration uses."""

from __future__ import annotations

from kr_ray.config.coreset import CoresetSection
from kr_ray.config.data_free import DataFreeSection
from kr_ray.config.distillation import DistillationSection
from kr_ray.config.dp import DpdfdSection, DpdfdTeacher, DpMerfConfig, DpSgdSection, DpSgdTeacher
from kr_ray.config.edm import EdmConfig
from kr_ray.config.generators import BigGanConfig, GeneratorSection
from kr_ray.config.methods import (
    FixedGeneratorSection,
    KnowledgeRecyclingSection,
    MethodSection,
    OwnTeacherSection,
    ParquetSection,
    TeacherConfig,
    TeacherSection,
)
from kr_ray.config.several import SeveralConfig

GENERATORS: dict[str, type[GeneratorSection]] = {
    "biggan_deep": BigGanConfig,
    "edm": EdmConfig,
    "dp_merf": DpMerfConfig,
    "several": SeveralConfig,
}
"""See kr_ray.generators.registry."""

METHODS: dict[str, type[MethodSection]] = {
    "teacher": TeacherSection,
    "knowledge_recycling": KnowledgeRecyclingSection,
    "fixed_generator": FixedGeneratorSection,
    "parquet": ParquetSection,
    "dp_sgd": DpSgdSection,
    "dpdfd": DpdfdSection,
    "coreset": CoresetSection,
    "data_free": DataFreeSection,
    "distillation": DistillationSection,
}
"""See kr_ray.methods.registry."""

TEACHERS: dict[str, type[OwnTeacherSection]] = {
    "classifier": TeacherConfig,
    "dp_sgd": DpSgdTeacher,
    "dpdfd": DpdfdTeacher,
}
"""See kr_ray.methods.run_teacher."""
