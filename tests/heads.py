"""A real Ray head with its dashboard on loopback, as
`ray start --head` gives a user, for as long as a block runs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

RAY = Path(sys.executable).with_name("ray")
PORT_OPTIONS = (
    "--port",
    "--dashboard-port",
    "--ray-client-server-port",
    "--dashboard-agent-listen-port",
    "--metrics-export-port",
)
START_LIMIT_S = 90


@dataclass(frozen=True)
class Head:
    """Where a started head listens, and the environment of a client of it."""

    ports: Mapping[str, int]
    environment: Mapping[str, str]
    pid: int = 0

    def kill(self) -> None:
        """Kill -9 the head and all that runs on its machine, drivers of jobs among them."""
        head = psutil.Process(self.pid)
        for process in [head, *head.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports['--dashboard-port']}"

    @property
    def metrics(self) -> str:
        return f"http://127.0.0.1:{self.ports['--metrics-export-port']}/metrics"

    def job(
        self, verb: str, *arguments: str, check: bool = False, limit_s: float = 280
    ) -> subprocess.CompletedProcess[str]:
        """`ray job VERB --address ... ARGUMENTS`."""
        command = [str(RAY), "job", verb, "--address", self.dashboard, *arguments]
        return subprocess.run(
            command, env=dict(self.environment), capture_output=True, text=True, check=check, timeout=limit_s
        )


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, held at once so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]


def client_environment(**extra: str) -> dict[str, str]:
    """This process's environment without any pointer to another
    cluster, and loopback never through a proxy."""
    plain = {
        key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "PYTHONPATH"
    }
    path = os.pathsep.join([str(RAY.parent), os.environ["PATH"]])  # the job's `python` is this one
    return (
        plain
        | {"PATH": path}
        | {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        | extra
    )


@contextmanager
def local_head(**environment: str) -> Iterator[Head]:
    """Start a head of 2 CPUs as a process group of its own; kill that group, and nothing else, at the end."""
    root = Path(tempfile.mkdtemp(prefix="kr", dir="/tmp"))  # short: a Unix socket's path holds 107 characters
    ports = dict(zip(PORT_OPTIONS, free_ports(len(PORT_OPTIONS)), strict=True))
    head = Head(ports, client_environment(RAY_AUTH_MODE="disabled") | environment)
    options = [f"{option}={port}" for option, port in ports.items()]
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            [
                str(RAY), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2",
                "--include-dashboard=true",
                "--object-store-memory=268435456", "--disable-usage-stats", f"--temp-dir={root / 'ray'}",
                *options,
            ],
            env=dict(head.environment), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_until_it_answers(head, process, root / "log")
        yield replace(head, pid=process.pid)
    finally:
        _end(process)
        shutil.rmtree(root, ignore_errors=True)


def _wait_until_it_answers(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + START_LIMIT_S
    for url in (
        f"{head.dashboard}/api/version",
        f"http://127.0.0.1:{head.ports['--dashboard-agent-listen-port']}/api/healthz",
    ):
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < limit, f"{url} does not answer\n{log.read_text()}"
            try:
                with urlopen(url, timeout=5):
                    break
            except URLError as error:
                if getattr(error, "code", None) in (401, 403):  # it is there, and wants a token
                    break
            except OSError:
                pass
            time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    for signal_, patience_s in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
        try:
            os.killpg(process.pid, signal_)
            process.wait(patience_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
