"""Several Ray nodes on this machine (`ray.cluster_utils.Cluster`), a
driver that joins them, and ways to hurt both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from conftest import REPOSITORY
from heads import client_environment
from ray.cluster_utils import Cluster

NODE_OPTIONS = {"object_store_memory": 128 * 2**20, "include_dashboard": False}
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
    "OMP_NUM_THREADS": "1",
    # A dead node is noticed by its broken connection; these bound what is waited for otherwise.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
}


class Nodes:
    """A head and further nodes, each of its own raylet with its own workers."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, **options: Any) -> Any:
        return self.cluster.add_node(**{"num_cpus": 1} | NODE_OPTIONS | options)

    def kill(self, node: Any) -> None:
        """Kill -9 a raylet and its agents; Ray's workers end with their raylet."""
        self.cluster.remove_node(node, allow_graceful=False)

    def terminate(self, node: Any) -> None:
        """SIGTERM to a raylet, as a machine that is taken away gets it."""
        self.cluster.remove_node(node, allow_graceful=True)

    def workers(self, title: str) -> list[psutil.Process]:
        """Workers of that title on all nodes."""
        return [process for node in self.cluster.list_all_nodes() for process in workers_of(node, title)]

    def start_kr(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """`kr ARGUMENTS` as a driver of these nodes."""
        return subprocess.Popen(
            [sys.executable, "-m", "kr_ray.cli", *arguments],
            env=client_environment(**SETTINGS) | {"RAY_ADDRESS": self.address} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kr(self, *arguments: str, code: int = 0, limit_s: float = 240, **environment: str) -> str:
        """The output of `kr ARGUMENTS`, which must end with `code`."""
        return finish(self.start_kr(*arguments, **environment), code, limit_s)


def finish(driver: subprocess.Popen[str], code: int = 0, limit_s: float = 240) -> str:
    """The driver's output, once it has ended by itself with `code`."""
    try:
        output, _ = driver.communicate(timeout=limit_s)
    finally:
        driver.kill()
    assert driver.returncode == code, output
    return output


@contextmanager
def local_nodes(count: int = 1, **head_options: Any) -> Iterator[Nodes]:
    """Start a head and `count - 1` other nodes, of 1 CPU each; they end with the block."""
    before = dict(os.environ)
    os.environ.update(SETTINGS)  # workers take their raylet's environment
    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1} | NODE_OPTIONS | head_options)
        nodes = Nodes(cluster)
        try:
            for _ in range(count - 1):
                nodes.add()
            yield nodes
        finally:
            cluster.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)


def workers_of(node: Any, title: str) -> list[psutil.Process]:
    """Processes of `node` whose title begins with `ray::` and holds `title`."""
    (raylet,) = node.all_processes["raylet"]
    found = []
    for process in psutil.Process(raylet.process.pid).children(recursive=True):
        try:
            name = " ".join(process.cmdline()).strip()
        except psutil.Error:
            continue
        if name.startswith("ray::") and title in name:
            found.append(process)
    return found


def wait_until(
    condition: Callable[[], Any], driver: subprocess.Popen[str] | None = None, limit_s: float = 120.0
) -> Any:
    """The first true value of `condition`; the driver must not end before."""
    limit = time.monotonic() + limit_s
    while not (value := condition()):
        assert driver is None or driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.02)
    return value


def signal_worker(nodes: Nodes, title: str, number: int = signal.SIGKILL) -> bool:
    """Send a signal to one worker of that title on any node; False if there is none."""
    for process in nodes.workers(title):
        process.send_signal(number)
        return True
    return False


def config_file(folder: Path, raw: Mapping[str, Any]) -> str:
    """A configuration whose run is `folder`/runs/<name>."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**raw, "storage": str(folder / "runs")}))
    return str(path)
