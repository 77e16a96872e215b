"""The figures of a score file as one table for a terminal."""

from __future__ import annotations

from typing import Any

from kr_ray.display import Grid
from kr_ray.privacy.epsilon import DELTA

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


def notes(result: dict[str, Any]) -> str:
    """What to read under the table: what is proven, and what must be known of these scores."""
    proven, rows = result["proven"], result["proven"]["rows"]
    lines = [NOTES, *(f"Note: {remark}." for remark in result["remarks"])]
    if rows > 1:
        largest = (
            "none can be computed" if proven["epsilon"] is None else f"epsilon >= {proven['epsilon']:.2f}"
        )
        where = f" ({proven['attack']}, {proven['group']})" if proven["epsilon"] else ""
        lines.append(
            "Proven: a row's bounds hold if its attack was chosen before its figures were seen, here "
            f"{result['headline']}. The largest of all {rows} rows is no bound at 95 %; corrected for that "
            f"(Bonferroni): {largest}{where}."
        )
    return "\n".join(lines)


def score_table(result: dict[str, Any]) -> Grid:
    """One row per attack and group of `score_files.audit_score_file`'s result."""
    grid = Grid(f"{result['file']}: {result['models']} model{'s' * (result['models'] > 1)}", HEADINGS)
    for name, groups in result["attacks"].items():
        for group, found in groups.items():
            epsilon = found["epsilon"]
            grid.add(
                f"{name}, {group}",
                _tpr(found, "tpr_at_fpr_0.001", ""),
                _tpr(found, "tpr_at_fpr_0.01", "_0.01"),
                f"{found['auc']:.4f} [{found['auc_low']:.4f}, {found['auc_high']:.4f}]",
                _number(found["balanced_accuracy"], ".4f"),
                f"{_number(epsilon['clopper_pearson'], '.2f')} / {_number(epsilon['one_run'], '.2f')}",
                f"{found['n_members']} / {found['n_non_members']}",
            )
    return grid


def _tpr(found: dict[str, Any], key: str, suffix: str) -> str:
    if found[key] is None:
        return f"refused: finest FPR is {found['finest_fpr']:.2g}"
    interval = f"[{found[f'ci_low{suffix}']:.2%}, {found[f'ci_high{suffix}']:.2%}]"
    return (
        f"{found[key]:.2%} {interval}\n{found[f'true_positives{suffix}']} TP, "
        f"{found[f'false_positives{suffix}']} FP"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
