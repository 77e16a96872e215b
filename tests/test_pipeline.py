"""The whole pipeline, as a person runs it: to the end, again, with
a changed key, and killed in every stage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, tiny_settings

from kr_ray.config.file import load_config
from kr_ray.pipeline import STAGES
from kr_ray.plan.work import data_size, run_work
from kr_ray.report.schema import validate_report
from kr_ray.runs.artifacts import read_json
from kr_ray.runs.progress import read_progress

KILLED_STAGES = tuple(
    stage for stage in STAGES if stage not in ("data", "copies", "worst_case", "scaling", "report")
)
"""Copies take seconds and report no progress; the worst case is not part of a
run unless asked for: see test_worst_case_run.py."""


def kr(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "kr_ray.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def write_config(folder: Path, raw: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw | {"storage": str(folder / "runs")}))
    return str(path)


def without_times(value: Any) -> Any:
    """The same JSON value without seconds and images per second."""
    if isinstance(value, dict):
        return {
            key: without_times(item)
            for key, item in value.items()
            if not key.endswith(("seconds", "second", "_s"))
        }
    return [without_times(item) for item in value] if isinstance(value, list) else value


def final_numbers(run: Path) -> dict[str, Any]:
    """Everything in report.json but times, dates and places."""
    report = read_json(run / "report" / "report.json")
    del report["created"], report["stages"], report["config"]["storage"]
    return dict(without_times(report))


def kill_in(stage: str, config: str, run: Path) -> bool:
    """Start `kr run`, kill -9 its driver once `stage` has begun to report
    progress; False if it was too quick for that."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "kr_ray.cli", "run", config],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while driver.poll() is None:
            folder = run / stage
            if (folder / "done.json").exists():
                break
            if (folder / "started.json").exists() and (read_progress(folder) or stage == "audit"):
                driver.send_signal(signal.SIGKILL)
                driver.wait()
                return True
            time.sleep(0.02)
    finally:
        driver.kill()
        driver.wait()
    return False


def kill_and_finish(folder: Path, raw: dict[str, Any], stages: tuple[str, ...]) -> tuple[int, dict[str, Any]]:
    """A run whose driver is killed in each of `stages` and that is then
    finished: how many kills hit, and its numbers."""
    config, run = write_config(folder, raw), folder / "runs" / raw["name"]
    kills = sum(kill_in(stage, config, run) for stage in stages)
    kr("run", config)
    return kills, final_numbers(run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A finished tiny run: its config file and its run directory."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, tiny_settings())
    kr("run", config)
    return config, folder / "runs" / "tiny"


@pytest.mark.timeout(600)
def test_all_stages_are_in_the_report(finished: tuple[str, Path]) -> None:
    report = read_json(finished[1] / "report" / "report.json")
    validate_report(report)
    assert set(report["stages"]) == set(STAGES) - {"worst_case", "scaling", "report"}
    assert [row["epoch"] for row in report["checkpoints"]] == [2, 4]
    assert report["tuning"]["trials"] == 4
    assert {trial["state"] for trial in report["tuning"]["history"]} <= {"complete", "pruned"}
    assert report["audit"]["kr"]["shadow_models"] == 3
    assert (finished[1] / "report" / "report.html").stat().st_size > 50_000
    assert sorted(path.name for path in (finished[1] / "generator" / "checkpoints").glob("*.png")) == [
        "epoch_0002.png", "epoch_0004.png",
    ]  # fmt: skip


def test_a_plan_counts_the_images_that_the_run_was_trained_on(finished: tuple[str, Path]) -> None:
    config = load_config(finished[0])
    planned = {work.stage: work.trained for work in run_work(config, data_size(config.data))}
    for stage in ("teacher", "student", "equal_compute_teacher"):
        assert planned[stage] == read_json(finished[1] / stage / "done.json")["result"]["images_seen"], stage
    assert planned["tuning"] == read_json(finished[1] / "tuning" / "done.json")["result"]["images_seen"]


def test_the_study_of_the_tuning_opens_afterwards(finished: tuple[str, Path]) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(finished[1] / "tuning" / "study.journal")))
    study = optuna.load_study(study_name="tuning", storage=storage)
    tuning = read_json(finished[1] / "report" / "report.json")["tuning"]
    assert study.best_value == tuning["best"]["val_cas"]
    states = {"complete": optuna.trial.TrialState.COMPLETE, "pruned": optuna.trial.TrialState.PRUNED}
    assert [trial.state for trial in study.trials] == [states[row["state"]] for row in tuning["history"]]


def test_the_same_command_again_does_nothing_twice(finished: tuple[str, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished[1].glob("*/done.json")}
    output = kr("run", finished[0]).stdout
    assert output.count("finished before") == len(before)
    assert {path: path.stat().st_mtime_ns for path in finished[1].glob("*/done.json")} == before


@pytest.mark.timeout(600)
def test_killed_in_three_kinds_of_stages_the_run_ends_with_the_same_numbers(
    finished: tuple[str, Path], tmp_path: Path
) -> None:
    """One stage on Ray Train, one on Ray Tune, one of plain tasks;
    the slow test below kills in all of them."""
    expected = final_numbers(finished[1])
    kills, found = kill_and_finish(tmp_path, tiny_settings(), ("generator", "tuning", "shadows"))
    assert found == expected
    assert kills == 3


@pytest.mark.timeout(600)
def test_a_changed_key_reruns_exactly_what_depends_on_it(finished: tuple[str, Path]) -> None:
    output = kr("run", finished[0], "--set", "student.epochs=5").stdout
    again = {
        line.split(":")[0]
        for line in output.splitlines()
        if ": done" in line and "finished before" not in line
    }
    assert again == {"student", "copies", "equal_compute_teacher", "audit", "report"}


@pytest.mark.timeout(600)
def test_compare_labels_and_export_and_predict(finished: tuple[str, Path]) -> None:
    output = kr("compare-labels", finished[0], "--seeds", "2").stdout
    for strategy in ("gkd", "gap_filler", "filter", "hard"):
        assert strategy in output
    comparison = read_json(finished[1] / "compare_labels" / "done.json")["result"]
    assert len(comparison["rows"]) == 8
    views = kr(
        "compare-labels", finished[0], "--views", "view=seen", "view=clean,temperature=2", "--seeds", "2"
    ).stdout
    assert "view=seen" in views and "equal-compute teacher" in views
    compared = read_json(finished[1] / "compare_views" / "done.json")["result"]["rows"]
    steps = {row["steps"] for row in compared}
    assert len(compared) == 6 and len(steps) == 1
    assert {row["variant"]: row["work"].get("teacher_queries") for row in compared} == {
        "equal-compute teacher": None,
        "view=seen": compared[0]["work"]["images_trained"],
        "view=clean,temperature=2": 3 * 160,
    }
    refused = kr("compare-labels", finished[0], "--views", "view=sen", check=False)
    assert refused.returncode == 2 and "'clean' or 'seen'" in refused.stderr
    kr("export", finished[0], "--images", "32")
    image = next((finished[1] / "generator" / "checkpoints").glob("*.png"))
    predicted = kr(
        "predict", str(image), "--model", str(finished[1] / "export" / "student.onnx")
    ).stdout.split("\t")
    assert predicted[0] == str(image) and 0 <= float(predicted[2]) <= 1
    assert "finished" in kr("runs", "--storage", str(finished[1].parent)).stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_in_every_stage_at_the_quickstarts_scale(tmp_path: Path) -> None:
    raw = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text())
    _, expected = kill_and_finish(tmp_path / "undisturbed", raw, ())
    kills, found = kill_and_finish(tmp_path / "disturbed", raw, KILLED_STAGES)
    assert found == expected
    assert kills >= 7  # fitting the attacks takes a second or two: that kill may come too late


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "sections", [{"checkpoints": {"search": "halving", "epochs": 12}, "tuning": {"searcher": "hyperopt"}}]
)
def test_the_other_searches(tmp_path: Path, sections: dict[str, Any]) -> None:
    raw = tiny_settings(generator={"epochs": 4, "checkpoint_every": 1}, **sections)
    config = write_config(tmp_path, raw)
    kr("tune", config)
    swept = read_json(tmp_path / "runs" / "tiny" / "checkpoints" / "done.json")["result"]["checkpoints"]
    assert sorted(row["epochs"] for row in swept) == [4, 4, 4, 12]
    assert read_json(tmp_path / "runs" / "tiny" / "tuning" / "done.json")["result"]["searcher"] == "hyperopt"


def test_interruption_ends_with_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_settings(teacher={"epochs": 2000}))
    driver = subprocess.Popen(
        [sys.executable, "-m", "kr_ray.cli", "run", config], stderr=subprocess.PIPE, text=True
    )
    while not read_progress(tmp_path / "runs" / "tiny" / "teacher"):
        assert driver.poll() is None
        time.sleep(0.1)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 130, errors
    assert "run the same command again" in errors and "Traceback" not in errors
    assert read_json(tmp_path / "runs" / "tiny" / "status.json")["state"] == "interrupted"


def test_wrong_input_ends_with_2_and_one_message(tmp_path: Path) -> None:
    missing = kr(
        "run",
        write_config(tmp_path, tiny_settings(data={"name": "bloodmnist", "download": False})),
        check=False,
    )
    assert missing.returncode == 2 and "Traceback" not in missing.stderr and "bloodmnist" in missing.stderr
    if (os.cpu_count() or 1) < 64:
        demanding = tiny_settings(cluster={"train": {"cpu": 64.0}, "trial": {"gpu": 9.0}})
        refused = kr("run", write_config(tmp_path / "b", demanding), check=False)
        assert refused.returncode == 2
        assert "cluster.train.cpu" in refused.stderr and "cluster.trial.gpu" in refused.stderr
