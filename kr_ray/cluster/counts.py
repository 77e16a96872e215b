"""How many of an experiment's trials train and how many wait, for the person who watches the run."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from kr_ray.progress import report_trials

EVERY_S = 2.0


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
