"""The runs of the worst-case audit: each is trained on its own splits, asked about all audit samples, and forgotten."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kr_ray.artifacts import RunDirectory, atomic_write, fingerprint
from kr_ray.config import ClassifierConfig, Config
from kr_ray.data.images import Splits
from kr_ray.data.pools import stratified_index
from kr_ray.data.store import SPLITS_FILE, load_stored_splits, save_splits
from kr_ray.devices import pick_device
from kr_ray.locks import lock_file
from kr_ray.privacy.canaries import AuditDesign
from kr_ray.seeding import derive_seed
from kr_ray.storage import remove_tree
from kr_ray.training.arms import ARMS, ArmRun, Tell
from kr_ray.training.classifier import Schedule, accuracy, predict_logits
from kr_ray.training.student import StudentSpec
from kr_ray.training.teacher import train_on_real

# --- queries ---------------------------------------------------------------------------------------------------------


def query_offsets(recipe: ClassifierConfig, most: int) -> list[tuple[bool, int, int]]:
    """What a model is asked for each sample: (mirrored, rows down, columns right), the unaltered image first.

    The mirror image if training mirrors, and shifts by the training's crop padding to the eight sides: at most 2 x 9 = 18 queries,
    those of Aerni et al. (2024), the nearest first.
    """
    flips = (False, True) if recipe.horizontal_flip else (False,)
    steps = (0, -recipe.crop_padding, recipe.crop_padding) if recipe.crop_padding else (0,)
    shifts = sorted(itertools.product(steps, steps), key=lambda shift: abs(shift[0]) + abs(shift[1]))
    return [(flip, down, right) for down, right in shifts for flip in flips][:most]


def query_images(images: Tensor, offset: tuple[bool, int, int]) -> Tensor:
    """`images` (uint8 [N, C, H, W]) as one query shows them; shifts bring in black, as the crops in training do."""
    flip, down, right = offset
    height, width = images.shape[-2:]
    pad = max(abs(down), abs(right))
    padded = nn.functional.pad(images, (pad,) * 4)
    shifted = padded[..., pad - down : pad - down + height, pad - right : pad - right + width]
    return shifted.flip(-1) if flip else shifted


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunScores:
    """What the model of one arm in one run answers.

    Attributes:
        samples: float32 [C + P, queries, K], logits on the canaries, then on the population.
        reference: float32 [R, K], logits on the reference images.
        test_accuracy: on the whole test split, in [0, 1].
        seconds: it took to train and to ask it, without what earlier arms of the run had left for it.
    """

    samples: NDArray[np.float32]
    reference: NDArray[np.float32]
    test_accuracy: float
    seconds: float

    def save(self, path: Path, stamp: str) -> None:
        """Write atomically; `stamp` names the inputs."""
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, stamp=np.array(stamp), **vars(self))

    @classmethod
    def load(cls, path: Path, stamp: str) -> RunScores | None:
        """The scores at `path` if they were made of the inputs that `stamp` names, else None."""
        if not path.exists():
            return None
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if str(file["stamp"]) != stamp:
                return None
            return cls(file["samples"], file["reference"], float(file["test_accuracy"]), float(file["seconds"]))


def _nobody_asks(what: str) -> None:
    """For runs that are looked up and not trained."""


@dataclass(frozen=True)
class AuditPlan:
    """What all runs of an audit share.

    Attributes:
        run: the audited run directory.
        folder: where the runs' own directories are, `runs/<number>`.
        digest: of the audited run's data.
    """

    run: Path
    folder: Path
    config: Config
    spec: StudentSpec
    design: AuditDesign
    digest: str

    def arm_run(self, number: int, tell: Tell = _nobody_asks) -> ArmRun:
        c, member = self.config, self.design.member(number - number % 2 + 2)[number]
        parts = (self.design.canaries, self.design.given_labels, self.design.population, member)
        stamp = fingerprint(self.digest, [part.tolist() for part in parts])
        directory = RunDirectory(self.folder / "runs" / str(number))
        return ArmRun(directory, self.run, c, self.spec, stamp, derive_seed(c.seed, "audit run", number), tell)

    def scores(self, number: int, arm: str) -> RunScores | None:
        """What the arm answered in this run, if it has been trained on just these inputs."""
        return RunScores.load(self.scores_file(number, arm), self._stamp(self.arm_run(number), arm))

    def scores_file(self, number: int, arm: str) -> Path:
        return self.folder / "runs" / str(number) / f"scores_{arm}.npz"

    def _stamp(self, run: ArmRun, arm: str) -> str:
        asked = [self.design.reference.tolist(), query_offsets(self.config.classifier, self.config.audit.queries)]
        return fingerprint(run.stamp, run.seed, arm, asked, ARMS[arm].inputs(run))

    def missing(self, number: int) -> list[str]:
        return [arm for arm in self.config.audit.arms if self.scores(number, arm) is None]

    def train(self, number: int, tell: Callable[[float, str], None]) -> None:
        """Train and score the arms of run `number` that have no scores yet; then only the scores stay, unless `keep_models`.

        Args:
            tell: is told the share of arms done and what is being trained.
        """
        splits, arms = load_stored_splits(self.run / SPLITS_FILE), self.config.audit.arms
        # A worker whose driver was killed lives on for a moment: the next one waits until it has let go.
        with lock_file(self.folder / "runs" / f"{number}.lock", timeout=120):
            missing = self.missing(number)
            save_splits(self.folder / "runs" / str(number) / SPLITS_FILE, self.design.splits_of_run(splits, number))
            for arm in missing:
                share = (len(arms) - len(missing) + missing.index(arm)) / len(arms)
                run = self.arm_run(number, partial(tell, share))
                started = time.perf_counter()
                scores = self._ask(ARMS[arm].train(run), splits)
                took = time.perf_counter() - started
                replace(scores, seconds=took).save(self.scores_file(number, arm), self._stamp(run, arm))
            self._tidy(number)

    def _tidy(self, number: int) -> None:
        """Real images never stay in more places than needed; models stay if asked for."""
        kept = {self.scores_file(number, arm).name for arm in ARMS}
        for path in (self.folder / "runs" / str(number)).iterdir():
            if path.name == SPLITS_FILE.parts[0] or (path.name not in kept and not self.config.audit.keep_models):
                remove_tree(path) if path.is_dir() else path.unlink()

    def _ask(self, model: nn.Module, splits: Splits) -> RunScores:
        """All that an attacker asks: audit samples with their queries, reference and test images."""
        device, recipe = pick_device(), self.config.classifier
        asked = splits.train.images[torch.from_numpy(self.design.samples)]
        offsets = query_offsets(recipe, self.config.audit.queries)
        answers = [predict_logits(model, query_images(asked, offset), device).numpy() for offset in offsets]
        on_test = predict_logits(model, splits.test.images, device)
        on_reference = on_test.numpy()[self.design.reference]
        return RunScores(np.stack(answers, axis=1), on_reference, accuracy(on_test, splits.test.labels), 0.0)


# --- outliers --------------------------------------------------------------------------------------------------------


def held_out_halves(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two stratified halves of the training split: int64, ascending, together all of it."""
    first = stratified_index(labels, len(labels) // 2, [derive_seed(seed, "half")])
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[first] = False
    return first, rest.nonzero().flatten()


def held_out_losses(run: Path, config: Config, repeat: int) -> NDArray[np.float64]:
    """Each training image's cross-entropy under a teacher that was not trained on it: float64 [N].

    A model is trained on either half and asked about the other: a memorised outlier would have a low loss under a model that saw
    it. Both together cost one teacher. The reference ensemble is the mean over several `repeat`s, which split anew.
    """
    splits, seed = load_stored_splits(run / SPLITS_FILE), derive_seed(config.seed, "held out", repeat)
    train, losses = splits.train, torch.empty(len(splits.train), dtype=torch.float64)
    halves = held_out_halves(train.labels, seed)
    for half, other in (halves, halves[::-1]):
        schedule = Schedule.fit(config.classifier, len(half), config.teacher.epochs)
        training = train_on_real(
            train.subset(half), splits.num_classes, config.classifier, schedule, derive_seed(seed, len(half))
        )
        training.train_until(schedule.steps)
        logits = predict_logits(training.model, train.images[other], training.device)
        losses[other] = nn.functional.cross_entropy(logits, train.labels[other], reduction="none").double()
    return losses.numpy()
