"""What a person sees of a Tune experiment: its trials' names on the
dashboard, and how many train and how many wait."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial

from kr_ray.runs.progress import report_trials

EVERY_S = 2.0


def with_resources(trainable: type[tune.Trainable], resources: dict[str, float]) -> type[tune.Trainable]:
    """As Tune's, but the dashboard lists the actors under the class's own name."""
    wrapped: type[tune.Trainable] = tune.with_resources(trainable, resources)
    wrapped.__name__, wrapped.__qualname__ = trainable.__name__, trainable.__qualname__
    return wrapped


class TrialCounts(Callback):
    """Reports the counts of the stage in `folder` when they change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told: tuple[int, int] | None = None
        self._told_at = 0.0

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if time.monotonic() - self._told_at < EVERY_S:
            return
        states = Counter(trial.status for trial in trials)
        counts = (states[Trial.RUNNING], states[Trial.PAUSED])
        if counts != self._told:
            report_trials(self._folder, *counts)
            self._told, self._told_at = counts, time.monotonic()
