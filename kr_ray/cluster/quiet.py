"""Tune's talk, silenced at its source where we report better or a
person can't act on it; and its errors, in a line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ray.exceptions import OutOfMemoryError, RayTaskError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

from kr_ray.masking import is_secret_name

QUIET = ("tune", "analysis.experiment_analysis", "execution.tune_controller", "execution.experiment_state")


@contextmanager
def quiet_tune(trials: int) -> Iterator[None]:
    """Tune's settings that exist only as environment variables, and silence on what we report or replace
    ourselves.

    Tune copies AWS credentials from the driver into the runtime environment of its trials, which Ray logs in
    clear in a world-readable file that stays after the run. They are taken off its list: workers have their
    node's own environment or role.
    """
    settings = {
        "TUNE_MAX_PENDING_TRIALS_PG": str(
            trials
        ),  # else a searcher of one's own is asked for one trial at a time
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard file per trial
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the one that matters is raised
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # trials are judged at rungs only
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in workers
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the driver's, as SIGTERM is
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    # The first reports failed trials and how to restore a run, the second that the files disabled above are
    # missing, the others every trial of a dead node with a stack trace each: what a retry mends is nobody's
    # business, and what it does not is raised.
    loggers = [logging.getLogger(f"ray.tune.{name}") for name in QUIET]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    withheld = {name for name in ENV_VARS_TO_PROPAGATE if is_secret_name(name)}
    ENV_VARS_TO_PROPAGATE.difference_update(withheld)
    try:
        yield
    finally:
        ENV_VARS_TO_PROPAGATE.update(withheld)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def killed_for_memory(error: BaseException | None) -> OutOfMemoryError | None:
    """Ray's error behind `error` when the node ran out of memory, else None.

    Tune takes the end of a worker that was killed for it for a bug of its own and gives up all trials with a
    RuntimeError, while it retries those of any other dead worker.
    """
    while error is not None and not isinstance(error, OutOfMemoryError):
        error = error.__cause__
    return error


def raise_as_ours(error: Exception) -> NoReturn:
    """Raise what code of ours raised in a worker, without what Ray wraps around it; `error` itself where Ray
    lost a process.

    So it is told as if it had come up in the driver: an unfit image set as such, with exit code 2 and without
    Ray's traceback, which `--debug` shows as a note.
    """
    ours = _raised_by_our_code(error)
    if ours is error:
        raise error
    ours.add_note(str(error))
    raise ours from None


def _raised_by_our_code(error: BaseException) -> BaseException:
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        failure = error.worker_failures[min(error.worker_failures)]
        return _raised_by_our_code(failure) if isinstance(failure, UserExceptionWithTraceback) else error
    if isinstance(error, UserExceptionWithTraceback):
        return _raised_by_our_code(error._base_exc)
    return _raised_by_our_code(error.cause) if isinstance(error, RayTaskError) else error


def in_a_line(error: BaseException) -> str:
    """What a person needs to know of a trial's error."""
    if isinstance(error, OutOfMemoryError):
        return (
            "Ray killed a worker because its node ran out of memory (let fewer "
            "run side by side: --set cluster.trial.cpu=2)"
        )
    return str(error).strip().splitlines()[-1]
