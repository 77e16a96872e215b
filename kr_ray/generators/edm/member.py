"""The diffusion model as a kind of generator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import EdmConfig, EdmSampling, SamplingSection
from kr_ray.data.images import LabelledImages
from kr_ray.generators.edm.checkpoint import EdmCheckpoint
from kr_ray.generators.edm.networks import UNet
from kr_ray.generators.edm.preconditioning import from_uint8, losses
from kr_ray.generators.edm.sampling import EdmSampler
from kr_ray.generators.edm.training import EdmTraining

KNOWN_AT = (0.1, 0.2, 0.4, 0.8)
"""Noise levels of `Edm.knows`, on the scale of pixels in [-1, 1]."""


@dataclass(frozen=True)
class Edm:
    """See kr_ray.generators.interface.Generator."""

    section: EdmConfig

    def training(
        self, images: LabelledImages, num_classes: int, seed: int, device: torch.device
    ) -> EdmTraining:
        return EdmTraining(images, num_classes, self.section, seed, device)

    def parameters(self, num_classes: int, channels: int) -> dict[str, int]:
        return {"denoiser": sum(p.numel() for p in UNet(self.section, num_classes, channels).parameters())}

    def round_images(self) -> int:
        return self.section.batch_size

    def up_to(self, epoch: int) -> Edm:
        """The rate does not decay, so that a shorter training passes through the same states."""
        return Edm(self.section.model_copy(update={"epochs": epoch, "checkpoint_every": epoch}))

    def open(
        self,
        checkpoint: Path,
        sampling: SamplingSection,
        *,
        prior: Tensor,
        seed: int,
        device: torch.device,
        batch_size: int = 128,
        calibration_images: int | None = None,
        images: float = 0,
    ) -> EdmSampler:
        """Needs no calibration: GroupNorm keeps no statistics, so that neither `prior` nor `seed` matter."""
        if not isinstance(sampling, EdmSampling):
            raise TypeError(
                f"`sampling` must be that of edm, but got {type(sampling).__name__}; use EdmSampling"
            )
        return EdmSampler.open(checkpoint, sampling, device, images)

    def knows(self, checkpoint: Path, images: Tensor, labels: Tensor, device: torch.device) -> Tensor:
        """Minus the logarithm of the denoising loss (Matsumoto, Miura and Yanai, "Membership Inference
        Attacks against Diffusion Models", 2023), the mean over the noise levels at which images take shape,
        each with the same noise in all runs of an audit."""
        opened = EdmCheckpoint.load(checkpoint)
        network = opened.network().to(device).eval()
        found = torch.zeros(len(images), dtype=torch.float64)
        with torch.inference_mode():
            for number, level in enumerate(KNOWN_AT):
                random = seeded_generator("denoising loss", number)
                noise = torch.randn(images.shape, generator=random)
                for rows in torch.arange(len(images)).split(128):
                    clean, classes = from_uint8(images[rows].to(device)), labels[rows].to(device)
                    sigma = torch.full((len(rows),), level, device=device)
                    errors = losses(network, clean, noise[rows].to(device), sigma, classes, opened.sigma_data)
                    found[rows] -= errors.double().cpu().clamp_min(1e-12).log() / len(KNOWN_AT)
        return found
