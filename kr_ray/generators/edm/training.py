"""The training of the diffusion model (Karras et al. 2022, section 5): random noise levels, one squared
error, an average in images."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from kr_ray.compute.devices import autocast, gradient_scaler
from kr_ray.compute.graphs import Captured, compiled
from kr_ray.compute.parallel import average, average_gradients, check_batch, own_slice, slice_weight
from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import EdmConfig
from kr_ray.data.images import LabelledImages
from kr_ray.generators.edm.checkpoint import EdmCheckpoint
from kr_ray.generators.edm.networks import UNet
from kr_ray.generators.edm.preconditioning import from_uint8, loss, noise_levels, pixel_std
from kr_ray.generators.ema import ExponentialAverage
from kr_ray.runs.stages import State

COMPILING_PAYS_FROM = 1e6
"""Real images; that of BigGAN's training, for no GPU was at hand to measure this network's."""
BETAS = (0.9, 0.99)


class EdmTraining:
    """Network, optimiser and average, advanced epoch by epoch: one pass over
    the images (its last incomplete batch is left out).

    Within torch.distributed every worker draws the whole batch's noise and computes on its slice;
    gradients are the batch's.
    """

    def __init__(
        self, images: LabelledImages, num_classes: int, config: EdmConfig, seed: int, device: torch.device
    ) -> None:
        check_sides(images.images.shape, config)
        self.config, self.seed, self.device = config, seed, device
        self.images, self.num_classes = images.to(device), num_classes
        self.sigma_data = pixel_std(images.images)
        self.batch_size = min(config.batch_size, len(images))
        check_batch(self.batch_size, "generator.batch_size")
        self._weight = slice_weight(self.batch_size)
        self.network = UNet(config, num_classes, images.images.shape[1])
        self.network.initialise(seeded_generator(seed, "edm weights"))
        self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._answer = compiled(self.network, device, config.epochs * len(images), COMPILING_PAYS_FROM)
        on_gpu = device.type == "cuda"
        # A graph reads the rate from the device's memory.
        self._rate = torch.zeros((), device=device) if on_gpu else None
        self.optimizer = torch.optim.Adam(
            self.network.parameters(),
            0.0 if self._rate is None else self._rate,
            BETAS,
            fused=True,
            capturable=on_gpu,
        )
        self.scaler = gradient_scaler(device, config.precision)
        self._capture_step()
        self.average = ExponentialAverage(self._live(), config.ema_half_life_images, config.ema_rampup)
        self.epoch = self.images_seen = self.step = 0
        self.loss = 0.0

    def train_epoch(self) -> dict[str, float]:
        """One pass over the real images; its figures: loss, images seen, seconds, images per second.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        started = time.perf_counter()
        random = seeded_generator(self.seed, "edm", self.epoch, device=self.device)
        order = torch.randperm(len(self.images), generator=random, device=self.device)
        total, steps = torch.zeros((), device=self.device), len(order) // self.batch_size
        for index in order[: steps * self.batch_size].split(self.batch_size):
            total += self._train_step(index, random)
        self.epoch += 1
        # The only wait for the device: once per epoch.
        self.loss = average(total).item() / steps
        if not math.isfinite(self.loss):
            raise FloatingPointError(
                f"the loss must stay finite, but in epoch {self.epoch} it is {self.loss}; lower "
                f"generator.learning_rate={self.config.learning_rate}, or set generator.precision=full"
            )
        seconds = time.perf_counter() - started
        return {
            "epoch": self.epoch,
            "loss": self.loss,
            "images_seen": self.images_seen,
            "seconds": seconds,
            "images_per_second": steps * self.batch_size / seconds,
        }

    def checkpoint(self) -> EdmCheckpoint:
        """The averaged network as it is now."""
        channels, side = self.images.images.shape[1:3]
        return EdmCheckpoint(
            epoch=self.epoch,
            weights={name: tensor.to("cpu", copy=True) for name, tensor in self.average.average.items()},
            images_seen=self.images_seen,
            figures={"loss": self.loss, "image_size": side, "sigma_data": self.sigma_data},
            config=self.config,
            num_classes=self.num_classes,
            channels=channels,
        )

    # --- steps ---

    def _capture_step(self) -> None:
        """Anew whenever the tensors of the optimiser are new ones."""
        self._gradient_step = Captured(self._update, self.device, active=not self.scaler.is_enabled())

    def _live(self) -> dict[str, Tensor]:
        return dict(self.network.named_parameters())

    def _train_step(self, index: Tensor, random: torch.Generator) -> Tensor:
        """Update on the real images `index`; returns the loss."""
        images, classes = self._batch(index, random)
        normal = torch.randn(len(index), generator=random, device=self.device)
        sigma = noise_levels(normal, self.config.noise_mean, self.config.noise_std)
        noise = torch.randn(images.shape, generator=random, device=self.device)
        self._set_rate()
        self.step += 1
        self.images_seen += self.batch_size
        weight = 1 - self.average.decay(self.batch_size, self.images_seen)
        on_device = torch.full((), weight, dtype=torch.float64, device=self.device)
        parts = map(own_slice, (images, noise, sigma, classes))
        found: Tensor = self._gradient_step(*parts, on_device)
        return found

    def _batch(self, index: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images uint8, mirrored at random if wanted, and their classes, some of them hidden (classifier-free
        guidance)."""
        images, classes = self.images.images[index], self.images.labels[index]
        if self.config.horizontal_flip:
            mirrored = torch.rand(len(index), 1, 1, 1, generator=random, device=self.device) < 0.5
            images = torch.where(mirrored, images.flip(3), images)
        hidden = torch.rand(len(index), generator=random, device=self.device) < self.config.null_share
        return images, classes.masked_fill(hidden, self.num_classes)

    def _set_rate(self) -> None:
        """Linear warm-up; no decay, which the average of the weights takes the place of."""
        rate = self.config.learning_rate * min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        if self._rate is not None:
            self._rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self._rate is None else self._rate

    def _update(
        self, images: Tensor, noise: Tensor, sigma: Tensor, classes: Tensor, weight: Tensor
    ) -> Tensor:
        """Gradient step and average on this worker's slice."""
        found = self._weight * loss(self._network, from_uint8(images), noise, sigma, classes, self.sigma_data)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(found).backward()  # type: ignore[no-untyped-call]
        average_gradients(self.network.parameters())
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update(self._live(), weight)
        return found.detach()

    def _network(self, images: Tensor, c_noise: Tensor, classes: Tensor) -> Tensor:
        with autocast(self.device, self.config.precision):
            answer: Tensor = self._answer(images, c_noise, classes)
        return answer

    # --- state ---

    def state(self) -> State:
        """All that the next epoch depends on: CPU tensors, numbers, nested dicts."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "images_seen": self.images_seen,
            "loss": self.loss,
            "network": _to_cpu(self.network.state_dict()),
            "average": _to_cpu(self.average.average),
            "optimizer": _to_cpu(self.optimizer.state_dict()["state"]),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: State) -> None:
        """Go on from `state`; config, images and seed must be those it was made with."""
        self.epoch, self.step = state["epoch"], state["step"]
        self.images_seen, self.loss = state["images_seen"], state["loss"]
        self.network.load_state_dict(state["network"])
        self.average.load(state["average"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self._capture_step()


def check_sides(shape: torch.Size, config: EdmConfig) -> None:
    """Images [N, C, H, W] must suit the network.

    Raises:
        ValueError: they are not square, or their side is not a multiple of `config.side_multiple`.
    """
    height, width = shape[2:]
    if height != width or height % config.side_multiple:
        raise ValueError(
            f"images must be square, with a side that is a multiple of {config.side_multiple}, for "
            f"unshuffle={config.unshuffle} and {len(config.channels)} levels, but got {[height, width]}; "
            "set data.image_size, or choose fewer levels"
        )


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return {key: _to_cpu(item) for key, item in value.items()}
