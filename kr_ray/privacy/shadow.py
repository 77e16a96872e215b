"""Shadow models of the membership inference attack (Shokri et al. 2017; Knowledge
Recycling, section 3.6): their data and their answers.

Shadow models imitate the teacher on shuffled 45/10/45 splits of the validation set, so that for them
membership is known. `shadow_attack.py` learns from their answers. Kept apart from it because every process
that trains needs this and none of them scikit-learn, which takes most of a second to import.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kr_ray.privacy.arrays import BoolArray, IndexArray, LogitArray
from kr_ray.runs.artifacts import atomic_write, holding, load_arrays
from kr_ray.runs.storage import storage_path

TRAIN_SHARE = 0.45
"""Of the validation split: a shadow model's members, and again its non-members."""


@dataclass(frozen=True)
class ShadowSplit:
    """Disjoint indices into the validation split that together cover it; int64, ascending."""

    train: IndexArray
    validation: IndexArray
    test: IndexArray


def shadow_splits(labels: IndexArray, num_classes: int, *, seed: int, shadow: int) -> ShadowSplit:
    """The 45/10/45 split of one shadow model, drawn from (seed, shadow).

    Stratified: a plain shuffle (the paper does not say which) leaves some shadows without a member or a
    non-member of a rare class. Train and test have the same size, so that membership has no prior to exploit.

    Args:
        labels: classes of the validation images, int64 [N], in [0, num_classes), N >= 3.

    Raises:
        ValueError: fewer than three images, or labels out of range.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size < 3:
        raise ValueError(
            f"`labels` must be [N] with N >= 3, but got shape {labels.shape}; use a larger validation split"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"`0 <= labels < num_classes` must hold, but got {labels.min()} to {labels.max()}, "
            f"num_classes={num_classes}; check the data set"
        )
    rng = np.random.default_rng([seed, shadow])
    # Every image gets its random rank within its class, as a share of the class; cutting that order at 45 %
    # and 55 % cuts each class there. The random offset decides whose turn it is where a class does not divide
    # evenly.
    position = np.empty(labels.size)
    for index in range(num_classes):
        rows = np.flatnonzero(labels == index)
        position[rng.permutation(rows)] = (np.arange(rows.size) + rng.random()) / max(rows.size, 1)
    order = np.argsort(position, kind="stable")
    size = max(1, round(TRAIN_SHARE * labels.size))
    parts = np.split(order.astype(np.int64), [size, labels.size - size])
    return ShadowSplit(*(np.sort(part) for part in parts))


SHADOW_ARRAYS = ("shadow", "logits", "labels", "member")


@dataclass(frozen=True)
class ShadowScores:
    """What one shadow model answers on its own training (member) and test (non-member) images.

    Attributes:
        shadow: index of the shadow model.
        logits: float32 [M, K], finite.
        labels: true classes, int64 [M], in [0, K).
        member: True for its training images, bool [M].

    Raises:
        ValueError: shapes, types or values do not fit.
    """

    shadow: int
    logits: LogitArray
    labels: IndexArray
    member: BoolArray

    def __post_init__(self) -> None:
        check_answers(self.logits, self.labels)
        if self.member.dtype != np.bool_ or self.member.shape != self.labels.shape:
            raise ValueError(
                f"`member` must be bool [{len(self.labels)}], but got {self.member.dtype} "
                f"{self.member.shape}; one per row of logits"
            )

    def save(self, path: str | Path) -> None:
        """Write a compressed npz, atomically."""
        with atomic_write(storage_path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file, shadow=np.int64(self.shadow), logits=self.logits, labels=self.labels, member=self.member
            )

    @staticmethod
    def load(path: str | Path) -> ShadowScores:
        """Read what `save` wrote; nothing is unpickled.

        Raises:
            ArtifactError: it is damaged, or holds something else.
        """
        arrays = load_arrays(storage_path(path), SHADOW_ARRAYS)
        with holding(storage_path(path), "the scores of a shadow model"):
            return ShadowScores(int(arrays["shadow"]), arrays["logits"], arrays["labels"], arrays["member"])


def check_answers(logits: LogitArray, labels: IndexArray) -> None:
    """Raises: ValueError: not finite float32 [M, K] logits with int64 [M] labels in [0, K)."""
    if logits.dtype != np.float32 or logits.ndim != 2:
        raise ValueError(
            f"`logits` must be float32 [M, K], but got {logits.dtype} {logits.shape}; convert before"
        )
    if labels.dtype != np.int64 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"`labels` must be int64 [{len(logits)}], but got "
            f"{labels.dtype} {labels.shape}; one per row of logits"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        raise ValueError(
            f"`0 <= labels < {logits.shape[1]}` must hold, but got "
            f"{labels.min()} to {labels.max()}; one logit per class"
        )
    if not np.isfinite(logits).all():
        raise ValueError(
            f"`logits` must be finite, but {int((~np.isfinite(logits)).any(axis=1).sum())} of {len(logits)} "
            "rows are not; the model diverged or overflowed, lower the learning rate or use full precision"
        )
