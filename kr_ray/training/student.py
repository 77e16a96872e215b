"""Training on synthetic images alone: the students of checkpoint optimisation, tuning and the final one (3.4, 3.5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kr_ray.artifacts import write_json
from kr_ray.config import ClassifierConfig, SynthesisConfig
from kr_ray.data.images import Splits, class_prior
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.devices import pick_device
from kr_ray.graphs import compiled
from kr_ray.parallel import worker_rank
from kr_ray.seeding import derive_seed
from kr_ray.synthesis.sampling import Sampler
from kr_ray.synthesis.stream import SyntheticSet
from kr_ray.training.classifier import ClassifierTraining, Schedule
from kr_ray.training.generator import checkpoint_file
from kr_ray.training.resumable import Save, State, TickedTraining, Ticks, load_classifier, save_classifier
from kr_ray.training.teacher import new_classifier

FINAL_STUDENT_TICKS = Ticks(20)
LABELLER_PAYS_FROM = 4e6
"""Images: compiling the teacher took 4 s on an H200 and saved 1 microsecond an image at width 64."""


@dataclass(frozen=True)
class StudentSpec:
    """What makes one student differ from another. Two students of equal spec are equal, bit for bit."""

    checkpoint_epoch: int
    synthesis: SynthesisConfig
    epochs: float
    seed: int


def student_schedule(recipe: ClassifierConfig, synthesis: SynthesisConfig, epochs: float, real_images: int) -> Schedule:
    """Budget of a student: with `epoch_unit: synthetic` (the paper) the cardinality scale multiplies it."""
    scaled = real_images * synthesis.cardinality_scale
    if synthesis.epoch_unit == "synthetic":
        return Schedule.fit(recipe, scaled, epochs)
    return Schedule.fit(recipe, scaled, epochs / synthesis.cardinality_scale)


def synthetic_set(
    run: Path,
    spec: StudentSpec,
    recipe: ClassifierConfig,
    splits: Splits,
    device: torch.device,
    images: int = 0,
    regenerations: float = 1,
) -> SyntheticSet:
    """The set that the student of `spec` is trained on, about so many times regenerated.

    `images` other than 0 asks for a set of that size from the same seeds.
    """
    size = images or spec.synthesis.cardinality_scale * len(splits.train)
    teacher = load_classifier(run / "teacher" / "weights.safetensors", device)
    return SyntheticSet(
        sampler=Sampler.load(run / checkpoint_file(spec.checkpoint_epoch), device, images=size * regenerations),
        teacher=compiled(teacher, device, size * regenerations, LABELLER_PAYS_FROM),
        prior=class_prior(splits.train.labels, splits.num_classes),
        images=size,
        config=spec.synthesis,
        label_smoothing=recipe.label_smoothing,
        seed=derive_seed(spec.seed, "synthetic set"),
    )


def student_training(run: Path, spec: StudentSpec, recipe: ClassifierConfig) -> tuple[ClassifierTraining, Splits]:
    """A student's training, not yet started, and the real splits (of which only validation and test images may be shown to it)."""
    device = pick_device()
    splits = load_stored_splits(run / SPLITS_FILE)
    model = new_classifier(splits.num_classes, splits.channels, recipe, derive_seed(spec.seed, "student"))
    schedule = student_schedule(recipe, spec.synthesis, spec.epochs, len(splits.train))
    regenerations = schedule.steps / schedule.steps_per_epoch / spec.synthesis.regeneration_rate
    data = synthetic_set(run, spec, recipe, splits, device, regenerations=regenerations)
    return ClassifierTraining(model, data, recipe, schedule, derive_seed(spec.seed, "data"), device), splits


def start_student(run: Path, spec: StudentSpec, recipe: ClassifierConfig, ticks: Ticks, state: State | None) -> TickedTraining:
    """A student of the sweep, the tuning or a comparison, from `state` if there is one; it is judged on validation images."""
    training, splits = student_training(run, spec, recipe)
    return TickedTraining(training, splits.validation, ticks, state)


def train_final_student(
    run: Path, folder: Path, spec: StudentSpec, recipe: ClassifierConfig, state: State | None, save: Save
) -> None:
    """Train the student that is handed on; leaves weights.safetensors and result.json in `folder`."""
    training, splits = student_training(run, spec, recipe)
    ticked = TickedTraining(training, splits.validation, FINAL_STUDENT_TICKS, state)
    ticked.finish(save)
    if worker_rank() == 0:
        save_classifier(folder / "weights.safetensors", training.model)
        write_json(folder / "result.json", ticked.result(splits.test))
