"""Table 2's row for every finished run below a storage, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kr_ray.report.schema import Report, Tuning, validate_report
from kr_ray.report.verdict import worst_found
from kr_ray.runs.artifacts import read_own_json
from kr_ray.runs.figures import Attacked

COLUMNS = (
    "run", "seed", "n train / test", "teacher accuracy", "same compute", "student CAS", "teacher AUC_MIA",
    "student AUC_MIA",
    "teacher AOP", "student AOP", "canaries recognised (student)", "epsilon >=", "generation parameters used",
    "ΔCAS (val.)",
    "stages, min",
)  # fmt: skip
NOT_MEASURED = "–"


def results_table(storage: Path, unreadable: Callable[[Path], None] = lambda path: None) -> str:
    """One line per run that was attacked, by whichever attack; what was not
    measured is a dash, "not audited" the worst case.

    AUC_MIA is max(AUC, 0.5) as in the paper, the measured value in brackets if lower. Canaries: the worst of
    the audited arms that are handed on, with the rate of false accusations at which it was counted; see
    kr_ray.report.verdict.

    Args:
        unreadable: is told of reports that are damaged or foreign; they have no line.
    """
    rows = []
    for path in sorted(storage.glob("*/report/report.json")):
        try:
            report = validate_report(read_own_json(path))
        except (OSError, ValueError, RecursionError):  # whatever somebody else's JSON may hold
            unreadable(path)
            continue
        if report.audit and (report.audit.kr or report.audit.lira):
            rows.append(_row(report))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _row(report: Report) -> list[str]:
    teacher, student, tuning = report.teacher, report.student, report.tuning
    equal = teacher.equal_compute if teacher else None
    kr = report.audit.kr if report.audit else None
    attacked = [kr.teacher if kr else None, kr.student if kr else None]
    return [
        report.run,
        str(report.seed),
        f"{report.data.train} / {report.data.test}",
        _figure(teacher.test_accuracy if teacher else None),
        _figure(equal.test_accuracy if equal else None),
        _figure(student.test_cas if student else None),
        *[_auc(part) for part in attacked],
        *[_figure(part.aop if part else None) for part in attacked],
        *_worst(report),
        _parameters(tuning),
        f"{tuning.delta_cas:+.4f}" if tuning and tuning.delta_cas is not None else NOT_MEASURED,
        f"{sum(stage.wall_s for stage in report.stages.values()) / 60:.1f}",
    ]


def _parameters(tuning: Tuning | None) -> str:
    """Those the student was trained with."""
    if tuning is None:
        return NOT_MEASURED
    return ", ".join(
        f"{value:g}" if isinstance(value, int) else f"{value:.2f}" for value in tuning.used.values()
    )


def _figure(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.4f}"


def _auc(attacked: Attacked | None) -> str:
    if attacked is None:
        return NOT_MEASURED
    raw = f" ({attacked.auc_raw:.4f})" if attacked.auc_raw < attacked.auc else ""
    return f"{attacked.auc:.4f}{raw}"


def _worst(report: Report) -> list[str]:
    """What the worst-case audit found among the canaries, and the bound of epsilon."""
    found = worst_found(report)
    if found is None:
        return ["not audited", "not audited"]
    what = "AUC" if found.false_positive_rate is None else f"at {100 * found.false_positive_rate:g} % FPR"
    epsilon = NOT_MEASURED if found.epsilon is None else f"{found.epsilon:.2f}"
    return [f"{100 * found.share:.1f} % {what} [{100 * found.low:.1f}, {100 * found.high:.1f}]", epsilon]
