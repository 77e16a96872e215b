"""How a stage is run: skipped while its fingerprint stands, watched, on a Ray that is started when the first stage needs it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, Self

from pydantic import BaseModel

from kr_ray.artifacts import RunDirectory, atomic_write, fingerprint
from kr_ray.config import Config, ConfigError
from kr_ray.foreign.yaml_core import write_yaml
from kr_ray.progress import StageProgress, look_at_stage
from kr_ray.storage import RemotePath, storage_path

WORK_VERSION = 1
"""Raised when a stage's meaning changes, so that results of an older program are not taken for the new one's."""

LOCAL_LOOK_S, REMOTE_LOOK_S = 0.25, 4.0
"""How often a stage's progress is looked at: of a store every look is a request per unit of work."""

Result = dict[str, Any]


class Watcher(Protocol):
    """Whoever shows the run to a person."""

    def stage_started(self, stage: str) -> None: ...
    def stage_progress(self, stage: str, progress: StageProgress) -> None: ...
    def stage_finished(self, stage: str, result: Result, skipped: bool) -> None: ...
    def notice(self, text: str) -> None: ...


class StageRunner:
    """Runs stages in a run's directory, which is locked within `with`, and keeps their results."""

    def __init__(self, config: Config, watcher: Watcher) -> None:
        self.config, self.watcher = config, watcher
        self.run = RunDirectory(_storage(config) / config.name)
        self.results: dict[str, Result] = {}
        self.prints: dict[str, str] = {}
        self.skipped: dict[str, bool] = {}
        self._connected = False

    def __enter__(self) -> Self:
        self._open = ExitStack()
        self._open.enter_context(self.run)
        with atomic_write(self.run / "config.yaml") as temporary:
            temporary.write_text(write_yaml(self.config.model_dump(mode="json")))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def _run_stage(self, stage: str, sections: list[Any], after: Sequence[str], work: Callable[[Path], Result]) -> Result:
        stamp = self.prints[stage] = self._stamp(stage, sections, after)
        result = self.run.result(stage, stamp)
        self.skipped[stage] = result is not None
        if result is None:
            folder = self._begin(stage, stamp)
            if stage not in ("data", "report"):
                self.connect()
            with self._watched(stage, folder) as clock:
                result = work(folder)
            result = result | {"wall_s": clock()}
            self.run.finish(stage, stamp, result)
        if stage == "data":
            self.prints[stage] = result["digest"]  # the same images from another place are the same data
        self.watcher.stage_finished(stage, result, self.skipped[stage])
        return result

    def _stamp(self, stage: str, sections: list[Any], after: Sequence[str]) -> str:
        plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in sections]
        return fingerprint(WORK_VERSION, stage, plain, {name: self.prints[name] for name in after})

    @contextmanager
    def _watched(self, stage: str, folder: Path) -> Iterator[Callable[[], float]]:
        """While the block runs, keep telling status.json and the watcher how far it is; yields a clock of the stage's wall time."""
        started, before, over = time.monotonic(), self.run.spent_s(stage), threading.Event()
        look_s = REMOTE_LOOK_S if isinstance(folder, RemotePath) else LOCAL_LOOK_S

        def clock() -> float:
            return before + time.monotonic() - started

        def watch() -> None:
            beat = 0.0
            while not over.wait(look_s):
                try:
                    progress = look_at_stage(folder, self._units(stage), clock())
                except OSError:  # a store that failed for a minute: whoever works on the stage will find out too
                    continue
                self.watcher.stage_progress(stage, progress)
                if time.monotonic() - beat > 2:
                    beat = time.monotonic()
                    with suppress(OSError):
                        self.run.heartbeat(stage, clock(), asdict(progress))

        self.watcher.stage_started(stage)
        self._announce(stage, True)
        self.run.heartbeat(stage, before, asdict(StageProgress()))
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield clock
        finally:
            over.set()
            thread.join()
            self._announce(stage, False)

    def _announce(self, stage: str, running: bool) -> None:
        """To those who watch the cluster and not this run."""
        if self._connected:
            from kr_ray.cluster.metrics import announce_stage

            announce_stage(self.config.name, stage, running)

    def connect(self) -> None:
        """Join or start Ray, once, when the first stage needs it."""
        from kr_ray.cluster.runtime import check_storage_shared, ray_session

        if not self._connected:
            # Starting Ray is waiting for other processes: what all stages on it need is imported meanwhile.
            importing = threading.Thread(target=import_module, args=("kr_ray.cluster.train",))
            importing.start()
            self._open.enter_context(ray_session(self.config.cluster))
            importing.join()  # two threads that import the same modules at a time can see half of one
            self._connected = True
            check_storage_shared(self.run.path)

    def _train(self, work: Any, folder: Path) -> None:
        from kr_ray.cluster.train import train_on_cluster

        cluster = self.config.cluster
        train_on_cluster(work, folder, cluster.train, cluster.max_retries, cluster.worker_counts)

    def _begin(self, stage: str, stamp: str) -> Path:
        """The stage's folder, with what an interrupted attempt on the same inputs has left."""
        return self.run.begin(stage, stamp)

    def _units(self, stage: str) -> int:
        """How many units of the stage's work report their own progress."""
        return 1


def _storage(config: Config) -> Path:
    """Where runs are kept, as an absolute path: workers have another current directory than the driver.

    Raises:
        ConfigError: a relative path on a cluster, where it would be a temporary folder of one node.
    """
    storage = storage_path(config.storage)
    joins = config.cluster.address not in ("local", "auto-or-local") or (
        config.cluster.address == "auto-or-local" and os.environ.get("RAY_ADDRESS", "local") != "local"
    )
    if joins and not storage.is_absolute():
        raise ConfigError(
            f"`storage` must be an absolute path on a file system that all nodes share, but got {config.storage!r} while joining a "
            "Ray cluster; use --set storage=/shared/runs or --set storage=s3://bucket/runs"
        )
    return storage.resolve()
