"""`kr submit`: the Ray Jobs API with a `kr` command filled in. What it does,
`ray job submit` does too; no protocol of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from ray._private import ray_constants
from ray._private.runtime_env.packaging import _get_excludes, get_excludes_from_ignore_files
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from kr_ray.config import ConfigError
from kr_ray.interruption import INTERRUPTED
from kr_ray.masking import masked
from kr_ray.silence import SWITCHES

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
JOB_ENVIRONMENT = SWITCHES | {
    # `ray job stop` kills after this long; the default of 3 s can be less
    # than a worker needs to let go of its devices.
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
}
QUIET = {
    # a line for every ignored file; that one is large is still said
    "ray._private.runtime_env.packaging": logging.WARNING,
    "ray._private.runtime_env.working_dir": logging.ERROR,  # that .git is ignored
    "ray.dashboard.modules.job.sdk": logging.WARNING,  # that a log has ended
}
POLL_S = 1.0
FAILURE = 1


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
            f"`{job}` must be in the working directory that is uploaded, but it is "
            f"not in {str(working_dir)!r}; run `kr submit` in a checkout of the "
            "project, or name one with --working-dir"
        )
    path = Path(config).resolve()
    if not path.is_relative_to(working_dir.resolve()):
        raise ConfigError(
            f"the configuration must be inside the working directory that is uploaded, but {config!r} is "
            f"not in {str(working_dir)!r}; copy it there"
        )
    for file in (job, path.relative_to(working_dir.resolve())):
        if rule := _left_out_by(working_dir.resolve(), file):
            raise ConfigError(
                f"the upload must hold `{file}`, but {rule} leaves it out; copy it to "
                "a folder that is uploaded, or change that file"
            )
    options = [part for override in overrides for part in ("--set", override)]
    return shlex.join(["python", str(job), str(path.relative_to(working_dir.resolve())), *options])


def _left_out_by(working_dir: Path, file: Path) -> str:
    """Which ignore file keeps Ray from uploading `file`, a path inside `working_dir`; empty if none does.

    As Ray's own upload looks: on the way down, each folder's ignore files count for all that lies below it.
    """
    defaults = ray_constants.get_runtime_env_default_excludes()
    rules = [(_get_excludes(working_dir, defaults), "Ray's own list")]
    gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    folder = working_dir
    for part in file.parts:
        found = get_excludes_from_ignore_files(
            folder, include_gitignore=gitignore, logger=logging.getLogger(__name__)
        )
        rules += [(rule, f"in {str(folder)!r} a .gitignore or .rayignore") for rule in found]
        folder = folder / part
        for rule, name in rules:
            if rule(folder):
                return name
    return ""


def check_address(address: str) -> str:
    """A dashboard's address.

    Raises:
        ConfigError: it is no http:// or https:// URL of a host and a port, which Ray would tell in its own
            words, or by a traceback.
    """
    try:
        parts = urlsplit(address)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no number, or none of a port
        fits = False
    if not fits or re.search(r"\s", address):
        raise ConfigError(
            "`--address` must be the URL of a dashboard, such as http://HEAD:8265, but got "
            f"{masked(address)!r}; correct it, or RAY_API_SERVER_ADDRESS"
        )
    return address


class Submission:
    """One job on a cluster.

    Raises:
        ConnectionError: nothing answers at `address`.
        RuntimeError: the cluster refuses the submission, for instance for
            lack of a token (`RAY_AUTH_MODE=token`).
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
        self.page = masked(f"{self._client.get_address()}/#/jobs/{self.id}")

    def follow(self, write: Callable[[str], None]) -> int:
        """Hand the job's output to `write` until it ends; returns its exit
        code (130 if it was stopped, 1 if it has none)."""
        try:
            asyncio.run(self._tail(write))
        except (RuntimeError, aiohttp.ClientError) as error:
            write(
                masked(
                    f"(the log is interrupted, the job is not: {error}; `ray "
                    f"job logs {self.id}` shows all of it)\n"
                )
            )
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
