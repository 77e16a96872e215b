"""The one shape in which real images travel: uint8, NCHW, with integer labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def all_but(count: int, index: Tensor) -> Tensor:
    """Of `count` images those that are not at `index` (int64 [M]): bool [count]."""
    kept = torch.ones(count, dtype=torch.bool)
    kept[index] = False
    return kept


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        images: uint8, [N, C, H, W], C in {1, 3}.
        labels: int64, [N], in [0, number of classes).
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] not in (1, 3):
            raise ValueError(
                "`images` must be uint8 [N, C, H, W] with 1 or 3 channels, but got "
                f"{self.images.dtype} {tuple(self.images.shape)}; convert before"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"`labels` must be int64 [{len(self.images)}], but got {self.labels.dtype} "
                f"{tuple(self.labels.shape)}; one per image"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> LabelledImages:
        """The images at `index` (int64 or bool, [M])."""
        return LabelledImages(self.images[index], self.labels[index])

    def without(self, index: Tensor) -> LabelledImages:
        """All but those at `index` (int64 [M]), in their order."""
        return self.subset(all_but(len(self), index))

    def to(self, device: torch.device | str) -> LabelledImages:
        return LabelledImages(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Splits:
    """A real data set: the three disjoint splits and what the classes are called.

    Attributes:
        train_sources: for each training image its file within the set, or its
            number there; empty where nobody asked.
    """

    name: str
    class_names: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    train_sources: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    def digest(self) -> str:
        """SHA-256 over all pixels and labels: what a stage's fingerprint says about its data."""
        sha = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            sha.update(str(tuple(part.images.shape)).encode())
            sha.update(part.images.contiguous().numpy().tobytes())
            sha.update(part.labels.contiguous().numpy().tobytes())
        return sha.hexdigest()


def class_prior(labels: Tensor, num_classes: int) -> Tensor:
    """Relative class frequencies, float64 [num_classes], summing to 1."""
    counts = torch.bincount(labels.cpu(), minlength=num_classes).double()
    return counts / counts.sum()
