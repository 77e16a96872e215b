"""The generator stage (section 3.2): train a generator, keep a
checkpoint every few epochs, watch for collapse."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from kr_ray.classifiers.interface import Classifier
from kr_ray.classifiers.networks import load_classifier
from kr_ray.compute.devices import pick_device
from kr_ray.compute.parallel import from_first, worker_rank
from kr_ray.compute.seeding import derive_seed, seeded_generator
from kr_ray.config import CollapseConfig, GeneratorSection
from kr_ray.data.images import Splits, class_prior
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.generators.collapse import Judged, measure_collapse, within_class_spread
from kr_ray.generators.interface import (
    Checkpoint,
    CountsItself,
    Generator,
    GeneratorTraining,
    PrivateGenerator,
    Sampler,
    checkpoint_file,
    save_checkpoint,
)
from kr_ray.runs.artifacts import atomic_write
from kr_ray.runs.figures import CollapsePoint, GeneratorPoint
from kr_ray.runs.results import GeneratorResult
from kr_ray.runs.stages import WEIGHTS_FILE, Row, Save, State

GRID_ROWS, GRID_COLUMNS = 8, 20
STATES_PER_TRAINING = 20


@dataclass(frozen=True)
class Watch:
    """What the collapse alarm compares a checkpoint's images with.

    Attributes:
        teacher: on `device`.
        prior: real class frequencies, float64 [K].
        real_spread: within the classes of real images.
        seed: of the images that are drawn to be judged.
    """

    teacher: Classifier
    prior: Tensor
    real_spread: float
    alarm: CollapseConfig
    seed: int
    device: torch.device

    @classmethod
    def of(cls, run: Path, splits: Splits, generator: Generator, seed: int, device: torch.device) -> Watch:
        alarm = generator.section.collapse
        teacher = load_classifier(run / "teacher" / WEIGHTS_FILE, device)
        some = torch.randperm(len(splits.train), generator=seeded_generator(seed, "alarm real"))[
            : 4 * alarm.images
        ]
        real = splits.train.subset(some).to(device)
        spread = within_class_spread(teacher, real.images, real.labels)
        prior = class_prior(splits.train.labels, splits.num_classes)
        return cls(teacher, prior, spread, alarm, seed, device)

    def judge(self, sampler: Sampler) -> Judged:
        classes = torch.multinomial(
            self.prior,
            self.alarm.images,
            replacement=True,
            generator=seeded_generator(self.seed, "alarm classes"),
        )
        images = sampler.images(classes, seeded_generator(self.seed, "alarm images"))
        return measure_collapse(self.teacher, images, classes.to(self.device), self.real_spread, self.alarm)


class CheckpointKeeper:
    """Writes each checkpoint with its sample grid, and says when the training has collapsed for good."""

    def __init__(self, run: Path, folder: Path, splits: Splits, generator: Generator, seed: int) -> None:
        self.folder, self.splits, self.generator, self.seed = folder, splits, generator, seed
        self.alarm = generator.section.collapse
        self.device = pick_device()
        self.watch = (
            None if self.alarm.action == "off" else Watch.of(run, splits, generator, seed, self.device)
        )
        self.collapse: list[CollapsePoint] = []

    def keep(self, checkpoint: Checkpoint) -> bool:
        """Write and judge `checkpoint` (the first worker does); True if the training is to stop."""
        self.collapse.append(from_first(lambda: self._keep(checkpoint)))
        return self.has_collapsed()

    def _keep(self, checkpoint: Checkpoint) -> CollapsePoint:
        path = self.folder / checkpoint_file(checkpoint.epoch).relative_to("generator")
        generator = self.generator
        save_checkpoint(path, checkpoint, generator.section, self.splits.num_classes, self.splits.channels)
        sampler = generator.open(
            path,
            generator.section.default_sampling(),
            prior=self.watch.prior if self.watch else self._equal_prior(),
            seed=derive_seed(self.seed, "alarm"),
            device=self.device,
            batch_size=64,
            calibration_images=256,
        )
        self._save_grid(sampler, path.with_suffix(".png"))
        if self.watch is None:
            return CollapsePoint(epoch=checkpoint.epoch, agreement=None, diversity=None, alarm=False)
        found = self.watch.judge(sampler)
        return CollapsePoint(epoch=checkpoint.epoch, **vars(found))

    def _equal_prior(self) -> Tensor:
        """Where nobody watches, nothing is asked of the real labels."""
        return torch.full((self.splits.num_classes,), 1 / self.splits.num_classes, dtype=torch.float64)

    def has_collapsed(self) -> bool:
        """Whether the last `patience` checkpoints all raised the alarm and that is to end the training."""
        recent = self.collapse[-self.alarm.patience :]
        return (
            self.alarm.action == "stop"
            and len(recent) == self.alarm.patience
            and all(row.alarm for row in recent)
        )

    def _save_grid(self, sampler: Sampler, path: Path) -> None:
        """One column per class, the same latents at every checkpoint so that the eye can follow them."""
        columns = min(self.splits.num_classes, GRID_COLUMNS)
        images = sampler.images(torch.arange(columns).repeat(GRID_ROWS), seeded_generator(self.seed, "grid"))
        with atomic_write(path) as temporary:
            save_image(image_grid(images, columns=columns).float() / 255, temporary, format="png")


class Keeper(Protocol):
    """Is given every checkpoint; `collapse` is a row for each."""

    collapse: list[CollapsePoint]

    def keep(self, checkpoint: Checkpoint) -> bool: ...
    def has_collapsed(self) -> bool: ...


class CheckpointedTraining:
    """A generator's training with its curve and checkpoints, from a state of any earlier epoch.

    Args:
        training: not yet started.
        section: says how long it is and when a checkpoint is due.
        states_every: epochs between two states; None: about 20 in all, at least one per checkpoint.
    """

    def __init__(
        self,
        training: GeneratorTraining,
        section: GeneratorSection,
        keeper: Keeper,
        state: State | None = None,
        states_every: int | None = None,
    ) -> None:
        self.training, self.section, self.keeper = training, section, keeper
        often = max(1, min(section.checkpoint_every, section.epochs // STATES_PER_TRAINING))
        self.states_every = often if states_every is None else states_every
        self.curve: list[Row] = []
        if state is not None:
            self.curve = list(state["curve"])
            keeper.collapse = [CollapsePoint.model_validate(row) for row in state["collapse"]]
            training.load_state(state["training"])

    def finish(self, save: Save) -> None:
        """Train up to the last epoch, or until the generator has collapsed for good."""
        epochs, every = self.section.epochs, self.section.checkpoint_every
        stop = (
            self.keeper.has_collapsed()
        )  # a state may have been saved right after the alarm that ended the training
        while not stop and self.training.epoch < epochs:
            self.curve.append(self.training.train_epoch())
            epoch = self.training.epoch
            stop = epoch % every == 0 and self.keeper.keep(self.training.checkpoint())
            if stop or epoch == epochs or epoch % self.states_every == 0:
                save(self._state(), self._figures())

    def _state(self) -> State:
        collapse = [row.model_dump() for row in self.keeper.collapse]
        return {"training": self.training.state(), "curve": self.curve, "collapse": collapse}

    def _figures(self) -> Row:
        alarms = float(sum(row.alarm for row in self.keeper.collapse))
        return self.curve[-1] | {
            "share": self.training.epoch / self.section.epochs,
            "collapse_alarms": alarms,
        }


def train_generator(
    run: Path, folder: Path, generator: Generator, *, seed: int, state: State | None, save: Save
) -> GeneratorResult | None:
    """Train on the run's real images; leaves checkpoints/epoch_*.safetensors with a PNG grid each in
    `folder`.

    Returns:
        The result in the first worker, None in the others.
    """
    splits = load_stored_splits(run / SPLITS_FILE)
    keeper = CheckpointKeeper(run, folder, splits, generator, derive_seed(seed, "checkpoint"))
    what = (splits.train, splits.num_classes, derive_seed(seed, "generator"), keeper.device)
    private = generator if isinstance(generator, PrivateGenerator) else None
    training = private.private_training(folder, *what) if private else generator.training(*what)
    checkpointed = CheckpointedTraining(training, generator.section, keeper, state)
    checkpointed.finish(save)
    if worker_rank() != 0:
        return None
    return GeneratorResult(
        checkpoints=[int(row.epoch) for row in keeper.collapse],
        curve=[GeneratorPoint.model_validate(row) for row in checkpointed.curve],
        collapse=keeper.collapse if keeper.watch else [],
        parameters=training.parameters()
        if isinstance(training, CountsItself)
        else generator.parameters(splits.num_classes, splits.channels),
        privacy=private.privacy(len(splits.train)) if private else None,
    )


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Tile images row by row with a border of 1 px: uint8 [N, C, H,
    W] -> uint8 [3, rows, columns] on the CPU."""
    grid: Tensor = make_grid(images.cpu(), nrow=columns, padding=1, pad_value=255)
    return grid
