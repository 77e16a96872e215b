"""Checkpoint optimisation: which students are trained, for how long, and what is kept; the students' CAS is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config

from kr_ray.cluster import sweep
from kr_ray.cluster.trials import StudentWork


def swept(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Sequence[int], **keys: Any
) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """The sweep's rows, and the schedule lengths of each round. Later checkpoints are better, except at short schedules."""
    rounds: list[list[float]] = []

    def train(works: Sequence[StudentWork], *_: Any) -> list[float]:
        rounds.append([work.spec.epochs for work in works])
        return [work.spec.checkpoint_epoch / 100 for work in works]

    monkeypatch.setattr(sweep, "train_students", train)
    return sweep.sweep_checkpoints(Path("run"), Path("folder"), checkpoints, tiny_config(checkpoints=keys)), rounds


def test_exhaustive_trains_every_student_once_for_the_whole_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, rounds = swept(monkeypatch, range(5, 55, 5), epochs=100)
    assert rounds == [[100] * 10]
    assert [row["epoch"] for row in rows] == list(range(5, 55, 5))


def test_halving_repeats_the_best_third_three_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, rounds = swept(monkeypatch, range(1, 28), search="halving", epochs=90)
    assert rounds == [[10] * 27, [30] * 9, [90] * 3]
    assert {row["epoch"]: row["epochs"] for row in rows if row["epochs"] > 10} == {
        **dict.fromkeys(range(19, 25), 30),
        **dict.fromkeys((25, 26, 27), 90),
    }


def test_halving_of_as_few_checkpoints_as_one_round_keeps_is_exhaustive(monkeypatch: pytest.MonkeyPatch) -> None:
    _, rounds = swept(monkeypatch, [2, 4, 6], search="halving", epochs=90)
    assert rounds == [[90, 90, 90]]


def test_equal_scores_favour_the_earlier_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "train_students", lambda works, *_: [0.5] * len(works))
    config = tiny_config(checkpoints={"search": "halving", "epochs": 90})
    rows = sweep.sweep_checkpoints(Path("run"), Path("folder"), range(1, 10), config)
    assert [row["epoch"] for row in rows if row["epochs"] == 90] == [1, 2, 3]
