"""The figures of a score file as one table for a terminal."""

from __future__ import annotations

from kr_ray.display import Grid
from kr_ray.privacy.epsilon import DELTA
from kr_ray.runs.figures import AttackFigures, ScoreAudit

HEADINGS = (
    "attack, samples", "TPR at 0.1 % FPR", "TPR at 1 % FPR", "AUC", "balanced acc.", "epsilon >=",
    "pairs in / out",
)  # fmt: skip

NOTES = (
    "Brackets: 95 % intervals; those of a TPR cover the true TPR at the true FPR, the noise of the "
    "estimated threshold included.\nTP, FP: members and non-members above the threshold. Epsilon: lower "
    f"bounds at 95 % each (pooled / from one run), delta {DELTA:g}.\nA low figure is no guarantee: a "
    "stronger attack may find more. Only differential privacy bounds what any attack can find."
)


def notes(found: ScoreAudit) -> str:
    """What to read under the table: what is proven, and what must be known of these scores."""
    proven, rows = found.proven, found.proven.rows
    lines = [NOTES, *(f"Note: {remark}." for remark in found.remarks)]
    if rows > 1:
        largest = "none can be computed" if proven.epsilon is None else f"epsilon >= {proven.epsilon:.2f}"
        where = f" ({proven.attack}, {proven.group})" if proven.epsilon else ""
        lines.append(
            "Proven: a row's bounds hold if its attack was chosen before its figures were seen, here "
            f"{found.headline}. The largest of all {rows} rows is no bound at 95 %; corrected for that "
            f"(Bonferroni): {largest}{where}."
        )
    return "\n".join(lines)


def score_table(audit: ScoreAudit) -> Grid:
    """One row per attack and group."""
    grid = Grid(f"{audit.file}: {audit.models} model{'s' * (audit.models > 1)}", HEADINGS)
    for name, groups in audit.attacks.items():
        for group, found in groups.items():
            epsilon = found.epsilon
            grid.add(
                f"{name}, {group}",
                _tpr(found, found.tpr_at_01, (found.ci_low, found.ci_high),
                     (found.true_positives, found.false_positives)),
                _tpr(found, found.tpr_at_1, (found.ci_low_at_1, found.ci_high_at_1),
                     (found.true_positives_at_1, found.false_positives_at_1)),
                f"{found.auc:.4f} [{found.auc_low:.4f}, {found.auc_high:.4f}]",
                _number(found.balanced_accuracy, ".4f"),
                f"{_number(epsilon.clopper_pearson, '.2f')} / {_number(epsilon.one_run, '.2f')}",
                f"{found.n_members} / {found.n_non_members}",
            )  # fmt: skip
    return grid


def _tpr(
    found: AttackFigures,
    rate: float | None,
    interval: tuple[float | None, float | None],
    positives: tuple[int | None, int | None],
) -> str:
    """A TPR at one of the two FPRs, with its interval and the true and false positives behind it."""
    if rate is None:
        return f"refused: finest FPR is {found.finest_fpr:.2g}"
    low, high = (_number(end, ".2%") for end in interval)
    return f"{rate:.2%} [{low}, {high}]\n{positives[0]} TP, {positives[1]} FP"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
