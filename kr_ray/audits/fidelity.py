"""How well generated images cover the real distribution, by published
libraries in whatever feature space is given.

Features of the teacher are not those of an Inception network: the figures compare generators of one run, or a
generator with the real test images beside it, and nothing outside.
"""

from __future__ import annotations

import contextlib
import io
import warnings

import torch
from torch import Tensor, nn

from kr_ray.runs.figures import Fidelity

NEIGHBOURS = 5
"""k of precision, recall, density and coverage, the default of Naeem et al. 2020."""
FEWEST_IMAGES = 100
"""Below this a k-nearest-neighbour ball covers 5 % of the data and more, and KID's subsets are noise."""
MOST_IMAGES = 2000
"""Precision and its kin need all pairwise distances: 32 MB each at 2,000 images."""
KID_SUBSETS, KID_SUBSET_SIZE = 50, 500


class _GivenFeatures(nn.Module):
    """Stands where the library expects a network: the features have been computed already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fidelity(real: Tensor, generated: Tensor, seed: int) -> Fidelity:
    """FID and KID (torchmetrics), precision, recall, density and
    coverage (prdc, by the authors of the last two).

    Args:
        real, generated: features, float32 [N, D] and [M, D]; at most 2,000 of each are used.

    Returns:
        n_real, n_generated; fid (Heusel et al. 2017), fid_refused where fewer than 2 D images on a side make
        the covariance's estimate, and with it a bias of order D / n, meaningless; kid, kid_sd (Binkowski et
        al. 2018; mean and spread over subsets); precision, recall (Kynkaanniemi et al. 2019), density,
        coverage (Naeem et al. 2020), k = 5. All but the counts are None with `refused` saying why, where
        there are fewer than 100 images on a side.
    """
    real, generated = (_some(features, seed).cpu().float() for features in (real, generated))
    counts, least = {"n_real": len(real), "n_generated": len(generated)}, min(len(real), len(generated))
    if least < FEWEST_IMAGES:
        names = ("fid", "kid", "kid_sd", "precision", "recall", "density", "coverage")
        none: dict[str, None] = dict.fromkeys(names)
        reason = (
            f"needs >= {FEWEST_IMAGES} images on either side, but got {least}; "
            "generate more, or use a larger real split"
        )
        return Fidelity(**counts, **none, refused=reason, fid_refused=reason)
    enough = least >= 2 * real.shape[1]
    reason = (
        f"needs >= {2 * real.shape[1]} images on either side, twice the feature dimension, but got {least}"
    )
    return Fidelity(
        **counts,
        fid=_fid(real, generated) if enough else None,
        fid_refused="" if enough else reason,
        **_kid(real, generated, seed),
        **_prdc(real, generated),
    )


def _some(features: Tensor, seed: int) -> Tensor:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:MOST_IMAGES]
    return features[order.to(features.device)]


def _fid(real: Tensor, generated: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_GivenFeatures(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return max(0.0, float(metric.compute()))  # the trace of a matrix root may round below zero


def _kid(real: Tensor, generated: Tensor, seed: int) -> dict[str, float]:
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET_SIZE, len(real), len(generated))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings(
            "ignore", message="Metric `Kernel Inception Distance`"
        )  # says that it keeps the features
        torch.manual_seed(seed)  # the library draws its subsets from the global state
        metric = KernelInceptionDistance(
            feature=_GivenFeatures(real.shape[1]), subsets=KID_SUBSETS, subset_size=size
        )
        metric.update(real, real=True)
        metric.update(generated, real=False)
        mean, sd = metric.compute()
    return {"kid": float(mean), "kid_sd": float(sd)}


def _prdc(real: Tensor, generated: Tensor) -> dict[str, float]:
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the counts
        found = compute_prdc(real.numpy(), generated.numpy(), nearest_k=NEIGHBOURS)
    return {name: float(value) for name, value in found.items()}
