"""Data sets in an object store: a local copy for as long as they are read.
What was read lies in the run's storage afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kr_ray.config import DataConfig
from kr_ray.data.checks import DataError
from kr_ray.runs.storage import RemotePath, download, storage_path


@contextmanager
def local_data(config: DataConfig, places: Callable[[str], Sequence[str]]) -> Iterator[DataConfig]:
    """The same section with local locations, for the length of the
    block; errors raised in it name the remote ones.

    Args:
        places: where below `root` the set of a name may lie; only that is copied.

    Raises:
        DataError: `path` is not there, or the store cannot be read.
    """
    root, path = storage_path(config.root), storage_path(config.path)
    with TemporaryDirectory(prefix="kr_ray-data-") as folder:
        copies: dict[str, tuple[RemotePath, Path]] = {}
        try:
            if isinstance(root, RemotePath):
                copies["root"] = root, Path(folder) / "root"
                for place in places(config.name):
                    if (root / place).exists():
                        download(root / place, copies["root"][1] / place)
            if isinstance(path, RemotePath):
                copies["path"] = path, Path(folder) / "path" / path.name
                download(*copies["path"])
        except OSError as error:
            raise DataError(
                f"`data.{'path' if 'path' in copies else 'root'}` must be readable, but got {error}; "
                "correct the location, or the credentials in the environment"
            ) from error
        try:
            yield config.model_copy(update={key: str(copy) for key, (_, copy) in copies.items()})
        except DataError as error:
            if not copies:
                raise
            message = str(error)
            for remote, copy in copies.values():
                message = message.replace(str(copy), str(remote))
            raise DataError(message) from error
