"""The run's configuration as frozen typed sections; `kr_ray.config.file` reads them.

Imports neither torch nor ray, so that a wrong key is refused within a fraction of a second. Defaults are the
Knowledge Recycling paper's (arXiv 2407.15526; Tables 3 and 4); where the paper is silent the docstring says
so.
"""

from kr_ray.config.audit import AuditConfig, CopiesConfig, ShadowConfig, WorstCaseConfig
from kr_ray.config.base import ConfigError, Location, Resources, Section
from kr_ray.config.classifiers import ClassifierConfig
from kr_ray.config.cluster import ClusterConfig, TrackingConfig
from kr_ray.config.data import DataConfig
from kr_ray.config.dp import DpdfdTeacher, DpMerfConfig, DpSgdTeacher
from kr_ray.config.edm import EdmConfig, EdmSampling
from kr_ray.config.frontier import FrontierConfig
from kr_ray.config.generators import (
    BigGanConfig,
    BigGanSampling,
    CollapseConfig,
    GeneratorSection,
    SamplingSection,
)
from kr_ray.config.methods import (
    CheckpointsConfig,
    FixedGeneratorSection,
    KnowledgeRecyclingSection,
    MainKey,
    MethodSection,
    OwnTeacherSection,
    ParquetSection,
    ScalingConfig,
    StudentConfig,
    SynthesisConfig,
    TeacherConfig,
    TeacherSection,
    TuningConfig,
)
from kr_ray.config.privacy import RunPrivacyConfig
from kr_ray.config.run import Config, cross_section_mistakes
from kr_ray.config.several import SeveralConfig, SeveralSampling

__all__ = [
    "AuditConfig",
    "BigGanConfig",
    "BigGanSampling",
    "CheckpointsConfig",
    "ClassifierConfig",
    "ClusterConfig",
    "CollapseConfig",
    "Config",
    "ConfigError",
    "CopiesConfig",
    "DataConfig",
    "DpMerfConfig",
    "DpSgdTeacher",
    "DpdfdTeacher",
    "EdmConfig",
    "EdmSampling",
    "FixedGeneratorSection",
    "FrontierConfig",
    "GeneratorSection",
    "KnowledgeRecyclingSection",
    "Location",
    "MainKey",
    "MethodSection",
    "OwnTeacherSection",
    "ParquetSection",
    "Resources",
    "RunPrivacyConfig",
    "SamplingSection",
    "ScalingConfig",
    "Section",
    "SeveralConfig",
    "SeveralSampling",
    "ShadowConfig",
    "StudentConfig",
    "SynthesisConfig",
    "TeacherConfig",
    "TeacherSection",
    "TrackingConfig",
    "TuningConfig",
    "WorstCaseConfig",
    "cross_section_mistakes",
]
