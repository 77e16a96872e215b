"""`kr watch`: how far a run is, read from its status files, on any machine that sees its storage."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kr_ray.artifacts import ArtifactError, read_json, read_progress, run_status

STALE_S = 15.0
"""A driver stamps its status every 2 s. One that has not for this long is asked for by its lock."""

EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130, "killed": 137}
"""Of a run that nobody works on any more, as a shell would give them."""


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        state: running, finished, failed, interrupted or killed.
        stage: the one that is or was being worked on.
        share: of that stage's work, 0 to 1.
        note: latest figures, or the error.
        done: units of the stage (trials, shadow models) that ended, the pruned ones included.
        started: units that have reported and not ended; paused trials are among them.
        pruned: units that a scheduler stopped early.
        best_cas: best validation CAS of those that were trained to their end, if any.
        images_per_second: of the unit that reported last, if it says so.
        eta_s: seconds until the stage ends if it goes on at its mean rate so far, or None before anything was measured.
    """

    state: str
    stage: str
    share: float
    note: str
    done: int
    started: int
    pruned: int
    best_cas: float | None
    images_per_second: float | None
    eta_s: float | None

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return EXIT_CODES.get(self.state)


def look(run: Path) -> Snapshot:
    """What the run's files say now.

    Raises:
        ArtifactError: there is no such run.
    """
    if not (run / "status.json").exists():
        raise ArtifactError(f"{run} holds no run; `kr runs --storage {run.parent}` lists those there are")
    status = run_status(run, STALE_S)
    stage = status.get("stage", "")
    units = read_progress(run / stage) if stage else []
    whole = [unit["cas"] for unit in units if unit.get("cas") is not None and unit["share"] >= 1 and not unit.get("pruned")]
    return Snapshot(
        state=status["state"],
        stage=stage,
        share=status.get("share", 0.0),
        note=status.get("error") or status.get("note", ""),
        done=sum(unit["share"] >= 1 for unit in units),
        started=sum(unit["share"] < 1 for unit in units),
        pruned=sum(bool(unit.get("pruned")) for unit in units),
        best_cas=max(whole, default=None),
        images_per_second=units[0].get("images_per_second") if units else None,
        eta_s=_eta_s(run / stage, status) if status["state"] == "running" else None,
    )


def _eta_s(folder: Path, status: dict[str, Any]) -> float | None:
    marker, share = folder / "started.json", status.get("share", 0.0)
    if not share or not marker.exists():
        return None
    spent = float(read_json(marker)["spent_s"])
    return max(0.0, spent * (1 - share) / share - (time.time() - status["updated"]))


def describe(snapshot: Snapshot) -> str:
    """One line for a person."""
    s = snapshot
    parts = [f"{s.stage or 'start'} {s.share:.0%}"]
    if s.done + s.started > 1:
        parts.append(f"{s.done} done" + (f" ({s.pruned} pruned)" if s.pruned else "") + f", {s.started} begun")
    if s.best_cas is not None:
        parts.append(f"best CAS {s.best_cas:.4f}")
    if s.images_per_second and s.state == "running":
        parts.append(f"{s.images_per_second:,.0f} images/s")
    if s.eta_s is not None:
        minutes, seconds = divmod(round(s.eta_s), 60)
        parts.append(f"stage ends in about {f'{minutes} min' if minutes else f'{seconds} s'}")
    return " · ".join([f"{s.state}: {parts[0]}", *parts[1:], *([s.note] if s.note else [])])
