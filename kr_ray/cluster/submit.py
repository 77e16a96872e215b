"""`kr submit`: the Ray Jobs API with a `kr` command filled in. What it does, `ray job submit` does too; no protocol of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import aiohttp
from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from kr_ray.config import ConfigError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
JOB_ENVIRONMENT = {
    # `ray job stop` kills after this long; the default of 3 s can be less than a worker needs to let go of its devices.
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
}
QUIET = {
    "ray._private.runtime_env.packaging": logging.WARNING,  # a line for every ignored file; that one is large is still said
    "ray._private.runtime_env.working_dir": logging.ERROR,  # that .git is ignored
    "ray.dashboard.modules.job.sdk": logging.WARNING,  # that a log has ended
}
POLL_S = 1.0
INTERRUPTED, FAILURE = 130, 1


def entrypoint(command: str, config: str, overrides: Sequence[str], working_dir: Path) -> str:
    """The shell command of the job, run in the uploaded working directory.

    Args:
        command: name of a file in `jobs/`, with `-` for `_`.
        config: path of the configuration, inside `working_dir`.

    Raises:
        ConfigError: the entry point or the configuration would not be uploaded with `working_dir`.
    """
    job = Path("jobs") / f"{command.replace('-', '_')}.py"
    if not (working_dir / job).is_file():
        raise ConfigError(
            f"`{job}` must be in the working directory that is uploaded, but it is not in {str(working_dir)!r}; run `kr submit` in "
            "a checkout of the project, or name one with --working-dir"
        )
    path = Path(config).resolve()
    if not path.is_relative_to(working_dir.resolve()):
        raise ConfigError(
            f"the configuration must be inside the working directory that is uploaded, but {config!r} is not in "
            f"{str(working_dir)!r}; copy it there"
        )
    for file in (working_dir / job, path):
        if _is_left_out(file.resolve(), working_dir.resolve()):
            raise ConfigError(
                f"{str(file)!r} must be uploaded with the working directory, but its .gitignore or .rayignore leaves it out; move the file "
                "(configs/ is uploaded), or change that line"
            )
    options = [part for override in overrides for part in ("--set", override)]
    return shlex.join(["python", str(job), str(path.relative_to(working_dir.resolve())), *options])


def _is_left_out(file: Path, working_dir: Path) -> bool:
    """Whether Ray's upload of `working_dir` skips the file or a folder it is in, by the rules that Ray itself applies."""
    include_gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    folders = [working_dir, *reversed([f for f in file.parents if f != working_dir and f.is_relative_to(working_dir)])]
    excludes: list[Callable[[Path], bool]] = []
    for folder, below in zip(folders, [*folders[1:], file], strict=True):
        excludes += get_excludes_from_ignore_files(folder, include_gitignore, logging.getLogger(__name__))
        if any(excluded(below) for excluded in excludes):
            return True
    return False


class Submission:
    """One job on a cluster.

    Raises:
        ConnectionError: nothing answers at `address`.
        RuntimeError: the cluster refuses the submission, for instance for lack of a token (`RAY_AUTH_MODE=token`).
    """

    def __init__(self, address: str, command: str, working_dir: Path, metadata: Mapping[str, str]) -> None:
        for name, level in QUIET.items():
            logging.getLogger(name).setLevel(level)
        self._client = JobSubmissionClient(address)
        self.id = self._client.submit_job(
            entrypoint=command,
            runtime_env={"working_dir": str(working_dir), "env_vars": JOB_ENVIRONMENT},
            metadata=dict(metadata),
        )
        self.page = f"{self._client.get_address()}/#/jobs/{self.id}"

    def follow(self, write: Callable[[str], None]) -> int:
        """Hand the job's output to `write` until it ends; returns its exit code (130 if it was stopped, 1 if it has none)."""
        try:
            asyncio.run(self._tail(write))
        except (RuntimeError, aiohttp.ClientError) as error:
            write(f"(the log is interrupted, the job is not: {error}; `ray job logs {self.id}` shows all of it)\n")
        while not (job := self._details()).status.is_terminal():
            time.sleep(POLL_S)
        return _exit_code(job)

    def stop(self) -> None:
        """Ask the job to stop; it ends like after a Ctrl-C, and the next submission goes on from there."""
        self._client.stop_job(self.id)

    async def _tail(self, write: Callable[[str], None]) -> None:
        async for lines in self._client.tail_job_logs(self.id):
            write(lines)

    def _details(self) -> JobDetails:
        return self._client.get_job_info(self.id)


def _exit_code(job: JobDetails) -> int:
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return INTERRUPTED
    code = job.driver_exit_code or FAILURE
    return code if code > 0 else 128 - code  # a signal's number, as a shell would give it
