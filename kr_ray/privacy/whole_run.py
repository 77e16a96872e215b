"""The guarantees of a whole run: what each of its stages read of the real images, and the event that covers
it. One ledger for each split, for splits that share no person compose in parallel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kr_ray.privacy.accountants import event_of_record
from kr_ray.privacy.ledger import Guarantee, guarantee

if TYPE_CHECKING:
    from dp_accounting import DpEvent


@dataclass(frozen=True)
class Reader:
    """A stage that what leaves the run depends on.

    Attributes:
        name: of the stage.
        reads: splits of real images that it reads itself.
        release: the event of all that it told of them, as `event_record` writes it; None: it may have told
            anything.
    """

    name: str
    reads: Sequence[str]
    release: Mapping[str, Any] | None


def whole_run(
    stages: Sequence[Reader],
    records: Mapping[str, int],
    delta: float,
    *,
    unit: str = "image",
    group_size: int = 1,
    insecure_noise: bool = False,
) -> dict[str, Guarantee]:
    """By split: the guarantee to its people. A split that no stage reads has epsilon 0.

    Args:
        stages: all that what leaves depends on; those that read nothing are post-processing.
        records: images of every split.
        delta: of every guarantee.
        unit, group_size, insecure_noise: see `kr_ray.privacy.ledger.guarantee`.
    """
    found = {}
    for split, count in records.items():
        releases = {stage.name: _event(stage, split) for stage in stages if split in stage.reads}
        found[split] = guarantee(
            releases, count, delta, unit=unit, group_size=group_size, insecure_noise=insecure_noise
        )
    return found


def _event(stage: Reader, split: str) -> DpEvent | None:
    """One event covers one split: a stage that reads two says nothing of either."""
    if stage.release is None or len(stage.reads) > 1:
        return None
    return event_of_record(dict(stage.release))
