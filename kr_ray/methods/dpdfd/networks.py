"""The generator of data-free distillation: images for the student's sake, made from no image at all."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ConfigError
from kr_ray.runs.artifacts import save_tensors

CHANNELS = (64, 32)


class DataFreeGenerator(nn.Module):
    """Latents to pixels: a linear layer, then twice upsampling and convolution (the layout of DAFL, Chen et
    al. 2019, half as wide).

    Args:
        shape: (C, S, S) of an image; S a multiple of 4.
        channels: of the two levels.

    Raises:
        ConfigError: S is no multiple of 4.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent_dim: int,
        seed: int,
        channels: tuple[int, int] = CHANNELS,
    ) -> None:
        super().__init__()
        image_channels, size, _ = shape
        first, second = channels
        if size % 4:
            raise ConfigError(
                f"`image_size` must be a multiple of 4 for dpdfd, but got {size}; use {4 * round(size / 4)}"
            )
        self.latent_dim, self._start = latent_dim, (first, size // 4, size // 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "data-free generator"))
            self.linear = nn.Linear(latent_dim, first * (size // 4) ** 2)
            self.body = nn.Sequential(
                nn.BatchNorm2d(first),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(first, first, 3, padding=1),
                nn.BatchNorm2d(first),
                nn.LeakyReLU(0.2),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(first, second, 3, padding=1),
                nn.BatchNorm2d(second),
                nn.LeakyReLU(0.2),
                nn.Conv2d(second, image_channels, 3, padding=1),
                nn.Tanh(),
            )

    def forward(self, latents: Tensor) -> Tensor:
        """Latents float32 [N, latent_dim] -> images float32 [N, C, S, S] in [-1, 1], as the classifiers read
        them."""
        return self.body(self.linear(latents).unflatten(1, self._start))

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """`count` images from latents of `random`, with gradients where they are switched on."""
        device = self.linear.weight.device
        return self(torch.randn(count, self.latent_dim, generator=random).to(device))


def save_data_free_generator(path: Path, generator: DataFreeGenerator, shape: tuple[int, int, int]) -> None:
    """Write the generator's weights with its sizes."""
    save_tensors(path, generator.state_dict(), {"shape": list(shape), "latent_dim": generator.latent_dim})


def to_bytes(images: Tensor) -> Tensor:
    """Images float32 in [-1, 1] -> uint8: what is recorded, asked and trained on."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
