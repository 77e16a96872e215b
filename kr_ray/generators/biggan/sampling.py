"""Images from a checkpoint, at a latent std: its batch-norm statistics there, and batches."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kr_ray.compute.devices import autocast
from kr_ray.compute.graphs import Captured, compiled
from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import BigGanConfig
from kr_ray.generators.biggan.networks import Generator, to_uint8
from kr_ray.runs.artifacts import holding, load_tensors

COMPILING_PAYS_FROM = 1e6
"""Images: compiling took 13 s on an H200 and saved 21 microseconds an image at 128 channels."""


class BigGanSampler:
    """A frozen generator that draws uint8 images at one latent std.

    Batch-norm statistics depend on the std of the latents. Those of the training hold at std 1 only (and were
    averaged over changing weights), so they are estimated anew for each (checkpoint, std): "standing
    statistics" (Brock et al. 2019, appendix B). In bf16 where that is fast, else in float32 (one precision
    per machine, so equal seeds give equal images).

    Args:
        generator: with plain weights; is moved to `device`.
        latent_std: std of the latents' Gaussian, > 0.
        prior: class frequencies of the labels used, float [K].
        seed: equal seeds give equal statistics.
        batch_size: of the forward passes.
        standing_batches: statistics are the plain mean over this many batches.
        images: about so many will be drawn (see kr_ray.compute.graphs).

    Raises:
        ValueError: `latent_std` is not positive or `prior` does not have one entry per class.
    """

    def __init__(
        self,
        generator: Generator,
        device: torch.device,
        *,
        latent_std: float,
        prior: Tensor,
        seed: int,
        batch_size: int,
        standing_batches: int,
        images: float = 0,
    ) -> None:
        if latent_std <= 0:
            raise ValueError(f"`latent_std > 0` must hold, but got latent_std={latent_std}; use 1.0 to 2.5")
        if prior.shape != (generator.num_classes,):
            raise ValueError(
                f"`prior` must have one entry per class ({generator.num_classes}), but got shape "
                f"{tuple(prior.shape)}; use class_prior of the training labels"
            )
        self.device = device
        self._latent_std, self._batch_size = latent_std, batch_size
        self._generator = generator.to(device).requires_grad_(False).eval()
        self._network = compiled(self._generator, device, images, COMPILING_PAYS_FROM)
        self._draw = Captured(self._forward, device)
        self._estimate_statistics(prior, seed, standing_batches)

    @classmethod
    def load(
        cls,
        path: Path,
        device: torch.device,
        *,
        latent_std: float,
        prior: Tensor,
        seed: int,
        batch_size: int,
        standing_batches: int,
        images: float = 0,
    ) -> BigGanSampler:
        """Read a checkpoint that `save_checkpoint` wrote.

        Raises:
            kr_ray.runs.artifacts.ArtifactError: the file is missing or broken.
        """
        tensors, metadata = load_tensors(path)
        with holding(path, "a generator"):
            config = BigGanConfig.model_validate(metadata["config"], strict=False)
            generator = Generator(config, metadata["num_classes"], metadata["channels"])
            generator.load_folded_weights(tensors)
        return cls(
            generator,
            device,
            latent_std=latent_std,
            prior=prior,
            seed=seed,
            batch_size=batch_size,
            standing_batches=standing_batches,
            images=images,
        )

    def _estimate_statistics(self, prior: Tensor, seed: int, batches: int) -> None:
        size, random = self._batch_size, seeded_generator(seed, "standing statistics")
        classes = torch.multinomial(prior.cpu().double(), batches * size, replacement=True, generator=random)
        latents = self._latents(batches * size, random)
        with autocast(self.device, "mixed"):
            self._generator.estimate_statistics(
                torch.split(latents, size), torch.split(classes.to(self.device), size)
            )

    @torch.inference_mode()
    def images(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """Draw one image per label.

        Args:
            labels: int64 [N], on any device.
            random: the only source of randomness, on any device.

        Returns:
            uint8 [N, C, S, S] on the sampler's device.
        """
        latents, classes, count = self._latents(len(labels), random), labels.to(self.device), len(labels)
        if (
            self._draw.active
        ):  # another shape for a last, smaller batch would be captured, and perhaps compiled, apart
            latents, classes = (_filled_up(tensor, self._batch_size) for tensor in (latents, classes))
        batches = zip(latents.split(self._batch_size), classes.split(self._batch_size), strict=True)
        return torch.cat([self._draw(batch, part) for batch, part in batches])[:count].contiguous()

    def _forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        with autocast(self.device, "mixed"):
            return to_uint8(self._network(latents, classes), self._generator.output)

    def _latents(self, count: int, random: torch.Generator) -> Tensor:
        standard = torch.randn(count, self._generator.latent_dim, generator=random, device=random.device)
        return standard.to(self.device) * self._latent_std


def _filled_up(tensor: Tensor, multiple: int) -> Tensor:
    """`tensor` with zeros appended until its length is a multiple."""
    missing = -len(tensor) % multiple
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
