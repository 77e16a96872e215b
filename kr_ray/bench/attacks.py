"""Suites of the audit: attack models on shadow scores, and the
worst-case attacks on the scores of many runs."""

from __future__ import annotations

import multiprocessing
import time

import numpy as np

from kr_ray.bench.attacked import attack_canaries
from kr_ray.bench.harness import Figure
from kr_ray.bench.materials import Bench, Found
from kr_ray.bench.sizes import Sizes
from kr_ray.privacy.shadow import ShadowScores
from kr_ray.privacy.shadow_attack import fit_class_attack

SHADOWS = 10
CORE_SECONDS, AUDIT_SECONDS, AUDIT_MEMORY_MB = 90.0, 10.0, 500.0


def attack_models(bench: Bench) -> Found:
    """Logistic regression, SVC and random forest of every class on logits
    that tell next to nothing, the slowest case."""
    sizes = bench.sizes
    scores = _shadow_scores(sizes)
    started = time.process_time()
    for index in range(sizes.attack_classes):
        fit_class_attack(scores, index, 0, 0.2, 20_000)
    taken = time.process_time() - started
    what = (
        f"attack models, {sizes.attack_classes} classes x {sizes.attack_rows:,} rows x "
        f"{sizes.attack_classes} features"
    )
    return Found(
        [Figure(what, (taken,), "core-s", "at most", CORE_SECONDS)],
        [],
        ("The attack models are fitted once, not in rounds.",),
    )


def _shadow_scores(sizes: Sizes) -> list[ShadowScores]:
    rng = np.random.default_rng(0)
    rows = sizes.attack_classes * sizes.attack_rows // SHADOWS
    labels = np.arange(rows) % sizes.attack_classes
    result = []
    for shadow in range(SHADOWS):
        member = rng.permutation(rows) % 2 == 0
        logits = rng.standard_normal((rows, sizes.attack_classes)) + 0.05 * member[:, None]
        result.append(ShadowScores(shadow, logits.astype(np.float32), labels, member))
    return result


def worst_case_attacks(bench: Bench) -> Found:
    """All LiRA attacks on one group of canaries, in a fresh process, so that its peak of memory is theirs."""
    sizes = bench.sizes
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        taken = [pool.apply(attack_canaries, (sizes,)) for _ in range(bench.rounds)]
    seconds, megabytes = (tuple(column) for column in zip(*taken, strict=True))
    what = (
        f"LiRA attacks on {sizes.audit_runs} runs x "
        f"{sizes.audit_canaries} canaries x {sizes.audit_queries} queries"
    )
    return Found(
        [
            Figure(what, seconds, "s", "at most", AUDIT_SECONDS),
            Figure(f"{what}: memory of the whole process", megabytes, "MB", "at most", AUDIT_MEMORY_MB),
        ],
        [],
    )
