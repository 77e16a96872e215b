"""Suites of the classifier: augmentation, gradient step, optimiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kr_ray.bench.harness import Variant, absolute, measure, ratio, speed_ratio, throughput
from kr_ray.bench.materials import (
    CHANNELS,
    NUM_CLASSES,
    PLAIN,
    Bench,
    Found,
    gan_config,
    random_images,
    recipe,
)
from kr_ray.bench.plain_loops import PlainClassifierSteps, augment_by_loader, average_in_a_loop
from kr_ray.classifiers.networks import new_classifier
from kr_ray.classifiers.sets import FixedSet, smoothed_one_hot
from kr_ray.classifiers.training import ClassifierTraining, Schedule
from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import ClassifierConfig
from kr_ray.data.augment import crop_and_flip, to_float, trivial_augment
from kr_ray.data.images import LabelledImages
from kr_ray.generators.biggan.networks import Generator
from kr_ray.generators.ema import ExponentialAverage

H200_STEP_S = 2.6e-3
"""Of a ResNet14 of width 64 at batch 256 on an H200: the target there."""


class ProductSteps:
    """So many steps of the product's loop per call, without an end."""

    def __init__(self, images: LabelledImages, keys: ClassifierConfig) -> None:
        data = FixedSet(images.images, smoothed_one_hot(images.labels, NUM_CLASSES, keys.label_smoothing))
        schedule = Schedule.of_steps(keys, len(images), batch=keys.batch_size, steps=10**9)
        model = new_classifier(NUM_CLASSES, CHANNELS, keys, seed=0)
        self.steps = schedule.steps_per_epoch
        self.training = ClassifierTraining(model, data, keys, schedule, 0, images.images.device)

    def run(self) -> float:
        """One epoch, every call another one; its mean loss."""
        return self.training.train_until(self.training.step + self.steps)


def augmentation(bench: Bench) -> Found:
    """Crop, flip, TrivialAugment and conversion to float: in batch on the
    device, against torchvision's loader on the CPU."""
    sizes = bench.sizes
    width, batch, _ = sizes.steps[0]
    keys = recipe(width=width, batch_size=batch)
    images = random_images(sizes.augmented_images, sizes.image_size, bench.device)
    on_host = images.images[: sizes.loader_images].cpu()
    random = seeded_generator("bench augmentation")

    def augment() -> Tensor:
        cropped = crop_and_flip(images.images, keys.crop_padding, keys.horizontal_flip, random)
        return to_float(trivial_augment(cropped, random))

    count = len(images)
    timings = measure(
        [
            Variant("augmentation, in batch", augment, count, images.images.numel() * 5, counted=False),
            Variant(
                "augmentation, torchvision's loader",
                lambda: augment_by_loader(on_host, keys),
                len(on_host),
                counted=False,
            ),
            Variant(
                f"student steps of width {width}, augmentation included",
                ProductSteps(images, keys).run,
                count,
                counted=False,
            ),
        ],
        bench.rounds,
        bench.meter,
    )
    ours, theirs, steps = timings.values()
    return Found(
        [
            speed_ratio("augmentation: speed over torchvision's loader", ours, theirs, target=8),
            ratio(
                f"augmentation: share of a student step of width {width}", [ours], [steps], "at most", 0.05
            ),
        ],
        list(timings.values()),
    )


def classifier_step(bench: Bench) -> Found:
    """Forward, backward, clip and update without augmentation: the product's loop against the plain one."""
    found = Found([], [])
    for width, batch, steps in bench.sizes.steps:
        keys = recipe(width=width, batch_size=batch, **PLAIN)
        images = random_images(batch * steps, bench.sizes.image_size, bench.device)
        plain = PlainClassifierSteps(new_classifier(NUM_CLASSES, CHANNELS, keys, seed=0), images, keys)
        variants = [
            Variant(
                f"classifier of width {width}, {steps} steps of {batch}",
                ProductSteps(images, keys).run,
                len(images),
                counts=plain.run,
            ),
            Variant(f"classifier of width {width}, {steps} plain steps of {batch}", plain.run, len(images)),
        ]
        timings = measure(variants, bench.rounds, bench.meter)
        ours, theirs = timings.values()
        found.figures.append(
            ratio(f"classifier step, width {width}: time over the plain one's", [ours], [theirs], target=0.5)
        )
        if bench.device.type == "cuda":
            found.figures.append(
                throughput(f"classifier step, width {width}, batch {batch}", ours, batch / H200_STEP_S)
            )
        found.timings.extend(timings.values())
    return found


def optimiser(bench: Bench) -> Found:
    """Clipping and SGD of a classifier, Adam and the average of a generator, given gradients."""
    width, channels = bench.sizes.optimised
    keys = recipe(width=width)
    fast, slow = (_Optimised(bench, keys, channels, fused=fused) for fused in (True, False))
    # Reads and writes per weight: clipping 3, SGD with momentum 5; Adam 7, average 3.
    bytes_moved = 4 * (8 * fast.weights[0] + 10 * fast.weights[1])
    timings = measure(
        [
            Variant("optimiser, clip and average: fused", fast.run, bytes_moved=bytes_moved, counted=False),
            Variant(
                "optimiser, clip and average: for-loop", slow.run, bytes_moved=bytes_moved, counted=False
            ),
        ],
        bench.rounds,
        bench.meter,
    )
    ours, theirs = timings.values()
    return Found(
        [
            ratio("optimiser, clip and average: time over the for-loop's", [ours], [theirs], target=0.5),
            absolute("optimiser, clip and average", ours),
        ],
        list(timings.values()),
    )


class _Optimised:
    """A classifier and a generator with gradients, and all that happens to them after a backward pass."""

    def __init__(self, bench: Bench, keys: ClassifierConfig, channels: int, fused: bool) -> None:
        self.keys, self.fused = keys, fused
        gan = gan_config(bench.sizes, channels=channels)
        self.classifier = new_classifier(NUM_CLASSES, CHANNELS, keys, seed=0).to(bench.device)
        self.generator = Generator(gan, NUM_CLASSES, CHANNELS).to(bench.device)
        for parameter in [*self.classifier.parameters(), *self.generator.parameters()]:
            parameter.grad = torch.full_like(parameter, 1e-3)
        self.sgd = torch.optim.SGD(
            self.classifier.parameters(),
            1e-6,
            keys.momentum,
            weight_decay=keys.weight_decay,
            nesterov=True,
            fused=fused,
            foreach=False,
        )
        betas = (gan.beta1, gan.beta2)
        self.adam = torch.optim.Adam(self.generator.parameters(), 1e-6, betas, fused=fused, foreach=False)
        self.average = ExponentialAverage(self.generator.folded_weights(), half_life=1e6, rampup=0.05)
        self.weight = torch.full((), 1e-4, dtype=torch.float64, device=bench.device)

    @property
    def weights(self) -> tuple[int, int]:
        """Numbers of the classifier's and the generator's weights."""
        classifier, generator = (
            sum(p.numel() for p in n.parameters()) for n in (self.classifier, self.generator)
        )
        return classifier, generator

    def run(self) -> None:
        nn.utils.clip_grad_norm_(self.classifier.parameters(), self.keys.clip_norm, foreach=self.fused)
        self.sgd.step()
        self.adam.step()
        if self.fused:
            self.average.update(self.generator.folded_weights(), self.weight)
        else:
            average_in_a_loop(self.average.average, self.generator.folded_weights(), decay=0.9999)
