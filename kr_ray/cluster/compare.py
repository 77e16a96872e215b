"""Comparisons on one and the same generator: labelling strategies (appendix D), views and temperatures of the
teacher's answers, and ways of searching for the best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kr_ray.classifiers.training import Schedule
from kr_ray.cluster.sweep import SWEEP_TICKS, sweep_checkpoints, sweep_cost
from kr_ray.cluster.tasks import run_tasks
from kr_ray.cluster.trials import StudentWork, train_students
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import Config, ConfigError, SynthesisConfig
from kr_ray.config.methods import Labelling
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.foreign.yaml_core import YamlError, read_value
from kr_ray.methods.knowledge_recycling import student_training, train_student
from kr_ray.methods.teacher import train_teacher
from kr_ray.runs.artifacts import read_json, write_json
from kr_ray.runs.comparisons import CheckpointRow, LabelRow, SearchCost, SearchRow, ViewRow
from kr_ray.runs.progress import report_progress
from kr_ray.runs.results import ClassifierResult
from kr_ray.runs.stages import RESULT_FILE, Row, State
from kr_ray.synthesis.student_set import StudentSpec, student_schedule


def compare_labelling(
    run: Path,
    folder: Path,
    checkpoint_epochs: Sequence[int],
    strategies: Sequence[Labelling],
    seeds: Sequence[int],
    config: Config,
) -> list[LabelRow]:
    """Appendix D: validation CAS of each labelling strategy, from one and
    the same generator, per checkpoint and seed."""
    made, works = [], []
    for strategy in strategies:
        synthesis = config.synthesis.labelled_by(strategy)
        for checkpoint in checkpoint_epochs:
            for seed in seeds:
                spec = StudentSpec(config.generator, checkpoint, synthesis, config.checkpoints.epochs, seed)
                name = f"{strategy}_{checkpoint:04d}_seed{seed}"
                works.append(
                    StudentWork(
                        run, folder / "trials" / name, spec, config.classifier, SWEEP_TICKS, config.cluster
                    )
                )
                made.append((strategy, checkpoint, seed))
    return [
        LabelRow(labelling=strategy, epoch=checkpoint, seed=seed, val_cas=cas)
        for (strategy, checkpoint, seed), cas in zip(
            made, train_students(works, folder, config.cluster), strict=True
        )
    ]


@dataclass(frozen=True)
class Compared:
    """A generator whose checkpoints are compared.

    Attributes:
        config: the run's, with this generator and its way of drawing.
        trained_in: the stage that trained it.
        checkpoints: epochs.
    """

    config: Config
    trained_in: str
    checkpoints: Sequence[int]


def compare_generators(
    run: Path,
    folder: Path,
    generators: Mapping[str, Compared],
    labellings: Sequence[Labelling],
    seeds: Sequence[int],
) -> list[CheckpointRow]:
    """Figure 3 and appendix D: validation CAS of every checkpoint of each generator (by name) under each
    labelling, with the run's teacher."""
    rows, works = [], dict[Path, StudentWork]()
    for name, own in generators.items():
        for labelling, checkpoint, seed in product(labellings, own.checkpoints, seeds):
            student = folder / "trials" / f"{own.trained_in}_{labelling}_{checkpoint:04d}_seed{seed}"
            works[student] = _checkpoint_student(run, student, own, labelling, checkpoint, seed)
            rows.append((student, name, labelling, checkpoint, seed))
    config = next(iter(generators.values())).config
    cas = dict(zip(works, train_students(list(works.values()), folder, config.cluster), strict=True))
    return [
        CheckpointRow(generator=name, labelling=labelling, epoch=epoch, seed=seed, val_cas=cas[student])
        for student, name, labelling, epoch, seed in rows
    ]


def _checkpoint_student(
    run: Path, folder: Path, own: Compared, labelling: Labelling, checkpoint: int, seed: int
) -> StudentWork:
    c = own.config
    synthesis = c.synthesis.labelled_by(labelling)
    spec = StudentSpec(c.generator, checkpoint, synthesis, c.checkpoints.epochs, seed, own.trained_in)
    return StudentWork(run, folder, spec, c.classifier, SWEEP_TICKS, c.cluster)


VIEWS = (
    "view=clean",
    "view=clean,student_mixup=false",
    "view=seen",
    "view=seen,student_mixup=false",
    "view=seen,temperature=0.5",
    "view=seen,temperature=2",
)
"""Each lever of consistent teaching alone and with the view that it belongs to."""
EQUAL_TEACHER = "equal-compute teacher"


def view_variants(names: Sequence[str], synthesis: SynthesisConfig) -> dict[str, SynthesisConfig]:
    """The generation parameters of each variant, written `key=value,key=value` in keys of `synthesis`.

    Raises:
        ConfigError: a variant is not written so, or its keys are refused.
    """
    return {name: _variant(name, synthesis) for name in names}


def _variant(name: str, synthesis: SynthesisConfig) -> SynthesisConfig:
    pairs = [pair.partition("=") for pair in name.split(",")]
    if not all(key and equals and value for key, equals, value in pairs):
        raise ConfigError(
            f"`--views` must read key=value,key=value, but got {name!r}; try view=seen,temperature=2"
        )
    try:
        keys = {key: read_value(value) for key, _, value in pairs}
        return synthesis.with_values(keys)
    except YamlError as error:
        raise ConfigError(f"`--views` must hold values in YAML, but got {name!r}: {error}") from error
    except KeyError as error:
        raise ConfigError(
            f"`--views` must hold keys of the section synthesis, but got {error} in {name!r}"
        ) from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(
            f"`--views` must hold keys of the section synthesis, but got {name!r}: {wrong}"
        ) from error


def compare_views(
    run: Path,
    folder: Path,
    checkpoint: int,
    variants: Mapping[str, SynthesisConfig],
    seeds: Sequence[int],
    config: Config,
) -> list[ViewRow]:
    """Final students of one generator under each variant, and a teacher of as many gradient steps, per seed.

    A student or teacher that is finished stays so when the same comparison is
    made again. `EQUAL_TEACHER` is a variant too.
    """
    tasks: list[tuple[Any, ...]] = [(name, seed) for seed in seeds for name in (EQUAL_TEACHER, *variants)]

    def train(name: str, seed: int) -> ViewRow:
        own = folder / "trials" / f"{name.replace('=', '_').replace(',', '_').replace(' ', '_')}_seed{seed}"
        file = own / RESULT_FILE
        if not file.exists():
            spec = None if name == EQUAL_TEACHER else _final_spec(checkpoint, variants[name], seed, config)
            made = _whole_student(run, own, spec, config) if spec else _equal_teacher(run, own, seed, config)
            write_json(file, made.model_dump(mode="json"))
        report_progress(folder, own.name, 1.0, own.name)
        return ViewRow.model_validate(read_json(file) | {"variant": name, "seed": seed})

    return run_tasks("view", train, tasks, config.cluster.trial, config.cluster.max_retries)


def _keep_nothing(state: State, row: Row) -> None:
    """A student of a comparison takes minutes; one that was killed begins again."""


def _final_spec(checkpoint: int, synthesis: SynthesisConfig, seed: int, config: Config) -> StudentSpec:
    return StudentSpec(config.generator, checkpoint, synthesis, config.student.epochs, seed)


def _whole_student(run: Path, folder: Path, spec: StudentSpec, config: Config) -> ClassifierResult:
    made = train_student(folder, *student_training(run, spec, config.classifier), None, _keep_nothing)
    assert made is not None, "this process is the only worker"
    return made


def _equal_teacher(run: Path, folder: Path, seed: int, config: Config) -> ClassifierResult:
    """As many gradient steps, of the same batch, as the students at the default cardinality scale."""
    images = len(load_stored_splits(run / SPLITS_FILE).train)
    student = student_schedule(config.classifier, config.synthesis, config.student.epochs, images)
    schedule = Schedule.of_steps(
        config.classifier, images, batch=min(student.batch_size, images), steps=student.steps
    )
    own = derive_seed(seed, "equal")
    made = train_teacher(run, folder, config.classifier, schedule, seed=own, state=None, save=_keep_nothing)
    assert made is not None, "this process is the only worker"
    return made


def compare_search(
    run: Path, folder: Path, checkpoint_epochs: Sequence[int], seeds: Sequence[int], config: Config
) -> list[SearchRow]:
    """What `halving` costs and loses against the `exhaustive` sweep, a row per seed of the students.

    A student of a whole schedule that both searches train is one and the same,
    so it is trained once and counts in both costs.
    """

    def found_by(search: str, seed: int) -> SearchCost:
        keys = config.checkpoints.model_copy(update={"search": search})
        own = config.model_copy(update={"seed": seed, "checkpoints": keys})
        swept = sweep_checkpoints(run, folder / f"seed{seed}", checkpoint_epochs, own)
        return sweep_cost(run, folder / f"seed{seed}", swept, own)

    return [_search_row(seed, found_by("exhaustive", seed), found_by("halving", seed)) for seed in seeds]


def _search_row(seed: int, whole: SearchCost, short: SearchCost) -> SearchRow:
    return SearchRow(
        seed=seed,
        exhaustive=whole,
        halving=short,
        lost_cas=whole.val_cas - short.val_cas,
        images_share=short.images_seen / whole.images_seen,
        seconds_share=short.seconds / whole.seconds,
    )
