"""Joining a Ray cluster, or starting one for as long as the program runs."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import ray
from ray._private import ray_constants, services
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kr_ray.config import ClusterConfig, ConfigError
from kr_ray.masking import holds_secret, masked
from kr_ray.runs.artifacts import atomic_write
from kr_ray.runs.storage import RemotePath
from kr_ray.silence import SWITCHES

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

WORKER_ENVIRONMENT = {
    # Two spinning OpenMP threads on shared cores cost 2x the wall time of
    # one; waiting passively they gain a third.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    # The Train controller looks for reports and deaths this often; the
    # default of 2 s would double a short stage.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Messages and progress bars for which the driver has better ones.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # A worker that was given no GPU sees none, and so computes on the CPU.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}


STORAGE_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Of the driver's environment, passed on to the workers of a cluster it joins: where the store is.
Credentials are each node's own, for whatever a job passes on can be read in its metadata."""

LOCAL_ENVIRONMENT = {
    # Nobody announces the end of one's own machine: one process less to start per training.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
NO_WAY_OUT = dict.fromkeys(("http_proxy", "HTTP_PROXY"), "http://127.0.0.1:9") | dict.fromkeys(
    ("no_proxy", "NO_PROXY"), ""
)
"""Environment of a process whose requests end at a port of this machine on which nobody listens."""
TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Who sets one of them has decided on the token already."""


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """Connect to Ray for the length of the block.

    `address: auto-or-local` joins RAY_ADDRESS (set by `ray job submit`) and
    otherwise starts a local Ray that ends with the block.
    """
    # Before any worker starts, for workers of a local Ray inherit it.
    os.environ.update(WORKER_ENVIRONMENT | SWITCHES)
    address = os.environ.get("RAY_ADDRESS", "local") if config.address == "auto-or-local" else config.address
    local = address == "local"
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with _local_ray(config) if local else nullcontext(), _signals_kept():
            _init(address, config)
        if local:  # a cluster may still grow
            _check_fits(config, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


def _init(address: str, config: ClusterConfig) -> None:
    local = address == "local"
    if not local:
        # Else Ray refuses a variable that the job was submitted with as well, as `kr submit` does.
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    ray.init(
        address=address,
        include_dashboard=config.dashboard if local else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
        runtime_env=None if local else {"env_vars": WORKER_ENVIRONMENT | SWITCHES | _storage_environment()},
        # Little goes through a laptop's object store but for streamed images: workers read the real ones from
        # the run's storage.
        object_store_memory=256 * 2**20 if local and config.stream == "on_device" else None,
    )


@contextmanager
def _local_ray(config: ClusterConfig) -> Iterator[None]:
    """How a Ray of one's own starts: its ports on loopback only (`listen`), and each with a token of its own.

    Ray takes the machine's outward address for a node's, and then serves metrics on all interfaces without
    asking anybody for a token. Only where it thinks that clusters are not supported (its default on Windows
    and macOS) does it stay on loopback, with the same program. The token is Ray's own means against other
    users of this machine. Ray would keep it in HOME, where all runs share it; with a dashboard it still does,
    since a person must be able to enter it there (`ray get-auth-token`).
    """
    os.environ.update(LOCAL_ENVIRONMENT)
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = before and config.listen == "all"
    if not config.dashboard and not any(name in os.environ for name in TOKEN_VARIABLES):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        with _no_questions_to_clouds():
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _no_questions_to_clouds() -> Iterator[None]:
    """Ray's API server, which runs also without a dashboard, asks at the addresses at which Azure, Google and
    Amazon tell machines about themselves, whatever the switch for usage statistics says: it starts without a
    way there."""
    start = services.start_api_server

    def started_alone(*arguments: Any, **options: Any) -> Any:
        before = {name: os.environ[name] for name in NO_WAY_OUT if name in os.environ}
        os.environ.update(NO_WAY_OUT)
        try:
            return start(*arguments, **options)
        finally:
            for name in NO_WAY_OUT:
                del os.environ[name]
            os.environ.update(before)

    services.start_api_server = started_alone
    try:
        yield
    finally:
        services.start_api_server = start


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Signals stay the driver's while Ray starts.

    Ray puts a SIGTERM handler of its own in place, which ends the driver by a SystemExit: not for longer than
    it must. And a terminal that hangs up tells its whole foreground group: Ray's processes are born deaf to
    that (a blocked signal is inherited, as Ray itself uses for Ctrl-C), so that the driver can end them in
    order.

    Raises:
        KeyboardInterrupt: a signal came in that moment.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGHUP}
    )  # of this thread: others of this process still hear it
    try:
        yield
    except SystemExit as ended:
        raise KeyboardInterrupt from ended
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGTERM, on_sigterm)


def _storage_environment() -> dict[str, str]:
    """Where the store is, for the workers of a cluster.

    Raises:
        ConfigError: an address holds a password, which Ray would log with the job's environment.
    """
    found = {name: os.environ[name] for name in STORAGE_VARIABLES if name in os.environ}
    for name, value in found.items():
        if holds_secret(value):
            raise ConfigError(
                f"`{name}` must hold no user, password or token, for it travels with the "
                f"job, but got {masked(value)}; give credentials to every node "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            )
    return found


class RayStorage(TypedDict):
    """Arguments of a RunConfig; without a file system the path is this machine's or a shared one's."""

    storage_path: str
    storage_filesystem: NotRequired[FileSystem]


def ray_storage(folder: Path) -> RayStorage:
    """Where Tune and Train keep their own files."""
    if isinstance(folder, RemotePath):
        return {"storage_path": folder.key, "storage_filesystem": folder.filesystem}
    return {"storage_path": str(folder.resolve())}


def check_storage_shared(run: Path) -> None:
    """Make sure that every node of the cluster sees the run's folder.

    Raises:
        ConfigError: some do not; with their addresses.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    marker = run / ".seen_by_all_nodes"
    with atomic_write(marker) as temporary:
        temporary.write_text("")
    try:
        look = ray.remote(num_cpus=0, max_retries=3)(_look_for)
        there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        answers = ray.get([look.options(scheduling_strategy=node).remote(marker) for node in there])
    finally:
        marker.unlink(missing_ok=True)
    blind = {
        node["NodeManagerAddress"]: answer for node, answer in zip(nodes, answers, strict=True) if answer
    }
    if blind:
        said = ", ".join(f"{address} ({answer})" for address, answer in blind.items())
        remedy = (
            "give those nodes credentials and a way to the store"
            if isinstance(run, RemotePath)
            else "use --set storage=/a/folder/on/a/shared/file/system or --set storage=s3://bucket/runs"
        )
        raise ConfigError(
            f"`storage` must be seen by all {len(nodes)} nodes of the "
            f"cluster, but {run} is not by {said}; {remedy}"
        )


def _look_for(marker: Path) -> str:
    """What keeps this node from seeing the marker; empty if nothing does."""
    try:
        return "" if marker.exists() else "not there"
    except OSError as error:
        return str(error).splitlines()[0]


def _check_fits(config: ClusterConfig, available: dict[str, float]) -> None:
    """Refuse a demand that Ray would wait for for ever.

    Raises:
        ConfigError: with every demand that this machine cannot meet.
    """
    wrong = []
    for kind in ("cpu", "gpu"):
        there = available.get(kind.upper(), 0)
        for work, resources, workers in (
            ("train", config.train, config.worker_counts[0]),
            ("trial", config.trial, config.trial_workers),
        ):
            demand = getattr(resources, kind)
            if demand * workers > there:
                shown = f"{demand:g}" if workers == 1 else f"{workers} workers of {demand:g}"
                wrong.append(
                    f"`cluster.{work}.{kind} <= {there / workers:g}` (what this machine has) must hold, but "
                    f"got {shown}; use --set cluster.{work}.{kind}={there / workers:g}, or join a cluster "
                    "by RAY_ADDRESS"
                )
    if wrong:
        raise ConfigError("\n".join(wrong))
