"""DP-SGD: a classifier on real images whose every step is noisy (Abadi et al. 2016; De et al. 2022 for
multiplicity).

Batches are Poisson samples: shuffled batches accounted as Poisson ones were off by up to 4 times in audits
(arXiv 2411.10614). What is sampled and the noise come from a secret key (kr_ray.dp.noise). Batches have no
fixed size, so neither the batch size nor the loss is shown: both are private facts that no noise covers. No
MixUp, for it doubles what one image can change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kr_ray.classifiers.interface import Classifier
from kr_ray.classifiers.networks import new_classifier, save_classifier
from kr_ray.classifiers.sets import FixedSet, smoothed_one_hot
from kr_ray.classifiers.ticks import WHOLE_TRAINING, TickedTraining
from kr_ray.classifiers.training import ClassifierTraining, Schedule
from kr_ray.compute.devices import Precision, autocast, mixed_dtype, pick_device
from kr_ray.compute.parallel import worker_count
from kr_ray.compute.seeding import derive_seed, seeded_generator
from kr_ray.config import ClassifierConfig, ConfigError
from kr_ray.config.dp import DpSgdSection
from kr_ray.data.augment import crop_and_flip, to_float, trivial_augment
from kr_ray.data.images import LabelledImages
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.dp.noise import NoiseKey, forget_key, noise_key
from kr_ray.dp.release import Released, own_delta, privacy_record
from kr_ray.methods.interface import ClassifierPart, Part, Site
from kr_ray.privacy.accountants import poisson_gaussian
from kr_ray.privacy.ledger import LedgerError, calibrate_noise
from kr_ray.runs.artifacts import write_json
from kr_ray.runs.results import ClassifierResult
from kr_ray.runs.stages import RESULT_FILE, WEIGHTS_FILE, Save, State

if TYPE_CHECKING:
    from dp_accounting import DpEvent

EXTRA = "pip install 'kr_ray[dp]'"


@dataclass(frozen=True)
class DpSgd:
    """See kr_ray.methods.interface.Method."""

    section: DpSgdSection
    title: str = "DP-SGD"
    note: str = "trained on real images with noisy, clipped gradients, of a network with group norm"
    takes_over: tuple[str, ...] = ()

    def parts(self, site: Site, name: str = "dp_sgd") -> Sequence[ClassifierPart]:
        recipe, section = dp_sgd_recipe(self.section, site.config.classifier), self.section

        def work(folder: Path, state: State | None, save: Save) -> ClassifierResult:
            return train_dp_sgd(site.path, folder, section, recipe, site.seed, state, save).result

        return [Part(name=name, inputs=[recipe, section], result=ClassifierResult, work=work)]


def dp_sgd_recipe(section: DpSgdSection, recipe: ClassifierConfig) -> ClassifierConfig:
    """The run's recipe with a norm that looks at one image alone."""
    return recipe.model_copy(update={"norm": section.norm})


@dataclass(frozen=True)
class DpSgdPlan:
    """The public constants of a DP-SGD training.

    Attributes:
        records: N.
        sampling_probability: q = expected_batch_size / N.
        steps: of the whole training.
        noise_multiplier: standard deviation of the noise over max_grad_norm.
        delta: of the guarantee.
    """

    records: int
    sampling_probability: float
    steps: int
    noise_multiplier: float
    delta: float

    @property
    def event(self) -> DpEvent:
        """What the whole training releases."""
        return poisson_gaussian(self.sampling_probability, self.noise_multiplier, self.steps)


def plan_dp_sgd(section: DpSgdSection, recipe: ClassifierConfig, records: int) -> DpSgdPlan:
    """Check the keys and fit the noise; needs no images, so it can be called before anything starts.

    Raises:
        ConfigError: batch norm, a batch larger than the set, delta or epsilon out of range, or a target that
            cannot be reached.
    """
    if recipe.norm == "batch":
        raise ConfigError(
            "`norm: group` must hold for dp_sgd, but got norm: batch; set classifier.norm, for batch norm "
            "mixes the images of a batch"
        )
    if section.expected_batch_size > records:
        raise ConfigError(
            f"`expected_batch_size <= images` must hold, but got {section.expected_batch_size} for "
            f"{records} training images; "
            f"use {max(1, records // 4)} or less"
        )
    probability = section.expected_batch_size / records
    steps = max(1, round(section.epochs / probability))
    delta = own_delta(section, records)
    try:
        noise = section.noise_multiplier or calibrate_noise(
            lambda z: poisson_gaussian(probability, z, steps), section.target_epsilon or math.nan, delta
        )
    except LedgerError as error:
        raise ConfigError(f"dp_sgd: {error}") from error
    return DpSgdPlan(records, probability, steps, noise, delta)


class DpSgdTraining(ClassifierTraining):
    """The classifier's training with private steps; stops and goes on at any step, with the same noise.

    Args:
        model: with group norm.
        images: on any device.
        key: of noise and batches.
        seed: of augmentation, which needs no secret.
    """

    def __init__(
        self,
        model: Classifier,
        images: LabelledImages,
        recipe: ClassifierConfig,
        section: DpSgdSection,
        plan: DpSgdPlan,
        key: NoiseKey,
        seed: int,
        device: torch.device,
    ) -> None:
        if worker_count() > 1:
            raise ConfigError(
                f"`workers == 1` must hold for dp_sgd, but got {worker_count()}; "
                "set cluster.workers to 1 for this training"
            )
        gradients = private_gradients()
        private = _private_recipe(recipe, section)
        steps_per_epoch_images = max(plan.records, section.expected_batch_size)
        schedule = Schedule.of_steps(
            private, steps_per_epoch_images, batch=section.expected_batch_size, steps=plan.steps
        )
        real = images.to(device)
        targets = smoothed_one_hot(real.labels, model.num_classes, recipe.label_smoothing)
        super().__init__(model, FixedSet(real.images, targets), private, schedule, seed, device)
        self.plan, self.key = plan, key
        # fp16 needs a gradient scaler, and scaled gradients cannot be clipped to a bound; ghost clipping
        # would take its norms in bfloat16, so that an image could exceed the bound by 0.4 %.
        half_is_unsound = section.grad_sample_mode == "ghost" or mixed_dtype(device) == torch.float16
        self._precision: Precision = "full" if half_is_unsound else recipe.precision
        self._copies = section.augmentation_multiplicity
        self._piece = max(1, section.max_physical_batch_size // self._copies)
        self._private = gradients.PrivateGradients(
            self.model,
            self.optimizer,
            mode=section.grad_sample_mode,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=section.max_grad_norm,
            divisor=section.expected_batch_size,
        )

    def train_until(self, step: int) -> float:
        """Train up to (excluding) `step`; nan, for the loss of private images is a private fact.

        Raises:
            FloatingPointError: a weight is no longer finite.
        """
        self.model.train()
        while self.step < min(step, self.schedule.steps):
            self._set_rate(self.schedule.rate(self.step))
            self._private.step(self._pieces(), self._logits, self._copies, self._noise)
            self.step += 1
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise FloatingPointError(
                f"a weight is not finite at step {self.step}; lower the method's learning_rate (now "
                f"{self.recipe.learning_rate})"
            )
        return math.nan

    def _pieces(self) -> list[tuple[Tensor, Tensor]]:
        """This step's Poisson batch, augmented, in pieces that fit into memory."""
        images, targets = self.data.epoch(0)
        index = self.key.poisson_sample(self.plan.records, self.plan.sampling_probability, self.step).to(
            self.device
        )
        random = seeded_generator(self.seed, "augment", self.step)
        pieces = []
        for part in index.split(self._piece) if len(index) else ():
            copies = images[part].repeat_interleave(self._copies, 0)
            copies = crop_and_flip(copies, self.recipe.crop_padding, self.recipe.horizontal_flip, random)
            if self.recipe.trivial_augment:
                copies = trivial_augment(copies, random)
            pieces.append((to_float(copies), targets[part]))
        return pieces

    def _logits(self, images: Tensor) -> Tensor:
        with autocast(self.device, self._precision):
            return self.model(images).float()

    def _noise(self, shape: torch.Size, parameter: int) -> Tensor:
        return self.key.gaussian(shape, self.step, parameter)


def _private_recipe(recipe: ClassifierConfig, section: DpSgdSection) -> ClassifierConfig:
    """The recipe but for the keys that private steps want otherwise."""
    own = ("learning_rate", "momentum", "weight_decay", "trivial_augment")
    changed = {key: getattr(section, key) for key in own}
    return recipe.model_copy(update=changed | {"mixup_alpha": 0.0, "batch_size": section.expected_batch_size})


def private_gradients() -> Any:
    """The module that needs Opacus.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from kr_ray.dp import gradients
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`opacus` must be installed for dp_sgd, but {error.name} is not; {EXTRA}"
        ) from error
    return gradients


def train_dp_sgd(
    run: Path,
    folder: Path,
    section: DpSgdSection,
    recipe: ClassifierConfig,
    seed: int,
    state: State | None,
    save: Save,
) -> Released[ClassifierResult]:
    """Train on the real training split with differential privacy; leaves weights.safetensors and result.json
    in `folder`.

    The noise key lies in `folder` while the training goes on. Accuracies of the result are of validation and
    test images, which this guarantee does not cover.

    Raises:
        ConfigError: see `plan_dp_sgd`.
        kr_ray.runs.artifacts.ArtifactError: the training goes on, but its noise key is gone.
    """
    splits = load_stored_splits(run / SPLITS_FILE)
    plan = plan_dp_sgd(section, recipe, len(splits.train))
    done = state is not None and len(state["history"]) >= WHOLE_TRAINING.count
    key = noise_key(folder, section.insecure_noise_key, started=state is not None and not done)
    own_seed = derive_seed(seed, "dp_sgd")
    model = new_classifier(splits.num_classes, splits.channels, recipe, own_seed)
    device = pick_device()
    training = DpSgdTraining(
        model, splits.train, recipe, section, plan, key, derive_seed(own_seed, "data"), device
    )
    ticked = TickedTraining(training, splits.validation, WHOLE_TRAINING, state)
    ticked.finish(save)
    privacy = privacy_record(
        "dp_sgd", plan.event, plan.records, plan.delta, key.insecure,
        noise_multiplier=plan.noise_multiplier, sampling_probability=plan.sampling_probability,
    )  # fmt: skip
    result = ticked.result(splits.test).model_copy(update={"privacy": privacy})
    save_classifier(folder / WEIGHTS_FILE, training.model)
    write_json(folder / RESULT_FILE, result.model_dump(mode="json"))
    forget_key(folder)
    return Released(result, plan.event)
