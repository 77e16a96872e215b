"""What code of ours raises in a worker is told as if it had come up in the driver."""

from __future__ import annotations

import pytest
from conftest import tiny_config
from ray.exceptions import RayActorError, RayTaskError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from kr_ray.cli import _explain
from kr_ray.cluster.quiet import raise_as_ours
from kr_ray.cluster.runtime import ray_session
from kr_ray.cluster.tasks import run_tasks
from kr_ray.config import Resources
from kr_ray.data.checks import DataError


def of_task(cause: Exception) -> RayTaskError:
    """As `ray.get` raises it: an instance of both classes, with the whole traceback as its text."""
    text = f"Traceback (most recent call last):\n  File x\nDataError: {cause}"
    return RayTaskError("work", text, cause).as_instanceof_cause()


UNFIT = "`images >= 2` must hold, but got 1; give more"
WRAPPED = {
    "a task": of_task(DataError(UNFIT)),
    "a task of a task": of_task(of_task(DataError(UNFIT))),
    "a training": WorkerGroupError(
        "[Rank 0]", {0: UserExceptionWithTraceback(DataError(UNFIT), "Traceback ...")}
    ),
}


@pytest.mark.parametrize("error", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("debug", [False, True])
def test_an_unfit_input_found_in_a_worker_is_one_line_and_exit_code_2(
    error: Exception, debug: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError) as caught:
        raise_as_ours(error)
    assert _explain(caught.value, debug) == 2
    said = capsys.readouterr().err
    assert said.endswith(f"kr: {UNFIT}\n") and ("Traceback" in said) == debug


@pytest.mark.parametrize("error", [RayActorError(), WorkerGroupError("died", {0: RayActorError()})])
def test_a_lost_process_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        raise_as_ours(error)
    assert caught.value is error


def test_an_error_of_a_real_task_comes_back_as_it_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        raise DataError(UNFIT)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray_session(tiny_config().cluster), pytest.raises(DataError) as caught:
        run_tasks("work", work, [()], Resources(), 0)
    assert type(caught.value) is DataError and str(caught.value) == UNFIT
