"""A student of the run's own generator, which in the audit stays as it is:
what leaks leaks through the teacher's labels alone.

The generator saw the same images in all runs, so it bears no sign of who is a member of one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kr_ray.generators.interface import checkpoint_file
from kr_ray.generators.registry import generator_of
from kr_ray.methods.interface import Part, Site
from kr_ray.methods.knowledge_recycling import sources, student_part
from kr_ray.methods.run_generator import generator_after, generator_part
from kr_ray.runs.artifacts import atomic_write
from kr_ray.runs.results import Result
from kr_ray.runs.stages import Save, State


@dataclass(frozen=True)
class FixedGenerator:
    """See kr_ray.methods.interface.Method."""

    title: str = "Student, fixed generator"
    note: str = "one generator for all runs; only teacher and student trained anew"
    takes_over: tuple[str, ...] = ("generator",)

    def parts(self, site: Site, name: str = "student") -> Sequence[Part[Any]]:
        generator = (
            generator_part(site, generator_of(site.config.generator))
            if site.audited is None
            else copied_generator_part(site, site.audited / checkpoint_file(site.student.checkpoint_epoch))
        )
        made = sources(site, generator, site.student.synthesis)
        return [*made, student_part(site, name, site.student)]


def copied_generator_part(site: Site, checkpoint: Path) -> Part[Result]:
    """Take a checkpoint over from the audited run; it lies in the place of one trained here."""

    def work(folder: Path, state: State | None, save: Save) -> Result:
        name = checkpoint_file(site.student.checkpoint_epoch).relative_to("generator")
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(checkpoint.read_bytes())
        return Result()

    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    return Part(
        name="generator",
        inputs=[digest],
        after=generator_after(site.config),
        result=Result,
        work=work,
        costs=("generator", 0.0),
    )
