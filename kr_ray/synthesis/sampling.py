"""Images from a checkpoint: its file, its batch-norm statistics at a latent std, batches, grids."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid

from kr_ray.artifacts import ArtifactError, load_tensors, save_tensors
from kr_ray.config import GeneratorConfig
from kr_ray.devices import autocast
from kr_ray.graphs import Captured, compiled
from kr_ray.models.biggan import Generator, to_uint8
from kr_ray.seeding import seeded_generator
from kr_ray.training.gan import GeneratorCheckpoint

COMPILING_PAYS_FROM = 1e6
"""Images: compiling took 13 s on an H200 and saved 21 microseconds an image at 128 channels."""


def save_generator(
    path: Path, checkpoint: GeneratorCheckpoint, config: GeneratorConfig, num_classes: int, channels: int
) -> None:
    """Write a checkpoint atomically as safetensors, with all that `Sampler.load` needs."""
    metadata = {
        "config": config.model_dump(mode="json"),
        "num_classes": num_classes,
        "channels": channels,
        "epoch": checkpoint.epoch,
        "images_seen": checkpoint.images_seen,
        "loss_d": checkpoint.loss_d,
        "loss_g": checkpoint.loss_g,
    }
    save_tensors(path, checkpoint.weights, metadata)


class Sampler:
    """A frozen generator that draws uint8 images at one latent std.

    Batch-norm statistics depend on the std of the latents. Those of the training hold at std 1 only (and were averaged over
    changing weights), so they are estimated anew for each (checkpoint, std): "standing statistics" (Brock et al. 2019,
    appendix B). In bf16 where that is fast, else in float32 (one precision per machine, so equal seeds give equal images).

    Args:
        generator: with plain weights; is moved to `device`.
        epoch: of the checkpoint, for the record.
        images: about so many will be drawn (see kr_ray.graphs).
    """

    def __init__(self, generator: Generator, epoch: int, device: torch.device, images: float = 0) -> None:
        self.epoch, self.device = epoch, device
        self.num_classes = generator.num_classes
        self._generator = generator.to(device).requires_grad_(False).eval()
        self._network = compiled(self._generator, device, images, COMPILING_PAYS_FROM)
        self._draw = Captured(self._forward, device)
        self._latent_std: float | None = None
        self._batch_size = 1

    @classmethod
    def load(cls, path: Path, device: torch.device, images: float = 0) -> Sampler:
        """Read what `save_generator` wrote.

        Raises:
            kr_ray.artifacts.ArtifactError: the file is missing or broken.
        """
        tensors, metadata = load_tensors(path)
        try:
            config = GeneratorConfig.model_validate(metadata["config"], strict=False)
            generator, epoch = Generator(config, metadata["num_classes"], metadata["channels"]), int(metadata["epoch"])
            generator.load_folded_weights(tensors)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{path} must hold a generator, but holds something else; delete it and run the stage again"
            ) from error
        return cls(generator, epoch, device, images)

    def set_latent_std(self, latent_std: float, seed: int, prior: Tensor, batches: int, batch_size: int) -> None:
        """Sample at `latent_std` from now on: estimate the batch-norm statistics there.

        Args:
            latent_std: std of the latents' Gaussian, > 0.
            seed: equal seeds give equal statistics.
            prior: class frequencies of the labels used, float [K].
            batches: statistics are the plain mean over this many batches of `batch_size`.
            batch_size: also the size of the forward passes of `images`.

        Raises:
            ValueError: `latent_std` is not positive or `prior` does not have one entry per class.
        """
        if latent_std <= 0:
            raise ValueError(f"`latent_std > 0` must hold, but got latent_std={latent_std}; use 1.0 to 2.5")
        if prior.shape != (self.num_classes,):
            raise ValueError(
                f"`prior` must have one entry per class ({self.num_classes}), but got shape {tuple(prior.shape)}; "
                "use class_prior of the training labels"
            )
        self._latent_std, self._batch_size = latent_std, batch_size
        random = seeded_generator(seed, "standing statistics")
        classes = torch.multinomial(prior.cpu().double(), batches * batch_size, replacement=True, generator=random)
        latents = self._latents(batches * batch_size, random)
        with autocast(self.device, "mixed"):
            self._generator.estimate_statistics(
                torch.split(latents, batch_size), torch.split(classes.to(self.device), batch_size)
            )

    @torch.inference_mode()
    def images(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one image per label.

        Args:
            labels: int64 [N], on any device.
            generator: the only source of randomness, on any device.

        Returns:
            uint8 [N, C, S, S] on the sampler's device.

        Raises:
            RuntimeError: `set_latent_std` was not called.
        """
        latents, classes, count = self._latents(len(labels), generator), labels.to(self.device), len(labels)
        if self._draw.active:  # another shape for a last, smaller batch would be captured, and perhaps compiled, apart
            latents, classes = (_filled_up(tensor, self._batch_size) for tensor in (latents, classes))
        batches = zip(latents.split(self._batch_size), classes.split(self._batch_size), strict=True)
        return torch.cat([self._draw(batch, part) for batch, part in batches])[:count].contiguous()

    def _forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        with autocast(self.device, "mixed"):
            return to_uint8(self._network(latents, classes), self._generator.output)

    def _latents(self, count: int, generator: torch.Generator) -> Tensor:
        if self._latent_std is None:
            raise RuntimeError("the latent std must be set before images are drawn; call set_latent_std first")
        standard = torch.randn(count, self._generator.latent_dim, generator=generator, device=generator.device)
        return standard.to(self.device) * self._latent_std


def _filled_up(tensor: Tensor, multiple: int) -> Tensor:
    """`tensor` with zeros appended until its length is a multiple."""
    missing = -len(tensor) % multiple
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Tile images row by row with a border of 1 px: uint8 [N, C, H, W] -> uint8 [3, rows, columns] on the CPU."""
    grid: Tensor = make_grid(images.cpu(), nrow=columns, padding=1, pad_value=255)
    return grid
