"""Knowledge Recycling as a table of stages (arXiv 2407.15526, section 3 and figure 1).

    teacher, generator -> checkpoints -> tuning -> student -> audit (-> worst case, if asked for) -> report

Every stage is a function of artefacts with a small typed result. A finished stage is skipped as long as its
fingerprint stands: the config sections it uses, the data, and the fingerprints of the stages it builds on. So
the same command resumes, and a changed key runs again exactly what depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr_ray.audit_stages import AuditStages
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import Config, ConfigError, SynthesisConfig, TeacherConfig
from kr_ray.config.file import with_overrides
from kr_ray.config.privacy import asks_the_generator, fitted_to, selects
from kr_ray.promise_stages import PromiseStages
from kr_ray.runs.artifacts import ArtifactError
from kr_ray.runs.figures import (
    CopySpace,
    Generation,
    SweptCheckpoint,
)
from kr_ray.runs.results import (
    AUDIT,
    CHECKPOINTS,
    COPIES,
    DATA,
    EQUAL_COMPUTE_TEACHER,
    FRONTIER,
    GENERATOR,
    GUARANTEE,
    REPORT,
    SCALING,
    SHADOWS,
    STUDENT,
    TEACHER,
    TUNING,
    WORST_CASE,
    AuditResult,
    ClassifierResult,
    CopiesResult,
    DataResult,
    DistillationResult,
    Key,
    R,
    ReportResult,
    Result,
    Results,
    ScalingResult,
    ShadowsResult,
    StudentResult,
    SweepResult,
    TuningResult,
)
from kr_ray.runs.storage import file_stamps, local_copies, storage_path
from kr_ray.stages import Stage, Watcher

if TYPE_CHECKING:
    from kr_ray.methods.interface import Part

STAGES = tuple(
    key.name
    for key in (
        DATA, TEACHER, GENERATOR, CHECKPOINTS, TUNING, STUDENT, COPIES, EQUAL_COMPUTE_TEACHER, SHADOWS, AUDIT,
        WORST_CASE, SCALING, REPORT,
    )
)  # fmt: skip
"""Of every run, in the order in which a whole run has them; `students` add theirs before the worst case."""
MIN_VALIDATION = 10


class Pipeline(PromiseStages, AuditStages):
    """One run: its stages, what they depend on, and their results.

    `with Pipeline(config, watcher) as pipeline: pipeline.run_until("report")`
    """

    def __init__(self, config: Config, watcher: Watcher) -> None:
        if config.tracking.mlflow:
            from kr_ray.report.tracking import require_mlflow

            require_mlflow()
        if (encoder := config.audit.copies.encoder) and not storage_path(encoder).is_file():
            raise ConfigError(
                f"`audit.copies.encoder` must name a file, but {encoder!r} does not exist; correct the path"
            )
        super().__init__(config, watcher)
        if config.data.path and self.run.path.is_relative_to(storage_path(config.data.path).resolve()):
            raise ConfigError(
                "`storage` must not lie in data.path, or runs would be read as images, but got "
                f"{config.storage!r} in {config.data.path!r}; use another storage"
            )
        self.stages = self._stages()

    # --- the paper, stage by stage ---

    def _stages(self) -> Mapping[str, Stage[Any]]:
        """All stages of this run by name, each after those it builds on."""
        c = self.config
        exported, own = bool(c.student.from_parquet), _Order.of(c)
        stages: list[Stage[Any]] = [
            Stage(
                key=DATA, after=(), work=self._data, workers=None, stands_for=_digest, reads=(),
                inputs=lambda: [c.data, c.generator.batch_size,
                                file_stamps(storage_path(c.data.path)) if c.data.path else []],
            ),
            *own.sorted(
                Stage(
                    key=TEACHER, after=own.teacher, work=self._teacher, workers="train", reads=("training",),
                    inputs=lambda: [c.seed, c.classifier, c.teacher,
                                    *fitted_to(c, "teacher", c.teacher)],
                    check=self._check_privacy,
                ),
                Stage(
                    key=GENERATOR, after=own.generator, work=self._generator, workers="train",
                    reads=("training",), check=self._check_privacy,
                    inputs=lambda: [c.seed, c.generator, *fitted_to(c, "generator", c.generator)],
                ),
            ),
            *self._labellers(c.synthesis),
            Stage(
                key=CHECKPOINTS, after=(*own.checkpoints, *self._labeller_names()), work=self._checkpoints,
                units=self._sweep_students,
                inputs=lambda: [c.seed, c.classifier, c.synthesis, c.checkpoints, *self._noise_of_scores()],
                reads=("validation",), check=self._check_privacy,
            ),
            Stage(
                key=TUNING, after=("checkpoints",), work=self._tuning,
                units=lambda: c.tuning.trials + c.tuning.confirmed_students,
                inputs=lambda: [c.seed, c.classifier, c.synthesis, c.tuning, *self._noise_of_scores()],
                reads=("validation",), check=self._check_privacy,
            ),
            self._exported_student() if exported else Stage(
                key=STUDENT, after=own.student, work=self._student, workers="train", reads=(),
                inputs=lambda: [c.seed, c.classifier, c.synthesis, c.student.epochs],
            ),
            Stage(
                key=GUARANTEE, after=("student",), work=self._guarantee, workers=None, reads=(),
                wanted=lambda: c.privacy is not None, inputs=lambda: [c.privacy],
            ),
            Stage(
                key=COPIES, after=own.copies, work=self._copies, wanted=lambda: not exported,
                inputs=lambda: [c.seed, c.audit.copies, *self._encoder_stamp()],
            ),
            Stage(
                key=EQUAL_COMPUTE_TEACHER, after=("teacher", "student"), work=self._equal_compute_teacher,
                workers="train",
                wanted=lambda: c.student.equal_compute_teacher and not exported,
                inputs=lambda: [c.seed, c.classifier],
            ),
            Stage(
                key=SHADOWS, after=("data",), work=self._shadows, units=lambda: c.audit.shadow.models,
                wanted=lambda: not exported,
                inputs=lambda: [c.seed, c.classifier, c.audit.shadow.models, c.audit.shadow.epochs],
            ),
            Stage(
                key=AUDIT, after=("teacher", "student", "shadows"), work=self._audit,
                wanted=lambda: not exported,
                inputs=lambda: [c.seed, c.audit.shadow],
            ),
            *self._further_students(),
            Stage(
                key=WORST_CASE, after=self._worst_case_after(), work=self._worst_case,
                inputs=self._worst_case_inputs,
                units=lambda: self.config.audit.worst_case.models, resumes=True,
                wanted=lambda: (
                    bool(self.config.audit.worst_case.arms) or self.take_over(self.stages["worst_case"])
                ),
            ),
            Stage(key=FRONTIER, after=("data",), work=self._frontier, inputs=self._frontier_inputs,
                  wanted=lambda: self.take_over(self.stages["frontier"])),
            Stage(
                key=SCALING, after=("teacher", "tuning"), work=self._scaling,
                units=lambda: c.scaling.students,
                inputs=lambda: [c.seed, c.classifier, c.synthesis, c.student.epochs, c.scaling],
                wanted=lambda: self.take_over(self.stages["scaling"]),
            ),
            Stage(key=REPORT, after=(), work=self._report, inputs=lambda: [self.config, dict(self.prints)],
                  workers=None),
        ]  # fmt: skip
        left_out = () if selects(c) else ("checkpoints", "tuning")
        return {stage.name: stage for stage in stages if stage.name not in left_out}

    def run_until(self, last: str) -> Result:
        """Run `last` and all that it builds on; before a report, all stages that the configuration wants.

        Raises:
            ConfigError: `last` needs what a run of an exported set does not have.
        """
        if self.config.student.from_parquet and last not in ("report", *self.ancestors("student")):
            raise ConfigError(
                f"`student.from_parquet` must be empty for the stage {last}, which needs "
                f"a teacher or a generator, but got {self.config.student.from_parquet!r}; "
                "remove it, or use kr student or kr run"
            )
        if last not in self.stages:
            raise ConfigError(
                f"`privacy.selection: noisy` must hold for the stage {last}, but got fixed; with fixed no "
                "validation image decides anything, so there is nothing to find"
            )
        needed = self.ancestors(last)
        if last == "report":
            self._as_its_frontier(whole=True)
        if self.config.privacy and "student" in needed:
            needed.add(GUARANTEE.name)  # whoever has a private student is told what it promises
        for name, stage in self.stages.items():
            if name in needed or (last == "report" and self._wanted(name)):
                self.run_stage(stage)
        return dict(self.results.items())[last]

    def _wanted(self, name: str) -> bool:
        """Whether a whole run has the stage: it is wanted, or one that is builds on it."""
        exported = self.config.student.from_parquet and name in (
            "teacher",
            "generator",
            "checkpoints",
            "tuning",
        )
        return not exported and self.stages[name].wanted()

    def report(self) -> Result:
        """Report on what has finished so far; runs no other stage."""
        self._as_its_frontier(whole=False)
        self.find_finished()
        if "data" not in self.results:
            raise ArtifactError(
                f"{self.run.path} holds no finished stage of this configuration; start it with `kr run`"
            )
        return self.run_stage(self.stages["report"])

    def run_missing(self, names: Sequence[str]) -> None:
        """Run these stages and all that they build on, as far as they do not stand."""
        self.find_finished()
        needed = {before for name in names for before in self.ancestors(name)}
        for name, stage in self.stages.items():
            if name in needed and name not in self.results:
                self.run_stage(stage)

    def change_config(self, config: Config) -> None:
        """Go on with another configuration of the same run; what has finished of it is found again."""
        self.config, self.results, self.prints, self.skipped = config, Results(), {}, {}
        self.stages, self._checked = self._stages(), False
        self.keep_config()
        self.find_finished()

    def _as_its_frontier(self, whole: bool) -> None:
        """Where a frontier of this configuration was made, with the methods that it added.

        Args:
            whole: only if nothing of it is missing.
        """
        if not (self.take_over(self.stages["data"]) and self.take_over(self.stages["frontier"])):
            return
        found = self.results[FRONTIER].frontier
        if not (whole and found.partial):
            self.change_config(with_overrides(self.config, found.settings))

    # --- data ---

    def _data(self, folder: Path) -> DataResult:
        """Read, check and resize the real images; keep them in the run's storage."""
        from kr_ray.audits.design import check_samples
        from kr_ray.data.checks import DataError
        from kr_ray.data.datasets import load_splits
        from kr_ray.data.remarks import check_copies, count_copies
        from kr_ray.data.store import SOURCES_FILE, SPLITS_FILE, describe_splits, save_sources, save_splits

        splits = load_splits(self.config.data, min_images=self.config.generator.batch_size)
        if len(splits.validation) < MIN_VALIDATION:
            raise DataError(
                f"`validation images >= {MIN_VALIDATION}` must hold, but got {len(splits.validation)}; "
                "shadow models are trained on them: use a larger validation split"
            )
        copies = count_copies(splits)
        check_copies(splits, copies, self.config.data.max_copied_share)
        save_splits(folder / SPLITS_FILE.name, splits)
        save_sources(folder / SOURCES_FILE.name, splits)
        found = describe_splits(splits, copies)
        if self.config.audit.worst_case.arms:
            check_samples(self.config, found.train, copies.distinct_train)
        return found

    # --- teacher, generator, students ---

    def _train(self, part: Part[R], folder: Path) -> R:
        from kr_ray.cluster.train import train_part

        return train_part(part, folder, self.config.cluster)

    def _teacher(self, folder: Path) -> ClassifierResult:
        """Section 3.1."""
        from kr_ray.methods.run_teacher import run_teacher_part

        return self._train(run_teacher_part(self.site()), folder)

    def _generator(self, folder: Path) -> Any:
        """Section 3.2."""
        from kr_ray.generators.registry import generator_of
        from kr_ray.methods.run_generator import generator_part

        return self._train(generator_part(self.site(), generator_of(self.config.generator)), folder)

    def _checkpoints(self, folder: Path) -> SweepResult:
        """Section 3.4: a student per checkpoint, the best validation CAS wins."""
        from kr_ray.cluster.confirm import cas_error
        from kr_ray.cluster.sweep import best_checkpoint, sweep_checkpoints

        epochs = self.results[GENERATOR].checkpoints
        with self._noisy_scores(CHECKPOINTS.name, folder) as scores:
            swept: list[SweptCheckpoint] = sweep_checkpoints(
                self.run.path, folder, epochs, self.config, scores
            )
        best = best_checkpoint(swept)
        self._drop_other_pools(best.epoch)
        error = cas_error(best.val_cas, self.results[DATA].validation)
        return SweepResult(
            checkpoints=swept,
            best_epoch=best.epoch,
            best_cas=best.val_cas,
            standard_error=error,
            privacy=self._of_scores(scores),
        )

    def _drop_other_pools(self, epoch: int) -> None:
        """Only the best checkpoint's is used again."""
        from kr_ray.data.store import SPLITS_FILE, load_stored_splits
        from kr_ray.synthesis.pool import drop_pools
        from kr_ray.synthesis.student_set import pools_of

        if self.config.synthesis.pool_scale:
            best = replace(self.final_spec(), checkpoint_epoch=epoch, synthesis=self.config.synthesis)
            splits = load_stored_splits(self.run / str(SPLITS_FILE))
            drop_pools(self.run.path, [pool.path for _, pool in pools_of(self.run.path, best, splits)])

    def _sweep_students(self) -> int:
        from kr_ray.cluster.sweep import sweep_rounds

        rounds = sweep_rounds(self.config.checkpoints, len(self.results[GENERATOR].checkpoints))
        return sum(students for _, students in rounds)

    def _tuning(self, folder: Path) -> TuningResult:
        """Section 3.5: TPE and Hyperband over the generation parameters."""
        from kr_ray.cluster.sweep import tune_generation

        images = self.results[DATA].validation
        sweep = self.results[CHECKPOINTS]
        with self._noisy_scores(TUNING.name, folder) as scores:
            found = tune_generation(self.run.path, folder, sweep, self.config, images, scores)
        return found.model_copy(update={"privacy": self._of_scores(scores)})

    def _student(self, folder: Path) -> StudentResult:
        """The student that is handed on: best checkpoint, tuned parameters."""
        from kr_ray.cluster.pools import draw_pools
        from kr_ray.methods.knowledge_recycling import student_part

        spec = self.final_spec()
        draw_pools(self.run.path, [spec], folder, self.config.cluster)
        result = self._train(student_part(self.site(), "student", spec), folder)
        source = {
            "images_from": self.config.cluster.stream,
            "synthesis": Generation.model_validate(spec.synthesis.stamp()),
        }
        return result.model_copy(update=source)

    def _exported_student(self) -> Stage[StudentResult]:
        """A student of an exported set alone: a run that has neither teacher
        nor generator, nor what is made with them."""
        c = self.config

        def work(folder: Path) -> StudentResult:
            from kr_ray.methods.parquet import ParquetStudent

            (part,) = ParquetStudent(c.student.from_parquet, c.student.epochs).parts(self.site())
            return self._train(part, folder).model_copy(update={"images_from": "parquet"})

        files = file_stamps(storage_path(c.student.from_parquet))
        return Stage(
            key=STUDENT,
            after=("data",),
            inputs=lambda: [c.seed, c.classifier, c.student.epochs, files],
            check=self._check_parquet_set,
            work=work,
            workers="train",
        )

    def _check_parquet_set(self) -> None:
        """Refuse a wrong set here, and not in workers that would have to be started first."""
        from kr_ray.data.store import SPLITS_FILE, load_stored_splits
        from kr_ray.synthesis.parquet_set import read_parquet_set

        read_parquet_set(
            storage_path(self.config.student.from_parquet), load_stored_splits(self.run / str(SPLITS_FILE))
        )

    def _further_students(self) -> list[Stage[Any]]:
        """A stage for the last part of each of `students`, and for what
        it builds on that the run has not anyway."""
        if not self.config.students:
            return []
        from kr_ray.methods.registry import method_of

        known, stages = {*STAGES, *self._labeller_names()}, []
        for name in self.config.students:
            for part in method_of(name, self.config).parts(self.site(), f"student_{name}"):
                if part.name not in known:
                    known.add(part.name)
                    stages.append(self._further_stage(name, part))
        return stages

    def _further_stage(self, student: str, described: Part[R]) -> Stage[R]:
        """`student` is of this run's generator where the part builds on
        one: then of its best checkpoint, tuned."""
        from kr_ray.methods.registry import method_of

        method = method_of(student, self.config)

        def part() -> Part[R]:
            parts = method.parts(self.site(), f"student_{student}")
            return next(part for part in parts if part.name == described.name)

        def work(folder: Path) -> R:
            result = self._train(part(), folder)
            if isinstance(result, DistillationResult):
                return result.model_copy(update={"copies": self._distilled_copies(folder)})
            is_student = isinstance(result, ClassifierResult) and described.name == f"student_{student}"
            about = {"title": method.title, "note": self._note(method.note, described.after)}
            return result.model_copy(update=about) if is_student else result

        tuned = "generator" in described.after and selects(self.config)
        after = [*described.after, *(["tuning"] if tuned else [])]
        return Stage(
            key=Key(described.name, described.result),
            after=after,
            inputs=lambda: [self.config.seed, *part().inputs],
            check=lambda: self._check_part(self.config.students[student]),
            work=work,
            workers="train",
        )

    def _note(self, note: str, after: Sequence[str]) -> str:
        """What a method is and, of one that distils, what became of the images."""
        before = [dict(self.results.items()).get(name) for name in after]
        said = [result.headline() for result in before if isinstance(result, DistillationResult)]
        return "; ".join([note, *said])

    def _distilled_copies(self, folder: Path) -> CopySpace | None:
        """How near distilled images are to private ones."""
        from kr_ray.audits.copies import measure_distilled_copies
        from kr_ray.cluster.tasks import run_tasks

        c = self.config
        what = (self.run.path, folder, derive_seed(c.seed, "copies"))
        return run_tasks("copies", measure_distilled_copies, [what], c.cluster.trial, c.cluster.max_retries)[
            0
        ]

    def _scaling(self, folder: Path) -> ScalingResult:
        """Students of the final student's checkpoint and parameters, of more and more images."""
        from kr_ray.cluster.scaling import measure_scaling

        return ScalingResult(rows=measure_scaling(self.run.path, folder, self.final_spec(), self.config))

    def scaling(self) -> ScalingResult:
        """The scaling curve, and the report of what there is then."""
        self.run_until("scaling")
        self.report()
        return self.results[SCALING]

    def _equal_compute_teacher(self, folder: Path) -> ClassifierResult:
        """A teacher of as many gradient steps as the student, so that the comparison is at equal compute."""
        from kr_ray.classifiers.training import Schedule
        from kr_ray.methods.teacher import same_schedule, teacher_part, train_teacher

        run, c, student = self.run.path, self.config, self.results[STUDENT]
        images = self.results[DATA].train
        schedule = Schedule.of_steps(
            c.classifier, images, batch=min(student.batch_size, images), steps=student.steps
        )
        for name in (TEACHER.name, "long_labeller_0"):
            found = dict(self.results.items()).get(name)
            if not isinstance(found, ClassifierResult) or not isinstance(c.teacher, TeacherConfig):
                continue
            if same_schedule(schedule, found):
                return found  # it is that teacher
        work = lambda folder, state, save: train_teacher(  # noqa: E731
            run, folder, c.classifier, schedule, seed=c.seed, state=state, save=save
        )
        return self._train(replace(teacher_part(self.site(), "equal_compute_teacher"), work=work), folder)

    def _labeller_names(self) -> list[str]:
        """Stages of the labellers that are not the run's teacher."""
        return [name for name in self.config.synthesis.labeller_names() if name != TEACHER.name]

    def _labellers(self, synthesis: SynthesisConfig) -> list[Stage[ClassifierResult]]:
        """A stage for each teacher that labels and is not the run's."""
        if synthesis.labeller_names() == [TEACHER.name]:
            return []
        from kr_ray.methods.labellers import labeller_parts

        return [self._labeller_stage(part) for part in labeller_parts(self.site(), synthesis)]

    def train_labellers(self, synthesis: SynthesisConfig) -> None:
        """The run's teacher, and all that `synthesis` has label beside it or in its place."""
        if TEACHER.name not in self.results:
            self.run_until(TEACHER.name)
        for stage in self._labellers(synthesis):
            if stage.name not in self.results:
                self.run_stage(stage)

    def _labeller_stage(self, part: Part[ClassifierResult]) -> Stage[ClassifierResult]:
        return Stage(
            key=Key(part.name, part.result),
            after=part.after,
            inputs=lambda: [self.config.seed, *part.inputs],
            work=lambda folder: self._train(part, folder),
            workers="train",
            reads=("training",),
        )

    # --- audits ---

    def _copies(self, folder: Path) -> CopiesResult:
        """Whether the student's images are copies of training images; and samples for the report."""
        from kr_ray.audits.copies import measure_copies
        from kr_ray.cluster.tasks import run_tasks

        c = self.config
        what = (self.run.path, folder, self.final_spec(), c.audit.copies, derive_seed(c.seed, "copies"))
        return run_tasks("copies", measure_copies, [what], c.cluster.trial, c.cluster.max_retries)[0]

    def _encoder_stamp(self) -> list[Any]:
        """Of a user's own encoder, so that another file under the same name is used anew."""
        encoder = self.config.audit.copies.encoder
        return file_stamps(storage_path(encoder)) if encoder else []

    def _shadows(self, folder: Path) -> ShadowsResult:
        """Section 3.6, steps 1 to 3: shadow models, of which only the logits are kept."""
        from kr_ray.cluster.attack import train_shadows

        train_shadows(self.run.path, folder, self.config)
        return ShadowsResult(shadow_models=self.config.audit.shadow.models)

    def _audit(self, folder: Path) -> AuditResult:
        """Section 3.6, steps 4 to 6: attack models per class, run against teacher and student."""
        from kr_ray.cluster.attack import attack_models

        accuracies = {
            "teacher": self.results[TEACHER].test_accuracy,
            "student": self.results[STUDENT].test_accuracy,
        }
        return AuditResult(
            kr=attack_models(self.run.path, accuracies, self.results[DATA].num_classes, self.config)
        )

    # --- report ---

    def _report(self, folder: Path) -> ReportResult:
        from kr_ray.report.collect import write_run_report
        from kr_ray.report.tracking import log_run

        page = (
            self.run
            / "report"
            / write_run_report(self.run.path, folder, self.config, self.results, self.skipped).name
        )
        if self.config.tracking.mlflow:
            with local_copies(sorted(folder.glob("report*.*"))) as files:
                return ReportResult(page=str(page), mlflow_run=log_run(self.config, self.results, files))
        return ReportResult(page=str(page))


@dataclass(frozen=True)
class _Order:
    """The stages on which some stages build.

    A run without a guarantee is the paper's. In a private one nothing that leaves stands on a teacher that it
    does not ask, and validation images decide nothing unless their scores have noise.
    """

    teacher: Sequence[str]
    generator: Sequence[str]
    checkpoints: Sequence[str]
    student: Sequence[str]
    copies: Sequence[str]

    @classmethod
    def of(cls, config: Config) -> _Order:
        asked = asks_the_generator(config)
        teacher = ("data", "generator") if asked else ("data",)
        if config.privacy is None:
            generator = ("data",) if asked else ("data", "teacher")
            checkpoints = ("generator", "teacher") if asked else ("generator",)
            return cls(teacher, generator, checkpoints, ("tuning",), ("student",))
        made_of = ("generator", *(("teacher",) if config.synthesis.asks_the_teacher else ()))
        student = ("tuning",) if selects(config) else made_of
        return cls(teacher, ("data",), made_of, student, ("student", "teacher"))

    def sorted(self, teacher: Stage[Any], generator: Stage[Any]) -> list[Stage[Any]]:
        """In the order in which they are trained."""
        return [generator, teacher] if "generator" in self.teacher else [teacher, generator]


def _digest(data: DataResult) -> str:
    """The same images from another place are the same data."""
    return data.digest
