"""Coresets as a method: the selection training, then a classifier of what its rule takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kr_ray.classifiers.networks import save_classifier
from kr_ray.classifiers.ticks import WHOLE_TRAINING, TickedTraining
from kr_ray.classifiers.training import Schedule
from kr_ray.compute.parallel import worker_rank
from kr_ray.compute.seeding import derive_seed
from kr_ray.config.coreset import CoresetSection
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.methods.coreset.rules import SelectionScores, select
from kr_ray.methods.coreset.selection import SCORES_FILE, selection_name, selection_part
from kr_ray.methods.interface import HandedOn, Part, Site
from kr_ray.methods.taken import load_taken, save_taken
from kr_ray.methods.teacher import train_on_real
from kr_ray.runs.artifacts import ArtifactError
from kr_ray.runs.results import CoresetResult
from kr_ray.runs.stages import WEIGHTS_FILE, Save, State

TITLES = {
    "random": "random", "forgetting": "forgetting", "herding": "herding", "k_center": "k-center",
    "el2n": "EL2N", "grand": "GraNd", "entropy": "entropy",
}  # fmt: skip
NEVER_LEARNED = {
    "max": "; never learned counts as most forgotten",
    "zero": "; never learned counts as never forgotten",
}


@dataclass(frozen=True)
class Coreset:
    """See kr_ray.methods.interface.Method."""

    section: CoresetSection
    takes_over: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"Coreset, {TITLES[self.section.selection]}"

    @property
    def note(self) -> str:
        forgotten = NEVER_LEARNED[self.section.never_learned] if self._by_forgetting else ""
        return f"trained on {self.section.fraction:.3g} of the real images, no defence{forgotten}"

    @property
    def _by_forgetting(self) -> bool:
        return self.section.selection == "forgetting"

    def parts(self, site: Site, name: str = "coreset") -> Sequence[Part[Any]]:
        last = coreset_part(site, name, self.section)
        if self.section.selection == "random":
            return [last]
        return [selection_part(site, self.section.selection_epochs), last]

    def handed_on(self, site: Site, name: str) -> HandedOn:
        """The selected images themselves: who gets them knows who is in them."""
        taken = load_taken(site.path / name)
        if taken is None:
            raise ArtifactError(f"{site.path / name} must hold what was selected; run the same command again")
        images = load_stored_splits(site.path / SPLITS_FILE).train.subset(torch.from_numpy(taken))
        return HandedOn(images=images.images, labels=images.labels, set_size=len(images))


def coreset_part(site: Site, name: str, section: CoresetSection) -> Part[CoresetResult]:
    """A classifier of the images that `section` selects; which they are is kept beside the weights."""
    recipe = site.config.classifier
    before = () if section.selection == "random" else (selection_name(section.selection_epochs),)

    def work(folder: Path, state: State | None, save: Save) -> CoresetResult | None:
        splits = load_stored_splits(site.path / SPLITS_FILE)
        scores = SelectionScores.load(site.path / before[0] / SCORES_FILE) if before else None
        seed = derive_seed(site.seed, "coreset")
        taken = select(section, splits.train.labels, splits.num_classes, scores, seed)
        images = splits.train.subset(taken)
        schedule = Schedule.fit(recipe, len(images), section.epochs)
        training = train_on_real(images, splits.num_classes, recipe, schedule, seed)
        ticked = TickedTraining(training, splits.validation, WHOLE_TRAINING, state)
        ticked.finish(save)
        if worker_rank() != 0:
            return None
        save_classifier(folder / WEIGHTS_FILE, training.model)
        save_taken(folder, taken)
        by_forgetting = section.selection == "forgetting" and scores is not None
        return CoresetResult(
            **dict(ticked.result(splits.test)),
            selection=section.selection,
            selected=len(taken),
            selected_by_class=images.labels.bincount(minlength=splits.num_classes).tolist(),
            never_learned=section.never_learned if by_forgetting else None,
        )

    return Part(
        name=name,
        inputs=[recipe, section],
        after=("data", *before),
        result=CoresetResult,
        work=work,
        costs=("teacher", section.fraction * section.epochs / site.config.teacher.passes),
    )
