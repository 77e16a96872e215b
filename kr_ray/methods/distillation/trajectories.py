"""Trajectory matching (Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", CVPR
2022), with the alignment of difficulty of Guo et al. (DATM, ICLR 2024).

Experts are networks trained on the private images; from an epoch of one of them on a few steps on the
distilled images must lead where whole epochs led the expert. Without the authors' ZCA whitening. Experts'
weights lie in the folder while the distillation goes on and are deleted at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from kr_ray.classifiers.convnet import ConvNet3
from kr_ray.compute.seeding import seeded_generator
from kr_ray.methods.distillation.augment import draw
from kr_ray.methods.distillation.initial import Initial
from kr_ray.methods.distillation.matching import Matching, Setting
from kr_ray.runs.artifacts import load_tensors, save_tensors

EXPERTS = "experts"
SURE = 0.9
"""First probability of a label that the expert does not give."""
SMALLEST_RATE = 1e-6


def expert_epochs(setting: Setting) -> int:
    """Epochs that an expert must be trained for: what comes later is never matched."""
    return setting.section.start_epochs[1] + setting.section.matched_epochs


def train_expert(setting: Setting, number: int) -> Tensor:
    """An expert's weights after every epoch on all private images: float32 [epochs + 1, P]."""
    section, real = setting.section, setting.real
    network = setting.network("expert", number)
    descent = torch.optim.SGD(network.parameters(), lr=section.network_learning_rate)
    labels = _labels(setting)
    trajectory = [flat(network)]
    for epoch in range(expert_epochs(setting)):
        random = seeded_generator(setting.seed, "expert", number, epoch)
        for index in torch.randperm(len(labels), generator=random).split(section.network_batch):
            augment = draw(setting.operations, random, len(index))
            loss = functional.cross_entropy(network(augment(real.at(index))), labels[index.to(labels.device)])
            descent.zero_grad()
            loss.backward()
            descent.step()
        trajectory.append(flat(network))
    return torch.stack(trajectory)


def _labels(setting: Setting) -> Tensor:
    labels = torch.empty(len(setting.real.images), dtype=torch.int64)
    for label, index in enumerate(setting.real.by_class):
        labels[index] = label
    return labels.to(setting.device)


def flat(network: ConvNet3) -> Tensor:
    """All weights, float32 [P], on the CPU."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()]).cpu()


def unflattened(network: ConvNet3, weights: Tensor) -> dict[str, Tensor]:
    """The opposite of `flat`, as views that gradients flow through."""
    named = dict(network.named_parameters())
    parts = weights.split([parameter.numel() for parameter in named.values()])
    return {name: part.view(named[name].shape) for name, part in zip(named, parts, strict=True)}


def trained_experts(setting: Setting, folder: Path, tell: Callable[[int], None]) -> list[Tensor]:
    """All trajectories, float32 [epochs + 1, P] each; those that lie in `folder` are not trained again.

    `tell` is told how many there are, after each that was trained.
    """
    found = []
    for number in range(setting.section.experts):
        path = folder / EXPERTS / f"{number:04d}.safetensors"
        if path.exists():
            found.append(load_tensors(path)[0]["weights"])
            continue
        found.append(train_expert(setting, number))
        save_tensors(path, {"weights": found[-1]})
        tell(number + 1)
    return found


class TrajectoryMatching(Matching):
    """Images, the learning rate of the steps on them and, where `soft_labels`, their labels.

    Attributes:
        experts: float32 [epochs + 1, P] each.
        rate: of the steps, float32 [].
        logits: of the labels, float32 [M, K].
    """

    def __init__(self, setting: Setting, initial: Initial, experts: Sequence[Tensor]) -> None:
        super().__init__(setting, initial)
        section, device = self.section, setting.device
        self.experts, self._network = experts, setting.network("shape").requires_grad_(False)
        self.rate = torch.tensor(section.network_learning_rate, device=device, requires_grad=True)
        self.logits = self._first_logits().requires_grad_(section.soft_labels)
        learnt = [{"params": [self.rate], "lr": section.rate_learning_rate}]
        if section.soft_labels:
            learnt.append({"params": [self.logits], "lr": section.label_learning_rate})
        self._others = torch.optim.SGD(learnt, lr=0.0, momentum=section.image_momentum)

    def _first_logits(self) -> Tensor:
        """Of soft labels: what the first expert answers in the end; where that is another class, as of hard
        labels: nearly sure of the given one."""
        classes = self.setting.classes
        rest = (1 - SURE) / max(1, classes - 1)
        sure = torch.where(functional.one_hot(self.labels, classes) == 1, SURE, rest).log()
        if not self.section.soft_labels:
            return sure
        weights = unflattened(self._network, self.experts[0][-1].to(self.setting.device))
        with torch.no_grad():
            answers = functional_call(self._network, weights, (self.images,))
        return torch.where((answers.argmax(1) == self.labels)[:, None], answers, sure).detach()

    def step(self, iteration: int) -> float:
        random = seeded_generator(self.setting.seed, "batch", iteration)
        first, last = self.section.start_epochs[0], self.last_start(iteration)
        expert = self.experts[int(torch.randint(len(self.experts), (), generator=random))]
        epoch = int(torch.randint(first, last + 1, (), generator=random))
        start = expert[epoch].to(self.setting.device)
        target = expert[epoch + self.section.matched_epochs].to(self.setting.device)
        loss = trajectory_distance(self._unrolled(start, random), start, target)
        self.optimizer.zero_grad()
        self._others.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._others.step()
        with torch.no_grad():
            self.rate.clamp_(min=SMALLEST_RATE)
        return loss.item()

    @property
    def images_per_step(self) -> int:
        return self.section.student_steps * min(self.section.network_batch, len(self.images))

    def last_start(self, iteration: int) -> int:
        """The last epoch from which may be matched: DATM widens the range from the easy ones on."""
        (first, last), widening = self.section.start_epochs, self.section.start_widening
        share = min(1.0, (iteration + 1) / (widening * self.section.steps)) if widening else 1.0
        return first + round((last - first) * share)

    def _unrolled(self, start: Tensor, random: torch.Generator) -> Tensor:
        """Weights float32 [P] after the steps on the distilled images, from `start` on."""
        weights, order = start.detach().requires_grad_(), torch.empty(0, dtype=torch.int64)
        targets = self.targets() if not self.section.soft_labels else self.logits.softmax(1)
        for _ in range(self.section.student_steps):
            if not len(order):
                order = torch.randperm(len(self.images), generator=random)
            index, order = order[: self.section.network_batch], order[self.section.network_batch :]
            at = index.to(self.images.device)
            augment = draw(self.setting.operations, random, len(index))
            answers = functional_call(
                self._network, unflattened(self._network, weights), (augment(self.images[at]),)
            )
            loss = functional.cross_entropy(answers, targets[at])
            (slope,) = torch.autograd.grad(loss, weights, create_graph=True)
            weights = weights - self.rate * slope
        return weights

    def targets(self) -> Tensor:
        return self.logits.detach().softmax(1) if self.section.soft_labels else super().targets()

    def state_dict(self) -> dict[str, Any]:
        own = {
            "rate": self.rate.detach(),
            "logits": self.logits.detach(),
            "others": self._others.state_dict(),
        }
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            self.rate.copy_(state["rate"])
            self.logits.copy_(state["logits"])
        self._others.load_state_dict(state["others"])


def trajectory_distance(end: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the student's last weights to the target, as a share of the way that the expert
    went (Cazenavette et al., equation 2): 0 at the target, 1 where nothing has moved. All float [P]."""
    return ((end - target) ** 2).sum() / ((start - target) ** 2).sum().clamp(min=1e-12)
