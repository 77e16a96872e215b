"""Suite for GPUs: the product's steps called one kernel at a time,
replayed as graphs, and compiled as well."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from kr_ray.bench.harness import Figure, Timing, Variant, measure, ratio, throughput
from kr_ray.bench.materials import NUM_CLASSES, PLAIN, Bench, Found, gan_config, random_images, recipe
from kr_ray.bench.training import ProductSteps
from kr_ray.compute import graphs
from kr_ray.generators.biggan.training import GanTraining

WAYS: dict[str, tuple[bool, str]] = {
    "plain": (False, "never"),
    "captured": (True, "never"),
    "compiled and captured": (True, "always"),
}
"""Whether steps are captured in graphs, and when they are compiled."""
WARM_UPS = 5


def graphs_and_compilation(bench: Bench) -> Found:
    """The classifier's steps, the generator's iterations and generation with labelling, each in every way."""
    found, sizes = Found([], []), bench.sizes
    for width, batch, steps in sizes.steps:
        keys = recipe(width=width, batch_size=batch, **PLAIN)
        images = random_images(batch * steps, sizes.image_size, bench.device)
        what = f"{steps} steps of {batch}, width {width}"
        _compare(bench, found, what, len(images), partial(ProductSteps, images, keys))
    config = gan_config(sizes, d_steps=4)
    real = random_images(4 * config.batch_size, config.image_size, bench.device)
    what = f"4 D + 1 G, {config.channels} channels, batch {config.batch_size}"
    _compare(bench, found, what, len(real), partial(GanTraining, real, NUM_CLASSES, config, 0, bench.device))
    return found


def _compare(
    bench: Bench, found: Found, what: str, images: int, make: Callable[[], ProductSteps | GanTraining]
) -> None:
    variants = []
    for way, (capture, compile_when) in WAYS.items():
        with graphs.policy(capture=capture, compile=compile_when):
            training = make()
        run = training.run if isinstance(training, ProductSteps) else training.train_epoch
        started = time.perf_counter()
        run()
        found.figures.append(Figure(f"{what}, {way}: the first call", (time.perf_counter() - started,), "s"))
        variants.append(Variant(f"{what}, {way}", run, images, counted=way == "plain", warm_ups=WARM_UPS))
    first, *rest = measure(variants, bench.rounds, bench.meter).values()
    timings: list[Timing] = [first, *(replace(timing, flops=first.flops) for timing in rest)]
    found.timings.extend(timings)
    for timing in timings:
        found.figures.append(throughput(timing.name, timing))
        if timing is not first:
            found.figures.append(ratio(f"{timing.name}: time over the plain one's", [timing], [first]))
