"""What a classifier is trained on: images and target probabilities, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F


class TrainingSet(Protocol):
    """What the loop trains on: real images, or a synthetic set that changes with the epoch."""

    def __len__(self) -> int:
        """Images per epoch."""
        ...

    def epoch(self, index: int) -> tuple[Tensor, Tensor]:
        """Images uint8 [N, C, H, W] and target probabilities float32
        [N, K] of an epoch, on the training device.

        Targets are [N, 0] where a labeller gives them.
        """
        ...

    def figures(self, epoch: int) -> dict[str, float]:
        """What a training's history says of the set by the end of `epoch`: nothing of a fixed one."""
        ...

    def take_makers_s(self) -> float:
        """CPU seconds that other processes spent on what came from them since the last call."""
        ...

    def close(self) -> None:
        """Free what makes the images; no more are asked for."""
        ...


@dataclass(frozen=True)
class FixedSet:
    """Real images with smoothed one-hot targets, the same in every epoch."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def epoch(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images, self.targets

    def figures(self, epoch: int) -> dict[str, float]:
        return {}

    def take_makers_s(self) -> float:
        return 0.0

    def close(self) -> None:
        pass


def smoothed_one_hot(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Hard labels int64 [N] to target probabilities float32 [N, K] (Szegedy et al. 2016; Table 4: 0.1)."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes
