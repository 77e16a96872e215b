"""Parquet files as Arrow tables; in a folder only what is called .parquet
or .pq counts, so that a README may lie there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kr_ray.foreign.files import check_file, decoding, shown

if TYPE_CHECKING:  # whoever reads no Parquet must not wait for Arrow
    import pyarrow as pa

MUST = "must be a complete Parquet file"
SUFFIXES = (".parquet", ".pq")


def is_parquet_name(path: Path) -> bool:
    """Whether a file is called Parquet, in capital letters or small ones."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith((".", "_"))


def parquet_files(files: Sequence[Path], folder: Path, error: type[Exception]) -> list[Path]:
    """Those of a folder's `files` that are Parquet, by name.

    Raises:
        error: there is none.
    """
    found = sorted(file for file in files if is_parquet_name(file))
    if not found:
        others = ", ".join(shown(file.name) for file in sorted(files)[:5]) or "no file"
        raise error(
            f"`{shown(folder)}` must hold Parquet files ({', '.join(SUFFIXES)}), but got {others}; correct "
            "the path, or export the set again"
        )
    return found


def read_table(path: Path, error: type[Exception], columns: Sequence[str] | None = None) -> pa.Table:
    """A file's columns, all or (as far as they are there) those named.

    Raises:
        error: no such file, or Arrow cannot read it.
    """
    check_file(path, MUST, error)
    import pyarrow.parquet

    with decoding(path, MUST, ("parquet",), error, "copy or export it again"), path.open("rb") as file:
        opened = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        names = opened.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError("two columns have one name")
        table: pa.Table = opened.read(
            None if columns is None else [name for name in columns if name in names]
        )
        table.validate(full=True)
    return table
