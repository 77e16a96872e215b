"""What all private methods share: their delta, what they leave, what their result says of privacy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from kr_ray.config import ConfigError
from kr_ray.config.dp import PrivacySection
from kr_ray.privacy.accountants import event_record
from kr_ray.privacy.ledger import LedgerError, check_target, default_delta, guarantee
from kr_ray.runs.artifacts import ArtifactError
from kr_ray.runs.figures import PrivacyRecord
from kr_ray.runs.results import R

if TYPE_CHECKING:
    from dp_accounting import DpEvent


T = TypeVar("T")


@dataclass(frozen=True)
class Released(Generic[R]):
    """What a private part leaves: its result (also in result.json) and what it cost."""

    result: R
    event: DpEvent


def read_release(path: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of a file that holds what was told about the private images.

    Raises:
        ArtifactError: it cannot be read. It must not be made again as other files
            are, for that would be a second release.
    """
    try:
        return read(path)
    except ArtifactError as error:
        raise ArtifactError(
            f"{path} must hold what was released about the private images, but it is damaged; restore it "
            "from a copy, or give the run another `name` and count its epsilon twice: made again, it "
            "spends the images' privacy again"
        ) from error


def own_delta(section: PrivacySection, records: int) -> float:
    """The section's delta, or the default of `records` images.

    Raises:
        ConfigError: it is not below 1/N.
    """
    delta = default_delta(records) if section.delta is None else section.delta
    try:
        check_target(1.0, delta, records)
    except LedgerError as error:
        raise ConfigError(str(error)) from error
    return delta


def privacy_record(
    part: str, event: DpEvent, records: int, delta: float, insecure: bool, **constants: object
) -> PrivacyRecord:
    """What result.json says of a private part; `constants` are its own, in JSON's types."""
    alone = guarantee({part: event}, records, delta, insecure_noise=insecure)
    found = PrivacyRecord(release=event_record(event), guarantee=alone.record(), words=alone.words())
    return PrivacyRecord.model_validate(dict(found) | constants)
