"""Further teachers, whose answers label the students' images in place of the run's teacher or beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from kr_ray.classifiers.training import Schedule
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import SynthesisConfig
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.methods.interface import ClassifierPart, Part, Site
from kr_ray.methods.teacher import train_teacher
from kr_ray.runs.results import TEACHER, ClassifierResult
from kr_ray.runs.stages import Save, State
from kr_ray.synthesis.student_set import student_schedule


def labeller_parts(site: Site, synthesis: SynthesisConfig) -> Sequence[ClassifierPart]:
    """A training for each labeller of `synthesis` that is not the run's teacher.

    The first long one has the equal-compute teacher's seed: it is that teacher where the tuned student makes
    as many steps as one of default parameters.
    """
    names = [(k, name) for k, name in enumerate(synthesis.labeller_names()) if name != TEACHER.name]
    return [_part(site, name, k, long=synthesis.labeller == "equal_compute") for k, name in names]


def _part(site: Site, name: str, index: int, *, long: bool) -> ClassifierPart:
    c, seed = site.config, site.seed if index == 0 else derive_seed(site.seed, "labeller", index)
    length = (
        [c.student.epochs, c.synthesis.cardinality_scale, c.synthesis.epoch_unit] if long else [c.teacher]
    )
    return Part(
        name=name,
        inputs=[c.classifier, index, *length],
        result=ClassifierResult,
        work=partial(_train, site, seed, long),
        costs=("student" if long else "teacher", 1.0),
    )


def _train(
    site: Site, seed: int, long: bool, folder: Path, state: State | None, save: Save
) -> ClassifierResult | None:
    c, images = site.config, len(load_stored_splits(site.path / SPLITS_FILE).train)
    schedule = Schedule.fit(c.classifier, images, c.teacher.passes)
    if long:
        student = student_schedule(c.classifier, c.synthesis, c.student.epochs, images)
        batch = min(student.batch_size, images)
        schedule = Schedule.of_steps(c.classifier, images, batch=batch, steps=student.steps)
    return train_teacher(site.path, folder, c.classifier, schedule, seed=seed, state=state, save=save)
