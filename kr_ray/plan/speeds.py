"""How fast a device does a run's work: measured here on the config's own
networks, or scaled from what was measured on an H200."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kr_ray.classifiers.networks import new_classifier
from kr_ray.classifiers.predict import predict_logits, teacher_probabilities
from kr_ray.classifiers.sets import FixedSet, smoothed_one_hot
from kr_ray.classifiers.training import ClassifierTraining, Schedule
from kr_ray.compute.devices import pick_device
from kr_ray.compute.graphs import plain_calls
from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import Config
from kr_ray.data.images import LabelledImages
from kr_ray.generators.interface import CountsItself, Generator, GeneratorTraining, Sampler, save_checkpoint
from kr_ray.generators.registry import generator_of
from kr_ray.plan.work import DataSize
from kr_ray.privacy.shadow import ShadowScores
from kr_ray.privacy.shadow_attack import fit_class_attack

BLOCKS, BLOCK_S = 5, 0.5
"""Every rate is the median of so many, each measured for at least
so many seconds: other programs come and go."""
BATCHES = 4
"""Of one call."""
SHADOWS = 10
MOST_ATTACK_ROWS = 4000


class Rates(Protocol):
    """Images per second of one device, and seconds of one class's attack models."""

    def training(self, batch: int) -> float: ...
    def prediction(self) -> float: ...
    def generation(self) -> float: ...
    def gan(self) -> float: ...
    def attack_s(self, rows: int) -> float: ...


@dataclass(frozen=True)
class Costs:
    """Floating-point operations per image: 2 x multiply-adds of matrix products and convolutions.

    Attributes:
        training: a classifier's gradient step.
        prediction: its forward pass.
        generation: drawing an image and labelling it.
        gan: one real image's share of the D steps and the G steps that follow them.
        classifier, generator_trained, generator_sampled: numbers of the classifier, of all networks that make
            up the generator's training, and of that one which draws.
    """

    training: float
    prediction: float
    generation: float
    gan: float
    classifier: int
    generator_trained: int
    generator_sampled: int


def count_costs(config: Config, size: DataSize) -> Costs:
    """By running each network once on a few images of the config's size."""
    with plain_calls():
        few = _Networks(config, size, torch.device("cpu"), batch=4)
        weights = (
            few.gan.parameters()
            if isinstance(few.gan, CountsItself)
            else few.generator.parameters(size.classes, size.channels)
        )
        return Costs(
            training=_count(few.train) / len(few.images),
            prediction=_count(few.predict) / len(few.images),
            generation=_count(few.generate) / few.batch,
            gan=_count(few.gan.train_epoch) / few.generator.round_images(),
            classifier=_size(few.teacher),
            generator_trained=sum(weights.values()),
            generator_sampled=next(iter(weights.values())),
        )


def _count(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


class _Networks:
    """A config's networks, untrained, on random images; each is made when it is first needed."""

    def __init__(self, config: Config, size: DataSize, device: torch.device, batch: int) -> None:
        self.config, self.size, self.device, self.batch = config, size, device, batch
        count, side = BATCHES * batch, config.data.image_size
        pixels = torch.randint(
            256, (count, size.channels, side, side), generator=seeded_generator("plan"), dtype=torch.uint8
        )
        self.images = LabelledImages(pixels, torch.arange(count) % size.classes).to(device)

    @cached_property
    def training(self) -> ClassifierTraining:
        recipe, size = self.config.classifier, self.size
        data = FixedSet(
            self.images.images, smoothed_one_hot(self.images.labels, size.classes, recipe.label_smoothing)
        )
        schedule = Schedule.of_steps(recipe, len(self.images), batch=self.batch, steps=10**9)
        return ClassifierTraining(
            new_classifier(size.classes, size.channels, recipe, 0), data, recipe, schedule, 0, self.device
        )

    @cached_property
    def generator(self) -> Generator:
        return generator_of(self.config.generator.measured(self.batch))

    @cached_property
    def gan(self) -> GeneratorTraining:
        """An epoch of it is the smallest that costs what the training costs an image."""
        index = torch.arange(self.generator.round_images(), device=self.device) % len(self.images)
        images = LabelledImages(self.images.images[index], self.images.labels[index])
        return self.generator.training(images, self.size.classes, 0, self.device)

    @cached_property
    def sampler(self) -> Sampler:
        """Of the untrained generator."""
        size, section = self.size, self.generator.section
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(
                Path(folder) / "0.safetensors", self.gan.checkpoint(), section, size.classes, size.channels
            )
            return self.generator.open(
                Path(folder) / "0.safetensors",
                self.config.synthesis.sampling,
                prior=torch.full((size.classes,), 1 / size.classes, dtype=torch.float64),
                seed=0,
                device=self.device,
                batch_size=self.batch,
                calibration_images=self.batch,
                images=math.inf,
            )

    @cached_property
    def teacher(self) -> nn.Module:
        teacher = (
            new_classifier(self.size.classes, self.size.channels, self.config.classifier, 0)
            .eval()
            .requires_grad_(False)
        )
        return teacher.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def train(self) -> None:
        """One step per batch of the images."""
        self.training.train_until(self.training.step + BATCHES)

    def predict(self) -> None:
        predict_logits(self.teacher, self.images.images, self.device)

    def generate(self) -> None:
        """One labelled batch."""
        labels = torch.arange(self.batch) % self.size.classes
        teacher_probabilities(self.teacher, self.sampler.images(labels, seeded_generator("plan images")))


class MeasuredHere:
    """Rates of this machine's device (one thread on a CPU), each measured
    for a few seconds when it is first asked for."""

    def __init__(self, config: Config, size: DataSize) -> None:
        self.config, self.size, self.device = config, size, pick_device()
        self._found: dict[str, float] = {}

    def training(self, batch: int) -> float:
        return self._rate(
            f"training in batches of {batch}", batch, lambda networks: networks.train, BATCHES * batch
        )

    def prediction(self) -> float:
        return self._rate("prediction", 256, lambda networks: networks.predict, BATCHES * 256)

    def generation(self) -> float:
        batch = self.config.synthesis.batch_size
        return self._rate("generation", batch, lambda networks: networks.generate, batch)

    def gan(self) -> float:
        batch = self.config.generator.batch_size
        images = generator_of(self.config.generator).round_images()
        return self._rate("generator training", batch, lambda networks: networks.gan.train_epoch, images)

    def attack_s(self, rows: int) -> float:
        """Of larger classes by the square of their rows, as support vector machines cost."""
        fitted = min(rows, MOST_ATTACK_ROWS)
        rng, classes = np.random.default_rng(0), self.size.classes
        each = max(4, fitted // SHADOWS)
        shadows = []
        for index in range(SHADOWS):
            member = np.arange(each) % 2 == 0
            logits = rng.normal(size=(each, classes)) + member[:, None] * 0.1
            shadows.append(ShadowScores(index, logits.astype(np.float32), np.zeros(each, np.int64), member))
        audit = self.config.audit.shadow
        started = time.perf_counter()
        fit_class_attack(shadows, 0, 0, audit.attack_holdout, audit.max_svc_rows)
        return (time.perf_counter() - started) * (rows / fitted) ** 2

    def _rate(
        self, name: str, batch: int, work_of: Callable[[_Networks], Callable[[], object]], images: int
    ) -> float:
        if name in self._found:
            return self._found[name]
        work = work_of(_Networks(self.config, self.size, self.device, batch))
        for _ in range(5 if self.device.type == "cuda" else 1):
            work()
        return self._found.setdefault(
            name, images * statistics.median(self._calls_per_second(work) for _ in range(BLOCKS))
        )

    def _calls_per_second(self, work: Callable[[], object]) -> float:
        started, calls = time.perf_counter(), 0
        while time.perf_counter() - started < BLOCK_S:
            work()
            calls += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return calls / (time.perf_counter() - started)


class ScaledFromH200:
    """Rates of a GPU by its peak, from `kr bench --device cuda` on an H200 of 26 November 2026
    (kr_ray/bench/README.md). For GPUs other than that one they are guesses: memory bandwidth and launch times
    do not scale with the peak.

    Args:
        peak_tflops: dense, half precision, with float32 sums, as the vendor states it.
        here: measures what runs on CPUs.
    """

    H200_TFLOPS = 989.0
    STEP_FLOPS_PER_S, STEP_S_PER_IMAGE = 4.09e14, 6.43e-6
    """Through the steps of ResNet14 at widths 64 (79,375 images/s) and 16
    (146,633 images/s), batch 256, compiled and captured."""
    GAN_FLOPS_PER_S = 1.174e14
    """4 D + 1 G at 128 channels, batch 64, compiled and captured: 9,034 images/s."""
    GENERATION_FLOPS_PER_S = 2.47e14
    """`studiogan32` in batches of 1,024, labelled at width 64: 91,167 images/s."""

    def __init__(self, peak_tflops: float, costs: Costs, here: MeasuredHere) -> None:
        self.speed, self.costs, self.here = peak_tflops / self.H200_TFLOPS, costs, here

    def training(self, batch: int) -> float:
        return self.speed / (
            self.costs.training / self.STEP_FLOPS_PER_S + self.STEP_S_PER_IMAGE * max(1, 256 / batch)
        )

    def prediction(self) -> float:
        return self.speed / (self.costs.prediction / self.STEP_FLOPS_PER_S + self.STEP_S_PER_IMAGE / 3)

    def generation(self) -> float:
        return self.speed * self.GENERATION_FLOPS_PER_S / self.costs.generation

    def gan(self) -> float:
        return self.speed * self.GAN_FLOPS_PER_S / self.costs.gan

    def attack_s(self, rows: int) -> float:
        return self.here.attack_s(rows)
