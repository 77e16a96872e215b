"""The loop of data-free distillation: rounds of making a batch of images, then of learning from all of them.

Nothing here sees an image of the training split. Only class number and image shape are read from the data,
and the accuracies of the result are of validation and test images.

Several workers of one training all do the same work: it is small beside its teacher's, and they stay equal.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kr_ray.classifiers.interface import Classifier
from kr_ray.classifiers.networks import load_classifier, new_classifier, save_classifier
from kr_ray.classifiers.predict import accuracy, confusion_matrix, predict_logits
from kr_ray.classifiers.ticks import WHOLE_TRAINING, work_done
from kr_ray.compute.devices import pick_device
from kr_ray.compute.parallel import worker_rank
from kr_ray.compute.seeding import derive_seed, seeded_generator
from kr_ray.config import ClassifierConfig, ConfigError
from kr_ray.config.data_free import DataFreeSection
from kr_ray.data.augment import crop_and_flip, to_float
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.methods.data_free.losses import BatchStatistics, distillation, image_loss
from kr_ray.methods.dpdfd.networks import DataFreeGenerator, to_bytes
from kr_ray.runs.artifacts import save_tensors
from kr_ray.runs.figures import ClassifierPoint
from kr_ray.runs.results import DataFreeResult
from kr_ray.runs.stages import WEIGHTS_FILE, Row, Save, State

BANK_FILE = "bank.safetensors"
"""The made images: `images` uint8 [N, C, H, W], `labels` int64 [N] as drawn, `logits` float32 [N, K] of the
teacher."""
ADAM_BETAS = (0.5, 0.999)


@dataclass
class Bank:
    """The images made so far.

    Attributes:
        images: uint8 [rounds * batch, C, H, W], filled up to `filled`.
        labels: int64 [rounds * batch].
    """

    images: Tensor
    labels: Tensor
    filled: int = 0

    def add(self, images: Tensor, labels: Tensor) -> None:
        place = slice(self.filled, self.filled + len(images))
        self.images[place], self.labels[place] = images, labels
        self.filled += len(images)

    def state_dict(self) -> dict[str, Tensor]:
        return {"images": self.images[: self.filled].clone(), "labels": self.labels[: self.filled].clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.filled = 0
        self.add(state["images"].to(self.images.device), state["labels"].to(self.labels.device))


class DataFreeTraining:
    """Generator, memory and student; goes on exactly from the state after any round.

    Args:
        teacher: frozen, in evaluation mode, on `device`.
        shape: (C, S, S) of an image.
        recipe: of the student's network, and of its augmentation and optimiser where the section has no key.

    Raises:
        ConfigError: the statistics of batch norms count, but the teacher has none.
    """

    def __init__(
        self,
        teacher: Classifier,
        shape: tuple[int, int, int],
        recipe: ClassifierConfig,
        section: DataFreeSection,
        seed: int,
        device: torch.device,
    ) -> None:
        self.teacher, self.recipe, self.section = teacher, recipe, section
        self.seed, self.device = seed, device
        student = new_classifier(teacher.num_classes, shape[0], recipe, derive_seed(seed, "student"))
        self.student = student.to(device)
        self.generator = DataFreeGenerator(shape, section.latent_dim, seed, section.channels).to(device)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=section.student_learning_rate,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
        )
        made = section.rounds * section.synthesis_batch
        self.bank = Bank(
            torch.zeros((made, *shape), dtype=torch.uint8, device=device),
            torch.zeros(made, dtype=torch.int64, device=device),
        )
        self.statistics = BatchStatistics(teacher, section.bn_momentum)
        if section.bn_weight and not self.statistics.layers:
            raise ConfigError(
                f"`bn_weight: 0` must hold for a teacher without batch norm, but got {section.bn_weight:g}; "
                "use preset: dafl"
            )
        self.round, self.step = 0, 0

    @property
    def steps(self) -> int:
        """Of the student, in all."""
        return (self.section.rounds - self.section.warmup_rounds) * self.section.kd_steps

    @property
    def teacher_queries(self) -> int:
        made = self.round * self.section.synthesis_steps * self.section.synthesis_batch
        return made + self.step * self.section.batch_size

    def advance(self) -> float:
        """One round; the mean loss of the student's steps in it, nan in the warm-up.

        Raises:
            FloatingPointError: a loss is no longer finite.
        """
        self._make_images()
        self.round += 1
        if self.round <= self.section.warmup_rounds:
            return math.nan
        self.student.train()
        total = torch.zeros((), device=self.device)
        for _ in range(self.section.kd_steps):
            total += self._learn()
        return self._finite(float(total) / self.section.kd_steps, "student_learning_rate")

    # --- images ---

    def _make_images(self) -> None:
        """Fit generator and fresh latents to the teacher; the batch of the least loss joins the memory."""
        section, random = self.section, seeded_generator(self.seed, "latents", self.round)
        size = section.synthesis_batch
        latents = torch.randn(size, section.latent_dim, generator=random).to(self.device).requires_grad_()
        labels = torch.randint(self.teacher.num_classes, (size,), generator=random).to(self.device)
        fitted = [*self.generator.parameters(), latents]
        optimizer = torch.optim.Adam(
            [
                {"params": fitted[:-1], "lr": section.generator_learning_rate},
                {"params": [latents], "lr": section.latent_learning_rate},
            ],
            betas=ADAM_BETAS,
        )
        self.generator.train()
        self.student.eval()
        best, least = torch.empty(0), math.inf
        with self.statistics:
            for _ in range(section.synthesis_steps):
                images = self.generator(latents)
                loss = self._loss(images, labels)
                value = self._finite(float(loss.detach()), "generator_learning_rate")
                if value < least:
                    best, least = to_bytes(images.detach()), value
                optimizer.zero_grad(set_to_none=True)
                loss.backward(inputs=fitted)  # type: ignore[no-untyped-call]
                optimizer.step()
            if section.bn_weight:
                self.statistics.keep()
        self.bank.add(best, labels)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        section = self.section
        self.statistics.begin()
        features = self.teacher.features(images)
        # A student that has learnt nothing yet has no say in what is new to it.
        asked = section.adversarial_weight > 0 and self.step > 0
        return image_loss(
            section,
            teacher=self.teacher.head(features),
            features=features,
            labels=labels,
            statistics=self.statistics.loss() if section.bn_weight else None,
            student=self.student(images) if asked else None,
        )

    # --- student ---

    def _learn(self) -> Tensor:
        """One step on augmented images of the memory; its loss."""
        recipe, section = self.recipe, self.section
        random = seeded_generator(self.seed, "memory", self.step)
        index = torch.randint(self.bank.filled, (section.batch_size,), generator=random).to(self.device)
        images = crop_and_flip(self.bank.images[index], recipe.crop_padding, recipe.horizontal_flip, random)
        inputs = to_float(images)
        with torch.no_grad():
            answers = self.teacher(inputs)
        loss = distillation(self.student(inputs), answers, section.temperature)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.student.parameters(), recipe.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def _rate(self) -> float:
        return self.section.student_learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))

    def _finite(self, loss: float, key: str) -> float:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"a loss of data_free is {loss} in round {self.round}; lower the method's {key} (now "
                f"{getattr(self.section, key):g})"
            )
        return loss

    # --- state ---

    def _modules(self) -> dict[str, nn.Module | torch.optim.Optimizer | Bank]:
        return {
            "student": self.student,
            "generator": self.generator,
            "optimizer": self.optimizer,
            "bank": self.bank,
        }

    def state_dict(self) -> State:
        counts = {"round": self.round, "step": self.step}
        earlier = [list(moments) for moments in self.statistics.earlier]
        states = {name: module.state_dict() for name, module in self._modules().items()}
        return states | counts | {"statistics": earlier}

    def load_state_dict(self, state: State) -> None:
        for name, module in self._modules().items():
            module.load_state_dict(state[name])
        self.round, self.step = state["round"], state["step"]
        self.statistics.earlier = [
            (mean.to(self.device), var.to(self.device)) for mean, var in state["statistics"]
        ]


def train_data_free(
    run: Path,
    folder: Path,
    teacher: Path,
    section: DataFreeSection,
    recipe: ClassifierConfig,
    seed: int,
    state: State | None,
    save: Save,
) -> DataFreeResult | None:
    """Train a student of the classifier at `teacher`; leaves weights.safetensors and the made images in
    `folder`. Returns the result in the first worker."""
    splits, device = load_stored_splits(run / SPLITS_FILE), pick_device()
    network = load_classifier(teacher, device)
    shape = (splits.channels, *splits.test.images.shape[2:])
    training = DataFreeTraining(network, shape, recipe, section, derive_seed(seed, "data_free"), device)
    history: list[Row] = []
    if state is not None:
        training.load_state_dict(state["training"])
        history = list(state["history"])
    ticks = min(WHOLE_TRAINING.count, section.rounds)
    while len(history) < ticks:
        history.append(_tick(training, splits, history, ticks))
        save({"history": history, "training": training.state_dict()}, history[-1])
    if worker_rank() != 0:
        return None
    save_classifier(folder / WEIGHTS_FILE, training.student)
    answers = predict_logits(network, training.bank.images, device)
    bank = {"images": training.bank.images, "labels": training.bank.labels, "logits": answers}
    save_tensors(folder / BANK_FILE, bank, {"class_names": list(splits.class_names)})
    return _result(training, splits, history, answers)


def _tick(training: DataFreeTraining, splits: Splits, history: list[Row], ticks: int) -> Row:
    """The rounds of one tick; an "epoch" of its row is a round."""
    started, used, tick = time.perf_counter(), time.process_time(), len(history)
    last = training.section.rounds * (tick + 1) // ticks
    losses = [training.advance() for _ in range(training.round, last)]
    row: Row = {"tick": tick, "share": (tick + 1) / ticks, "epoch": training.round, "step": training.step}
    row["images_seen"] = training.step * training.section.batch_size
    row["images_generated"] = training.bank.filled
    row["teacher_queries"] = training.teacher_queries
    if learnt := [loss for loss in losses if not math.isnan(loss)]:
        row["train_loss"] = sum(learnt) / len(learnt)
    logits = predict_logits(training.student, splits.validation.images, training.device)
    row["val_accuracy"] = accuracy(logits, splits.validation.labels)
    row["seconds"] = time.perf_counter() - started
    row["cpu_seconds"] = time.process_time() - used
    return row | ({"gpu_seconds": row["seconds"]} if training.device.type == "cuda" else {})


def _result(
    training: DataFreeTraining, splits: Splits, history: list[Row], answers: Tensor
) -> DataFreeResult:
    """What the report says; test images are looked at here and nowhere else.

    Args:
        answers: of the teacher on the bank, float32 [N, K].
    """
    section, classes = training.section, answers.argmax(1)
    logits = predict_logits(training.student, splits.test.images, training.device)
    return DataFreeResult(
        test_accuracy=accuracy(logits, splits.test.labels),
        test_loss=nn.functional.cross_entropy(logits, splits.test.labels).item(),
        val_accuracy=history[-1]["val_accuracy"],
        confusion=confusion_matrix(logits, splits.test.labels),
        steps=training.step,
        images_seen=training.step * section.batch_size,
        batch_size=section.batch_size,
        learning_rate=section.student_learning_rate,
        parameters=sum(parameter.numel() for parameter in training.student.parameters()),
        seconds=sum(row["seconds"] for row in history),
        work=work_done(history),
        curve=[ClassifierPoint.model_validate(row) for row in history],
        bank=len(classes),
        bank_by_class=classes.bincount(minlength=splits.num_classes).tolist(),
        bank_agreement=(classes == training.bank.labels.cpu()).double().mean().item(),
    )
