"""Ray Train around one training: a worker with its share of the
machine, checkpoints in the run's storage, retries."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.torch.config import _TorchBackend

from kr_ray.cluster.quiet import raise_as_ours
from kr_ray.cluster.runtime import ray_storage
from kr_ray.cluster.tasks import REFUSALS
from kr_ray.cluster.telemetry import Publisher
from kr_ray.compute.parallel import worker_rank
from kr_ray.config import ClusterConfig, Resources
from kr_ray.methods.interface import Part
from kr_ray.runs.artifacts import ArtifactError, load_state, read_json, read_own_json, save_state, write_json
from kr_ray.runs.attempts import stage_name
from kr_ray.runs.progress import report_progress
from kr_ray.runs.results import R
from kr_ray.runs.stages import RESULT_FILE, STATE_FILE, Row, Save, State
from kr_ray.runs.storage import remove_tree

REFUSAL_FILE = "refused.json"

Work = Callable[[State | None, Save], None]
"""Trains from a state (None: from the start) and hands every new state to `save`."""


def train_on_cluster(
    work: Work, folder: Path, resources: Resources, max_retries: int, workers: tuple[int, int] = (1, 1)
) -> None:
    """Run `work` in Ray Train workers. It resumes from the newest checkpoint below `folder`, whoever wrote
    it, on however many workers.

    Train v2 finds the checkpoints of a run of the same name and storage by itself, so neither a dead worker
    (retried here) nor a dead driver (the same command again) needs any bookkeeping of ours.

    Raises:
        Exception: what `work` raised in a worker, more than `max_retries` times.
        ray.train.TrainingFailedError: workers were lost as often.
    """

    def loop() -> None:
        newest = ray.train.get_checkpoint()
        state = None
        if newest is not None:
            with newest.as_directory() as directory:
                state = load_state(Path(directory) / STATE_FILE)
        publisher = Publisher(folder) if worker_rank() == 0 else None
        work(state, lambda state, row: _report(folder, state, row, publisher))

    run_workers(loop, folder, f"{folder.parent.name}_{stage_name(folder)}", resources, max_retries, workers)


def train_part(part: Part[R], folder: Path, cluster: ClusterConfig) -> R:
    """Train a method's part in Ray Train workers, and return what the first of them found. Raises as
    `train_on_cluster`."""

    def work(state: State | None, save: Save) -> None:
        result = part.work(folder, state, save)
        if result is not None:
            write_json(folder / RESULT_FILE, result.model_dump(mode="json", by_alias=True))

    train_on_cluster(work, folder, cluster.train, cluster.max_retries, cluster.worker_counts)
    return part.result.model_validate(read_json(folder / RESULT_FILE))


def run_workers(
    loop: Callable[[], None],
    folder: Path,
    title: str,
    resources: Resources,
    max_retries: int,
    workers: tuple[int, int],
) -> None:
    """Run `loop` in Ray Train workers, several of them joined by NCCL on GPUs and gloo
    on CPUs, and again in all of them after one has died.

    Args:
        folder: Train keeps its own files below it, in `title`.
        title: of the run in Train's metrics.
        workers: least and most; it begins, or goes on after a death, with as many as find room.

    Raises:
        Exception: what `loop` raised in a worker, more than `max_retries` times.
        ArtifactError, ConfigError, DataError: as that, but one worker alone is not tried again.
        ray.train.TrainingFailedError: workers were lost as often.
    """
    refusal = folder / REFUSAL_FILE
    least, most = workers

    def prepared_loop() -> None:
        torch.set_num_threads(resources.threads)
        if resources.gpu:
            torch.cuda.set_device(get_device())  # workers of one node see each other's devices
        with _keeping_refusals(refusal, alone=most == 1):
            loop()

    def trainer() -> TorchTrainer:
        return _Trainer(
            prepared_loop,
            torch_config=_Joined(),
            scaling_config=_scaling(resources, least, most),
            run_config=RunConfig(
                name=title,
                **ray_storage(folder),
                failure_config=FailureConfig(max_failures=max_retries),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )

    drop_damaged(folder / title)
    refusal.unlink(missing_ok=True)
    _fit(trainer, max_retries, refusal)
    if most == 1:
        _raise_refusal(refusal)
    refusal.unlink(missing_ok=True)


def _fit(trainer: Callable[[], TorchTrainer], max_retries: int, refusal: Path) -> None:
    """Let Train train, with another trainer of the same name after a loss that Train does not bear."""
    for retries_left in reversed(range(max_retries + 1)):
        try:
            trainer().fit()
            return
        except (ray.train.TrainingFailedError, RayActorError) as error:
            _raise_refusal(refusal)
            if not retries_left or not _lost_at_the_start(error):
                raise_as_ours(error)


class _Backend(_TorchBackend):
    """Train's, but a single worker joins nobody: the store at which workers meet is PyTorch's, and lets in
    whoever reaches this machine."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if len(worker_group) > 1:
            super().on_start(worker_group, backend_config)


class _Joined(TorchConfig):
    backend_cls = _Backend


class _Trainer(TorchTrainer):
    """Without Train's own Ctrl-C handler, which ends the driver with 1 and without a word: a signal means the
    same in every stage."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def _lost_at_the_start(error: BaseException | None) -> bool:
    """Whether a process ended before it was one of Train's workers, or the one that watches them did.

    Train starts again after the death of a worker, but not if it comes while it prepares one, nor after its
    controller's. Another `fit` of the same name finds the checkpoints by itself.
    """
    if isinstance(error, ray.train.ControllerError):
        error = error.controller_failure
    while error is not None and not isinstance(error, RayActorError):
        error = error.__cause__ or getattr(error, "cause", None)  # Ray's errors of tasks keep it there
    return error is not None


def _scaling(resources: Resources, least: int, most: int) -> ScalingConfig:
    return ScalingConfig(
        num_workers=most if least == most else (least, most),
        use_gpu=resources.gpu > 0,
        resources_per_worker={"CPU": resources.cpu} | ({"GPU": resources.gpu} if resources.gpu else {}),
    )


@contextmanager
def _keeping_refusals(file: Path, *, alone: bool) -> Iterator[None]:
    """Write down for the driver what this worker refuses, and end without an
    error, which Train would take for one to retry.

    Of several workers others may wait for this one: there an error
    ends them all, and the retries are Train's.
    """
    try:
        yield
    except REFUSALS as error:
        kind = next(kind for kind in REFUSALS if isinstance(error, kind))
        write_json(file, {"kind": kind.__name__, "message": str(error)})
        if not alone:
            raise


def _raise_refusal(file: Path) -> None:
    """Raise in the driver what a worker found out about a person's or a
    damaged file; Train would try such work again in vain.

    Raises:
        ArtifactError, ConfigError, DataError: as in the worker.
    """
    if file.exists():
        found = read_json(file)
        file.unlink()
        kind = next((kind for kind in REFUSALS if kind.__name__ == found["kind"]), ArtifactError)
        raise kind(found["message"]) from None


def drop_damaged(folder: Path) -> None:
    """Remove what Train keeps in `folder` if it would only refuse it, so that the training begins anew.

    It finds its checkpoints through one file, and ends where that is damaged or names what is not there.
    """
    snapshot = folder / "checkpoint_manager_snapshot.json"
    kept = read_own_json(snapshot).get("checkpoint_results")
    names = (
        [row.get("checkpoint_dir_name") if isinstance(row, dict) else None for row in kept]
        if isinstance(kept, list)
        else [None]
    )
    if snapshot.exists() and not all(isinstance(name, str) and (folder / name).exists() for name in names):
        logging.getLogger(__name__).warning("%s is damaged: the training begins anew", snapshot)
        remove_tree(folder)


def _report(folder: Path, state: State, row: Row, publisher: Publisher | None) -> None:
    """Every worker reports, as Train wants it; the states are equal, so that the
    first one's (which alone has a publisher) is kept."""
    if publisher is None:
        ray.train.report(dict(row))
        return
    with tempfile.TemporaryDirectory() as temporary:
        save_state(Path(temporary) / STATE_FILE, state)
        ray.train.report(dict(row), checkpoint=Checkpoint.from_directory(temporary))
    report_progress(folder, "train", row["share"], " · ".join(_figures(row)), **_rate(row))
    publisher.publish(row)


def _rate(row: Row) -> dict[str, float]:
    return {"images_per_second": row["images_per_second"]} if "images_per_second" in row else {}


def _figures(row: Row) -> list[str]:
    named = {
        "train_loss": "loss",
        "val_accuracy": "validation accuracy",
        "loss_d": "D loss",
        "loss_g": "G loss",
    }
    alarms = (
        [f"COLLAPSE ALARM at {row['collapse_alarms']:.0f} checkpoint(s)"]
        if row.get("collapse_alarms")
        else []
    )
    return [f"{name} {row[key]:.3f}" for key, name in named.items() if key in row] + alarms
