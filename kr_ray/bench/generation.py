"""Suites of the generator: training iteration, generation with
labelling, and the student that is fed by it."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from kr_ray.bench.harness import Variant, absolute, measure, ratio, throughput
from kr_ray.bench.materials import (
    CHANNELS,
    NUM_CLASSES,
    Bench,
    Found,
    gan_config,
    random_images,
    recipe,
    sampler,
)
from kr_ray.bench.plain_gan import PlainGanSteps, PlainGenerator
from kr_ray.bench.training import ProductSteps
from kr_ray.classifiers.networks import new_classifier
from kr_ray.classifiers.predict import teacher_probabilities
from kr_ray.classifiers.training import ClassifierTraining, Schedule
from kr_ray.compute.devices import mixed_dtype
from kr_ray.compute.graphs import Captured, compiled, plain_calls
from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import SynthesisConfig
from kr_ray.data.augment import to_float
from kr_ray.generators.biggan.networks import Generator, to_uint8
from kr_ray.generators.biggan.training import GanTraining
from kr_ray.synthesis.stream import SyntheticSet

H200_IMAGES_PER_S = 80_000.0
"""Generated and labelled with `studiogan32` on an H200: the target there."""
H200_ITERATION_S = 20e-3
"""4 D steps and one G step at 128 channels, batch 64, on an H200: the target there."""
H200_STUDENT_S = 16.0
"""A student of width 64 on as many images as BloodMNIST has, 100 epochs, on an H200: the target there."""
IN_FLOAT32, IN_MIXED = "full", "mixed"


def generator_iteration(bench: Bench) -> Found:
    """Four D steps and one G step on fresh batches, at equal
    parameters: the product's loop against the plain one."""
    config = gan_config(bench.sizes, d_steps=4)
    images = random_images(4 * config.batch_size, config.image_size, bench.device)
    mixed = mixed_dtype(bench.device)
    trainings = {
        precision: GanTraining(
            images, NUM_CLASSES, gan_config(bench.sizes, d_steps=4, precision=precision), 0, bench.device
        )
        for precision in (IN_FLOAT32, *([IN_MIXED] if mixed else []))
    }
    one = trainings[IN_FLOAT32]
    plain = PlainGanSteps(one.generator, one.discriminator, images, config)
    what, handled = f"4 D + 1 G of {config.channels} channels, batch {config.batch_size}", len(images)
    variants = [Variant(f"{what}: plain", plain.run, handled)]
    with plain_calls():
        counts = GanTraining(images, NUM_CLASSES, config, 0, bench.device).train_epoch
    variants += [
        Variant(f"{what}: product, {p} precision", t.train_epoch, handled, counts=counts, warm_ups=5)
        for p, t in trainings.items()
    ]
    timings = list(measure(variants, bench.rounds, bench.meter).values())
    figures = [ratio(f"{what}, float32: time over the plain one's", [timings[1]], [timings[0]], target=0.70)]
    notes: tuple[str, ...] = ()
    if mixed:
        kind = str(mixed).removeprefix("torch.")
        figures.append(
            ratio(f"{what}, {kind}: time over the plain one's", [timings[2]], [timings[0]], target=0.40)
        )
    else:
        notes = (
            "No mixed precision is fast here, so that the generator's "
            "iteration was measured in float32 alone.",
        )
    if bench.device.type == "cuda":
        figures.append(throughput(f"{what}: real images", timings[-1], handled / H200_ITERATION_S))
    return Found(figures, timings, notes)


def generation_and_labelling(bench: Bench) -> Found:
    """The sampler with the teacher, against a generator that normalises
    at every forward pass and a float32 teacher."""
    sizes, device = bench.sizes, bench.device
    width = sizes.steps[0][0]
    batch_size = sizes.generation_batch
    ours = sampler(sizes, device, images=math.inf)
    labels = torch.arange(sizes.generated_images) % NUM_CLASSES
    teacher = new_classifier(NUM_CLASSES, CHANNELS, recipe(width=width), 0).eval().requires_grad_(False)
    plain_teacher = (
        new_classifier(NUM_CLASSES, CHANNELS, recipe(width=width), 0).eval().requires_grad_(False).to(device)
    )
    teacher = teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    theirs = PlainGenerator(Generator(gan_config(sizes), NUM_CLASSES, CHANNELS)).to(device).eval()
    random = seeded_generator("bench generation")
    labeller = compiled(teacher, device, math.inf, 0)
    label = Captured(partial(teacher_probabilities, labeller), device)

    def generate() -> list[Tensor]:
        parts = [ours.images(part, random) for part in labels.split(batch_size)]
        return [label(part) for part in parts]

    @torch.no_grad()
    def generate_plainly() -> list[Tensor]:
        made = []
        for part in labels.split(batch_size):
            latents = torch.randn(len(part), gan_config(sizes).latent_dim, generator=random).to(device)
            images = to_uint8(theirs(latents, part.to(device)), theirs.output)
            made.append(plain_teacher(to_float(images)).softmax(1))
        return made

    what = f"generation ({sizes.gan_channels} channels) and labelling (width {width})"
    variants = [
        Variant(f"{what}: product", generate, len(labels), counts=generate_plainly),
        Variant(f"{what}: plain", generate_plainly, len(labels)),
    ]
    timings = list(measure(variants, bench.rounds, bench.meter).values())
    target = 0.32 if mixed_dtype(device) else 0.65
    return Found(
        [
            ratio(f"{what}: time over the plain one's", [timings[0]], [timings[1]], target=target),
            throughput(what, timings[0], H200_IMAGES_PER_S if device.type == "cuda" else None),
        ],
        timings,
    )


def gkd_student(bench: Bench) -> Found:
    """A student with its regenerations, against its training on a
    fixed set and its regenerations, timed apart."""
    sizes, device = bench.sizes, bench.device
    width, batch, _ = sizes.steps[0]
    keys = recipe(width=width, batch_size=min(batch, sizes.student_images))
    epochs, every = sizes.student_epochs, sizes.regeneration_rate
    teacher = new_classifier(NUM_CLASSES, CHANNELS, keys, 0).eval().requires_grad_(False)
    teacher = teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    prior = torch.full((NUM_CLASSES,), 1 / NUM_CLASSES, dtype=torch.float64)
    synthesis = SynthesisConfig(regeneration_rate=every, batch_size=sizes.generation_batch)
    source = sampler(sizes, device, images=math.inf)

    def synthetic_set() -> SyntheticSet:
        return SyntheticSet(
            source, teacher, prior, sizes.student_images, synthesis, keys.label_smoothing, seed=0
        )

    def student() -> float:
        data = synthetic_set()
        model = new_classifier(NUM_CLASSES, CHANNELS, keys, 1)
        schedule = Schedule.of_steps(
            keys, len(data), batch=keys.batch_size, steps=epochs * (len(data) // keys.batch_size)
        )
        training = ClassifierTraining(model, data, keys, schedule, 0, device)
        return training.train_until(schedule.steps)

    def regenerations() -> None:
        data = synthetic_set()
        for epoch in range(0, epochs, every):
            data.epoch(epoch)

    alone = ProductSteps(random_images(sizes.student_images, sizes.image_size, device), keys)

    def training_alone() -> None:
        for _ in range(epochs):
            alone.run()

    handled = epochs * sizes.student_images
    warm_ups = int(device.type == "cpu")
    if (
        not warm_ups
    ):  # a whole student is too long for one, but compiling is that of its process's first students
        alone.run()
        synthetic_set().epoch(0)
    what = (
        f"GKD student of width {width}, {epochs} epochs of {sizes.student_images:,} images, "
        f"{-(-epochs // every)} regenerations"
    )
    variants = [
        Variant(what, student, handled, counted=False, warm_ups=warm_ups),
        Variant("its training alone", training_alone, handled, counted=False, warm_ups=warm_ups),
        Variant(
            "its regenerations alone",
            regenerations,
            sizes.student_images * -(-epochs // every),
            counted=False,
        ),
    ]
    timings = list(measure(variants, bench.rounds, bench.meter).values())
    figures = [ratio(f"{what}: time over its parts'", timings[:1], timings[1:], target=1.10)]
    if device.type != "cuda":
        return Found(figures, timings)
    figures.append(absolute(what, timings[0], target=H200_STUDENT_S))
    return Found(
        figures, timings, ("The GKD student is one of a sweep, whose networks have been compiled before.",)
    )
