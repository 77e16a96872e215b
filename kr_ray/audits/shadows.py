"""The shadow models of the paper's attack (section 3.6, steps 1 to 3)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kr_ray.classifiers.predict import predict_logits
from kr_ray.classifiers.training import Schedule
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.methods.teacher import train_on_real
from kr_ray.privacy.shadow import ShadowScores, shadow_splits


def train_shadow(
    run: Path, path: Path, recipe: ClassifierConfig, *, epochs: int, seed: int, shadow: int
) -> None:
    """Train one shadow model on 45 % of the validation split and keep
    only its logits on members and non-members."""
    splits = load_stored_splits(run / SPLITS_FILE)
    validation = splits.validation
    parts = shadow_splits(
        validation.labels.numpy(), splits.num_classes, seed=derive_seed(seed, "shadow split"), shadow=shadow
    )
    members = validation.subset(torch.from_numpy(parts.train))
    schedule = Schedule.fit(recipe, len(members), epochs)
    training = train_on_real(
        members, splits.num_classes, recipe, schedule, derive_seed(seed, "shadow", shadow)
    )
    training.train_until(training.schedule.steps)
    asked = np.concatenate([parts.train, parts.test])
    ShadowScores(
        shadow=shadow,
        logits=predict_logits(training.model, validation.images[asked], training.device).numpy(),
        labels=validation.labels[asked].numpy(),
        member=np.arange(len(asked)) < len(parts.train),
    ).save(path)
