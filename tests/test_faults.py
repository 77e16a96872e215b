"""Real faults on several local nodes: each run ends with an
undisturbed run's numbers, or with one clear error.

A driver killed in each stage: test_pipeline.py. A worker killed among several of one training:
test_parallel.py. Fifty tuning trials under kills: test_search.py.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from conftest import tiny_settings
from nodes import Nodes, config_file, finish, local_nodes, signal_worker, wait_until
from test_pipeline import without_times

from kr_ray.cluster import sweep
from kr_ray.cluster.trials import StudentWork, read_history
from kr_ray.config.file import load_config
from kr_ray.methods.interface import Part
from kr_ray.methods.knowledge_recycling import start_student
from kr_ray.pipeline import Pipeline
from kr_ray.runs.artifacts import read_json
from kr_ray.runs.progress import read_progress
from kr_ray.runs.stages import Row

SETTINGS = tiny_settings(
    teacher={"epochs": 60},
    generator={"epochs": 4, "checkpoint_every": 1},
    checkpoints={"epochs": 30},
    tuning={"trials": 6, "epochs": 30, "rungs": 6, "brackets_in_flight": 2},
)
"""Trainings of a few seconds, so that a fault comes in the middle of one."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with local_nodes(2) as running:
        yield running


def run_of(config: str) -> Path:
    return Path(config).parent / "runs" / SETTINGS["name"]


def run_without_ray(config: str, last: str) -> dict[str, Any]:
    """The result of stage `last` when all up to it are computed in this
    process: what no fault of a cluster may change."""

    def train(part: Part[Any], folder: Path) -> Any:
        return part.work(folder, None, lambda state, row: None)

    def train_students(works: Sequence[StudentWork], *_: Any) -> list[float]:
        found = []
        for work in works:
            ticked = start_student(work.run, work.spec, work.recipe, work.ticks, None)
            ticked.finish(lambda state, row: None)
            found.append(ticked.history[-1]["val_accuracy"])
        return found

    with pytest.MonkeyPatch.context() as patch, Pipeline(load_config(config), Mock()) as pipeline:
        patch.setattr(pipeline, "_train", train)
        patch.setattr(pipeline, "connect", lambda: None)
        patch.setattr(sweep, "train_students", train_students)
        return pipeline.run_until(last)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has its teacher and its generator."""
    config = config_file(tmp_path_factory.mktemp("trained"), SETTINGS)
    run_without_ray(config, "generator")
    return run_of(config)


@pytest.fixture(scope="module")
def swept(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after its checkpoint sweep."""
    config = copied(trained, tmp_path_factory.mktemp("swept"))
    run_without_ray(config, "checkpoints")
    return run_of(config)


def copied(run: Path, folder: Path, **sections: Any) -> str:
    """A configuration whose run has done what `run` has done."""
    config = config_file(folder, {**SETTINGS, **sections})
    shutil.copytree(run, run_of(config))
    return config


def result(config: str, stage: str) -> Any:
    return without_times(read_json(run_of(config) / stage / "done.json")["result"])


def histories(config: str, stage: str) -> dict[str, list[Row]]:
    """What every student of a stage has been trained for, with the seconds it
    took: a tick that is done again takes others."""
    return {folder.name: read_history(folder) for folder in (run_of(config) / stage / "trials").glob("*")}


def figures(config: str, stage: str) -> Any:
    """The same without times: equal losses at every tick, where equal accuracies might be chance."""
    return {name: without_times(rows) for name, rows in histories(config, stage).items()}


def begins_with(whole: dict[str, list[Row]], part: dict[str, list[Row]]) -> bool:
    return all(whole[name][: len(rows)] == rows for name, rows in part.items())


def ticks(config: str, stage: str) -> int:
    return sum(len(rows) for rows in histories(config, stage).values())


def share_done(config: str, stage: str) -> float:
    return max((unit.share for unit in read_progress(run_of(config) / stage)), default=0.0)


# --- workers and nodes --------------------------------------------------------------------------------------


def test_a_killed_trial_goes_on_from_its_last_tick(
    nodes: Nodes, swept: Path, trained: Path, tmp_path: Path
) -> None:
    config = copied(trained, tmp_path)
    driver = nodes.start_kr("checkpoints", config)
    wait_until(lambda: ticks(config, "checkpoints") >= 3, driver)
    assert signal_worker(nodes, "Trial")
    kept = histories(config, "checkpoints")
    finish(driver)
    assert result(config, "checkpoints") == without_times(
        read_json(swept / "checkpoints" / "done.json")["result"]
    )
    assert begins_with(histories(config, "checkpoints"), kept)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "stage"), [("checkpoints", "checkpoints"), ("tune", "tuning")])
def test_a_node_killed_in_mid_search_costs_only_time(
    nodes: Nodes, swept: Path, trained: Path, tmp_path: Path, command: str, stage: str
) -> None:
    config, undisturbed = (
        copied(trained if stage == "checkpoints" else swept, tmp_path / name) for name in ("hit", "calm")
    )
    nodes.kr(command, undisturbed)
    driver = nodes.start_kr(command, config)
    wait_until(lambda: ticks(config, stage) >= 6, driver)
    victim = next(iter(nodes.cluster.worker_nodes))
    nodes.kill(victim)
    kept = histories(config, stage)
    output = finish(driver)
    nodes.add()
    assert "Traceback" not in output
    assert result(config, stage) == result(undisturbed, stage)
    assert figures(config, stage) == figures(undisturbed, stage)
    assert begins_with(histories(config, stage), kept)


@pytest.mark.slow
def test_a_killed_training_worker_goes_on_from_its_last_checkpoint(
    nodes: Nodes, trained: Path, tmp_path: Path
) -> None:
    config = config_file(tmp_path, SETTINGS)
    driver = nodes.start_kr("teacher", config)
    wait_until(lambda: read_progress(run_of(config) / "teacher"), driver)
    assert signal_worker(nodes, "TrainWorker")
    finish(driver)
    assert result(config, "teacher") == without_times(read_json(trained / "teacher" / "done.json")["result"])


@pytest.mark.slow
def test_a_spot_machine_that_is_told_to_leave_costs_only_time(
    nodes: Nodes, swept: Path, trained: Path, tmp_path: Path
) -> None:
    """SIGTERM to its raylet, which drains: what was saved at the last
    tick is all that a notice could have saved."""
    config = copied(trained, tmp_path)
    driver = nodes.start_kr("checkpoints", config)
    wait_until(lambda: ticks(config, "checkpoints") >= 3, driver)
    victim = next(iter(nodes.cluster.worker_nodes))
    nodes.terminate(victim)
    kept = histories(config, "checkpoints")
    output = finish(driver)
    nodes.add()
    assert "Traceback" not in output
    assert result(config, "checkpoints") == without_times(
        read_json(swept / "checkpoints" / "done.json")["result"]
    )
    assert begins_with(histories(config, "checkpoints"), kept)


FULL = {"classifier": SETTINGS["classifier"] | {"precision": "full"}}
"""Rounding apart, N workers compute what one does; in bfloat16 it is not small."""


@pytest.mark.slow
def test_fewer_workers_go_on_when_a_node_is_lost(nodes: Nodes, tmp_path: Path) -> None:
    """Two workers on two nodes of one CPU; what one alone goes on with is the curve of one alone."""
    calm = config_file(tmp_path / "calm", SETTINGS | FULL)
    run_without_ray(calm, "teacher")
    cluster = {"train": {"cpu": 1.0}, "workers": 2, "min_workers": 1}
    config = config_file(tmp_path / "hit", SETTINGS | FULL | {"cluster": cluster})
    driver = nodes.start_kr("teacher", config)
    wait_until(lambda: share_done(config, "teacher") > 0.2, driver)
    assert len(nodes.workers("TrainWorker")) == 2
    nodes.kill(next(iter(nodes.cluster.worker_nodes)))
    finish(driver)
    nodes.add()
    found, alone = (read_json(run_of(name) / "teacher" / "result.json") for name in (config, calm))
    assert_same_curve(found["curve"], alone["curve"])


def assert_same_curve(found: list[Row], expected: list[Row]) -> None:
    """Step by step at first; later, rounding has grown."""
    assert len(found) == len(expected)
    for row, other in list(zip(found, expected, strict=True))[:2]:
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-2)
    assert found[-1]["train_loss"] == pytest.approx(expected[-1]["train_loss"], rel=0.1)
    assert found[-1]["val_accuracy"] == pytest.approx(expected[-1]["val_accuracy"], abs=0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_students_of_two_workers_equal_those_of_one_though_a_worker_is_killed(
    nodes: Nodes, trained: Path, tmp_path: Path
) -> None:
    calm = copied(trained, tmp_path / "calm", **FULL)
    nodes.kr("checkpoints", calm)
    config = copied(trained, tmp_path / "hit", **FULL, cluster={"train": {"cpu": 1.0}, "trial_workers": 2})
    driver = nodes.start_kr("checkpoints", config)
    wait_until(lambda: ticks(config, "checkpoints") >= 2, driver)
    kept = histories(config, "checkpoints")
    assert signal_worker(nodes, "TrainWorker")
    finish(driver, limit_s=500)
    assert begins_with(histories(config, "checkpoints"), kept)
    found, expected = histories(config, "checkpoints"), histories(calm, "checkpoints")
    assert found.keys() == expected.keys()
    for name, rows in found.items():
        assert_same_curve(rows, expected[name])


@pytest.mark.slow
def test_a_trial_that_is_killed_for_want_of_memory_goes_on(
    swept: Path, trained: Path, tmp_path: Path
) -> None:
    """This test takes memory until Ray kills a worker, and gives it back."""
    spare = 2 * 2**30
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + 2 * spare) / memory.total
    assert threshold < 0.95, "this machine has too little memory left for the test"
    config = copied(trained, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_usage_threshold", f"{threshold:.4f}")
        patch.setenv("RAY_memory_monitor_refresh_ms", "100")
        with local_nodes(1, num_cpus=2) as nodes:
            driver = nodes.start_kr("checkpoints", config)
            wait_until(lambda: ticks(config, "checkpoints") >= 3, driver)
            before = {process.pid for process in nodes.workers("Trial")}
            hog = []
            while before <= {process.pid for process in nodes.workers("Trial")}:
                assert len(hog) < 40, "Ray has killed nobody"
                hog.append(b"x" * (spare // 4))
                time.sleep(0.5)
            hog.clear()
            output = finish(driver)
    assert "Traceback" not in output
    assert result(config, "checkpoints") == without_times(
        read_json(swept / "checkpoints" / "done.json")["result"]
    )


# --- a full disk, a diverged training -----------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_with_one_message_and_costs_only_time(
    nodes: Nodes, trained: Path, small_disk: Path, tmp_path: Path
) -> None:
    config = config_file(tmp_path, SETTINGS)
    where = ("--set", f"storage={small_disk}")
    output = nodes.kr("generator", config, *where, code=1)
    assert "No space left on device" in output and "Traceback" not in output
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    nodes.kr("generator", config, *where)
    for stage in ("teacher", "generator"):
        found, expected = (
            read_json(run / stage / "done.json")["result"] for run in (small_disk / SETTINGS["name"], trained)
        )
        assert without_times(found) == without_times(expected)


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_with_one_message(nodes: Nodes, tmp_path: Path) -> None:
    config = config_file(tmp_path, SETTINGS)
    output = nodes.kr("teacher", config, "--set", "classifier.learning_rate=1e30", code=1)
    assert output.count("lower classifier.learning_rate") == 1 and "Traceback" not in output
