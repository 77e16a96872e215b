"""The teacher: a classifier trained on the real images (section 3.1).
As a method it is the undefended baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kr_ray.classifiers.networks import new_classifier, save_classifier
from kr_ray.classifiers.sets import FixedSet, smoothed_one_hot
from kr_ray.classifiers.ticks import WHOLE_TRAINING, TickedTraining
from kr_ray.classifiers.training import ClassifierTraining, Schedule
from kr_ray.compute.devices import pick_device
from kr_ray.compute.parallel import worker_rank
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig, TeacherConfig
from kr_ray.data.images import LabelledImages
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.methods.interface import ClassifierPart, Part, Site
from kr_ray.runs.results import ClassifierResult
from kr_ray.runs.stages import WEIGHTS_FILE, Save, State

"""States that a kill can throw back to, and looks at the validation images, of a whole training."""


@dataclass(frozen=True)
class Teacher:
    """See kr_ray.methods.interface.Method.

    Attributes:
        epochs: None: the run's own teacher's.
    """

    epochs: int | None = None
    title: str = "Teacher"
    note: str = "trained on real images, no defence"
    takes_over: tuple[str, ...] = ()

    def parts(self, site: Site, name: str = "teacher") -> Sequence[ClassifierPart]:
        return [teacher_part(site, name, self.epochs)]


def teacher_part(site: Site, name: str = "teacher", epochs: int | None = None) -> ClassifierPart:
    """`epochs` passes over the real training split (None: as many as the run's own teacher), without any
    defence."""
    config = site.config
    length = TeacherConfig(epochs=config.teacher.passes if epochs is None else epochs)

    def work(folder: Path, state: State | None, save: Save) -> ClassifierResult | None:
        images = len(load_stored_splits(site.path / SPLITS_FILE).train)
        schedule = Schedule.fit(config.classifier, images, length.epochs)
        return train_teacher(
            site.path, folder, config.classifier, schedule, seed=site.seed, state=state, save=save
        )

    return Part(
        name=name,
        inputs=[config.classifier, length],
        result=ClassifierResult,
        work=work,
        costs=("teacher", 1.0),
    )


def train_teacher(
    run: Path,
    folder: Path,
    recipe: ClassifierConfig,
    schedule: Schedule,
    *,
    seed: int,
    state: State | None,
    save: Save,
) -> ClassifierResult | None:
    """Train on the real training split of `run`; leaves the weights in
    `folder`. Returns the result in the first worker."""
    splits = load_stored_splits(run / SPLITS_FILE)
    training = train_on_real(splits.train, splits.num_classes, recipe, schedule, derive_seed(seed, "teacher"))
    ticked = TickedTraining(training, splits.validation, WHOLE_TRAINING, state)
    ticked.finish(save)
    if worker_rank() != 0:
        return None
    save_classifier(folder / WEIGHTS_FILE, training.model)
    return ticked.result(splits.test)


def train_on_real(
    images: LabelledImages, num_classes: int, recipe: ClassifierConfig, schedule: Schedule, seed: int
) -> ClassifierTraining:
    """The recipe of Table 4 on `images`, not yet started."""
    device = pick_device()
    real = images.to(device)
    data = FixedSet(real.images, smoothed_one_hot(real.labels, num_classes, recipe.label_smoothing))
    model = new_classifier(num_classes, images.images.shape[1], recipe, seed)
    return ClassifierTraining(model, data, recipe, schedule, derive_seed(seed, "data"), device)


def same_schedule(schedule: Schedule, result: ClassifierResult) -> bool:
    """Whether a teacher of `schedule` would be the one that `result` tells of."""
    return (schedule.steps, schedule.batch_size) == (result.steps, result.batch_size)
