"""The list of the most exposed training images: for the owner of the data,
kept in the run directory and never in the report."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kr_ray.privacy.exposure import exposure
from kr_ray.privacy.lira import logit_scaled
from kr_ray.privacy.scores import SampleScores
from kr_ray.runs.artifacts import atomic_write
from kr_ray.runs.figures import Exposed


@dataclass(frozen=True)
class ExposedImage:
    """A line of the list.

    Attributes:
        rank: 1 is the most exposed.
        image: file name within the data set, or the image's number in it.
        training_index: in the run's training split.
        group: `canary` or `population`.
        true_class, given_class: names; they differ for a mislabeled canary.
        shift_sd, p_value, beyond_chance: see kr_ray.privacy.exposure.Exposure.
        runs_with, runs_without: how many runs were trained with and without the image.
    """

    rank: int
    image: str
    training_index: int
    group: str
    true_class: str
    given_class: str
    shift_sd: float
    p_value: float
    beyond_chance: bool
    runs_with: int
    runs_without: int


def exposed_images(
    groups: dict[str, SampleScores],
    indices: NDArray[np.int64],
    sources: Sequence[str] | None,
    class_names: Sequence[str],
) -> list[ExposedImage]:
    """All audited images of one arm, the most exposed first.

    Args:
        groups: name of the group -> its scores; the same runs in all.
        indices: int64 [samples of all groups, one after the other], in the training split.
        sources: of all training images; None: their indices are all that is known.
        class_names: of all classes.
    """
    answers = [logit_scaled(group.logits, group.labels).mean(axis=-1) for group in groups.values()]
    found = exposure(
        np.concatenate(answers, axis=1), np.concatenate([group.member for group in groups.values()], axis=1)
    )
    kinds = [name for name, group in groups.items() for _ in group.labels]
    true = np.concatenate([group.true_labels for group in groups.values()])
    given = np.concatenate([group.labels for group in groups.values()])
    return [
        ExposedImage(
            rank=rank,
            image=sources[index] if sources else f"training image {index}",
            training_index=int(index),
            group=kinds[sample],
            true_class=class_names[true[sample]],
            given_class=class_names[given[sample]],
            shift_sd=round(float(found.shift[sample]), 4),
            p_value=float(f"{found.p_value[sample]:.3g}"),
            beyond_chance=bool(found.beyond_chance[sample]),
            runs_with=int(found.trained[sample]),
            runs_without=int(found.untrained[sample]),
        )
        for rank, (sample, index) in enumerate(((int(k), int(indices[k])) for k in found.order), start=1)
    ]


def write_exposed(path: Path, images: Sequence[ExposedImage]) -> Exposed:
    """Write the list as CSV (UTF-8, with a header), atomically.

    Returns:
        What may enter the report: its name, and how many stand out.
    """
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(ExposedImage))
        writer.writerows(astuple(image) for image in images)
    return Exposed(
        file=path.name, images=len(images), beyond_chance=sum(image.beyond_chance for image in images)
    )
