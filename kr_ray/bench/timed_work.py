"""A student that leaves the times at which a worker began and last saved it,
so that Ray's start-up can be told from the work."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from kr_ray.cluster.trials import StudentWork
from kr_ray.runs.stages import State


@dataclass(frozen=True)
class TimedWork(StudentWork):
    """`driver` is the process that hands the students out; what it reads of them is no work."""

    driver: int = 0

    def times(self) -> list[float]:
        """When a worker first looked at the student, and when each
        tick was saved; seconds since the epoch."""
        noted = [float(line) for line in self._times_file.read_text().split()]
        return [noted[0], *noted[-self.ticks.count :]]

    @property
    def _times_file(self) -> Path:
        return self.folder / "times.txt"

    def load(self) -> State | None:
        if os.getpid() != self.driver:
            self._note()
        return super().load()

    def save(self, state: State) -> None:
        super().save(state)
        self._note()

    def _note(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._times_file.open("a") as file:
            file.write(f"{time.time()}\n")
