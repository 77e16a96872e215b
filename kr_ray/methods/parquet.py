"""A student trained on an exported synthetic set alone."""

from __future__ import annotations

from pathlib import Path

from kr_ray.classifiers.networks import new_classifier
from kr_ray.classifiers.sets import FixedSet
from kr_ray.classifiers.training import ClassifierTraining, Schedule
from kr_ray.compute.devices import pick_device
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.synthesis.parquet_set import read_parquet_set


def parquet_student(
    run: Path, path: Path, epochs: float, recipe: ClassifierConfig, seed: int
) -> tuple[ClassifierTraining, Splits]:
    """A student's training on an exported set alone; `epochs` are passes over it.

    Raises:
        DataError: see `read_parquet_set`.
    """
    device = pick_device()
    splits = load_stored_splits(run / SPLITS_FILE)
    images, targets = read_parquet_set(path, splits)
    model = new_classifier(splits.num_classes, splits.channels, recipe, derive_seed(seed, "student"))
    schedule = Schedule.fit(recipe, len(images), epochs)
    data = FixedSet(images.to(device), targets.to(device))
    return ClassifierTraining(model, data, recipe, schedule, derive_seed(seed, "data"), device), splits
