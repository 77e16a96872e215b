"""DP-MERF as a kind of generator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kr_ray.config import DpMerfConfig, GeneratorSection
from kr_ray.data.images import LabelledImages
from kr_ray.dp.noise import insecure_key
from kr_ray.dp.release import own_delta, privacy_record
from kr_ray.generators.dp_merf.features import Embedding, release_embedding
from kr_ray.generators.dp_merf.network import MerfGenerator, MerfSampler
from kr_ray.generators.dp_merf.training import MerfTraining, draw_features, plan_dp_merf, released_embedding
from kr_ray.runs.figures import PrivacyRecord


@dataclass(frozen=True)
class DpMerf:
    """See kr_ray.generators.interface.Generator and PrivateGenerator.

    Attributes:
        whole: what the training's pace follows where `section` ends it early (`up_to`); None: `section`.
    """

    section: DpMerfConfig
    whole: DpMerfConfig | None = None

    def training(
        self, images: LabelledImages, num_classes: int, seed: int, device: torch.device
    ) -> MerfTraining:
        """For measuring its speed: the noise is of a known key and nothing is kept, so it is no private
        training of anybody's images."""
        features, key = draw_features(images, self.section, seed), insecure_key("measured")
        embedding = release_embedding(
            images.to("cpu"), num_classes, features, 1.0, self.section.prior_share, key
        )
        return self._training(embedding, images, seed, device)

    def private_training(
        self, folder: Path, images: LabelledImages, num_classes: int, seed: int, device: torch.device
    ) -> MerfTraining:
        noise, _ = plan_dp_merf(self.section, len(images))
        features = draw_features(images, self.section, seed)
        embedding = released_embedding(folder, images, num_classes, features, noise, self.section)
        return self._training(embedding, images, seed, device)

    def _training(
        self, embedding: Embedding, images: LabelledImages, seed: int, device: torch.device
    ) -> MerfTraining:
        section = self.whole or self.section
        return MerfTraining(embedding, draw_features(images, section, seed), section, seed, device)

    def with_section(self, section: GeneratorSection) -> DpMerf:
        assert isinstance(section, DpMerfConfig)
        noise = {"noise_multiplier": section.noise_multiplier}
        return DpMerf(section, self.whole and self.whole.model_copy(update=noise))

    def privacy(self, records: int) -> PrivacyRecord:
        noise, event = plan_dp_merf(self.section, records)
        delta, insecure = own_delta(self.section, records), bool(self.section.insecure_noise_key)
        return privacy_record("dp_merf", event, records, delta, insecure, noise_multiplier=noise)

    def parameters(self, num_classes: int, channels: int) -> dict[str, int]:
        """For images of 4 px, the smallest: at other sides ask the training (`MerfTraining.parameters`)."""
        network = MerfGenerator(num_classes, (channels, 4, 4), self.section.latent_dim, self.section.channels)
        return {"generator": sum(parameter.numel() for parameter in network.parameters())}

    def round_images(self) -> int:
        return self.section.batch_size

    def up_to(self, epoch: int) -> DpMerf:
        """The rate falls with the share of the whole training, so its length is kept in mind."""
        shorter = self.section.model_copy(update={"epochs": epoch, "checkpoint_every": epoch})
        return DpMerf(shorter, self.whole or self.section)

    def open(self, checkpoint: Path, *_: Any, device: torch.device, **__: Any) -> MerfSampler:
        """Needs no calibration: batch norm's statistics are the checkpoint's own."""
        return MerfSampler.open(checkpoint, device)
