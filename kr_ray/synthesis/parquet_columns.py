"""Columns of a Parquet set as tensors, and what a file says of itself:
compared with the real images, never bent to fit them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kr_ray.data.checks import DataError
from kr_ray.foreign.files import shown
from kr_ray.foreign.images import read_image_bytes

if TYPE_CHECKING:
    import pyarrow as pa

METADATA_KEY = "kr_ray"
HUGGING_FACE_KEY = "huggingface"
"""Under which `datasets` describes the columns, in JSON."""
FIT = "give a set of images of the same size, channels and classes"


# --- what a file says of itself -----------------------------------------------------------------------------


def check_description(schema: pa.Schema, class_names: Sequence[str], file: Path) -> set[int]:
    """Compare the class names in a file's metadata, and return the
    number of images that its set has (or nothing).

    Raises:
        DataError: other names or another order, or metadata that cannot be read.
    """
    metadata = schema.metadata or {}
    described = _own_description(metadata.get(METADATA_KEY.encode(), b"{}"), file)
    for names in (
        described.class_names,
        _hugging_face_names(metadata.get(HUGGING_FACE_KEY.encode(), b"{}")),
    ):
        if names is not None and list(names) != list(class_names):
            raise DataError(
                f"`class names {_few(class_names)}` (of the real images) must be those of "
                f"{shown(file)}, but got {_few(names)}; put the columns of soft_label into "
                "that order, or give a set of these classes"
            )
    return set() if described.images is None else {described.images}


@dataclass(frozen=True)
class _Description:
    """What `kr export` wrote of a set, as far as it is compared; None where it does not say."""

    class_names: list[str] | None = None
    images: int | None = None


def _own_description(text: bytes, file: Path) -> _Description:
    rule = f"`metadata {METADATA_KEY}` of {shown(file)} must be what `kr export` wrote"
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{rule}, but it is not JSON; export or copy the set again") from error
    if not isinstance(described, dict):
        raise DataError(f"{rule}, but it is no mapping; export or copy the set again")
    names, images = described.get("class_names", []), described.get("images", 0)
    if not _is_names(names) or type(images) is not int:
        raise DataError(
            f"{rule}, but class_names or images are of another kind; export or copy the set again"
        )
    return _Description(described.get("class_names"), described.get("images"))


def _is_names(names: object) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _hugging_face_names(text: bytes) -> list[str] | None:
    """Names of the classes of `label`; None where `datasets` gives none, or the text is somebody else's."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    for key in ("info", "features", "label", "names"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if _is_names(found) else None


def _few(names: Sequence[str]) -> str:
    return ", ".join([*map(shown, names[:10]), *(["..."] if len(names) > 10 else [])])


# --- columns ------------------------------------------------------------------------------------------------


def read_images(column: pa.Array, shape: tuple[int, ...], file: Path) -> Tensor:
    """Images [N, C, H, W] of tensors, lists or image files; uint8, or what the lists hold.

    Raises:
        DataError: images of another shape than `shape` ([C, H, W]), rows
            without one, or image files that are refused.
    """
    import pyarrow as pa

    kind = column.type
    if isinstance(kind, pa.FixedShapeTensorType):
        found = tuple(kind.shape)
        if found != shape or list(kind.permutation or range(len(found))) != list(range(len(found))):
            raise DataError(
                f"`image` must be a tensor [channels, height, width] = {list(shape)}, but {shown(file)} "
                "holds "
                f"{list(found)}{f' in the order {list(kind.permutation)}' if kind.permutation else ''}; "
                f"{'transpose it' if sorted(found) == sorted(shape) else FIT}"
            )
        return _numbers(column.storage, shape, (prod(shape),), "image", file)
    if isinstance(column, pa.ExtensionArray):  # such as the Array3D of `datasets`, if that is loaded
        column, kind = column.storage, column.storage.type
    if pa.types.is_struct(kind) and {field.name for field in kind} >= {"bytes"}:
        return _image_files(column, shape, file)
    return read_lists(column, shape, "image", file)


def read_lists(column: pa.Array, shape: tuple[int, ...], name: str, file: Path) -> Tensor:
    """Flat lists of prod(shape) numbers, or lists of lists of that shape: [N, *shape].

    Raises:
        DataError: other lengths anywhere, empty cells, or no numbers.
    """
    depth, kind = 0, column.type
    while hasattr(kind, "value_type") and hasattr(column, "flatten"):
        depth, kind = depth + 1, kind.value_type
        if depth > len(shape):
            break
    lengths = shape if depth == len(shape) else (prod(shape),)
    return _numbers(column, shape, lengths, name, file)


def _numbers(
    column: pa.Array, shape: tuple[int, ...], lengths: tuple[int, ...], name: str, file: Path
) -> Tensor:
    """Lists of the given lengths, from the outermost to the innermost, as one tensor [N, *shape]."""
    import pyarrow as pa
    import pyarrow.compute as compute

    rows, kind, level = len(column), column.type, column
    for length in lengths:
        is_list = any(
            test(level.type)
            for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        )
        found = (
            compute.list_value_length(level).unique().to_pylist() if is_list and not level.null_count else []
        )
        if found not in ([], [length]) or not is_list or level.null_count:
            sizes = f" with {', '.join(map(str, sorted(found)[:5]))} of them" if found else ""
            raise DataError(
                f"`{' x '.join(map(str, lengths))} numbers in every {name}` must hold for these real "
                f"images, but {shown(file)} holds "
                f"{shown(str(kind))}{sizes}{' and empty cells' * bool(level.null_count)}; {FIT}"
            )
        level = level.flatten()
    if level.null_count or not (pa.types.is_integer(level.type) or pa.types.is_floating(level.type)):
        raise DataError(
            f"`{name}` must hold numbers, but {shown(file)} holds "
            f"{shown(str(kind))}{' and empty cells' * bool(level.null_count)}; {FIT}"
        )
    # A copy: Arrow's buffer is read-only, which torch warns of.
    return torch.from_numpy(np.array(level.to_numpy(zero_copy_only=False))).view(rows, *shape)


def _image_files(column: pa.Array, shape: tuple[int, ...], file: Path) -> Tensor:
    """Image files in a column `bytes`, as `datasets` keeps them: uint8 [N, C, H,
    W], decoded as a folder's images are, not resized."""
    images = torch.empty(len(column), *shape, dtype=torch.uint8)
    for row, data in enumerate(column.field("bytes").to_pylist()):
        origin = f"row {row} of `image` in {shown(file)}"
        if not isinstance(data, bytes):
            raise DataError(
                f"{origin} must hold the bytes of an image file, but got none; write the images themselves "
                "into the set (datasets: embed_external_files)"
            )
        pixels = torch.from_numpy(read_image_bytes(data, origin, DataError))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        if tuple(pixels.shape) != shape:
            raise DataError(
                f"{origin} must be [channels, height, width] = "
                f"{list(shape)}, but got {list(pixels.shape)}; {FIT}"
            )
        images[row] = pixels
    return images
