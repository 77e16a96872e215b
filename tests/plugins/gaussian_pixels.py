"""A throw-away generator, in one file outside the package: a Gaussian per class and pixel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kr_ray.config import GeneratorSection, SamplingSection
from kr_ray.data.images import LabelledImages
from kr_ray.generators.interface import Checkpoint
from kr_ray.runs.artifacts import load_tensors


class GaussianSampling(SamplingSection):
    spread: float = 1.0
    """Times the pixels' standard deviation."""


class GaussianSection(GeneratorSection):
    kind: Literal["gaussian_pixels"] = "gaussian_pixels"
    epochs: int = 2
    checkpoint_every: int = 1

    @classmethod
    def sampling(cls) -> type[SamplingSection]:
        return GaussianSampling

    def space(self) -> dict[str, tuple[float, float]]:
        return {"spread": (0.5, 1.5), "regeneration_rate": (1, 4)}

    def member(self) -> GaussianPixels:
        return GaussianPixels(self)


SECTIONS = (GaussianSection,)


class Fit:
    """The first epoch halves the weight of the data against a grey image; the second has it all."""

    def __init__(self, images: LabelledImages, num_classes: int, epochs: int) -> None:
        self.images, self.num_classes, self.epochs, self.epoch = images, num_classes, epochs, 0

    def train_epoch(self) -> dict[str, float]:
        self.epoch += 1
        seen = self.epoch * len(self.images)
        return {"epoch": self.epoch, "images_seen": seen, "images_per_second": 1.0, "loss": 1 / self.epoch}

    def checkpoint(self) -> Checkpoint:
        pixels, labels, share = self.images.images.float(), self.images.labels, self.epoch / self.epochs
        means = torch.stack([pixels[labels == k].mean(0) for k in range(self.num_classes)])
        stds = torch.stack([pixels[labels == k].std(0) for k in range(self.num_classes)])
        weights = {"mean": 128 + share * (means - 128), "std": stds}
        return Checkpoint(self.epoch, weights, self.epoch * len(self.images), {"loss": 1 / self.epoch})

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]


@dataclass(frozen=True)
class GaussianSampler:
    mean: Tensor
    std: Tensor
    device: torch.device

    def images(self, labels: Tensor, random: torch.Generator) -> Tensor:
        noise = torch.randn(len(labels), *self.mean.shape[1:], generator=random)
        return (
            (self.mean[labels.cpu()] + noise * self.std[labels.cpu()])
            .clamp(0, 255)
            .to(torch.uint8)
            .to(self.device)
        )


@dataclass(frozen=True)
class GaussianPixels:
    section: GaussianSection

    def training(self, images: LabelledImages, num_classes: int, seed: int, device: torch.device) -> Fit:
        return Fit(images, num_classes, self.section.epochs)

    def parameters(self, num_classes: int, channels: int) -> dict[str, int]:
        return {"means and spreads": 2 * num_classes * channels}

    def round_images(self) -> int:
        return 1

    def up_to(self, epoch: int) -> GaussianPixels:
        return self

    def open(
        self, checkpoint: Path, sampling: SamplingSection, *, device: torch.device, **_: Any
    ) -> GaussianSampler:
        assert isinstance(sampling, GaussianSampling)
        tensors, _metadata = load_tensors(checkpoint)
        return GaussianSampler(tensors["mean"], tensors["std"] * sampling.spread, device)
