"""The plain way of training a classifier: a loader that augments image by
image, float32, contiguous, for-loop optimisers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from kr_ray.classifiers.interface import Classifier
from kr_ray.config import ClassifierConfig
from kr_ray.data.images import LabelledImages


class AugmentedImages(Dataset[Tensor]):
    """torchvision's transforms, one image at a time."""

    def __init__(self, images: Tensor, recipe: ClassifierConfig) -> None:
        self.images = images
        self.transform = v2.Compose(
            [
                v2.RandomCrop(images.shape[-1], padding=recipe.crop_padding),
                v2.RandomHorizontalFlip(),
                v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        augmented: Tensor = self.transform(self.images[index])
        return augmented


def augment_by_loader(images: Tensor, recipe: ClassifierConfig) -> Tensor:
    """All images through a loader in this process, batch by batch; the last batch, float32 [B, C, H, W]."""
    for batch in DataLoader(AugmentedImages(images, recipe), batch_size=recipe.batch_size, shuffle=True):
        last: Tensor = batch
    return last


class PlainClassifierSteps:
    """Gradient steps in float32 and contiguous memory, with the
    optimiser's for-loop and the loss read at every step."""

    def __init__(self, model: Classifier, images: LabelledImages, recipe: ClassifierConfig) -> None:
        self.model, self.recipe = model.to(images.images.device).train(), recipe
        self.inputs = (images.images.float() / 127.5 - 1).split(recipe.batch_size)
        self.labels = images.labels.split(recipe.batch_size)
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            recipe.learning_rate,
            recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=True,
            foreach=False,
            fused=False,
        )

    def run(self) -> float:
        """One pass over the images; the last loss."""
        value = 0.0
        for inputs, labels in zip(self.inputs, self.labels, strict=True):
            loss = functional.cross_entropy(
                self.model(inputs), labels, label_smoothing=self.recipe.label_smoothing
            )
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm, foreach=False)
            self.optimizer.step()
            value = loss.item()
        return value


@torch.no_grad()
def average_in_a_loop(average: dict[str, Tensor], values: dict[str, Tensor], decay: float) -> None:
    """Exponential moving average, tensor by tensor and out of place,
    as BigGAN's public training code writes it."""
    for name, tensor in average.items():
        tensor.copy_(tensor * decay + values[name] * (1 - decay))
