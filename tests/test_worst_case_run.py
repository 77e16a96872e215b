"""The worst-case audit as a person runs it: twice, killed in the middle, with
more runs, with a budget, without what an arm needs."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config, tiny_settings
from test_pipeline import kr, without_times, write_config

from kr_ray.audits.design import AuditDesign
from kr_ray.audits.runs import AuditPlan
from kr_ray.cluster.worst_case import models_within, stage_seconds
from kr_ray.config import Config, ConfigError, SynthesisConfig
from kr_ray.pipeline import Pipeline
from kr_ray.report.schema import validate_report
from kr_ray.runs.artifacts import read_json
from kr_ray.runs.progress import StageProgress
from kr_ray.runs.results import Result, Results
from kr_ray.synthesis.student_set import StudentSpec

ARMS = ("--arms", "teacher,kr")
SETTINGS: dict[str, Any] = {
    "data": {"max_train_images": 400},
    "audit": {"worst_case": {"models": 4, "queries": 3, "max_canary_share": 0.25}},
}
"""100 canaries in 4 runs: 200 non-members."""


def score_files(run: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every score file."""
    files = sorted((run / "worst_case" / "runs").glob("*/scores_*.npz"))
    return {str(path.relative_to(run)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def figures(run: Path) -> Any:
    """All of the audit but times."""
    lira = read_json(run / "report" / "report.json")["audit"]["lira"]
    return without_times(
        {arm: {key: value for key, value in found.items() if key != "seconds"} for arm, found in lira.items()}
    )


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Configuration and run directory of an undisturbed audit without a run before it."""
    folder = tmp_path_factory.mktemp("audited")
    config = write_config(folder, tiny_settings(**SETTINGS))
    output = kr("audit", config, *ARMS).stdout
    assert "core hours (measured on the first two" in output
    assert "canaries" in output and "The average attack was not made." in output
    return config, folder / "runs" / "tiny"


@pytest.mark.timeout(600)
def test_the_audit_is_in_the_report_and_only_scores_stay(audited: tuple[str, Path]) -> None:
    _, run = audited
    report = read_json(run / "report" / "report.json")
    checked = validate_report(report)
    assert checked.teacher is None and checked.audit is not None  # no other stage was run
    for arm in ("teacher", "kr"):
        found = report["audit"]["lira"][arm]
        assert (found["models"], found["canaries"], found["population_samples"], found["queries"]) == (
            4,
            100,
            100,
            3,
        )
        for group in ("canary", "population"):
            assert found[group]["n_members"] == found[group]["n_non_members"] == 200
            assert (
                found[group]["tpr_at_fpr_0.001"] is None and "0.005" in found[group]["refused"]
            )  # the finest FPR
            assert 0 <= found[group]["tpr_at_fpr_0.01"] <= 1
    assert "ROC curves, log-log" in (run / "report" / "report.html").read_text()
    assert len(score_files(run)) == 8
    page = (run / "report" / "report.html").read_text() + (run / "report" / "report_summary.html").read_text()
    for arm in ("teacher", "kr"):
        with (run / "worst_case" / f"most_exposed_{arm}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 200 and report["audit"]["lira"][arm]["exposed"]["images"] == 200
        assert {row["group"] for row in rows} == {"canary", "population"}
        sources = read_json(run / "data" / "train_sources.json")
        assert all(row["image"] == sources[int(row["training_index"])] for row in rows)
        assert f"most_exposed_{arm}.csv" in page  # the report says where the list is, and not what it holds
    kept = {path.name for path in (run / "worst_case" / "runs").glob("*/*")}
    assert kept == {"scores_teacher.npz", "scores_kr.npz", "set_kr.npz"}
    assert [
        (one["artefact"], one["attack"], one["canary"]["n_members"])
        for one in report["audit"]["lira"]["kr"]["sets"]
    ] == [(artefact, attack, 200) for artefact in ("set", "generator") for attack in ("nearest", "density")]
    assert report["audit"]["lira"]["teacher"]["sets"] == [] and "Membership by nearest image" in page
    with np.load(run / "worst_case" / "runs" / "0" / "scores_kr.npz") as file:
        assert file["samples"].shape == (200, 3, 10) and file["samples"].dtype == np.float32


@pytest.mark.timeout(600)
def test_killed_in_the_middle_it_repeats_no_finished_run_and_ends_with_the_same_figures(
    audited: tuple[str, Path], tmp_path: Path
) -> None:
    config, run = write_config(tmp_path, tiny_settings(**SETTINGS)), tmp_path / "runs" / "tiny"
    driver = subprocess.Popen(
        [sys.executable, "-m", "kr_ray.cli", "audit", config, *ARMS],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while len(list((run / "worst_case" / "runs").glob("*/scores_kr.npz"))) < 2:
            assert driver.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    before = score_files(run)
    assert 4 <= len(before) < 8
    kr("audit", config, *ARMS)
    after = score_files(run)
    assert {name: after[name] for name in before} == before
    assert figures(run) == figures(audited[1])


@pytest.mark.timeout(600)
def test_more_runs_extend_the_audit_and_what_was_asked_for_last_is_reported(
    audited: tuple[str, Path],
) -> None:
    config, run = audited
    before = score_files(run)
    output = kr("audit", config, "--arms", "teacher", "--models", "6").stdout
    after = score_files(run)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {f"worst_case/runs/{k}/scores_teacher.npz" for k in (4, 5)}
    assert "6 runs of teacher" in output
    kr("report", config)  # the file names no arms
    assert {
        arm: found["models"]
        for arm, found in read_json(run / "report" / "report.json")["audit"]["lira"].items()
    } == {"teacher": 6}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_fixed_generators_student_needs_the_generator_first(audited: tuple[str, Path]) -> None:
    config, run = audited
    before = score_files(run)
    refused = kr("audit", config, "--arms", "fixed_generator", check=False)
    assert refused.returncode == 1 and "kr generator" in refused.stderr and score_files(run) == before
    kr("generator", config)
    kr("audit", config, "--arms", "fixed_generator")
    assert figures(run).keys() == {"fixed_generator"}
    assert {
        name: value for name, value in score_files(run).items() if "fixed_generator" not in name
    } == before


def test_wrong_input_is_refused(audited: tuple[str, Path]) -> None:
    config, _ = audited
    for arguments, message in (
        (("--models", "4"), "--arms"),
        (("--arms", "teacher", "--models", "5"), "even"),
        (("--arms", "nonsense"), "nonsense"),
        (("--arms", "teacher", "--budget", "0"), "--budget > 0"),
        (("--arms", "teacher", "--budget", "1e-9"), "--budget >="),
        (("--arms", "teacher", "--set", "audit.worst_case.canaries=101"), "audit.worst_case.canaries <= 100"),
    ):
        refused = kr("audit", config, *arguments, check=False)
        assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr, (
            refused.stderr
        )


# --- what depends on what, and what it costs: no Ray --------------------------------------------------------


class Silent:
    def stage_started(self, stage: str) -> None: ...
    def stage_progress(self, stage: str, progress: StageProgress) -> None: ...
    def stage_finished(self, stage: str, result: Result, skipped: bool) -> None: ...
    def notice(self, text: str) -> None: ...


def stamps(folder: Path, **sections: Any) -> dict[str, str]:
    """Fingerprints of the two audits, with those of what they build on given."""
    pipeline = Pipeline(tiny_config(storage=str(folder), **sections), Silent())
    pipeline.prints = dict.fromkeys(("data", "teacher", "generator", "student", "shadows"), "x")
    return {stage: pipeline.stamp(pipeline.stages[stage]) for stage in ("audit", "worst_case")}


def test_each_audit_reruns_exactly_when_its_own_inputs_change(tmp_path: Path) -> None:
    def changed(arms: list[str], **sections: Any) -> set[str]:
        worst_case = {"arms": arms} | sections.pop("worst_case", {})
        audit = {"worst_case": worst_case} | sections.pop("audit", {})
        base, other = (
            stamps(tmp_path, audit={"worst_case": {"arms": arms}}),
            stamps(tmp_path, audit=audit, **sections),
        )
        return {stage for stage in base if base[stage] != other[stage]}

    assert (
        changed(["kr"], worst_case={"canaries": 7})
        == changed(["kr"], worst_case={"models": 8})
        == {"worst_case"}
    )
    assert changed(["kr"], audit={"shadow": {"max_svc_rows": 200}}) == {"audit"}
    assert changed(["kr"], worst_case={"keep_models": True}) == set()
    assert (
        changed(["kr"], student={"epochs": 7}) == changed(["kr"], generator={"epochs": 6}) == {"worst_case"}
    )
    assert (
        changed(["teacher"], student={"epochs": 7}) == changed(["teacher"], generator={"epochs": 6}) == set()
    )
    assert changed(["teacher"], teacher={"epochs": 9}) == {"worst_case"}
    assert changed(["fixed_generator"], cluster={"trial": {"cpu": 0.5}}) == set()
    assert changed(["fixed_generator"], cluster={"trial": {"cpu": 2.0}}) == {
        "audit",
        "worst_case",
    }  # two threads: other last bits


def arms(*names: str, models: int = 32) -> Config:
    return tiny_config(generator={"epochs": 8}, audit={"worst_case": {"arms": list(names), "models": models}})


def run_cost(results: Results, *names: str) -> float | None:
    """Of one run, its student of the checkpoint of epoch 2."""
    config = arms(*names)
    student = StudentSpec(config.generator, 2, SynthesisConfig(), 1, 0)
    nobody = AuditDesign(*[np.zeros(0, np.int64)] * 4, excluded=0, seed=0)
    where = Path("nowhere")
    plan = AuditPlan(run=where, folder=where, config=config, student=student, design=nobody, digest="")
    return stage_seconds(plan, results)


def test_cost_from_stage_times_and_what_fits_a_budget() -> None:
    results = Results()
    results.keep("teacher", Result(wall_s=10.0))
    assert run_cost(results, "teacher") == 10
    assert run_cost(results, "teacher", "kr") is None
    results.keep("generator", Result(wall_s=40.0))
    results.keep("student", Result(wall_s=5.0))
    assert run_cost(results, "teacher", "kr") == 10 + 40 * 2 / 8 + 5
    assert models_within(1.0, 360, arms("kr")) == 10
    assert models_within(1.19, 360, arms("kr")) == 10
    assert models_within(100.0, 360, arms("kr", models=16)) == 16
    with pytest.raises(ConfigError, match=r"--budget >= 0\.4"):
        models_within(0.39, 360, arms("kr"))
