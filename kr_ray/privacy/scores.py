"""The arrays that a worst-case audit attacks: what many models answer
on samples that some of them were trained on.

Numpy only; a wrong array is refused here, before any attack, with `ScoreError`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kr_ray.privacy.arrays import BoolArray, IndexArray, LogitArray
from kr_ray.runs.artifacts import atomic_write, load_arrays
from kr_ray.runs.storage import storage_path

ATTACKS_VERSION = 2
"""Of the attacks' figures. A worst-case audit of another version is attacked again from its stored scores;
nothing is trained again. 2: the other runs are as many on either side (`leave_one_out`), matched shadows
attack other samples than they were fitted on, an AUC's interval is Student's, a one-run bound takes the end
of a two-sided interval."""
MIN_MODELS = 2
"""A sample needs this many models on either side: one is
attacked, at least one is left to compare it with."""


class ScoreError(ValueError):
    """The scores cannot be audited. The message gives the rule, the values found and the remedy."""


class _Arrays:
    """Writing to and reading from npz, for the dataclasses of arrays below."""

    def save(self, path: str | Path) -> None:
        """Write a compressed npz, atomically."""
        with atomic_write(storage_path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **vars(self))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; nothing is unpickled.

        Raises:
            ScoreError: an array is missing or does not fit.
            ArtifactError: no (complete) npz file.
        """
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # every subclass is a dataclass
        arrays = load_arrays(storage_path(path), names)
        if missing := [name for name in names if name not in arrays]:
            raise ScoreError(
                f"`{path}` must hold {', '.join(names)}, but lacks "
                f"{', '.join(missing)}; save them with numpy.savez"
            )
        return cls(**arrays)


@dataclass(frozen=True)
class SampleScores(_Arrays):
    """One group of audit samples ("canary" or "population") under all models of one arm.

    LiRA needs models trained with and without a sample. The canaries are in half of the runs, and here the
    population samples (drawn at random, with their correct labels) are too, so that both figures come from
    the same estimator. The ICLR 2025 study keeps everything but its audit samples in all runs; this is a
    departure. All other training images are always in.

    Attributes:
        logits: float32 [models, samples, queries, classes], finite, two classes
            or more; query 0 is the unaltered image.
        labels: the label given in training, int64 [samples], in [0, classes);
            for a mislabeled canary the wrong one.
        true_labels: int64 [samples], in [0, classes).
        member: True where the sample was in the model's training set, bool [models, samples]. In a designed
            audit each sample is a member in exactly half of the models (see `leave_one_out` for why that may
            not matter to an attack); at least two models with it and two without are needed.

    Raises:
        ScoreError: shapes, types or values do not fit.
    """

    logits: LogitArray
    labels: IndexArray
    true_labels: IndexArray
    member: BoolArray

    def __post_init__(self) -> None:
        check_logits("logits", self.logits, "float32 [models, samples, queries, classes]")
        models, samples, _, classes = self.logits.shape
        check_labels("labels", self.labels, (samples, classes), "logits")
        check_labels("true_labels", self.true_labels, (samples, classes), "logits")
        check_member(self.member, models, samples)


@dataclass(frozen=True)
class ReferenceScores(_Arrays):
    """Images that no model was trained on: RMIA's z.

    Attributes:
        logits: float32 [models, reference, classes], finite; the models in
            the order of the audit samples' array.
        labels: true classes, int64 [reference], in [0, classes).

    Raises:
        ScoreError: shapes, types or values do not fit; the arrays are called
            `reference_logits` and `reference_labels`, as in files.
    """

    logits: LogitArray
    labels: IndexArray

    def __post_init__(self) -> None:
        check_logits("reference_logits", self.logits, "float32 [models, reference, classes]")
        check_labels("reference_labels", self.labels, self.logits.shape[1:], "reference_logits")

    def check_fits(self, samples: SampleScores) -> None:
        """Raises ScoreError unless the same models answered in the same classes."""
        models, classes = len(samples.logits), samples.logits.shape[-1]
        if len(self.logits) != models:
            raise ScoreError(
                f"`reference` must hold the {models} models of `samples`, but "
                f"got {len(self.logits)}; score all models"
            )
        if self.logits.shape[-1] != classes:
            raise ScoreError(
                f"`reference_logits` must have the {classes} classes of `logits`, but got "
                f"{self.logits.shape[-1]}; save both from the same models"
            )


def check_logits(name: str, logits: NDArray[Any], shape: str) -> None:
    """Float32 of the dimensions that `shape` names, none of them empty, two classes or more, finite."""
    if logits.dtype != np.float32 or logits.ndim != shape.count(",") + 1 or 0 in logits.shape:
        raise ScoreError(
            f"`{name}` must be {shape}, none of them empty, but got "
            f"{logits.dtype} {logits.shape}; convert before"
        )
    if logits.shape[-1] < 2:
        raise ScoreError(
            f"`classes >= 2` must hold, but `{name}` is {logits.shape}; "
            "give one logit per class, classes last"
        )
    check_finite(name, logits)


def check_finite(name: str, values: NDArray[Any]) -> None:
    if bad := int(values.size - np.isfinite(values).sum()):
        raise ScoreError(
            f"`{name}` must be finite, but {bad} of {values.size} values are "
            "nan or inf; leave out the models that diverged"
        )


def check_labels(name: str, labels: NDArray[Any], shape: tuple[int, ...], of: str) -> None:
    """Int64, one per sample of the logits called `of`, in their
    classes; `shape` is their [samples, classes]."""
    samples, classes = shape
    if labels.dtype != np.int64 or labels.shape != (samples,):
        raise ScoreError(
            f"`{name}` must be int64 [{samples}], but got {labels.dtype} "
            f"{labels.shape}; one per sample of `{of}`"
        )
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ScoreError(
            f"`0 <= {name} < {classes}` must hold, but got {labels.min()} to "
            f"{labels.max()}; `{of}` has {classes} classes"
        )


def check_member(member: NDArray[Any], models: int, samples: int) -> None:
    """Bool [models, samples] with at least two models in and two out for every sample."""
    if member.dtype != np.bool_ or member.shape != (models, samples):
        raise ScoreError(
            f"`member` must be bool [{models}, {samples}], but got "
            f"{member.dtype} {member.shape}; one per model and sample"
        )
    inside = member.sum(axis=0)
    bad = np.flatnonzero((inside < MIN_MODELS) | (models - inside < MIN_MODELS))
    if bad.size:
        first = int(bad[0])
        raise ScoreError(
            f"`every sample is a member of >= {MIN_MODELS} models and a non-member of >= {MIN_MODELS}` must "
            f"hold, but of {models} models sample {first} is in {int(inside[first])} ({bad.size} of "
            f"{samples} samples fail); add models, or leave those samples out"
        )
