"""Workers that die before they are any: Ray Train gives up the run for them, we start it again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import tiny_settings
from nodes import config_file, finish, local_nodes, wait_until, workers_of
from ray.exceptions import ActorDiedError, RayActorError
from ray.train import ControllerError, WorkerGroupError
from test_pipeline import without_times

from kr_ray.cluster import train
from kr_ray.cluster.train import run_workers
from kr_ray.config import Resources
from kr_ray.runs.artifacts import read_json


def fit_that(monkeypatch: pytest.MonkeyPatch, *outcomes: BaseException | None) -> list[int]:
    """Replace Train by these outcomes, one per `fit`; returns a list that grows with every call."""
    calls: list[int] = []

    def fit(trainer: train._Trainer) -> None:
        calls.append(len(calls))
        if (outcome := outcomes[calls[-1]]) is not None:
            raise outcome

    monkeypatch.setattr(train._Trainer, "fit", fit)
    return calls


def chained(cause: BaseException) -> Exception:
    error = RuntimeError("the backend's start failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "lost", [ControllerError(RayActorError()), ControllerError(chained(ActorDiedError())), ActorDiedError()],
    ids=["a worker", "a worker, wrapped", "the controller"],
)  # fmt: skip
def test_a_process_lost_at_the_start_is_tried_again_so_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: Exception
) -> None:
    calls = fit_that(monkeypatch, lost, lost, None)
    run_workers(lambda: None, tmp_path, "title", Resources(), 2, (1, 1))
    assert calls == [0, 1, 2]
    calls = fit_that(monkeypatch, lost, lost)
    with pytest.raises(type(lost)):
        run_workers(lambda: None, tmp_path, "title", Resources(), 1, (1, 1))
    assert calls == [0, 1]


@pytest.mark.parametrize(
    "error", [ControllerError(ValueError("a mistake")), WorkerGroupError("failed", {0: ValueError("NaN")})]
)
def test_a_mistake_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls = fit_that(monkeypatch, error, None)
    with pytest.raises(type(error)):
        run_workers(lambda: None, tmp_path, "title", Resources(), 3, (1, 1))
    assert calls == [0]


def newcomers(node: Any, seen: set[int]) -> list[psutil.Process]:
    return [process for process in workers_of(node, "") if process.pid not in seen]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victims", [1, 3])
def test_workers_killed_before_they_train_cost_only_time(tmp_path: Path, victims: int) -> None:
    """Every process that Ray starts after Train's controller is killed at sight, so many of them."""
    calm, hit = (config_file(tmp_path / name, tiny_settings()) for name in ("calm", "hit"))
    with local_nodes(1) as nodes:
        nodes.kr("teacher", calm)
        driver = nodes.start_kr("teacher", hit)
        wait_until(lambda: nodes.workers("TrainController"), driver)
        [node] = nodes.cluster.list_all_nodes()
        seen = {process.pid for process in workers_of(node, "")}
        for _ in range(victims):
            new = wait_until(partial(newcomers, node, seen), driver)
            seen.update(process.pid for process in new)
            for process in new:
                if "Controller" not in " ".join(process.cmdline()):
                    psutil.Process(process.pid).kill()
        finish(driver)
    results = [
        read_json(tmp_path / name / "runs" / "tiny" / "teacher" / "result.json") for name in ("calm", "hit")
    ]
    assert without_times(results[0]) == without_times(results[1])
