"""Does the generator repeat training images? An answer in a sentence, from the copies stage."""

from __future__ import annotations

from dataclasses import dataclass

from kr_ray.privacy.copy_evidence import near_copy_p_value, nearer_p_value
from kr_ray.report.words import count, percent
from kr_ray.runs.figures import Copies

SIGNIFICANT = 0.05
"""Of all comparisons together: two measures in every space."""
FARTHER = 2.0
"""Data-copying z above which generated images lie farther from the training images than test images do."""


@dataclass(frozen=True)
class Repetition:
    """The answer.

    Attributes:
        repeats: whether copies, or more nearness than chance explains, were found.
        short: a sentence for the headline; sentence: the answer with its figures.
    """

    repeats: bool
    short: str
    sentence: str


def repetition(copies: Copies) -> Repetition:
    """Judge exact copies, near-copies and the data-copying statistic; the last two corrected for all spaces
    (Bonferroni)."""
    if copies.exact_copies:
        short = (
            f"The generator repeats training images: {count(copies.exact_copies)} of {count(copies.images)} "
            "generated images "
            f"{'equals' if copies.exact_copies == 1 else 'equal'} one pixel by pixel."
        )
        return Repetition(True, short, f"{short} {_shares(copies)}")
    if signs := _signs(copies):
        short = f"There are signs that the generator repeats training images: {'; '.join(signs)}."
        return Repetition(True, short, f"{short} None equals one pixel by pixel.")
    sentence = (
        f"Copies of training images were not found: none of {count(copies.images)} generated images equals "
        "one pixel by pixel. "
        f"{_shares(copies)}"
    )
    if all(space.data_copying > FARTHER for space in copies.spaces.values()):
        sentence += (
            " They lie farther from the training images than real test images "
            "do: no copying, but room in their quality."
        )
    return Repetition(False, "No copies of training images were found among the generated images.", sentence)


def _signs(copies: Copies) -> list[str]:
    """What is nearer than chance explains, in words."""
    level = SIGNIFICANT / (2 * len(copies.spaces))
    signs = []
    for name, space in copies.spaces.items():
        if near_copy_p_value(space.near_copies, copies.images, copies.quantile, copies.test) < level:
            signs.append(
                f"{count(space.near_copies)} of {count(copies.images)} ({percent(space.near_copy_share, 1)} "
                "%) are near-copies "
                f"by {name}, where {percent(copies.quantile, 1)} % would be expected"
            )
        if nearer_p_value(space.data_copying) < level:
            signs.append(
                f"generated images lie nearer to them by {name} than real test "
                f"images do (z {space.data_copying:+.1f})"
            )
    return signs


def _shares(copies: Copies) -> str:
    shares = " and ".join(
        f"{percent(space.near_copy_share, 1)} % by {name}" for name, space in copies.spaces.items()
    )
    return f"Near-copies: {shares}, where {percent(copies.quantile, 1)} % would be expected without copying."
