"""Labelled images that are found and checked but not yet read at their
final size, and how to take a share of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kr_ray.data.checks import DataError, check_images, check_labels


@dataclass(frozen=True)
class Pool:
    """Some labelled images. Only those that are used get read and resized.

    Attributes:
        labels: int64, [N].
        read: (index int64 [M], image_size) -> images uint8 [M, C, image_size, image_size].
        origin: file, folder or array they come from, for errors.
        names: of the images, [N], such as `class/file.png`; empty = they have none but their numbers.
    """

    labels: Tensor
    read: Callable[[Tensor, int], Tensor]
    origin: str
    names: tuple[str, ...] = ()

    def sources(self, index: Tensor) -> tuple[str, ...]:
        """Names of the images at `index` (int64 [M]), or their numbers, from 0."""
        return tuple(self.names[k] if self.names else str(k) for k in index.tolist())


@dataclass(frozen=True)
class PoolSet:
    """A data set as found. A split that is None is taken off the training pool.

    Attributes:
        validation_images: size of a validation split to be taken off; 0 = by the configured share.
    """

    class_names: tuple[str, ...]
    train: Pool
    validation: Pool | None = None
    test: Pool | None = None
    validation_images: int = 0


def array_pool(images: NDArray[Any], labels: NDArray[Any], origin: str) -> Pool:
    """Check a pair of arrays (see `check_images`, `check_labels`) and hold them as a pool.

    Raises:
        DataError: either array is refused, or their lengths differ.
    """
    pixels = check_images(images, f"{origin}_images")
    return Pool(
        check_labels(labels, len(pixels), f"{origin}_labels"),
        lambda index, size: resize(pixels[index], size),
        origin,
    )


def resize(images: Tensor, image_size: int) -> Tensor:
    """Bilinear, antialiased, in float32, rounded to the nearest: Pillow's BILINEAR in floating point.

    Images that are not square are squeezed to a square.

    Args:
        images: uint8, [N, C, H, W].

    Returns:
        uint8, [N, C, image_size, image_size].
    """
    if images.shape[2:] == (image_size, image_size):
        return images.contiguous()
    resized = torch.empty(*images.shape[:2], image_size, image_size, dtype=torch.uint8)
    # Some 16 MB of float32 at a time: a whole set in float32 would take four times its own memory.
    step = max(1, 2**22 // max(images[:1].numel(), resized[:1].numel(), 1))
    for start in range(0, len(images), step):
        piece = images[start : start + step].contiguous().float()  # one memory layout, so one kernel
        piece = functional.interpolate(
            piece, (image_size, image_size), mode="bilinear", align_corners=False, antialias=True
        )
        resized[start : start + step] = piece.round_().clamp_(0, 255).to(torch.uint8)
    return resized


def stratified_index(labels: Tensor, size: int, seed: Sequence[int], leave: int = 0) -> Tensor:
    """Choose `size` images in the classes' proportions.

    Class sizes are rounded by largest remainder; every class gives at least
    one image where `size` and `leave` allow it.

    Args:
        labels: int64, [N].
        seed: of the numpy Generator that draws within the classes.
        leave: images of every class that are never taken.

    Returns:
        int64, [size], ascending.

    Raises:
        DataError: fewer than `size` images may be taken.
    """
    classes, counts = np.unique(labels.numpy(), return_counts=True)
    quota = _allocate(counts, size, leave)
    rng = np.random.default_rng(seed)
    taken = [
        rng.permutation(np.flatnonzero(labels.numpy() == k))[:n] for k, n in zip(classes, quota, strict=True)
    ]
    return torch.from_numpy(np.sort(np.concatenate(taken)).astype(np.int64))


def _allocate(counts: NDArray[np.int64], size: int, leave: int) -> NDArray[np.int64]:
    high = np.maximum(counts - leave, 0)
    if size > high.sum():
        raise DataError(
            f"`images to take <= {high.sum()}` must hold to leave {leave} of each of {len(counts)} classes, "
            f"but got {size} of {counts.sum()} images; add images or lower the share"
        )
    low = np.minimum(high, 1)
    if low.sum() > size:
        low = np.zeros_like(high)
    exact = counts * (size / counts.sum())
    quota: NDArray[np.int64] = np.clip(np.floor(exact).astype(np.int64), low, high)
    while quota.sum() < size:
        quota[np.argmax(np.where(quota < high, exact - quota, -np.inf))] += 1
    while quota.sum() > size:
        quota[np.argmin(np.where(quota > low, exact - quota, np.inf))] -= 1
    return quota
