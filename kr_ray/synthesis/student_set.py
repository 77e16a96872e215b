"""The synthetic set of one student: what makes it, how large it is, where it is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from kr_ray.classifiers.networks import load_classifier
from kr_ray.classifiers.training import Labeller, Schedule
from kr_ray.compute.graphs import compiled
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig, GeneratorSection, SynthesisConfig
from kr_ray.data.images import Splits, class_prior
from kr_ray.generators.interface import checkpoint_file, released_prior
from kr_ray.generators.registry import generator_of
from kr_ray.runs.stages import WEIGHTS_FILE
from kr_ray.synthesis.labelling import seen_labeller
from kr_ray.synthesis.stream import RegeneratedSet, SyntheticSet

LABELLER_PAYS_FROM = 4e6
"""Images: compiling the teacher took 4 s on an H200 and saved 1 microsecond an image at width 64."""


@dataclass(frozen=True)
class StudentSpec:
    """What makes one student differ from another. Two students of equal spec are equal, bit for bit.

    Attributes:
        generator: the section of the generator whose checkpoint it is.
        epochs: see `student_schedule`.
    """

    generator: GeneratorSection
    checkpoint_epoch: int
    synthesis: SynthesisConfig
    epochs: float
    seed: int


def student_schedule(
    recipe: ClassifierConfig, synthesis: SynthesisConfig, epochs: float, real_images: int
) -> Schedule:
    """Budget of a student: with `epoch_unit: synthetic` (the paper) the cardinality scale multiplies it."""
    scaled = real_images * synthesis.cardinality_scale
    if synthesis.epoch_unit == "synthetic":
        return Schedule.fit(recipe, scaled, epochs)
    return Schedule.fit(recipe, scaled, epochs / synthesis.cardinality_scale)


def compiled_teacher(run: Path, device: torch.device, images: float) -> nn.Module:
    """The run's teacher, which about so many images will be shown to."""
    return compiled(
        load_classifier(run / "teacher" / WEIGHTS_FILE, device), device, images, LABELLER_PAYS_FROM
    )


def student_labeller(
    run: Path, spec: StudentSpec, schedule: Schedule, device: torch.device
) -> Labeller | None:
    """Labels what the student of `spec` sees; None where its images come with labels."""
    if spec.synthesis.view == "clean":
        return None
    teacher = compiled_teacher(run, device, schedule.steps * schedule.batch_size)
    return seen_labeller(teacher, spec.synthesis.temperature, device)


def synthetic_set(
    run: Path,
    spec: StudentSpec,
    recipe: ClassifierConfig,
    splits: Splits,
    device: torch.device,
    images: int = 0,
    regenerations: float = 1,
) -> SyntheticSet:
    """The set that the student of `spec` is trained on, made on `device` about so many times.

    `images` other than 0 asks for a set of that size from the same seeds.
    """
    size, seed = images or set_size(spec, splits), derive_seed(spec.seed, "synthetic set")
    prior, synthesis = set_prior(run, spec, splits), spec.synthesis
    sampler = generator_of(spec.generator).open(
        run / checkpoint_file(spec.checkpoint_epoch),
        synthesis.sampling,
        prior=prior,
        seed=derive_seed(seed, "standing"),
        device=device,
        batch_size=synthesis.batch_size,
        images=size * regenerations,
    )
    return SyntheticSet(
        sampler=sampler,
        teacher=compiled_teacher(run, device, size * regenerations)
        if synthesis.asks_the_teacher and synthesis.view == "clean"
        else None,
        prior=prior,
        images=size,
        config=synthesis,
        label_smoothing=recipe.label_smoothing,
        seed=seed,
    )


def set_prior(run: Path, spec: StudentSpec, splits: Splits) -> Tensor:
    """Class frequencies of the labels that are asked for, float64 [K]. Only `real` looks at the real
    labels."""
    match spec.synthesis.class_prior:
        case "real":
            return class_prior(splits.train.labels, splits.num_classes)
        case "uniform":
            return torch.full((splits.num_classes,), 1 / splits.num_classes, dtype=torch.float64)
        case "released":
            return released_prior(run / checkpoint_file(spec.checkpoint_epoch))


def set_size(spec: StudentSpec, splits: Splits) -> int:
    """Images of the set that the student of `spec` is trained on."""
    return spec.synthesis.cardinality_scale * len(splits.train)


class OpenSet(Protocol):
    """Gives a student its training images, made where it says."""

    def __call__(
        self,
        run: Path,
        spec: StudentSpec,
        recipe: ClassifierConfig,
        splits: Splits,
        device: torch.device,
        epochs: int,
    ) -> RegeneratedSet:
        """The images of the student's epochs 0 to `epochs` - 1, on `device`."""
        ...


def on_device(
    run: Path, spec: StudentSpec, recipe: ClassifierConfig, splits: Splits, device: torch.device, epochs: int
) -> RegeneratedSet:
    """Generated by the training itself, between two epochs."""
    return synthetic_set(
        run, spec, recipe, splits, device, regenerations=epochs / spec.synthesis.regeneration_rate
    )
