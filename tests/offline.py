"""Commands with an empty HOME and nobody to talk to: what they write there, and how much they would have
sent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer

import pytest
from conftest import REPOSITORY

NAMESPACE = """
ip link set lo up
echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6
ip link add kr0 type veth peer name kr1 && ip link set kr1 up && ip link set kr0 up || exit 77
ip address add 192.0.2.1/24 dev kr0
ip neighbour add 192.0.2.2 lladdr 02:00:00:00:00:02 dev kr0 nud permanent
ip route add default via 192.0.2.2
"$@"
code=$?
echo "sent: $(grep kr0: /proc/net/dev)"
exit $code
"""
"""A network that ends nowhere: every packet that leaves for any other machine, a name server's too, is
counted and lost."""
SENT_PACKETS = 11
"""Field of `sent: kr0: ...` (/proc/net/dev: eight received columns come first, bytes before packets)."""


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    output: str
    files: list[str]
    """Below HOME."""
    sent: int
    """Packets for other machines; where no namespace is allowed, requests that a proxy got."""


def run_offline(command: Sequence[str], home: Path, environment: Mapping[str, str] | None = None) -> Outcome:
    """Run with HOME empty and without any setting that would silence a library."""
    home.mkdir()
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key in ("PATH", "LANG", "OMP_NUM_THREADS", "TMPDIR")
    }
    settings = inherited | {"HOME": str(home), "PYTHONPATH": str(REPOSITORY)} | dict(environment or {})
    in_namespace = namespaces_allowed()
    with recording_proxy() as (proxy, requests):
        if in_namespace:
            command = ["unshare", "-n", "sh", "-c", NAMESPACE, "sh", *command]
        else:
            settings |= {
                name: proxy
                for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY")
            }
            settings |= {"NO_PROXY": "127.0.0.1,localhost"}
        done = subprocess.run(
            command,
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=540,
        )
    output, _, counted = done.stdout.rpartition("sent: ") if in_namespace else (done.stdout, "", "")
    sent = int(counted.split()[SENT_PACKETS - 1]) if in_namespace else len(requests)
    files = sorted(str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir())
    return Outcome(done.returncode, output, files, sent)


def kr_offline(*arguments: str, home: Path, environment: Mapping[str, str] | None = None) -> Outcome:
    """`kr ARGUMENTS` so."""
    return run_offline([sys.executable, "-m", "kr_ray.cli", *arguments], home, environment)


def namespaces_allowed() -> bool:
    """Whether this machine lets the tests make a network of their own."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    tried = subprocess.run(
        ["unshare", "-n", "sh", "-c", NAMESPACE, "sh", "true"], capture_output=True, check=False
    )
    return tried.returncode == 0


@contextmanager
def recording_proxy() -> Iterator[tuple[str, list[bytes]]]:
    """A proxy on loopback that answers nothing, its URL, and the first lines of what it was asked for."""
    requests: list[bytes] = []

    class Recorder(StreamRequestHandler):
        def handle(self) -> None:
            requests.append(self.rfile.readline())

    with ThreadingTCPServer(("127.0.0.1", 0), Recorder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
        server.shutdown()


def require_no_words(outcome: Outcome) -> None:
    """The command succeeded, wrote nothing to HOME and asked nobody."""
    assert outcome.code == 0, outcome.output
    if outcome.files or outcome.sent:
        pytest.fail(f"written to HOME: {outcome.files}; sent: {outcome.sent}\n{outcome.output}")
