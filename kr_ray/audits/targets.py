"""What an attacked model answers on members and non-members."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kr_ray.classifiers.networks import load_classifier
from kr_ray.classifiers.predict import predict_logits
from kr_ray.compute.devices import pick_device
from kr_ray.data.datasets import duplicate_indices
from kr_ray.data.images import LabelledImages
from kr_ray.data.store import SPLITS_FILE, load_stored_splits


@dataclass(frozen=True)
class TargetLogits:
    """Logits float32 [M, K] and [N, K], labels int64 [M] and [N]."""

    member_logits: NDArray[np.float32]
    member_labels: NDArray[np.int64]
    non_member_logits: NDArray[np.float32]
    non_member_labels: NDArray[np.int64]


def target_logits(run: Path, weights: Path) -> TargetLogits:
    """Ask the model at `weights` about the training images (members) and the test images (non-members).

    Images that are in both splits, as one of BreastMNIST's is, are neither;
    an image repeated within a split counts once.
    """
    splits, device = load_stored_splits(run / SPLITS_FILE), pick_device()
    members = _without(splits.train, duplicate_indices(splits.train.images))
    members = _without(members, duplicate_indices(members.images, splits.test.images))
    non_members = _without(splits.test, duplicate_indices(splits.test.images, splits.train.images))
    non_members = _without(non_members, duplicate_indices(non_members.images))
    model = load_classifier(weights, device)
    return TargetLogits(
        predict_logits(model, members.images, device).numpy(),
        members.labels.numpy(),
        predict_logits(model, non_members.images, device).numpy(),
        non_members.labels.numpy(),
    )


def _without(images: LabelledImages, index: torch.Tensor) -> LabelledImages:
    keep = torch.ones(len(images), dtype=torch.bool)
    keep[index] = False
    return images.subset(keep)
