"""From the stages' results to the report's schema."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kr_ray.compute.devices import mixed_dtype, pick_device
from kr_ray.config import Config
from kr_ray.report import words
from kr_ray.report.build import ReportData, write_report
from kr_ray.report.importance import parameter_importance
from kr_ray.report.schema import (
    Audit,
    Data,
    EqualCompute,
    FurtherStudent,
    Generator,
    Released,
    Report,
    Scaling,
    Stage,
    Student,
    Teacher,
    Tuning,
)
from kr_ray.runs.artifacts import ArtifactError
from kr_ray.runs.figures import Copies
from kr_ray.runs.results import (
    AUDIT,
    CHECKPOINTS,
    COPIES,
    DATA,
    EQUAL_COMPUTE_TEACHER,
    FRONTIER,
    GENERATOR,
    GUARANTEE,
    SCALING,
    STUDENT,
    TEACHER,
    TUNING,
    WORST_CASE,
    ClassifierResult,
    Results,
)
from kr_ray.runs.stages import SAMPLES_FILE

PACKAGES = (
    "kr_ray",
    "torch",
    "torchvision",
    "ray",
    "optuna",
    "hyperopt",
    "scikit-learn",
    "pyarrow",
    "medmnist",
    "numpy",
)

ARTEFACTS = ["student.onnx", "synthetic"]
"""What `kr export` writes beside the released part of the report."""
INTERNAL = [name for name in Report.model_fields if name not in ("schema_version", "released", "internal")]
"""All else of a private run's report: it holds figures of real images that no guarantee covers."""


def write_run_report(
    run: Path, folder: Path, config: Config, results: Results, skipped: Mapping[str, bool]
) -> Path:
    """Write report.json and report.html into `folder`; returns the page."""
    report = collect_report(config, results, skipped)
    return write_report(report, ReportData(samples=_samples(run, results)), folder)


def collect_report(config: Config, results: Results, skipped: Mapping[str, bool]) -> Report:
    """What has been found; sections of stages without a result are left out."""
    data = results[DATA].model_dump(exclude={"wall_s"})
    sweep, frontier = results.get(CHECKPOINTS), results.get(FRONTIER)
    released = _released(config, results)
    return Report(
        run=config.name,
        seed=config.seed,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        config=config.model_dump(mode="json"),
        data=Data.model_validate(data),
        device=_device(),
        teacher=_teacher(results),
        generator=_generator(config, results),
        checkpoints=sweep.checkpoints if sweep else None,
        tuning=_tuning(results),
        student=_student(results),
        students=_further_students(config, results),
        released=released,
        internal=INTERNAL if released else [],
        scaling=Scaling(rows=scaling.rows) if (scaling := results.get(SCALING)) else None,
        audit=_audit(results),
        frontier=frontier.frontier if frontier else None,
        stages={
            name: Stage(
                wall_s=result.wall_s, skipped=skipped.get(name, False), images_per_s=result.throughput()
            )
            for name, result in results.items()
        },
    )


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"commit": _commit(), "python": platform.python_version()} | packages


def _teacher(results: Results) -> Teacher | None:
    teacher, equal = results.get(TEACHER), results.get(EQUAL_COMPUTE_TEACHER)
    if teacher is None:
        return None
    return Teacher(
        test_accuracy=teacher.test_accuracy,
        val_accuracy=teacher.val_accuracy,
        steps=teacher.steps,
        equal_compute=EqualCompute(test_accuracy=equal.test_accuracy, steps=equal.steps, work=equal.work)
        if equal
        else None,
        work=teacher.work,
        test_loss=teacher.test_loss,
        curve=teacher.curve,
        confusion=teacher.confusion,
    )


def _generator(config: Config, results: Results) -> Generator | None:
    generator, section = results.get(GENERATOR), config.generator
    if generator is None:
        return None
    return Generator(
        kind=section.kind,
        architecture=str(getattr(section, "architecture", "")),
        parameters=generator.parameters,
        epochs=section.epochs,
        curve=generator.curve,
        collapse=generator.collapse,
    )


def _tuning(results: Results) -> Tuning | None:
    tuning = results.get(TUNING)
    if tuning is None:
        return None
    importance = parameter_importance(tuning.history, list(tuning.chosen), results[DATA].validation)
    return Tuning.model_validate(
        tuning.model_dump(exclude={"wall_s", "privacy"}) | {"importance": importance}
    )


def _student(results: Results) -> Student | None:
    student, sweep = results.get(STUDENT), results.get(CHECKPOINTS)
    if student is None:
        return None
    return Student(
        test_cas=student.test_accuracy,
        val_cas=student.val_accuracy,
        steps=student.steps,
        images_seen=student.images_seen,
        parameters=student.parameters,
        curve=student.curve,
        confusion=student.confusion,
        checkpoint_epoch=sweep.best_epoch if sweep else None,
        images_from=student.images_from,
        labels=words.labels(student.synthesis) if student.synthesis else None,
        work=student.work,
    )


def _further_students(config: Config, results: Results) -> dict[str, FurtherStudent]:
    by_name, found = dict(results.items()), {}
    for name, section in config.students.items():
        result = by_name.get(f"student_{name}")
        if isinstance(result, ClassifierResult):
            found[name] = FurtherStudent(
                kind=section.kind,
                title=result.title,
                note=result.note,
                guarantee=result.privacy.guarantee if result.privacy else None,
                test_accuracy=result.test_accuracy,
                val_accuracy=result.val_accuracy,
                steps=result.steps,
                images_seen=result.images_seen,
                seconds=result.seconds,
                work=result.work,
            )
    return found


def _released(config: Config, results: Results) -> Released | None:
    """What may leave a private run; None for any other, and before it is known what was promised."""
    return released_of(config, results) if results.get(GUARANTEE) else None


def released_of(config: Config, results: Results) -> Released:
    """All that the report of a private run may tell outside."""
    promised, student, data = results[GUARANTEE], results[STUDENT], results[DATA]
    sweep, generator = results.get(CHECKPOINTS), results[GENERATOR]
    return Released(
        run=config.name,
        guarantee=promised.bounds,
        words=promised.words,
        artefacts=ARTEFACTS,
        class_names=data.class_names,
        channels=1 if data.channels == 1 else 3,
        image_size=data.image_size,
        training_images=data.train,
        generator=config.generator.kind,
        checkpoint_epoch=sweep.best_epoch if sweep else generator.checkpoints[-1],
        synthesis=student.synthesis,
        student_parameters=student.parameters,
        versions=_versions(),
    )


def _audit(results: Results) -> Audit | None:
    kr, copies, worst = results.get(AUDIT), results.get(COPIES), results.get(WORST_CASE)
    if not (kr or copies or worst):
        return None
    return Audit(
        kr=kr.kr if kr else None,
        copies=Copies.model_validate(copies.model_dump(exclude={"wall_s"})) if copies else None,
        lira=worst.lira if worst else {},
    )


def _samples(run: Path, results: Results) -> NDArray[np.uint8] | None:
    """Images that the copies stage drew of the student's checkpoint: uint8
    [classes, n, C, H, W]; None before it has run."""
    path = run / COPIES.name / SAMPLES_FILE
    if results.get(COPIES) is None or not path.exists():
        return None
    with path.open("rb") as file:
        try:
            samples: NDArray[np.uint8] = np.load(file, allow_pickle=False)
        except ValueError as error:
            raise ArtifactError(
                f"{path} is not an array of images ({error}); delete the folder and run the same command"
            ) from error
    return samples


def _commit() -> str:
    """Of the checkout the program runs from; "-dirty" if it was edited, "release" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "release"


def _device() -> str:
    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    dtype = mixed_dtype(device)
    return f"{name}, mixed precision {'off' if dtype is None else str(dtype).removeprefix('torch.')}"
