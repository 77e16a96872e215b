"""Differentiable siamese augmentation (Zhao & Bilen, "Dataset Condensation with Differentiable Siamese
Augmentation", ICML 2021, section 3.2 and appendix).

At every step one operation is drawn, and its random numbers. Applied with the same numbers to real and
distilled images it is siamese: what it does to the one it does to the other, and gradients flow back through
it into the pixels. Strengths are the authors'. Images are standardised (mean 0), so that what comes in from
outside the frame, zero, is the data's mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SCALE, ROTATION, CROP, CUTOUT = 1.2, math.radians(15), 0.125, 0.5
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
NUMBERS = 3
"""Random numbers of an operation, at most."""


@dataclass(frozen=True)
class Augmentation:
    """One operation with its random numbers.

    Attributes:
        operation: of `OPERATIONS`; empty: none.
        numbers: float32 [1, 3] (the same for all images) or [N, 3], uniform in [0, 1).
    """

    operation: str
    numbers: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Standardised float images [N, C, H, W] -> the same shape."""
        if not self.operation:
            return images
        return OPERATIONS[self.operation](images, self.numbers.to(images.device))


def operations(flip: bool) -> tuple[str, ...]:
    """All, but for the mirror image where it would be of another class (digits)."""
    return tuple(name for name in OPERATIONS if flip or name != "flip")


def draw(names: Sequence[str], random: torch.Generator, images: int = 1) -> Augmentation:
    """One of the operations called `names` (none: the images stay as they are).

    Args:
        random: on the CPU.
        images: of how many images each gets its own numbers; 1: all get the same, as siamese ones must.
    """
    if not names:
        return Augmentation("", torch.zeros(1, NUMBERS))
    name = names[int(torch.randint(len(names), (), generator=random))]
    return Augmentation(name, torch.rand(images, NUMBERS, generator=random))


def _color(images: Tensor, numbers: Tensor) -> Tensor:
    brightness, saturation, contrast = (part[:, :, None, None] for part in numbers.split(1, dim=1))
    images = images + (brightness - 0.5) * BRIGHTNESS
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (saturation * SATURATION) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + CONTRAST) + mean


def _crop(images: Tensor, numbers: Tensor) -> Tensor:
    """Shifted by up to an eighth of a side."""
    count, channels, height, width = images.shape
    rows = _shifted(height, numbers[:, 0])
    columns = _shifted(width, numbers[:, 1])
    # One pixel of zeros around; whatever comes from outside the frame is taken from there.
    padded = functional.pad(images, (1, 1, 1, 1))
    row_index = (rows + 1).clamp(0, height + 1)[:, None, :, None].expand(count, channels, height, width + 2)
    column_index = (columns + 1).clamp(0, width + 1)[:, None, None, :].expand(count, channels, height, width)
    return padded.gather(2, row_index).gather(3, column_index)


def _shifted(side: int, uniform: Tensor) -> Tensor:
    """Where the pixels of a side come from, int64 [N or 1, side], some of them outside."""
    most = round_half_up(side * CROP)
    shift = (uniform * (2 * most + 1)).long() - most
    return shift[:, None] + torch.arange(side, device=uniform.device)


def round_half_up(value: float) -> int:
    return int(value + 0.5)


def _cutout(images: Tensor, numbers: Tensor) -> Tensor:
    """A square of half a side becomes zero."""
    hidden = []
    for k, side in enumerate(images.shape[-2:]):
        size = round_half_up(side * CUTOUT)
        first = (numbers[:, k] * (side + 1 - size % 2)).long() - size // 2
        place = torch.arange(side, device=images.device) - first[:, None]
        hidden.append((place >= 0) & (place < size))
    square = hidden[0][:, None, :, None] & hidden[1][:, None, None, :]
    return images * ~square


def _flip(images: Tensor, numbers: Tensor) -> Tensor:
    return torch.where(numbers[:, 0, None, None, None] < 0.5, images.flip(3), images)


def _scale(images: Tensor, numbers: Tensor) -> Tensor:
    factors = numbers[:, :2] * (SCALE - 1 / SCALE) + 1 / SCALE
    return _affine(images, torch.diag_embed(factors))


def _rotate(images: Tensor, numbers: Tensor) -> Tensor:
    angle = (2 * numbers[:, 0] - 1) * ROTATION
    cosine, sine = angle.cos(), angle.sin()
    return _affine(images, torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2))


def _affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Maps of the coordinates, float [N or 1, 2, 2], about the centre."""
    theta = functional.pad(matrix, (0, 1)).expand(len(images), 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=True)
    return functional.grid_sample(images, grid, align_corners=True)


OPERATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
