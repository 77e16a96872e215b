"""What an attacked model answers on members and non-members."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kr_ray.classifiers.networks import load_classifier
from kr_ray.classifiers.predict import predict_logits
from kr_ray.compute.devices import pick_device
from kr_ray.data.datasets import duplicate_indices
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.privacy.arrays import IndexArray, LogitArray


@dataclass(frozen=True)
class TargetLogits:
    """Logits float32 [M, K] and [N, K], labels int64 [M] and [N]."""

    member_logits: LogitArray
    member_labels: IndexArray
    non_member_logits: LogitArray
    non_member_labels: IndexArray


def target_logits(run: Path, weights: Path) -> TargetLogits:
    """Ask the model at `weights` about the training images (members) and the test images (non-members).

    Images that are in both splits, as one of BreastMNIST's is, are neither;
    an image repeated within a split counts once.
    """
    splits, device = load_stored_splits(run / SPLITS_FILE), pick_device()
    members = splits.train.without(duplicate_indices(splits.train.images))
    members = members.without(duplicate_indices(members.images, splits.test.images))
    non_members = splits.test.without(duplicate_indices(splits.test.images, splits.train.images))
    non_members = non_members.without(duplicate_indices(non_members.images))
    model = load_classifier(weights, device)
    return TargetLogits(
        predict_logits(model, members.images, device).numpy(),
        members.labels.numpy(),
        predict_logits(model, non_members.images, device).numpy(),
        non_members.labels.numpy(),
    )
