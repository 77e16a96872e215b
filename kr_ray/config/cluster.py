"""Where Ray runs, and who is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kr_ray.config.base import Resources, Section


class ClusterConfig(Section):
    """Where Ray runs. `local` starts an own Ray in this process,
    `auto` joins the one the job was submitted to."""

    address: str = "auto-or-local"
    """`auto-or-local`: join RAY_ADDRESS if set (as under `ray job submit`), else start a local Ray."""
    train: Resources = Resources(cpu=2.0)
    """Of one teacher, generator or final-student worker."""
    workers: int = Field(1, ge=1)
    """Of teacher, generator and final student, each with its slice of every batch and `train`'s resources.
    Results are those of one worker up to rounding."""
    min_workers: int = Field(0, ge=0)
    """Begin, and after a loss go on, with as few as these while no more find room
    (Ray Train's elastic training); 0: exactly `workers`."""
    trial: Resources = Resources(cpu=1.0)
    """Of one worker of a student trial, of a shadow model or attack model; fractions of a GPU are allowed."""
    trial_workers: int = Field(1, ge=1)
    """Of one student trial; several train it as they do the final
    student, in a TorchTrainer that the trial starts."""
    stream: Literal["on_device", "ray_data"] = "on_device"
    """Who makes the students' images: the training itself, between two epochs, or `makers` that send them
    through Ray Data while it trains. Both give the same students; on few CPUs the first is faster."""
    makers: int = Field(1, ge=1)
    """Of one student, with `maker`'s resources each."""
    maker: Resources = Resources(cpu=0.0)
    """Of one maker. A CPU that is asked for here must be left by the
    students (`train`, `trial`), or both wait for ever."""
    max_retries: int = Field(3, ge=0)
    """How often a training, trial or task is tried again when a worker is lost or fails."""
    dashboard: bool = False
    """Start Ray's dashboard with a local Ray."""
    listen: Literal["loopback", "all"] = "loopback"
    """Who reaches the ports of a local Ray, its metrics among them: this machine alone, or all interfaces. A
    cluster's own start decides."""

    @property
    def worker_counts(self) -> tuple[int, int]:
        """Least and most workers of a Ray Train stage."""
        return self.min_workers or self.workers, self.workers

    @model_validator(mode="after")
    def _workers_fit(self) -> ClusterConfig:
        if self.min_workers > self.workers:
            raise ValueError(
                f"`min_workers <= workers` must hold, but got min_workers={self.min_workers}, "
                f"workers={self.workers}; use 0 for a fixed number"
            )
        for name, count in (("train", self.workers), ("trial", self.trial_workers)):
            gpu, key = getattr(self, name).gpu, "workers" if name == "train" else "trial_workers"
            if count > 1 and 0 < gpu < 1:
                raise ValueError(
                    f"`{name}.gpu >= 1` (or 0) must hold with several workers, but got {key}={count}, "
                    f"{name}.gpu={gpu}; NCCL takes no two workers on one GPU: use {name}.gpu: 1, or {key}: 1"
                )
        return self


class TrackingConfig(Section):
    """Trackers beside the run's own report."""

    mlflow: str = ""
    """URI of an MLflow server, or `sqlite:////path/mlflow.db`; empty = none.
    Credentials belong in MLflow's environment variables."""
