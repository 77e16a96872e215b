"""`kr bench`: which suites there are, where they run, and the document they leave."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from kr_ray.bench import attacks, captured, diffusion, generation, orchestration, private, startup, training
from kr_ray.bench.document import Document, Environment, FigureRow, RateRow, SuiteFound, TimingRow
from kr_ray.bench.harness import DeviceRates, Meter, device_rates
from kr_ray.bench.materials import Bench, Found
from kr_ray.bench.sizes import CPU, GPU, Sizes
from kr_ray.compute.devices import mixed_dtype

PACKAGES = ("torch", "torchvision", "ray", "numpy", "scipy", "scikit-learn", "kr_ray")


@dataclass(frozen=True)
class Suite:
    """A group of measurements that can be asked for by name."""

    name: str
    run: Callable[[Bench], Found]
    needs_ray: bool = False
    needs_gpu: bool = False


SUITES = (
    Suite("augmentation", training.augmentation),
    Suite("classifier", training.classifier_step),
    Suite("optimiser", training.optimiser),
    Suite("private", private.dp_sgd_step),
    Suite("generator", generation.generator_iteration),
    Suite("generation", generation.generation_and_labelling),
    Suite("diffusion", diffusion.training_and_sampling),
    Suite("student", generation.gkd_student),
    Suite("sweep", orchestration.students_side_by_side, needs_ray=True),
    Suite("start-up", startup.start_up, needs_ray=True),
    Suite("graphs", captured.graphs_and_compilation, needs_gpu=True),
    Suite("attacks", attacks.attack_models),
    Suite("audit", attacks.worst_case_attacks),
)


def run_bench(
    names: Sequence[str],
    rounds: int,
    device: torch.device,
    threads: int,
    sizes: Sizes | None = None,
    tell: Callable[[str], None] = lambda text: None,
    keep: Callable[[Document], None] = lambda document: None,
) -> Document:
    """Run the suites of `names` (all, if there are none) one after another.

    Args:
        rounds: of every comparison.
        threads: of torch, in this process.
        sizes: of the work; None: those for the kind of `device`.
        tell: is told what is being measured.
        keep: is given the document after every suite.

    Returns:
        The document that README.md in this folder shows as a table.
    """
    started = time.perf_counter()
    sizes = sizes or (GPU if device.type == "cuda" else CPU)
    torch.set_num_threads(threads)
    meter = Meter(device)
    rates = device_rates(
        meter,
        mixed_dtype(device) or torch.float32,
        matrix_side=sizes.matrix_side,
        copied_bytes=sizes.copied_bytes,
    )
    document = Document(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=0.0,
        rounds=rounds,
        environment=environment(device, threads),
        rates=RateRow(rates.dtype, rates.matrix_flops, rates.copy_bytes),
    )
    with tempfile.TemporaryDirectory(prefix="kr_bench_") as folder:
        for suite in (suite for suite in SUITES if not names or suite.name in names):
            tell(f"{suite.name}: started")
            bench = Bench(meter, sizes, rounds, rates, Path(folder) / suite.name, threads)
            found = document.suites[suite.name] = _run_suite(suite, bench)
            document.seconds = time.perf_counter() - started
            keep(document)
            tell(f"{suite.name}: {found.skipped or format(found.seconds, '.0f') + ' s'}")
    return document


def _run_suite(suite: Suite, bench: Bench) -> SuiteFound:
    started = time.perf_counter()
    nothing = Found([], [])
    if suite.needs_ray and importlib.util.find_spec("ray") is None:
        return _describe(nothing, bench.rates, 0.0, "skipped: Ray is not installed")
    if suite.needs_gpu and bench.device.type != "cuda":
        return _describe(nothing, bench.rates, 0.0, "skipped: for GPUs only (--device cuda)")
    bench.folder.mkdir(parents=True)
    try:
        found, skipped = suite.run(bench), None
    except RuntimeError as error:  # what torch and Ray raise; the other suites can still be measured
        found, skipped = nothing, f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    return _describe(found, bench.rates, time.perf_counter() - started, skipped)


def _describe(found: Found, rates: DeviceRates, seconds: float, skipped: str | None) -> SuiteFound:
    return SuiteFound(
        seconds=seconds,
        skipped=skipped,
        figures=[FigureRow.of(figure) for figure in found.figures],
        timings=[TimingRow.of(timing, rates) for timing in found.timings],
        notes=list(found.notes),
    )


def environment(device: torch.device, threads: int) -> Environment:
    """Where the figures come from: processor, device, threads, versions."""
    return Environment(
        processor=processor_name(),
        cores=os.cpu_count(),
        amx=bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=threads,
        mixed_precision=str(mixed_dtype(device) or torch.float32).removeprefix("torch."),
        python=platform.python_version(),
        system=platform.platform(),
        versions={name: version for name in PACKAGES if (version := _version(name))},
    )


def processor_name() -> str:
    """As the kernel names it, with family and model, since cloud machines leave out the model's name."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
