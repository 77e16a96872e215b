"""How a stage is run: skipped while its fingerprint stands, watched, on a
Ray that is started when the first stage needs it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, Self

from kr_ray.config import ClusterConfig, Config, ConfigError, Section
from kr_ray.foreign.yaml_core import write_yaml
from kr_ray.runs.artifacts import RunDirectory, atomic_write, fingerprint
from kr_ray.runs.progress import StageProgress, look_at_stage
from kr_ray.runs.results import Key, R, Result, Results
from kr_ray.runs.stages import done_once, found
from kr_ray.runs.storage import RemotePath, storage_path

WORK_VERSION = 1
"""Raised when a stage's meaning changes, so that results of an
older program are not taken for the new one's."""

LOCAL_LOOK_S, REMOTE_LOOK_S = 0.25, 4.0
"""How often a stage's progress is looked at: of a store every look is a request per unit of work."""


class Watcher(Protocol):
    """Whoever shows the run to a person."""

    def stage_started(self, stage: str) -> None: ...
    def stage_progress(self, stage: str, progress: StageProgress) -> None: ...
    def stage_finished(self, stage: str, result: Result, skipped: bool) -> None: ...
    def notice(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[R]):
    """One stage of a run, as data.

    Attributes:
        key: name and type of its result.
        after: the stages whose results it reads.
        inputs: the config's sections, and other JSON values, that decide its result beside those stages.
        check: refuses wrong inputs before Ray is started for the work.
        work: does it in the given folder, in which a killed attempt on the
            same inputs may have left something.
        units: how many units of its work report their own progress.
        wanted: whether a whole run of this configuration has it.
        workers: the resources of its workers, a key of `cluster`; None: it is done without Ray.
        resumes: whether a killed or changed attempt's files name their own inputs,
            so that they stay whatever has changed.
        reads: the splits of real images that its outputs depend on beside those of the stages before it
            (`training`, `validation`; test images decide nothing). What a result does not cover by an event
            counts as released; a stage that says nothing is taken to read all.
        stands_for: what later stages' fingerprints know of it; None: its own fingerprint.
    """

    key: Key[R]
    after: Sequence[str]
    inputs: Callable[[], Sequence[Section | Any]]
    work: Callable[[Path], R]
    check: Callable[[], None] = lambda: None
    units: Callable[[], int] = lambda: 1
    wanted: Callable[[], bool] = lambda: True
    workers: Literal["train", "trial"] | None = "trial"
    resumes: bool = False
    reads: Sequence[str] = ("training", "validation")
    stands_for: Callable[[R], str] | None = None

    @property
    def name(self) -> str:
        return self.key.name


class StageRunner:
    """Runs stages in a run's directory, which is locked within `with`, and keeps their results.

    Attributes:
        stages: all of the run by name, each after those it builds on; whoever inherits fills them in.
        results, prints, skipped: of the stages that stand: what was found, the fingerprint, and whether it
            had finished before.
    """

    def __init__(self, config: Config, watcher: Watcher) -> None:
        self.config, self.watcher = config, watcher
        self.run = RunDirectory(_storage(config) / config.name, lambda text: self.watcher.notice(text))
        self.results = Results()
        self.prints: dict[str, str] = {}
        self.skipped: dict[str, bool] = {}
        self.stages: Mapping[str, Stage[Any]] = {}
        self._connected = False

    def __enter__(self) -> Self:
        self._open = ExitStack()
        self._open.enter_context(self.run)
        self.keep_config()
        return self

    def keep_config(self) -> None:
        """Beside the results, with every default."""
        with atomic_write(self.run / "config.yaml") as temporary:
            temporary.write_text(write_yaml(self.config.model_dump(mode="json")))

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def run_stage(self, stage: Stage[R]) -> R:
        """Do the stage, unless it is done."""

        def work(folder: Path) -> R:
            stage.check()
            if stage.workers:
                self.connect()
            with self.watched(stage, folder) as clock:
                result = stage.work(folder)
            return result.model_copy(update={"wall_s": clock()})

        stamp = self.stamp(stage)
        attempt = stage.name if stage.resumes else stamp
        result, skipped = done_once(self.run, stage.name, stamp, stage.key.result, work, attempt)
        self._take_over(stage, stamp, result, skipped)
        for text in result.remarks():
            self.watcher.notice(f"{stage.name}: {text}")
        self.watcher.stage_finished(stage.name, result, skipped)
        return result

    def ancestors(self, name: str) -> set[str]:
        """The stage itself and all that it builds on, directly or not."""
        return {name}.union(*(self.ancestors(before) for before in self.stages[name].after))

    def find_finished(self) -> None:
        """Take over the results of all stages that stand, running none."""
        for name, stage in self.stages.items():
            if name != "report" and name not in self.results:
                self.take_over(stage)

    def take_over(self, stage: Stage[R]) -> bool:
        """Take over the stage's result if it has finished on what its inputs are now; runs nothing."""
        if any(name not in self.prints for name in stage.after):
            return False
        stamp = self.stamp(stage)
        result = found(self.run, stage.name, stamp, stage.key.result)
        if result is None:
            return False
        self._take_over(stage, stamp, result, skipped=True)
        return True

    def _take_over(self, stage: Stage[R], stamp: str, result: R, skipped: bool) -> None:
        self.results.keep(stage.name, result)
        self.skipped[stage.name] = skipped
        self.prints[stage.name] = stage.stands_for(result) if stage.stands_for else stamp

    def stamp(self, stage: Stage[Any]) -> str:
        """Fingerprint of all that decides the stage's result."""
        plain = [part.stamp() if isinstance(part, Section) else part for part in stage.inputs()]
        parts = [WORK_VERSION, stage.name, plain, {name: self.prints[name] for name in stage.after}]
        without_threads = fingerprint(*parts)
        if self.run.stands_since_version_0_1(stage.name, without_threads):
            return without_threads  # it knew nothing of threads
        return fingerprint(*parts, *self._threads(stage))

    def _threads(self, stage: Stage[Any]) -> list[int]:
        """CPU threads of a stage's workers, where not the default: the
        last bits of what they train depend on them."""
        if stage.workers is None:
            return []
        usual, used = (
            getattr(cluster, stage.workers).threads for cluster in (ClusterConfig(), self.config.cluster)
        )
        return [used] if used != usual else []

    @contextmanager
    def watched(self, stage: Stage[Any], folder: Path) -> Iterator[Callable[[], float]]:
        """While the block runs, keep telling status.json and the watcher how far
        it is; yields a clock of the stage's wall time."""
        started, before, over = time.monotonic(), self.run.spent_s(stage.name), threading.Event()
        look_s = REMOTE_LOOK_S if isinstance(folder, RemotePath) else LOCAL_LOOK_S

        def clock() -> float:
            return before + time.monotonic() - started

        def watch() -> None:
            beat = 0.0
            while not over.wait(look_s):
                try:
                    progress = look_at_stage(folder, stage.units(), clock())
                except (
                    OSError
                ):  # a store that failed for a minute: whoever works on the stage will find out too
                    continue
                self.watcher.stage_progress(stage.name, progress)
                if time.monotonic() - beat > 2:
                    beat = time.monotonic()
                    with suppress(OSError):
                        self.run.heartbeat(stage.name, clock(), asdict(progress))

        self.watcher.stage_started(stage.name)
        self._announce(stage.name, True)
        self.run.heartbeat(stage.name, before, asdict(StageProgress()))
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield clock
        finally:
            over.set()
            thread.join()
            self._announce(stage.name, False)

    def _announce(self, stage: str, running: bool) -> None:
        """To those who watch the cluster and not this run."""
        if self._connected:
            from kr_ray.cluster.telemetry import announce_stage

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
            "`storage` must be an absolute path on a file system that all nodes share, "
            f"but got {config.storage!r} while joining a Ray cluster; use --set "
            "storage=/shared/runs or --set storage=s3://bucket/runs"
        )
    return storage.resolve()
