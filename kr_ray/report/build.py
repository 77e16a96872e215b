"""report.json and report.html: everything a run found, in one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr_ray.foreign.yaml_core import write_yaml
from kr_ray.report import assessment, figures, frontier, guarantees, verdict, words, worst_case
from kr_ray.report.alt_texts import alt_texts
from kr_ray.report.artefacts import artefacts
from kr_ray.report.importance import why_unknown
from kr_ray.report.pages import render
from kr_ray.report.repetition import repetition
from kr_ray.report.schema import FurtherStudent, Report, Student, Teacher, validate_report
from kr_ray.runs.artifacts import atomic_write, write_json
from kr_ray.runs.figures import Bound, KrAudit, Work

Context = dict[str, Any]
"""Variables of a template, by name."""
STUDENT_NOTE = "trained on synthetic images alone"
VISIBLE_CLASSES = 12
"""More classes than this go into a part of the page that opens on demand."""


@dataclass(frozen=True)
class ReportData:
    """What the page shows beside report.json.

    Attributes:
        samples: generated images only, never real ones: uint8 [k, n, C, H, W], n for each of the first k
            classes, or a finished grid as PNG bytes.
        command: what to type to repeat the run; empty for the usual command.
    """

    samples: NDArray[np.uint8] | bytes | None = None
    command: str = ""


def write_report(report: Report | Mapping[str, Any], figures_input: ReportData, out_dir: Path) -> Path:
    """Validate the report and write `report.json`, the
    self-contained `report.html` and `report_summary.html`; of a frontier also
    `frontier.svg` and `frontier.png`.

    Args:
        report: see `kr_ray.report.schema.Report`; sections of stages that have not run may be missing.

    Returns:
        The path of `report.html`.

    Raises:
        ReportError: the dict does not fit the schema.
        ValueError: `samples` has the wrong shape or type.
    """
    checked = report if isinstance(report, Report) else validate_report(report)
    pages = {
        "report.html": render_page(checked, figures_input),
        "report_summary.html": render_summary(checked),
    }
    write_json(out_dir / "report.json", checked.model_dump(mode="json", by_alias=True))
    if checked.frontier:
        drawing = figures.draw_frontier(checked.frontier)
        for name, content in (("frontier.svg", drawing.svg), ("frontier.png", drawing.png)):
            with atomic_write(out_dir / name) as temporary:
                temporary.write_bytes(content)
    for name, page in pages.items():
        with atomic_write(out_dir / name) as temporary:
            temporary.write_text(page, encoding="utf-8")
    return out_dir / "report.html"


def render_page(report: Report, data: ReportData) -> str:
    """The HTML page: inline style, figures as data URIs, no script, and a
    policy under which a browser loads nothing."""
    return render(
        "template.html",
        report,
        **_verdict_context(report),
        **_worst_case_context(report),
        **_frontier_context(report),
        findings=verdict.shown(report) + words.privacy_findings(report),
        not_measured=verdict.missing(report),
        rows=result_rows(report),
        classes=class_rows(report),
        copies_answer=words.bind(repetition(report.audit.copies).sentence)
        if report.audit and report.audit.copies
        else "",
        importance_unknown=_why_no_importance(report),
        class_legend=figures.needs_legend(report.data.class_names),
        samples=sample_strips(report, data.samples),
        figures=draw_figures(report),
        alts=alt_texts(report),
        config_yaml=write_yaml(report.config, for_people=True),
        command=data.command or "kr run run.yaml",
        default_command=not data.command,
        visible_classes=VISIBLE_CLASSES,
    )


def render_summary(report: Report) -> str:
    """One sheet for the data-protection officer, under the same policy as the page."""
    return render("summary.html", report, **_verdict_context(report))


def _verdict_context(report: Report) -> Context:
    """What both pages say."""
    return {
        "headline": verdict.headline(report),
        "artefacts": artefacts(report),
        "assessment": assessment.facts(report),
        "risk_tests": assessment.tests(report),
        "no_guarantee": guarantees.caveat(report),
        "guaranteed": list(guarantees.guaranteed(report)),
        "promise": guarantees.whole_run(report),
        "promise_means": words.bind(guarantees.meaning(promise))
        if (promise := guarantees.whole_run(report))
        else "",
        "promise_scope": guarantees.scope(report),
        "promise_broken": guarantees.broken(report),
        "advice": frontier.advice(report.frontier) if report.frontier else None,
    }


def _frontier_context(report: Report) -> dict[str, Any]:
    found = report.frontier
    if found is None:
        return {"frontier_rows": [], "frontier_states": []}
    return {
        "frontier_rows": [
            {
                "row": row,
                "verdict": frontier.verdict_of(row, found),
                "matched": frontier.matched_words(row),
                "attack": worst_case.attack_name(row.leak.attack) if row.leak else "",
            }
            for row in found.rows
        ],
        "frontier_states": frontier.state_sentences(found),
    }


def _worst_case_context(report: Report) -> Context:
    arms = report.audit.lira if report.audit else {}
    return {
        "worst_rows": worst_case.rows(report),
        "arm_names": worst_case.titles(report),
        "canary_words": worst_case.CANARY_WORDS,
        "headline_attack": worst_case.headline_attack(report),
        "worst_findings": worst_case.findings(report),
        "attack_rows": worst_case.attack_rows(report),
        "sets_attacked": any(arm.sets for arm in arms.values()),
        "exposed": [(arm.title or name, arm.exposed) for name, arm in arms.items() if arm.exposed],
    }


def _why_no_importance(report: Report) -> str:
    tuning = report.tuning
    if tuning is None or tuning.importance or not tuning.history:
        return ""
    return why_unknown(tuning.history, tuning.parameters, report.data.validation)


# --- tables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResultRow:
    """One line of Table 2; shares in [0, 1], None where not measured. `bound`: of a private method."""

    name: str
    note: str
    accuracy: float
    accuracy_interval: tuple[float, float] | None
    steps: int
    auc: float | None = None
    auc_raw: float | None = None
    auc_interval: tuple[float, float] | None = None
    aop: float | None = None
    best: frozenset[str] = frozenset()
    work: Work | None = None
    bound: Bound | None = None


def result_rows(report: Report) -> dict[str, ResultRow]:
    """Table 2's line for this run: `teacher`, `equal_compute`, `student`, as far as they exist, then a
    `student_NAME` for each further student; the better of teacher and student is marked."""
    audit = report.audit.kr if report.audit else None
    rows = {}
    if report.teacher:
        rows["teacher"] = _row(
            report, "teacher", "Teacher", "trained on real images", report.teacher.test_accuracy, audit
        )
        if equal := report.teacher.equal_compute:
            interval = words.wilson_interval(equal.test_accuracy, report.data.test)
            rows["equal_compute"] = ResultRow(
                "Teacher, equal compute",
                "real images, as many steps as the student",
                equal.test_accuracy,
                interval,
                equal.steps,
                work=equal.work,
            )
    if report.student:
        rows["student"] = replace(
            _row(report, "student", "Student", STUDENT_NOTE, report.student.test_cas, audit),
            bound=guarantees.whole_run(report),
        )
    if "teacher" in rows and "student" in rows:
        teacher, student = rows["teacher"], rows["student"]
        for name, better in _better(teacher, student).items():
            rows[better] = replace(rows[better], best=rows[better].best | {name})
    return rows | {
        f"student_{name}": _further_row(report, name, one) for name, one in report.students.items()
    }


def _further_row(report: Report, name: str, student: FurtherStudent) -> ResultRow:
    return ResultRow(
        name=guarantees.student_title(name, student),
        note=student.note,
        accuracy=student.test_accuracy,
        accuracy_interval=words.wilson_interval(student.test_accuracy, report.data.test),
        steps=student.steps,
        work=student.work,
        bound=student.guarantee,
    )


def _row(
    report: Report, which: str, name: str, note: str, accuracy: float, audit: KrAudit | None
) -> ResultRow:
    interval = words.wilson_interval(accuracy, report.data.test)
    model: Teacher | Student = getattr(report, which)
    row = ResultRow(name, note, accuracy, interval, model.steps, work=model.work)
    attacked = getattr(audit, which) if audit else None
    if audit is None or attacked is None:
        return row
    found = words.auc_interval(attacked, audit)
    return replace(row, auc=attacked.auc, auc_raw=attacked.auc_raw, auc_interval=found, aop=attacked.aop)


def _better(teacher: ResultRow, student: ResultRow) -> dict[str, str]:
    """For each measure on which the two differ, which of them is
    better; accuracy and AOP upwards, AUC downwards."""
    result = {}
    for name, sign in (("accuracy", 1), ("auc", -1), ("aop", 1)):
        left, right = getattr(teacher, name), getattr(student, name)
        if left is not None and right is not None and left != right:
            result[name] = "student" if sign * right > sign * left else "teacher"
    return result


@dataclass(frozen=True)
class ClassRow:
    """The attack on one class.

    Attributes:
        kind: of the chosen attack model; `val_auc`: its AUC on held-out shadow models.
        teacher, student: AUC against both models.
        worst: whether the student leaks most on it.
    """

    name: str
    kind: str
    val_auc: float | None
    teacher: float | None
    student: float | None
    worst: bool


def class_rows(report: Report) -> list[ClassRow]:
    """The attack class by class."""
    audit = report.audit.kr if report.audit else None
    if audit is None:
        return []
    models = {model.class_index: model for model in audit.attack_models}
    worst = words.worst_class(audit.student) if audit.student else None

    def value(which: str, index: int) -> float | None:
        attacked = getattr(audit, which)
        return attacked.per_class[index] if attacked and index < len(attacked.per_class) else None

    return [
        ClassRow(
            name=name,
            kind=words.ATTACK_NAMES.get(models[index].kind, models[index].kind) if index in models else "–",
            val_auc=models[index].val_auc if index in models else None,
            teacher=value("teacher", index),
            student=value("student", index),
            worst=index == worst,
        )
        for index, name in enumerate(report.data.class_names)
    ]


# --- images -------------------------------------------------------------------------------------------------


def sample_strips(report: Report, samples: NDArray[np.uint8] | bytes | None) -> list[dict[str, str]]:
    """One strip of generated images per class (`name`, `uri`), or the given grid as the only one."""
    if samples is None:
        return []
    if isinstance(samples, bytes):
        if not samples.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(
                f"`samples` given as bytes must be a PNG, but starts with {samples[:8]!r}; encode it as PNG"
            )
        return [{"name": "", "uri": figures.png_uri(samples)}]
    k = report.data.num_classes
    if (
        samples.dtype != np.uint8
        or samples.ndim != 5
        or samples.shape[0] > k
        or samples.shape[2] not in (1, 3)
        or 0 in samples.shape
    ):
        raise ValueError(
            f"`samples` must be uint8 [up to {k}, n, C, H, W] with 1 or 3 channels, but got {samples.dtype} "
            f"{samples.shape}; one row per class"
        )
    return [
        {"name": name, "uri": figures.strip_uri(images)}
        for name, images in zip(report.data.class_names, samples, strict=False)
    ]


def draw_figures(report: Report) -> dict[str, str]:
    """All figures there is data for, by name, as data URIs."""
    teacher, student, generator, tuning = report.teacher, report.student, report.generator, report.tuning
    audit = report.audit.kr if report.audit else None
    names = report.data.class_names
    drawn: dict[str, str] = {}
    if report.checkpoints:
        drawn["checkpoints"] = figures.checkpoints_figure(report.checkpoints, teacher, tuning)
    if tuning and tuning.history:
        drawn |= {"tuning": figures.tuning_figure(tuning), "parameters": figures.parameters_figure(tuning)}
    if tuning and tuning.importance:
        drawn["importance"] = figures.importance_figure(tuning.importance)
    if report.scaling:
        drawn["scaling"] = figures.scaling_figure(report.scaling, teacher)
    if audit and any(part and part.roc for part in (audit.teacher, audit.student)):
        drawn["roc"] = figures.roc_figure(audit.teacher, audit.student)
    if report.audit and report.audit.copies:
        drawn["copies"] = figures.copies_figure(report.audit.copies)
    if report.audit and report.audit.lira:
        drawn["worst_case"] = figures.worst_case_figure(report.audit.lira, worst_case.titles(report))
    if report.frontier:
        drawn["frontier"] = figures.frontier_figure(report.frontier)
    if teacher and teacher.confusion:
        drawn["teacher_confusion"] = figures.confusion_figure(teacher.confusion, names)
    if student and student.confusion:
        drawn["student_confusion"] = figures.confusion_figure(student.confusion, names)
    if teacher and teacher.curve:
        drawn["teacher_curve"] = figures.classifier_figure(teacher.curve, figures.TEACHER, "accuracy")
    if student and student.curve:
        drawn["student_curve"] = figures.classifier_figure(student.curve, figures.STUDENT, "CAS")
    if generator and generator.curve:
        drawn["gan"] = figures.generator_figure(generator.curve)
    if generator and generator.collapse:
        drawn["collapse"] = figures.collapse_figure(generator.collapse)
    return drawn
