"""Random Fourier features of images, and their one noisy release."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import DpMerfConfig
from kr_ray.data.images import LabelledImages
from kr_ray.dp.noise import NoiseKey
from kr_ray.runs.artifacts import holding, load_tensors, save_tensors

AUTHORS_VARIANCE, AUTHORS_VALUES = 127.0, 784
"""Kernel variance for Fashion-MNIST's 28 x 28 grey values (published code); squared distances grow with the
number of values."""
ROUNDING = 1 + 1e-5
"""Features of float32 have norm 1 up to 1e-6: the noise is made so much larger, so that rounding breaks no
bound."""
AT_ONCE = 1000


@dataclass(frozen=True)
class RandomFeatures:
    """phi(x) of norm 1 with phi(x) phi(y) ~ exp(-|x - y|^2 / (2 variance)) (Rahimi and Recht 2007).

    Attributes:
        frequencies: float32 [values, features / 2], from N(0, 1/variance); public.
    """

    frequencies: Tensor

    @classmethod
    def draw(cls, values: int, section: DpMerfConfig, seed: int) -> RandomFeatures:
        """Features for images of `values` = C * H * W numbers."""
        variance = section.kernel_variance or AUTHORS_VARIANCE * values / AUTHORS_VALUES
        random = seeded_generator(seed, "random features")
        return cls(torch.randn(values, section.random_features // 2, generator=random) / math.sqrt(variance))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels float32 [N, C, H, W] in [0, 1] -> features float32 [N, features], each row of norm 1."""
        angles = pixels.flatten(1) @ self.frequencies
        return torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(self.frequencies.shape[1])


@dataclass(frozen=True)
class Embedding:
    """All that anybody learns of the private images.

    Attributes:
        means: float32 [features, K], noisy mean features of every class.
        prior: float64 [K], noisy class frequencies, summing to 1.
        shape: (C, H, W) of an image; public.
    """

    means: Tensor
    prior: Tensor
    shape: tuple[int, int, int]

    def save(self, path: Path) -> None:
        save_tensors(path, {"means": self.means, "prior": self.prior}, {"shape": list(self.shape)})

    @classmethod
    def load(cls, path: Path) -> Embedding:
        """Read what `save` wrote.

        Raises:
            kr_ray.runs.artifacts.ArtifactError: the file is missing or broken.
        """
        tensors, metadata = load_tensors(path)
        with holding(path, "a released embedding"):
            channels, height, width = metadata["shape"]
            return cls(tensors["means"], tensors["prior"], (channels, height, width))


def release_embedding(
    images: LabelledImages,
    num_classes: int,
    features: RandomFeatures,
    noise_multiplier: float,
    prior_share: float,
    key: NoiseKey,
) -> Embedding:
    """The one Gaussian release of noise multiplier z: sum of phi(x) e_y and of e_y over all images, each with
    its noise.

    Under zero-out one image changes either sum by a vector of norm 1. With precision 1/z^2 shared out between
    them, together they are one Gaussian of multiplier z. Classes whose noisy count is below 1 get no images.

    Args:
        images: the private ones.
        noise_multiplier: z.
        prior_share: of the precision, for the class counts.
        key: of the noise.
    """
    width = 2 * features.frequencies.shape[1]
    sums = torch.zeros(width, num_classes, dtype=torch.float64)
    for start in range(0, len(images), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        pixels, labels = images.images[part].float() / 255, images.labels[part]
        sums.index_add_(1, labels, features(pixels).double().T)
    counts = torch.bincount(images.labels, minlength=num_classes).double()
    scale = noise_multiplier * ROUNDING
    sums += scale / math.sqrt(1 - prior_share) * key.gaussian(sums.shape, "features")
    counts += scale / math.sqrt(prior_share) * key.gaussian(counts.shape, "counts")
    kept = counts >= 1
    if not kept.any():  # the noise has swallowed everything
        counts, kept = torch.ones_like(counts), torch.ones_like(kept)
    counts = torch.where(kept, counts, 0.0)
    means = sums / counts.clamp(min=1)
    _, channels, height, breadth = images.images.shape
    return Embedding(means.float(), counts / counts.sum(), (channels, height, breadth))
