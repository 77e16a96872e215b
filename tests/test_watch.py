"""`kr watch`: what it says of a run, from the files that a run leaves."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from kr_ray.cli import main
from kr_ray.runs.artifacts import ArtifactError, RunDirectory, write_json
from kr_ray.runs.progress import StageProgress, look_at_stage, report_progress, report_trials
from kr_ray.watch import Snapshot, look


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "a_run")


def tuning_at_a_quarter(run: RunDirectory) -> None:
    """Nine trials: one trained to its end, one pruned with a higher score, one under way, six not begun."""
    folder = run.begin("tuning", "its inputs")
    report_progress(folder, "0000", 1.0, "0000: CAS 0.800", cas=0.8, images_per_second=900.0)
    report_progress(folder, "0001", 1.0, "0001: pruned", cas=0.95, pruned=True)
    report_progress(folder, "0002", 0.25, "0002: CAS 0.700", cas=0.7, images_per_second=1234.0)
    report_trials(folder, running=1, paused=0)
    run.heartbeat("tuning", 60.0, asdict(look_at_stage(folder, 9, 60.0)))


def test_a_running_stage_in_figures(run: RunDirectory) -> None:
    with run:
        tuning_at_a_quarter(run)
        seen = look(run.path)
        assert (seen.state, seen.stage, seen.exit_code) == ("running", "tuning", None)
        progress = seen.progress
        assert (progress.units, progress.done, progress.pruned, progress.running, progress.paused) == (
            9,
            2,
            1,
            1,
            0,
        )
        assert progress.best_cas == 0.8  # a pruned trial's score is of a shorter training
        assert progress.images_per_second == 1234.0
        assert progress.eta_s == pytest.approx(180, abs=5)  # 60 s for the first quarter
        line = seen.describe()
    for part in (
        "tuning 25%",
        "2 of 9 done (1 pruned), 1 running",
        "best CAS 0.8000",
        "1,234 images/s",
        "about 3 min",
    ):
        assert part in line


def test_a_stage_that_has_measured_nothing_has_no_eta(run: RunDirectory) -> None:
    with run:
        run.heartbeat(run.begin("teacher", "its inputs").name, 0.0, asdict(StageProgress()))
        assert look(run.path).progress.eta_s is None


@pytest.mark.parametrize(
    ("error", "code", "state"),
    [
        (None, 0, "finished"),
        (ValueError("the cause"), 1, "failed"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_watching_ends_with_the_run_and_with_its_code(
    run: RunDirectory, error: BaseException | None, code: int, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run.__enter__()
    tuning_at_a_quarter(run)

    def end() -> None:
        time.sleep(0.5)
        run.__exit__(None if error is None else type(error), error, None)

    thread = threading.Thread(target=end)
    thread.start()
    assert main(["watch", "a_run", "--storage", str(run.path.parent), "--every", "0.1"]) == code
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("running: tuning 25%") and lines[-1].startswith(f"{state}: ")
    assert ("the cause" in lines[-1]) == (state == "failed")


def test_a_killed_run_is_told_from_a_silent_one(run: RunDirectory) -> None:
    run.path.mkdir()
    write_json(run / "status.json", {"state": "running", "updated": time.time()})
    assert look(run.path).state == "running"  # its driver may be busy
    write_json(run / "status.json", {"state": "running", "updated": time.time() - 60})
    assert look(run.path).exit_code == 137
    with run:
        write_json(run / "status.json", {"state": "running", "updated": time.time() - 60})
        code = (
            "from pathlib import Path; from kr_ray.watch import look; "
            f"print(look(Path({str(run.path)!r})).state)"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert other.stdout.strip() == "running"  # the lock is held


def test_an_unknown_run_is_an_error_that_names_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="kr runs"):
        look(tmp_path / "nowhere")
    assert main(["watch", "nowhere", "--storage", str(tmp_path)]) == 1


def test_an_error_is_shown_in_full() -> None:
    failed = Snapshot("failed", "teacher", StageProgress(0.5, "loss 0.3"), "no space left on device")
    assert failed.describe() == "failed: teacher 50% · no space left on device"
