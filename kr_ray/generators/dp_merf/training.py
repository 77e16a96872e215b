"""DP-MERF as a resumable part: one release, then a generator trained on what was released alone.

The private images are read once. When their noisy embedding stands in the part's folder the key is deleted,
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

from kr_ray.compute.devices import pick_device
from kr_ray.compute.seeding import derive_seed, seeded_generator
from kr_ray.config import ConfigError
from kr_ray.config.dp import DpMerfSection
from kr_ray.data.images import LabelledImages
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.dp.noise import forget_key, noise_key
from kr_ray.dp.release import Released, own_delta, privacy_record, read_release
from kr_ray.generators.dp_merf.features import Embedding, RandomFeatures, release_embedding
from kr_ray.generators.dp_merf.network import MerfGenerator
from kr_ray.privacy.accountants import gaussian
from kr_ray.privacy.ledger import LedgerError, calibrate_noise
from kr_ray.runs.artifacts import write_json
from kr_ray.runs.figures import PrivacyRecord
from kr_ray.runs.results import Result
from kr_ray.runs.stages import RESULT_FILE, Row, Save, State

if TYPE_CHECKING:
    from dp_accounting import DpEvent

RELEASE_FILE = "release.safetensors"
GENERATOR_FILE = "generator.safetensors"
TICKS = 20
RATE_DECAYS, RATE_DECAY = 5, 0.9
"""The rate falls five times in a training, as over the authors' five epochs."""


def plan_dp_merf(section: DpMerfSection, records: int) -> tuple[float, DpEvent]:
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


class MerfResult(Result):
    """What a private generator says of itself."""

    parameters: int
    """Trained numbers."""
    steps: int
    class_prior: list[float]
    """As released: noisy frequencies of the classes."""
    curve: list[dict[str, int | float]]
    """A row per tick."""
    privacy: PrivacyRecord
    random_features: int
    values: int
    """Of an image."""


class MerfTraining:
    """Adam on the squared distance of mean features (maximum mean discrepancy), class by class.

    The squared norm of a generated mean is its unbiased estimate over pairs of different images: features
        have norm 1, so with k
    images of a class the plain one is too large by (1 - |mean|^2) / (k - 1), which would drive all images of
    a class together.
    """

    def __init__(
        self,
        embedding: Embedding,
        features: RandomFeatures,
        section: DpMerfSection,
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
        self.step = 0

    def train_until(self, step: int) -> float:
        """Train up to (excluding) `step`; the last step's loss (nan if nothing was left to do)."""
        loss = math.nan
        while self.step < min(step, self.section.steps):
            loss = float(self._train_step())
            self.step += 1
        return loss

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

    def state_dict(self) -> State:
        """A copy: further training does not change it."""
        modules = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {"step": self.step} | copy.deepcopy(modules)

    def load_state_dict(self, state: State) -> None:
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


def train_dp_merf(
    run: Path, folder: Path, section: DpMerfSection, seed: int, state: State | None, save: Save
) -> Released[MerfResult]:
    """Release once, then train; leaves release.safetensors, generator.safetensors and result.json in
    `folder`.

    Raises:
        ConfigError: see `plan_dp_merf`, or an image size that is no multiple of 4.
    """
    splits = load_stored_splits(run / SPLITS_FILE)
    noise, event = plan_dp_merf(section, len(splits.train))
    own_seed = derive_seed(seed, "dp_merf")
    features = RandomFeatures.draw(splits.train.images[0].numel(), section, own_seed)
    embedding = _released(folder, splits.train, splits.num_classes, features, noise, section)
    training = MerfTraining(embedding, features, section, own_seed, pick_device())
    history: list[Row] = []
    if state is not None:
        history = list(state["history"])
        training.load_state_dict(state["training"])
    for tick in range(len(history), TICKS):
        history.append(_tick(training, tick))
        save({"history": history, "training": training.state_dict()}, history[-1])
    training.network.save(folder / GENERATOR_FILE, embedding.prior)
    insecure = bool(section.insecure_noise_key)
    records = len(splits.train)
    result = MerfResult(
        parameters=sum(parameter.numel() for parameter in training.network.parameters()),
        steps=training.step,
        class_prior=embedding.prior.tolist(),
        curve=history,
        privacy=privacy_record(
            "dp_merf", event, records, own_delta(section, records), insecure, noise_multiplier=noise
        ),
        random_features=2 * features.frequencies.shape[1],
        values=features.frequencies.shape[0],
    )
    write_json(folder / RESULT_FILE, result.model_dump(mode="json", exclude={"wall_s"}))
    return Released(result, event)


def _tick(training: MerfTraining, tick: int) -> Row:
    started, before = time.perf_counter(), training.step
    loss = training.train_until(round(training.section.steps * (tick + 1) / TICKS))
    row: Row = {
        "tick": tick,
        "share": (tick + 1) / TICKS,
        "step": training.step,
        "seconds": time.perf_counter() - started,
    }
    return row if training.step == before else row | {"loss": loss}


def _released(
    folder: Path,
    images: LabelledImages,
    num_classes: int,
    features: RandomFeatures,
    noise: float,
    section: DpMerfSection,
) -> Embedding:
    """The embedding in `folder`, released now unless it already stands there: never twice."""
    path = folder / RELEASE_FILE
    if not path.exists():
        key = noise_key(folder, section.insecure_noise_key)
        release_embedding(images, num_classes, features, noise, section.prior_share, key).save(path)
    forget_key(folder)
    return read_release(path, Embedding.load)
