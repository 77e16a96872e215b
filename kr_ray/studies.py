"""What is done beside the pipeline with a run's artefacts:
comparisons (appendix D, searches), and the export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from kr_ray.compute.seeding import derive_seed
from kr_ray.config import Config, ConfigError
from kr_ray.config.compared import with_generator
from kr_ray.config.methods import Labelling
from kr_ray.pipeline import Pipeline
from kr_ray.runs.artifacts import atomic_write, fingerprint
from kr_ray.runs.comparisons import (
    GeneratorComparison,
    LabelComparison,
    SearchComparison,
    ViewComparison,
    ViewSummary,
)
from kr_ray.runs.results import (
    CHECKPOINTS,
    DATA,
    GENERATOR,
    GUARANTEE,
    TEACHER,
    GeneratorResult,
    GuaranteeResult,
    Key,
)
from kr_ray.runs.stages import WEIGHTS_FILE
from kr_ray.stages import Stage

COMPARISON_FIGURE = "compare.png"


def compare_labels(pipeline: Pipeline, seeds: int, all_checkpoints: bool) -> LabelComparison:
    """Appendix D: all labelling strategies from this run's generator, at the best or at every checkpoint."""
    from kr_ray.cluster.compare import compare_labelling

    pipeline.run_until("checkpoints")
    c, sweep, name = pipeline.config, pipeline.results[CHECKPOINTS], "compare_labels"
    epochs = [row.epoch for row in sweep.checkpoints] if all_checkpoints else [sweep.best_epoch]

    def work(folder: Path) -> LabelComparison:
        rows = compare_labelling(
            pipeline.run.path, folder, epochs, get_args(Labelling), _seeds(pipeline, name, seeds), c
        )
        return LabelComparison(rows=rows)

    inputs = [c.seed, c.classifier, c.synthesis, c.checkpoints, epochs, seeds]
    return pipeline.run_stage(
        Stage(key=Key(name, LabelComparison), after=("checkpoints",), inputs=lambda: inputs, work=work)
    )


def compare_views(pipeline: Pipeline, names: Sequence[str], seeds: int, last: bool) -> list[ViewSummary]:
    """Final students of this run's generator whose teacher answers in
    other ways, beside teachers of as many steps.

    Args:
        names: the variants (see cluster.compare.view_variants); none: those of `VIEWS`.
        seeds: students per variant, and teachers.
        last: of the last checkpoint, which no view has chosen, instead of the sweep's best.
    """
    from kr_ray.cluster.compare import EQUAL_TEACHER, VIEWS, compare_views, view_variants
    from kr_ray.report.gaps import gap_rows

    c, name = pipeline.config, "compare_views"
    variants = view_variants(names or VIEWS, c.synthesis)
    pipeline.run_until("generator" if last else "checkpoints")
    for synthesis in variants.values():
        pipeline.train_labellers(synthesis)
    results = pipeline.results
    checkpoint = results[GENERATOR].checkpoints[-1] if last else results[CHECKPOINTS].best_epoch

    def work(folder: Path) -> ViewComparison:
        seeded = _seeds(pipeline, name, seeds)
        return ViewComparison(rows=compare_views(pipeline.run.path, folder, checkpoint, variants, seeded, c))

    inputs = [c.seed, c.classifier, c.synthesis, c.student.epochs, checkpoint, list(variants), seeds]
    stage = Stage(
        key=Key(name, ViewComparison), after=("teacher", "generator"), inputs=lambda: inputs, work=work
    )
    return gap_rows(pipeline.run_stage(stage).rows, EQUAL_TEACHER)


def compare_generators(
    pipeline: Pipeline, names: Sequence[str], labellings: Sequence[Labelling], seeds: int, last: bool
) -> GeneratorComparison:
    """Figure 3 and appendix D: generators and labellings from this run's teacher, per checkpoint; leaves a
    figure.

    Args:
        names: see kr_ray.config.compared.with_generator. Generators that the run has not are trained, each in
            a stage of its own.
        seeds: students of each checkpoint and labelling.
        last: only the last checkpoint of each.
    """
    from kr_ray.cluster.compare import Compared, compare_generators
    from kr_ray.report.comparison import save_comparison
    from kr_ray.synthesis.pool import drop_pools

    configs = {name: with_generator(pipeline.config, name) for name in names}
    pipeline.train_labellers(pipeline.config.synthesis)
    stages = {name: _trained(pipeline, config) for name, config in configs.items()}
    c, teacher = pipeline.config, pipeline.results[TEACHER].val_accuracy

    def compared(name: str) -> Compared:
        stage = stages[name]
        checkpoints = pipeline.results[Key(stage, GeneratorResult)].checkpoints
        return Compared(configs[name], stage, checkpoints[-1:] if last else checkpoints)

    def work(folder: Path) -> GeneratorComparison:
        seeded, generators = _seeds(pipeline, "compare", seeds), {name: compared(name) for name in names}
        rows = compare_generators(pipeline.run.path, folder, generators, labellings, seeded)
        found = GeneratorComparison(teacher=teacher, rows=rows)
        save_comparison(found, folder / COMPARISON_FIGURE)
        drop_pools(pipeline.run.path, keep=())  # one per checkpoint; who needs one again draws it again
        return found

    drawn = [[name, stages[name], config.synthesis.stamp()] for name, config in configs.items()]
    inputs = [c.seed, c.classifier, c.checkpoints.epochs, drawn, list(labellings), seeds, last]
    after = ("teacher", *dict.fromkeys(stages.values()))
    students = sum(len(compared(name).checkpoints) for name in names) * len(labellings) * seeds
    return pipeline.run_stage(
        Stage(
            key=Key("compare", GeneratorComparison),
            after=after,
            inputs=lambda: inputs,
            work=work,
            units=lambda: students,
        )
    )


def _trained(pipeline: Pipeline, config: Config) -> str:
    """The stage that has trained the generator of `config`: the run's own, or one for this comparison."""
    if config.generator == pipeline.config.generator:
        pipeline.run_until("generator")
        return GENERATOR.name
    stage = f"generator_{fingerprint(config.generator.stamp())[:8]}"

    def work(folder: Path) -> GeneratorResult:
        from kr_ray.cluster.train import train_part
        from kr_ray.generators.registry import generator_of
        from kr_ray.methods.run_generator import generator_part

        part = generator_part(pipeline.site(), generator_of(config.generator))
        return train_part(part, folder, pipeline.config.cluster)

    pipeline.run_stage(
        Stage(
            key=Key(stage, GeneratorResult),
            after=("data", "teacher"),
            inputs=lambda: [config.seed, config.generator],
            work=work,
            workers="train",
        )
    )
    return stage


def compare_search(pipeline: Pipeline, seeds: int) -> SearchComparison:
    """Halving over the checkpoints of this run's generator against the
    exhaustive sweep, for several seeds of the students."""
    from kr_ray.cluster.compare import compare_search

    pipeline.run_until("generator")
    c, name = pipeline.config, "compare_search"
    epochs = pipeline.results[GENERATOR].checkpoints

    def work(folder: Path) -> SearchComparison:
        seeded = _seeds(pipeline, name, seeds)
        return SearchComparison(rows=compare_search(pipeline.run.path, folder, epochs, seeded, c))

    inputs = [c.seed, c.classifier, c.synthesis, c.checkpoints, seeds]
    return pipeline.run_stage(
        Stage(
            key=Key(name, SearchComparison), after=("teacher", "generator"), inputs=lambda: inputs, work=work
        )
    )


def _seeds(pipeline: Pipeline, name: str, count: int) -> list[int]:
    return [derive_seed(pipeline.config.seed, name, k) for k in range(count)]


def export_further(pipeline: Pipeline, name: str) -> dict[str, str]:
    """One of `students` as ONNX, checked against PyTorch, and the set that it was trained on as Parquet,
    where its method distilled one; says where each of them is.

    Raises:
        ConfigError: there is no such student.
    """
    from kr_ray.classifiers.export import export_student
    from kr_ray.methods.distillation.sets import PARQUET_FILE

    if name not in pipeline.config.students:
        known = ", ".join(pipeline.config.students) or "none"
        raise ConfigError(
            f"`--student` must be one of `students` ({known}), but got {name!r}; correct it, or leave it out "
            "for the run's own student"
        )
    pipeline.run_until(f"student_{name}")
    pipeline.run.check_artefacts()
    run, data, folder = pipeline.run.path, pipeline.results[DATA], pipeline.run / "export" / name
    model, distilled = folder / "student.onnx", run / f"distilled_{name}" / PARQUET_FILE
    weights = run / f"student_{name}" / WEIGHTS_FILE
    difference = export_student(weights, model, data.class_names, data.image_size)
    found = {"student": f"{model.resolve()} (largest difference to PyTorch's logits: {difference:.1e})"}
    if distilled.exists():
        table = folder / PARQUET_FILE
        with atomic_write(table) as temporary:
            temporary.write_bytes(distilled.read_bytes())
        found["distilled set"] = f"{table.resolve()} (uint8; see `store` of the student's keys)"
    return found


def export(pipeline: Pipeline, images: int) -> dict[str, str]:
    """The student as ONNX, checked against PyTorch, and a synthetic
    set as Parquet; says where each of them is."""
    from kr_ray.classifiers.export import export_student
    from kr_ray.cluster.stream import Makers, export_parquet
    from kr_ray.synthesis.parquet_set import parquet_schema

    private = pipeline.config.privacy is not None
    pipeline.run_until("guarantee" if private else "student")
    pipeline.run.check_artefacts()
    if private:
        _check_promise(pipeline.results[GUARANTEE])
    run, c, data, folder = pipeline.run.path, pipeline.config, pipeline.results[DATA], pipeline.run / "export"
    model, table = folder / "student.onnx", folder / "synthetic"
    difference = export_student(run / "student" / WEIGHTS_FILE, model, data.class_names, data.image_size)
    spec = pipeline.final_spec()
    # The labeller of view: seen, the teacher, does not travel with the images: they get its answers to them.
    # As many images as are asked for, so drawn by the makers and not dealt from a pool.
    spec = replace(spec, synthesis=spec.synthesis.model_copy(update={"view": "clean", "pool_scale": 0}))
    images = images or spec.synthesis.cardinality_scale * data.train
    about = {
        "run": c.name,
        "class_names": data.class_names,
        "seed": c.seed,
        "images": images,
        "synthesis": spec.synthesis.model_dump(mode="json"),
    }
    shape = (data.channels, data.image_size, data.image_size)
    schema = parquet_schema(shape, data.num_classes, about)
    pipeline.connect()
    export_parquet(Makers(run, spec, c.classifier, images, 1, c.cluster), table, schema)
    if private:
        told = {"released report": _export_released(pipeline, folder)}
    else:
        told = {"what was attacked, and what not": _export_attacked(pipeline, folder)}
    return {
        "student": f"{model.resolve()} (largest difference to PyTorch's logits: {difference:.1e})",
        "synthetic set": f"{table.resolve()} ({images} images)",
        **told,
    }


def _check_promise(promised: GuaranteeResult) -> None:
    """Refuse to export from a private run what no guarantee covers.

    Raises:
        ConfigError: the guarantee does not hold.
    """
    if not promised.holds:
        raise ConfigError(
            f"`kr export` of a run with `privacy` needs a guarantee, but got: {promised.headline()}; "
            "give every part noise of a secret key, or remove `privacy` to export without any"
        )


def _export_released(pipeline: Pipeline, folder: Path) -> str:
    """Write the part of the report that may leave; nothing else of it is exported."""
    from kr_ray.report.collect import released_of
    from kr_ray.runs.artifacts import write_json

    path = folder / "released.json"
    write_json(path, released_of(pipeline.config, pipeline.results).model_dump(mode="json"))
    return str(path.resolve())


def _export_attacked(pipeline: Pipeline, folder: Path) -> str:
    """Write, of all that this run hands on: attacked by, found, not covered. It tells of real images, so a
    private run keeps it inside."""
    from kr_ray.report.artefacts import markdown
    from kr_ray.report.collect import collect_report

    pipeline.run_missing(())
    report = collect_report(pipeline.config, pipeline.results, pipeline.skipped)
    title = f"# {pipeline.config.name}: what is handed on, and what was attacked"
    path = folder / "ATTACKED.md"
    with atomic_write(path) as temporary:
        temporary.write_text(f"{title}\n\n{markdown(report)}", encoding="utf-8")
    return str(path.resolve())
