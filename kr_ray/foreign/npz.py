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


class PickledError(ValueError):
    """An array, which the message names, holds Python objects."""


def read_arrays(
    path: Path, error: type[Exception], keys: Collection[str] | None = None, remedy: str = FETCH
) -> tuple[list[str], dict[str, NDArray[Any]]]:
    """Names of all arrays, and those named by `keys` (all if None).

    `remedy` is given where the file's contents do not name a better one. A file with a single array (.npy) is
    given as one array of the name `UNNAMED`, which is not read.

    Raises:
        error: no such file, not a (complete) .npz, or Python objects instead of numbers.
    """
    with decoding(path, MUST, ("zip", "npy"), error, remedy):
        if contents_of(path).kind == "npy":
            return [UNNAMED], {}
        try:
            return whole_arrays(path, keys)
        except PickledError as cause:
            raise error(
                f"`{shown(path)}` must hold arrays of numbers, but got Python objects, which are never "
                f"unpickled, in {cause}; bring its rows to one shape and save an array of numbers"
            ) from cause


def whole_arrays(
    path: Path, keys: Collection[str] | None = None
) -> tuple[list[str], dict[str, NDArray[Any]]]:
    """The same for a caller who knows what to do about damage, with the errors as they come.

    Raises:
        kr_ray.foreign.files.READ_ERRORS: it is damaged. Unlike `numpy.load`
            it compares every array's checksum.
        PickledError: an array holds Python objects.
    """
    with path.open("rb") as opened, zipfile.ZipFile(opened) as members:
        names = [shown(name.removesuffix(".npy")) for name in members.namelist()]
        wanted = [name for name in members.namelist() if keys is None or name.removesuffix(".npy") in keys]
        return names, {name.removesuffix(".npy"): _member(members, name) for name in wanted}


def _member(members: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with members.open(name) as file:
        try:
            array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as cause:
            if "Object arrays" not in str(cause):
                raise
            raise PickledError(shown(name.removesuffix(".npy"))) from cause
        if file.read(1):  # only reading to the end makes zip compare the checksum
            raise ValueError("bytes after the array")
    return array


def listed(names: Collection[str]) -> str:
    """Names in a message, in their order: not more than a dozen."""
    few = [shown(name) for name in list(names)[:LISTED_NAMES]]
    return (
        ", ".join([*few, f"and {len(names) - len(few)} more"] if len(names) > len(few) else few) or "no array"
    )
