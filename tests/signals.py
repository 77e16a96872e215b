"""A run under a signal: started, followed to a moment, hit, and looked for afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from conftest import REPOSITORY
from heads import client_environment

from kr_ray.interruption import INTERRUPTED, MESSAGE
from kr_ray.runs.progress import read_progress

GONE_AFTER_S = 10.0
"""Promised from the signal to the end of the last process."""
MOMENT_LIMIT_S = 240.0


@dataclass(frozen=True)
class Blow:
    """Signals, a moment apart, to the process or, as a terminal sends them, to its whole foreground group."""

    numbers: Sequence[signal.Signals]
    to_group: bool = False
    apart_s: float = 0.4

    def strike(self, pid: int) -> None:
        for index, number in enumerate(self.numbers):
            time.sleep(self.apart_s if index else 0)
            try:
                (os.killpg if self.to_group else os.kill)(pid, number)
            except ProcessLookupError:  # the first one was enough
                return


@dataclass
class Driver:
    """`kr ARGUMENTS` in a session of its own, and every process that comes from it, known by a mark in the
    environment."""

    arguments: Sequence[str]
    run: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        environment = client_environment(
            KR_TEST_MARK=self.mark, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1", RAY_TMPDIR="/tmp"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kr_ray.cli", *self.arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
            preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT,
                                                                                     signal.SIGHUP)],
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        path = self.run / "status.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def processes(self) -> list[psutil.Process]:
        """The driver, if it lives, and all that have come from it."""
        try:
            driver = psutil.Process(self.process.pid)
            return [driver, *driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def left(self, before: Sequence[psutil.Process]) -> list[psutil.Process]:
        """Of those that were there, and of all that carry the mark, the ones that live. (Ray's workers
        overwrite it with their title.)"""
        marked = [process for process in psutil.process_iter() if _mark_of(process) == self.mark]
        return [process for process in {*before, *marked} if _lives(process)]

    def named(self, part: str) -> bool:
        """Whether a process of the run has `part` in its command line."""
        return any(part in _command_line(process) for process in self.processes())

    def wait_for(self, moment: Callable[[Driver], bool]) -> bool:
        """Until the moment has come; False if the command ended before."""
        limit = time.monotonic() + MOMENT_LIMIT_S
        while not moment(self):
            assert time.monotonic() < limit, "the moment did not come"
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        return True

    def strike(self, blow: Blow) -> str:
        """Send the signals; the output once the process has ended as promised, with nothing of it left."""
        before, sent = self.processes(), time.monotonic()
        blow.strike(self.process.pid)
        try:
            output, _ = self.process.communicate(timeout=GONE_AFTER_S - (time.monotonic() - sent))
            assert self.process.returncode == INTERRUPTED, (self.process.returncode, output)
            while (left := self.left(before)) and time.monotonic() - sent < GONE_AFTER_S:
                time.sleep(0.1)
            assert not left, [_command_line(process) for process in left]
        finally:
            self.end(before)
        assert output.count(MESSAGE) == 1 and "Traceback" not in output, output
        return output

    def end(self, before: Sequence[psutil.Process] = ()) -> None:
        """Kill what a failed test has left."""
        for process in self.left([*before, *self.processes()]):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _mark_of(process: psutil.Process) -> str | None:
    with suppress(psutil.Error):
        return process.environ().get("KR_TEST_MARK")
    return None


def _command_line(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def in_stage(stage: str, share: float = 0.0) -> Callable[[Driver], bool]:
    """The stage is being worked on and has come so far; with share 0 it has just begun."""

    def moment(driver: Driver) -> bool:
        folder = driver.run / stage
        if driver.status().get("pid") != driver.process.pid:
            return False  # what lies there is of an earlier start
        if not (folder / "started.json").exists() or (folder / "done.json").exists():
            return False
        return not share or sum(unit.share for unit in read_progress(folder)) >= share

    return moment


def ray_starts(process_name: str) -> Callable[[Driver], bool]:
    """A process of Ray is there, and no stage on Ray has begun."""
    return lambda driver: driver.named(process_name)
