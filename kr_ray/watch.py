"""`kr watch`: how far a run is, read from its status file, on any machine that sees its storage."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from kr_ray.runs.artifacts import UNREADABLE, ArtifactError, run_status
from kr_ray.runs.progress import StageProgress

STALE_S = 15.0
"""A driver stamps its status every 2 s. One that has not for this long is asked for by its lock."""

EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130, "killed": 137, UNREADABLE: 1}
"""Of a run that nobody works on any more, as a shell would give them."""


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        state: running, finished, failed, interrupted, killed or unreadable.
        stage: the one that is or was being worked on.
        progress: of that stage.
        error: why it failed.
    """

    state: str
    stage: str
    progress: StageProgress
    error: str = ""

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return EXIT_CODES.get(self.state)

    def describe(self) -> str:
        """One line for a person."""
        parts = [
            f"{self.state}: {self.stage or 'start'} {self.progress.share:.0%}",
            self.error or self.progress.describe(),
        ]
        return " · ".join(part for part in parts if part)


def look(run: Path) -> Snapshot:
    """What the run's status says now.

    Raises:
        ArtifactError: there is no such run.
    """
    if not (run / "status.json").exists():
        raise ArtifactError(f"{run} holds no run; `kr runs --storage {run.parent}` lists those there are")
    status = run_status(run, STALE_S)
    progress = StageProgress.from_status(status.fields)
    if status.state != "running":  # counts and best CAS stay true, what is going on does not
        progress = replace(progress, running=None, paused=None, images_per_second=None, eta_s=None)
    elif progress.eta_s is not None:
        progress = replace(progress, eta_s=max(0.0, progress.eta_s - (time.time() - (status.updated or 0.0))))
    return Snapshot(status.state, status.stage, progress, status.error)
