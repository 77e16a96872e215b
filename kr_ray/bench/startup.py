"""Suite of what a person waits for before anything happens: help, doctor, a run's first training step."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from kr_ray.bench.harness import Variant, absolute, measure
from kr_ray.bench.materials import Bench, Found
from kr_ray.runs.progress import read_progress

COMMAND = [sys.executable, "-c", "import sys; from kr_ray.cli import main; sys.exit(main())"]
SETTINGS = {
    "name": "startup",
    "data": {"name": "digits", "image_size": 16},
    "classifier": {"width": 8, "batch_size": 256, "min_steps": 0},
    "teacher": {"epochs": 20},
    "generator": {"architecture": "tiny16"},
    "cluster": {"train": {"cpu": 1}},
}
"""A teacher whose first tick is an epoch of four steps: what is measured
is little more than the time to the first step."""
LONGEST_S = 120.0


def command_s(*arguments: str) -> Callable[[], float]:
    """Runs `kr ARGUMENTS`, whatever it ends with; the seconds it took."""

    def run() -> float:
        started = time.perf_counter()
        subprocess.run([*COMMAND, *arguments], capture_output=True, check=False)
        return time.perf_counter() - started

    return run


def first_tick_s(folder: Path) -> float:
    """Seconds from the command to the end of the first epoch of a small
    teacher, which is more than to its first step."""
    folder.mkdir(parents=True)
    config, run = folder / "config.yaml", folder / "runs" / str(SETTINGS["name"])
    config.write_text(yaml.safe_dump({**SETTINGS, "storage": str(run.parent)}))
    started = time.perf_counter()
    driver = subprocess.Popen(
        [*COMMAND, "teacher", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(os.environ),
    )
    try:
        while not read_progress(run / "teacher"):
            if driver.poll() is not None or time.perf_counter() - started > LONGEST_S:
                output, _ = driver.communicate()
                raise RuntimeError(
                    "`kr teacher` must start training, but ended with "
                    f"{driver.returncode}: {output.decode()[-300:]}"
                )
            time.sleep(0.02)
        return time.perf_counter() - started
    finally:
        driver.terminate()
        driver.communicate()


def start_up(bench: Bench) -> Found:
    """Times of whole commands in new processes."""
    folders = iter(range(10**6))
    variants = [
        Variant("kr --help", command_s("--help"), times_itself=True),
        Variant("kr doctor", command_s("doctor"), times_itself=True),
        Variant(
            "kr teacher, to the end of its first epoch",
            lambda: first_tick_s(bench.folder / str(next(folders))),
            times_itself=True,
        ),
    ]
    timings = list(measure(variants, bench.rounds, bench.meter).values())
    targets = (0.5, 3.0, 15.0)
    return Found(
        [
            absolute(timing.name, timing, target=target)
            for timing, target in zip(timings, targets, strict=True)
        ],
        timings,
    )
