"""What every classifier network offers beside its logits."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from kr_ray.config.classifiers import NetworkName


class Classifier(nn.Module):
    """A network from float images [N, C, S, S] to logits [N, K].

    Args:
        num_classes: K.
        channels: C.
    """

    network: ClassVar[NetworkName]
    head: nn.Linear
    """From features to logits."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.num_classes, self.channels = num_classes, channels

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer: float [N, D]."""

    def sizes(self) -> dict[str, int | str]:
        """What beside `num_classes` and `channels` the network was built with, as JSON."""
        return {}
