"""The classifier of a distilled set: the one loop, but for how the images are augmented."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kr_ray.classifiers.networks import new_classifier
from kr_ray.classifiers.sets import FixedSet
from kr_ray.classifiers.training import ClassifierTraining, Schedule
from kr_ray.compute.devices import pick_device
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig
from kr_ray.config.distillation import DistillationSection
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.methods.distillation.augment import draw, operations
from kr_ray.methods.distillation.sets import SET_FILE, DistilledSet, Units
from kr_ray.methods.interface import Site


class DistilledTraining(ClassifierTraining):
    """Trained on float images, augmented as they were when they were made.

    Crops, flips, TrivialAugment and MixUp of the recipe do not apply: distilled images hold what a network
    learns from them under the augmentation that they were made for. In every step all images get the same
    operation, each with its own random numbers, as in the authors' code.
    """

    def __init__(
        self,
        found: DistilledSet,
        splits: Splits,
        recipe: ClassifierConfig,
        section: DistillationSection,
        seed: int,
    ) -> None:
        device = pick_device()
        recipe = recipe.model_copy(update={"mixup_alpha": 0.0})
        model = new_classifier(splits.num_classes, splits.channels, recipe, derive_seed(seed, "student"))
        schedule = Schedule.fit(recipe, len(found.images), section.epochs)
        # What is augmented is standardised, for zero to be the mean there.
        images = found.units.from_signed(found.signed().to(device))
        data = FixedSet(images, found.targets.to(device))
        super().__init__(model, data, recipe, schedule, derive_seed(seed, "data"), device)
        self._units: Units = found.units
        self._operations = operations(recipe.horizontal_flip) if section.augmentation == "siamese" else ()

    def _augmented(self, images: Tensor, random: torch.Generator) -> Tensor:
        pieces = [
            draw(self._operations, random, len(batch))(batch)
            for batch in images.split(self.schedule.batch_size)
        ]
        return torch.cat(pieces)

    def _inputs(self, images: Tensor) -> Tensor:
        return self._units.to_signed(images)


def student_training(
    site: Site, folder: Path, section: DistillationSection
) -> tuple[ClassifierTraining, Splits]:
    """The classifier's training on the set in `folder`, not yet started, and the real splits (of which only
    validation and test images may be shown to it)."""
    splits, found = load_stored_splits(site.path / SPLITS_FILE), DistilledSet.load(folder / SET_FILE)
    recipe, seed = site.config.classifier, derive_seed(site.seed, "distilled student")
    if section.student_augmentation == "distillation":
        return DistilledTraining(found, splits, recipe, section, seed), splits
    device = pick_device()
    model = new_classifier(splits.num_classes, splits.channels, recipe, derive_seed(seed, "student"))
    schedule = Schedule.fit(recipe, len(found.images), section.epochs)
    data = FixedSet(found.as_bytes().to(device), found.targets.to(device))
    return ClassifierTraining(model, data, recipe, schedule, derive_seed(seed, "data"), device), splits
