"""Suite of the generator `edm`: its training, and drawing images in six and in ten steps."""

from __future__ import annotations

import torch

from kr_ray.bench.harness import Variant, measure, ratio, throughput
from kr_ray.bench.materials import NUM_CLASSES, Bench, Found, random_images
from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import EdmConfig, EdmSampling
from kr_ray.generators.edm.sampling import EdmSampler
from kr_ray.generators.edm.training import EdmTraining

IMAGES_PER_S = 600.0
"""Of one core, 16 px, six steps: what the generator was asked to reach."""


def training_and_sampling(bench: Bench) -> Found:
    """One epoch, and a pool's block, of the preset for 16 px on a CPU and for 32 px on a GPU."""
    on_gpu = bench.device.type == "cuda"
    preset, side = ("edm32", 32) if on_gpu else ("edm16", 16)
    config = EdmConfig.model_validate({"preset": preset, "epochs": 10**6})
    real = random_images(bench.sizes.generated_images, side, bench.device)
    training = EdmTraining(real, NUM_CLASSES, config, 0, bench.device)
    checkpoint, labels = training.checkpoint(), real.labels
    variants = [Variant(f"{preset}, {side} px: training", training.train_epoch, len(real), counted=False)]
    for steps in (6, 10):
        sampler = EdmSampler(checkpoint, EdmSampling(steps=steps), bench.device, images=10.0**9)

        def draw(sampler: EdmSampler = sampler) -> torch.Tensor:
            return sampler.images(labels, seeded_generator("bench noise"))

        variants.append(Variant(f"{preset}, {side} px: {steps} steps", draw, len(labels), counted=False))
    train, six, ten = measure(variants, bench.rounds, bench.meter).values()
    figures = [
        throughput(train.name, train),
        throughput(six.name, six, None if on_gpu else IMAGES_PER_S),
        ratio(f"{preset}, {side} px: time of six steps over that of ten", [six], [ten], target=0.7),
    ]
    return Found(figures, [train, six, ten])
