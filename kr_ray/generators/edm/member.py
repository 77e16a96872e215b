"""The diffusion model as a kind of generator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kr_ray.config import EdmConfig, EdmSampling, SamplingSection
from kr_ray.data.images import LabelledImages
from kr_ray.generators.edm.networks import UNet
from kr_ray.generators.edm.sampling import EdmSampler
from kr_ray.generators.edm.training import EdmTraining


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
