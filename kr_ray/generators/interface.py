"""What every kind of generator offers: a training that advances epoch by
epoch, and a sampler for each of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kr_ray.config import ConfigError, GeneratorSection, SamplingSection
from kr_ray.data.images import LabelledImages
from kr_ray.runs.artifacts import load_tensors, save_tensors
from kr_ray.runs.figures import PrivacyRecord
from kr_ray.runs.stages import State

PRIOR = "prior"
"""Among a checkpoint's weights: noisy class frequencies that its training released, float64 [K]."""


@dataclass(frozen=True)
class Checkpoint:
    """A generator (EMA weights, unless its kind says otherwise) after some epochs of training.

    Attributes:
        epoch: epochs trained, from 1.
        weights: on the CPU, as the kind's `open` reads them.
        images_seen: real images that the training has seen.
        figures: of the last epoch, such as losses.
    """

    epoch: int
    weights: dict[str, Tensor]
    images_seen: int
    figures: dict[str, float]


class GeneratorTraining(Protocol):
    """A training that goes on from any of its states, bit for bit (same device, threads and workers)."""

    epoch: int
    """Epochs done."""

    def train_epoch(self) -> dict[str, float]:
        """One more pass over the real images; returns its figures, `epoch`,
        `images_seen` and `images_per_second` among them.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        ...

    def checkpoint(self) -> Checkpoint: ...

    def state(self) -> State:
        """CPU tensors, numbers, strings and nested dicts only."""
        ...

    def load_state(self, state: State) -> None: ...


@runtime_checkable
class CountsItself(Protocol):
    """A training whose number of weights depends on the images' side."""

    def parameters(self) -> dict[str, int]:
        """As `Generator.parameters`."""
        ...


class Sampler(Protocol):
    """Always ready to draw: latent std, steps or guidance were settled when it was opened."""

    @property
    def device(self) -> torch.device: ...

    def images(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """One image per label: int64 [N], on any device -> uint8 [N, C, S, S] on the
        sampler's. `random` is the only source of chance."""
        ...


class Generator(Protocol):
    """A kind of generator with its settings (see kr_ray.generators.registry)."""

    @property
    def section(self) -> GeneratorSection: ...

    def training(
        self, images: LabelledImages, num_classes: int, seed: int, device: torch.device
    ) -> GeneratorTraining: ...

    def parameters(self, num_classes: int, channels: int) -> dict[str, int]:
        """Trained numbers by network, that which draws first."""
        ...

    def round_images(self) -> int:
        """Real images of the smallest epoch that costs what the training costs an image, for `kr plan`."""
        ...

    def up_to(self, epoch: int) -> Generator:
        """The same, trained up to its checkpoint of `epoch` and no
        further: what it gives there must be the same."""
        ...

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
    ) -> Sampler:
        """A sampler of one checkpoint.

        Args:
            checkpoint: a file that `save_checkpoint` wrote.
            sampling: the kind's own section.
            prior: class frequencies of the labels that will be asked for, float [K].
            seed: of what the sampler draws to calibrate itself; equal seeds give equal samplers.
            batch_size: of its forward passes.
            calibration_images: about so many are drawn first by kinds that need it
                (batch-norm statistics); None: as `sampling` says.
            images: about so many will be drawn (see kr_ray.compute.graphs).

        Raises:
            kr_ray.runs.artifacts.ArtifactError: the file is missing or broken.
            ValueError: `prior` does not have one entry per class.
        """
        ...


@runtime_checkable
class PrivateGenerator(Protocol):
    """A kind whose training has a guarantee: what it tells of the real images is noisy, and has an event."""

    def private_training(
        self, folder: Path, images: LabelledImages, num_classes: int, seed: int, device: torch.device
    ) -> GeneratorTraining:
        """As `Generator.training`, with a secret noise key, and what was released, kept in `folder`: called
        again there, it releases nothing anew.

        Raises:
            kr_ray.runs.artifacts.ArtifactError: what was released is damaged.
        """
        ...

    def with_section(self, section: GeneratorSection) -> Generator:
        """The same with other keys of its kind, such as a noise that was left open."""
        ...

    def privacy(self, records: int) -> PrivacyRecord:
        """What the whole training releases of so many images, and the guarantee of that alone."""
        ...


def released_prior(checkpoint: Path) -> Tensor:
    """The noisy class frequencies in a checkpoint, float64 [K].

    Raises:
        ConfigError: its kind of generator releases none.
        kr_ray.runs.artifacts.ArtifactError: the file is missing or broken.
    """
    tensors, _ = load_tensors(checkpoint)
    if PRIOR not in tensors:
        raise ConfigError(
            f"`synthesis.class_prior: released` needs class frequencies in {checkpoint}, but there are none; "
            "use uniform"
        )
    return tensors[PRIOR]


@runtime_checkable
class Judge(Protocol):
    """A kind of generator whose weights say how well they know an image; the audit attacks them by that."""

    def knows(self, checkpoint: Path, images: Tensor, labels: Tensor, device: torch.device) -> Tensor:
        """Of uint8 [N, C, S, S] images and int64 [N] labels: float64 [N], on the CPU; higher = better known.
        The same numbers whenever it is asked."""
        ...


def checkpoint_file(epoch: int) -> Path:
    """Relative to the run directory."""
    return Path("generator") / "checkpoints" / f"epoch_{epoch:04d}.safetensors"


def save_checkpoint(
    path: Path, checkpoint: Checkpoint, section: GeneratorSection, num_classes: int, channels: int
) -> None:
    """Write a checkpoint atomically as safetensors, with all that its kind's `open` needs."""
    metadata = {
        "config": section.model_dump(mode="json"),
        "num_classes": num_classes,
        "channels": channels,
        "epoch": checkpoint.epoch,
        "images_seen": checkpoint.images_seen,
        **checkpoint.figures,
    }
    save_tensors(path, checkpoint.weights, metadata)
