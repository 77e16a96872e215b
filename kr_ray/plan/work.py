"""The work of a run, stage by stage, counted from its config: images trained
on, generated and labelled. Nothing is computed."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from kr_ray.classifiers.ticks import WHOLE_TRAINING
from kr_ray.classifiers.training import Schedule
from kr_ray.cluster.hyperband import hyperband_brackets
from kr_ray.cluster.sweep import sweep_rounds
from kr_ray.config import Config, DataConfig, SynthesisConfig
from kr_ray.config.privacy import selects
from kr_ray.data.datasets import load_splits
from kr_ray.data.public_sets import CIFAR_CLASSES, OFFICIAL_VALIDATION_IMAGES, medmnist_names
from kr_ray.privacy.shadow import TRAIN_SHARE
from kr_ray.runs.results import TEACHER
from kr_ray.synthesis.student_set import student_schedule

Where = Literal["train", "trial", "task"]


@dataclass(frozen=True)
class DataSize:
    """What a data set's size decides."""

    train: int
    validation: int
    test: int
    classes: int
    channels: int


@dataclass(frozen=True)
class StageWork:
    """One stage's work.

    Attributes:
        where: Ray Train, Ray Tune or plain Ray tasks; the last two get the config's resources of a trial.
        units: independent parts that run side by side (students, shadow models, classes).
        rounds: (units, work of each) of rounds that wait for each other, the work
            in any measure; () = all units at once.
        trained: images that classifiers are trained on, all units together.
        batch: of those trainings.
        generated: images drawn and labelled.
        gan_images: real images that D is trained on.
        looked_at: images that classifiers only predict.
        attack_rows: of every class's attack models; 0 = none are fitted.
    """

    stage: str
    where: Where
    units: int = 1
    rounds: tuple[tuple[int, float], ...] = ()
    trained: float = 0
    batch: int = 0
    generated: float = 0
    gan_images: float = 0
    looked_at: float = 0
    attack_rows: int = 0


def data_size(data: DataConfig) -> DataSize:
    """Sizes of a set's splits: published ones where they are known (Table 5), else counted.

    Raises:
        DataError: the images must be counted and cannot be read.
    """
    limits = (data.max_train_images, data.max_validation_images, data.max_test_images)
    if data.name in medmnist_names():
        from medmnist import INFO

        info = INFO[data.name]
        counts = [info["n_samples"][split] for split in ("train", "val", "test")]
        classes, channels = len(info["label"]), info["n_channels"]
    elif data.name in (*CIFAR_CLASSES, "fashionmnist"):
        whole = 60_000 if data.name == "fashionmnist" else 50_000
        counts = [whole - OFFICIAL_VALIDATION_IMAGES, OFFICIAL_VALIDATION_IMAGES, 10_000]
        classes, channels = 100 if data.name == "cifar100" else 10, 1 if data.name == "fashionmnist" else 3
    else:
        splits = load_splits(data)
        train, validation, test = (len(part) for part in (splits.train, splits.validation, splits.test))
        return DataSize(train, validation, test, splits.num_classes, splits.channels)
    train, validation, test = (
        min(count, limit or count) for count, limit in zip(counts, limits, strict=True)
    )
    return DataSize(train, validation, test, classes, channels)


def run_work(config: Config, size: DataSize) -> list[StageWork]:
    """Every stage of `kr run` that takes time."""
    c, recipe = config, config.classifier
    teacher = _training("teacher", Schedule.fit(recipe, size.train, c.teacher.passes), size)
    checkpoints = c.generator.epochs // c.generator.checkpoint_every
    stages = [
        replace(teacher, trained=c.teacher.step_cost * teacher.trained),
        *_labellers(config, size),
        _generator(config, size, checkpoints),
        *([_sweep(config, size, checkpoints), _tuning(config, size)] if selects(c) else []),
        student := _student(config, size),
    ]
    if c.student.equal_compute_teacher:
        own = student.looked_at - _queries(config, student.trained) - _pool_labelled(config, size)
        stages.append(replace(student, stage="equal_compute_teacher", generated=0, looked_at=own))
    members = round(TRAIN_SHARE * size.validation)
    shadow = Schedule.fit(recipe, members, c.audit.shadow.epochs)
    shadows = c.audit.shadow.models
    stages.append(
        StageWork(
            "shadows",
            "task",
            shadows,
            trained=float(shadows * shadow.steps * shadow.batch_size),
            batch=shadow.batch_size,
        )
    )
    rows = 2 * members * shadows // size.classes
    stages.append(
        StageWork("audit", "task", size.classes, looked_at=2.0 * (size.train + size.test), attack_rows=rows)
    )
    return stages


def _labellers(config: Config, size: DataSize) -> list[StageWork]:
    """The teachers that label beside the run's, or in its place."""
    c = config
    schedule = Schedule.fit(c.classifier, size.train, c.teacher.passes)
    if c.synthesis.labeller == "equal_compute":
        student = student_schedule(c.classifier, c.synthesis, c.student.epochs, size.train)
        batch = min(student.batch_size, size.train)
        schedule = Schedule.of_steps(c.classifier, size.train, batch=batch, steps=student.steps)
    names = [name for name in c.synthesis.labeller_names() if name != TEACHER.name]
    return [_training(name, schedule, size) for name in names]


def _generator(config: Config, size: DataSize, checkpoints: int) -> StageWork:
    """The collapse alarm looks at a generated set of every checkpoint."""
    c = config
    watched = (
        0
        if c.generator.collapse.action == "off"
        else checkpoints
        * (c.generator.collapse.images + c.synthesis.sampling.calibration_batches() * c.synthesis.batch_size)
    )
    trained = float(c.generator.images_trained(size.train))
    return StageWork("generator", "train", gan_images=trained, generated=float(watched))


def _training(stage: str, schedule: Schedule, size: DataSize) -> StageWork:
    looked_at = float(WHOLE_TRAINING.count * size.validation + size.test)
    trained = float(schedule.steps * schedule.batch_size)
    return StageWork(stage, "train", trained=trained, batch=schedule.batch_size, looked_at=looked_at)


def _generated(schedule: Schedule, synthesis: SynthesisConfig, images: int) -> float:
    """Images of a student's regenerations, and of the standing statistics; none from a pool."""
    if synthesis.pool_scale:
        return 0.0
    epochs = schedule.steps / schedule.steps_per_epoch
    return (
        math.ceil(epochs / synthesis.regeneration_rate) * images
        + synthesis.sampling.calibration_batches() * synthesis.batch_size
    )


def _pool(config: Config, size: DataSize) -> float:
    """Images of a checkpoint's pool (of several generators, of one each), and of the standing statistics; 0
    without pools."""
    synthesis = config.synthesis
    calibration = synthesis.sampling.calibration_batches() * synthesis.batch_size
    return float(_pooled(config, size) + (calibration if synthesis.pool_scale else 0))


def _pooled(config: Config, size: DataSize) -> int:
    synthesis = config.synthesis
    return synthesis.pool_scale * size.train * len(synthesis.sampling.parts())


def _pool_labelled(config: Config, size: DataSize) -> float:
    """Images of a pool that the teacher answers for each student; with view: seen, see `_queries`."""
    synthesis = config.synthesis
    answered = _pooled(config, size) * synthesis.labellers
    return float(answered) if synthesis.view == "clean" else 0.0


def _sweep(config: Config, size: DataSize, checkpoints: int) -> StageWork:
    c, rounds = config, sweep_rounds(config.checkpoints, checkpoints)
    trained, generated, batch = 0.0, 0.0, 0
    for epochs, students in rounds:
        schedule = student_schedule(c.classifier, c.synthesis, epochs, size.train)
        images = size.train * c.synthesis.cardinality_scale
        trained += students * schedule.steps * schedule.batch_size
        generated += students * _generated(schedule, c.synthesis, images)
        batch = schedule.batch_size
    units = sum(students for _, students in rounds)
    generated += checkpoints * _pool(config, size)
    looked_at = units * (size.validation + _pool_labelled(config, size)) + _queries(config, trained)
    waits = tuple((students, float(epochs)) for epochs, students in rounds)
    return StageWork("checkpoints", "trial", units, waits, trained, batch, generated, looked_at=looked_at)


def _tuning(config: Config, size: DataSize) -> StageWork:
    """The brackets say exactly how far each trial gets; what it
    generates is the mean over the search space."""
    c, tuning = config, config.tuning
    synthesis = c.synthesis.model_copy(update={"epoch_unit": "real", "cardinality_scale": 1})
    schedule = student_schedule(c.classifier, synthesis, tuning.epochs, size.train)
    trained, generated, looks = 0.0, 0.0, 0
    rounds: list[tuple[int, float]] = []
    for bracket in hyperband_brackets(tuning.trials, tuning.rungs, tuning.reduction_factor):
        starts = (0, *(rung for _, rung in bracket.rungs))
        rounds += [
            (count, float(rung - start)) for start, (count, rung) in zip(starts, bracket.rungs, strict=False)
        ]
        ends = [count - after for (count, _), (after, _) in pairwise([*bracket.rungs, (0, 0)])]
        for ending, (count, rung) in zip(ends, bracket.rungs, strict=True):
            looks += count
            trained += ending * schedule.steps * schedule.batch_size * rung / tuning.rungs
            generated += ending * size.train * _mean_regenerated(config, tuning.epochs * rung / tuning.rungs)
    again, calibration = tuning.confirmed_students, synthesis.sampling.calibration_batches()
    trained += again * schedule.steps * schedule.batch_size
    generated += again * size.train * _mean_regenerated(config, float(tuning.epochs))
    generated += (tuning.trials + again) * calibration * synthesis.batch_size
    looked_at = float((looks + again) * size.validation) + _queries(config, trained)
    if synthesis.pool_scale:  # the sweep's best checkpoint has one; another way of drawing needs its own
        drawn_otherwise = bool(set(tuning.space) & set(type(synthesis.sampling).model_fields))
        generated = (tuning.trials if drawn_otherwise else 0) * _pool(config, size)
        looked_at += (tuning.trials + again) * _pool_labelled(config, size)
    rounds += [(again, float(tuning.rungs))] if again else []
    waits = (
        tuple(rounds) if tuning.brackets_in_flight == 1 else ()
    )  # else one bracket fills the slots that another leaves empty
    return StageWork(
        "tuning",
        "trial",
        tuning.trials + again,
        waits,
        trained,
        schedule.batch_size,
        generated,
        looked_at=looked_at,
    )


def _mean_regenerated(config: Config, epochs: float) -> float:
    """Images generated in `epochs` passes of real size, in real sizes,
    averaged over regeneration rate and cardinality scale."""
    rates, scales = (
        range(round(low), round(high) + 1)
        for low, high in (
            config.tuning.bounds(key, config.synthesis) for key in ("regeneration_rate", "cardinality_scale")
        )
    )
    return statistics.fmean(math.ceil(epochs / scale / rate) * scale for rate in rates for scale in scales)


def _student(config: Config, size: DataSize) -> StageWork:
    """At the default generation parameters; tuned ones change it: a cardinality scale of k takes k times as
    long where epochs count passes over the synthetic set."""
    c = config
    schedule = student_schedule(c.classifier, c.synthesis, c.student.epochs, size.train)
    images = size.train * c.synthesis.cardinality_scale
    work = _training("student", schedule, size)
    looked_at = work.looked_at + _queries(config, work.trained) + _pool_labelled(config, size)
    return replace(work, generated=_generated(schedule, c.synthesis, images), looked_at=looked_at)


def _queries(config: Config, trained: float) -> float:
    """Images that the teacher is asked about beside those it labels as they are generated."""
    return trained * config.synthesis.labellers if config.synthesis.view == "seen" else 0.0
