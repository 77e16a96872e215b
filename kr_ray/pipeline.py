"""Knowledge Recycling as one readable function (arXiv 2407.15526, section 3 and figure 1).

    teacher, generator -> checkpoints -> tuning -> student -> audit (-> worst case, if asked for) -> report

Every stage is a function of artefacts and returns a small JSON result. A finished stage is skipped as long as its fingerprint
stands: the config sections it uses, the data, and the fingerprints of the stages it builds on. So the same command resumes,
and a changed key runs again exactly what depends on it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr_ray.artifacts import ArtifactError, read_json
from kr_ray.config import Config, ConfigError, DataConfig, SynthesisConfig
from kr_ray.seeding import derive_seed
from kr_ray.stages import Result, StageRunner, Watcher
from kr_ray.storage import FileEntry, list_files, local_copies, storage_path

if TYPE_CHECKING:
    from kr_ray.training.audit_runs import AuditPlan
    from kr_ray.training.student import StudentSpec

STAGES = (
    "data",
    "teacher",
    "generator",
    "checkpoints",
    "tuning",
    "student",
    "copies",
    "equal_compute_teacher",
    "shadows",
    "audit",
    "worst_case",
    "report",
)
PARQUET_STAGES = ("data", "student", "report")
"""Those of a run whose student is trained on an exported set."""
MIN_VALIDATION = 10


class Pipeline(StageRunner):
    """One run: its stages, what they depend on, and their results.

    `with Pipeline(config, watcher) as pipeline: pipeline.run_until("report")`
    """

    def __init__(self, config: Config, watcher: Watcher) -> None:
        if config.tracking.mlflow:
            from kr_ray.report.tracking import require_mlflow

            require_mlflow()
        if (encoder := config.audit.copies.encoder) and not storage_path(encoder).is_file():
            raise ConfigError(f"`audit.copies.encoder` must name a file, but {encoder!r} does not exist; correct the path")
        super().__init__(config, watcher)

    # --- the paper, stage by stage ---

    def run_until(self, last: str) -> Result:
        """Run all stages up to and including `last`; returns its result."""
        config = self.config
        wanted = STAGES[: STAGES.index(last) + 1]
        if config.student.from_parquet:
            wanted = tuple(stage for stage in wanted if stage in PARQUET_STAGES)
        if last in ("shadows", "audit"):  # the attack needs neither
            wanted = tuple(stage for stage in wanted if stage not in ("copies", "equal_compute_teacher"))
        for stage in wanted:
            if stage == "equal_compute_teacher" and not config.student.equal_compute_teacher:
                continue
            if stage == "worst_case" and not config.audit.arms and not self._stands(stage):
                continue
            self._run(stage)
        if last not in self.results:
            raise ConfigError(
                f"`student.from_parquet` must be empty for the stage {last}, which needs a teacher or a generator, but got "
                f"{config.student.from_parquet!r}; remove it, or use kr student or kr run"
            )
        return self.results[last]

    def worst_case(self, budget_hours: float | None = None) -> Result:
        """The worst-case audit of `audit.arms`, after or without the other stages, and the report of what there is then.

        Args:
            budget_hours: device hours (GPU, or CPU cores where runs get no GPU) that all runs may take; the number of runs is cut to fit.

        Raises:
            ConfigError: the budget is too small for any audit.
            ArtifactError: an arm needs a checkpoint that is not there.
        """
        self._run("data")
        self._find_finished()
        if "student_only" in self.config.audit.arms and "generator" not in self.results:
            raise ArtifactError(
                "the arm student_only needs this run's generator, which has not been trained; run `kr generator` first"
            )
        if budget_hours is not None:
            self._cut_to(budget_hours)
        self._run("worst_case")
        return self._run("report")

    def report(self) -> Result:
        """Report on what has finished so far; runs no other stage."""
        self._find_finished()
        if "data" not in self.results:
            raise ArtifactError(f"{self.run.path} holds no finished stage of this configuration; start it with `kr run`")
        return self._run("report")

    def _find_finished(self) -> None:
        """Take over the results of all stages that stand, running none."""
        for stage in STAGES[:-1]:
            if self._stands(stage):
                stamp = self._stamp(stage, *self._plan(stage)[:2])
                result = self.run.result(stage, stamp) or {}
                self.results[stage], self.skipped[stage] = result, True
                self.prints[stage] = result.get("digest", stamp)

    def _stands(self, stage: str) -> bool:
        """Whether the stage has finished on what its inputs are now."""
        sections, after, _ = self._plan(stage)
        ready = all(name in self.prints for name in after)
        return ready and self.run.result(stage, self._stamp(stage, sections, after)) is not None

    def _run(self, stage: str) -> Result:
        if stage == "student" and self.config.student.from_parquet and not self._stands(stage):
            self._check_parquet_set()
        self.results[stage] = self._run_stage(stage, *self._plan(stage))
        return self.results[stage]

    def _plan(self, stage: str) -> tuple[list[Any], list[str], Callable[[Path], Result]]:
        """The config keys a stage uses, the stages it reads, and its work."""
        c = self.config
        if stage == "worst_case":
            return *self._worst_case_inputs(), self._worst_case
        return {
            "data": ([c.data, c.generator.batch_size, _source_stamp(c.data)], [], self._data),
            "teacher": ([c.seed, c.classifier, c.teacher], ["data"], self._teacher),
            "generator": ([c.seed, c.generator], ["data", "teacher"], self._generator),
            "checkpoints": ([c.seed, c.classifier, c.synthesis, c.checkpoints], ["generator"], self._checkpoints),
            "tuning": ([c.seed, c.classifier, c.synthesis, c.tuning], ["checkpoints"], self._tuning),
            "student": (*self._student_inputs(), self._student),
            "copies": ([c.seed, c.audit.copies, *self._encoder_stamp()], ["student"], self._copies),
            "equal_compute_teacher": ([c.seed, c.classifier], ["teacher", "student"], self._equal_compute_teacher),
            "shadows": ([c.seed, c.classifier, c.audit.shadow_models, c.audit.epochs], ["data"], self._shadows),
            "audit": ([c.seed, c.audit.shadow_attack()], ["teacher", "student", "shadows"], self._audit),
            "report": ([c], [s for s in STAGES if s in self.results], self._report),
        }[stage]  # type: ignore[return-value]

    def _data(self, folder: Path) -> Result:
        """Read, check and resize the real images; keep them in the run's storage."""
        from kr_ray.data.datasets import DataError, duplicate_indices, load_splits
        from kr_ray.data.store import SPLITS_FILE, save_splits

        splits = load_splits(self.config.data, min_images=self.config.generator.batch_size)
        if len(splits.validation) < MIN_VALIDATION:
            raise DataError(
                f"`validation images >= {MIN_VALIDATION}` must hold, but got {len(splits.validation)}; shadow models are trained on "
                "them: use a larger validation split"
            )
        save_splits(self.run / str(SPLITS_FILE), splits)
        return {
            "name": splits.name,
            "digest": splits.digest(),
            "num_classes": splits.num_classes,
            "class_names": list(splits.class_names),
            "channels": splits.channels,
            "image_size": splits.train.images.shape[-1],
            "train": len(splits.train),
            "validation": len(splits.validation),
            "test": len(splits.test),
            "class_counts": splits.train.labels.bincount(minlength=splits.num_classes).tolist(),
            "duplicates": {
                "within_train": len(duplicate_indices(splits.train.images)),
                "validation_in_train": len(duplicate_indices(splits.validation.images, splits.train.images)),
                "test_in_train": len(duplicate_indices(splits.test.images, splits.train.images)),
            },
        }

    def _teacher(self, folder: Path) -> Result:
        """Section 3.1."""
        from kr_ray.training.classifier import Schedule
        from kr_ray.training.teacher import train_teacher

        run, c = self.run.path, self.config
        schedule = Schedule.fit(c.classifier, self.results["data"]["train"], c.teacher.epochs)
        self._train(lambda state, save: train_teacher(run, folder, c.classifier, schedule, c.seed, state, save), folder)
        return dict(read_json(folder / "result.json"))

    def _generator(self, folder: Path) -> Result:
        """Section 3.2."""
        from kr_ray.training.generator import train_generator_stage

        run, c = self.run.path, self.config
        self._train(lambda state, save: train_generator_stage(run, folder, c.generator, c.seed, state, save), folder)
        return dict(read_json(folder / "result.json"))

    def _checkpoints(self, folder: Path) -> Result:
        """Section 3.4: a student per checkpoint, the best validation CAS wins."""
        from kr_ray.cluster.sweep import best_checkpoint, sweep_checkpoints

        c, epochs = self.config, self.results["generator"]["checkpoints"]
        swept = sweep_checkpoints(self.run.path, folder, epochs, c)
        best = best_checkpoint(swept)
        return {"checkpoints": swept, "best_epoch": best["epoch"], "best_cas": best["val_cas"]}

    def _tuning(self, folder: Path) -> Result:
        """Section 3.5: TPE and Hyperband over the three generation parameters."""
        from kr_ray.cluster.sweep import tune_generation

        return tune_generation(self.run.path, folder, self.results["checkpoints"], self.config)

    def _student(self, folder: Path) -> Result:
        """The student that is handed on: best checkpoint, tuned parameters; or an exported set alone."""
        from kr_ray.cluster.stream import student_images
        from kr_ray.training.student import parquet_student, student_training, train_final_student

        run, c, spec = self.run.path, self.config, self._final_spec()
        if c.student.from_parquet:
            source: Result = {"images_from": "parquet"}
            start = partial(parquet_student, run, storage_path(c.student.from_parquet), spec.epochs, c.classifier, spec.seed)
        else:
            source = {"images_from": c.cluster.stream, "synthesis": spec.synthesis.model_dump()}
            start = partial(student_training, run, spec, c.classifier, student_images(c.cluster, f"{c.name}_student"))
        self._train(lambda state, save: train_final_student(folder, start, state, save), folder)
        return dict(read_json(folder / "result.json")) | source

    def _check_parquet_set(self) -> None:
        """Refuse a wrong set here: before a finished student is removed, and not in workers that would try again."""
        from kr_ray.data.store import SPLITS_FILE, load_stored_splits
        from kr_ray.training.parquet_set import read_parquet_set

        read_parquet_set(storage_path(self.config.student.from_parquet), load_stored_splits(self.run / str(SPLITS_FILE)))

    def _student_inputs(self) -> tuple[list[Any], list[str]]:
        c = self.config
        if c.student.from_parquet:
            files = [_file_stamp(file) for file in list_files(storage_path(c.student.from_parquet))]
            return [c.seed, c.classifier, c.student.epochs, files], ["data"]
        return [c.seed, c.classifier, c.synthesis, c.student.epochs], ["tuning"]

    def _final_spec(self) -> StudentSpec:
        """Best checkpoint, tuned generation parameters, the whole schedule; what is not known yet is the last and the default."""
        from kr_ray.training.student import StudentSpec

        c, found = self.config, self.results
        epochs = found["generator"]["checkpoints"] if "generator" in found else [c.generator.epochs]
        best = found["checkpoints"]["best_epoch"] if "checkpoints" in found else epochs[-1]
        chosen = found["tuning"]["chosen"] if "tuning" in found else {}
        synthesis = SynthesisConfig.model_validate(c.synthesis.model_dump() | chosen)
        return StudentSpec(best, synthesis, c.student.epochs, derive_seed(c.seed, "final student"))

    def _copies(self, folder: Path) -> Result:
        """Whether the student's images are copies of training images."""
        from kr_ray.cluster.tasks import run_tasks
        from kr_ray.privacy.copies import measure_copies

        c, spec = self.config, self._final_spec()
        what = (self.run.path, spec.checkpoint_epoch, spec.synthesis.latent_std, c.audit.copies, derive_seed(c.seed, "copies"))
        return run_tasks("copies", measure_copies, [what], c.cluster.trial, c.cluster.max_retries)[0]

    def _encoder_stamp(self) -> list[list[Any]]:
        """Of a user's own encoder, so that another file under the same name is used anew."""
        encoder = self.config.audit.copies.encoder
        return [_file_stamp(file) for file in list_files(storage_path(encoder))] if encoder else []

    def _equal_compute_teacher(self, folder: Path) -> Result:
        """A teacher of as many gradient steps as the student, so that the comparison is at equal compute."""
        from kr_ray.training.classifier import Schedule
        from kr_ray.training.teacher import train_teacher

        run, c, student, teacher = self.run.path, self.config, self.results["student"], self.results["teacher"]
        images = self.results["data"]["train"]
        schedule = Schedule.of_steps(c.classifier, images, min(student["batch_size"], images), student["steps"])
        if (schedule.steps, schedule.batch_size) == (teacher["steps"], teacher["batch_size"]):
            return teacher  # it is that teacher
        self._train(lambda state, save: train_teacher(run, folder, c.classifier, schedule, c.seed, state, save), folder)
        return dict(read_json(folder / "result.json"))

    def _shadows(self, folder: Path) -> Result:
        """Section 3.6, steps 1 to 3: shadow models, of which only the logits are kept."""
        from kr_ray.cluster.attack import train_shadows

        train_shadows(self.run.path, folder, self.config)
        return {"shadow_models": self.config.audit.shadow_models}

    def _audit(self, folder: Path) -> Result:
        """Section 3.6, steps 4 to 6: attack models per class, run against teacher and student."""
        from kr_ray.cluster.attack import attack_teacher_and_student

        return {"kr": attack_teacher_and_student(self.run.path, self.results, self.config)}

    def _worst_case(self, folder: Path) -> Result:
        """Zhao & Zhang 2025: whole pipelines trained again with and without canaries, and attacked."""
        from kr_ray.cluster.worst_case import audit_worst_case

        return audit_worst_case(self._audit_plan(folder), self.results, self.watcher.notice)

    def _worst_case_inputs(self) -> tuple[list[Any], list[str]]:
        """The keys and stages on which the arms' numbers depend.

        `kr audit --arms` is not in the file: without arms in the configuration, those of the audit that was made are meant.
        """
        c, done = self.config, self.run / "worst_case" / "done.json"
        keys = c.audit.worst_case_keys()
        if not c.audit.arms and done.exists():
            keys = read_json(done)["result"]["audit"]
        sections = [c.seed, c.classifier, c.teacher, keys]
        if set(keys["arms"]) - {"teacher"}:
            spec = self._final_spec()
            sections += [spec.checkpoint_epoch, spec.synthesis, spec.epochs]
        if "kr" in keys["arms"]:
            sections.append(c.generator)
        return sections, ["data", "generator"] if "student_only" in keys["arms"] else ["data"]

    def _audit_plan(self, folder: Path) -> AuditPlan:
        from kr_ray.cluster.worst_case import plan_audit

        return plan_audit(self.run.path, folder, self.config, self._final_spec(), self.results["data"]["digest"])

    def _cut_to(self, budget_hours: float) -> None:
        """Lower `audit.models` to what the budget bears."""
        from kr_ray.cluster.worst_case import models_within, run_seconds

        folder = self._begin("worst_case", "")
        self.connect()
        with self._watched("worst_case", folder):
            seconds, _ = run_seconds(self._audit_plan(folder), self.results)
        models = models_within(budget_hours, seconds, self.config)
        if models < self.config.audit.models:
            self.watcher.notice(f"--budget {budget_hours:g}: {models} runs instead of {self.config.audit.models}")
        audit = self.config.audit.model_copy(update={"models": models})
        self.config = self.config.model_copy(update={"audit": audit})

    def _report(self, folder: Path) -> Result:
        from kr_ray.report.collect import write_run_report
        from kr_ray.report.tracking import log_run

        page = write_run_report(self.run.path, folder, self.config, self.results, self.skipped)
        if self.config.tracking.mlflow:
            with local_copies(sorted(folder.glob("report.*"))) as files:
                return {"page": str(page), "mlflow_run": log_run(self.config, self.results, files)}
        return {"page": str(page)}

    # --- beside the pipeline ---

    def compare_labels(self, seeds: int, all_checkpoints: bool) -> Result:
        """Appendix D: all labelling strategies from this run's generator, at the best or at every checkpoint."""
        from kr_ray.cluster.compare import LABELLINGS, compare_labelling

        self.run_until("checkpoints")
        c, sweep = self.config, self.results["checkpoints"]
        epochs = [row["epoch"] for row in sweep["checkpoints"]] if all_checkpoints else [sweep["best_epoch"]]
        name = "compare_labels"
        work_seeds = [derive_seed(c.seed, name, k) for k in range(seeds)]

        def work(folder: Path) -> Result:
            return {"rows": compare_labelling(self.run.path, folder, epochs, LABELLINGS, work_seeds, c)}

        sections = [c.seed, c.classifier, c.synthesis, c.checkpoints, epochs, seeds]
        rows = self._run_stage(name, sections, ["checkpoints"], work)["rows"]
        summary = []
        for strategy in LABELLINGS:
            cas = [row["val_cas"] for row in rows if row["labelling"] == strategy]
            sd = statistics.stdev(cas) if len(cas) > 1 else 0.0
            summary.append({"labelling": strategy, "mean": statistics.fmean(cas), "sd": sd, "n": len(cas)})
        return {"summary": summary, "rows": rows, "file": str((self.run / name / "done.json").resolve())}

    def compare_search(self, seeds: int) -> Result:
        """Halving over the checkpoints of this run's generator against the exhaustive sweep, for several seeds of the students."""
        from kr_ray.cluster.compare import compare_search

        self.run_until("generator")
        c, name, epochs = self.config, "compare_search", self.results["generator"]["checkpoints"]
        work_seeds = [derive_seed(c.seed, name, k) for k in range(seeds)]

        def work(folder: Path) -> Result:
            return {"rows": compare_search(self.run.path, folder, epochs, work_seeds, c)}

        keys = [c.seed, c.classifier, c.synthesis, c.checkpoints, seeds]
        rows = self._run_stage(name, keys, ["teacher", "generator"], work)["rows"]
        return {"rows": rows, "file": str((self.run / name / "done.json").resolve())}

    def export(self, images: int) -> dict[str, str]:
        """The student as ONNX, checked against PyTorch, and a synthetic set as Parquet."""
        from kr_ray.cluster.stream import Makers, export_parquet
        from kr_ray.training.export import export_student
        from kr_ray.training.parquet_set import parquet_schema

        self.run_until("student")
        run, data, folder = self.run.path, self.results["data"], self.run / "export"
        model, table = folder / "student.onnx", folder / "synthetic"
        difference = export_student(run / "student" / "weights.safetensors", model, data["class_names"], data["image_size"])
        spec, c = self._final_spec(), self.config
        if images < 0:
            raise ConfigError(f"`--images >= 0` must hold, but got {images}; use 0 for the student's own number")
        images = images or spec.synthesis.cardinality_scale * data["train"]
        metadata = {"run": c.name, "class_names": data["class_names"], "seed": c.seed, "images": images}
        shape = (data["channels"], data["image_size"], data["image_size"])
        schema = parquet_schema(shape, data["num_classes"], metadata | {"synthesis": spec.synthesis.model_dump()})
        self.connect()
        export_parquet(Makers(run, spec, c.classifier, images, 1, c.cluster), table, schema)
        return {
            "student": f"{model.resolve()} (largest difference to PyTorch's logits: {difference:.1e})",
            "synthetic set": f"{table.resolve()} ({images} images)",
        }

    # --- how its stages differ from others ---

    def _begin(self, stage: str, stamp: str) -> Path:
        # The audit's scores name their own inputs: with more models, another arm or a smaller budget the others still stand.
        return self.run.begin(stage, stage if stage == "worst_case" else stamp)

    def _units(self, stage: str) -> int:
        """How many units of work report their own progress."""
        c = self.config
        if stage == "checkpoints":
            from kr_ray.cluster.sweep import sweep_rounds

            return sum(students for _, students in sweep_rounds(c.checkpoints, len(self.results["generator"]["checkpoints"])))
        return {
            "tuning": c.tuning.trials,
            "shadows": c.audit.shadow_models,
            "worst_case": c.audit.models,
        }.get(stage, 1)


def _source_stamp(data: DataConfig) -> list[list[Any]]:
    """Names, sizes and times of the user's own files, so that an edited data set is read again."""
    if not data.path:
        return []
    return [_file_stamp(file) for file in list_files(storage_path(data.path))]


def _file_stamp(file: FileEntry) -> list[Any]:
    return [str(file.path), file.size, file.mtime_ns]
