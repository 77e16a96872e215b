"""Equal accuracy: the search for the value of a method's main key at which its validation accuracy is
another's.

Accuracy is taken to rise (or fall) with the key, so bisection on a logarithmic scale needs few trainings. An
accuracy that is the aim within its own standard error ends it: what is left cannot be told from chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kr_ray.config import MainKey
from kr_ray.runs.figures import Matched, Tried

NARROWEST = 0.01
"""Of the natural logarithm of a key: a bracket below this holds nothing that a training could tell apart."""
MISSES = 2
"""So many values in a row on the same side of the aim, and the end of the range beyond them is tried next: it
says whether the aim can be reached at all."""


def standard_error(accuracy: float, images: int) -> float:
    """Binomial, of an accuracy counted on so many images; of none or all right as if half an image were
    otherwise, for a count of one side alone does not show an error of zero."""
    share = min(max(accuracy, 0.5 / images), 1 - 0.5 / images)
    return math.sqrt(share * (1 - share) / images)


def next_value(key: MainKey, target: float, tried: Sequence[Tried], most: int) -> float | None:
    """What to try after `tried`; None: it is found, out of reach, or `most` trainings are spent.

    Args:
        target: validation accuracy, in (0, 1).
        most: trainings, at most.
    """
    if len(tried) >= most or any(one.reaches(target) for one in tried):
        return None
    if not tried:
        return _rounded(key, key.start or math.sqrt(key.low * key.high))
    below = [_place(key, one.value) for one in tried if one.accuracy < target]
    above = [_place(key, one.value) for one in tried if one.accuracy >= target]
    for missing, seen, end in ((above, below, 1.0), (below, above, 0.0)):
        if not missing and len(seen) >= MISSES:
            at_end = _rounded(key, _value(key, end))
            return None if any(one.value == at_end for one in tried) else at_end
    low, high = max(below, default=0.0), min(above, default=1.0)
    if abs(high - low) * _width(key) < NARROWEST:
        return None
    middle = _rounded(key, _value(key, (low + high) / 2))
    return None if any(one.value == middle for one in tried) else middle


def matched(key: MainKey, target: float, tried: Sequence[Tried]) -> Matched:
    """What the search has found: the value whose accuracy is nearest to the aim, and whether that is near
    enough."""
    best = min(tried, key=lambda one: abs(one.accuracy - target))
    return Matched(
        key=key.name, target=target, value=best.value, accuracy=best.accuracy, error=best.error,
        reached=best.reaches(target), tried=list(tried),
    )  # fmt: skip


def _width(key: MainKey) -> float:
    return math.log(key.high / key.low)


def _place(key: MainKey, value: float) -> float:
    """Where a value lies between the least accurate end, 0, and the most accurate one, 1."""
    share = math.log(value / key.low) / _width(key)
    return share if key.rising else 1 - share


def _value(key: MainKey, place: float) -> float:
    """The opposite of `_place`."""
    if place in (0.0, 1.0):
        return key.high if (place == 1.0) == key.rising else key.low
    return key.low * math.exp((place if key.rising else 1 - place) * _width(key))


def _rounded(key: MainKey, value: float) -> float:
    """Within the range, whole where it must be, else to four digits: what is told is what was tried."""
    within = min(max(value, key.low), key.high)
    return round(within) if key.whole else float(f"{within:.4g}")
