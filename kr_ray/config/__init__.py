"""The run's configuration as frozen typed sections; `kr_ray.config.file` reads them.

Imports neither torch nor ray, so that a wrong key is refused within a fraction of a second. Defaults are the
Knowledge Recycling paper's (arXiv 2407.15526; Tables 3 and 4); where the paper is silent the docstring says so.
"""

from kr_ray.config.audit import ArmName, AuditConfig, CopiesConfig, ShadowAttackConfig
from kr_ray.config.base import ConfigError, Location, Resources, Section
from kr_ray.config.classifiers import ClassifierConfig
from kr_ray.config.cluster import ClusterConfig, TrackingConfig
from kr_ray.config.data import DataConfig
from kr_ray.config.generators import CollapseConfig, GeneratorConfig
from kr_ray.config.methods import CheckpointsConfig, StudentConfig, SynthesisConfig, TeacherConfig, TuningConfig
from kr_ray.config.run import Config, cross_section_mistakes

__all__ = [
    "ArmName",
    "AuditConfig",
    "CheckpointsConfig",
    "ClassifierConfig",
    "ClusterConfig",
    "CollapseConfig",
    "Config",
    "ConfigError",
    "CopiesConfig",
    "DataConfig",
    "GeneratorConfig",
    "Location",
    "Resources",
    "Section",
    "ShadowAttackConfig",
    "StudentConfig",
    "SynthesisConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TuningConfig",
    "cross_section_mistakes",
]
