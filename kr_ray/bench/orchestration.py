"""Suites of students in other processes: two at once, and through Ray Tune against a bare pool of processes.

The bare pool and the trials of Tune do the same: load splits, teacher and checkpoint, generate, train,
validate, in processes that are new in every call, so that neither finds its kernels warm. Only Tune's trials
also save states and publish metrics, as they do in a run. Each is timed from the moment at which a worker
first looks at a student to the end of the last one; all that comes before and after is start-up and is stated
beside it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kr_ray.bench.harness import Figure, Variant, measure, ratio
from kr_ray.bench.materials import CHANNELS, NUM_CLASSES, Bench, Found, gan_config, random_images, recipe
from kr_ray.bench.sizes import Sizes
from kr_ray.classifiers.networks import new_classifier, save_classifier
from kr_ray.classifiers.ticks import Ticks
from kr_ray.config import BigGanSampling, ClassifierConfig, ClusterConfig, Resources, SynthesisConfig
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.generators.biggan.networks import Generator
from kr_ray.generators.interface import Checkpoint, checkpoint_file, save_checkpoint
from kr_ray.methods.knowledge_recycling import start_student
from kr_ray.runs.stages import WEIGHTS_FILE
from kr_ray.synthesis.student_set import StudentSpec

TICKS = Ticks(count=5, validated=(5,))
"""As the sweep of a run has them."""
Times = list[float]
"""Of one student, since the epoch: its beginning, and the end of every tick."""
STUDENTS_ON_A_GPU = 2
STUDENTS_PER_WORKER = 2


def make_run(run: Path, sizes: Sizes) -> None:
    """The files that students read: splits, a teacher, one
    checkpoint; of random images and untrained networks."""
    cpu = torch.device("cpu")
    counts = (sizes.sweep_images, sizes.sweep_images // 4, sizes.sweep_images // 4)
    train, validation, test = (random_images(count, sizes.image_size, cpu) for count in counts)
    save_splits(
        run / SPLITS_FILE, Splits("bench", tuple(str(k) for k in range(NUM_CLASSES)), train, validation, test)
    )
    save_classifier(
        run / "teacher" / WEIGHTS_FILE, new_classifier(NUM_CLASSES, CHANNELS, student_recipe(sizes), 0)
    )
    config = gan_config(sizes)
    weights = Generator(config, NUM_CLASSES, CHANNELS).folded_weights()
    save_checkpoint(run / checkpoint_file(1), Checkpoint(1, weights, 0, {}), config, NUM_CLASSES, CHANNELS)


def student_recipe(sizes: Sizes) -> ClassifierConfig:
    batch = min(sizes.steps[0][1], sizes.sweep_images)
    return recipe(width=sizes.sweep_width, batch_size=batch, min_steps=0)


def student_spec(sizes: Sizes, seed: int) -> StudentSpec:
    return StudentSpec(
        gan_config(sizes),
        1,
        SynthesisConfig(sampling=BigGanSampling(standing_batches=1)),
        sizes.sweep_epochs,
        seed,
    )


def train_bare(run: Path, sizes: Sizes, seed: int) -> Times:
    """One student in this process."""
    times = [time.time()]
    training = start_student(run, student_spec(sizes, seed), student_recipe(sizes), TICKS, None)
    while not training.finished:
        training.advance()
        times.append(time.time())
    return times


def span_s(students: Sequence[Times]) -> float:
    """Seconds from the first beginning to the last end."""
    return max(times[-1] for times in students) - min(times[0] for times in students)


def first_tick_s(times: Times) -> float:
    """Seconds to the end of the first tick: start-up of the images included."""
    return times[1] - times[0]


def later_ticks_s(times: Times) -> float:
    return times[-1] - times[1]


class _Bare:
    """Students in a pool of processes; a fresh one per call, ready before the clock starts."""

    def __init__(self, workers: int, run: Path, sizes: Sizes) -> None:
        self.workers, self.run, self.sizes = workers, run, sizes
        self.alone: list[Times] = []

    def students(self, count: int) -> Callable[[], float]:
        def work() -> float:
            jobs = [(self.run, self.sizes, seed) for seed in range(count)]
            with multiprocessing.get_context("spawn").Pool(
                min(self.workers, count), torch.set_num_threads, (1,)
            ) as pool:
                times = pool.starmap(train_bare, jobs, chunksize=1)
            self.alone += times if count == 1 else []
            return span_s(times)

        return work


class _Tuned:
    """Students as trials of Ray Tune; a fresh stage folder per call,
    as nothing of an earlier one may be found."""

    def __init__(self, run: Path, sizes: Sizes, cluster: ClusterConfig) -> None:
        self.run, self.sizes, self.cluster = run, sizes, cluster
        self.calls = itertools.count()
        self.start_up_s: list[float] = []
        self.alone: list[Times] = []

    def students(self, count: int) -> Callable[[], float]:
        from kr_ray.bench.timed_work import TimedWork
        from kr_ray.cluster.trials import train_students

        def work() -> float:
            stage = self.run / f"sweep_{self.cluster.stream}_{next(self.calls)}"
            works = [
                TimedWork(
                    self.run,
                    stage / "trials" / f"{seed}",
                    student_spec(self.sizes, seed),
                    student_recipe(self.sizes),
                    TICKS,
                    self.cluster,
                    driver=os.getpid(),
                )
                for seed in range(count)
            ]
            started = time.perf_counter()
            train_students(works, stage, self.cluster)
            times = [work.times() for work in works]
            self.alone += times if count == 1 else []
            span = span_s(times)
            self.start_up_s.append(time.perf_counter() - started - span)
            return span

        return work


def students_side_by_side(bench: Bench) -> Found:
    """Throughput of as many one-thread students as there are workers,
    and what Ray Tune adds to one and to many."""
    from kr_ray.cluster.runtime import ray_session

    sizes, on_gpu = bench.sizes, bench.device.type == "cuda"
    workers = STUDENTS_ON_A_GPU if on_gpu else os.cpu_count() or 1
    many = STUDENTS_PER_WORKER * workers
    make_run(bench.folder, sizes)
    resources = Resources(cpu=1.0, gpu=1 / workers if on_gpu else 0.0)
    cluster = ClusterConfig(train=resources, trial=resources)
    streaming = ClusterConfig(train=resources, trial=resources, stream="ray_data")
    started = time.perf_counter()
    with ray_session(streaming):
        session_s = time.perf_counter() - started
        bare = _Bare(workers, bench.folder, sizes)
        tuned, streamed = (_Tuned(bench.folder, sizes, which) for which in (cluster, streaming))
        images = sizes.sweep_images * sizes.sweep_epochs
        variants = [
            Variant(name, run, count * images, times_itself=True)
            for name, run, count in (
                ("one student in a process", bare.students(1), 1),
                (f"{workers} students in as many processes", bare.students(workers), workers),
                ("one student through Ray Tune", tuned.students(1), 1),
                ("one student through Ray Tune and Ray Data", streamed.students(1), 1),
                (f"{many} students in {workers} processes", bare.students(many), many),
                (f"{many} students through Ray Tune", tuned.students(many), many),
            )
        ]
        timings = list(measure(variants, bench.rounds, bench.meter).values())
    one, side_by_side, one_tuned, _, pooled, swept = timings
    pairs = list(zip(streamed.alone, bare.alone, strict=True))
    throughput_gain = Figure(
        f"{workers} one-thread students: throughput over one's",
        tuple(
            workers * alone / together
            for alone, together in zip(one.seconds, side_by_side.seconds, strict=True)
        ),
        "x",
        "at least",
        0.85 * workers,
    )
    return Found(
        [
            throughput_gain,
            ratio(
                f"sweep of {many} students by Ray Tune: time over a bare pool's",
                [swept],
                [pooled],
                target=1.05,
            ),
            ratio("a student through Ray Tune: time over a bare process's", [one_tuned], [one], target=1.05),
            Figure(
                "a student through Ray Tune and Ray Data, after its first tick: time over a bare process's",
                tuple(later_ticks_s(ours) / later_ticks_s(theirs) for ours, theirs in pairs),
                "x",
                "at most",
                1.10,
            ),
            Figure(
                "first tick through Ray Tune and Ray Data over a bare process's",
                tuple(first_tick_s(ours) / first_tick_s(theirs) for ours, theirs in pairs),
                "x",
            ),
            Figure("start-up of a sweep through Ray Tune", tuple(tuned.start_up_s), "s"),
        ],
        timings,
        (
            f"Ray itself started in {session_s:.1f} s, a sweep through Tune in "
            f"{statistics.median(tuned.start_up_s):.1f} s before its first and after its last student; "
            f"neither is in the ratios. A student takes {one.median_s:.1f} s.",
        ),
    )
