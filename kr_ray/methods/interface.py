"""The arms of the worst-case audit: what is trained again in every run, from its own training images to its logits.

An arm trains whatever saw the data and returns the network that an attacker would query. It works in a miniature run directory of
its own splits, in which the stages of the pipeline run unchanged. Another training paradigm plugs in as one more entry of `ARMS`
(and its name in `config.ArmName`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from kr_ray.classifiers.networks import load_classifier
from kr_ray.classifiers.ticks import Row, Save, State
from kr_ray.classifiers.training import Schedule
from kr_ray.compute.devices import pick_device
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import Config, GeneratorConfig
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.generators.checkpoints import train_generator_stage
from kr_ray.generators.interface import checkpoint_file
from kr_ray.methods.knowledge_recycling import student_training, train_final_student
from kr_ray.methods.teacher import train_teacher
from kr_ray.runs.artifacts import RunDirectory, atomic_write, fingerprint, load_state, save_state
from kr_ray.synthesis.student_set import StudentSpec

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
            temporary.write_bytes((run.audited / checkpoint).read_bytes())

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
        train_final_student(folder, partial(student_training, run.directory.path, spec, c.classifier), state, save)

    return _classifier(run.stage(name, inputs, work))


def _student_inputs(run: ArmRun) -> list[Any]:
    return [*_teacher_inputs(run), run.spec.checkpoint_epoch, run.spec.synthesis.model_dump(), run.spec.epochs]


def _classifier(folder: Path) -> nn.Module:
    return load_classifier(folder / "weights.safetensors", pick_device())
