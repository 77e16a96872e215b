"""ResNet14: the classifier behind teacher, student and shadow models (Knowledge Recycling, section 3.1 and Table 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from kr_ray.classifiers.interface import Classifier
from kr_ray.compute.parallel import BatchNorm2d

BLOCKS_PER_STAGE = 2
"""n of the CIFAR-style 6n + 2 layout (He et al. 2015, section 4.2): 6 * 2 + 2 = 14 layers."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x), inplace=True)


class ResNet14(Classifier):
    """CIFAR-style residual network with 6n + 2 layers, n = 2; 2,777,674 parameters at 10 classes, 3 channels, width 64.

    The paper names only "ResNet14" and 64 initial filters (Table 4); the three-stage layout is our reading.

    Args:
        num_classes: size of the logits.
        channels: 1 or 3.
        width: channels of the first stage; the others have twice and four times as many.
        generator: source of the initial weights; None = torch's global one.
    """

    network = "resnet14"

    def __init__(self, num_classes: int, channels: int, width: int = 64, generator: torch.Generator | None = None) -> None:
        super().__init__(num_classes, channels)
        self.width = width
        # Built on "meta" and filled below: torch's layers would otherwise draw from the global random state.
        with torch.device("meta"):
            self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
            self.norm = BatchNorm2d(width)
            self.stages = nn.Sequential(*(self._stage(width, stage) for stage in range(3)))
            self.head = nn.Linear(4 * width, num_classes)
        self.to_empty(device="cpu")
        self.initialise(generator)

    @staticmethod
    def _stage(width: int, stage: int) -> nn.Sequential:
        outputs = width * 2**stage
        inputs = outputs if stage == 0 else outputs // 2
        first = ResidualBlock(inputs, outputs, 1 if stage == 0 else 2)
        return nn.Sequential(first, *(ResidualBlock(outputs, outputs, 1) for _ in range(BLOCKS_PER_STAGE - 1)))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None) -> None:
        """Fresh weights: He normal (fan out) for convolutions, uniform(+-1/sqrt(fan in)) for the head, reset batch norms."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        bound = 1 / math.sqrt(self.head.in_features)
        nn.init.uniform_(self.head.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.head.bias)

    def sizes(self) -> dict[str, int]:
        return {"width": self.width}

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features: normalised float images [N, C, H, W] -> [N, 4 * width], after global average pooling."""
        hidden = functional.relu(self.norm(self.stem(images)), inplace=True)
        pooled: Tensor = self.stages(hidden).mean((2, 3))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float images [N, C, H, W] -> logits [N, num_classes]."""
        logits: Tensor = self.head(self.features(images))
        return logits
