"""What the commands print of other people's text, what they
overwrite, and how one bad file among many ends."""

from __future__ import annotations

import ast
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, tiny_config
from test_report import fake_report

from kr_ray.cli import main
from kr_ray.display import Display, plain_console
from kr_ray.report.printed import print_summary
from kr_ray.report.schema import validate_report
from kr_ray.runs.artifacts import RunDirectory, write_json
from kr_ray.runs.progress import StageProgress, look_at_stage, read_progress, report_progress
from kr_ray.runs.results import ReportResult, Result, Results

ODD = "odd[/backup]/[bold]none[/] :warning:"
"""Closing and opening tags, and an emoji's name, as a path may hold them."""


def write_scores(path: Path) -> Path:
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, member_scores=rng.normal(1, 1, 200), non_member_scores=rng.normal(0, 1, 200))
    return path


# --- other people's text is never markup --------------------------------------------------------------------


def test_every_console_is_the_plain_one() -> None:
    """rich reads brackets in what it prints as markup unless told
    otherwise: there is one place where it is told."""
    places = []
    for file in sorted((REPOSITORY / "kr_ray").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich":
                places += [
                    (file.name, name.name)
                    for name in node.names
                    if name.name in ("Console", "print", "get_console", "inspect")
                ]
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "TextColumn"
            ):
                assert any(key.arg == "markup" for key in node.keywords), file
    assert set(places) == {("display.py", "Console")}


def test_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    plain_console().print(ODD)
    assert capsys.readouterr().out == f"{ODD}\n"


def test_a_run_whose_error_has_brackets_is_listed_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError), RunDirectory(tmp_path / "x"):
        raise ValueError(ODD)
    assert main(["runs", "--storage", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "[/backup]" in shown and "[bold]" in shown and ":warning:" in shown


def test_progress_notes_notices_and_summaries_with_brackets_are_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with Display() as display:
        display.notice(ODD)
        display.stage_started(ODD)
        display.logged = -1e9
        display.stage_progress(ODD, StageProgress(share=0.5, note=ODD))
        display.stage_finished("other", Result(wall_s=1.0), False)
    print_summary(tiny_config(storage=str(tmp_path / ODD)), "data", Results(), Result())
    page = tmp_path / ODD / "report.html"
    write_json(
        page.with_suffix(".json"), validate_report(fake_report()).model_dump(mode="json", by_alias=True)
    )
    print_summary(tiny_config(), "report", Results(), ReportResult(page=str(page)))
    shown = capsys.readouterr().out
    assert shown.count(ODD) == 6


def test_a_score_file_with_brackets_in_its_path_is_audited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_scores(tmp_path / "scores[" / "final].npz")
    assert main(["audit", "--scores", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "scores[" in shown and "final]" in shown and "\\[" not in shown


# --- outputs take no input's place --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["same", "relative", "link", "hard_link"])
def test_the_figures_do_not_take_the_place_of_the_scores(
    tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_scores(tmp_path / "s.npz")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.chdir(tmp_path)
    out = {"same": str(path), "relative": "s.npz", "link": "l.json", "hard_link": "h.json"}[way]
    if way == "link":
        os.symlink(path, out)
    elif way == "hard_link":
        os.link(path, out)
    assert main(["audit", "--scores", str(path), "--json", out]) == 2
    assert "`--json` must be another file than --scores" in capsys.readouterr().err
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_a_folder_as_output_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "--scores", str(tmp_path / "not_looked_for.npz"), "--json", str(tmp_path)]) == 2
    assert "must name a file, but got the folder" in capsys.readouterr().err
    both = ["--out", str(tmp_path / "b"), "--markdown", str(tmp_path / "b")]
    assert main(["bench", "--suite", "augmentation", *both]) == 2


# --- one bad file among many --------------------------------------------------------------------------------


def test_a_damaged_or_foreign_report_hides_no_other_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = validate_report(fake_report() | {"run": "good"})
    write_json(tmp_path / "good" / "report" / "report.json", whole.model_dump(mode="json", by_alias=True))
    bad = {
        "empty": "",
        "null": "null",
        "list": "[]",
        "foreign": '{"audit": {"kr": 1}, "student": 1, "tuning": 1}',
        "cut": '{"audit": ',
        "other_schema": whole.model_copy(update={"schema_version": 2}).model_dump_json(by_alias=True),
    }
    for name, text in bad.items():
        (tmp_path / name / "report").mkdir(parents=True)
        (tmp_path / name / "report" / "report.json").write_text(text)
    assert main(["results", "--storage", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and out.splitlines()[2].startswith("| good |")
    assert all(f"{name}/report/report.json" in err for name in bad) and "good/" not in err


def test_watching_a_run_with_a_damaged_status_says_which_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "status.json").write_text("<html>")
    assert main(["watch", "x", "--storage", str(tmp_path)]) == 1
    assert f"{tmp_path / 'x' / 'status.json'} is damaged" in capsys.readouterr().out


def test_damaged_progress_shows_nothing_and_stops_nothing(tmp_path: Path) -> None:
    report_progress(tmp_path, "good", 0.5, "half")
    for name, text in {"empty": "", "null": "null", "foreign": '{"share": "x"}', "folder": None}.items():
        path = tmp_path / "progress" / f"{name}.json"
        path.mkdir() if text is None else path.write_text(text)
    (tmp_path / "trials.json").write_text("junk")
    assert [report.note for report in read_progress(tmp_path)] == ["half"]
    assert look_at_stage(tmp_path, 1, 1.0).share == 0.5
