"""What images and labels must satisfy before any work starts; every refusal names rule, values and remedy."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kr_ray.foreign.files import check_file
from kr_ray.foreign.npz import listed, read_arrays


class DataError(ValueError):
    """The data cannot be used. The message gives the rule, the values found and the remedy."""


def verify_md5(path: Path, md5: str) -> None:
    """Compare a public file with the checksum its library publishes.

    Raises:
        DataError: the file is damaged, truncated or another one; it is left as it is.
    """
    check_file(path, "must be readable", DataError, "delete it")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(
            f"`{path}` must be readable, but got {error}; correct its permissions or delete it"
        ) from error
    if found != md5:
        raise DataError(
            f"`md5({path}) == {md5}` must hold, but got {found} ({path.stat().st_size} bytes); "
            "the file is truncated, damaged or not the official one: delete it and run again "
            "with download: true, or copy the official file there"
        )


def read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The arrays named by `keys`. Never unpickles.

    Raises:
        DataError: no such file, not a (complete) .npz, keys missing, or Python objects instead of numbers.
    """
    names, arrays = read_arrays(path, DataError, keys)
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise DataError(
            f"`{path}` must hold the arrays {', '.join(keys)}, but got {listed(names)}; add "
            f"{', '.join(missing)} with numpy.savez"
        )
    return arrays


def check_images(images: NDArray[Any], origin: str) -> Tensor:
    """Images as uint8 [N, C, H, W] (a view where possible).

    Args:
        images: [N, H, W] or [N, H, W, C], C in {1, 3}; uint8, or float in [0, 1], which is scaled by 255.
        origin: what to call the array in an error.

    Raises:
        DataError: wrong shape, type or range, NaN or infinity.
    """
    grey = images.ndim == 3
    if not grey and (images.ndim != 4 or images.shape[3] not in (1, 3)):
        raise DataError(
            f"`{origin}` must be [N, H, W] or [N, H, W, C] with 1 or 3 channels last, but got shape "
            f"{images.shape}; transpose or convert it"
        )
    if 0 in images.shape:
        raise DataError(f"`{origin}` must hold at least one image, but got shape {images.shape}; add images")
    if images.dtype.kind == "f":
        images = _float_to_uint8(images, origin)
    if images.dtype != np.uint8:
        raise DataError(
            f"`{origin}` must be uint8 (0 to 255), but got {images.dtype}; scale "
            "to 0 to 255 and convert with .astype('uint8')"
        )
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    return tensor[:, None] if grey else tensor.permute(0, 3, 1, 2)


def _float_to_uint8(images: NDArray[Any], origin: str) -> NDArray[np.uint8]:
    bad = images.size - int(np.isfinite(images).sum())
    if bad:
        raise DataError(
            f"`{origin}` must be finite, but got {bad} NaN or infinite pixels of "
            f"{images.size}; repair or leave out those images"
        )
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise DataError(
            f"`{origin}` in floating point must lie in [0, 1], but got {low:g} to {high:g}; divide by its "
            "maximum, or save uint8 in 0 to 255"
        )
    return np.rint(images.astype(np.float64) * 255).astype(np.uint8)


def check_labels(labels: NDArray[Any], images: int, origin: str) -> Tensor:
    """Labels as int64 [N], all >= 0.

    Args:
        labels: integers, [N] or [N, 1] (MedMNIST's shape).
        images: how many images they belong to.
        origin: what to call the array in an error.

    Raises:
        DataError: several labels per image, not integers, negative, or another number than images.
    """
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise DataError(
            f"`{origin}` must hold one label per image, but got shape {labels.shape}; multi-label data is "
            "not supported (one-hot labels: save .argmax(axis=1))"
        )
    if labels.ndim not in (1, 2):
        raise DataError(f"`{origin}` must be [N] or [N, 1], but got shape {labels.shape}; reshape it")
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"`{origin}` must be integers, but got {labels.dtype}; number the "
            "classes 0, 1, 2, ... and save .astype('int64')"
        )
    labels = labels.reshape(-1)
    if len(labels) != images:
        raise DataError(
            f"`{origin}` must hold one label per image, but got {len(labels)} "
            f"labels and {images} images; save matching arrays"
        )
    if len(labels) and (labels.min() < 0 or labels.max() > np.iinfo(np.int32).max):
        raise DataError(
            f"`{origin}` must lie in 0 to 2147483647, but got {labels.min()} to "
            f"{labels.max()}; number the classes 0, 1, 2, ..."
        )
    return torch.from_numpy(labels.astype(np.int64))


def check_classes(labels: Tensor, class_names: tuple[str, ...], origin: str, *, training: bool) -> None:
    """At least two classes, every label among them, and none empty in the training split.

    Args:
        labels: int64, [N], >= 0.

    Raises:
        DataError: with the labels or classes concerned.
    """
    count = len(class_names)
    if count < 2:
        raise DataError(
            f"`number of classes >= 2` must hold, but got {count} in "
            f"{origin}; a classifier needs at least two"
        )
    present = torch.unique(labels)
    if len(present) and int(present[-1]) >= count:
        raise DataError(
            f"`label < {count}` (the number of classes) must hold, but got label {int(present[-1])} in "
            f"{origin}; correct the label, or add training images of that class"
        )
    if training and len(present) < count:
        held = set(present.tolist())
        empty = [
            f"{k} ({name})" if str(k) != name else name for k, name in enumerate(class_names) if k not in held
        ]
        raise DataError(
            f"`every class has a training image` must hold, but got none in {origin} for class "
            f"{', '.join(empty[:10])}{', ...' if len(empty) > 10 else ''}; add images, or remove the class "
            "and number the others 0, 1, 2, ..."
        )
