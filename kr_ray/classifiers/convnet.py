"""ConvNet-3: the network of data set distillation (Zhao, Mopuri and Bilen, "Dataset Condensation with
Gradient Matching", ICLR 2021, section 4: three blocks of 128 filters, instance norm, average pooling)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kr_ray.classifiers.interface import Classifier

BLOCKS = 3
GRID = 4
"""Side of the last feature map: what three halvings leave of 32 px."""


class ConvNet3(Classifier):
    """Three times 3x3 convolution, instance norm, ReLU and pooling; 320,010 parameters at 10 classes, 3
    channels, width 128 (317,706 at 1 channel).

    Sides that are no multiple of 8 are padded to the next one (28 px to 32, as the authors do for grey sets).
    The last pooling ends at 4 x 4 features whatever comes in, so that one network serves all sizes; at 32 px
    that is the authors' average of 2 x 2. Instance norm, written as group norm of one channel a group, looks
    at one image alone.

    Args:
        num_classes: size of the logits.
        channels: 1 or 3.
        width: filters of every block.
    """

    network = "convnet3"

    def __init__(self, num_classes: int, channels: int, width: int = 128) -> None:
        super().__init__(num_classes, channels)
        self.width = width
        self.blocks = nn.ModuleList(_block(width if depth else channels, width) for depth in range(BLOCKS))
        self.head = nn.Linear(width * GRID**2, num_classes)

    def sizes(self) -> dict[str, int | str]:
        return {"width": self.width}

    def features(self, images: Tensor) -> Tensor:
        """Float images [N, C, S, S] -> [N, 16 * width]."""
        hidden = _padded(images)
        for depth, block in enumerate(self.blocks, start=1):
            hidden = block(hidden)
            hidden = functional.avg_pool2d(hidden, 2) if depth < BLOCKS else _pooled_to_grid(hidden)
        return hidden.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Float images [N, C, S, S] -> logits [N, num_classes]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _block(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU())


def _padded(images: Tensor) -> Tensor:
    missing = -images.shape[-1] % 2**BLOCKS
    before, after = missing // 2, missing - missing // 2
    return functional.pad(images, (before, after, before, after)) if missing else images


def _pooled_to_grid(hidden: Tensor) -> Tensor:
    times, rest = divmod(hidden.shape[-1], GRID)
    if rest or not times:
        return functional.adaptive_avg_pool2d(hidden, GRID)
    return functional.avg_pool2d(hidden, times) if times > 1 else hidden


def fresh_convnet(num_classes: int, channels: int, width: int, seed: int) -> ConvNet3:
    """With PyTorch's own initial weights, as the authors'; they depend on nothing but `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvNet3(num_classes, channels, width)
