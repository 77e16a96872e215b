"""A classifier's training cut into ticks: after each one its state can be saved, a person told, a scheduler asked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kr_ray.artifacts import ArtifactError, load_tensors, save_tensors
from kr_ray.data.images import LabelledImages
from kr_ray.models.resnet import ResNet14
from kr_ray.parallel import from_first
from kr_ray.synthesis.stream import RegeneratedSet
from kr_ray.training.classifier import ClassifierTraining, accuracy, confusion_matrix, predict_logits

State = dict[str, Any]
Row = dict[str, float]
Save = Callable[[State, Row], None]
"""Keeps a state from which the work can go on, and publishes the tick's figures."""


@dataclass(frozen=True)
class Ticks:
    """Where to stop, and where to validate (only where a decision or a curve needs it: it costs 5-8 % at every epoch).

    Attributes:
        count: ticks of the whole schedule, of equal length.
        validated: ticks (from 1) at whose end validation images are looked at; None: all.
    """

    count: int
    validated: tuple[int, ...] | None = None

    def step(self, tick: int, steps: int) -> int:
        return round(steps * (tick + 1) / self.count)

    def validates(self, tick: int) -> bool:
        return self.validated is None or tick + 1 in self.validated


class TickedTraining:
    """A training that advances tick by tick and goes on from the state of any tick.

    `history` holds a row per tick: tick, share (of the schedule), epoch, step, images_seen, train_loss, seconds, images_per_second; where
    validated, val_accuracy; of a student, regeneration and images_generated.
    """

    def __init__(
        self, training: ClassifierTraining, validation: LabelledImages, ticks: Ticks, state: State | None = None
    ) -> None:
        self.training, self.validation, self.ticks = training, validation, ticks
        self.history: list[Row] = []
        if state is not None:
            self.history = list(state["history"])
            training.load_state_dict(state["training"])

    @property
    def finished(self) -> bool:
        return len(self.history) >= self.ticks.count

    def advance(self) -> Row:
        """Train to the end of the next tick."""
        started, tick, training = time.perf_counter(), len(self.history), self.training
        seen = training.images_seen
        loss = training.train_until(self.ticks.step(tick, training.schedule.steps))
        row: Row = {
            "tick": tick,
            "share": (tick + 1) / self.ticks.count,
            "epoch": training.step / training.schedule.steps_per_epoch,
            "step": training.step,
            "images_seen": training.images_seen,
        }
        if isinstance(training.data, RegeneratedSet):
            row |= training.data.made_by(max(math.ceil(row["epoch"]), 1) - 1)
        if not math.isnan(loss):  # a tick of a very short schedule may hold no step
            row["train_loss"] = loss
        if self.ticks.validates(tick):
            row["val_accuracy"] = from_first(self._val_accuracy)
        row["seconds"] = time.perf_counter() - started
        row["images_per_second"] = (training.images_seen - seen) / row["seconds"]
        self.history.append(row)
        return row

    def _val_accuracy(self) -> float:
        logits = predict_logits(self.training.model, self.validation.images, self.training.device)
        return accuracy(logits, self.validation.labels)

    def give_up(self) -> None:
        """End here: a student that no image is left for stays as it is, and its accuracy is that of what it has learnt so far."""
        row = {
            "step": self.training.step,
            "images_seen": self.training.images_seen,
            "seconds": 0.0,
        }
        row |= {"epoch": 0.0, "val_accuracy": self._val_accuracy()}
        for tick in range(len(self.history), self.ticks.count):
            self.history.append(row | {"tick": tick, "share": (tick + 1) / self.ticks.count})

    def close(self) -> None:
        """Free what makes a student's images."""
        if isinstance(self.training.data, RegeneratedSet):
            self.training.data.close()

    def state_dict(self) -> State:
        return {"history": self.history, "training": self.training.state_dict()}

    def finish(self, save: Save) -> None:
        """Advance through all remaining ticks, saving after each."""
        while not self.finished:
            row = self.advance()
            save(self.state_dict(), row)

    def result(self, test: LabelledImages) -> dict[str, Any]:
        """What the report says of the trained classifier; `test` is looked at here and nowhere else."""
        training = self.training
        logits = predict_logits(training.model, test.images, training.device)
        return {
            "test_accuracy": accuracy(logits, test.labels),
            "test_loss": torch.nn.functional.cross_entropy(logits, test.labels).item(),
            "val_accuracy": self.history[-1]["val_accuracy"],
            "confusion": confusion_matrix(logits, test.labels),
            "steps": training.step,
            "images_seen": training.images_seen,
            "batch_size": training.schedule.batch_size,
            "learning_rate": training.schedule.learning_rate,
            "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
            "seconds": sum(row["seconds"] for row in self.history),
            "curve": self.history,
        }


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
    try:
        model = ResNet14(**metadata)
        model.load_state_dict(tensors)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} must hold a classifier, but holds something else; delete it and run the stage again"
        ) from error
    return model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
