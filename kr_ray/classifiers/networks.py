"""Classifiers by name: built, saved, loaded. A new one: a file here, its
name in `config.classifiers`, a line in `build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_never, cast

import torch

from kr_ray.classifiers.convnet import ConvNet3
from kr_ray.classifiers.interface import Classifier
from kr_ray.classifiers.resnet import ResNet14
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig
from kr_ray.config.classifiers import NetworkName
from kr_ray.runs.artifacts import holding, load_tensors, save_tensors


def build(network: NetworkName, num_classes: int, channels: int, **sizes: Any) -> Classifier:
    """The network called so, with fresh weights from torch's global random
    state; `sizes` are those of its `Classifier.sizes`."""
    match network:
        case "resnet14":
            return ResNet14(num_classes, channels, **sizes)
        case "convnet3":
            return ConvNet3(num_classes, channels, **sizes)
        case _:
            assert_never(network)


def new_classifier(num_classes: int, channels: int, recipe: ClassifierConfig, seed: int) -> Classifier:
    """The recipe's network; its initial weights depend on nothing but `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        return build(recipe.network, num_classes, channels, **_sizes(recipe))


def _sizes(recipe: ClassifierConfig) -> dict[str, Any]:
    """What the recipe says of its network beside the name; only ResNet14 has a choice of norms."""
    norm = {"norm": recipe.norm} if recipe.network == "resnet14" else {}
    return {"width": recipe.width} | norm


def save_classifier(path: Path, model: Classifier) -> None:
    """Write a classifier's weights with what is needed to build it again."""
    metadata = {
        "network": model.network,
        "num_classes": model.num_classes,
        "channels": model.channels,
    } | model.sizes()
    save_tensors(path, model.state_dict(), metadata)


def load_classifier(path: Path, device: torch.device) -> Classifier:
    """A frozen classifier in evaluation mode on `device`.

    Raises:
        ArtifactError: the file is missing or broken.
    """
    tensors, metadata = load_tensors(path)
    with holding(path, "a classifier"):
        network = cast("NetworkName", metadata.pop("network", "resnet14"))  # version 0.1 had but one
        model = build(network, **metadata)
        model.load_state_dict(tensors)
    return model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
