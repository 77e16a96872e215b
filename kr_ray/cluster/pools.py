"""Pools of generated images, drawn by Ray tasks before the students that share them start."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kr_ray.cluster.tasks import run_tasks
from kr_ray.compute.devices import pick_device
from kr_ray.config import ClusterConfig
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.runs.progress import report_progress
from kr_ray.synthesis.pool import Pool
from kr_ray.synthesis.student_set import StudentSpec, pools_of


def draw_pools(run: Path, specs: Iterable[StudentSpec], stage: Path, cluster: ClusterConfig) -> None:
    """Draw the pools of all students of `specs`, each once; what is there is not drawn again.

    Args:
        run: the run's directory, where pools are kept.
        stage: folder of the stage whose progress this is.
    """
    pooled = [spec for spec in specs if spec.synthesis.pool_scale]
    if not pooled:
        return
    splits = load_stored_splits(run / SPLITS_FILE)
    found = {pool.path: pool for spec in pooled for _, pool in pools_of(run, spec, splits)}
    missing = [pool for path, pool in found.items() if not path.exists()]
    tasks = [(pool, part) for pool in missing for part in range(pool.parts)]
    numbered = [(pool, part, stage, (index + 1) / len(tasks)) for index, (pool, part) in enumerate(tasks)]
    run_tasks("pool", _draw, numbered, cluster.trial, cluster.max_retries)
    for pool in missing:
        pool.join()


def _draw(pool: Pool, part: int, stage: Path, share: float) -> None:
    pool.draw_part(part, pick_device())
    report_progress(stage, "pools", share, "drawing pools of images")
