"""What the suite of the worst-case attacks runs in a process of its own; imports no
torch, as the attacks don't, for memory is measured."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np

from kr_ray.bench.sizes import Sizes
from kr_ray.privacy.attacks import attack_scores
from kr_ray.privacy.scores import SampleScores

CLASSES = 10


def attack_canaries(sizes: Sizes) -> tuple[float, float]:
    """Seconds of the attacks and peak resident memory of this process in MB."""
    rng = np.random.default_rng(0)
    runs, canaries, classes = sizes.audit_runs, sizes.audit_canaries, CLASSES
    logits = rng.standard_normal((runs, canaries, sizes.audit_queries, classes), dtype=np.float32)
    member = rng.permuted(np.arange(runs)[:, None] % 2 == np.zeros(canaries, dtype=int), axis=0)
    labels = rng.integers(classes, size=canaries)
    samples = SampleScores(logits, labels, (labels + 1) % classes, member)
    started = time.perf_counter()
    attack_scores(samples, None)
    return time.perf_counter() - started, peak_memory_mb()


def peak_memory_mb() -> float:
    """Peak resident memory of this process; from /proc where there is one,
    for getrusage also counts what the parent had."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
