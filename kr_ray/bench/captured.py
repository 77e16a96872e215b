"""Suite for GPUs: what torch.compile and captured graphs would add to the product's eager steps.

A step here is the product's arithmetic on fixed inputs (a captured graph reads the same memory at every replay): no augmentation, no
draws, no learning-rate schedule. What pays belongs into the product; what does not, only here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kr_ray.bench.harness import Timing, Variant, measure, ratio, throughput
from kr_ray.bench.materials import CHANNELS, NUM_CLASSES, Bench, Found, gan_config, random_images, recipe
from kr_ray.config import GeneratorConfig
from kr_ray.data.augment import to_float
from kr_ray.data.images import LabelledImages
from kr_ray.devices import autocast
from kr_ray.models.biggan import Discriminator, Generator, from_uint8
from kr_ray.training.gan import discriminator_loss, generator_loss
from kr_ray.training.teacher import new_classifier

Step = Callable[[], Tensor]
WARM_UPS = 3


def captured(step: Step) -> Callable[[], None]:
    """`step` as a CUDA graph; a call replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is allocated on first use must be there before the capture
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def classifier_step(network: Any, images: LabelledImages, width: int) -> Step:
    """One gradient step of a ResNet14, compiled or not, on all of `images`; the loss."""
    keys, device = recipe(width=width), images.images.device
    inputs = to_float(images.images).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), 1e-3, keys.momentum, weight_decay=keys.weight_decay, nesterov=True, fused=True
    )
    network.train()

    def step() -> Tensor:
        with autocast(device, "mixed"):
            logits = network(inputs)
        loss = functional.cross_entropy(logits.float(), images.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), keys.clip_norm, foreach=True)
        optimizer.step()
        return loss.detach()

    return step


def gan_iteration(images: LabelledImages, config: GeneratorConfig) -> Step:
    """`d_steps` D steps and one G step, all on the same images and latents; G's loss."""
    device, labels = images.images.device, images.labels
    generator, discriminator = (kind(config, NUM_CLASSES, CHANNELS).to(device) for kind in (Generator, Discriminator))
    real = from_uint8(images.images, config.output)
    latents = torch.randn(len(images), config.latent_dim, device=device)
    betas, on_gpu = (config.beta1, config.beta2), device.type == "cuda"
    keys: dict[str, Any] = {"betas": betas, "fused": True, "capturable": on_gpu}
    optimizer_d = torch.optim.AdamW(
        discriminator.parameters(), config.learning_rate_d, weight_decay=config.d_weight_decay, **keys
    )
    optimizer_g = torch.optim.Adam(generator.parameters(), config.learning_rate_g, **keys)

    def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    def d_step() -> None:
        discriminator.refresh_spectral_norm()
        with autocast(device, "mixed"):
            with torch.no_grad():
                fake = generator(latents, labels)
            logits = discriminator(torch.cat([real, fake]), torch.cat([labels, labels]))
        on_real, on_fake = logits.chunk(2)
        update(optimizer_d, discriminator_loss(on_real, on_fake, config))

    def g_step() -> Tensor:
        discriminator.requires_grad_(False)
        discriminator.refresh_spectral_norm()
        generator.refresh_spectral_norm(iterate=False)
        with autocast(device, "mixed"):
            logits = discriminator(generator(latents, labels), labels)
        loss = update(optimizer_g, generator_loss(logits, config))
        discriminator.requires_grad_(True)
        with torch.no_grad():
            generator.refresh_spectral_norm()
        return loss

    def iteration() -> Tensor:
        for _ in range(config.d_steps):
            d_step()
        return g_step()

    return iteration


def graphs_and_compilation(bench: Bench) -> Found:
    """Eager, compiled and captured steps of the classifier; eager and captured iterations of the generator."""
    found = Found([], [])
    for width, batch, _ in bench.sizes.steps:
        images = random_images(batch, bench.sizes.image_size, bench.device)

        def network(width: int = width) -> nn.Module:
            model: nn.Module = new_classifier(NUM_CLASSES, CHANNELS, recipe(width=width), 0)
            return model.to(bench.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

        what = f"one classifier step, width {width}, batch {batch}"
        compiled = classifier_step(torch.compile(network(), mode="reduce-overhead"), images, width)
        _compare(
            bench,
            found,
            what,
            batch,
            classifier_step(network(), images, width),
            {"compiled": compiled, "captured": captured(classifier_step(network(), images, width))},
        )
    config = gan_config(bench.sizes, d_steps=4)
    images = random_images(config.batch_size, config.image_size, bench.device)
    eager, graph = gan_iteration(images, config), captured(gan_iteration(images, config))
    what = f"4 D + 1 G on fixed inputs, {config.channels} channels, batch {config.batch_size}"
    _compare(bench, found, what, 4 * config.batch_size, eager, {"captured": graph})
    return found


def _compare(bench: Bench, found: Found, what: str, images: int, eager: Step, others: dict[str, Callable[[], object]]) -> None:
    variants = [Variant(f"{what}: eager", eager, images)]
    variants += [Variant(f"{what}: {name}", run, images, counted=False) for name, run in others.items()]
    first, *rest = measure(variants, bench.rounds, bench.meter).values()
    timings: list[Timing] = [first, *(replace(timing, flops=first.flops) for timing in rest)]
    found.timings.extend(timings)
    for timing in timings:
        found.figures.append(throughput(timing.name, timing))
        if timing is not first:
            found.figures.append(ratio(f"{timing.name}: time over the eager one's", [timing], [first]))
