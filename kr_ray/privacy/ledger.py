"""The ledger: what a run released of its private images, composed to one upper bound (epsilon, delta).

Every part that touches private images says what it released as an event of the library `dp-accounting` (the
extra `[dp]`). A part that says nothing counts as not private, so a forgotten leak shows as epsilon = inf and
not as a small number.

Adjacency is **zero-out** everywhere: one record is replaced by "no record", and the number of records is
public. Its numbers are those of add-or-remove-one, while q, batch sizes and schedules may depend on N. Noise
multipliers are standard deviations over the L2 sensitivity *under zero-out*; accountants disagree about
replacement (a factor of 2), so no other adjacency is offered.

Imports neither torch nor images; `dp-accounting` only where a figure is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kr_ray.privacy import accountants
from kr_ray.runs.figures import Bound

if TYPE_CHECKING:
    from dp_accounting import DpEvent

MAX_GUARANTEE = 50.0
"""A larger epsilon is printed as a number and never called a guarantee: e^50 bounds no person's risk."""
LARGEST_DELTA = 1e-5
DELTA_EXPONENT = 1.1
MAX_NOISE_MULTIPLIER = 1e3
"""Calibration gives up here: with this much noise nothing is learnt."""
MIN_NOISE_MULTIPLIER = 1e-2
CALIBRATION_TOLERANCE = 1e-3
"""Relative, of the noise multiplier; the larger end is taken, so the target is kept."""


class LedgerError(ValueError):
    """A privacy parameter is refused. The message gives the rule, the values and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """An upper bound on what anybody can learn of one person from everything that was released.

    Attributes:
        epsilon, delta: of (epsilon, delta)-differential privacy; epsilon is inf where a part is not private.
        accountant: `exact` (Gaussians only), `PLD`, `RDP` or `none` (nothing private was released, or
            something without an event).
        covers: names of the parts whose releases are composed.
        uncovered: names of the parts that gave no event; each of them makes epsilon inf.
        adjacency: what differs between two neighbouring data sets.
        unit: whose presence is hidden: `image`, or the name of the group (`patient`).
        group_size: images of one unit, at most.
        records: images of the private set (public under this adjacency).
        insecure_noise: the noise came from a key that somebody knows (tests); then there is no guarantee.
    """

    epsilon: float
    delta: float
    accountant: str
    covers: tuple[str, ...]
    uncovered: tuple[str, ...]
    records: int
    unit: str = "image"
    group_size: int = 1
    adjacency: str = "zero-out"
    insecure_noise: bool = False

    @property
    def holds(self) -> bool:
        """Whether this may be called a guarantee."""
        return self.epsilon <= MAX_GUARANTEE and not self.insecure_noise

    def contradicted_by(self, lower_bound: float | None) -> bool:
        """Whether an audit has proved (at its confidence) more leakage than this bound allows: then one of
        the two is wrong."""
        return lower_bound is not None and lower_bound > self.epsilon

    def record(self) -> Bound:
        """As results and reports keep it."""
        lists = {"covers": list(self.covers), "uncovered": list(self.uncovered)}
        epsilon = self.epsilon if math.isfinite(self.epsilon) else None
        return Bound.model_validate(vars(self) | lists | {"epsilon": epsilon, "guarantee": self.holds})

    def words(self) -> str:
        """One line for reports and terminals."""
        who = self.unit if self.group_size == 1 else f"{self.unit} with up to {self.group_size} images"
        if self.uncovered:
            parts = ", ".join(self.uncovered)
            return f"epsilon = inf: not a guarantee ({parts} released private facts without noise)"
        bound = (
            f"epsilon <= {self.epsilon:.4g} at delta = {self.delta:.2g} per {who} ({self.adjacency}, "
            f"{self.records} records "
            f"public; {self.accountant}; covers {', '.join(self.covers) or 'nothing'})"
        )
        if self.insecure_noise:
            return f"not a guarantee, for the noise can be recomputed from a known key: {bound}"
        return bound if self.holds else f"not a guarantee, for epsilon > {MAX_GUARANTEE:g}: {bound}"


def default_delta(records: int) -> float:
    """min(1e-5, N^-1.1) for N records: well below 1/N, at which releasing one whole record would be
    allowed."""
    if records < 1:
        raise LedgerError(f"`records >= 1` must hold, but got {records}; count the private training images")
    return min(LARGEST_DELTA, records**-DELTA_EXPONENT)


def check_target(epsilon: float, delta: float, records: int | None = None) -> None:
    """Refuse what is no privacy target.

    Raises:
        LedgerError: epsilon outside (0, 50], delta outside (0, 1), or delta >= 1/N.
    """
    if not 0 < epsilon <= MAX_GUARANTEE:
        raise LedgerError(
            f"`0 < epsilon <= {MAX_GUARANTEE:g}` must hold, but got epsilon={epsilon}; use 1 (strong) to "
            "10 (weak), above that "
            "epsilon says nothing about a person"
        )
    if not 0 < delta < 1:
        raise LedgerError(
            f"`0 < delta < 1` must hold, but got delta={delta}; use min(1e-5, N^-1.1) for N images"
        )
    if records is not None and delta >= 1 / records:
        raise LedgerError(
            f"`delta < 1/N` must hold, but got delta={delta} for {records} images; use "
            f"{default_delta(records):.2g}, for at 1/N "
            "one whole image may be given away"
        )


def guarantee(
    releases: Mapping[str, DpEvent | None],
    records: int,
    delta: float | None = None,
    *,
    unit: str = "image",
    group_size: int = 1,
    insecure_noise: bool = False,
) -> Guarantee:
    """Compose what all parts of a run released about the same private images.

    Args:
        releases: event per part; None = the part said nothing, which makes epsilon inf. Leave out parts that
            read no private image or only what other parts released (post-processing).
        records: private images N. Splits that share no person compose in parallel: one ledger for each.
        delta: None = `default_delta(records)`.
        unit, group_size: whose presence is hidden, and how many images one of them has at most (group
            privacy).
        insecure_noise: the noise came from a key that somebody knows.

    Raises:
        LedgerError: delta outside (0, 1) or at least 1/N, or group_size < 1.
    """
    delta = default_delta(records) if delta is None else delta
    check_target(1.0, delta, records)
    if group_size < 1:
        raise LedgerError(
            f"`group_size >= 1` must hold, but got {group_size}; use the most images of one {unit}"
        )
    uncovered = tuple(name for name, event in releases.items() if event is None)
    events = [event for event in releases.values() if event is not None]
    if uncovered:
        epsilon, accountant = math.inf, "none"
    else:
        epsilon, accountant = accountants.epsilon_of(events, delta, group_size)
    return Guarantee(
        epsilon=epsilon,
        delta=delta,
        accountant=accountant,
        covers=tuple(name for name, event in releases.items() if event is not None),
        uncovered=uncovered,
        records=records,
        unit=unit,
        group_size=group_size,
        insecure_noise=insecure_noise,
    )


def calibrate_noise(
    event_of: Callable[[float], DpEvent],
    epsilon: float,
    delta: float,
    spent: Sequence[DpEvent] = (),
    group_size: int = 1,
) -> float:
    """The least noise multiplier with which `event_of(noise_multiplier)` and `spent` together keep (epsilon,
    delta).

    Args:
        event_of: what will be released at a noise multiplier; more noise must mean less epsilon.
        epsilon, delta: of the whole.
        spent: what other parts release about the same images.
        group_size: records whose joint presence is hidden.

    Returns:
        A noise multiplier in [0.01, 1000], at most 0.1 % above the least one.

    Raises:
        LedgerError: no such noise multiplier, or (epsilon, delta) is out of range.
    """
    check_target(epsilon, delta)

    def total(noise_multiplier: float) -> float:
        return accountants.epsilon_of([*spent, event_of(noise_multiplier)], delta, group_size)[0]

    if (least := total(MAX_NOISE_MULTIPLIER)) > epsilon:
        already = (
            f", of which {accountants.epsilon_of(spent, delta, group_size)[0]:.3g} is spent by other parts"
            if spent
            else ""
        )
        raise LedgerError(
            f"`target_epsilon` must be reachable, but got {epsilon}, and even "
            f"noise_multiplier={MAX_NOISE_MULTIPLIER:g} gives "
            f"{least:.3g}{already} at delta={delta:.2g}; take fewer steps, a smaller batch or a larger "
            "target_epsilon"
        )
    low, high = MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER
    while high > low * (1 + CALIBRATION_TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if total(middle) <= epsilon else (middle, high)
    return high
