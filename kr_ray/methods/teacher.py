"""Training on the real images: the teacher (section 3.1) and the shadow models of the attack (section 3.6)."""

from __future__ import annotations

from pathlib import Path

from kr_ray.classifiers.networks import new_classifier, save_classifier
from kr_ray.classifiers.sets import FixedSet, smoothed_one_hot
from kr_ray.classifiers.ticks import Save, State, TickedTraining, Ticks
from kr_ray.classifiers.training import ClassifierTraining, Schedule
from kr_ray.compute.devices import pick_device
from kr_ray.compute.parallel import worker_rank
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig
from kr_ray.data.images import LabelledImages
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.runs.artifacts import write_json

TEACHER_TICKS = Ticks(20)


def train_on_real(
    images: LabelledImages, num_classes: int, recipe: ClassifierConfig, schedule: Schedule, seed: int
) -> ClassifierTraining:
    """The recipe of Table 4 on `images`, not yet started."""
    device = pick_device()
    real = images.to(device)
    data = FixedSet(real.images, smoothed_one_hot(real.labels, num_classes, recipe.label_smoothing))
    model = new_classifier(num_classes, images.images.shape[1], recipe, seed)
    return ClassifierTraining(model, data, recipe, schedule, derive_seed(seed, "data"), device)


def train_teacher(
    run: Path, folder: Path, recipe: ClassifierConfig, schedule: Schedule, seed: int, state: State | None, save: Save
) -> None:
    """Train on the real training split; leaves weights.safetensors and result.json in `folder`."""
    splits = load_stored_splits(run / SPLITS_FILE)
    training = train_on_real(splits.train, splits.num_classes, recipe, schedule, derive_seed(seed, "teacher"))
    ticked = TickedTraining(training, splits.validation, TEACHER_TICKS, state)
    ticked.finish(save)
    if worker_rank() == 0:
        save_classifier(folder / "weights.safetensors", training.model)
        write_json(folder / "result.json", ticked.result(splits.test))
