"""What pulls the images: distribution matching, and gradient matching (DC and DSA).

Every step's random numbers come from (seed, what, iteration), so that a training goes on from any state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kr_ray.classifiers.convnet import ConvNet3, fresh_convnet
from kr_ray.compute.seeding import derive_seed, seeded_generator
from kr_ray.config.distillation import DistillationSection
from kr_ray.methods.distillation.augment import draw
from kr_ray.methods.distillation.initial import Initial
from kr_ray.methods.distillation.sets import RealImages


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a distillation works on.

    Attributes:
        operations: of the augmentation; none: no augmentation.
        seed: of all random numbers.
    """

    section: DistillationSection
    real: RealImages
    operations: Sequence[str]
    seed: int

    @property
    def device(self) -> torch.device:
        return self.real.images.device

    @property
    def classes(self) -> int:
        return len(self.real.by_class)

    def network(self, *name: int | str) -> ConvNet3:
        """A network that was never trained, another one for every name."""
        channels, seed = self.real.images.shape[1], derive_seed(self.seed, "network", *name)
        network = fresh_convnet(self.classes, channels, self.section.network_width, seed)
        return network.to(self.device)


class Matching(ABC):
    """Distilled images in the course of their making; goes on from any of its states, bit for bit.

    Attributes:
        images: standardised float32 [M, C, H, W], class by class, moved in place.
        labels: int64 [M].
    """

    def __init__(self, setting: Setting, initial: Initial) -> None:
        section = setting.section
        self.setting, self.section, self.labels = setting, section, initial.labels.to(setting.device)
        self.images = initial.images.detach().clone().requires_grad_()
        self.optimizer = torch.optim.SGD(
            [self.images], lr=section.image_rate, momentum=section.image_momentum
        )

    @abstractmethod
    def step(self, iteration: int) -> float:
        """One iteration; returns its loss."""

    @property
    def images_per_step(self) -> int:
        """Real images that an iteration looks at, at most; of trajectory matching, distilled ones."""
        return self.section.real_batch * self.setting.classes

    def targets(self) -> Tensor:
        """Label probabilities float32 [M, K]."""
        return functional.one_hot(self.labels, self.setting.classes).float()

    def of_class(self, label: int) -> Tensor:
        count = self.section.images_per_class
        return self.images[label * count : (label + 1) * count]

    def pairs(self, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """For every class its real batch and its distilled images, augmented alike."""
        for label in range(self.setting.classes):
            batch = self.setting.real.batch(label, self.section.real_batch, random)
            augment = draw(self.setting.operations, random)
            yield augment(batch), augment(self.of_class(label))

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images.detach(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.images.copy_(state["images"])
        self.optimizer.load_state_dict(state["optimizer"])


class DistributionMatching(Matching):
    """Zhao & Bilen, "Dataset Condensation with Distribution Matching" (WACV 2023), equation 5: in every
    iteration a network that was never trained maps both sets, and the classes' mean features are matched."""

    def step(self, iteration: int) -> float:
        setting = self.setting
        network = setting.network(iteration).requires_grad_(False)
        real, distilled = zip(*self.pairs(seeded_generator(setting.seed, "batch", iteration)), strict=True)
        with torch.no_grad():
            of_real = network.features(torch.cat(real)).split([len(batch) for batch in real])
        of_distilled = network.features(torch.cat(distilled)).split([len(batch) for batch in distilled])
        loss = distribution_distance(of_real, of_distilled)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def distribution_distance(real: Sequence[Tensor], distilled: Sequence[Tensor]) -> Tensor:
    """Sum over the classes of the squared distance of mean features, each float [n, D]."""
    distances = [((a.mean(0) - b.mean(0)) ** 2).sum() for a, b in zip(real, distilled, strict=True)]
    return torch.stack(distances).sum()


class GradientMatching(Matching):
    """Zhao, Mopuri & Bilen (ICLR 2021), algorithm 1; with siamese augmentation DSA (ICML 2021): what a step
    on the distilled images would change in a network is made what a step on real ones would, all along the
    training of that network on the distilled images."""

    @property
    def images_per_step(self) -> int:
        return super().images_per_step * self.section.loops[0]

    def step(self, iteration: int) -> float:
        outer, inner = self.section.loops
        network, total = self.setting.network(iteration), 0.0
        descent = torch.optim.SGD(network.parameters(), lr=self.section.network_learning_rate)
        for turn in range(outer):
            total += self._match(network, seeded_generator(self.setting.seed, "batch", iteration, turn))
            if turn < outer - 1:
                random = seeded_generator(self.setting.seed, "inner", iteration, turn)
                self._learn(network, descent, inner, random)
        return total / (outer * self.setting.classes)

    def _match(self, network: ConvNet3, random: torch.Generator) -> float:
        parameters, total = list(network.parameters()), 0.0
        self.optimizer.zero_grad()
        for label, (real, distilled) in enumerate(self.pairs(random)):
            wanted = _gradients(network, parameters, real, label, twice=False)
            found = _gradients(network, parameters, distilled, label, twice=True)
            loss = gradient_distance(wanted, found)
            # Class by class, so that one class's graph is in memory at a time. The sum is the same.
            (slope,) = torch.autograd.grad(loss, self.images)
            self.images.grad = slope if self.images.grad is None else self.images.grad + slope
            total += loss.item()
        self.optimizer.step()
        return total

    def _learn(
        self, network: ConvNet3, descent: torch.optim.SGD, epochs: int, random: torch.Generator
    ) -> None:
        """Train the network on the distilled images as they are now."""
        images, size = self.images.detach(), self.section.network_batch
        for _ in range(epochs):
            for index in torch.randperm(len(images), generator=random).split(size):
                augment = draw(self.setting.operations, random, len(index))
                at = index.to(images.device)
                loss = functional.cross_entropy(network(augment(images[at])), self.labels[at])
                descent.zero_grad()
                loss.backward()
                descent.step()


def _gradients(
    network: ConvNet3, parameters: Sequence[Tensor], images: Tensor, label: int, *, twice: bool
) -> tuple[Tensor, ...]:
    """Of the mean loss of images of one class, by parameter; `twice`: they can be differentiated again."""
    labels = torch.full((len(images),), label, device=images.device)
    loss = functional.cross_entropy(network(images), labels)
    return torch.autograd.grad(loss, parameters, create_graph=twice)


def gradient_distance(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
    """Zhao et al. 2021, equation 7: for every weight tensor one minus the cosine of each output's gradients,
    summed over outputs and layers. Biases and scales, of one dimension, do not count, as in the authors'
    code."""
    rows = [(a.flatten(1), b.flatten(1)) for a, b in zip(wanted, found, strict=True) if a.ndim > 1]
    return torch.stack([(1 - _cosine(a, b)).sum() for a, b in rows]).sum()


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """Of rows, with the authors' guard against gradients of zero."""
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1) + 1e-6)
