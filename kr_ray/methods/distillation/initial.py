"""What the distilled images start as, and which private images that were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import DataConfig
from kr_ray.config.distillation import DistillationSection
from kr_ray.data.checks import DataError
from kr_ray.data.datasets import load_splits
from kr_ray.methods.distillation.sets import RealImages


@dataclass(frozen=True)
class Initial:
    """The first images, class by class.

    Attributes:
        images: standardised float32 [M, C, H, W].
        labels: int64 [M], ascending.
        position: int64 [M], in the training split; -1: no private image.
    """

    images: Tensor
    labels: Tensor
    position: Tensor


def first_images(
    section: DistillationSection, real: RealImages, canaries: Sequence[int], seed: int
) -> Initial:
    """`images_per_class` images of every class, from nothing but `seed` and the arguments.

    Args:
        canaries: positions in the training split of the audit's canaries.

    Raises:
        DataError: a class has fewer private images than are asked for, or the public set cannot be read.
    """
    count, classes = section.images_per_class, len(real.by_class)
    if empty := [label for label, own in enumerate(real.by_class) if not len(own)]:
        raise DataError(
            "`every class has a training image` must hold for a distillation, but got none of the classes "
            f"{empty}; leave these classes out"
        )
    labels = torch.arange(classes).repeat_interleave(count)
    nobody = torch.full_like(labels, -1)
    if section.initialisation == "real":
        forced = forced_canaries(canaries, section.initial_canaries, seed)
        position = torch.cat(
            [_of_class(label, own, count, forced, seed) for label, own in enumerate(real.by_class)]
        )
        return Initial(real.at(position), labels, position)
    if section.ood is not None:
        return Initial(_public_images(section.ood, real, len(labels), seed), labels, nobody)
    shape = (len(labels), *real.images.shape[1:])
    noise = torch.randn(shape, generator=seeded_generator(seed, "initial noise"))
    return Initial(noise.to(real.images.device), labels, nobody)


def forced_canaries(canaries: Sequence[int], share: float, seed: int) -> Tensor:
    """The canaries that must be among the first images, int64 positions in the order of their turn."""
    order = torch.randperm(len(canaries), generator=seeded_generator(seed, "initial canaries"))
    return torch.tensor(list(canaries), dtype=torch.int64)[order[: round(share * len(canaries))]]


def _of_class(label: int, own: Tensor, count: int, forced: Tensor, seed: int) -> Tensor:
    """Positions of `count` images of a class, the forced ones first."""
    if len(own) < count:
        raise DataError(
            f"`images_per_class <= {len(own)}` (the images of class {label}) must hold with initialisation: "
            f"real, but got {count}; lower it, or use initialisation: noise"
        )
    first = forced[torch.isin(forced, own)][:count]
    rest = own[~torch.isin(own, first)]
    order = torch.randperm(len(rest), generator=seeded_generator(seed, "initial images", label))
    return torch.cat([first, rest[order[: count - len(first)]]])


def _public_images(config: DataConfig, real: RealImages, count: int, seed: int) -> Tensor:
    """Images of a public set, each at most once as far as there are enough, in the private set's shape."""
    _, channels, side, _ = real.images.shape
    found = load_splits(config.model_copy(update={"image_size": side})).train.images
    order = torch.randperm(len(found), generator=seeded_generator(seed, "initial public images"))
    index = order.repeat(-(-count // len(order)))[:count]
    return real.units.from_bytes(in_channels(found[index], channels).to(real.images.device))


def in_channels(images: Tensor, channels: int) -> Tensor:
    """uint8 images [N, C, H, W] with so many channels: grey repeated, or the mean of the colours."""
    if images.shape[1] == channels:
        return images
    if channels == 1:
        return images.float().mean(1, keepdim=True).round().to(torch.uint8)
    return images.expand(-1, channels, -1, -1)
