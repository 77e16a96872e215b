"""Teachers on disjoint shards, and their noisy answers: all that the student ever learns of the private
images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kr_ray.classifiers.networks import load_classifier, save_classifier
from kr_ray.classifiers.predict import predict_logits
from kr_ray.classifiers.training import Schedule
from kr_ray.compute.devices import pick_device
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig, ConfigError
from kr_ray.config.dp import DpdfdSection
from kr_ray.data.images import LabelledImages
from kr_ray.dp.noise import NoiseKey
from kr_ray.methods.dpdfd.losses import bounded, output_gradient
from kr_ray.methods.teacher import train_on_real

SENSITIVITY = {"gradients": 2.0, "votes": math.sqrt(2.0)}
"""Of one query, in units of C or of one vote: one image changes one teacher, whose bounded gradient may turn
round, and whose vote may move from one class to another."""
MAX_EXPECTED_GAPS = 0.05
"""Expected number of (shard, class) pairs without an image above which the shards are refused beforehand."""


def check_shards(counts: Tensor, teachers: int) -> None:
    """Refuse shards in which a class is likely to be missing; `counts` are the images of every class, [K].

    Raises:
        ConfigError: there would be empty classes.
    """
    gaps = (
        float((teachers * (1 - 1 / teachers) ** counts.double()).sum())
        if teachers > 1
        else float((counts == 0).sum())
    )
    if gaps > MAX_EXPECTED_GAPS:
        least = int(counts.min())
        raise ConfigError(
            f"every teacher must see every class, but got teachers={teachers} for a class of {least} "
            "images; use "
            f"{max(1, least // 20)} or fewer, or fewer classes"
        )


def shards(images: LabelledImages, num_classes: int, teachers: int, key: NoiseKey) -> list[Tensor]:
    """Indices int64 of every teacher's shard, by a keyed hash of each image alone: one image more or less
    changes one shard.

    Raises:
        ConfigError: a shard lacks a class.
    """
    pixels, labels = images.images.contiguous().numpy(), images.labels.numpy()
    of = torch.tensor(
        [
            key.shard(image.tobytes() + bytes(str(label), "ascii"), teachers)
            for image, label in zip(pixels, labels, strict=True)
        ]
    )
    parts = [(of == teacher).nonzero().flatten() for teacher in range(teachers)]
    for teacher, part in enumerate(parts):
        counts = torch.bincount(images.labels[part], minlength=num_classes)
        if (counts == 0).any():
            raise ConfigError(
                f"every teacher must see every class, but shard {teacher + 1} of {teachers} has no image "
                f"of class {int(counts.argmin())}; "
                f"use fewer teachers than {teachers}"
            )
    return parts


def teacher_file(folder: Path, teacher: int) -> Path:
    return folder / "teachers" / f"{teacher}.safetensors"


def train_teachers(
    folder: Path,
    images: LabelledImages,
    parts: list[Tensor],
    num_classes: int,
    recipe: ClassifierConfig,
    epochs: int,
    seed: int,
    tell: Callable[[int], None],
) -> None:
    """Train what is not yet trained: ordinary trainings, for anything may be done within a shard. `tell`
    hears how many are done."""
    for teacher, part in enumerate(parts):
        path = teacher_file(folder, teacher)
        if not path.exists():
            schedule = Schedule.fit(recipe, len(part), epochs)
            training = train_on_real(
                images.subset(part), num_classes, recipe, schedule, derive_seed(seed, "teacher", teacher)
            )
            training.train_until(schedule.steps)
            save_classifier(path, training.model)
        tell(teacher + 1)


def noisy_answers(
    folder: Path,
    student: Tensor,
    images: Tensor,
    section: DpdfdSection,
    sigma: float,
    key: NoiseKey,
    round_index: int,
) -> Tensor:
    """What all teachers say of the images, with noise of std sigma * C (sigma of one vote): float64 [N, K].

    Gradients: the sum of bounded gradients in the student's outputs (section 4.4). Votes: the count of every
        class.

    Args:
        folder: with the teachers' files.
        student: logits float32 [N, K] on the images.
        images: uint8 [N, C, S, S].
        sigma: noise multiplier in the paper's sense.
        round_index: names the noise; the same round replays it.
    """
    total = torch.zeros(student.shape, dtype=torch.float64)
    for teacher in range(section.teachers):
        total += _answer(
            load_classifier(teacher_file(folder, teacher), pick_device()), student, images, section
        )
    unit = section.norm_bound if section.answer == "gradients" else 1.0
    return total + sigma * unit * key.gaussian(total.shape, "answers", round_index)


def _answer(teacher: nn.Module, student: Tensor, images: Tensor, section: DpdfdSection) -> Tensor:
    logits = predict_logits(teacher, images, pick_device())
    if section.answer == "votes":
        return F.one_hot(logits.argmax(1), logits.shape[1]).double()
    return bounded(
        output_gradient(student, logits, section.weight_of_others), section.norm_bound, section.bound
    )
