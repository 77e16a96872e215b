"""The collapse alarm: one small generated set per checkpoint, seen through the teacher's eyes.

A collapsed GAN shows in two ways: the teacher no longer recognises the classes that were asked for, or the
images of a class have become alike. Both cost a few hundred forward passes, 0.9 % of the student that would
find out otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kr_ray.classifiers.interface import Classifier
from kr_ray.classifiers.predict import teacher_probabilities
from kr_ray.config import CollapseConfig
from kr_ray.data.augment import to_float


@torch.inference_mode()
def within_class_spread(teacher: Classifier, images: Tensor, classes: Tensor) -> float:
    """Mean distance of the teacher's features (penultimate layer) to their class
    mean; images uint8 [N, C, H, W], classes int64 [N]."""
    features = teacher.features(to_float(images)).float()
    sums = torch.zeros(int(classes.max()) + 1, features.shape[1], device=features.device).index_add_(
        0, classes, features
    )
    counts = torch.bincount(classes).clamp(min=1)[:, None]
    return (features - (sums / counts)[classes]).norm(dim=1).mean().item()


@dataclass(frozen=True)
class Judged:
    """Of one generated set.

    Attributes:
        agreement: share of images that the teacher takes for the class they
            were generated for, mean over classes.
        diversity: within-class spread relative to the real images'.
        alarm: whether one of them is below its threshold.
    """

    agreement: float
    diversity: float
    alarm: bool


def measure_collapse(
    teacher: Classifier, images: Tensor, classes: Tensor, real_spread: float, config: CollapseConfig
) -> Judged:
    """Judge one generated set.

    Args:
        images: uint8 [N, C, H, W], generated for `classes` (int64 [N]).
        real_spread: `within_class_spread` of real images.
    """
    probabilities = teacher_probabilities(teacher, images)
    agrees = (probabilities.argmax(1) == classes).double()
    # Class by class: a generator that only ever makes the commonest class
    # agrees with chance, not with that class's share.
    agreement = torch.stack([agrees[classes == index].mean() for index in classes.unique()]).mean().item()
    diversity = within_class_spread(teacher, images, classes) / max(real_spread, 1e-12)
    chance = 1 / probabilities.shape[1]
    above_chance = (agreement - chance) / (1 - chance)
    alarm = above_chance <= config.min_agreement or diversity < config.min_diversity
    return Judged(agreement, diversity, alarm)
