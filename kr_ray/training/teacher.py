"""Training on the real images: the teacher (section 3.1) and the shadow models of the attack (section 3.6)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kr_ray.artifacts import write_json
from kr_ray.config import AuditConfig, ClassifierConfig
from kr_ray.data.images import LabelledImages
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.devices import pick_device
from kr_ray.models.resnet import ResNet14
from kr_ray.parallel import worker_rank
from kr_ray.privacy.shadow import ShadowScores, shadow_splits
from kr_ray.seeding import derive_seed
from kr_ray.training.classifier import ClassifierTraining, FixedSet, Schedule, predict_logits, smoothed_one_hot
from kr_ray.training.resumable import Save, State, TickedTraining, Ticks, save_classifier

TEACHER_TICKS = Ticks(20)


def new_classifier(num_classes: int, channels: int, recipe: ClassifierConfig, seed: int) -> ResNet14:
    """A ResNet14 whose initial weights depend on nothing but `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        return ResNet14(num_classes, channels, recipe.width)


def train_on_real(
    images: LabelledImages, num_classes: int, recipe: ClassifierConfig, schedule: Schedule, seed: int
) -> ClassifierTraining:
    """The recipe of Table 4 on `images`, not yet started."""
    device = pick_device()
    real = images.to(device)
    data = FixedSet(real.images, smoothed_one_hot(real.labels, num_classes, recipe.label_smoothing))
    model = new_classifier(num_classes, images.images.shape[1], recipe, seed)
    return ClassifierTraining(model, data, recipe, schedule, derive_seed(seed, "data"), device)


def train_teacher(
    run: Path, folder: Path, recipe: ClassifierConfig, schedule: Schedule, seed: int, state: State | None, save: Save
) -> None:
    """Train on the real training split; leaves weights.safetensors and result.json in `folder`."""
    splits = load_stored_splits(run / SPLITS_FILE)
    training = train_on_real(splits.train, splits.num_classes, recipe, schedule, derive_seed(seed, "teacher"))
    ticked = TickedTraining(training, splits.validation, TEACHER_TICKS, state)
    ticked.finish(save)
    if worker_rank() == 0:
        save_classifier(folder / "weights.safetensors", training.model)
        write_json(folder / "result.json", ticked.result(splits.test))


def train_shadow(run: Path, path: Path, recipe: ClassifierConfig, audit: AuditConfig, seed: int, shadow: int) -> None:
    """Train one shadow model on 45 % of the validation split and keep only its logits on members and non-members."""
    splits = load_stored_splits(run / SPLITS_FILE)
    validation = splits.validation
    parts = shadow_splits(validation.labels.numpy(), splits.num_classes, derive_seed(seed, "shadow split"), shadow)
    members = validation.subset(torch.from_numpy(parts.train))
    schedule = Schedule.fit(recipe, len(members), audit.epochs)
    training = train_on_real(members, splits.num_classes, recipe, schedule, derive_seed(seed, "shadow", shadow))
    training.train_until(training.schedule.steps)
    asked = np.concatenate([parts.train, parts.test])
    ShadowScores(
        shadow=shadow,
        logits=predict_logits(training.model, validation.images[asked], training.device).numpy(),
        labels=validation.labels[asked].numpy(),
        member=np.arange(len(asked)) < len(parts.train),
    ).save(path)
