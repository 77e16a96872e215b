"""Checkpoint optimisation: which students are trained, for how long,
and what is kept; the students' CAS is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config

from kr_ray.cluster import sweep
from kr_ray.cluster.compare import compare_search
from kr_ray.cluster.trials import StudentWork
from kr_ray.runs.figures import SweptCheckpoint


def swept(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Sequence[int], **keys: Any
) -> tuple[list[SweptCheckpoint], list[list[float]]]:
    """The sweep's rows, and the schedule lengths of each round. Later
    checkpoints are better, except at short schedules."""
    rounds: list[list[float]] = []

    def train(works: Sequence[StudentWork], *_: Any) -> list[float]:
        rounds.append([work.spec.epochs for work in works])
        return [work.spec.checkpoint_epoch / 100 for work in works]

    monkeypatch.setattr(sweep, "train_students", train)
    return sweep.sweep_checkpoints(
        Path("run"), Path("folder"), checkpoints, tiny_config(checkpoints=keys)
    ), rounds


def test_exhaustive_trains_every_student_once_for_the_whole_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, rounds = swept(monkeypatch, range(5, 55, 5), epochs=100)
    assert rounds == [[100] * 10]
    assert [row.epoch for row in rows] == list(range(5, 55, 5))


def test_halving_gives_the_whole_schedule_to_as_many_of_the_best_as_the_budget_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, rounds = swept(monkeypatch, range(1, 28), search="halving", epochs=90, budget=0.34)
    assert rounds == [[10] * 27, [90] * 6]  # (27 x 10 + 6 x 90) / (27 x 90) = 0.33; a seventh would be over
    assert {row.epoch: row.epochs for row in rows if row.epochs > 10} == dict.fromkeys(range(22, 28), 90)


def test_halving_that_would_save_nothing_is_exhaustive(monkeypatch: pytest.MonkeyPatch) -> None:
    _, rounds = swept(monkeypatch, [2], search="halving", epochs=90)
    assert rounds == [[90]]
    _, rounds = swept(monkeypatch, [2, 4, 6], search="halving", epochs=1)
    assert rounds == [[1, 1, 1]]


def test_equal_scores_favour_the_earlier_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "train_students", lambda works, *_: [0.5] * len(works))
    config = tiny_config(checkpoints={"search": "halving", "epochs": 90, "budget": 0.5})
    rows = sweep.sweep_checkpoints(Path("run"), Path("folder"), range(1, 10), config)
    assert [row.epoch for row in rows if row.epochs == 90] == [1, 2, 3]


def test_what_halving_costs_and_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """CAS is 0.5 + epoch / 100 at whole schedules and the reverse at short
    ones, so that halving keeps the worst two of nine."""
    whole, checkpoints = 9, range(1, 10)

    def train(works: Sequence[StudentWork], *_: Any) -> list[float]:
        signs = [1 if work.spec.epochs == whole else -1 for work in works]
        return [
            0.5 + sign * work.spec.checkpoint_epoch / 100 for sign, work in zip(signs, works, strict=True)
        ]

    def history(work: StudentWork) -> list[dict[str, float]]:
        return [{"images_seen": 10 * work.spec.epochs * tick, "seconds": work.spec.epochs} for tick in (1, 2)]

    monkeypatch.setattr(sweep, "train_students", train)
    monkeypatch.setattr(StudentWork, "history", history)
    config = tiny_config(checkpoints={"epochs": whole})
    rows = compare_search(Path("run"), Path("folder"), checkpoints, [7, 8], config)
    assert [row.seed for row in rows] == [7, 8]
    for row in rows:
        assert (row.exhaustive.epoch, row.halving.epoch) == (9, 2)
        assert row.lost_cas == pytest.approx(0.07)
        assert row.exhaustive.images_seen == 20 * 9 * 9
        assert row.halving.students == 9 + 2
        assert row.images_share == row.seconds_share == pytest.approx((9 * 1 + 2 * 9) / 81)


def test_a_round_lasts_one_epoch_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    _, rounds = swept(monkeypatch, range(1, 31), search="halving", epochs=9)
    assert rounds == [[1] * 30, [9] * 7]
    _, rounds = swept(monkeypatch, range(1, 31), search="halving", epochs=2)
    assert rounds == [[1] * 30, [2]]
