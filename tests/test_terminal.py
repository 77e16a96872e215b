"""Tables for terminals and pipes: no figure is ever cut, whatever the width."""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config
from rich.console import Console
from test_report import fake_report

from kr_ray import commands
from kr_ray.display import Grid
from kr_ray.report.printed import print_summary
from kr_ray.report.schema import validate_report
from kr_ray.report.table import results_table
from kr_ray.runs.results import (
    AUDIT,
    AuditResult,
    ClassifierResult,
    ReportResult,
    Results,
    StudentResult,
    WorstCaseResult,
)

WIDTHS = [40, 80, 200]


def printed(grid: Grid, width: int) -> str:
    stream = io.StringIO()
    grid.print(Console(file=stream, width=width))
    return stream.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_cell_is_printed_whole_and_markup_stays_text(width: int) -> None:
    grid = Grid("runs [bold]below[/bold] x", ("run", "AUC", "note"))
    grid.add("a[red]b[/red]:smile:", "0.6543 [0.6421, 0.6662]", "12 TP, 3 FP\nsecond line")
    grid.add("名前の長い走行", "0.5000", "")
    text = printed(grid, width)
    for part in (
        "[bold]below[/bold]",
        "a[red]b[/red]:smile:",
        "0.6543",
        "[0.6421,",
        "0.6662]",
        "12 TP, 3 FP",
        "second line",
    ):
        assert part in text
    assert "…" not in text and "名前の長い走行" in text
    framed = any(character in text for character in "│┃|")
    assert framed == (width >= grid.width())


def test_a_framed_table_is_exactly_as_wide_as_was_reckoned() -> None:
    grid = Grid("t", ("name", "figure"))
    grid.add("seven letters", "1.25")
    framed = printed(grid, grid.width()).splitlines()
    assert max(map(len, framed)) == grid.width() and "│" in framed[-2]
    assert "│" not in printed(grid, grid.width() - 1)


def test_another_number_of_cells_is_refused() -> None:
    with pytest.raises(ValueError, match="one per heading"):
        Grid("t", ("a", "b")).add("x")


def parsed(**keys: object) -> argparse.Namespace:
    return argparse.Namespace(**keys)


def test_kr_audit_scores_cuts_no_figure_at_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a pipe Rich takes 80 columns; every figure of the JSON is found whole in the table."""
    rng = np.random.default_rng(0)
    member = np.stack(
        [side for _ in range(4) for coins in [rng.random(300) < 0.5] for side in (coins, ~coins)]
    )
    np.savez(tmp_path / "scores.npz", scores=rng.normal(size=member.shape) + 2 * member, member=member)
    for width in ("80", "200"):
        monkeypatch.setenv("COLUMNS", width)
        out = tmp_path / f"figures_{width}.json"
        keys = dict.fromkeys(("config", "arms", "models", "budget"))
        assert commands.audit(parsed(scores=tmp_path / "scores.npz", json=out, **keys)) == 0
        text = capsys.readouterr().out
        assert "…" not in text and "balanced acc." in text and "epsilon >=" in text
        found = json.loads(out.read_text())["attacks"]
        for attack, groups in found.items():
            figures = groups["all"]
            for part in (
                attack,
                f"{figures['auc']:.4f} [{figures['auc_low']:.4f}, {figures['auc_high']:.4f}]",
                f"{figures['tpr_at_fpr_0.01']:.2%} [{figures['ci_low_0.01']:.2%}, "
                f"{figures['ci_high_0.01']:.2%}]",
                f"{figures['n_members']} / {figures['n_non_members']}",
            ):
                assert part in text, (width, part)


def test_kr_runs_keeps_long_notes_and_brackets_whole_at_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    note = "`data.path` must name a folder, but got [/data/scans/of/the/second/hospital]; correct it"
    status = {
        "state": "failed",
        "stage": "data",
        "share": 0.0,
        "updated": time.time(),
        "error": note,
        "host": "h",
        "pid": 1,
    }
    (tmp_path / "a_run").mkdir()
    (tmp_path / "a_run" / "status.json").write_text(json.dumps(status))
    assert commands.runs(parsed(storage=str(tmp_path))) == 0
    text = capsys.readouterr().out
    assert "[/data/scans/of/the/second/hospital];" in text and "a_run" in text and "…" not in text
    assert " ".join(text.split()).count("must name a folder, but got") == 1


def small_arm() -> dict[str, object]:
    """An audited arm as report.json holds it, of one attack."""
    figures = {
        "tpr_at_fpr_0.001": 0.242, "ci_low": 0.2, "ci_high": 0.28, "true_positives": 388,
        "false_positives": 1,
        "tpr_at_fpr_0.01": 0.4, "ci_low_0.01": 0.3, "ci_high_0.01": 0.5, "auc": 0.8,
        "auc_low": 0.78, "auc_high": 0.82,
        "balanced_accuracy": 0.7, "n_members": 1600, "n_non_members": 1600, "finest_fpr": 1 / 1600,
        "epsilon": {"clopper_pearson": 3.36, "one_run": 2.1, "delta": 1e-5, "confidence": 0.95},
    }  # fmt: skip
    headline = "lira_online_fixed_logit"
    return {
        "models": 16, "queries": 2, "headline": headline, "population": figures, "canary": figures,
        "true_label_share": {},
        "given_label_share": {}, "attacks": {headline: {"canary": figures}}, "canary_kind": "mislabeled",
        "canaries": 200,
        "population_samples": 200, "reference_images": 0, "test_accuracy": 0.9, "test_accuracy_sd": 0.01,
        "seconds": 60.0,
    }  # fmt: skip


def test_the_last_lines_of_a_run_tell_the_worst_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    raw = fake_report()
    raw["audit"]["lira"] = {"kr": small_arm()}
    page = tmp_path / "report.html"
    dumped = validate_report(raw).model_dump(mode="json", by_alias=True)
    page.with_suffix(".json").write_text(json.dumps(dumped))
    trained = {
        "test_loss": 0.1, "val_accuracy": 0.9, "confusion": [], "steps": 1, "images_seen": 1, "batch_size": 1,
        "learning_rate": 0.1, "parameters": 1, "seconds": 1.0,
    }  # fmt: skip
    results = Results()
    results.keep("teacher", ClassifierResult(test_accuracy=0.97, **trained))
    results.keep("student", StudentResult(test_accuracy=0.96, **trained))
    results.keep(AUDIT.name, AuditResult.model_validate(raw["audit"]))
    results.keep(
        "worst_case",
        WorstCaseResult.model_validate(
            {"audit": {"arms": ["kr"]}, "excluded_copies": 0, "lira": raw["audit"]["lira"]}
        ),
    )
    print_summary(tiny_config(), "report", results, ReportResult(page=str(page)))
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "388 of 1600",
        "3.36",
        "24.2 % of the canaries",
        "its epsilon is at least 3.36",
        "report_summary.html",
    ):
        assert part in text
    assert str(page.resolve()) in text and "…" not in text


def test_kr_results_tells_the_worst_case_and_lists_runs_that_had_only_that(tmp_path: Path) -> None:
    average, worst = fake_report() | {"run": "average"}, fake_report() | {"run": "worst"}
    worst["audit"] = {"lira": {"kr": small_arm()}}
    for name in ("teacher", "generator", "checkpoints", "tuning", "student"):
        del worst[name]
    for report in (average, worst):
        folder = tmp_path / report["run"] / "report"
        folder.mkdir(parents=True)
        dumped = validate_report(report).model_dump(mode="json", by_alias=True)
        (folder / "report.json").write_text(json.dumps(dumped))
    head, _, *rows = results_table(tmp_path).splitlines()
    cells = [dict(zip(head.split("|"), row.split("|"), strict=True)) for row in rows]
    by_run = {
        row[" run "].strip(): {key.strip(): value.strip() for key, value in row.items()} for row in cells
    }
    assert (
        by_run["average"]["canaries recognised (student)"] == "not audited"
        and by_run["average"]["student AUC_MIA"] == "0.5038"
    )
    assert by_run["worst"]["canaries recognised (student)"] == "24.2 % at 0.1 % FPR [20.0, 28.0]"
    assert by_run["worst"]["epsilon >="] == "3.36" and by_run["worst"]["student CAS"] == "–"
