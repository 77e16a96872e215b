"""Table 2's row for every finished run below a storage, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kr_ray.runs.artifacts import read_own_json

COLUMNS = (
    "run", "seed", "n train / test", "teacher accuracy", "same compute", "student CAS", "teacher AUC_MIA", "student AUC_MIA",
    "teacher AOP", "student AOP", "generation parameters used", "ΔCAS (val.)", "stages, min",
)  # fmt: skip


def results_table(storage: Path, unreadable: Callable[[Path], None] = lambda path: None) -> str:
    """One line per run with a complete report; AUC_MIA is max(AUC, 0.5) as in the paper, the measured value in brackets if lower.

    Args:
        unreadable: is told of reports that are damaged or foreign; they have no line.
    """
    rows = []
    for path in sorted(storage.glob("*/report/report.json")):
        try:
            report = read_own_json(path)
            if report["audit"] and report["audit"]["kr"] and report["student"] and report["tuning"]:
                rows.append(_row(report))
        except (OSError, KeyError, TypeError, ValueError, AttributeError):  # whatever somebody else's JSON may hold
            unreadable(path)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _row(report: dict[str, Any]) -> list[str]:
    teacher, student, tuning, attacked = report["teacher"], report["student"], report["tuning"], report["audit"]["kr"]
    used, equal = tuning["chosen"] or tuning["best"], teacher["equal_compute"]
    return [
        report["run"],
        str(report["seed"]),
        f"{report['data']['train']} / {report['data']['test']}",
        f"{teacher['test_accuracy']:.4f}",
        f"{equal['test_accuracy']:.4f}" if equal else "–",
        f"{student['test_cas']:.4f}",
        *[_auc(attacked[name]) for name in ("teacher", "student")],
        *[f"{attacked[name]['aop']:.4f}" for name in ("teacher", "student")],
        ", ".join(f"{value:g}" if isinstance(value, int) else f"{value:.2f}" for value in _parameters(used)),
        f"{tuning['delta_cas']:+.4f}",
        f"{sum(stage['wall_s'] for stage in report['stages'].values()) / 60:.1f}",
    ]


def _parameters(used: dict[str, Any]) -> list[float]:
    return [value for name, value in used.items() if name not in ("val_cas", "trial")]


def _auc(attacked: dict[str, Any]) -> str:
    raw = f" ({attacked['auc_raw']:.4f})" if attacked["auc_raw"] < attacked["auc"] else ""
    return f"{attacked['auc']:.4f}{raw}"
