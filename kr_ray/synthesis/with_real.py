"""Real and synthetic images in one training set, with which a scaling curve compares synthetic ones alone."""

from __future__ import annotations

import torch
from torch import Tensor

from kr_ray.classifiers.sets import TrainingSet, smoothed_one_hot
from kr_ray.data.images import LabelledImages


class WithReal:
    """A synthetic set with the real training images in front, the same in every epoch.

    Args:
        made: the synthetic set.
        real: on its device.
        label_smoothing: of the real images' labels, where a labeller does not answer them, too.
    """

    def __init__(
        self, made: TrainingSet, real: LabelledImages, num_classes: int, label_smoothing: float
    ) -> None:
        self._made, self._real = made, real
        self._targets = smoothed_one_hot(real.labels, num_classes, label_smoothing)
        self._joined: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self._real) + len(self._made)

    def epoch(self, index: int) -> tuple[Tensor, Tensor]:
        """Images uint8 [N, C, H, W] and target probabilities float32 [N, K], [N, 0] with a labeller."""
        images, targets = self._made.epoch(index)
        if self._joined is None or self._joined[0] is not images:
            self._joined = None  # free the old set before the new one is made
            own = self._targets[:, : targets.shape[1]]
            both = torch.cat([self._real.images, images]), torch.cat([own, targets])
            self._joined = images, both
        return self._joined[1]

    def figures(self, epoch: int) -> dict[str, float]:
        return self._made.figures(epoch)

    def take_makers_s(self) -> float:
        return self._made.take_makers_s()

    def close(self) -> None:
        self._made.close()
