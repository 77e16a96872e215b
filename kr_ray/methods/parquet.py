"""A student trained on an exported synthetic set alone; of the real images
only validation and test images are shown to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kr_ray.classifiers.networks import new_classifier
from kr_ray.classifiers.sets import FixedSet
from kr_ray.classifiers.training import ClassifierTraining, Schedule
from kr_ray.compute.devices import pick_device
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.methods.interface import Part, Site
from kr_ray.methods.knowledge_recycling import train_student
from kr_ray.runs.results import StudentResult
from kr_ray.runs.stages import Save, State
from kr_ray.runs.storage import file_stamps, storage_path
from kr_ray.synthesis.parquet_set import read_parquet_set


@dataclass(frozen=True)
class ParquetStudent:
    """See kr_ray.methods.interface.Method.

    Attributes:
        path: a labelled set that `kr export` wrote, a file or folder, wherever `storage_path` finds it.
        epochs: passes over it.
    """

    path: str
    epochs: int
    title: str = "Student of an exported set"
    note: str = "trained on a synthetic set that was handed on; in every run of an audit it is the same set"
    takes_over: tuple[str, ...] = ()

    def parts(self, site: Site, name: str = "student") -> Sequence[Part[StudentResult]]:
        recipe = site.config.classifier

        def work(folder: Path, state: State | None, save: Save) -> StudentResult | None:
            training, splits = parquet_training(
                site.path, storage_path(self.path), self.epochs, recipe, site.student.seed
            )
            return train_student(folder, training, splits, state, save)

        inputs = [recipe, self.epochs, file_stamps(storage_path(self.path))]
        return [Part(name=name, inputs=inputs, result=StudentResult, work=work, costs=("student", 1.0))]


def parquet_training(
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
