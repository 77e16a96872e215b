""".npz files: plain arrays, never unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr_ray.foreign.files import FETCH, contents_of, decoding, shown

MUST = "must be a complete .npz file"
UNNAMED = "one array without a name"
LISTED_NAMES = 12


def read_arrays(
    path: Path, error: type[Exception], keys: Collection[str] | None = None, remedy: str = FETCH
) -> tuple[list[str], dict[str, NDArray[Any]]]:
    """Names of all arrays, and those named by `keys` (all if None).

    `remedy` is given where the file's contents do not name a better one. A file with a single array (.npy) is given as one array of the name `UNNAMED`.

    Raises:
        error: no such file, not a (complete) .npz, or Python objects instead of numbers.
    """
    with decoding(path, MUST, ("zip", "npy"), error, remedy):
        if contents_of(path).kind == "npy":
            return [UNNAMED], {}
        with path.open("rb") as opened, zipfile.ZipFile(opened) as members:
            names = [shown(name.removesuffix(".npy")) for name in members.namelist()]
            wanted = [name for name in members.namelist() if keys is None or name.removesuffix(".npy") in keys]
            return names, {name.removesuffix(".npy"): _member(members, name, path, error) for name in wanted}


def _member(members: zipfile.ZipFile, name: str, path: Path, error: type[Exception]) -> NDArray[Any]:
    """One array.

    Raises:
        error: it holds Python objects.
        numpy's, zip's and zlib's errors: it is damaged.
    """
    with members.open(name) as file:
        try:
            array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as cause:
            if "Object arrays" not in str(cause):
                raise
            raise error(
                f"`{shown(path)}` must hold arrays of numbers, but got Python objects, which are never unpickled, in "
                f"{shown(name.removesuffix('.npy'))}; bring its rows to one shape and save an array of numbers"
            ) from cause
        if file.read(1):  # only reading to the end makes zip compare the checksum
            raise ValueError("bytes after the array")
    return array


def listed(names: Collection[str]) -> str:
    """Names in a message, in their order: not more than a dozen."""
    few = [shown(name) for name in list(names)[:LISTED_NAMES]]
    return ", ".join([*few, f"and {len(names) - len(few)} more"] if len(names) > len(few) else few) or "no array"
