"""Real images in the units of the matching, and the distilled set as it is left behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kr_ray.data.images import LabelledImages
from kr_ray.runs.artifacts import holding, load_tensors, save_tensors

SET_FILE = "synthetic.safetensors"
PARQUET_FILE = "synthetic.parquet"


@dataclass(frozen=True)
class Units:
    """Pixels as standardised numbers, in which the authors' step sizes hold and zero is the data's mean.

    Attributes:
        mean, std: of each channel of pixels in [0, 1], float32 [C].
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, images: Tensor) -> Units:
        """Of uint8 images [N, C, H, W]."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        shares = torch.stack(
            [torch.bincount(channel.flatten().int(), minlength=256).double() for channel in images.unbind(1)]
        )
        shares = shares / shares.sum(1, keepdim=True)
        mean = shares @ levels
        variance = (shares * (levels - mean[:, None]) ** 2).sum(1)
        return cls(mean.float(), variance.sqrt().clamp(min=1e-3).float())

    def from_bytes(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> standardised float32."""
        mean, std = self._on(images.device)
        return (images.float() / 255 - mean) / std

    def to_signed(self, images: Tensor) -> Tensor:
        """Standardised -> what classifiers read (`data.augment.to_float`): black -1, white 1."""
        mean, std = self._on(images.device)
        return (images * std + mean) * 2 - 1

    def from_signed(self, images: Tensor) -> Tensor:
        mean, std = self._on(images.device)
        return ((images + 1) / 2 - mean) / std

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.mean.to(device)[:, None, None], self.std.to(device)[:, None, None]


@dataclass(frozen=True)
class RealImages:
    """The private images by class, on the device.

    Attributes:
        images: uint8 [N, C, H, W].
        by_class: int64 [n], positions of each class's images.
    """

    images: Tensor
    units: Units
    by_class: Sequence[Tensor]

    @classmethod
    def of(cls, train: LabelledImages, num_classes: int, device: torch.device) -> RealImages:
        by_class = [torch.nonzero(train.labels == k).flatten() for k in range(num_classes)]
        return cls(train.images.to(device), Units.of(train.images), by_class)

    def at(self, index: Tensor) -> Tensor:
        """Standardised images at `index`."""
        return self.units.from_bytes(self.images[index.to(self.images.device)])

    def batch(self, label: int, size: int, random: torch.Generator) -> Tensor:
        """Up to `size` different images of a class, standardised."""
        own = self.by_class[label]
        return self.at(own[torch.randperm(len(own), generator=random)[:size]])


@dataclass(frozen=True)
class DistilledSet:
    """What a distillation hands on.

    Attributes:
        images: float32 [M, C, H, W] as classifiers read them (black -1, white 1; not cut to that range), or
            uint8.
        targets: float32 [M, K], label probabilities.
        initial: int64 [M], the position in the training split of the image that each one started as; -1: it
            started as no private image.
        units: of the matching.
    """

    images: Tensor
    targets: Tensor
    initial: Tensor
    units: Units

    def save(self, path: Path) -> None:
        tensors = {"images": self.images, "targets": self.targets, "initial": self.initial}
        save_tensors(path, tensors | {"mean": self.units.mean, "std": self.units.std})

    @classmethod
    def load(cls, path: Path) -> DistilledSet:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing or broken.
        """
        tensors, _ = load_tensors(path)
        with holding(path, "a distilled set"):
            units = Units(tensors["mean"], tensors["std"])
            return cls(tensors["images"], tensors["targets"], tensors["initial"], units)

    def signed(self) -> Tensor:
        """The images as classifiers read them, float32."""
        return self.images if self.images.is_floating_point() else self.images.float() / 127.5 - 1

    def as_bytes(self) -> Tensor:
        """The images cut to their range and rounded, uint8."""
        return self.images if self.images.dtype == torch.uint8 else to_bytes(self.images)


def to_bytes(images: Tensor) -> Tensor:
    """Float images, black -1 and white 1, cut and rounded to uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def first_private(folder: Path) -> Tensor:
    """Positions in the training split of the private images that the set in `folder` started as: int64,
    ascending.

    Raises:
        ArtifactError: see `DistilledSet.load`.
    """
    initial = DistilledSet.load(folder / SET_FILE).initial
    return initial[initial >= 0].sort().values
