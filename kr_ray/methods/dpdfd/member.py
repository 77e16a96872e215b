"""DPDFD as a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kr_ray.config.dp import DpdfdSection
from kr_ray.methods.dpdfd.training import train_dpdfd
from kr_ray.methods.interface import ClassifierPart, Part, Site
from kr_ray.runs.results import ClassifierResult
from kr_ray.runs.stages import Save, State


@dataclass(frozen=True)
class Dpdfd:
    """See kr_ray.methods.interface.Method."""

    section: DpdfdSection
    title: str = "DPDFD"
    note: str = "a student of images that teachers of private shards answer with noise"
    takes_over: tuple[str, ...] = ()

    def parts(self, site: Site, name: str = "dpdfd") -> Sequence[ClassifierPart]:
        recipe, section = site.config.classifier, self.section

        def work(folder: Path, state: State | None, save: Save) -> ClassifierResult:
            released = train_dpdfd(site.path, folder, section, recipe, site.seed, state, save)
            return ClassifierResult.model_validate(released.result)

        return [Part(name=name, inputs=[recipe, section], result=ClassifierResult, work=work)]
