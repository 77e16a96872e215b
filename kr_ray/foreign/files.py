"""What lies under a name, and the one way in which a library's errors on its bytes become the project's.

`decoding` is put around every library that parses a foreign file. Its messages are ours: libraries speak of
their own functions and flags, and some advise to switch off what protects the reader.
"""

from __future__ import annotations

import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READ_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError,
    struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What numpy, Pillow, Arrow and the json, zip and pickle readers raise on damaged files (found by altering
thousands of them). They share no base but Exception, which would also hide an interrupt of ours."""

HEAD_BYTES = 4096
LONGEST_REASON = 120
LONGEST_NAME = 240
UNSAFE_ADVICE = re.compile(r"pickle|unsafe|trust|weights_only|allow_|secur", re.IGNORECASE)


# --- names --------------------------------------------------------------------------------------------------


def shown(name: str | Path) -> str:
    """A name as one line of printable text, cut in its middle if it is
    long: others' bytes stay out of messages."""
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(name)
    )
    return (
        text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME // 2]}...{text[-LONGEST_NAME // 2 :]}"
    )


def is_plain_name(name: str) -> bool:
    """Whether a name is printable UTF-8 text, so that tables, reports and JSON can hold it as it is."""
    return name.isprintable()  # what os.fsdecode makes of other bytes are lone surrogates, which do not print


# --- what lies there ----------------------------------------------------------------------------------------


def what_lies_at(path: Path) -> str:
    """Empty for a regular file (or an object in a store); else what is there in its place, in words."""
    try:
        if path.is_file():
            return ""
        if path.is_dir():
            return "a folder"
        if not path.exists():
            return "a broken link" if path.is_symlink() else "nothing there"
        special = {"a named pipe": path.is_fifo, "a socket": path.is_socket}
        return next((words for words, holds in special.items() if holds()), "a device")
    except OSError as error:
        return f"a name that cannot be opened ({error.strerror or 'unknown reason'})"
    except ValueError:  # a zero byte, before Python 3.12 ignored it
        return "a name with a zero byte"


def check_file(path: Path, must: str, error: type[Exception], remedy: str = "correct the path") -> None:
    """Refuse what is no regular file: a folder has no bytes, and a pipe would be waited for.

    Args:
        must: the rule, such as "must be an .npz file".

    Raises:
        error: with what lies there.
    """
    if found := what_lies_at(path):
        raise error(f"`{shown(path)}` {must}, but got {found}; {remedy}")


@dataclass(frozen=True)
class Contents:
    """What a file's first bytes say.

    Attributes:
        kind: a short key, such as "zip".
        words: for a person.
        remedy: empty where it depends on what was expected.
    """

    kind: str
    words: str
    remedy: str = ""


FETCH = "write or copy it again"
MAKE_ANEW = "delete it and run the same command again"
"""The remedy for a damaged file that a run itself wrote."""
SIGNATURES: tuple[tuple[bytes, Contents], ...] = (
    (
        b"version https://git-lfs",
        Contents("lfs", "a Git LFS pointer", "fetch the file itself with `git lfs pull`"),
    ),
    (b"PK\x03\x04", Contents("zip", "a zip archive")),
    (b"PK\x05\x06", Contents("zip", "an empty zip archive")),
    (b"PAR1", Contents("parquet", "a Parquet file")),
    (b"\x93NUMPY", Contents("npy", "a single array (.npy)")),
    (b"\x1f\x8b", Contents("gzip", "a gzip-compressed file", "unpack it with gunzip")),
    (b"BZh", Contents("bzip2", "a bzip2-compressed file", "unpack it with bunzip2")),
    (b"\xfd7zXZ\x00", Contents("xz", "an xz-compressed file", "unpack it with unxz")),
    (b"\x28\xb5\x2f\xfd", Contents("zstd", "a Zstandard-compressed file", "unpack it with unzstd")),
    (b"7z\xbc\xaf\x27\x1c", Contents("7z", "a 7z archive", "unpack it")),
    (b"\x89PNG\r\n\x1a\n", Contents("png", "a PNG image")),
    (b"\xff\xd8\xff", Contents("jpeg", "a JPEG image")),
    (b"GIF8", Contents("gif", "a GIF image")),
    (b"II*\x00", Contents("tiff", "a TIFF image")),
    (b"MM\x00*", Contents("tiff", "a TIFF image")),
    (b"\x89HDF\r\n\x1a\n", Contents("hdf5", "an HDF5 file")),
    (b"MATLAB 5.0 MAT-file", Contents("mat", "a MATLAB file")),
    (b"SQLite format 3\x00", Contents("sqlite", "an SQLite database")),
    (b"%PDF-", Contents("pdf", "a PDF document")),
    (b"\x7fELF", Contents("program", "a program")),
    (b"\xff\xfe", Contents("utf16", "UTF-16 text", "save it as UTF-8")),
    (b"\xfe\xff", Contents("utf16", "UTF-16 text", "save it as UTF-8")),
)
NO_BYTES = Contents("empty", "an empty file", FETCH)
ZEROS = Contents("zeros", "a file that begins with zeros only, as an interrupted copy leaves it", FETCH)
PAGE = Contents("html", "an HTML page, such as a server's error or login page", "download the file itself")
OTHER = Contents("other", "bytes of no known format")


def recognise(head: bytes) -> Contents:
    """What a file is, by its first bytes."""
    if not head:
        return NO_BYTES
    if not any(head):
        return ZEROS
    if head[128:132] == b"DICM":
        return Contents("dicom", "a DICOM file", "export its images as PNG")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return Contents("webp", "a WebP image")
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return Contents("pickle", "a Python pickle, which is a program and is never loaded")
    found = next((contents for signature, contents in SIGNATURES if head.startswith(signature)), None)
    return found or _recognise_text(head)


def _recognise_text(head: bytes) -> Contents:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return PAGE
    text = head.decode("utf-8", "replace")[:-1]  # the last character may have been cut by the head's end
    if not text or any(not (c.isprintable() or c in "\t\r\n\ufeff") or c == "\ufffd" for c in text):
        return OTHER
    if start.startswith((b"{", b"[")):
        return Contents("json", "JSON text")
    first = text.splitlines()[0]
    return Contents("csv", "a text table (CSV)") if re.search(r"[,;\t]", first) else Contents("text", "text")


def contents_of(path: Path) -> Contents:
    """What the file at `path` is by its first bytes.

    Raises:
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        return recognise(file.read(HEAD_BYTES))


# --- a library's errors -------------------------------------------------------------------------------------


@contextmanager
def decoding(
    path: Path,
    must: str,
    kinds: Sequence[str],
    error: type[Exception],
    remedy: str = FETCH,
    also: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Run a library on the file at `path`; whatever it raises becomes `error`, in one message of our own.

    Args:
        must: the rule, such as "must be a complete .npz file".
        kinds: keys of `Contents` that the library reads. Of such a file it is told what
            is damaged, of another what it is instead.
        remedy: where the contents do not name a better one.
        also: errors of the library that are none of `READ_ERRORS`.

    Raises:
        error: no regular file there, or the library refused it.
    """
    check_file(path, must, error)
    refused: tuple[type[Exception], ...] = (*READ_ERRORS, *also)
    try:
        with _quiet():
            yield
    except error:
        raise
    except refused as cause:
        raise error(f"`{shown(path)}` {must}, but got {_refusal(path, kinds, cause, remedy)}") from cause


@contextmanager
def decoding_bytes(
    data: bytes, origin: str, must: str, error: type[Exception], remedy: str
) -> Iterator[None]:
    """The same for bytes that lie within something else, which `origin` names.

    Raises:
        error: the library refused them.
    """
    try:
        with _quiet():
            yield
    except error:
        raise
    except READ_ERRORS as cause:
        raise error(
            f"{origin} {must}, but got {recognise(data[:HEAD_BYTES]).words} that cannot be read; {remedy}"
        ) from cause


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: of what libraries find odd in a file, a person can act on the refusal alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refusal(path: Path, kinds: Sequence[str], cause: BaseException, remedy: str) -> str:
    if isinstance(cause, PermissionError):
        return "one that may not be read; correct its permissions"
    try:
        contents = contents_of(path)
    except OSError as error:  # a store that does not answer, a failing disk
        return (
            f"one that cannot be read ({reason(error) or type(error).__name__}); try again later, or copy "
            "it elsewhere"
        )
    if contents.kind in kinds:
        said = reason(cause)
        return f"a damaged one{f' ({said})' * bool(said)}; {remedy}"
    return f"{contents.words}; {contents.remedy or remedy}"


def reason(cause: BaseException) -> str:
    """The first line of what a library said; empty where it says
    nothing, or advises to read the file unsafely."""
    text = (cause.strerror if isinstance(cause, OSError) else None) or str(cause)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if isinstance(cause, KeyError) or UNSAFE_ADVICE.search(text):
        return ""
    line = shown(re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line))
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}..."


def read_text(path: Path, must: str, error: type[Exception], largest: int) -> str:
    """A whole UTF-8 file, without a byte order mark.

    Args:
        largest: number of bytes that it may have.

    Raises:
        error: no regular file, too large, unreadable, or not UTF-8.
    """
    check_file(path, must, error)
    try:
        with path.open("rb") as file:
            raw = file.read(largest + 1)
    except OSError as cause:
        raise error(f"`{shown(path)}` {must}, but got {_refusal(path, (), cause, FETCH)}") from cause
    contents = recognise(raw[:HEAD_BYTES])
    if contents.kind in ("lfs", "html", "zeros", "empty", "utf16"):
        raise error(f"`{shown(path)}` {must}, but got {contents.words}; {contents.remedy}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = raw[: cause.start].count(b"\n") + 1
        found = f"{contents.words}; correct the path"
        if contents.kind == "other":
            found = (
                f"bytes that are not UTF-8 (0x{raw[cause.start]:02x} in line "
                f"{line}); save it as UTF-8, or correct the path"
            )
        raise error(f"`{shown(path)}` {must}, but got {found}") from cause
    if len(raw) > largest:
        raise error(f"`{shown(path)}` {must}, but got more than {largest:,} bytes; correct the path")
    return text
