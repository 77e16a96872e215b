"""The run's own teacher, of whatever kind: a line for each. A new one: its section in `kr_ray.config.dp` and
`kr_ray.config.kinds`, a line below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_never, cast

import torch

from kr_ray.config import Config, DpdfdTeacher, DpSgdTeacher, TeacherConfig
from kr_ray.config.privacy import asks_the_generator, fitted_to
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.generators.interface import Sampler, checkpoint_file
from kr_ray.generators.registry import generator_of
from kr_ray.methods.dp_sgd import DpSgd, dp_sgd_recipe, train_dp_sgd
from kr_ray.methods.dpdfd.member import Dpdfd
from kr_ray.methods.dpdfd.training import train_dpdfd
from kr_ray.methods.interface import ClassifierPart, Method, Part, Site
from kr_ray.methods.private_run import fitted
from kr_ray.methods.run_generator import generator_part
from kr_ray.methods.teacher import Teacher, teacher_part
from kr_ray.runs.results import ClassifierResult
from kr_ray.runs.stages import Save, State

BuiltIn = TeacherConfig | DpSgdTeacher | DpdfdTeacher
"""One that has no line below is a type error."""


def run_teacher_part(site: Site, name: str = "teacher") -> ClassifierPart:
    """The training of `teacher` in the configuration."""
    section = cast("BuiltIn", site.config.teacher)
    match section:
        case TeacherConfig():
            return teacher_part(site, name)
        case DpSgdTeacher():
            return _dp_sgd(site, name, section)
        case DpdfdTeacher():
            return _dpdfd(site, name, section)
        case _:
            assert_never(section)


def run_teacher(config: Config) -> Method:
    """It as a method of its own, for tables and as an arm of the audit."""
    section = cast("BuiltIn", config.teacher)
    match section:
        case TeacherConfig():
            return Teacher()
        case DpSgdTeacher():
            return _OwnTeacher(DpSgd(section))
        case DpdfdTeacher():
            return _OwnTeacher(Dpdfd(section))
        case _:
            assert_never(section)


class _OwnTeacher:
    """See kr_ray.methods.interface.Method."""

    takes_over: Sequence[str] = ()

    def __init__(self, kind: DpSgd | Dpdfd) -> None:
        self.title, self.note = f"Teacher, {kind.title}", kind.note

    def parts(self, site: Site, name: str = "teacher") -> Sequence[Part[Any]]:
        before = [generator_part(site, generator_of(site.config.generator))]
        return [*(before if asks_the_generator(site.config) else []), run_teacher_part(site, name)]


def _dp_sgd(site: Site, name: str, section: DpSgdTeacher) -> ClassifierPart:
    recipe = dp_sgd_recipe(section, site.config.classifier)

    def work(folder: Path, state: State | None, save: Save) -> ClassifierResult:
        own = fitted(site.config, "teacher", section, _images(site))
        released = train_dp_sgd(site.path, folder, own, recipe, site.seed, state, save)
        return released.result

    inputs = [recipe, section, *fitted_to(site.config, "teacher", section)]
    return Part(name=name, inputs=inputs, result=ClassifierResult, work=work, costs=("teacher", 1.0))


def _dpdfd(site: Site, name: str, section: DpdfdTeacher) -> ClassifierPart:
    recipe, generated = site.config.classifier, asks_the_generator(site.config)

    def work(folder: Path, state: State | None, save: Save) -> ClassifierResult:
        own = fitted(site.config, "teacher", section, _images(site))
        queries = _generated(site) if generated else None
        released = train_dpdfd(site.path, folder, own, recipe, site.seed, state, save, queries)
        return released.result

    return Part(
        name=name,
        inputs=[recipe, section, *fitted_to(site.config, "teacher", section)],
        after=("data", "generator") if generated else ("data",),
        result=ClassifierResult,
        work=work,
        costs=("teacher", 1.0),
    )


def _images(site: Site) -> int:
    return len(load_stored_splits(site.path / SPLITS_FILE).train)


def _generated(site: Site) -> Sampler:
    """The generator's last checkpoint: asking about its images composes with what it released itself."""
    section, classes = site.config.generator, load_stored_splits(site.path / SPLITS_FILE).num_classes
    last = section.epochs - section.epochs % section.checkpoint_every
    return generator_of(section).open(
        site.path / checkpoint_file(last if site.audited is None else site.student.checkpoint_epoch),
        site.config.synthesis.sampling,
        prior=torch.full((classes,), 1 / classes, dtype=torch.float64),
        seed=site.seed,
        device=torch.device("cpu"),
    )
