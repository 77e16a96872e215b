"""The report's sentences and numbers, for readers who run no code.
Every claim is bounded by what was measured."""

from __future__ import annotations

import math
import re
from datetime import datetime

from kr_ray.privacy.metrics import auc_standard_error
from kr_ray.report.schema import Report, Tuning
from kr_ray.runs.figures import Attacked, Generation, KrAudit, Work

Z95 = 1.959964
"""97.5 % quantile of the normal distribution."""
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
"""Not `strftime("%B")`, which depends on the machine's language."""
ATTACK_NAMES = {"logistic_regression": "logistic", "svc_rbf": "SVC (RBF)", "random_forest": "forest"}


# --- numbers ------------------------------------------------------------------------------------------------


def percent(share: float | None, digits: int = 2) -> str:
    """0.9583 -> `95.83`; None -> an en dash."""
    return "–" if share is None else f"{100 * share:.{digits}f}"


def points(difference: float | None, digits: int = 2) -> str:
    """-0.0041 -> `−0.41`, signed, in percentage points."""
    if difference is None:
        return "–"
    text = f"{100 * difference:+.{digits}f}"
    return f"{0:.{digits}f}" if not text.strip("+-0.") else text.replace("-", "−")


def count(number: float | None) -> str:
    """12345 -> `12,345`."""
    return "–" if number is None else f"{number:,.0f}"


def duration(seconds: float) -> str:
    """7384 -> `2 h 3 min`; 75 -> `1 min 15 s`; 0.42 -> `0.4 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    parts = [(whole // 3600, "h"), (whole % 3600 // 60, "min"), (whole % 60, "s")]
    while parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{value} {unit}" for value, unit in parts[:2] if value)


def date(iso: str) -> str:
    """`2031-01-02T03:04:05+00:00` -> `2 January 2031, 03:04 UTC`; other text is returned unchanged."""
    try:
        moment = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return (
        f"{moment.day} {MONTHS[moment.month - 1]} {moment.year}, {moment:%H:%M} {moment.tzname() or ''}"
    ).rstrip()


def wilson_interval(share: float, n: int) -> tuple[float, float] | None:
    """95 % interval of a share counted on n images (Wilson 1927); None without images."""
    if n < 1:
        return None
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def auc_interval(attacked: Attacked, audit: KrAudit) -> tuple[float, float] | None:
    """95 % interval of the measured AUC over the images attacked (Hanley and McNeil); None without images."""
    if audit.members < 1 or audit.non_members < 1:
        return None
    half = Z95 * auc_standard_error(attacked.auc_raw, audit.members, audit.non_members)
    return max(attacked.auc_raw - half, 0.0), min(attacked.auc_raw + half, 1.0)


def work(done: Work | None) -> str:
    """`1 min 15 s CPU`, and the GPU's time where there is one."""
    if done is None:
        return "–"
    gpu = f", {duration(done.gpu_seconds)} GPU" if done.gpu_seconds else ""
    return f"{duration(done.cpu_seconds)} CPU{gpu}"


def images_of(done: Work | None) -> str:
    """`54,600 images trained on, 5,460 generated, 54,600 asked of the teacher`."""
    if done is None:
        return ""
    parts = [f"{count(done.images_trained)} images trained on"]
    if done.images_generated is not None:
        parts.append(f"{count(done.images_generated)} generated")
    if done.teacher_queries is not None:
        parts.append(f"{count(done.teacher_queries)} asked of the teacher")
    return ", ".join(parts)


def labels(made: Generation) -> str:
    """What the labels of a student of these generation parameters are."""
    if made.labelling != "gkd":
        return f"labelled by the strategy {made.labelling}"
    clean = made.view == "clean"
    images = "the clean generated images" if clean else "exactly what the student saw at each step"
    end = f", at temperature {made.temperature:g}" if made.temperature != 1 else ""
    return f"labelled by {_answers(made)} to {images}{end}"


def _answers(made: Generation) -> str:
    length = "" if made.labeller == "teacher" else " of as many steps as the student"
    if made.labellers > 1:
        return f"the mean answer of {made.labellers} teachers{length}"
    return f"the answers of a teacher{length}" if length else "the teacher's answers"


def checkpoints_apart(report: Report) -> str:
    """How much of the checkpoints' order is noise: how many lie within a standard error of the best."""
    swept = [row.val_cas for row in report.checkpoints or []]
    if len(swept) < 2 or not report.data.validation:
        return ""
    best = max(swept)
    error = math.sqrt(best * (1 - best) / report.data.validation)
    near = sum(cas >= best - error for cas in swept) - 1
    return (
        f"One standard error of the best CAS, on {count(report.data.validation)} "
        f"validation images and with one seed, is {percent(error)} points; {near} of "
        f"the other {len(swept) - 1} checkpoints lie within it."
    )


def confirmed(tuning: Tuning) -> str:
    """What the finalists' new students decided; empty if there were none."""
    found = tuning.confirmed
    if found is None:
        return ""
    seeds, finalists = len(found.rows[0].val_cas), len(found.rows) - 1
    outcome = "so the default parameters stay" if found.winner != found.trial else "so it was chosen"
    return (
        f"Trained again with {seeds} fresh seeds each, the best of {finalists} "
        f"finalists (trial {found.trial}) gains {points(found.gain)} ± "
        f"{percent(found.standard_error)} points over the defaults, {outcome}."
    )


# --- sentences ----------------------------------------------------------------------------------------------


def bind(sentence: str) -> str:
    """No line break between a number and its per cent sign, nor within a negative exponent."""
    return re.sub(r"(?<=\d)e-(?=\d)", "e\u2011", sentence.replace(" %", "\u00a0%"))


def privacy_findings(report: Report) -> list[str]:
    """What the attack found, one sentence per fact; empty where no audit has run."""
    audit = report.audit.kr if report.audit else None
    if audit is None:
        return []
    findings = [
        _reading(name, attacked, audit)
        for name, attacked in _attacked(audit)
        if auc_interval(attacked, audit)
    ]
    if audit.student and (worst := worst_class(audit.student)) is not None and report.data.num_classes > 1:
        findings.append(
            f"By class, the student leaks most on “{report.data.class_names[worst]}” (AUC "
            f"{percent(audit.student.per_class[worst], 1)} %); the highest of {report.data.num_classes} "
            "classes tends to lie above 50 % even by chance."
        )
    return [bind(finding) for finding in findings]


def _attacked(audit: KrAudit) -> list[tuple[str, Attacked]]:
    return [(name, part) for name, part in (("student", audit.student), ("teacher", audit.teacher)) if part]


def _reading(name: str, attacked: Attacked, audit: KrAudit) -> str:
    low, high = auc_interval(attacked, audit) or (0.0, 1.0)
    span = f"{percent(low, 1)} to {percent(high, 1)} %"
    if low > 0.5:
        return (
            f"Against the {name} the attack finds something: the 95 % interval of "
            f"its AUC, {span}, lies above guessing (50 %)."
        )
    if high < 0.5:
        return (
            f"Against the {name} the attack does worse than guessing (95 % interval of its "
            f"AUC: {span}): what it learned from the shadow models does not carry over. "
            "Read this as “not found”, not as “protected”."
        )
    return (
        f"Against the {name} the attack cannot be told from guessing: the 95 "
        f"% interval of its AUC, {span}, includes 50 %."
    )


def worst_class(attacked: Attacked) -> int | None:
    """The class with the highest AUC."""
    known = [(value, index) for index, value in enumerate(attacked.per_class) if value is not None]
    return max(known, key=lambda pair: pair[0])[1] if known else None
