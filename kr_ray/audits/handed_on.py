"""What a set of images, or a generator by its samples, gives away of each audit sample.

No model is asked: the attacker holds the images. A sample that was trained on may lie nearer to them than
one that was not (Chen et al., "GAN-Leaks", CCS 2020), or where more of them lie (Hilprecht et al., "Monte
Carlo and Reconstruction Membership Inference Attacks against Generative Models", PoPETs 2019). How near it
lies anyway is known from the other runs, as in LiRA. Only images of the sample's given label count, for sets
are labelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kr_ray.methods.interface import HandedOn
from kr_ray.runs.artifacts import READ_ERRORS, atomic_write, is_damage, load_arrays
from kr_ray.runs.figures import SetArtefact, SetAttackName

STATISTICS: tuple[SetAttackName, ...] = ("nearest", "density")
"""The first is the one chosen beforehand."""
ARTEFACTS: tuple[SetArtefact, ...] = ("set", "generator")
SMALLEST = 1e-3
"""Of a distance (root mean square over pixels in [0, 1]): a fourth of a grey level; an exact copy has it."""
KERNEL = 0.25
"""A wider kernel averages over all images alike where distances hardly differ, as between many pixels."""
ROWS = 256
"""Of a block of distances."""


@dataclass(frozen=True)
class SetScores:
    """What one run's images say of the audit samples.

    Attributes:
        statistics: float64 [artefacts, 2, samples]: `STATISTICS` of the set alone, then, if there is a
            generator, of all its samples; higher = nearer.
        images: int64 [artefacts], how many there are of each.
        known: float64 [samples], how well the generator's weights know each sample; [0] if they do not say.
    """

    statistics: NDArray[np.float64]
    images: NDArray[np.int64]
    known: NDArray[np.float64]

    def save(self, path: Path, stamp: str) -> None:
        """Write atomically; `stamp` names the inputs."""
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, stamp=np.array(stamp), **vars(self))

    @classmethod
    def load(cls, path: Path, stamp: str) -> SetScores | None:
        """Those at `path` if they are whole and were made of these inputs, else None."""
        if not path.exists():
            return None
        try:
            found = load_arrays(path)
            parts = found["statistics"], found["images"], found["known"]
            return cls(*parts) if str(found["stamp"]) == stamp else None
        except READ_ERRORS as error:
            if not is_damage(error, path):
                raise
            return None


def set_scores(handed: HandedOn, images: Tensor, labels: Tensor, known: Tensor | None = None) -> SetScores:
    """Score audit samples against images that are handed on.

    Args:
        images, labels: of the samples: uint8 [M, C, S, S], int64 [M], as given in training.
        known: float64 [M], what the generator's weights say of them.
    """
    sizes = [handed.set_size] + ([len(handed.images)] if len(handed.images) > handed.set_size else [])
    values = [nearness(images, labels, handed.images[:size], handed.labels[:size]) for size in sizes]
    weights = np.zeros(0) if known is None else known.numpy()
    return SetScores(np.stack(values), np.array(sizes, dtype=np.int64), weights)


def nearness(images: Tensor, labels: Tensor, among: Tensor, their_labels: Tensor) -> NDArray[np.float64]:
    """`STATISTICS` of each image among those of its label (among all, if there is none): float64 [2, M].

    nearest: minus the logarithm of the distance to the nearest one. density: the logarithm of a Gaussian
    kernel density, whose width is KERNEL of the median distance to a nearest one.
    """
    result = np.zeros((2, len(images)))
    queries, points = (part.flatten(1).float() / 255 for part in (images, among))
    distances = [_distances(queries[k : k + ROWS], points) for k in range(0, len(queries), ROWS)]
    every = torch.cat(distances) if distances else torch.zeros((0, len(points)))
    other = labels[:, None] != their_labels[None]
    other[other.all(dim=1)] = False
    every = every.masked_fill(other, torch.inf)
    least = every.min(dim=1).values.clamp_min(SMALLEST)
    width = KERNEL * least.median()
    kernels = -(every**2) / (2 * width**2)
    result[0] = -least.log().double().numpy()
    result[1] = (kernels.double().logsumexp(dim=1) - (~other).sum(dim=1).double().log()).numpy()
    return result


def _distances(queries: Tensor, points: Tensor) -> Tensor:
    """Root mean square over pixels, float32 [M, N]."""
    found = torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist")
    return found / points.shape[1] ** 0.5
