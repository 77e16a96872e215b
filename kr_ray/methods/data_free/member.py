"""Data-free distillation as a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kr_ray.config.data_free import DataFreeSection
from kr_ray.methods.data_free.training import train_data_free
from kr_ray.methods.interface import Part, Site
from kr_ray.methods.run_teacher import run_teacher
from kr_ray.runs.results import DataFreeResult
from kr_ray.runs.stages import WEIGHTS_FILE, Save, State


@dataclass(frozen=True)
class DataFree:
    """See kr_ray.methods.interface.Method."""

    section: DataFreeSection
    title: str = "Data-free student"
    note: str = "taught on images that were made to please the teacher; no real image after the teacher"
    takes_over: tuple[str, ...] = ()

    def parts(self, site: Site, name: str = "data_free") -> Sequence[Part[Any]]:
        return [*run_teacher(site.config).parts(site, "teacher"), data_free_part(site, name, self.section)]


def data_free_part(site: Site, name: str, section: DataFreeSection) -> Part[DataFreeResult]:
    """The student of the site's teacher."""
    recipe = site.config.classifier

    def work(folder: Path, state: State | None, save: Save) -> DataFreeResult | None:
        teacher = site.path / "teacher" / WEIGHTS_FILE
        return train_data_free(site.path, folder, teacher, section, recipe, site.seed, state, save)

    return Part(
        name=name, inputs=[recipe, section], after=("data", "teacher"), result=DataFreeResult, work=work
    )
