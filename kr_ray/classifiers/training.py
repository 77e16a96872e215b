"""The one classifier loop: teacher, students and shadow models differ
only in the images they are given (section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kr_ray.classifiers.interface import Classifier
from kr_ray.classifiers.sets import TrainingSet
from kr_ray.compute.devices import autocast, gradient_scaler
from kr_ray.compute.graphs import Captured, compiled
from kr_ray.compute.parallel import (
    average,
    average_gradients,
    check_batch,
    join_norms,
    own_slice,
    slice_weight,
)
from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import ClassifierConfig
from kr_ray.data.augment import crop_and_flip, mixup, to_float, trivial_augment
from kr_ray.runs.stages import State

SMALLEST_BATCH = 16
"""Batch-norm statistics and the linear rate rule stop being trustworthy below this."""
AUGMENTED_AT_ONCE = {"cpu": 1024, "cuda": 16_384}
"""Images augmented per call: larger chunks amortise the overhead per operation (1.2x between 256 and 2,048 on
a CPU, 8x between 1,024 and 16,384 on an H200), of images up to AUGMENTED_SIZE."""
AUGMENTED_SIZE = 3 * 32 * 32
"""Bytes of an image. Of larger ones so many fewer are augmented
per call, so that they take no more memory."""
COMPILING_PAYS_FROM = 3e6
"""Images: compiling took 12 s on an H200 and saved 1 ms of a step of 256 at width 64."""


def augmented_at_once(device: str, image_bytes: int) -> int:
    """Images of `image_bytes` bytes that a device ("cpu", "cuda") augments per call."""
    return AUGMENTED_AT_ONCE[device] * AUGMENTED_SIZE // max(AUGMENTED_SIZE, image_bytes)


Labeller = Callable[[Tensor], Tensor]
"""Answers to the input of a gradient step, float [B, C, H, W] in
[-1, 1]: target probabilities float32 [B, K]."""


@dataclass(frozen=True)
class Schedule:
    """Table 4's recipe fitted to a budget.

    At the paper's size nothing changes. Small budgets would make too few steps of batch 256 at rate 0.5, or
    spend them all in the warm-up, so: (1) the batch is halved, at most down to 16, until there are
    `min_steps` steps; (2) the rate follows it linearly (Goyal et al. 2017); (3) the warm-up takes at most a
    tenth of the steps, its share in the paper's 100-epoch students.
    """

    steps: int
    steps_per_epoch: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    warmup_learning_rate: float

    @classmethod
    def fit(cls, recipe: ClassifierConfig, images_per_epoch: int, epochs: float) -> Schedule:
        """Schedule of `epochs` passes over `images_per_epoch` images; an
        incomplete last batch of an epoch is left out."""
        batch = min(recipe.batch_size, images_per_epoch)
        while batch // 2 >= SMALLEST_BATCH and epochs * (images_per_epoch // batch) < recipe.min_steps:
            batch //= 2
        return cls.of_steps(
            recipe,
            images_per_epoch,
            batch=batch,
            steps=max(1, round(epochs * (images_per_epoch // batch))),
        )

    @classmethod
    def of_steps(cls, recipe: ClassifierConfig, images_per_epoch: int, *, batch: int, steps: int) -> Schedule:
        """Schedule of `steps` steps of `batch` images."""
        steps_per_epoch = images_per_epoch // batch
        return cls(
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            batch_size=batch,
            learning_rate=recipe.learning_rate * batch / recipe.batch_size,
            warmup_steps=min(recipe.warmup_epochs * steps_per_epoch, steps // 10),
            warmup_learning_rate=recipe.warmup_learning_rate,
        )

    def rate(self, step: int) -> float:
        """Learning rate of `step` (from 0): linear warm-up, then cosine
        annealing to 0 (Loshchilov & Hutter 2017)."""
        if step < self.warmup_steps:
            return (
                self.warmup_learning_rate
                + (self.learning_rate - self.warmup_learning_rate) * step / self.warmup_steps
            )
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class ClassifierTraining:
    """A classifier's training that can stop at any step and go on from its state, bit for bit.

    Within torch.distributed every worker takes its slice of each batch, and gradients and batch-norm
    statistics are the whole batch's (kr_ray.compute.parallel). Each worker augments the whole batch, for
    MixUp pairs images across slices.

    Args:
        model: on `device`; its weights are trained in place.
        data: the images, already on `device`.
        recipe: Table 4.
        seed: of batch order and augmentation; step k draws the same numbers
            however often the training was interrupted.
        labeller: gives every step's targets, in place of those of `data`.
    """

    def __init__(
        self,
        model: Classifier,
        data: TrainingSet,
        recipe: ClassifierConfig,
        schedule: Schedule,
        seed: int,
        device: torch.device,
        labeller: Labeller | None = None,
    ) -> None:
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.data, self.recipe, self.schedule, self.seed, self.device = data, recipe, schedule, seed, device
        self.labeller = labeller
        self.scaler = gradient_scaler(device, recipe.precision)
        self._forward = compiled(
            self.model, device, schedule.steps * schedule.batch_size, COMPILING_PAYS_FROM
        )
        self._gradient_step = Captured(self._update, device, active=not self.scaler.is_enabled())
        # A graph reads the rate from the device's memory.
        self._rate = torch.tensor(schedule.rate(0), device=device) if self._gradient_step.active else None
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=schedule.rate(0) if self._rate is None else self._rate,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        check_batch(schedule.batch_size, "classifier.batch_size")
        self._weight = slice_weight(schedule.batch_size)
        join_norms(model)
        self.step = 0
        self._order = (-1, torch.empty(0))
        self._loss_sum = torch.zeros((), device=device)
        self._loss_steps = 0

    @property
    def images_seen(self) -> int:
        return self.step * self.schedule.batch_size

    def train_until(self, step: int) -> float:
        """Train up to (excluding) `step` and return the mean loss since
        the last call (nan if nothing was left to do).

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        self.model.train()
        per_epoch = self.schedule.steps_per_epoch
        while self.step < min(step, self.schedule.steps):
            epoch, position = divmod(self.step, per_epoch)
            image_bytes = self.data.epoch(epoch)[0][0].numel()
            chunk = max(1, augmented_at_once(self.device.type, image_bytes) // self.schedule.batch_size)
            first = position - position % chunk
            last = min(first + chunk, per_epoch)
            batches = self._augmented_chunk(epoch, first, last)
            for images, targets in batches[position - first :][: min(step, self.schedule.steps) - self.step]:
                self._train_step(images, targets)
        loss = float(average(self._loss_sum) / self._loss_steps) if self._loss_steps else math.nan
        if self._loss_steps and not math.isfinite(loss):
            raise FloatingPointError(
                f"the classifier's loss is {loss} at step {self.step}; lower classifier.learning_rate "
                f"(now {self.recipe.learning_rate}) or raise classifier.warmup_epochs"
            )
        self._loss_sum.zero_()
        self._loss_steps = 0
        return loss

    def _augmented_chunk(self, epoch: int, first: int, last: int) -> list[tuple[Tensor, Tensor]]:
        """Batches `first` to `last` of an epoch, augmented together."""
        images, targets = self.data.epoch(epoch)
        size = self.schedule.batch_size
        if self._order[0] != epoch:
            self._order = (
                epoch,
                torch.randperm(len(images), generator=seeded_generator(self.seed, "order", epoch)),
            )
        index = self._order[1][first * size : last * size].to(self.device)
        random = seeded_generator(self.seed, "augment", epoch, first)
        chunk = self._augmented(images[index], random)
        return list(zip(chunk.split(size), targets[index].split(size), strict=True))

    def _augmented(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Several batches of an epoch, as the recipe augments them."""
        images = crop_and_flip(images, self.recipe.crop_padding, self.recipe.horizontal_flip, random)
        return trivial_augment(images, random) if self.recipe.trivial_augment else images

    def _inputs(self, images: Tensor) -> Tensor:
        """What the network reads of augmented images."""
        return to_float(images)

    def _train_step(self, images: Tensor, targets: Tensor) -> None:
        self._set_rate(self.schedule.rate(self.step))
        inputs, targets = mixup(
            self._inputs(images),
            targets,
            self.recipe.mixup_alpha,
            seeded_generator(self.seed, "mixup", self.step),
        )
        inputs = own_slice(inputs)
        self._gradient_step(inputs, self.labeller(inputs) if self.labeller else own_slice(targets))
        self._loss_steps += 1
        self.step += 1

    def _update(self, inputs: Tensor, targets: Tensor) -> None:
        """Forward, backward, clip and step on float images [B, C, H, W] and target probabilities [B, K]."""
        with autocast(self.device, self.recipe.precision):
            logits = self._forward(inputs.contiguous(memory_format=torch.channels_last))
            self._saw(logits)
            loss = self._weight * F.cross_entropy(logits.float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        average_gradients(self.model.parameters())
        self.scaler.unscale_(self.optimizer)
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._loss_sum += loss.detach()

    def _saw(self, logits: Tensor) -> None:
        """Told what this worker answered in a step, [B/N, K]. It may be captured with the step: what it keeps
        has its place in memory beforehand."""

    def _set_rate(self, rate: float) -> None:
        if self._rate is not None:
            self._rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self._rate is None else self._rate

    def _clip(self) -> None:
        if self.recipe.clip == "global":
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm, foreach=True)
        else:
            for parameter in self.model.parameters():
                nn.utils.clip_grad_norm_([parameter], self.recipe.clip_norm)

    def state_dict(self) -> State:
        """Everything that a later `load_state_dict` needs to go on
        exactly; valid right after `train_until`."""
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        # The optimizer's tensors are new ones now.
        self._gradient_step = Captured(self._update, self.device, active=self._gradient_step.active)
