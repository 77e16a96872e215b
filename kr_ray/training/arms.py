"""The arms of the worst-case audit: what is trained again in every run, from its own training images to its logits.

An arm trains whatever saw the data and returns the network that an attacker would query. It works in a miniature run directory of
its own splits, in which the stages of the pipeline run unchanged. Another training paradigm plugs in as one more entry of `ARMS`
(and its name in `config.ArmName`).
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor, nn

from kr_ray.artifacts import RunDirectory, atomic_write, fingerprint, load_state, save_state
from kr_ray.config import ClassifierConfig, Config, GeneratorConfig
from kr_ray.data.images import Splits
from kr_ray.data.pools import stratified_index
from kr_ray.data.store import SPLITS_FILE, load_stored_splits, save_splits
from kr_ray.devices import pick_device
from kr_ray.privacy.canaries import AuditDesign
from kr_ray.seeding import derive_seed
from kr_ray.training.classifier import Schedule, accuracy, predict_logits
from kr_ray.training.generator import checkpoint_file, train_generator_stage
from kr_ray.training.resumable import Row, Save, State, load_classifier
from kr_ray.training.student import StudentSpec, train_final_student
from kr_ray.training.teacher import train_on_real, train_teacher

STATE_FILE = "state.pt"
Tell = Callable[[str], None]
"""Says what is being done, to the person who waits."""


@dataclass(frozen=True)
class ArmRun:
    """One run of the audit, as an arm sees it.

    Attributes:
        directory: a miniature run directory that holds this run's splits.
        audited: the run that is audited, for what an arm takes over from it unchanged.
        config: of the audited run.
        spec: checkpoint, generation parameters and length of the audited run's student.
        stamp: of all that decides this run's splits.
        seed: differs from run to run, as an attacker's shadow model differs from its target.
    """

    directory: RunDirectory
    audited: Path
    config: Config
    spec: StudentSpec
    stamp: str
    seed: int
    tell: Tell

    def stage(self, name: str, inputs: Sequence[Any], work: Callable[[Path, State | None, Save], None]) -> Path:
        """Do `work` in the folder `name` unless it is done there on the same inputs; a killed one goes on from its newest state."""
        stamp = fingerprint(self.stamp, self.seed, inputs)
        if self.directory.result(name, stamp) is not None:
            return self.directory / name
        folder = self.directory.begin(name, stamp)

        def save(state: State, row: Row) -> None:
            save_state(folder / STATE_FILE, state)
            self.tell(f"{name} {row['share']:.0%}")

        work(folder, load_state(folder / STATE_FILE), save)
        (folder / STATE_FILE).unlink(missing_ok=True)
        self.directory.finish(name, stamp, {})
        return folder


@dataclass(frozen=True)
class Arm:
    """One training paradigm.

    Attributes:
        train: trains on the run's splits and returns the network an attacker would query (see classifier.predict_logits).
        inputs: what decides the result beside the splits, JSON-able: scores made of other inputs are not taken for this arm's.
    """

    train: Callable[[ArmRun], nn.Module]
    inputs: Callable[[ArmRun], list[Any]]


def _teacher(run: ArmRun) -> nn.Module:
    """The undefended baseline: a classifier trained on the real images."""
    c = run.config

    def work(folder: Path, state: State | None, save: Save) -> None:
        images = len(load_stored_splits(run.directory / str(SPLITS_FILE)).train)
        schedule = Schedule.fit(c.classifier, images, c.teacher.epochs)
        train_teacher(run.directory.path, folder, c.classifier, schedule, run.seed, state, save)

    return _classifier(run.stage("teacher", _teacher_inputs(run), work))


def _teacher_inputs(run: ArmRun) -> list[Any]:
    return [run.config.classifier.model_dump(), run.config.teacher.model_dump()]


def _kr(run: ArmRun) -> nn.Module:
    """The whole of Knowledge Recycling: teacher, generator and student, at generation parameters that are already tuned."""
    _teacher(run)

    def work(folder: Path, state: State | None, save: Save) -> None:
        train_generator_stage(run.directory.path, folder, _short_generator(run), run.seed, state, save)

    run.stage("generator", [*_teacher_inputs(run), _short_generator(run).model_dump()], work)
    return _student(run, "student_kr", _kr_inputs(run))


def _kr_inputs(run: ArmRun) -> list[Any]:
    return [*_student_inputs(run), _short_generator(run).model_dump()]


def _short_generator(run: ArmRun) -> GeneratorConfig:
    """The GAN's training up to the one checkpoint that the student is taught by (its rates do not depend on its length)."""
    epoch = run.spec.checkpoint_epoch
    return run.config.generator.model_copy(update={"epochs": epoch, "checkpoint_every": epoch})


def _student_only(run: ArmRun) -> nn.Module:
    """The audited run's generator, unchanged; this run's teacher labels its images and a student learns from them.

    The generator saw the same images in all runs, so it bears no sign of who is a member of one of them: what leaks here leaks
    through the teacher's labels alone.
    """
    _teacher(run)
    checkpoint = checkpoint_file(run.spec.checkpoint_epoch)

    def work(folder: Path, state: State | None, save: Save) -> None:
        with atomic_write(run.directory / str(checkpoint)) as temporary:
            shutil.copyfile(run.audited / checkpoint, temporary)

    inputs = _student_only_inputs(run)
    run.stage("generator", inputs, work)  # in the place of the kr arm's, which is done with
    return _student(run, "student_only", inputs)


def _student_only_inputs(run: ArmRun) -> list[Any]:
    checkpoint = run.audited / checkpoint_file(run.spec.checkpoint_epoch)
    return [*_student_inputs(run), hashlib.sha256(checkpoint.read_bytes()).hexdigest()]


ARMS: Mapping[str, Arm] = {
    "teacher": Arm(_teacher, _teacher_inputs),
    "kr": Arm(_kr, _kr_inputs),
    "student_only": Arm(_student_only, _student_only_inputs),
}


def _student(run: ArmRun, name: str, inputs: list[Any]) -> nn.Module:
    c, spec = run.config, replace(run.spec, seed=derive_seed(run.seed, "student"))

    def work(folder: Path, state: State | None, save: Save) -> None:
        train_final_student(run.directory.path, folder, spec, c.classifier, state, save)

    return _classifier(run.stage(name, inputs, work))


def _student_inputs(run: ArmRun) -> list[Any]:
    return [*_teacher_inputs(run), run.spec.checkpoint_epoch, run.spec.synthesis.model_dump(), run.spec.epochs]


def _classifier(folder: Path) -> nn.Module:
    return load_classifier(folder / "weights.safetensors", pick_device())


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
        with np.load(path, allow_pickle=False) as file:
            if str(file["stamp"]) != stamp:
                return None
            return cls(file["samples"], file["reference"], float(file["test_accuracy"]), float(file["seconds"]))


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

    def arm_run(self, number: int, tell: Tell) -> ArmRun:
        c, member = self.config, self.design.member(number - number % 2 + 2)[number]
        parts = (self.design.canaries, self.design.given_labels, self.design.population, member)
        stamp = fingerprint(self.digest, [part.tolist() for part in parts])
        directory = RunDirectory(self.folder / "runs" / str(number))
        return ArmRun(directory, self.run, c, self.spec, stamp, derive_seed(c.seed, "audit run", number), tell)

    def scores(self, number: int, arm: str) -> RunScores | None:
        """What the arm answered in this run, if it has been trained on just these inputs."""
        return RunScores.load(self.scores_file(number, arm), self._stamp(self.arm_run(number, print), arm))

    def scores_file(self, number: int, arm: str) -> Path:
        return self.folder / "runs" / str(number) / f"scores_{arm}.npz"

    def _stamp(self, run: ArmRun, arm: str) -> str:
        asked = [self.design.reference.tolist(), query_offsets(self.config.classifier, self.config.audit.queries)]
        return fingerprint(run.stamp, run.seed, arm, asked, ARMS[arm].inputs(run))

    def missing(self, number: int) -> list[str]:
        return [arm for arm in self.config.audit.arms if self.scores(number, arm) is None]

    def train(self, number: int, tell: Tell) -> None:
        """Train and score the arms of run `number` that have no scores yet; then only the scores stay, unless `keep_models`."""
        run, splits = self.arm_run(number, tell), load_stored_splits(self.run / SPLITS_FILE)
        # A worker whose driver was killed lives on for a moment: the next one waits until it has let go.
        with FileLock(self.folder / "runs" / f"{number}.lock", timeout=120):
            save_splits(run.directory / str(SPLITS_FILE), self.design.splits_of_run(splits, number))
            for arm in self.missing(number):
                started = time.perf_counter()
                scores = self._ask(ARMS[arm].train(run), splits)
                took = time.perf_counter() - started
                replace(scores, seconds=took).save(self.scores_file(number, arm), self._stamp(run, arm))
            kept = {self.scores_file(number, arm).name for arm in ARMS}
            for path in run.directory.path.iterdir():
                if path.name == SPLITS_FILE.parts[0] or (path.name not in kept and not self.config.audit.keep_models):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

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
        training = train_on_real(train.subset(half), splits.num_classes, config.classifier, schedule, derive_seed(seed, len(half)))
        training.train_until(schedule.steps)
        logits = predict_logits(training.model, train.images[other], training.device)
        losses[other] = nn.functional.cross_entropy(logits, train.labels[other], reduction="none").double()
    return losses.numpy()
