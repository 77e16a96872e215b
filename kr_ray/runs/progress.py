"""How far a stage is: made of what its units of work report, kept in
status.json, shown by `kr run` and `kr watch`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kr_ray.runs.artifacts import read_own_json, write_json
from kr_ray.runs.storage import list_files

TRIALS_FILE = "trials.json"


def report_progress(folder: Path, unit: str, share: float, note: str = "", **figures: Any) -> None:
    """Say that `share` (0 to 1) of one unit of the work of the stage in
    `folder` is done; `note` is shown to the person who waits.

    `figures` are summed up below: `cas`, `images_per_second`, `pruned`.
    """
    write_json(folder / "progress" / f"{unit}.json", {"share": share, "note": note} | figures, durable=False)


def report_trials(folder: Path, running: int, paused: int) -> None:
    """Say how many trials of the stage in `folder` train and how many wait."""
    write_json(folder / TRIALS_FILE, {"running": running, "paused": paused}, durable=False)


@dataclass(frozen=True)
class UnitReport:
    """What one unit of a stage's work said last.

    Attributes:
        share: of the unit's work, 0 to 1.
        note: for the person who waits.
        cas: validation CAS at `share`, where it was measured.
        pruned: whether a scheduler stopped it early.
    """

    share: float
    note: str
    cas: float | None = None
    images_per_second: float | None = None
    pruned: bool = False


def read_progress(folder: Path) -> list[UnitReport]:
    """What all units that have begun have reported last, the latest
    first; reports that cannot be read are left out.

    They are only shown, so that a damaged one may never stop the work.
    """
    files = [file for file in list_files(folder / "progress") if not file.path.name.startswith(".")]
    found = (_report(file.path) for file in sorted(files, key=lambda file: file.mtime_ns, reverse=True))
    return [report for report in found if report]


def _report(file: Path) -> UnitReport | None:
    """A unit's report; None if it is damaged."""
    report = read_own_json(file)
    share, note, cas, rate = (report.get(key) for key in ("share", "note", "cas", "images_per_second"))
    if not (isinstance(share, (int, float)) and 0 <= share <= 1 and isinstance(note, str)):
        return None
    if not (_is_figure(cas) and _is_figure(rate)):
        return None
    return UnitReport(share, note, cas, rate, bool(report.get("pruned")))


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def _trials(folder: Path) -> dict[str, int]:
    """Counts of running and paused trials, as far as somebody has counted them."""
    counts = read_own_json(folder / TRIALS_FILE)
    return {key: count for key in ("running", "paused") if type(count := counts.get(key)) is int}


@dataclass(frozen=True)
class StageProgress:
    """A stage at one moment.

    Attributes:
        share: of the stage's work, 0 to 1.
        note: what the unit that reported last says.
        units: pieces of work (trials, shadow models) that the stage consists of.
        done: those that ended, the pruned ones included.
        pruned: those that a scheduler stopped early.
        running: those that train now, or None where nobody counts them.
        paused: those that wait for a scheduler's decision, likewise.
        best_cas: best validation CAS of those that were trained to their end, if any.
        images_per_second: of the unit that reported last, if it says so.
        eta_s: seconds until the stage ends if it goes on at its mean rate so
            far, or None before anything was measured.
    """

    share: float = 0.0
    note: str = ""
    units: int = 1
    done: int = 0
    pruned: int = 0
    running: int | None = None
    paused: int | None = None
    best_cas: float | None = None
    images_per_second: float | None = None
    eta_s: float | None = None

    @classmethod
    def from_status(cls, status: Mapping[str, Any]) -> StageProgress:
        """What status.json says."""
        known = {field.name: str if field.name == "note" else int | float | None for field in fields(cls)}
        return cls(
            **{
                key: status[key]
                for key, kind in known.items()
                if key in status and isinstance(status[key], kind)
            }
        )

    def describe(self) -> str:
        """All but the share in a few words for a person."""
        parts = []
        if self.units > 1:
            live = [
                f"{count} {what}"
                for count, what in ((self.running, "running"), (self.paused, "paused"))
                if count
            ]
            parts.append(
                ", ".join(
                    [
                        f"{self.done} of {self.units} done{f' ({self.pruned} pruned)' * bool(self.pruned)}",
                        *live,
                    ]
                )
            )
        if self.best_cas is not None:
            parts.append(f"best CAS {self.best_cas:.4f}")
        if self.images_per_second:
            parts.append(f"{self.images_per_second:,.0f} images/s{' each' * (self.units > 1)}")
        if self.eta_s is not None:
            minutes, seconds = divmod(round(self.eta_s), 60)
            parts.append(f"about {f'{minutes} min' if minutes else f'{seconds} s'} left")
        return " · ".join([*parts, self.note] if self.note else parts)


def look_at_stage(folder: Path, expected: int, spent_s: float) -> StageProgress:
    """Sum up what the units of the stage in `folder` have reported.

    Args:
        expected: how many units there will be.
        spent_s: wall seconds that the stage has taken so far.
    """
    reports = read_progress(folder)
    units = max(expected, len(reports), 1)
    share = sum(report.share for report in reports) / units
    trials = _trials(folder)
    cas = [one.cas for one in reports if one.cas is not None and one.share >= 1 and not one.pruned]
    return StageProgress(
        share=share,
        note=reports[0].note if reports else "",
        units=units,
        done=sum(report.share >= 1 for report in reports),
        pruned=sum(report.pruned for report in reports),
        running=trials.get("running"),
        paused=trials.get("paused"),
        best_cas=max(cas, default=None),
        images_per_second=reports[0].images_per_second if reports else None,
        eta_s=spent_s * (1 - share) / share if share else None,
    )
