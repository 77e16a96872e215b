"""The user's own images: an .npz with MedMNIST's keys, or a folder of class sub-folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kr_ray.data.checks import DataError, read_npz
from kr_ray.data.pools import Pool, PoolSet, array_pool, resize
from kr_ray.foreign import images as image_files
from kr_ray.foreign.files import is_plain_name, reason, shown, what_lies_at

NPZ_KEYS = tuple(f"{split}_{part}" for split in ("train", "val", "test") for part in ("images", "labels"))
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
)
SYSTEM_FILES = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})


def npz_pools(path: Path, class_names: tuple[str, ...] = ()) -> PoolSet:
    """Read `{train,val,test}_{images,labels}` from an .npz.

    Images are uint8 (or float in [0, 1]) [N, H, W] or [N, H, W, C]; labels are integers [N] or [N, 1].

    Args:
        class_names: of a public set; empty = the classes are the numbers
            from 0 to the largest training label.

    Raises:
        DataError: the file or one of its arrays is refused.
    """
    arrays = read_npz(path, NPZ_KEYS)
    train, validation, test = (
        array_pool(arrays[f"{split}_images"], arrays[f"{split}_labels"], f"{path}: {split}")
        for split in ("train", "val", "test")
    )
    if not class_names:
        # A stray huge label must not make as many names: the first empty
        # class is enough for the error to come.
        classes = min(int(train.labels.max()), len(train.labels)) + 1
        class_names = tuple(str(k) for k in range(classes))
    return PoolSet(class_names, train, validation, test)


def folder_pools(path: Path) -> PoolSet:
    """Find images as `<path>/<class>/<image>`, or `<path>/{train,val,test}/<class>/<image>`; sorted names
    number the classes.

    With `train` and only one of `val` (or `validation`) and `test`, the other is taken off the training
    images. Images are read (by Pillow, turned as their EXIF tag says) only when used.

    Raises:
        DataError: no such folder, no classes, an empty class, or anything that is
            neither image nor hidden file among the images.
    """
    if (found := what_lies_at(path) or "a file") != "a folder":
        raise DataError(f"`{shown(path)}` must be a folder of class sub-folders, but got {found}; correct it")
    folders = _sub_folders(path)
    if "train" not in folders:
        names = tuple(folders)
        return PoolSet(names, _folder_pool(path, names))
    unknown = sorted(set(folders) - {"train", "val", "validation", "test"})
    if unknown or {"val", "validation"} <= set(folders):
        raise DataError(
            f"`{path}` must hold either class folders or train, val and test, but got {list(folders)}; move "
            "the classes into the splits, or rename the class called train"
        )
    names = tuple(_sub_folders(folders["train"]))
    pools = {
        split.replace("validation", "val"): _folder_pool(folder, names) for split, folder in folders.items()
    }
    return PoolSet(names, pools["train"], pools.get("val"), pools.get("test"))


def _sub_folders(path: Path) -> dict[str, Path]:
    """Visible folders by name, sorted. Images beside them would have no class and be lost."""
    visible = _visible(path)
    loose = [entry for entry in visible if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()]
    if loose:
        raise DataError(
            f"`{path}` must hold one folder per class, but got the loose image "
            f"{loose[0].name}; move images into class folders"
        )
    folders = {entry.name: entry for entry in visible if entry.is_dir()}
    if unfit := [name for name in folders if not is_plain_name(name)]:
        raise DataError(
            f"`{shown(path)}` must hold folders whose names are printable UTF-8 text, for the classes are "
            f"called so, but got {shown(unfit[0])}; rename it"
        )
    return folders


def _visible(folder: Path) -> list[Path]:
    """Sorted entries, without what operating systems leave behind."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"`{shown(folder)}` must be a readable folder, but got: {reason(error)}; correct its permissions"
        ) from error
    return [entry for entry in entries if not entry.name.startswith(".") and entry.name not in SYSTEM_FILES]


def _folder_pool(path: Path, class_names: tuple[str, ...]) -> Pool:
    folders = _sub_folders(path)
    unknown = sorted(set(folders) - set(class_names))
    if unknown:
        raise DataError(
            f"`{path}` must hold classes of the training folder only, but got "
            f"{unknown[0]!r} too; train on it or remove it"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = _image_files(folders[name]) if name in folders else []
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(
            f"`{path}` must hold class folders with images, but got none; layout: "
            f"{path.name}/<class>/<image>.png"
        )
    names = tuple(str(file.relative_to(path)) for file in files)
    return Pool(
        torch.tensor(labels),
        lambda index, size: _read_files([files[int(i)] for i in index], size),
        str(path),
        names,
    )


def _image_files(folder: Path) -> list[Path]:
    files = _visible(folder)
    for entry in files:
        unfit = what_lies_at(entry).removeprefix("a ")
        if unfit or entry.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(
                f"`{shown(folder)}` must hold images only ({', '.join(sorted(IMAGE_SUFFIXES))}), but got "
                f"{f'the {unfit} ' if unfit else ''}{shown(entry.name)}; move or convert it, it would be "
                "ignored"
            )
    return files


def _read_files(files: list[Path], image_size: int) -> Tensor:
    images: list[Tensor] = []
    for file in files:
        pixels = torch.from_numpy(read_image(file))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        if images and len(pixels) != len(images[0]):
            raise DataError(
                f"`all images are grey or all are RGB` must hold, but got {_colour(len(images[0]))} "
                f"({files[0]}) and {_colour(len(pixels))} ({file}); convert all to one"
            )
        images.append(resize(pixels[None], image_size)[0])
    return torch.stack(images)


def _colour(channels: int) -> str:
    return "grey" if channels == 1 else "RGB"


def read_image(file: Path) -> NDArray[np.uint8]:
    """One image as uint8, [H, W] or [H, W, 3].

    Raises:
        DataError: no image, or one of another depth, with transparency or several frames.
    """
    return image_files.read_image(file, DataError)
