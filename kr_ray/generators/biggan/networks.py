"""BigGAN-Deep for small images, with spectral norms folded once per weight update.

Architecture: Brock et al. 2019 (arXiv 1809.11096), appendix B, in the variant that the public 32-px tables of
the Knowledge Recycling paper's settings point to: 1x1 convolutions on G's shortcuts and on D's where the
shape changes, latent and shared class embedding concatenated into the first linear layer and into every
conditional batch norm, a projection head (Miyato and Koyama 2018) on sum-pooled features. Parameters at 10
classes and 3 channels: `studiogan32` 9.34M (G), `kr41m` 41.01M (G) and 39.13M (D).

Weights are initialised orthogonally (Brock et al., section 3), biases with zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kr_ray.config import BigGanConfig
from kr_ray.generators.biggan.spectral_norm import (
    NORM_MOMENTUM,
    ConditionalNorm,
    Conv,
    Embedding,
    Linear,
    Norm,
    SpectralNetwork,
)

# --- blocks -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with a gain that starts at 0 (Zhang et al. 2019, as
    in BigGAN): keys and values are pooled 2x2."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.query = Conv(features, max(features // 8, 1), 1, bias=False)
        self.key = Conv(features, max(features // 8, 1), 1, bias=False)
        self.value = Conv(features, max(features // 2, 1), 1, bias=False)
        self.out = Conv(max(features // 2, 1), features, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        query = self.query(x).flatten(2)
        key = functional.max_pool2d(self.key(x), 2).flatten(2)
        value = functional.max_pool2d(self.value(x), 2).flatten(2)
        weights = torch.softmax(query.mT @ key, dim=-1)
        mixed = (value @ weights.mT).reshape(batch, -1, height, width)
        attended: Tensor = x + self.gain.to(x.dtype) * self.out(mixed)
        return attended


def _doubled(x: Tensor) -> Tensor:
    """Nearest neighbour, in x's own type: autocast would widen it,
    and with it all that follows, to float32."""
    with torch.autocast(x.device.type, enabled=False):
        return functional.interpolate(x, scale_factor=2.0, mode="nearest")


class GeneratorBlock(nn.Module):
    """1x1, 3x3, 3x3, 1x1 with conditional norms; optionally doubles the side after the first 1x1."""

    def __init__(self, inputs: int, outputs: int, condition: int, ratio: int, upsample: bool) -> None:
        super().__init__()
        hidden = max(inputs // ratio, 1)
        self.upsample = upsample
        self.norm1 = ConditionalNorm(condition, inputs)
        self.conv1 = Conv(inputs, hidden, 1)
        self.norm2 = ConditionalNorm(condition, hidden)
        self.conv2 = Conv(hidden, hidden, 3)
        self.norm3 = ConditionalNorm(condition, hidden)
        self.conv3 = Conv(hidden, hidden, 3)
        self.norm4 = ConditionalNorm(condition, hidden)
        self.conv4 = Conv(hidden, outputs, 1)
        self.shortcut = Conv(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.norm2(self.conv1(self.norm1(x, condition)), condition)
        # Nearest-neighbour doubling and a 1x1 convolution commute; this
        # order does a quarter of the shortcut's work.
        skip = self.shortcut(x)
        if self.upsample:
            hidden, skip = _doubled(hidden), _doubled(skip)
        hidden = self.conv3(self.norm3(self.conv2(hidden), condition))
        merged: Tensor = self.conv4(self.norm4(hidden, condition)) + skip
        return merged


class DiscriminatorBlock(nn.Module):
    """Pre-activated 1x1, 3x3, 3x3, 1x1; optionally halves the side by average pooling before the last 1x1."""

    def __init__(self, inputs: int, outputs: int, ratio: int, downsample: bool) -> None:
        super().__init__()
        hidden = max(outputs // ratio, 1)
        self.downsample = downsample
        self.conv1 = Conv(inputs, hidden, 1)
        self.conv2 = Conv(hidden, hidden, 3)
        self.conv3 = Conv(hidden, hidden, 3)
        self.conv4 = Conv(hidden, outputs, 1)
        self.shortcut = Conv(inputs, outputs, 1) if downsample or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(functional.relu(x))
        hidden = self.conv2(functional.relu(hidden, inplace=True))
        hidden = self.conv3(functional.relu(hidden, inplace=True))
        if self.downsample:
            # Pooling and a 1x1 convolution commute: pooled first, the shortcut costs a quarter.
            hidden, x = functional.avg_pool2d(hidden, 2), functional.avg_pool2d(x, 2)
        hidden = self.conv4(functional.relu(hidden))
        merged: Tensor = hidden + (x if self.shortcut is None else self.shortcut(x))
        return merged


# --- the two networks ---------------------------------------------------------------------------------------


class Generator(SpectralNetwork):
    """Latents and labels to images.

    Args:
        config: channel tables and sizes; `len(g_in)` doublings from 4 px.
        num_classes: number of labels.
        channels: 1 or 3.
    """

    def __init__(self, config: BigGanConfig, num_classes: int, channels: int) -> None:
        super().__init__()
        unit, self.output = config.channels, config.output
        self.latent_dim, self.num_classes = config.latent_dim, num_classes
        condition = config.latent_dim + config.shared_dim
        self.embedding = nn.Embedding(
            num_classes, config.shared_dim, _weight=torch.zeros(num_classes, config.shared_dim)
        )
        self.linear = Linear(condition, 16 * unit * config.g_in[0])
        self.blocks = nn.ModuleList()
        for stage, (inputs, outputs) in enumerate(zip(config.g_in, config.g_out, strict=True)):
            for depth in range(config.depth):
                last = depth == config.depth - 1
                width = unit * (outputs if last else inputs)
                self.blocks.append(
                    GeneratorBlock(unit * inputs, width, condition, config.bottleneck_ratio, upsample=last)
                )
            if 8 * 2**stage == config.attention_resolution:
                self.blocks.append(Attention(unit * outputs))
        self.norm = Norm(unit * config.g_out[-1])
        self.to_pixels = Conv(unit * config.g_out[-1], channels, 3)
        self.build_spectral_norm()

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """latents float [N, latent_dim], labels int64 [N] -> float32 [N, C,
        S, S], in [0, 1] (sigmoid) or [-1, 1] (tanh)."""
        condition = torch.cat([self.embedding(labels), latents], dim=1)
        # The first linear's outputs are read as (y, x, channel), so that
        # the map is channels_last from the start.
        x = self.linear(condition).reshape(len(labels), 4, 4, -1).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = block(x) if isinstance(block, Attention) else block(x, condition)
        pixels = self.to_pixels(self.norm(x)).float()
        return torch.sigmoid(pixels) if self.output == "sigmoid" else torch.tanh(pixels)

    @torch.no_grad()
    def estimate_statistics(self, latents: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        """Replace the running batch-norm statistics by the mean over these
        batches ("standing statistics", Brock et al.)."""
        norms = [module for module in self.modules() if isinstance(module, ConditionalNorm | Norm)]
        was_training = self.training
        self.train()
        for index, (batch, classes) in enumerate(zip(latents, labels, strict=True)):
            for norm in norms:
                norm.momentum = 1 / (index + 1)
            self(batch, classes)
        for norm in norms:
            norm.momentum = NORM_MOMENTUM
        self.train(was_training)


class Discriminator(SpectralNetwork):
    """Images and labels to one realness logit each. Every stage but
    the last halves the side in its first block."""

    def __init__(self, config: BigGanConfig, num_classes: int, channels: int) -> None:
        super().__init__()
        unit, side = config.channels, config.image_size
        self.stem = Conv(channels, unit * config.d_in[0], 3)
        self.blocks = nn.ModuleList()
        for stage, (inputs, outputs) in enumerate(zip(config.d_in, config.d_out, strict=True)):
            halve = stage < len(config.d_in) - 1
            side //= 2 if halve else 1
            for depth in range(config.depth):
                width = unit * (inputs if depth == 0 else outputs)
                self.blocks.append(
                    DiscriminatorBlock(width, unit * outputs, config.bottleneck_ratio, halve and depth == 0)
                )
            if halve and side == config.attention_resolution:
                self.blocks.append(Attention(unit * outputs))
        self.linear = Linear(unit * config.d_out[-1], 1)
        self.embedding = Embedding(num_classes, unit * config.d_out[-1])
        self.build_spectral_norm()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """images float [N, C, S, S] in G's output range, labels int64 [N] -> float32 logits [N]."""
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        # Sums over 16 to 64 pixels and over all channels: in full precision even under autocast.
        with torch.autocast(x.device.type, enabled=False):
            pooled = functional.relu(x.float()).sum((2, 3))
            projection = (self.embedding(labels) * pooled).sum(1)
            logits: Tensor = self.linear(pooled).squeeze(1) + projection
        return logits


def to_uint8(images: Tensor, output: Literal["sigmoid", "tanh"]) -> Tensor:
    """Generated float images in G's output range -> uint8 in [0, 255], rounded, same shape."""
    unit = images if output == "sigmoid" else (images + 1) / 2
    return (unit * 255).round_().clamp_(0, 255).to(torch.uint8)


def from_uint8(images: Tensor, output: Literal["sigmoid", "tanh"]) -> Tensor:
    """uint8 images -> float32 in G's output range: what D sees of the real data. Inverse of `to_uint8`."""
    unit = images.float().div_(255)
    return unit if output == "sigmoid" else unit.mul_(2).sub_(1)
