"""What all sections of the configuration share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from kr_ray.config.limits import too_large
from kr_ray.masking import holds_secret
from kr_ray.runs.storage import check_location

Raw = dict[str, Any]
"""A mapping as a person wrote it in YAML, not checked yet."""
Stamp = dict[str, Any]
"""What of a section decides results, in JSON's types: read by fingerprints and by nobody else."""
Location = Annotated[str, AfterValidator(check_location)]
"""A local path, or a URI s3://bucket/folder or gs://bucket/folder."""


class ConfigError(ValueError):
    """The configuration is refused. The message lists every mistake with key path, value and remedy."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no silent
    type conversion, no number beyond all reason."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _within_limits(cls, value: Any, info: ValidationInfo) -> Any:
        if wrong := too_large(str(info.field_name), value):
            raise ValueError(wrong)
        return value

    added: ClassVar[frozenset[str]] = frozenset()
    """Keys that the section got after version 0.1."""

    def stamp(self) -> Stamp:
        """What decides results, as JSON values, for fingerprints.

        A key that was `added` later counts only where it differs from its default: so a program with one more
        key does not make finished work stale. (A default that changes is a change of meaning: raise
        WORK_VERSION of `kr_ray.stages`.)
        """
        plain = self.model_dump(mode="json")
        return {
            name: value.stamp() if isinstance(value := getattr(self, name), Section) else plain[name]
            for name, field in type(self).model_fields.items()
            if name not in self.added or getattr(self, name) != field.get_default(call_default_factory=True)
        }

    @field_validator("*")
    @classmethod
    def _holds_no_secret(cls, value: Any, info: ValidationInfo) -> Any:
        """Status, report and the metadata of jobs show every value, so none may hold a password or token."""
        if any(map(holds_secret, _texts(value))):
            raise ValueError(
                f"`{info.field_name}` must hold no user, password or token, for reports and logs show it, "
                "but got one; leave it to the environment (MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ...)"
            )
        return value


def _texts(value: Any) -> Iterator[str]:
    """The strings in a value: itself, an entry of a list, a key or value of a mapping."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in (*value, *(value.values() if isinstance(value, dict) else ())):
            yield from _texts(part)


class Resources(Section):
    cpu: float = Field(1.0, ge=0)
    """Cores; a training uses as many threads, at least one."""
    gpu: float = Field(0.0, ge=0)
    """GPUs, or a share of one."""

    @property
    def threads(self) -> int:
        """Of torch in a worker. On a CPU a training's last bits depend on it:
        sums over several threads round otherwise."""
        return max(1, int(self.cpu))
