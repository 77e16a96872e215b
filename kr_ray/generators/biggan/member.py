"""BigGAN-Deep as a kind of generator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kr_ray.config import BigGanConfig, BigGanSampling, SamplingSection
from kr_ray.data.images import LabelledImages
from kr_ray.generators.biggan.networks import Discriminator, Generator
from kr_ray.generators.biggan.sampling import BigGanSampler
from kr_ray.generators.biggan.training import GanTraining


@dataclass(frozen=True)
class BigGan:
    """See kr_ray.generators.interface.Generator."""

    section: BigGanConfig

    def training(
        self, images: LabelledImages, num_classes: int, seed: int, device: torch.device
    ) -> GanTraining:
        return GanTraining(images, num_classes, self.section, seed, device)

    def parameters(self, num_classes: int, channels: int) -> dict[str, int]:
        networks = {"generator": Generator, "discriminator": Discriminator}
        return {
            name: sum(p.numel() for p in network(self.section, num_classes, channels).parameters())
            for name, network in networks.items()
        }

    def round_images(self) -> int:
        """As many D steps as go with one G step."""
        return self.section.d_steps * self.section.batch_size

    def up_to(self, epoch: int) -> BigGan:
        """Its rates do not depend on its length."""
        return BigGan(self.section.model_copy(update={"epochs": epoch, "checkpoint_every": epoch}))

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
    ) -> BigGanSampler:
        if not isinstance(sampling, BigGanSampling):
            raise TypeError(
                "`sampling` must be that of biggan_deep, but got "
                f"{type(sampling).__name__}; use BigGanSampling"
            )
        batches = (
            sampling.standing_batches
            if calibration_images is None
            else max(1, calibration_images // batch_size)
        )
        return BigGanSampler.load(
            checkpoint,
            device,
            latent_std=sampling.latent_std,
            prior=prior,
            seed=seed,
            batch_size=batch_size,
            standing_batches=batches,
            images=images,
        )
