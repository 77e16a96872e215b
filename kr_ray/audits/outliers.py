"""Losses of training images under models that were not trained on them:
the outlier canaries are those of the highest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kr_ray.classifiers.predict import predict_logits
from kr_ray.classifiers.training import Schedule
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import Config
from kr_ray.data.images import all_but
from kr_ray.data.pools import stratified_index
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.methods.teacher import train_on_real


def held_out_halves(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two stratified halves of the training split: int64, ascending, together all of it."""
    first = stratified_index(labels, len(labels) // 2, [derive_seed(seed, "half")])
    return first, all_but(len(labels), first).nonzero().flatten()


def held_out_losses(run: Path, config: Config, repeat: int) -> NDArray[np.float64]:
    """Each training image's cross-entropy under a teacher that was not trained on it: float64 [N].

    A model is trained on either half and asked about the other: a memorised outlier would have a low loss
    under a model that saw it. Both together cost one teacher. The reference ensemble is the mean over several
    `repeat`s, which split anew.
    """
    splits, seed = load_stored_splits(run / SPLITS_FILE), derive_seed(config.seed, "held out", repeat)
    train, losses = splits.train, torch.empty(len(splits.train), dtype=torch.float64)
    halves = held_out_halves(train.labels, seed)
    for half, other in (halves, halves[::-1]):
        schedule = Schedule.fit(config.classifier, len(half), config.teacher.passes)
        training = train_on_real(
            train.subset(half), splits.num_classes, config.classifier, schedule, derive_seed(seed, len(half))
        )
        training.train_until(schedule.steps)
        logits = predict_logits(training.model, train.images[other], training.device)
        losses[other] = nn.functional.cross_entropy(logits, train.labels[other], reduction="none").double()
    return losses.numpy()
