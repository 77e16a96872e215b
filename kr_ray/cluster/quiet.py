"""Tune's talk, silenced at its source where we report better or a person can't act on it; and its errors, in a line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import OutOfMemoryError

QUIET = ("tune", "analysis.experiment_analysis", "execution.tune_controller", "execution.experiment_state")


@contextmanager
def quiet_tune(trials: int) -> Iterator[None]:
    """Tune's settings that exist only as environment variables, and silence on what we report or replace ourselves."""
    settings = {
        "TUNE_MAX_PENDING_TRIALS_PG": str(trials),  # else a searcher of one's own is asked for one trial at a time
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard file per trial
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the one that matters is raised
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # trials are judged at rungs only
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in workers
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    # The first reports failed trials and how to restore a run, the second that the files disabled above are missing, the others every
    # trial of a dead node with a stack trace each: what a retry mends is nobody's business, and what it does not is raised.
    loggers = [logging.getLogger(f"ray.tune.{name}") for name in QUIET]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def killed_for_memory(error: BaseException | None) -> OutOfMemoryError | None:
    """Ray's error behind `error` when the node ran out of memory, else None.

    Tune takes the end of a worker that was killed for it for a bug of its own and gives up all trials with a RuntimeError, while it
    retries those of any other dead worker.
    """
    while error is not None and not isinstance(error, OutOfMemoryError):
        error = error.__cause__
    return error


def in_a_line(error: BaseException) -> str:
    """What a person needs to know of a trial's error."""
    if isinstance(error, OutOfMemoryError):
        return "Ray killed a worker because its node ran out of memory (let fewer run side by side: --set cluster.trial.cpu=2)"
    return str(error).strip().splitlines()[-1]
