"""Knowledge Recycling (arXiv 2407.15526): teacher and generator on the
real images, a student on what the generator draws.

teacher -> generator -> student of teacher-labelled, regenerated images (sections 3.1 to 3.4)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kr_ray.classifiers.networks import new_classifier, save_classifier
from kr_ray.classifiers.sets import TrainingSet
from kr_ray.classifiers.ticks import WHOLE_TRAINING, Score, TickedTraining, Ticks, told_as_it_is
from kr_ray.classifiers.training import ClassifierTraining
from kr_ray.compute.devices import pick_device
from kr_ray.compute.parallel import worker_rank
from kr_ray.compute.seeding import derive_seed, seeded_generator
from kr_ray.config import ClassifierConfig, Config, SynthesisConfig
from kr_ray.config.privacy import asks_the_generator
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.generators.interface import Judge, checkpoint_file
from kr_ray.generators.registry import generator_of
from kr_ray.methods.interface import HandedOn, Part, Site
from kr_ray.methods.labellers import labeller_parts
from kr_ray.methods.run_generator import generator_part
from kr_ray.methods.run_teacher import run_teacher_part
from kr_ray.runs.results import StudentResult
from kr_ray.runs.stages import WEIGHTS_FILE, Save, State
from kr_ray.synthesis.student_set import (
    OpenSet,
    StudentSpec,
    on_device,
    set_prior,
    set_size,
    student_labeller,
    student_schedule,
)
from kr_ray.synthesis.with_real import WithReal

SAMPLES_PER_IMAGE, MOST_SAMPLES = 4, 40_000
"""Drawn of a generator that is attacked, for every image of its set; and at most."""


@dataclass(frozen=True)
class KnowledgeRecycling:
    """See kr_ray.methods.interface.Method.

    Attributes:
        synthesis: generation parameters that this student has otherwise than the run's own.
    """

    synthesis: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    title: str = "Student"
    note: str = "Knowledge Recycling: teacher, generator and student trained anew in every run"
    takes_over: tuple[str, ...] = ()

    def parts(self, site: Site, name: str = "student") -> Sequence[Part[Any]]:
        """Where a run is audited, its generator is trained up to the one
        checkpoint that the student is taught by."""
        generator, spec = generator_of(site.config.generator), self.spec(site)
        share = 1.0
        if site.audited is not None:
            generator, share = (
                generator.up_to(spec.checkpoint_epoch),
                spec.checkpoint_epoch / generator.section.epochs,
            )
        made = sources(site, generator_part(site, generator, share), spec.synthesis)
        return [*made, student_part(site, name, spec)]

    def spec(self, site: Site) -> StudentSpec:
        return replace(site.student, synthesis=site.student.synthesis.with_values(self.synthesis))

    def handed_on(self, site: Site, name: str) -> HandedOn:
        """A set as large as the student's, and further samples of the generator, within MOST_SAMPLES."""
        spec = self.spec(site)
        splits, device = load_stored_splits(site.path / SPLITS_FILE), pick_device()
        size = min(set_size(spec, splits), MOST_SAMPLES // SAMPLES_PER_IMAGE)
        prior = set_prior(site.path, spec, splits)
        sampler = generator_of(spec.generator).open(
            site.path / checkpoint_file(spec.checkpoint_epoch),
            spec.synthesis.sampling,
            prior=prior,
            seed=derive_seed(site.seed, "handed on standing"),
            device=device,
            batch_size=spec.synthesis.batch_size,
        )
        random = seeded_generator(site.seed, "handed on")
        classes = torch.multinomial(prior, SAMPLES_PER_IMAGE * size, replacement=True, generator=random)
        images = sampler.images(classes, random).cpu()
        return HandedOn(images=images, labels=classes, set_size=size)

    def knows(self, site: Site, images: Tensor, labels: Tensor) -> Tensor | None:
        spec = self.spec(site)
        judge = generator_of(spec.generator)
        if not isinstance(judge, Judge):
            return None
        return judge.knows(site.path / checkpoint_file(spec.checkpoint_epoch), images, labels, pick_device())


def sources(site: Site, generator: Part[Any], synthesis: SynthesisConfig) -> list[Part[Any]]:
    """Teacher, further labellers and generator, in the order in which they are trained; no teacher where a
    private run's student never asks one."""
    config = site.config
    if config.privacy and not config.synthesis.asks_the_teacher:
        return [generator]
    teachers = [run_teacher_part(site), *labeller_parts(site, synthesis)]
    return [generator, *teachers] if asks_the_generator(config) else [*teachers, generator]


def student_after(config: Config, synthesis: SynthesisConfig) -> tuple[str, ...]:
    """The parts that a student stands on: in a private run without a teacher that it never asks."""
    asked = config.synthesis.asks_the_teacher or not config.privacy
    teachers = dict.fromkeys(("teacher", *synthesis.labeller_names())) if asked else ()
    return ("data", *teachers, "generator")


def student_part(site: Site, name: str, spec: StudentSpec) -> Part[StudentResult]:
    """The student of `spec`, taught by the site's teacher and generator."""
    recipe = site.config.classifier

    def work(folder: Path, state: State | None, save: Save) -> StudentResult | None:
        training, splits = student_training(site.path, spec, recipe, site.open_set)
        return train_student(folder, training, splits, state, save)

    return Part(
        name=name,
        inputs=[spec.checkpoint_epoch, spec.synthesis, spec.epochs],
        after=student_after(site.config, spec.synthesis),
        result=StudentResult,
        work=work,
        costs=("student", 1.0),
    )


def student_training(
    run: Path, spec: StudentSpec, recipe: ClassifierConfig, open_set: OpenSet = on_device
) -> tuple[ClassifierTraining, Splits]:
    """A student's training, not yet started, and the real splits (of which only validation and test images
    may be shown to it, unless `spec.with_real`)."""
    device = pick_device()
    splits = load_stored_splits(run / SPLITS_FILE)
    recipe = spec.synthesis.student_recipe(recipe)
    model = new_classifier(splits.num_classes, splits.channels, recipe, derive_seed(spec.seed, "student"))
    schedule = student_schedule(recipe, spec.synthesis, spec.epochs, len(splits.train), spec.with_real)
    epochs = -(-schedule.steps // schedule.steps_per_epoch)
    data: TrainingSet = open_set(run, spec, recipe, splits, device, epochs)
    if spec.with_real:
        data = WithReal(data, splits.train.to(device), splits.num_classes, recipe.label_smoothing)
    labeller = student_labeller(run, spec, schedule, device)
    return ClassifierTraining(
        model, data, recipe, schedule, derive_seed(spec.seed, "data"), device, labeller
    ), splits


def start_student(
    run: Path,
    spec: StudentSpec,
    recipe: ClassifierConfig,
    ticks: Ticks,
    state: State | None,
    open_set: OpenSet = on_device,
    score: Score = told_as_it_is,
) -> TickedTraining:
    """A student of the sweep, the tuning or a comparison, from `state` if
    there is one; it is judged on validation images."""
    training, splits = student_training(run, spec, recipe, open_set)
    return TickedTraining(training, splits.validation, ticks, state, score)


def train_student(
    folder: Path, training: ClassifierTraining, splits: Splits, state: State | None, save: Save
) -> StudentResult | None:
    """Train a student that is handed on; leaves its weights in
    `folder`. Returns the result in the first worker."""
    ticked = TickedTraining(training, splits.validation, WHOLE_TRAINING, state)
    ticked.finish(save)
    ticked.close()
    if worker_rank() != 0:
        return None
    save_classifier(folder / WEIGHTS_FILE, training.model)
    return StudentResult.model_validate(ticked.result(splits.test).model_dump())
