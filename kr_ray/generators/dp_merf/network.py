"""A small conditional generator, and the sampler that draws its images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kr_ray.config import ConfigError, DpMerfConfig
from kr_ray.config.dp import SIDE_MULTIPLE
from kr_ray.generators.interface import PRIOR
from kr_ray.runs.artifacts import ArtifactError, holding, load_tensors

HIDDEN = 200
KIND = "dp_merf"
AT_ONCE = 1000


class MerfGenerator(nn.Module):
    """Latents and classes to pixels: two linear layers, then twice upsampling and a 5 x 5 convolution (the
    authors' layout).

    Args:
        num_classes: K.
        shape: (C, H, W) of an image; H and W multiples of 4.
        latent_dim: of the Gaussian latents.
        channels: of the two feature maps.

    Raises:
        ConfigError: the image size is no multiple of 4.
    """

    def __init__(
        self, num_classes: int, shape: tuple[int, int, int], latent_dim: int, channels: tuple[int, int]
    ) -> None:
        super().__init__()
        image_channels, height, width = shape
        step = SIDE_MULTIPLE
        if height % step or width % step:
            raise ConfigError(
                f"`image_size` must be a multiple of {step} for dp_merf, but got {height} x {width}; "
                f"use {step * round(height / step)}"
            )
        self.num_classes, self.shape, self.latent_dim, self.channels = (
            num_classes,
            shape,
            latent_dim,
            channels,
        )
        self._start = (channels[0], height // step, width // step)
        cells = channels[0] * (height // step) * (width // step)
        self.linear1, self.norm1 = nn.Linear(latent_dim + num_classes, HIDDEN), nn.BatchNorm1d(HIDDEN)
        self.linear2, self.norm2 = nn.Linear(HIDDEN, cells), nn.BatchNorm1d(cells)
        self.conv1 = nn.Conv2d(channels[0], channels[1], 5, padding=2)
        self.conv2 = nn.Conv2d(channels[1], image_channels, 5, padding=2)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Latents float32 [N, latent_dim] and labels int64 [N] -> pixels float32 [N, C, H, W] in [0, 1]."""
        inputs = torch.cat([latents, F.one_hot(labels, self.num_classes).float()], 1)
        hidden = F.relu(self.norm1(self.linear1(inputs)))
        hidden = F.relu(self.norm2(self.linear2(hidden))).unflatten(1, self._start)
        hidden = F.relu(self.conv1(F.interpolate(hidden, scale_factor=2, mode="bilinear")))
        return torch.sigmoid(self.conv2(F.interpolate(hidden, scale_factor=2, mode="bilinear")))


class MerfSampler:
    """A frozen generator, ready to draw.

    Attributes:
        prior: float64 [K], the released class frequencies: the labels to ask for, where the real ones are
            private.
        device: of the images.
    """

    def __init__(self, network: MerfGenerator, prior: Tensor, device: torch.device) -> None:
        self.network, self.prior, self.device = network.to(device).eval().requires_grad_(False), prior, device
        self.num_classes = network.num_classes

    @classmethod
    def open(cls, checkpoint: Path, device: torch.device) -> MerfSampler:
        """Read a checkpoint of the kind `dp_merf`.

        Raises:
            kr_ray.runs.artifacts.ArtifactError: the file is missing, broken, or another kind of generator's.
        """
        tensors, metadata = load_tensors(checkpoint)
        with holding(checkpoint, "a DP-MERF generator"):
            kind = metadata.get("config", {}).get("kind", "unknown")
            if kind != KIND:
                raise ArtifactError(
                    f"`kind: {KIND}` must be in the metadata of {checkpoint}, but it says {kind!r}; "
                    "open it with its own kind of generator, or run the generator stage again"
                )
            section = DpMerfConfig.model_validate(metadata["config"], strict=False)
            side, channels = int(metadata["image_size"]), metadata["channels"]
            network = MerfGenerator(
                metadata["num_classes"], (channels, side, side), section.latent_dim, section.channels
            )
            prior = tensors.pop(PRIOR)
            network.load_state_dict(tensors)
        return cls(network, prior, device)

    @torch.inference_mode()
    def images(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """Draw one image per label.

        Args:
            labels: int64 [N], on any device.
            random: the only source of randomness, on any device.

        Returns:
            uint8 [N, C, S, S] on the sampler's device.
        """
        latents = torch.randn(
            len(labels), self.network.latent_dim, generator=random, device=random.device
        ).to(self.device)
        parts = zip(latents.split(AT_ONCE), labels.to(self.device).split(AT_ONCE), strict=True)
        drawn = [(255 * self.network(*part)).round().to(torch.uint8) for part in parts]
        return (
            torch.cat(drawn)
            if drawn
            else torch.empty(0, *self.network.shape, dtype=torch.uint8, device=self.device)
        )
