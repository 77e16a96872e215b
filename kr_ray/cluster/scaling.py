"""The scaling curve: students of more and more synthetic images, without and with the real ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

from kr_ray.cluster.pools import draw_pools
from kr_ray.cluster.tasks import run_tasks
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import Config, SynthesisConfig
from kr_ray.methods.knowledge_recycling import student_training, train_student
from kr_ray.runs.artifacts import load_state, read_json, save_state, write_json
from kr_ray.runs.figures import ScalingRow
from kr_ray.runs.progress import report_progress
from kr_ray.runs.results import StudentResult
from kr_ray.runs.stages import RESULT_FILE, STATE_FILE, WEIGHTS_FILE, Row, State
from kr_ray.synthesis.student_set import StudentSpec

ONCE = 10**6
"""Epochs between two regenerations: more than any student has, so that its set is drawn once."""


def measure_scaling(run: Path, folder: Path, spec: StudentSpec, config: Config) -> list[ScalingRow]:
    """A row per size, kind of set and seed; a student that is finished or begun is not trained again from the
    start.

    Args:
        spec: of the run's final student, whose checkpoint and other parameters all have.
    """
    scaling = config.scaling
    students = {
        (scale, with_real, k): replace(
            spec,
            synthesis=scaled(spec.synthesis, scale, max(scaling.scales)),
            with_real=with_real,
            seed=derive_seed(config.seed, "scaling", k),
        )
        for k, scale, with_real in product(range(scaling.seeds), scaling.scales, (False, True))
    }
    draw_pools(run, students.values(), folder, config.cluster)

    def train(scale: int, with_real: bool, k: int) -> ScalingRow:
        own = folder / "trials" / f"{scale:04d}{'_with_real' if with_real else ''}_seed{k}"
        made = _trained(run, own, students[scale, with_real, k], config)
        return ScalingRow(
            scale=scale,
            with_real=with_real,
            seed=k,
            test_accuracy=made.test_accuracy,
            val_accuracy=made.val_accuracy,
            steps=made.steps,
            work=made.work,
        )

    found = run_tasks("scaling", train, list(students), config.cluster.trial, config.cluster.max_retries)
    return sorted(found, key=lambda row: (row.with_real, row.scale, row.seed))


def scaled(synthesis: SynthesisConfig, scale: int, largest: int) -> SynthesisConfig:
    """The same generation for a set of that size, drawn once; where there are pools, one serves all sizes."""
    pool = largest if synthesis.pool_scale else 0
    return synthesis.model_copy(
        update={"cardinality_scale": scale, "pool_scale": pool, "regeneration_rate": ONCE}
    )


def _trained(run: Path, folder: Path, spec: StudentSpec, config: Config) -> StudentResult:
    """Its weights are not kept: it was trained to be measured, and perhaps on real images."""

    def save(state: State, row: Row) -> None:
        save_state(folder / STATE_FILE, state)
        report_progress(folder.parent.parent, folder.name, row["share"], folder.name)

    if not (folder / RESULT_FILE).exists():
        training, splits = student_training(run, spec, config.classifier)
        made = train_student(folder, training, splits, load_state(folder / STATE_FILE), save)
        assert made is not None, "this process is the only worker"
        write_json(folder / RESULT_FILE, made.model_dump(mode="json"))
        for name in (STATE_FILE, WEIGHTS_FILE):
            (folder / name).unlink(missing_ok=True)
    return StudentResult.model_validate(read_json(folder / RESULT_FILE))
