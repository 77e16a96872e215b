"""From a data section to three checked splits of one image size."""

from __future__ import annotations

import hashlib
from difflib import get_close_matches

import torch
from torch import Tensor

from kr_ray.config import DataConfig
from kr_ray.data import public_sets, user_data
from kr_ray.data.checks import DataError, check_classes
from kr_ray.data.fetch import local_data
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.pools import Pool, PoolSet, stratified_index
from kr_ray.runs.storage import storage_path

__all__ = ["DataError", "duplicate_indices", "known_names", "load_splits"]

Selection = tuple[Pool, Tensor]
"""A pool and the indices taken of it."""


def load_splits(config: DataConfig, min_images: int = 2) -> Splits:
    """Load, check, split, thin out and resize a data set.

    Official splits are kept; those a set lacks are taken off its training images, stratified by class and
    seeded by `split_seed` (Knowledge Recycling, appendix C, Table 5: 10,000 validation images for CIFAR and
    FashionMNIST).

    Args:
        config: the data section.
        min_images: the least number of training images, that is the largest batch.

    Returns:
        uint8 images of `image_size`, with 1 or 3 channels as the set has.

    Raises:
        DataError: the set is unknown, absent, damaged or unfit; the message
            says which rule it breaks and what to do.
    """
    with local_data(config, public_sets.places) as local:
        return _load_local(local, min_images)


def _load_local(config: DataConfig, min_images: int) -> Splits:
    pools = _open(config)
    for pool, training in ((pools.train, True), (pools.validation, False), (pools.test, False)):
        if pool is not None:
            check_classes(pool.labels, pools.class_names, pool.origin, training=training)
    selections = {
        split: _limit(split, selection, config) for split, selection in _divide(pools, config).items()
    }
    found = len(selections["train"][1])
    if found < min_images:
        raise DataError(
            f"`training images >= {min_images}` (the batch size) must hold, but got {found} "
            f"(max_train_images={config.max_train_images}); lower the batch sizes or use more images"
        )
    parts = {
        split: LabelledImages(pool.read(index, config.image_size), pool.labels[index])
        for split, (pool, index) in selections.items()
    }
    _check_channels(parts)
    pool, index = selections["train"]
    sources = pool.sources(index)
    return Splits(config.name, pools.class_names, parts["train"], parts["validation"], parts["test"], sources)


def known_names() -> tuple[str, ...]:
    """Every value of `data.name`: 2-D single-label MedMNIST flags,
    the other public sets, `npz` and `folder`."""
    return (
        *public_sets.CIFAR_CLASSES,
        "fashionmnist",
        *public_sets.medmnist_names(),
        "digits",
        "npz",
        "folder",
    )


def _open(config: DataConfig) -> PoolSet:
    root, path = storage_path(config.root), storage_path(config.path)
    if config.name == "npz":
        return user_data.npz_pools(path)
    if config.name == "folder":
        return user_data.folder_pools(path)
    if config.name == "digits":
        return public_sets.digits_pools()
    if config.name == "fashionmnist":
        return public_sets.fashion_pools(root, download=config.download)
    if config.name in public_sets.CIFAR_CLASSES:
        return public_sets.cifar_pools(config.name, root, download=config.download)
    if config.name in public_sets.medmnist_names():
        return public_sets.medmnist_pools(config.name, root, download=config.download)
    raise DataError(
        f"`data.name` must be one of {', '.join(known_names())}, but got "
        f"{config.name!r}; {_name_remedy(config.name)}"
    )


def _name_remedy(name: str) -> str:
    lower = name.lower()
    if public_sets.is_other_medmnist(lower):
        return "MedMNIST's 3-D and multi-label sets are not supported"
    close = [lower] if lower in known_names() else get_close_matches(lower, known_names(), n=3)
    return f"did you mean {' or '.join(close)}?" if close else "use npz or folder for your own images"


def _divide(pools: PoolSet, config: DataConfig) -> dict[str, Selection]:
    """Take the splits that the set lacks off its training images, leaving
    at least one image of each class for training."""
    given = {"test": pools.test, "validation": pools.validation}
    sizes = {
        split: max(1, round(share * len(pools.train.labels))) for split, share in _shares(config).items()
    }
    sizes["validation"] = pools.validation_images or sizes["validation"]
    lacking = [split for split, pool in given.items() if pool is None]
    rest = torch.arange(len(pools.train.labels))
    divided = {
        split: (pool, torch.arange(len(pool.labels))) for split, pool in given.items() if pool is not None
    }
    for number, split in enumerate(lacking):
        leave = len(lacking) - number
        taken = stratified_index(
            pools.train.labels[rest], sizes[split], (config.split_seed, *split.encode()), leave
        )
        divided[split] = (pools.train, rest[taken])
        kept = torch.ones(len(rest), dtype=torch.bool)
        kept[taken] = False
        rest = rest[kept]
    return {"train": (pools.train, rest), **divided}


def _shares(config: DataConfig) -> dict[str, float]:
    return {"test": config.test_share, "validation": config.validation_share}


def _limit(split: str, selection: Selection, config: DataConfig) -> Selection:
    """A seeded, stratified subset that keeps every class the split has."""
    pool, index = selection
    limit = {
        "train": config.max_train_images,
        "validation": config.max_validation_images,
        "test": config.max_test_images,
    }[split]
    if not 0 < limit < len(index):
        return selection
    classes = len(torch.unique(pool.labels[index]))
    if limit < classes:
        raise DataError(
            f"`max_{split}_images >= {classes}` (the classes in that split) must hold, but got "
            f"max_{split}_images={limit}; raise it, or 0 for all"
        )
    return pool, index[
        stratified_index(pool.labels[index], limit, (config.split_seed, *b"limit", *split.encode()))
    ]


def _check_channels(parts: dict[str, LabelledImages]) -> None:
    channels = {split: part.images.shape[1] for split, part in parts.items()}
    if len(set(channels.values())) > 1:
        raise DataError(
            f"`all splits are grey (1 channel) or all are RGB (3)` must hold, but got channels {channels}; "
            "convert the splits to one of them"
        )


def duplicate_indices(images: Tensor, other: Tensor | None = None) -> Tensor:
    """Which images are pixel-exact copies. A copy across splits makes
    a non-member look like a member to an attack.

    Args:
        images: uint8, [N, C, H, W].
        other: uint8, [M, C, H, W]; None = compare `images` among themselves.

    Returns:
        int64, [D], ascending: indices of `images` that equal any image
        of `other`, or an earlier one of `images`.

    Raises:
        DataError: the two sets differ in channels or size, so that nothing could ever be equal.
    """
    if other is not None and other.shape[1:] != images.shape[1:]:
        raise DataError(
            f"`images.shape[1:] == other.shape[1:]` must hold, but got {tuple(images.shape[1:])} and "
            f"{tuple(other.shape[1:])}; resize or convert one of them"
        )
    seen = set() if other is None else set(_hashes(other))
    found = []
    for index, value in enumerate(_hashes(images)):
        if value in seen:
            found.append(index)
        elif other is None:
            seen.add(value)
    return torch.tensor(found, dtype=torch.int64)


def _hashes(images: Tensor) -> list[bytes]:
    return [
        hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        for image in images.cpu().contiguous().numpy()
    ]
