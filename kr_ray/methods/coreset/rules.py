"""Which images a coreset takes: pure functions of what a selection training has recorded.

Ties are broken by seed: images come in a seeded order, and of equals the first is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kr_ray.compute.seeding import seeded_generator
from kr_ray.config.coreset import CoresetSection
from kr_ray.privacy.arrays import FloatArray, IndexArray
from kr_ray.runs.artifacts import holding, load_tensors, save_tensors


@dataclass(frozen=True)
class SelectionScores:
    """What one training on all images shows of each of them; N images in the order of the training split.

    Attributes:
        forgotten: int64 [N], how often an augmented image was answered wrongly in the step after one in which
            it was answered rightly (Toneva et al. 2019, section 2; its own steps, an epoch apart).
        learned: bool [N], whether it was ever answered rightly.
        el2n_early, el2n_end: float32 [N], norm of the error of the probabilities (Paul et al. 2021) of the
            unaltered image, after a quarter of the training and at its end.
        grand_early, grand_end: float32 [N], norm of the loss's gradient (the same), in the last layer's
            weights alone, as in DeepCore (Guo et al. 2022).
        entropy: float32 [N], of the probabilities at the end, in nats.
        features: float32 [N, D], of the penultimate layer at the end.
    """

    forgotten: Tensor
    learned: Tensor
    el2n_early: Tensor
    el2n_end: Tensor
    grand_early: Tensor
    grand_end: Tensor
    entropy: Tensor
    features: Tensor

    def save(self, path: Path) -> None:
        save_tensors(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> SelectionScores:
        """What `save` wrote.

        Raises:
            ArtifactError: the file is missing or broken.
        """
        tensors, _ = load_tensors(path)
        with holding(path, "the scores of a selection training"):
            return cls(**{field.name: tensors[field.name] for field in fields(cls)})


def select(
    section: CoresetSection, labels: Tensor, num_classes: int, scores: SelectionScores | None, seed: int
) -> Tensor:
    """The images that the section's rule takes: int64 [M], ascending.

    Args:
        labels: as given in training, int64 [N].
        scores: None for `random`, which needs none.
    """
    order = torch.randperm(len(labels), generator=seeded_generator(seed, "ties")).numpy()
    by_class = labels.numpy()[order]
    groups = [order[by_class == label] for label in range(num_classes)] if section.balance else [order]
    taken = [group[_picked(section, group, scores)] for group in groups if len(group)]
    return torch.from_numpy(np.sort(np.concatenate(taken)))


def budget(fraction: float, images: int) -> int:
    """Images of a group of so many, of which there is at least one: the nearest whole number, halves upwards,
    and at least 1."""
    return max(1, math.floor(fraction * images + 0.5))


def _picked(section: CoresetSection, group: IndexArray, scores: SelectionScores | None) -> IndexArray:
    """Places within `group`: int64 [budget]."""
    size = budget(section.fraction, len(group))
    if section.selection == "random":
        return np.arange(size)
    assert scores is not None, "all other rules need a selection training"
    match section.selection:
        case "herding":
            return herding(_of(scores.features, group), size)
        case "k_center":
            return k_center(_of(scores.features, group), size)
        case _:
            return highest(_of(_ranked_by(section, scores), group), size)


def _of(values: Tensor, group: IndexArray) -> FloatArray:
    return values.numpy()[group].astype(np.float64)


def _ranked_by(section: CoresetSection, scores: SelectionScores) -> Tensor:
    """Of the rules that take the images of the largest score: that score, [N]."""
    match section.selection:
        case "forgetting":
            return forgetfulness(scores.forgotten, scores.learned, section.never_learned == "max")
        case "el2n":
            return scores.el2n_early if section.scored == "early" else scores.el2n_end
        case "grand":
            return scores.grand_early if section.scored == "early" else scores.grand_end
        case "entropy":
            return scores.entropy
        case other:
            raise ValueError(f"`selection` must be a rule that ranks images, but got {other}")


def forgetfulness(forgotten: Tensor, learned: Tensor, never_learned_first: bool) -> Tensor:
    """Events per image, int64 [N]. Never learned: more than any other (Toneva et al.), or none (DeepCore)."""
    most = int(forgotten.max()) + 1 if never_learned_first else 0
    return torch.where(learned, forgotten, most)


def highest(values: FloatArray, size: int) -> IndexArray:
    """Places of the `size` largest; of equals the first."""
    return np.argsort(-values, kind="stable")[:size]


def herding(features: FloatArray, size: int) -> IndexArray:
    """One after the other, what brings the mean of those taken nearest to the mean of all (Welling 2009): the
    first is the nearest to the mean.

    Args:
        features: [N, D].
    """
    mean, half_norms = features.mean(0), np.square(features).sum(1) / 2
    taken: list[int] = []
    total = np.zeros_like(mean)
    for count in range(1, size + 1):
        # |count * mean - total - x|^2 is smallest where this is largest.
        gain = features @ (count * mean - total) - half_norms
        gain[taken] = -np.inf
        taken.append(int(gain.argmax()))
        total += features[taken[-1]]
    return np.array(taken, dtype=np.int64)


def k_center(features: FloatArray, size: int) -> IndexArray:
    """One after the other, what lies farthest from all those taken (the greedy 2-approximation of Sener &
    Savarese 2018, algorithm 1), from the nearest to the mean on.

    Args:
        features: [N, D].
    """
    norms = np.square(features).sum(1)

    def distances(point: FloatArray) -> FloatArray:
        found: FloatArray = norms - 2 * (features @ point) + point @ point
        return found

    taken = [int(distances(features.mean(0)).argmin())]
    nearest = distances(features[taken[0]])
    while len(taken) < size:
        nearest[taken] = -np.inf
        taken.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, distances(features[taken[-1]]))
    return np.array(taken, dtype=np.int64)
