"""Where runs and data lie: in a local folder, or in an object store (S3,
Google Cloud Storage) through Arrow's filesystems.

`storage_path` turns a location of the configuration into a path. A local one is plain `pathlib`. A remote one
is a `RemotePath`, which has the part of pathlib's interface that a run needs and refuses the rest, so that no
file meant for the store lands beside the program.

Credentials are found by the store's own client: the usual environment variables and files, or the machine's
role. They never stand in a location. S3-compatible servers are named by AWS_ENDPOINT_URL_S3 or
AWS_ENDPOINT_URL, as for Amazon's own tools.
"""

from __future__ import annotations

import datetime
import errno
import fnmatch
import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import IO, TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from kr_ray.masking import masked

if TYPE_CHECKING:  # a command on local files must not wait for Arrow
    from pyarrow.fs import FileInfo, FileSystem

REMOTE_SCHEMES = ("s3", "gs")
LONGEST_NAME, LONGEST_PATH = 255, 4000
"""Bytes that Linux's file systems and its calls take."""
_SCHEME_WITHOUT_SLASHES = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|(?:s3|gs|file|https?):", re.IGNORECASE)
"""`s3:/bucket`: no location, and as a path a folder named `s3:`."""
READ_ATTEMPTS = 10
REMOVAL_ATTEMPTS, REMOVAL_PAUSE_S = 50, 0.2
"""For so long a folder is emptied again while somebody writes in it: a
worker outlives its killed driver by seconds."""
GS_RETRY_LIMIT = datetime.timedelta(minutes=1)
"""For so long a failing store is asked again; S3's requests have a
number of attempts, which take about as long."""


class LocationError(ValueError):
    """A location is refused. The message gives the rule, the value and the remedy."""


def check_location(text: str) -> str:
    """`text`, if it is a local path, a `file:///` path or a URI of an object store.

    Raises:
        LocationError: another scheme, a `file://` that names no absolute path, no bucket, credentials,
            options after a question mark, or no name of a file system. The message repeats no credentials.
    """
    scheme, separator, rest = text.partition("://")
    _check_name(text)
    if not separator:
        if _SCHEME_WITHOUT_SLASHES.match(text):
            raise LocationError(
                "a location must be a local path or start with s3://, gs:// or file:///, but got "
                f"{masked(text)!r}; write all slashes, or ./{masked(text)} for a folder of that name"
            )
        return text
    if scheme == "file":
        return _check_file_location(text, rest)
    if scheme not in REMOTE_SCHEMES:
        raise LocationError(
            "a location must be a local path or start with s3://, gs:// or file://, but got "
            f"{masked(text)!r}; use one of them, or mount the store"
        )
    parts = urlsplit(text)
    if "@" in parts.netloc:
        raise LocationError(
            "a location must hold no credentials, but got some before the @ of "
            f"{scheme}://…@{parts.netloc.rpartition('@')[2]}; leave them to the environment "
            "(AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS) or the machine's role"
        )
    if not parts.netloc or parts.query or parts.fragment:
        raise LocationError(
            f"a location must be {scheme}://bucket/folder and nothing more, but got {masked(text)!r}; an "
            "S3-compatible server is named by the environment variable AWS_ENDPOINT_URL"
        )
    return text


def _check_file_location(text: str, rest: str) -> str:
    """`file:///folder` and nothing else: a host would be dropped in silence, a relative path mean something
    else in every process."""
    if not rest.startswith("/") or not rest.strip("/"):
        raise LocationError(
            "a file location must read file:///folder, with three slashes and an absolute path, but got "
            f"{masked(text)!r}; write so, or give the plain path"
        )
    return text


def _check_name(text: str) -> None:
    """What file systems and stores cannot hold, or a table and a log cannot show."""
    unfit = next((c for c in text if not c.isprintable()), "")
    if unfit:
        raise LocationError(
            f"a location must be one line of printable text, but got the character {unfit!r} in "
            f"{masked(text)[:80]!r}; rename it"
        )
    longest = max((len(os.fsencode(part)) for part in text.split("/")), default=0)
    if longest > LONGEST_NAME or len(os.fsencode(text)) > LONGEST_PATH:
        raise LocationError(
            f"every name of a location must have <= {LONGEST_NAME} bytes, and all of it <= {LONGEST_PATH}, "
            f"but got {longest} and {len(os.fsencode(text))} in '{masked(text)[:60]}...'; use shorter names"
        )


def make_folder(path: Path) -> None:
    """The folder `path`, made if it is not there, of a location that a person gave.

    Raises:
        LocationError: a file or device is in the way, or it may not be made there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise LocationError(
            f"`{path}` must be a folder that can be made and written, but got: "
            f"{(error.strerror or 'no folder').lower()}; correct `storage`, or its permissions"
        ) from error


def storage_path(location: str | Path) -> Path:
    """The path that a location names: a `RemotePath` for s3:// and gs://, else a local one with `~` expanded.

    Raises:
        LocationError: see `check_location`.
    """
    if isinstance(location, Path):
        return location
    scheme, _, rest = check_location(location).partition("://")
    if scheme in REMOTE_SCHEMES:
        return RemotePath(location)
    return Path(rest if scheme == "file" else location).expanduser()


class RemotePath(PosixPath):
    """A path `s3://bucket/key` or `gs://bucket/key`.

    Objects appear whole or not at all, so that a write needs no temporary name beside
    it. Folders exist as long as something is in them.
    """

    def __str__(self) -> str:
        return "//".join((self.parts[0], self.key)) if self.is_absolute() else "/".join(self.parts) or "."

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __fspath__(self) -> str:
        raise TypeError(
            f"{self} is in an object store and cannot be opened by its "
            "name; read it through `local_copy` or `open`"
        )

    @property
    def key(self) -> str:
        """Bucket and key, as Arrow's filesystems call it."""
        return "/".join(self.parts[1:])

    @property
    def filesystem(self) -> FileSystem:
        return _filesystem(self.parts[0].rstrip(":"), self.parts[1])

    def _info(self) -> FileInfo:
        return self.filesystem.get_file_info(self.key)

    def exists(self, **_: Any) -> bool:
        return bool(self._info().type)  # NotFound is 0

    def is_file(self, **_: Any) -> bool:
        return bool(self._info().is_file)

    def is_dir(self, **_: Any) -> bool:
        info = self._info()
        return bool(info.type) and not info.is_file

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there with its first object."""

    def iterdir(self) -> Generator[Self, None, None]:
        """Objects and folders directly below, sorted."""
        yield from sorted(self / Path(info.path).name for info in _below(self, recursive=False))

    def glob(self, pattern: str, **_: Any) -> Generator[Self, None, None]:  # type: ignore[override]
        """Paths that match, sorted. Only folders that match are listed,
        which spares requests; `**` is not supported."""
        first, _slash, rest = pattern.partition("/")
        found = (
            [path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, first)]
            if "*" in first
            else [self / first]
        )
        for path in found:
            if rest:
                yield from path.glob(rest)
            elif "*" in first or path.exists():
                yield path

    def open(self, mode: str = "r", *_: Any, **__: Any) -> IO[Any]:  # type: ignore[override]
        """The whole object in memory, to be read: `rb`."""
        if mode != "rb":
            raise ValueError(
                "`mode == 'rb'` must hold for objects in a store, but got "
                f"{mode!r}; write through `atomic_write`"
            )
        return io.BytesIO(self.read_bytes())

    def read_bytes(self) -> bytes:
        """The object as one writer left it: Arrow first asks for the size, and a
        longer or no object may be there when it reads.

        Raises:
            FileNotFoundError: there is none.
            OSError: the store cannot be read, or the object kept growing.
        """
        for _ in range(READ_ATTEMPTS):
            try:
                with self.filesystem.open_input_file(self.key) as file:
                    data = bytes(file.read())
            except FileNotFoundError:
                raise
            except OSError as error:
                if self.exists():
                    raise
                raise FileNotFoundError(f"{self} was removed while it was read") from error
            if self._info().size == len(data):
                return data
        if not self.exists():
            raise FileNotFoundError(f"{self} was removed while it was read")
        raise OSError(
            f"{self} must hold still to be read, but was written {READ_ATTEMPTS} "
            "times meanwhile; run the same command again"
        )

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:  # type: ignore[override]
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        with self.filesystem.open_output_stream(self.key) as file:
            file.write(data)
        return len(data)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self.filesystem.delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def resolve(self, strict: bool = False) -> Self:
        return self

    def absolute(self) -> Self:
        return self

    def is_absolute(self) -> bool:
        """Whether it starts with the store: what `relative_to` returns does not."""
        return any(self.parts[:1] == (f"{scheme}:",) for scheme in REMOTE_SCHEMES)


# --- files and folders of either kind -----------------------------------------------------------------------


@dataclass(frozen=True)
class FileEntry:
    """A file, its size in bytes and when it was last written, in ns since 1970."""

    path: Path
    size: int
    mtime_ns: int


def list_files(path: Path) -> list[FileEntry]:
    """The file at `path`, or all files below it, by path. Of a store
    this is one request for a thousand files."""
    if isinstance(path, RemotePath):
        info = path._info()
        found = [info] if info.is_file else _below(path, recursive=True)
        scheme = path.parts[0]
        entries = [
            FileEntry(RemotePath(f"{scheme}//{i.path}"), i.size, i.mtime_ns) for i in found if i.is_file
        ]
        return sorted(entries, key=lambda entry: entry.path)
    entries = []
    for file in [path] if path.is_file() else sorted(_local_files(path)):
        try:
            there = file.stat()
            if stat.S_ISREG(there.st_mode):
                entries.append(FileEntry(file, there.st_size, there.st_mtime_ns))
        except FileNotFoundError:  # a temporary file of another process, renamed since, or a link to nothing
            continue
    return entries


def file_stamps(path: Path) -> list[list[str | int]]:
    """Names, sizes and times of the file, or of all files below the folder,
    for fingerprints: an edited file is read again."""
    return [[str(file.path), file.size, file.mtime_ns] for file in list_files(path)]


def _local_files(folder: Path) -> Iterator[Path]:
    """All below `folder`, also behind links to folders, but for
    links that lead back to a folder they lie in."""
    above = {str(folder): {_identity(folder)}}
    for root, folders, files in os.walk(folder, followlinks=True):
        here = above.pop(root)
        entered = []
        for name in folders:
            if (identity := _identity(Path(root, name))) not in here:
                above[os.path.join(root, name)] = here | {identity}
                entered.append(name)
        folders[:] = entered
        yield from (Path(root, name) for name in files)


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it, if it is there. A link
    stays, and what is in the folder it leads to goes.

    Raises:
        LocationError: something cannot be removed. Whoever asks for an empty
            folder must not go on with a full one.
    """
    if isinstance(path, RemotePath):
        if path.exists():
            path.filesystem.delete_dir(path.key)
        return
    folder = path.resolve() if path.is_symlink() else path
    for attempt in range(REMOVAL_ATTEMPTS):
        time.sleep(REMOVAL_PAUSE_S if attempt else 0)
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:  # it was not there, or somebody else removes in it too
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or attempt == REMOVAL_ATTEMPTS - 1:
                raise LocationError(
                    f"`{path}` must be a folder that can be removed, but got {error}; remove it yourself, "
                    "or give this user the right to"
                ) from error
        if not os.path.lexists(folder):
            break
    if folder != path:
        folder.mkdir()


def copy_objects(path: RemotePath, target: RemotePath) -> None:
    """Copy all that is below `path` within its store."""
    import pyarrow.fs

    pyarrow.fs.copy_files(path.key, target.key, path.filesystem, target.filesystem)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; of a store's object it is downloaded for that."""
    with local_copy(path) as local, local.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """`path` itself, or for the length of the block a local copy of the
    remote file or folder, under its own name."""
    if not isinstance(path, RemotePath):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="kr_ray-") as folder:
        copy = Path(folder) / path.name
        download(path, copy)
        yield copy


@contextmanager
def local_copies(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """A `local_copy` of each."""
    with ExitStack() as stack:
        yield [stack.enter_context(local_copy(path)) for path in paths]


@contextmanager
def local_output(path: Path) -> Iterator[Path]:
    """`path` itself, or a local file that is uploaded there when the
    block ends, also by an error: for logs."""
    if not isinstance(path, RemotePath):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="kr_ray-") as folder:
        file = Path(folder) / path.name
        try:
            yield file
        finally:
            if file.exists():
                upload(file, path)


def upload(file: Path, path: RemotePath) -> None:
    """Copy a local file into the store, where it appears whole or not at all."""
    import pyarrow.fs

    pyarrow.fs.copy_files(str(file), path.key, pyarrow.fs.LocalFileSystem(), path.filesystem)


def download(path: RemotePath, copy: Path) -> None:
    """Copy an object, or a folder with all that is in it, many objects at a time.

    Raises:
        FileNotFoundError: there is neither.
    """
    import pyarrow.fs

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    folder = copy if path.is_dir() else copy.parent
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.fs.copy_files(path.key, str(copy), path.filesystem, pyarrow.fs.LocalFileSystem())


def _below(path: RemotePath, recursive: bool) -> list[FileInfo]:
    import pyarrow.fs

    return path.filesystem.get_file_info(
        pyarrow.fs.FileSelector(path.key, allow_not_found=True, recursive=recursive)
    )


# --- the stores' clients ------------------------------------------------------------------------------------


@lru_cache
def _filesystem(scheme: str, bucket: str) -> FileSystem:
    if scheme == "gs":
        from pyarrow.fs import GcsFileSystem

        return GcsFileSystem(retry_time_limit=GS_RETRY_LIMIT)
    from kr_ray.runs.storage_s3 import PatientS3FileSystem

    return PatientS3FileSystem(bucket)
