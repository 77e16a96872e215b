"""The adversarial training of BigGAN-Deep (Knowledge Recycling, section 3.2 and Table 3)."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kr_ray.compute.devices import autocast, gradient_scaler
from kr_ray.compute.graphs import Captured, compiled
from kr_ray.compute.parallel import (
    average,
    average_gradients,
    check_batch,
    join_norms,
    own_slice,
    slice_weight,
)
from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import BigGanConfig
from kr_ray.data.images import LabelledImages
from kr_ray.generators.biggan.networks import Discriminator, Generator, from_uint8
from kr_ray.generators.biggan.spectral_norm import SpectralNetwork
from kr_ray.generators.ema import ExponentialAverage, half_life_in_images
from kr_ray.generators.interface import Checkpoint
from kr_ray.runs.stages import State

COMPILING_PAYS_FROM = 1e6
"""Real images: compiling both networks took 57 s on an H200 and saved 24
ms of 4 D + 1 G steps of 64 at 128 channels."""


class GanTraining:
    """Both networks, their optimisers and the average, advanced epoch by epoch.

    One epoch is one pass of D over the images (the last incomplete batch of each pass is left out); every D
    step takes a fresh real batch, and every `config.d_steps` D steps are followed by one G step, counted
    across epochs.

    Raises:
        ValueError: the images do not have the generator's size.

    Within torch.distributed every worker takes its slice of each batch; gradients
    and G's batch-norm statistics are the whole batch's.
    """

    def __init__(
        self, images: LabelledImages, num_classes: int, config: BigGanConfig, seed: int, device: torch.device
    ) -> None:
        channels, *size = images.images.shape[1:]
        if size != [config.image_size] * 2:
            raise ValueError(
                f"images must be {config.image_size} px for g_in={list(config.g_in)}, but got {size}; "
                "set data.image_size, or choose an architecture for that size"
            )
        self.config, self.seed, self.device = config, seed, device
        self.images = images.to(device)
        self.batch_size = min(config.batch_size, len(images))
        check_batch(self.batch_size, "generator.batch_size")
        self._weight = slice_weight(self.batch_size)
        self.generator = Generator(config, num_classes, channels)
        self.discriminator = Discriminator(config, num_classes, channels)
        self.generator.initialise(seeded_generator(seed, "generator weights"))
        self.discriminator.initialise(seeded_generator(seed, "discriminator weights"))
        self.generator.to(device)
        self.discriminator.to(device)
        join_norms(self.generator)
        betas = (config.beta1, config.beta2)
        on_gpu = device.type == "cuda"
        d_class = torch.optim.AdamW if config.d_optimizer == "adamw" else torch.optim.Adam
        self.optimizer_d = d_class(
            self.discriminator.parameters(), config.learning_rate_d, betas,
            weight_decay=config.d_weight_decay, fused=True, capturable=on_gpu,
        )  # fmt: skip
        self.optimizer_g = torch.optim.Adam(
            self.generator.parameters(), config.learning_rate_g, betas, fused=True, capturable=on_gpu
        )
        self.scaler_d = gradient_scaler(device, config.precision)
        self.scaler_g = gradient_scaler(device, config.precision)
        shown = config.epochs * len(images)
        self._generate = compiled(self.generator, device, shown, COMPILING_PAYS_FROM)
        self._judge = compiled(self.discriminator, device, shown, COMPILING_PAYS_FROM)
        self._capture_steps()
        half_life = half_life_in_images(config.ema_decay, config.d_steps)
        self.average = ExponentialAverage(self.generator.folded_weights(), half_life, config.ema_rampup)
        self.epoch = self.images_seen = self.d_steps_since_g = 0
        self.loss_d = self.loss_g = 0.0
        self._images_averaged = 0

    def train_epoch(self) -> dict[str, float]:
        """One pass over the real images; its figures: losses, D's mean
        logits, images seen, seconds, images per second."""
        started = time.perf_counter()
        random = seeded_generator(self.seed, "generator", self.epoch, device=self.device)
        order = torch.randperm(len(self.images), generator=random, device=self.device)
        sums, d_steps, g_steps = torch.zeros(4, device=self.device), 0, 0
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            sums[:3] += self._d_step(order[start : start + self.batch_size], random)
            d_steps += 1
            self.images_seen += self.batch_size
            self.d_steps_since_g += 1
            if self.d_steps_since_g == self.config.d_steps:
                sums[3] += self._g_step(random)
                g_steps += 1
                self.d_steps_since_g = 0
        self.epoch += 1
        # The only wait for the device: once per epoch.
        loss_d, real, fake, loss_g = average(sums).tolist()
        self._check_finite(loss_d, loss_g)
        self.loss_d = loss_d / d_steps
        self.loss_g = loss_g / g_steps if g_steps else self.loss_g
        seconds = time.perf_counter() - started
        return {
            "epoch": self.epoch,
            "loss_d": self.loss_d,
            "loss_g": self.loss_g,
            "logit_real": real / d_steps,
            "logit_fake": fake / d_steps,
            "images_seen": self.images_seen,
            "seconds": seconds,
            "images_per_second": d_steps * self.batch_size / seconds,
        }

    def checkpoint(self) -> Checkpoint:
        """The averaged generator as it is now: plain weights (spectral norms
        folded in) for `Generator.load_folded_weights`.

        Its figures: loss_d, mean D loss of the last epoch; loss_g, mean G loss of the
        last epoch that had a G step, 0 before the first.
        """
        weights = {name: tensor.to("cpu", copy=True) for name, tensor in self.average.average.items()}
        return Checkpoint(
            self.epoch, weights, self.images_seen, {"loss_d": self.loss_d, "loss_g": self.loss_g}
        )

    # --- steps ---

    def _capture_steps(self) -> None:
        """Anew whenever the tensors of an optimiser or an average are new ones."""
        plain = not self.scaler_d.is_enabled()
        self._d_update = Captured(self._update_d, self.device, active=plain)
        self._g_update = Captured(self._update_g, self.device, active=plain)

    def _d_step(self, index: Tensor, random: torch.Generator) -> Tensor:
        """Update D on the real images `index` and as many fakes; returns
        [loss, mean real logit, mean fake logit]."""
        real, labels = self.images.images[index], self.images.labels[index]
        if self.config.horizontal_flip:
            mirrored = torch.rand(len(index), 1, 1, 1, generator=random, device=self.device) < 0.5
            real = torch.where(mirrored, real.flip(3), real)
        latents, fake_labels = self._draw(random)
        figures: Tensor = self._d_update(own_slice(real), own_slice(labels), latents, fake_labels)
        return figures

    def _update_d(self, real: Tensor, labels: Tensor, latents: Tensor, fake_labels: Tensor) -> Tensor:
        self.discriminator.refresh_spectral_norm()
        with autocast(self.device, self.config.precision):
            with torch.no_grad():
                fake = self._generate(latents, fake_labels)
            # D has no batch statistics, so that one pass over both halves equals two.
            both = torch.cat([from_uint8(real, self.config.output), fake])
            logits = self._judge(both, torch.cat([labels, fake_labels]))
        on_real, on_fake = logits.chunk(2)
        loss = self._weight * discriminator_loss(on_real, on_fake, self.config)
        _update(self.optimizer_d, self.scaler_d, loss)
        return torch.stack(
            [loss.detach(), self._weight * on_real.detach().mean(), self._weight * on_fake.detach().mean()]
        )

    def _g_step(self, random: torch.Generator) -> Tensor:
        """Update G and its average; returns the loss."""
        latents, labels = self._draw(random)
        seen, self._images_averaged = self.images_seen - self._images_averaged, self.images_seen
        weight = torch.full(
            (), 1 - self.average.decay(seen, self.images_seen), dtype=torch.float64, device=self.device
        )
        loss: Tensor = self._g_update(latents, labels, weight)
        return loss

    def _update_g(self, latents: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        # Frozen, so that the backward pass only runs through D and not into its weights.
        self.discriminator.requires_grad_(False)
        self.discriminator.refresh_spectral_norm()
        self.generator.refresh_spectral_norm(iterate=False)
        with autocast(self.device, self.config.precision):
            logits = self._judge(self._generate(latents, labels), labels)
        loss = self._weight * generator_loss(logits, self.config)
        _update(self.optimizer_g, self.scaler_g, loss)
        self.discriminator.requires_grad_(True)
        with torch.no_grad():
            self.generator.refresh_spectral_norm()
        self.average.update(self.generator.folded_weights(), weight)
        return loss.detach()

    def _draw(self, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """This worker's slice of a batch of standard normal latents, and of
        labels as frequent as in the real images."""
        latents = torch.randn(self.batch_size, self.config.latent_dim, generator=random, device=self.device)
        index = torch.randint(len(self.images), (self.batch_size,), generator=random, device=self.device)
        return own_slice(latents), own_slice(self.images.labels[index])

    def _check_finite(self, loss_d: float, loss_g: float) -> None:
        if not (abs(loss_d) < float("inf") and abs(loss_g) < float("inf")):
            raise FloatingPointError(
                f"GAN losses must stay finite, but in epoch {self.epoch} they summed to loss_d={loss_d}, "
                f"loss_g={loss_g}; lower generator.learning_rate_g={self.config.learning_rate_g} and "
                f"learning_rate_d={self.config.learning_rate_d}, or set generator.precision=full"
            )

    # --- state ---

    def state(self) -> State:
        """All that the next epoch depends on: CPU tensors, numbers, nested dicts."""
        return {
            "epoch": self.epoch,
            "images_seen": self.images_seen,
            "images_averaged": self._images_averaged,
            "d_steps_since_g": self.d_steps_since_g,
            "loss_d": self.loss_d,
            "loss_g": self.loss_g,
            "generator": _to_cpu(self.generator.state_dict()),
            "discriminator": _to_cpu(self.discriminator.state_dict()),
            "average": _to_cpu(self.average.average),
            "optimizer_g": _to_cpu(self.optimizer_g.state_dict()["state"]),
            "optimizer_d": _to_cpu(self.optimizer_d.state_dict()["state"]),
            "scaler_g": self.scaler_g.state_dict(),
            "scaler_d": self.scaler_d.state_dict(),
        }

    def load_state(self, state: State) -> None:
        """Go on from `state`; config, images and seed must be those it was made with."""
        self.epoch, self.images_seen = state["epoch"], state["images_seen"]
        self._images_averaged, self.d_steps_since_g = state["images_averaged"], state["d_steps_since_g"]
        self.loss_d, self.loss_g = state["loss_d"], state["loss_g"]
        self.average.load(state["average"])
        for network, optimizer, scaler, name in (
            (self.generator, self.optimizer_g, self.scaler_g, "generator"),
            (self.discriminator, self.optimizer_d, self.scaler_d, "discriminator"),
        ):
            _load_network(network, state[name])
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state[f"optimizer_{name[0]}"], "param_groups": groups})
            if scaler.is_enabled():
                scaler.load_state_dict(state[f"scaler_{name[0]}"])
        self._capture_steps()


def discriminator_loss(on_real: Tensor, on_fake: Tensor, config: BigGanConfig) -> Tensor:
    """Mean D loss over float32 logits [N] each.

    Logistic: cross-entropy with target 1 - `d_label_smoothing` for real and 0 for generated images (one-sided
    smoothing, Salimans et al. 2016, section 3.4). Hinge: max(0, 1 - real) + max(0, 1 + fake).
    """
    if config.loss == "hinge":
        return functional.relu(1 - on_real).mean() + functional.relu(1 + on_fake).mean()
    smooth = config.d_label_smoothing
    real = (1 - smooth) * functional.softplus(-on_real) + smooth * functional.softplus(on_real)
    return real.mean() + functional.softplus(on_fake).mean()


def generator_loss(on_fake: Tensor, config: BigGanConfig) -> Tensor:
    """Mean G loss over float32 logits [N]: softplus(-logit), the
    non-saturating logistic loss, or -logit with hinge."""
    return -on_fake.mean() if config.loss == "hinge" else functional.softplus(-on_fake).mean()


def _update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    average_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
    scaler.step(optimizer)
    scaler.update()


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return {key: _to_cpu(item) for key, item in value.items()}


@torch.no_grad()
def _load_network(network: SpectralNetwork, state: dict[str, Tensor]) -> None:
    network.load_state_dict(state)
    network.refresh_spectral_norm(iterate=False)
