"""A labelled synthetic set as Parquet: what it looks like there, and a student's training on such a set alone.

Columns: `image`, Arrow's fixed-shape tensor of uint8 [C, H, W]; `soft_label`, fixed_size_list<float32>[K], target probabilities;
`label`, int64, the class of the largest. The schema's metadata holds JSON under `kr_ray`: class names, generation parameters, seed,
versions, and the number of images, so that a folder of which a file is missing is found out.

pyarrow reads it as it is. Hugging Face `datasets` 5 does not know Arrow's tensor type and must be told the columns' types:
`load_dataset("parquet", data_files=..., features=Features({"image": List(Value("uint8"), length=C * H * W), ...}))`.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kr_ray.data.checks import DataError
from kr_ray.data.images import Splits
from kr_ray.runs.storage import RemotePath

if TYPE_CHECKING:  # students trained on a generator must not wait for it
    import pyarrow as pa

METADATA_KEY = "kr_ray"
SUM_TOLERANCE = 1e-3
"""Of an image's target probabilities, whose sum is 1 but for rounding."""


def parquet_schema(image_shape: Sequence[int], classes: int, metadata: dict[str, Any]) -> pa.Schema:
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
    """Images uint8 [N, C, H, W] and target probabilities float32 [N, K], of any device and memory layout, as rows of `schema`."""
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

    Args:
        path: local or in a store.
        splits: the real images; the set must have their size, channels and classes.

    Returns:
        Images uint8 [N, C, H, W] and target probabilities float32 [N, K].

    Raises:
        DataError: nothing there, no such set, not all of it, or one of other images or classes.
    """
    table = _read(path)
    shape, classes = splits.train.images.shape[1:], splits.num_classes
    missing = {"image", "soft_label"} - set(table.column_names)
    if missing:
        raise DataError(
            f"`columns image, soft_label` must be in {path}, but {', '.join(sorted(missing))} is not among {table.column_names}; "
            "give a set that `kr export` wrote"
        )
    images = _rows(table, "image", shape.numel(), path).view(-1, *shape)
    targets = _rows(table, "soft_label", classes, path)
    if images.dtype != torch.uint8 or not targets.is_floating_point():
        raise DataError(
            f"`image` must hold uint8 and `soft_label` floats, but {path} holds {images.dtype} and {targets.dtype}; convert them"
        )
    targets = targets.float()
    sums = targets.sum(1)
    if not bool(((targets >= 0).all(1) & ((sums - 1).abs() <= SUM_TOLERANCE)).all()):  # also catches NaN
        raise DataError(f"`soft_label` must be probabilities that sum to 1 in every row, but {path} holds others; correct them")
    expected = json.loads((table.schema.metadata or {}).get(METADATA_KEY.encode(), b"{}")).get("images", len(images))
    if len(images) != expected:
        raise DataError(
            f"`{expected} images` (says its metadata) must be in {path}, but got {len(images)}; the set is not whole: "
            "export or copy it again"
        )
    return images, targets


def _read(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.dataset

    if not path.exists():
        raise DataError(
            f"`student.from_parquet` must name a Parquet file or a folder of such, but {path} does not exist; correct it"
        )
    remote = isinstance(path, RemotePath)
    try:
        found = pyarrow.dataset.dataset(
            path.key if isinstance(path, RemotePath) else str(path),
            format="parquet",
            filesystem=path.filesystem if isinstance(path, RemotePath) else None,
        )
        table = found.to_table()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} must hold Parquet files, but Arrow cannot read them ({error}); copy them again") from None
    if not table.num_rows:
        raise DataError(f"{path} must hold images, but has no rows{' (or is not there)' if remote else ''}; export it again")
    return table


def _rows(table: pa.Table, column: str, width: int, path: Path) -> Tensor:
    """A column of lists of `width` numbers each: [N, width]."""
    import pyarrow as pa

    chunks = table[column].combine_chunks()
    storage = chunks.storage if isinstance(chunks, pa.ExtensionArray) else chunks
    flat = storage.flatten() if hasattr(storage, "flatten") else storage
    if flat.null_count or len(flat) != table.num_rows * width or not hasattr(storage, "flatten"):
        raise DataError(
            f"`{width} numbers in every {column}` must hold for these real images, but {path} holds {table.schema.field(column).type}; "
            "give a set of images of the same size, channels and classes"
        )
    # np.array: Arrow's buffer is read-only, which torch warns of.
    return torch.from_numpy(flat.to_numpy(zero_copy_only=False).copy()).view(table.num_rows, width)
