"""What the network is asked, and its loss: EDM's Table 1 (last column), section 5 and appendix B.6 (Karras et
al. 2022).

The denoiser D(x; sigma) is the images' mean given x = image + sigma * noise. It is c_skip x + c_out F(c_in
x; c_noise), so that the network F has inputs and targets of unit variance at every noise level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""F: images float32 [N, C, S, S], c_noise float32 [N], classes int64 [N] -> [N, C, S, S], any float type."""


class Coefficients(NamedTuple):
    """Of D(x; sigma) = skip x + out F(into x; noise); each of sigma's shape."""

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor


def coefficients(sigma: Tensor, sigma_data: float) -> Coefficients:
    """EDM's Table 1, rows c_skip, c_out, c_in and c_noise.

    Args:
        sigma: noise levels > 0, float.
        sigma_data: std of the images' pixels.
    """
    total = sigma.square() + sigma_data**2
    return Coefficients(
        skip=sigma_data**2 / total,
        out=sigma * sigma_data * total.rsqrt(),
        into=total.rsqrt(),
        noise=sigma.log() / 4,
    )


def denoise(network: Network, noisy: Tensor, sigma: Tensor, classes: Tensor, sigma_data: float) -> Tensor:
    """D(x; sigma) (equation 7).

    Args:
        noisy: images + noise, float32 [N, C, S, S].
        sigma: float32 [N].
        classes: int64 [N].
    """
    skip, out, into, noise = coefficients(sigma[:, None, None, None], sigma_data)
    return skip * noisy + out * network(into * noisy, noise.flatten(), classes).float()


def loss(
    network: Network, images: Tensor, noise: Tensor, sigma: Tensor, classes: Tensor, sigma_data: float
) -> Tensor:
    """Mean over pixels and images of lambda(sigma) (D(image + sigma noise; sigma) - image)^2 (equation 2,
    Table 1).

    lambda = 1 / c_out^2, so that it is the squared error of F against (image - c_skip x) / c_out (equation
    8). With x = image + sigma noise that target is (sigma / sigma_data image - sigma_data noise) /
    sqrt(sigma^2 + sigma_data^2), which is computed here because the first form loses all digits as sigma
    falls.

    Args:
        images: float32 [N, C, S, S] in [-1, 1].
        noise: standard normal, as `images`.
        sigma: float32 [N].
        classes: int64 [N].
    """
    return _errors(network, images, noise, sigma, classes, sigma_data).mean()


def losses(
    network: Network, images: Tensor, noise: Tensor, sigma: Tensor, classes: Tensor, sigma_data: float
) -> Tensor:
    """`loss` of each image: float32 [N]."""
    return _errors(network, images, noise, sigma, classes, sigma_data).mean(dim=(1, 2, 3))


def _errors(
    network: Network, images: Tensor, noise: Tensor, sigma: Tensor, classes: Tensor, sigma_data: float
) -> Tensor:
    """Squared, weighted, of every pixel."""
    wide = sigma[:, None, None, None]
    level = coefficients(wide, sigma_data)
    target = level.into * (wide / sigma_data * images - sigma_data * noise)
    answer = network(level.into * (images + wide * noise), level.noise.flatten(), classes)
    return (answer.float() - target).square()


def noise_levels(normal: Tensor, mean: float, std: float) -> Tensor:
    """Training's sigma from standard normal numbers: ln sigma ~ N(`mean`, `std`^2) (Table 1, noise
    distribution)."""
    return (normal * std + mean).exp()


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1], same shape."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Float images, meant to lie in [-1, 1], -> uint8, rounded and clipped, same shape. Inverse of
    `from_uint8`."""
    return (images.float() * 127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def pixel_std(images: Tensor) -> float:
    """sigma_data: std of all pixels of uint8 images [N, C, H, W] on the scale of [-1, 1]; at least 0.01,
        for blank images.

    From integer sums, so that it does not depend on the device or the order.
    """
    counts = torch.bincount(images.flatten().long(), minlength=256).double().cpu()
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean = (counts @ values) / counts.sum()
    return max(((counts @ (values - mean).square()) / counts.sum()).sqrt().item(), 0.01)
