"""A labelled synthetic set as Parquet: what it looks like there,
and a student's training on such a set alone.

Columns: `image`, Arrow's fixed-shape tensor of uint8 [C, H, W]; `soft_label`, fixed_size_list<float32>[K],
target probabilities; `label`, int64, the class of the largest. The schema's metadata holds JSON under
`kr_ray`: class names, generation parameters, seed, versions, and the number of images, so that a folder of
which a file is missing is found out.

pyarrow reads it as it is. Hugging Face `datasets` 5 does not know Arrow's tensor type and must be told the
columns' types:
`load_dataset("parquet", data_files=..., features=Features({"image": List(Value("uint8"), C * H * W)}))`,
and so on for the other columns.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kr_ray.data.checks import DataError
from kr_ray.data.images import Splits
from kr_ray.foreign.files import shown, what_lies_at
from kr_ray.foreign.parquet import parquet_files, read_table
from kr_ray.runs.artifacts import Json
from kr_ray.runs.storage import list_files
from kr_ray.synthesis.parquet_columns import METADATA_KEY, check_description, read_images, read_lists

if TYPE_CHECKING:  # students trained on a generator must not wait for it
    import pyarrow as pa

SUM_TOLERANCE = 1e-3
"""Of an image's target probabilities, whose sum is 1 but for rounding."""


def parquet_schema(image_shape: Sequence[int], classes: int, metadata: Json) -> pa.Schema:
    """Schema of a set of images [C, H, W] with `classes` classes; `metadata` is anything JSON can hold."""
    import pyarrow as pa

    versions = {name: importlib.metadata.version(name) for name in ("kr_ray", "torch", "pyarrow")}
    return pa.schema(
        [
            ("image", pa.fixed_shape_tensor(pa.uint8(), list(image_shape))),
            ("soft_label", pa.list_(pa.float32(), classes)),
            ("label", pa.int64()),
        ],
        metadata={METADATA_KEY: json.dumps(metadata | {"versions": versions})},
    )


def to_table(images: Tensor, targets: Tensor, schema: pa.Schema) -> pa.Table:
    """Images uint8 [N, C, H, W] and target probabilities float32 [N, K], of any
    device and memory layout, as rows of `schema`."""
    import pyarrow as pa

    images, targets = images.cpu(), targets.cpu()
    tensor = schema.field("image").type
    columns = [
        pa.ExtensionArray.from_storage(tensor, _fixed_size_lists(images)),
        _fixed_size_lists(targets),
        pa.array(targets.argmax(1).numpy()),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _fixed_size_lists(rows: Tensor) -> pa.FixedSizeListArray:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1).numpy()), rows[0].numel())


def read_parquet_set(path: Path, splits: Splits) -> tuple[Tensor, Tensor]:
    """Read a set, from one file or a folder of files in the order of their names.
    Of a folder only `.parquet` and `.pq` files are read.

    Images are tensors [C, H, W], lists of lists of this shape, flat lists of C * H * W numbers in this order,
    or image files in the column (what Hugging Face `datasets` calls Image). Shapes, row lengths and class
    names that a file holds are compared with those of the real images: nothing is reshaped, transposed or
    reordered.

    Args:
        path: local or in a store.
        splits: the real images; the set must have their size, channels and classes.

    Returns:
        Images uint8 [N, C, H, W] and target probabilities float32 [N, K].

    Raises:
        DataError: nothing there, no such set, not all of it, or one of other images or classes.
    """
    parts, expected = [], set[int]()
    for file in _files(path):
        table = read_table(file, DataError, ("image", "soft_label"))
        expected |= check_description(table.schema, splits.class_names, file)
        parts.append(_read_rows(table, splits, file))
    images, targets = (torch.cat(columns) for columns in zip(*parts, strict=True))
    if not len(images):
        raise DataError(f"{shown(path)} must hold images, but has no rows; export it again")
    if expected not in (set(), {len(images)}):
        said = " or ".join(map(str, sorted(expected)))
        raise DataError(
            f"`{said} images` (says its metadata) must be in {shown(path)}, but got {len(images)}; the set "
            "is not whole: export or copy it again"
        )
    return images, targets


def _files(path: Path) -> list[Path]:
    found = what_lies_at(path)
    if found == "":
        return [path]
    if found != "a folder":
        said = "does not exist" if found == "nothing there" else f"is {found}"
        raise DataError(
            "`student.from_parquet` must name a Parquet file or a folder of "
            f"such, but {shown(path)} {said}; correct it"
        )
    return parquet_files([entry.path for entry in list_files(path)], path, DataError)


def _read_rows(table: pa.Table, splits: Splits, file: Path) -> tuple[Tensor, Tensor]:
    """One file's images and targets, checked."""
    if missing := {"image", "soft_label"} - set(table.column_names):
        raise DataError(
            f"`columns image, soft_label` must be in {shown(file)}, but {', '.join(sorted(missing))} is not "
            "among its columns; give a set that `kr export` wrote"
        )
    shape = tuple(splits.train.images.shape[1:])
    images = read_images(table["image"].combine_chunks(), shape, file)
    targets = read_lists(table["soft_label"].combine_chunks(), (splits.num_classes,), "soft_label", file)
    if images.dtype != torch.uint8 or not targets.is_floating_point():
        raise DataError(
            f"`image` must hold uint8 and `soft_label` floats, but {shown(file)} "
            f"holds {images.dtype} and {targets.dtype}; convert them"
        )
    targets = targets.float()
    if not bool(
        ((targets >= 0).all(1) & ((targets.sum(1) - 1).abs() <= SUM_TOLERANCE)).all()
    ):  # also catches NaN
        raise DataError(
            "`soft_label` must be probabilities that sum to 1 in every row, "
            f"but {shown(file)} holds others; correct them"
        )
    return images, targets
