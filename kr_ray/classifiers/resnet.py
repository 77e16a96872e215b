"""ResNet14: the classifier behind teacher, student and shadow models
(Knowledge Recycling, section 3.1 and Table 4)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kr_ray.classifiers.interface import Classifier
from kr_ray.compute.parallel import BatchNorm2d

Norm = Literal["batch", "group"]
LARGEST_GROUPS = 8
BLOCKS_PER_STAGE = 2
"""n of the CIFAR-style 6n + 2 layout (He et al. 2015, section 4.2): 6 * 2 + 2 = 14 layers."""


def norm_layer(channels: int, norm: Norm) -> nn.Module:
    """Batch norm, or group norm with gcd(8, channels) groups, which looks at
    one image alone, as differential privacy demands."""
    return (
        BatchNorm2d(channels)
        if norm == "batch"
        else nn.GroupNorm(math.gcd(LARGEST_GROUPS, channels), channels)
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each with its norm; a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm = "batch") -> None:
        super().__init__()
        # Hooks for per-record gradients do not bear their outputs being overwritten.
        self.inplace = norm == "batch"
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm_layer(outputs, norm)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm_layer(outputs, norm)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm_layer(outputs, norm)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.norm1(self.conv1(x)), inplace=self.inplace)
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x), inplace=self.inplace)


class ResNet14(Classifier):
    """CIFAR-style residual network with 6n + 2 layers, n = 2; 2,777,674
    parameters at 10 classes, 3 channels, width 64.

    The paper names only "ResNet14" and 64 initial filters (Table 4); the three-stage layout is our reading.

    Args:
        num_classes: size of the logits.
        channels: 1 or 3.
        width: channels of the first stage; the others have twice and four times as many.
        random: source of the initial weights; None = torch's global one.
        norm: `batch` (the paper), or `group` for training with differential privacy.
    """

    network = "resnet14"

    def __init__(
        self,
        num_classes: int,
        channels: int,
        width: int = 64,
        random: torch.Generator | None = None,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(num_classes, channels)
        self.width, self.norm_kind = width, norm
        # Built on "meta" and filled below: torch's layers would otherwise draw from the global random state.
        with torch.device("meta"):
            self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
            self.norm = norm_layer(width, norm)
            self.stages = nn.Sequential(*(self._stage(width, stage, norm) for stage in range(3)))
            self.head = nn.Linear(4 * width, num_classes)
        self.to_empty(device="cpu")
        self.initialise(random)

    @staticmethod
    def _stage(width: int, stage: int, norm: Norm) -> nn.Sequential:
        outputs = width * 2**stage
        inputs = outputs if stage == 0 else outputs // 2
        first = ResidualBlock(inputs, outputs, 1 if stage == 0 else 2, norm)
        return nn.Sequential(
            first, *(ResidualBlock(outputs, outputs, 1, norm) for _ in range(BLOCKS_PER_STAGE - 1))
        )

    @torch.no_grad()
    def initialise(self, random: torch.Generator | None) -> None:
        """Fresh weights: He normal (fan out) for convolutions,
        uniform(+-1/sqrt(fan in)) for the head, reset norms."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=random)
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.reset_parameters()
        bound = 1 / math.sqrt(self.head.in_features)
        nn.init.uniform_(self.head.weight, -bound, bound, generator=random)
        nn.init.zeros_(self.head.bias)

    def sizes(self) -> dict[str, int | str]:
        norm: dict[str, int | str] = {} if self.norm_kind == "batch" else {"norm": self.norm_kind}
        return {"width": self.width} | norm

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features: normalised float images [N, C, H, W] -> [N,
        4 * width], after global average pooling."""
        hidden = functional.relu(self.norm(self.stem(images)), inplace=self.norm_kind == "batch")
        pooled: Tensor = self.stages(hidden).mean((2, 3))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float images [N, C, H, W] -> logits [N, num_classes]."""
        logits: Tensor = self.head(self.features(images))
        return logits
