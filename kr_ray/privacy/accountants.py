"""Events and their epsilon, by the library `dp-accounting` (the extra `[dp]`, imported where it is
needed)."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kr_ray.runs.artifacts import Json

if TYPE_CHECKING:
    from dp_accounting import DpEvent

DISCRETISATION = 1e-3
"""Of privacy losses in the PLD accountant, which rounds them up. The library's 1e-4 takes ten times as long;
this one's epsilon is up to 1 % higher after thousands of steps, never lower."""
PLD_UP_TO = 100.0
"""Where RDP already finds a larger epsilon, its figure stands: PLDs of such wide privacy losses take minutes
and gigabytes, and nobody calls the result a guarantee."""
GROUP_BISECTIONS = 30
GROUP_STEPS, GROUP_WIDEST = 100, 200.0
"""Where a group's epsilon is looked for; beyond the second it counts as inf."""
EVENTS = (
    "GaussianDpEvent", "LaplaceDpEvent", "PoissonSampledDpEvent", "SelfComposedDpEvent", "ComposedDpEvent",
    "RepeatAndSelectDpEvent", "NoOpDpEvent", "NonPrivateDpEvent",
)  # fmt: skip
"""What a record may hold."""


def library(name: str = "dp_accounting") -> Any:
    """`dp_accounting` or one of its modules.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`dp-accounting` must be installed for a privacy guarantee, but is not; pip install 'kr_ray[dp]'"
        ) from error


# --- events
# ----------------------------------------------------------------------------------------------------------


def gaussian(noise_multiplier: float, count: int = 1) -> DpEvent:
    """`count` Gaussian releases, each with noise of `noise_multiplier` times its L2 sensitivity under
    zero-out."""
    events = library("dp_accounting.dp_event")
    event = events.GaussianDpEvent(noise_multiplier)
    return event if count == 1 else events.SelfComposedDpEvent(event, count)


def poisson_gaussian(sampling_probability: float, noise_multiplier: float, steps: int) -> DpEvent:
    """DP-SGD: `steps` Gaussian releases, each on a sample that every record enters with
    `sampling_probability`, independently."""
    events = library("dp_accounting.dp_event")
    step = events.PoissonSampledDpEvent(sampling_probability, events.GaussianDpEvent(noise_multiplier))
    return events.SelfComposedDpEvent(step, steps)


def together(*events: DpEvent) -> DpEvent:
    """Several releases about the same records."""
    return library("dp_accounting.dp_event").ComposedDpEvent(list(events))


def event_record(event: DpEvent) -> Json:
    """JSON-able form of an event, for result.json; `event_of_record` reads it."""
    kind = type(event).__name__
    if kind not in EVENTS:
        raise ValueError(f"an event must be one of {', '.join(EVENTS)}, but got {kind}; compose it of these")
    record: Json = {"kind": kind}
    for field in type(event).__attrs_attrs__:  # type: ignore[attr-defined]
        value = getattr(event, field.name)
        if field.name == "event":
            record[field.name] = event_record(value)
        elif field.name == "events":
            record[field.name] = [event_record(part) for part in value]
        else:
            record[field.name] = value
    return record


def event_of_record(record: Json) -> DpEvent:
    """The event that `event_record` wrote.

    Raises:
        ValueError: an unknown kind.
    """
    fields = dict(record)
    kind = fields.pop("kind", None)
    if kind not in EVENTS:
        raise ValueError(
            f"an event's kind must be one of {', '.join(EVENTS)}, but got {kind!r}; the record is damaged"
        )
    if "event" in fields:
        fields["event"] = event_of_record(fields["event"])
    if "events" in fields:
        fields["events"] = [event_of_record(part) for part in fields["events"]]
    return getattr(library("dp_accounting.dp_event"), kind)(**fields)


# --- epsilon
# ---------------------------------------------------------------------------------------------------------


def epsilon_of(events: Sequence[DpEvent], delta: float, group_size: int = 1) -> tuple[float, str]:
    """Epsilon of all `events` about the same records, and which accountant found it.

    Gaussians alone are one Gaussian, whose privacy curve is known exactly (Balle & Wang 2018); all else goes
    through privacy loss distributions (PLD), and through Renyi differential privacy (RDP) where those cannot
    or would take minutes.

    Args:
        events: composed; none = nothing was released, epsilon 0.
        delta: in (0, 1).
        group_size: records whose joint presence is hidden (group privacy).
    """
    if not events:
        return 0.0, "none"
    if (precision := _gaussian_precision(events)) is not None:
        return _exact_epsilon(precision, delta, group_size), "exact"
    whole = together(*events)
    with _quiet():
        accountant, name = _accountant(whole, delta)
        if math.isinf(accountant.get_epsilon(delta)):
            return math.inf, "none"
        return _group_epsilon(accountant, delta, group_size), name


def _exact_epsilon(precision: float, delta: float, group_size: int) -> float:
    """Of one Gaussian of noise multiplier precision^-1/2; a group of k moves the mean by k sensitivities."""
    if precision == 0:
        return 0.0
    if math.isinf(precision):
        return math.inf
    return float(library().get_epsilon_gaussian(1 / (math.sqrt(precision) * group_size), delta))


def _gaussian_precision(events: Sequence[DpEvent]) -> float | None:
    """Sum of 1/z^2 if all events are plain Gaussians (or nothing), else None."""
    total = 0.0
    for event in events:
        kind = type(event).__name__
        if kind == "GaussianDpEvent":
            part: float | None = event.noise_multiplier**-2 if event.noise_multiplier > 0 else math.inf
        elif kind == "SelfComposedDpEvent":
            inner = _gaussian_precision([event.event])
            part = None if inner is None else inner * event.count
        elif kind == "ComposedDpEvent":
            part = _gaussian_precision(event.events)
        else:
            part = 0.0 if kind == "NoOpDpEvent" else None
        if part is None:
            return None
        total += part
    return total


def _accountant(event: DpEvent, delta: float) -> tuple[Any, str]:
    """The tightest accountant that can take `event`, which it has composed."""
    relation = library("dp_accounting.privacy_accountant").NeighboringRelation.REPLACE_SPECIAL  # zero-out
    rdp = library("dp_accounting.rdp").RdpAccountant(neighboring_relation=relation)
    pld = library("dp_accounting.pld").PLDAccountant(
        neighboring_relation=relation, value_discretization_interval=DISCRETISATION
    )
    if rdp.supports(event):
        rdp.compose(event)
        if not pld.supports(event) or rdp.get_epsilon(delta) > PLD_UP_TO:
            return rdp, "RDP"
    pld.compose(event)
    return pld, "PLD"


def _group_epsilon(accountant: Any, delta: float, group_size: int) -> float:
    """Epsilon at `delta` for groups of k: (e, d) for one record is (k e, d sum_{i<k} e^(i e)) for k (Vadhan
    2017, lemma 2.2)."""
    if group_size == 1:
        return float(accountant.get_epsilon(delta))

    def kept(epsilon: float) -> bool:
        """Whether delta for one record is small enough to keep the group's at k * epsilon."""
        needed = delta * math.expm1(epsilon) / math.expm1(group_size * epsilon)
        return bool(accountant.get_delta(epsilon) <= needed)

    # Not monotonic on the whole line: beyond some epsilon the accountant's delta stays at its rounding error.
    low = 0.0
    for step in range(1, GROUP_STEPS + 1):
        high = GROUP_WIDEST * (step / GROUP_STEPS) ** 2 / group_size
        if kept(high):
            break
        low = high
    else:
        return math.inf
    for _ in range(GROUP_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    return group_size * high


@contextmanager
def _quiet() -> Iterator[None]:
    """The RDP accountant warns of every order that does not converge and goes on without it: true, harmless,
    and a flood."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
