"""Where a stage is worked on: in its own folder, or beside a
finished result, which stays until the new is whole.

    <stage>        what other stages and people read
    <stage>.next   an attempt on other inputs; takes the place of <stage> once it holds a done-marker

A folder that was moved to a larger disk and linked back has its attempts on that disk.
"""

from __future__ import annotations

from pathlib import Path

from kr_ray.runs.storage import RemotePath, copy_objects, remove_tree

DONE_FILE, STARTED_FILE = "done.json", "started.json"
SUFFIX = ".next"


def stage_name(folder: Path) -> str:
    """Of the stage whose folder or attempt this is."""
    return folder.name.removesuffix(SUFFIX)


def real_folder(folder: Path) -> Path:
    """Where a stage's folder lies, be it linked."""
    return folder if isinstance(folder, RemotePath) or not folder.is_symlink() else folder.resolve()


def beside(folder: Path) -> Path:
    """Where the successor of what is in a real folder is made."""
    return folder.with_name(folder.name + SUFFIX)


def settle(folder: Path) -> None:
    """Put a whole attempt in the place of its real folder; after an interruption the next call ends it.

    Raises:
        LocationError: the old result cannot be removed.
    """
    if (beside(folder) / DONE_FILE).exists():
        replace_folder(folder, beside(folder), (DONE_FILE, STARTED_FILE))


def replace_folder(folder: Path, successor: Path, markers: tuple[str, ...] = ()) -> None:
    """Remove `folder` and give `successor`, which is whole, its name.

    Args:
        markers: files that say that a successor is whole: in a store, where a
            name is given by copying, they go first.

    Raises:
        LocationError: `folder` cannot be removed.
    """
    remove_tree(folder)
    if not isinstance(successor, RemotePath) or not isinstance(folder, RemotePath):
        successor.rename(folder)
        return
    copy_objects(successor, folder)
    for name in markers:  # a successor of which a part is removed must not be taken for a whole one
        (successor / name).unlink(missing_ok=True)
    remove_tree(successor)
