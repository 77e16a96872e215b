"""What the suites compute on: random images and untrained networks cost what real ones cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kr_ray.bench.harness import DeviceRates, Figure, Meter, Timing
from kr_ray.bench.sizes import Sizes
from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import BigGanConfig, ClassifierConfig
from kr_ray.config.file import parse_config
from kr_ray.data.images import LabelledImages
from kr_ray.generators.biggan.networks import Generator
from kr_ray.generators.biggan.sampling import BigGanSampler

NUM_CLASSES, CHANNELS = 10, 3


@dataclass(frozen=True)
class Bench:
    """What every suite is given.

    Attributes:
        folder: for files; empty at first, deleted at the end.
        threads: of torch in this process.
    """

    meter: Meter
    sizes: Sizes
    rounds: int
    rates: DeviceRates
    folder: Path
    threads: int

    @property
    def device(self) -> torch.device:
        return self.meter.device


@dataclass(frozen=True)
class Found:
    """What one suite found.

    Attributes:
        notes: what a reader of the figures must know.
    """

    figures: list[Figure]
    timings: list[Timing]
    notes: tuple[str, ...] = ()


def random_images(count: int, size: int, device: torch.device) -> LabelledImages:
    """uint8 noise with labels in turn, on `device`; the same every time."""
    pixels = torch.randint(
        256, (count, CHANNELS, size, size), generator=seeded_generator("bench images"), dtype=torch.uint8
    )
    return LabelledImages(pixels, torch.arange(count) % NUM_CLASSES).to(device)


def recipe(**keys: Any) -> ClassifierConfig:
    """Table 4's recipe with `keys` changed."""
    return ClassifierConfig(**keys)


PLAIN = {"trivial_augment": False, "crop_padding": 0, "horizontal_flip": False, "mixup_alpha": 0.0}
"""A recipe's keys that leave the gradient step alone."""


def gan_config(sizes: Sizes, **keys: Any) -> BigGanConfig:
    """The paper's training settings at the benchmark's size, for a training without an end."""
    own = {
        "architecture": sizes.architecture,
        "channels": sizes.gan_channels,
        "batch_size": sizes.gan_batch,
        "epochs": 10**6,
    }
    raw = {
        "name": "bench",
        "data": {"name": "digits", "image_size": sizes.image_size},
        "generator": own | keys,
    }
    section = parse_config(raw).generator
    assert isinstance(section, BigGanConfig)
    return section


def sampler(sizes: Sizes, device: torch.device, images: float) -> BigGanSampler:
    """A sampler of an untrained generator with its spectral norms folded in."""
    trained, frozen = (Generator(gan_config(sizes), NUM_CLASSES, CHANNELS) for _ in range(2))
    frozen.load_folded_weights(trained.folded_weights())
    return BigGanSampler(
        frozen,
        device,
        latent_std=1.0,
        prior=torch.full((NUM_CLASSES,), 1 / NUM_CLASSES, dtype=torch.float64),
        seed=0,
        batch_size=sizes.generation_batch,
        standing_batches=2,
        images=images,
    )
