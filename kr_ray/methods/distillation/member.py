"""Data set distillation as a method: the set, then the classifier of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kr_ray.config.distillation import DistillationSection
from kr_ray.methods.distillation.sets import SET_FILE, DistilledSet, first_private
from kr_ray.methods.distillation.student import student_training
from kr_ray.methods.distillation.training import distil
from kr_ray.methods.interface import HandedOn, Part, Site
from kr_ray.methods.knowledge_recycling import train_student
from kr_ray.methods.taken import save_taken
from kr_ray.runs.results import DistillationResult, StudentResult
from kr_ray.runs.stages import Save, State
from kr_ray.runs.storage import file_stamps, storage_path

TITLES = {"dm": "Distribution matching", "dsa": "Gradient matching", "mtt": "Trajectory matching"}


@dataclass(frozen=True)
class Distillation:
    """See kr_ray.methods.interface.Method."""

    section: DistillationSection
    takes_over: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return TITLES[self.section.objective]

    @property
    def note(self) -> str:
        begun = {"real": "private images", "noise": "noise", "ood": "images of another set"}
        return (
            f"trained on {self.section.images_per_class} distilled images per class, which began as "
            f"{begun[self.section.initialisation]}"
        )

    def parts(self, site: Site, name: str = "distillation") -> Sequence[Part[Any]]:
        """The set's folder is called after the student, in a way that no student's can be."""
        section, made = self.section, f"distilled_{name.removeprefix('student_')}"

        def make(folder: Path, state: State | None, save: Save) -> DistillationResult:
            return distil(site, folder, section, state, save)

        def learn(folder: Path, state: State | None, save: Save) -> StudentResult | None:
            training, splits = student_training(site, site.path / made, section)
            if section.initialisation == "real":
                save_taken(folder, first_private(site.path / made))
            return train_student(folder, training, splits, state, save)

        public = section.ood.path if section.ood else ""
        files = file_stamps(storage_path(public)) if public else []
        of_set = section.model_copy(update={"epochs": 1, "student_augmentation": "distillation"})
        flip = site.config.classifier.horizontal_flip
        return [
            Part(name=made, inputs=[of_set, flip, files], result=DistillationResult, work=make),
            Part(
                name=name,
                inputs=[site.config.classifier, section.epochs, section.student_augmentation],
                after=("data", made),
                result=StudentResult,
                work=learn,
            ),
        ]

    def handed_on(self, site: Site, name: str) -> HandedOn:
        """The distilled set, as it is exported."""
        made = DistilledSet.load(site.path / f"distilled_{name.removeprefix('student_')}" / SET_FILE)
        images = made.as_bytes()
        return HandedOn(images=images, labels=made.targets.argmax(dim=1), set_size=len(images))
