"""Signals, on programs without Ray: whatever the main thread is doing, and however often they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

from kr_ray.interruption import INTERRUPTED, MESSAGE, SIGNALS

PATIENCE_S = 1.5
PROGRAM = """
import signal, sys, time
from pathlib import Path
from kr_ray import cli, commands

folder = Path(sys.argv[1])

def ready():
    (folder / "ready").touch()

def work(parsed):
{work}
    return 0

commands.runs, cli.PATIENCE_S = work, {patience_s}
sys.exit(cli.main(["runs"]))
"""

BUSY = """
    ready()
    while True: pass
"""
DEAF = """
    import hashlib
    ready()
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)  # no handler runs until it returns
"""
SWALLOWING = """
    ready()
    while True:
        try: time.sleep(60)
        except BaseException: pass
"""
TAKEN_OVER = """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(1))  # as Ray and Ray Train do
    ready()
    time.sleep(60)
"""
TRANSLATING = """
    ready()
    try: time.sleep(60)
    except KeyboardInterrupt: raise RuntimeError("the workers did not answer") from None
"""
TIDYING = """
    try:
        ready()
        time.sleep(60)
    finally:
        time.sleep(0.7)
        (folder / "tidy").touch()
"""


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A test that fails must not leave a busy process behind."""
    yield
    while STARTED:
        STARTED.pop().kill()


def start(
    folder: Path, work: str, patience_s: float | None = PATIENCE_S, **options: object
) -> subprocess.Popen[str]:
    """The program, once it has come to its work."""
    program = PROGRAM.format(work=work.strip("\n"), patience_s=patience_s)
    command = [sys.executable, "-c", program, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )  # type: ignore[call-overload]
    STARTED.append(process)
    wait_for(folder / "ready")
    return process


def wait_for(file: Path) -> None:
    limit = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "work", [BUSY, DEAF, SWALLOWING, TAKEN_OVER, TRANSLATING, TIDYING],
    ids=["busy", "deaf", "swallowing", "taken over", "translating", "tidying"],
)  # fmt: skip
def test_every_signal_ends_every_kind_of_work_with_130_and_one_sentence(
    tmp_path: Path, work: str, number: signal.Signals
) -> None:
    process = start(tmp_path, work)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (INTERRUPTED, f"kr: {MESSAGE}\n")


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGHUP)])
def test_a_second_signal_does_not_break_off_the_tidying(
    tmp_path: Path, numbers: tuple[signal.Signals, ...]
) -> None:
    process = start(tmp_path, TIDYING)
    for number in numbers:
        os.killpg(process.pid, number)
        time.sleep(0.2)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (INTERRUPTED, f"kr: {MESSAGE}\n") and (tmp_path / "tidy").exists()


def test_a_tidy_end_does_not_wait_for_the_patience(tmp_path: Path) -> None:
    process = start(tmp_path, BUSY)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - sent < PATIENCE_S


def test_a_hang_up_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """nohup."""
    process = start(
        tmp_path,
        "    ready(); time.sleep(1)",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "")


def test_a_terminal_that_is_gone_changes_no_exit_code(tmp_path: Path) -> None:
    process = start(tmp_path, BUSY)
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == INTERRUPTED


def test_handlers_are_as_before_after_a_command() -> None:
    from kr_ray.cli import main

    before = [signal.getsignal(number) for number in SIGNALS]
    assert main(["runs", "--storage", "/nowhere"]) == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before and signal.set_wakeup_fd(-1) == -1


SUBMITTING = """
    for _ in range(2):
        try:
            ready()
            time.sleep(60)
        except KeyboardInterrupt:
            (folder / "asked").touch()
    return 0
"""


def test_a_command_with_an_answer_of_its_own_is_asked_every_time_and_keeps_its_exit_code(
    tmp_path: Path,
) -> None:
    """`kr submit`: the first Ctrl-C stops the job, the second leaves it alone."""
    process = start(tmp_path, SUBMITTING, patience_s=None)
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "asked")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "")


def test_a_terminal_that_hangs_up_does_not_stop_a_job(tmp_path: Path) -> None:
    process = start(tmp_path, SUBMITTING, patience_s=None)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == -signal.SIGHUP and not (tmp_path / "asked").exists()
