"""Real faults on several local nodes: each run ends with an undisturbed run's numbers, or with one clear error.

A driver killed in each stage: test_pipeline.py. A worker killed among several of one training: test_parallel.py. Fifty tuning
trials under kills: test_search.py.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import tiny_settings
from nodes import Nodes, config_file, finish, local_nodes, signal_worker, wait_until
from test_pipeline import without_times

from kr_ray.artifacts import read_json, read_progress
from kr_ray.cluster import sweep
from kr_ray.cluster.trials import StudentWork, read_history
from kr_ray.config import load_config
from kr_ray.pipeline import Pipeline
from kr_ray.training.resumable import Row
from kr_ray.training.student import start_student

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
    """The result of stage `last` when all up to it are computed in this process: what no fault of a cluster may change."""

    def train(work: Callable[..., None], folder: Path) -> None:
        work(None, lambda state, row: None)

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
    """What every student of a stage has been trained for, with the seconds it took: a tick that is done again takes others."""
    return {folder.name: read_history(folder) for folder in (run_of(config) / stage / "trials").glob("*")}


def figures(config: str, stage: str) -> Any:
    """The same without times: equal losses at every tick, where equal accuracies might be chance."""
    return {name: without_times(rows) for name, rows in histories(config, stage).items()}


def begins_with(whole: dict[str, list[Row]], part: dict[str, list[Row]]) -> bool:
    return all(whole[name][: len(rows)] == rows for name, rows in part.items())


def ticks(config: str, stage: str) -> int:
    return sum(len(rows) for rows in histories(config, stage).values())


# --- workers and nodes -----------------------------------------------------------------------------------------------


def test_a_killed_trial_goes_on_from_its_last_tick(nodes: Nodes, swept: Path, trained: Path, tmp_path: Path) -> None:
    config = copied(trained, tmp_path)
    driver = nodes.start_kr("checkpoints", config)
    wait_until(lambda: ticks(config, "checkpoints") >= 3, driver)
    assert signal_worker(nodes, "Trainable")
    kept = histories(config, "checkpoints")
    finish(driver)
    assert result(config, "checkpoints") == without_times(read_json(swept / "checkpoints" / "done.json")["result"])
    assert begins_with(histories(config, "checkpoints"), kept)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "stage"), [("checkpoints", "checkpoints"), ("tune", "tuning")])
def test_a_node_killed_in_mid_search_costs_only_time(
    nodes: Nodes, swept: Path, trained: Path, tmp_path: Path, command: str, stage: str
) -> None:
    config, undisturbed = (copied(trained if stage == "checkpoints" else swept, tmp_path / name) for name in ("hit", "calm"))
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
def test_a_killed_training_worker_goes_on_from_its_last_checkpoint(nodes: Nodes, trained: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, SETTINGS)
    driver = nodes.start_kr("teacher", config)
    wait_until(lambda: read_progress(run_of(config) / "teacher"), driver)
    assert signal_worker(nodes, "TrainWorker")
    finish(driver)
    assert result(config, "teacher") == without_times(read_json(trained / "teacher" / "done.json")["result"])


# --- a full disk, a diverged training ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False)
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
        found, expected = (read_json(run / stage / "done.json")["result"] for run in (small_disk / SETTINGS["name"], trained))
        assert without_times(found) == without_times(expected)


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_with_one_message(nodes: Nodes, tmp_path: Path) -> None:
    config = config_file(tmp_path, SETTINGS)
    output = nodes.kr("teacher", config, "--set", "classifier.learning_rate=1e30", code=1)
    assert output.count("lower classifier.learning_rate") == 1 and "Traceback" not in output
