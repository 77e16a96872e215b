"""What a DPDFD training will release, known before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kr_ray.classifiers.training import SMALLEST_BATCH
from kr_ray.config import ConfigError
from kr_ray.config.dp import DpdfdSection
from kr_ray.dp.release import own_delta, privacy_record
from kr_ray.methods.dpdfd.teachers import SENSITIVITY
from kr_ray.privacy.accountants import gaussian
from kr_ray.privacy.ledger import LedgerError, calibrate_noise
from kr_ray.privacy.theorem3 import NOT_A_GUARANTEE, WHY, printed_epsilon
from kr_ray.runs.figures import PrivacyRecord

if TYPE_CHECKING:
    from dp_accounting import DpEvent


@dataclass(frozen=True)
class DpdfdPlan:
    """The public constants of a DPDFD training.

    Attributes:
        sigma: the paper's noise scale: the noise's std over C (over one vote).
        sensitivity: of one release, in the same units.
        releases: queries, or steps of algorithm 1.
        records, delta: of the guarantee.
    """

    sigma: float
    sensitivity: float
    releases: int
    records: int
    delta: float

    @property
    def event(self) -> DpEvent:
        """What the whole training releases, honestly."""
        return gaussian(self.sigma / self.sensitivity, self.releases)


def plan_dpdfd(section: DpdfdSection, records: int) -> DpdfdPlan:
    """Check the keys and fit the noise for N = `records` images; needs no images.

    `sound`: Q answers of sensitivity 2 (gradients) or sqrt(2) (votes). `paper`: T sums of B gradients of one
        teacher, which one image
    may turn round all at once: sensitivity 2 B.

    Raises:
        ConfigError: shards smaller than a batch, delta or epsilon out of range, or a target that cannot be
            reached.
    """
    sound = section.accounting == "sound"
    if sound and section.teachers * SMALLEST_BATCH > records:
        raise ConfigError(
            f"`images / teachers >= {SMALLEST_BATCH}` must hold, for a shard is at least one batch, but got "
            f"{records} training images for teachers={section.teachers}; use {max(1, records // 500)}"
        )
    if sound and section.rounds > section.queries:
        raise ConfigError(
            f"`rounds <= queries` must hold, but got rounds={section.rounds}, "
            f"queries={section.queries}; use 1 to 10 rounds"
        )
    sensitivity = SENSITIVITY[section.answer] if sound else 2.0 * section.batch_size
    releases = section.queries if sound else section.steps
    delta = own_delta(section, records)
    try:
        sigma = section.noise_multiplier or calibrate_noise(
            lambda sigma: gaussian(sigma / sensitivity, releases), section.target_epsilon or math.nan, delta
        )
    except LedgerError as error:
        raise ConfigError(f"dpdfd: {error}") from error
    return DpdfdPlan(sigma, sensitivity, releases, records, delta)


def privacy_of(plan: DpdfdPlan, section: DpdfdSection, insecure: bool) -> PrivacyRecord:
    """What result.json says: the honest guarantee and, for `paper`, the printed figure with its stamp."""
    constants: dict[str, object] = {
        "sigma": plan.sigma, "sensitivity": plan.sensitivity, "releases": plan.releases,
    }  # fmt: skip
    if section.accounting == "paper":
        epsilon = printed_epsilon(
            section.norm_bound, 1, section.batch_size, section.steps, plan.sigma, plan.delta
        )
        constants["printed"] = {"epsilon": epsilon, "stamp": NOT_A_GUARANTEE, "why": WHY}
    return privacy_record("dpdfd", plan.event, plan.records, plan.delta, insecure, **constants)
