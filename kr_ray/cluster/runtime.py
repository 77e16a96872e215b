"""Joining a Ray cluster, or starting one for as long as the program runs."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kr_ray.config import ClusterConfig, ConfigError
from kr_ray.runs.artifacts import atomic_write
from kr_ray.runs.storage import RemotePath

WORKER_ENVIRONMENT = {
    # Two spinning OpenMP threads on shared cores cost 2x the wall time of one; waiting passively they gain a third.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    # The Train controller looks for reports and deaths this often; the default of 2 s would double a short stage.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Messages and progress bars for which the driver has better ones.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # A worker that was given no GPU sees none, and so computes on the CPU.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}


STORAGE_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Of the driver's environment, passed on to the workers of a cluster it joins: where the store is. Credentials are each node's own, for
whatever a job passes on can be read in its metadata."""

LOCAL_ENVIRONMENT = {
    # Nobody announces the end of one's own machine: one process less to start per training.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """Connect to Ray for the length of the block.

    `address: auto-or-local` joins RAY_ADDRESS (set by `ray job submit`) and otherwise starts a local Ray that ends with the block.
    """
    os.environ.update(WORKER_ENVIRONMENT)  # before any worker starts, for workers of a local Ray inherit it
    address = os.environ.get("RAY_ADDRESS", "local") if config.address == "auto-or-local" else config.address
    if address == "local":
        os.environ.update(LOCAL_ENVIRONMENT)
    logging.getLogger("ray").setLevel(logging.ERROR)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(
        address=address,
        include_dashboard=config.dashboard if address == "local" else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
        runtime_env=None if address == "local" else {"env_vars": WORKER_ENVIRONMENT | _storage_environment()},
        # Little goes through a laptop's object store but for streamed images: workers read the real ones from the run's storage.
        object_store_memory=256 * 2**20 if address == "local" and config.stream == "on_device" else None,
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray installs one of its own, which dies with a stack trace
    try:
        if address == "local":  # a cluster may still grow
            _check_fits(config, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


def _storage_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in STORAGE_VARIABLES if name in os.environ}


def ray_storage(folder: Path) -> dict[str, Any]:
    """Where Tune and Train keep their own files, as arguments of a RunConfig."""
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
    blind = {node["NodeManagerAddress"]: answer for node, answer in zip(nodes, answers, strict=True) if answer}
    if blind:
        said = ", ".join(f"{address} ({answer})" for address, answer in blind.items())
        remedy = (
            "give those nodes credentials and a way to the store"
            if isinstance(run, RemotePath)
            else "use --set storage=/a/folder/on/a/shared/file/system or --set storage=s3://bucket/runs"
        )
        raise ConfigError(
            f"`storage` must be seen by all {len(nodes)} nodes of the cluster, but {run} is not by {said}; {remedy}"
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
                    f"`cluster.{work}.{kind} <= {there / workers:g}` (what this machine has) must hold, but got {shown}; "
                    f"use --set cluster.{work}.{kind}={there / workers:g}, or join a cluster by RAY_ADDRESS"
                )
    if wrong:
        raise ConfigError("\n".join(wrong))
