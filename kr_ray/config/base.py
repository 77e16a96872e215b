"""What all sections of the configuration share."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kr_ray.runs.storage import check_location

Location = Annotated[str, AfterValidator(check_location)]
"""A local path, or a URI s3://bucket/folder or gs://bucket/folder."""


class ConfigError(ValueError):
    """The configuration is refused. The message lists every mistake with key path, value and remedy."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Resources(Section):
    cpu: float = Field(1.0, ge=0)
    gpu: float = Field(0.0, ge=0)
