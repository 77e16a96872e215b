"""Classifiers by name: built, saved, loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from kr_ray.classifiers.resnet import ResNet14
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig
from kr_ray.runs.artifacts import load_tensors, save_tensors


def new_classifier(num_classes: int, channels: int, recipe: ClassifierConfig, seed: int) -> ResNet14:
    """A ResNet14 whose initial weights depend on nothing but `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        return ResNet14(num_classes, channels, recipe.width)


def save_classifier(path: Path, model: ResNet14) -> None:
    """Write a classifier's weights with what is needed to build it again."""
    metadata = {"num_classes": model.num_classes, "channels": model.channels, "width": model.width}
    save_tensors(path, model.state_dict(), metadata)


def load_classifier(path: Path, device: torch.device) -> ResNet14:
    """A frozen classifier in evaluation mode on `device`.

    Raises:
        ArtifactError: the file is missing or broken.
    """
    tensors, metadata = load_tensors(path)
    model = ResNet14(**metadata)
    model.load_state_dict(tensors)
    return model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
