"""A classifier's training cut into ticks: after each one its state can
be saved, a person told, a scheduler asked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kr_ray.classifiers.predict import accuracy, confusion_matrix, predict_logits
from kr_ray.classifiers.training import ClassifierTraining
from kr_ray.compute.parallel import average, from_first, worker_count
from kr_ray.data.images import LabelledImages
from kr_ray.runs.figures import ClassifierPoint, Work
from kr_ray.runs.results import ClassifierResult
from kr_ray.runs.stages import Row, Save, State


@dataclass(frozen=True)
class Ticks:
    """Where to stop, and where to validate (only where a decision or a
    curve needs it: it costs 5-8 % at every epoch).

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


WHOLE_TRAINING = Ticks(20)
"""Of a classifier that is handed on: teacher, student, private ones."""
Score = Callable[[float, int], float]
"""What is told of an accuracy on validation images after so many ticks: in a private run, that with noise."""


def told_as_it_is(accuracy: float, tick: int) -> float:
    return accuracy


class TickedTraining:
    """A training that advances tick by tick and goes on from the state of any tick.

    `history` holds a row per tick: tick, share (of the schedule), epoch, step, images_seen, train_loss,
    seconds, images_per_second, cpu_seconds and gpu_seconds (see `work_done`); where validated, val_accuracy;
    of a student, regeneration, images_generated and teacher_queries.
    """

    def __init__(
        self,
        training: ClassifierTraining,
        validation: LabelledImages,
        ticks: Ticks,
        state: State | None = None,
        score: Score = told_as_it_is,
    ) -> None:
        self.training, self.validation, self.ticks, self._score = training, validation, ticks, score
        self.history: list[Row] = []
        if state is not None:
            self.history = list(state["history"])
            training.load_state_dict(state["training"])

    @property
    def finished(self) -> bool:
        return len(self.history) >= self.ticks.count

    def advance(self) -> Row:
        """Train to the end of the next tick."""
        started, used, tick, training = (
            time.perf_counter(),
            time.process_time(),
            len(self.history),
            self.training,
        )
        seen = training.images_seen
        loss = training.train_until(self.ticks.step(tick, training.schedule.steps))
        row: Row = {
            "tick": tick,
            "share": (tick + 1) / self.ticks.count,
            "epoch": training.step / training.schedule.steps_per_epoch,
            "step": training.step,
            "images_seen": training.images_seen,
        }
        row |= training.data.figures(max(math.ceil(row["epoch"]), 1) - 1)
        if "images_generated" in row and "teacher_queries" not in row:
            row["teacher_queries"] = row["images_seen"] if training.labeller else row["images_generated"]
        if not math.isnan(loss):  # a tick of a very short schedule may hold no step
            row["train_loss"] = loss
        if self.ticks.validates(tick):
            row["val_accuracy"] = from_first(lambda: self._val_accuracy(tick))
        row["seconds"] = time.perf_counter() - started
        row["images_per_second"] = (training.images_seen - seen) / row["seconds"]
        row |= self._processor_time(time.process_time() - used, row["seconds"])
        self.history.append(row)
        return row

    def _processor_time(self, cpu_s: float, wall_s: float) -> dict[str, float]:
        """Of all workers, and of the makers whose images came in this
        tick; a GPU counts as long as it is held."""
        device = self.training.device
        total = float(average(torch.tensor(cpu_s, dtype=torch.float64, device=device))) * worker_count()
        total += self.training.data.take_makers_s()
        return {"cpu_seconds": total} | (
            {"gpu_seconds": wall_s * worker_count()} if device.type == "cuda" else {}
        )

    def _val_accuracy(self, tick: int) -> float:
        """The one place where a classifier is judged on validation images."""
        logits = predict_logits(self.training.model, self.validation.images, self.training.device)
        return self._score(accuracy(logits, self.validation.labels), tick)

    def give_up(self) -> None:
        """End here: a student that no image is left for stays as it is, and its
        accuracy is that of what it has learnt so far."""
        row = {
            "step": self.training.step,
            "images_seen": self.training.images_seen,
            "seconds": 0.0,
        }
        row |= {"epoch": 0.0, "val_accuracy": self._val_accuracy(len(self.history))}
        for tick in range(len(self.history), self.ticks.count):
            self.history.append(row | {"tick": tick, "share": (tick + 1) / self.ticks.count})

    def close(self) -> None:
        """Free what makes a student's images."""
        self.training.data.close()

    def state_dict(self) -> State:
        return {"history": self.history, "training": self.training.state_dict()}

    def finish(self, save: Save) -> None:
        """Advance through all remaining ticks, saving after each."""
        while not self.finished:
            row = self.advance()
            save(self.state_dict(), row)

    def result(self, test: LabelledImages) -> ClassifierResult:
        """What the report says of the trained classifier; `test` is looked at here and nowhere else."""
        training = self.training
        logits = predict_logits(training.model, test.images, training.device)
        return ClassifierResult(
            test_accuracy=accuracy(logits, test.labels),
            test_loss=torch.nn.functional.cross_entropy(logits, test.labels).item(),
            val_accuracy=self.history[-1]["val_accuracy"],
            confusion=confusion_matrix(logits, test.labels),
            steps=training.step,
            images_seen=training.images_seen,
            batch_size=training.schedule.batch_size,
            learning_rate=training.schedule.learning_rate,
            parameters=sum(parameter.numel() for parameter in training.model.parameters()),
            seconds=sum(row["seconds"] for row in self.history),
            work=work_done(self.history),
            curve=[ClassifierPoint.model_validate(row) for row in self.history],
        )


def work_done(history: Sequence[Row]) -> Work:
    """What a training took, so that students and teachers are compared at equal
    work; ticks that a kill made it repeat count once."""
    last = history[-1]
    of_student = {key: last[key] for key in ("images_generated", "teacher_queries") if key in last}
    seconds = {key: sum(row.get(key, 0.0) for row in history) for key in ("cpu_seconds", "gpu_seconds")}
    seconds["cpu_seconds"] += last.get("pool_cpu_seconds", 0.0)
    return Work.model_validate(seconds | {"images_trained": last["images_seen"]} | of_student)
