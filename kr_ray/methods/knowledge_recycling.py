"""Training on synthetic images alone: the students of checkpoint optimisation, tuning and the final one (3.4, 3.5)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kr_ray.classifiers.networks import new_classifier, save_classifier
from kr_ray.classifiers.ticks import Save, State, TickedTraining, Ticks
from kr_ray.classifiers.training import ClassifierTraining
from kr_ray.compute.devices import pick_device
from kr_ray.compute.parallel import worker_rank
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.runs.artifacts import write_json
from kr_ray.synthesis.student_set import OpenSet, StudentSpec, on_device, student_schedule

FINAL_STUDENT_TICKS = Ticks(20)


def student_training(
    run: Path, spec: StudentSpec, recipe: ClassifierConfig, open_set: OpenSet = on_device
) -> tuple[ClassifierTraining, Splits]:
    """A student's training, not yet started, and the real splits (of which only validation and test images may be shown to it)."""
    device = pick_device()
    splits = load_stored_splits(run / SPLITS_FILE)
    model = new_classifier(splits.num_classes, splits.channels, recipe, derive_seed(spec.seed, "student"))
    schedule = student_schedule(recipe, spec.synthesis, spec.epochs, len(splits.train))
    epochs = -(-schedule.steps // schedule.steps_per_epoch)
    data = open_set(run, spec, recipe, splits, device, epochs)
    return ClassifierTraining(model, data, recipe, schedule, derive_seed(spec.seed, "data"), device), splits


def start_student(
    run: Path, spec: StudentSpec, recipe: ClassifierConfig, ticks: Ticks, state: State | None, open_set: OpenSet = on_device
) -> TickedTraining:
    """A student of the sweep, the tuning or a comparison, from `state` if there is one; it is judged on validation images."""
    training, splits = student_training(run, spec, recipe, open_set)
    return TickedTraining(training, splits.validation, ticks, state)


def train_final_student(
    folder: Path, start: Callable[[], tuple[ClassifierTraining, Splits]], state: State | None, save: Save
) -> None:
    """Train the student that is handed on, as `start` begins it; leaves weights.safetensors and result.json in `folder`."""
    training, splits = start()
    ticked = TickedTraining(training, splits.validation, FINAL_STUDENT_TICKS, state)
    ticked.finish(save)
    ticked.close()
    if worker_rank() == 0:
        save_classifier(folder / "weights.safetensors", training.model)
        write_json(folder / "result.json", ticked.result(splits.test))
