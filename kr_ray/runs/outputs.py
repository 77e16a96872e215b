"""What a stage hands on to others: which files, with which bytes.

A done-marker holds their SHA-256. When a finished stage is looked up, a file of the recorded size and time is
taken for the recorded one, so that a command that has nothing to do reads no artefacts. Before a stage
computes anything from them they are read and compared.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from kr_ray.runs.storage import FileEntry, RemotePath, list_files, sha256_of

OUTPUTS = (
    "*.safetensors", "*/*.safetensors", "*.npz", "train_sources.json", "most_exposed_*.csv", "report.*",
    "report_summary.html", "frontier.*",
)  # fmt: skip
"""Below a stage's folder: data, weights, checkpoints, shadow scores, lists of images, pages. Training states,
progress and Ray's own files are nobody else's input."""


class Output(TypedDict):
    """A file as a done-marker knows it; `size` in bytes."""

    sha256: str
    size: int
    mtime_ns: int


Recorded = dict[str, Output]
"""By name below the folder."""


def record_outputs(folder: Path) -> Recorded:
    """Read and describe all outputs that are there."""
    return {
        name: {"sha256": sha256_of(entry.path), "size": entry.size, "mtime_ns": entry.mtime_ns}
        for entry in list_files(folder)
        if _is_output(name := str(entry.path.relative_to(folder)))
    }


def _is_output(name: str) -> bool:
    parts = name.split("/")
    patterns = [pattern.split("/") for pattern in OUTPUTS]
    return any(len(p) == len(parts) and all(map(fnmatch.fnmatchcase, parts, p)) for p in patterns)


def look_at_outputs(folder: Path, recorded: Recorded) -> tuple[str, Recorded]:
    """Compare what is there with what was recorded, reading only files of another size or time.

    Returns:
        What is wrong, naming the file, or nothing; and the record, with the
        new times of files that hold the same bytes.
    """
    found = dict(recorded)
    for name, was in recorded.items():
        entry = _entry(folder / name)
        if entry is None:
            return f"{folder / name} is missing", recorded
        if (entry.size, entry.mtime_ns) == (was["size"], was["mtime_ns"]):
            continue
        if entry.size != was["size"] or sha256_of(entry.path) != was["sha256"]:
            return f"{folder / name} is not the file that was written", recorded
        found[name] = {**was, "mtime_ns": entry.mtime_ns}
    return "", found


def changed_outputs(folder: Path, recorded: Recorded) -> Iterator[Path]:
    """Read all outputs; those that are missing or hold other bytes.

    Of a store nothing is read: it compares its objects with checksums of its own.
    """
    for name, was in recorded.items():
        path = folder / name
        if not isinstance(path, RemotePath) and (not path.is_file() or sha256_of(path) != was["sha256"]):
            yield path


def _entry(path: Path) -> FileEntry | None:
    return next(iter(list_files(path)), None) if path.exists() and not path.is_dir() else None
