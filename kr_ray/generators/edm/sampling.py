"""Images from a checkpoint: denoised in a few steps, with classifier-free guidance where wanted."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kr_ray.compute.devices import mixed_dtype
from kr_ray.compute.graphs import Captured, compiled
from kr_ray.config import EdmSampling
from kr_ray.generators.edm.checkpoint import EdmCheckpoint
from kr_ray.generators.edm.preconditioning import denoise, to_uint8
from kr_ray.generators.edm.solvers import solve

COMPILING_PAYS_FROM = 1e6
"""Images; that of BigGAN's sampler, for no GPU was at hand to measure this network's."""
PIXELS_AT_ONCE = {"cpu": 128 * 16**2, "cuda": 4096 * 16**2}
"""Pixels per call of the network. On a CPU 128 images of 16 px were 1.14 times as fast as 32, and 256 no more
than 1.02 times."""


class EdmSampler:
    """A frozen diffusion model that draws uint8 images, whole when made.

    An image depends on its class and its own noise alone, not on its neighbours in the batch (GroupNorm),
    so blocks of any size may be drawn anywhere: it is the same up to rounding. In half precision where that
    is fast, else in float32 (one precision per machine, so equal seeds give equal images).

    Args:
        images: about so many will be drawn (see kr_ray.compute.graphs).

    Raises:
        ValueError: guidance is asked for, but the network never saw the "none" class.
    """

    def __init__(
        self, checkpoint: EdmCheckpoint, sampling: EdmSampling, device: torch.device, images: float = 0
    ) -> None:
        if mistake := checkpoint.config.guidance_mistake(sampling):
            raise ValueError(mistake)
        self.epoch, self.num_classes, self.device = checkpoint.epoch, checkpoint.num_classes, device
        self._sampling, self._sigma_data = sampling, checkpoint.sigma_data
        self._half = half_precision(device) if sampling.precision == "mixed" else None
        self._shape = (checkpoint.channels, checkpoint.image_size, checkpoint.image_size)
        self._batch_size = max(1, PIXELS_AT_ONCE[device.type] // checkpoint.image_size**2)
        network = checkpoint.network().requires_grad_(False).eval()
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network = compiled(network, device, images * sampling.evaluations, COMPILING_PAYS_FROM)
        self._draw = Captured(self._trajectory, device)

    @classmethod
    def open(cls, path: Path, sampling: EdmSampling, device: torch.device, images: float = 0) -> EdmSampler:
        """A sampler of the checkpoint at `path`.

        Raises:
            kr_ray.runs.artifacts.ArtifactError: the file is missing, broken, or another kind of generator's.
        """
        return cls(EdmCheckpoint.load(path), sampling, device, images)

    @torch.inference_mode()
    def images(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """Draw one image per label.

        Args:
            labels: int64 [N], on any device.
            random: the only source of randomness, on any device.

        Returns:
            uint8 [N, C, S, S] on the sampler's device.
        """
        if not len(labels):
            return torch.empty(0, *self._shape, dtype=torch.uint8, device=self.device)
        count, noise, classes = len(labels), self._noise(len(labels), random), labels.to(self.device)
        # Another shape for a last, smaller batch would be captured, and perhaps compiled, apart.
        if self._draw.active:
            missing = -count % self._batch_size
            noise, classes = _padded(noise, 1, missing), _padded(classes, 0, missing)
        batches = zip(noise.split(self._batch_size, 1), classes.split(self._batch_size), strict=True)
        return torch.cat([self._draw(part, some) for part, some in batches])[:count]

    def _noise(self, count: int, random: torch.Generator) -> Tensor:
        """Standard normal [1 + churned steps, N, C, S, S]; the start first, so that it does not depend on the
        churn."""
        draws = 1 + (self._sampling.steps if self._sampling.churn else 0)
        return torch.randn(draws, count, *self._shape, generator=random, device=random.device).to(self.device)

    def _trajectory(self, noise: Tensor, classes: Tensor) -> Tensor:
        def denoiser(noisy: Tensor, sigma: float) -> Tensor:
            return self._guided(noisy, noisy.new_full((len(noisy),), sigma), classes)

        fresh = noise[1:] if self._sampling.churn else None
        return to_uint8(
            solve(denoiser, noise[0] * self._sampling.sigma_max, self._sampling, fresh)
        ).contiguous()

    def _guided(self, noisy: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """D without class + guidance (D with class - D without) (Ho and Salimans 2022, in terms of D)."""
        guidance, none = self._sampling.guidance, torch.full_like(classes, self.num_classes)
        if guidance in (0, 1):
            return self._denoise(noisy, sigma, classes if guidance else none)
        both = self._denoise(noisy.repeat(2, 1, 1, 1), sigma.repeat(2), torch.cat([classes, none]))
        return torch.lerp(both[len(noisy) :], both[: len(noisy)], guidance)

    def _denoise(self, noisy: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        return denoise(self._answer, noisy, sigma, classes, self._sigma_data)

    def _answer(self, images: Tensor, c_noise: Tensor, classes: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=self._half, enabled=self._half is not None):
            answer: Tensor = self._network(images, c_noise, classes)
        return answer


def half_precision(device: torch.device) -> torch.dtype | None:
    """The half-precision type in which drawing is fast on `device`, or None.

    Also on CPUs with AVX512-BF16 alone, where training is not worth it (see kr_ray.compute.devices): this
    network drew 1.14 times as many images as in float32 (median of 9 alternating rounds).
    """
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():  # private: there is no public query
        return torch.bfloat16
    return mixed_dtype(device)


def _padded(tensor: Tensor, dim: int, missing: int) -> Tensor:
    """`tensor` with `missing` zeros appended along `dim`."""
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
