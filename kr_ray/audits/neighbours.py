"""Do generated images copy training images? Their nearest training
neighbours, against those of real test images.

A generator that has learned the distribution makes images about as near to the training images as fresh real
ones are. What is nearer than that has been memorised. Test images are the yardstick, in any space with a
meaningful Euclidean distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from kr_ray.privacy.rates import clopper_pearson
from kr_ray.runs.figures import CopySpace, Histogram

CHUNK = 1024
"""Rows and columns of a distance block: 4 MB in float32, whatever the size of the sets."""
BINS = 30


@dataclass(frozen=True)
class Nearest:
    """Nearest neighbours: distance float32 [N] (>= 0), index int64 [N] into the set searched."""

    distance: Tensor
    index: Tensor


@torch.inference_mode()
def nearest(queries: Tensor, among: Tensor, own: Tensor | None = None) -> Nearest:
    """Euclidean nearest neighbour of every query, block by block on the queries' device.

    Args:
        queries: float32 [N, D].
        among: float32 [M, D], M >= 1.
        own: int64 [N]: each query is this row of `among`, which is left out of its search (M >= 2).
    """
    best = torch.full((len(queries),), torch.inf, device=queries.device)
    index = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for rows in torch.arange(len(queries), device=queries.device).split(CHUNK):
        for first in range(0, len(among), CHUNK):
            block = among[first : first + CHUNK].to(queries.device)
            # Differences, not |a|^2 - 2ab + |b|^2: a copy must come out at
            # zero, not at the root of a rounding error.
            distance = torch.cdist(queries[rows], block, compute_mode="donot_use_mm_for_euclid_dist")
            if own is not None:
                distance[own[rows, None] == torch.arange(first, first + len(block), device=own.device)] = (
                    torch.inf
                )
            found = distance.min(dim=1)
            closer = found.values < best[rows]
            best[rows] = torch.where(closer, found.values, best[rows])
            index[rows] = torch.where(closer, found.indices + first, index[rows])
    return Nearest(best, index)


def copy_figures(generated: Tensor, train: Tensor, test: Tensor, *, quantile: float) -> CopySpace:
    """What the nearest training neighbours say, in one space; all three
    float32 [N, D] and free of exact copies of each other.

    Returns:
        threshold: the `quantile` of the test images' distances to the training set; near_copies: generated
        images at or below it, near_copy_share with its Clopper-Pearson interval ci_low, ci_high, which takes
        the threshold as given. Without copying about `quantile` of them are.
        data_copying: Meehan, Chaudhuri and Dasgupta ("A Non-Parametric Test to Detect Data-Copying in
        Generative Models", AISTATS 2020), their Z_U over the whole space: the Mann-Whitney statistic of the
        two sets of distances, standard normal without copying; below -2 generated images are nearer to the
        training images than test images are, above 2 farther (underfit).
        memorised_share: 1 - authenticity (Alaa et al., "How Faithful is your Synthetic Data?", ICML 2022):
        generated images nearer to a training image than that one's own nearest training neighbour is.
        memorised_share_test: the same of the test images.
        median_generated, median_test: median distances; histogram: edges
            [31], generated [30], test [30], shares.
    """
    of_generated, of_test = nearest(generated, train), nearest(test, train)
    fake, real = of_generated.distance.cpu().double().numpy(), of_test.distance.cpu().double().numpy()
    threshold = float(np.quantile(real, quantile))
    near = int((fake <= threshold).sum())
    low, high = clopper_pearson(near, len(fake))
    return CopySpace(
        threshold=threshold,
        near_copies=near,
        near_copy_share=near / len(fake),
        ci_low=float(low),
        ci_high=float(high),
        data_copying=mann_whitney_z(fake, real),
        memorised_share=_memorised_share(of_generated, train),
        memorised_share_test=_memorised_share(of_test, train),
        median_generated=float(np.median(fake)),
        median_test=float(np.median(real)),
        histogram=_histogram(fake, real),
    )


def mann_whitney_z(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Standardised Mann-Whitney U of two samples, each of at least 1
    value: below 0 where `first` tends to be smaller."""
    m, n = len(first), len(second)
    u = float(stats.mannwhitneyu(first, second).statistic)
    return (u - m * n / 2) / float(np.sqrt(m * n * (m + n + 1) / 12))


def _memorised_share(found: Nearest, train: Tensor) -> float:
    room = nearest(train[found.index], train, own=found.index).distance
    return (found.distance < room).double().mean().item()


def _histogram(fake: NDArray[np.float64], real: NDArray[np.float64]) -> Histogram:
    top = float(np.quantile(np.concatenate([fake, real]), 0.995)) or 1.0
    edges = np.linspace(0, top, BINS + 1)
    # What lies beyond the last edge is counted in the last bin, so that both sum to 1.
    shares = {
        name: np.histogram(np.minimum(d, top), edges)[0] / len(d)
        for name, d in (("generated", fake), ("test", real))
    }
    return Histogram(edges=edges.tolist(), **{name: share.tolist() for name, share in shares.items()})
