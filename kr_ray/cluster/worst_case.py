"""The worst-case audit on Ray: whole pipelines trained again, one task per run, and attacked by what they answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray

from kr_ray.artifacts import read_json, report_progress, write_json
from kr_ray.cluster.tasks import run_tasks
from kr_ray.config import Config, ConfigError, Resources
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.privacy.audit_scores import ReferenceScores, SampleScores
from kr_ray.privacy.canaries import AuditDesign, design_audit
from kr_ray.privacy.worst_case import audit_arm
from kr_ray.seeding import derive_seed
from kr_ray.training.arms import AuditPlan, RunScores, held_out_losses
from kr_ray.training.student import StudentSpec

HELD_OUT_REPEATS = 2
FEWEST_MODELS = 4
FIRST_RUNS = (0, 1)

Results = Mapping[str, dict[str, Any]]


def plan_audit(run: Path, folder: Path, config: Config, spec: StudentSpec, digest: str) -> AuditPlan:
    """Choose who is audited. For outliers this trains models, whose losses are kept in `folder`.

    Raises:
        kr_ray.data.checks.DataError: the set cannot bear as many audit samples.
    """
    splits = load_stored_splits(run / SPLITS_FILE)
    losses = _held_out(run, folder, config, digest) if config.audit.canary_kind == "outlier" else None
    design = design_audit(splits, config.audit, derive_seed(config.seed, "audit design"), losses)
    _check_batches(config, len(splits.train), design)
    return AuditPlan(run, folder, config, spec, design, digest)


def _held_out(run: Path, folder: Path, config: Config, digest: str) -> np.ndarray:
    path, stamp = folder / "held_out_losses.json", [digest, config.seed, config.classifier.model_dump(), config.teacher.model_dump()]
    if not path.exists() or read_json(path)["stamp"] != stamp:
        work = [(run, config, repeat) for repeat in range(HELD_OUT_REPEATS)]
        losses = run_tasks("held-out losses", held_out_losses, work, config.cluster.trial, config.cluster.max_retries)
        write_json(path, {"stamp": stamp, "losses": np.mean(losses, axis=0).tolist()})
    return np.array(read_json(path)["losses"])


def _check_batches(config: Config, images: int, design: AuditDesign) -> None:
    left = images - len(design.samples)
    if "kr" in config.audit.arms and left < config.generator.batch_size:
        raise ConfigError(
            f"`training images - audit samples >= generator.batch_size` must hold, but got {images} - {len(design.samples)} < "
            f"{config.generator.batch_size}; lower generator.batch_size, audit.canaries or audit.population"
        )


def train_runs(plan: AuditPlan, numbers: Sequence[int]) -> None:
    """Train the runs that have no scores yet, as many at a time as the cluster has room for."""
    cluster = plan.config.cluster

    def work(number: int) -> None:
        _train_one_run(plan, number)

    missing = [(number,) for number in numbers if plan.missing(number)]
    for number in set(numbers) - {number for (number,) in missing}:
        report_progress(plan.folder, f"run_{number:03d}", 1.0)
    run_tasks("audit run", work, missing, cluster.trial, cluster.max_retries)


def _train_one_run(plan: AuditPlan, number: int) -> None:
    """The progress of a run is the share of its arms that have been asked."""
    arms = len(plan.config.audit.arms)

    def tell(what: str) -> None:
        done = 1 - len(plan.missing(number)) / arms
        report_progress(plan.folder, f"run_{number:03d}", done, f"run {number}: {what}")

    plan.train(number, tell)
    report_progress(plan.folder, f"run_{number:03d}", 1.0, f"run {number}")


# --- cost ------------------------------------------------------------------------------------------------------------


def stage_seconds(results: Results, config: Config, spec: StudentSpec) -> float | None:
    """Seconds of one run as the finished stages of the audited run took; None where one that is needed has not run."""
    parts = {"teacher": ("teacher",), "kr": ("teacher", "generator", "student"), "student_only": ("teacher", "student")}
    needed = [stage for arm in config.audit.arms for stage in parts[arm][1 if "teacher" in config.audit.arms else 0 :]]
    raise NotImplementedError
