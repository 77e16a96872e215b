"""DP-MERF: one release, then a generator trained on what was released alone.

The private images are read once. When their noisy embedding stands in the stage's folder the key is deleted,
and everything after is post-processing: longer training, another network, checkpoints and students cost
nothing more.
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kr_ray.compute.seeding import derive_seed, seeded_generator
from kr_ray.config import ConfigError, DpMerfConfig
from kr_ray.data.images import LabelledImages
from kr_ray.dp.noise import forget_key, noise_key
from kr_ray.dp.release import own_delta, read_release
from kr_ray.generators.dp_merf.features import Embedding, RandomFeatures, release_embedding
from kr_ray.generators.dp_merf.network import MerfGenerator
from kr_ray.generators.interface import PRIOR, Checkpoint
from kr_ray.privacy.accountants import gaussian
from kr_ray.privacy.ledger import LedgerError, calibrate_noise
from kr_ray.runs.stages import State

if TYPE_CHECKING:
    from dp_accounting import DpEvent

RELEASE_FILE = "release.safetensors"
RATE_DECAYS, RATE_DECAY = 5, 0.9
"""The rate falls five times in a training, as over the authors' five epochs."""


def plan_dp_merf(section: DpMerfConfig, records: int) -> tuple[float, DpEvent]:
    """The noise multiplier, and what will be released, for N = `records` images; needs no images.

    Raises:
        ConfigError: delta or epsilon out of range, or a target that cannot be reached.
    """
    delta = own_delta(section, records)
    try:
        noise = section.noise_multiplier or calibrate_noise(
            gaussian, section.target_epsilon or math.nan, delta
        )
    except LedgerError as error:
        raise ConfigError(f"dp_merf: {error}") from error
    return noise, gaussian(noise)


class MerfTraining:
    """Adam on the squared distance of mean features (maximum mean discrepancy), class by class.

    The squared norm of a generated mean is its unbiased estimate over pairs of different images: features
    have norm 1, so with k images of a class the plain one is too large by (1 - |mean|^2) / (k - 1), which
    would drive all images of a class together.

    Attributes:
        epoch: of `section.epochs` equal parts of `section.steps`, those done.
    """

    def __init__(
        self,
        embedding: Embedding,
        features: RandomFeatures,
        section: DpMerfConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self.section, self.seed, self.device = section, seed, device
        self.embedding, self.features = embedding, RandomFeatures(features.frequencies.to(device))
        self._means = embedding.means.T.to(device)
        self._classes = embedding.prior.nonzero().flatten()
        self._each = max(2, section.batch_size // len(self._classes))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "weights"))
            network = MerfGenerator(
                len(embedding.prior), embedding.shape, section.latent_dim, section.channels
            )
        self.network = network.to(device).train()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=section.learning_rate)
        self.epoch = self.step = 0
        self._loss = math.nan

    @property
    def images_seen(self) -> int:
        """Generated ones: of the real images it sees the released numbers alone."""
        return self.step * self._each * len(self._classes)

    def parameters(self) -> dict[str, int]:
        return {"generator": sum(parameter.numel() for parameter in self.network.parameters())}

    def train_epoch(self) -> dict[str, float]:
        started, seen = time.perf_counter(), self.images_seen
        until = round(self.section.steps * (self.epoch + 1) / self.section.epochs)
        while self.step < until:
            self._loss = float(self._train_step())
            self.step += 1
        if not math.isfinite(self._loss) and self.step:
            raise FloatingPointError(
                f"the loss is not finite at step {self.step}; lower generator.learning_rate "
                f"(now {self.section.learning_rate})"
            )
        self.epoch += 1
        seconds = time.perf_counter() - started
        return {
            "epoch": self.epoch,
            "loss": self._loss,
            "images_seen": self.images_seen,
            "seconds": seconds,
            "images_per_second": (self.images_seen - seen) / seconds,
        }

    def checkpoint(self) -> Checkpoint:
        weights = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
        figures = {"loss": self._loss, "image_size": self.embedding.shape[1]}
        return Checkpoint(self.epoch, weights | {PRIOR: self.embedding.prior}, self.images_seen, figures)

    def _train_step(self) -> Tensor:
        decays = RATE_DECAYS * self.step // self.section.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.section.learning_rate * RATE_DECAY**decays
        random = seeded_generator(self.seed, "latents", self.step)
        labels = self._classes.repeat_interleave(self._each).to(self.device)
        latents = torch.randn(len(labels), self.section.latent_dim, generator=random).to(self.device)
        loss = self._distance(self.network(latents, labels))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _distance(self, pixels: Tensor) -> Tensor:
        """Mean over classes of |released mean|^2 - 2 released . generated + |generated mean|^2 (unbiased)."""
        own = self.features(pixels).unflatten(0, (len(self._classes), self._each))
        generated, released = own.mean(1), self._means[self._classes.to(self.device)]
        k = self._each
        pairs = (k * generated.square().sum(1) - 1) / (k - 1)
        return (released.square().sum(1) - 2 * (released * generated).sum(1) + pairs).mean()

    def state(self) -> State:
        """A copy: further training does not change it."""
        modules = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {"epoch": self.epoch, "step": self.step, "loss": self._loss} | copy.deepcopy(modules)

    def load_state(self, state: State) -> None:
        self.epoch, self.step, self._loss = state["epoch"], state["step"], state["loss"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


def draw_features(images: LabelledImages, section: DpMerfConfig, seed: int) -> RandomFeatures:
    """Those of images of this size: public, from the run's seed."""
    return RandomFeatures.draw(images.images[0].numel(), section, seed)


def released_embedding(
    folder: Path,
    images: LabelledImages,
    num_classes: int,
    features: RandomFeatures,
    noise_multiplier: float,
    section: DpMerfConfig,
) -> Embedding:
    """The embedding in `folder`, released now unless it already stands there: never twice."""
    path = folder / RELEASE_FILE
    if not path.exists():
        key = noise_key(folder, section.insecure_noise_key)
        release_embedding(images, num_classes, features, noise_multiplier, section.prior_share, key).save(
            path
        )
    forget_key(folder)
    return read_release(path, Embedding.load)
