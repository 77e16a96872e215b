"""The resolved real images inside the run's storage, so that every
worker on every node reads the same bytes."""

from __future__ import annotations

from pathlib import Path

from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.remarks import remark
from kr_ray.runs.artifacts import ArtifactError, load_tensors, read_json, save_tensors, write_json
from kr_ray.runs.results import DataResult, Duplicates

SPLITS = ("train", "validation", "test")
SPLITS_FILE = Path("data") / "splits.safetensors"
"""Relative to the run directory."""
SOURCES_FILE = Path("data") / "train_sources.json"
"""Relative to the run directory: for each training image its file within the set, or its number there."""


def save_splits(path: Path, splits: Splits) -> None:
    """Write all three splits as one safetensors file."""
    tensors = {}
    for name in SPLITS:
        part: LabelledImages = getattr(splits, name)
        tensors[f"{name}.images"], tensors[f"{name}.labels"] = part.images, part.labels
    save_tensors(path, tensors, {"name": splits.name, "class_names": list(splits.class_names)})


def describe_splits(splits: Splits, copies: Duplicates) -> DataResult:
    """What a run says of its data; `copies` as counted by `count_copies`."""
    train, validation, test = splits.train, splits.validation, splits.test
    return DataResult(
        name=splits.name,
        digest=splits.digest(),
        num_classes=splits.num_classes,
        class_names=list(splits.class_names),
        channels=splits.channels,
        image_size=train.images.shape[-1],
        train=len(train),
        validation=len(validation),
        test=len(test),
        class_counts=train.labels.bincount(minlength=splits.num_classes).tolist(),
        duplicates=copies,
        remarked=remark(splits, copies),
    )


def load_stored_splits(path: Path) -> Splits:
    """Read what `save_splits` wrote.

    Raises:
        ArtifactError: the file is missing or broken.
    """
    tensors, metadata = load_tensors(path)
    try:
        parts = {
            name: LabelledImages(tensors[f"{name}.images"], tensors[f"{name}.labels"]) for name in SPLITS
        }
        names = tuple(metadata["class_names"])
        return Splits(metadata["name"], names, parts["train"], parts["validation"], parts["test"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} must hold the three splits of a data set, but holds something else; delete the folder "
            f"{path.parent} and run the same command again"
        ) from error


def save_sources(path: Path, splits: Splits) -> None:
    """Keep where the training images come from, for whoever has to find one of them again."""
    write_json(path, list(splits.train_sources))


def load_sources(path: Path) -> list[str] | None:
    """What `save_sources` wrote; None for a run whose data stage did not say.

    Raises:
        ArtifactError: the file is broken.
    """
    if not path.exists():
        return None
    try:
        found = read_json(path)
        if isinstance(found, list):
            return [str(source) for source in found] or None
    except (ValueError, RecursionError) as error:
        found = error
    raise ArtifactError(
        f"{path} must hold a list of names, but holds something else ({str(found)[:80]}); delete the folder "
        f"{path.parent} and run the same command again"
    )
