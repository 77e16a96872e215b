"""The copies stage: does the generator reproduce its training images, and how well does it cover the real ones?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kr_ray.audits.encoders import file_encoder, pixels, teacher_features
from kr_ray.audits.fidelity import fidelity
from kr_ray.audits.neighbours import copy_figures
from kr_ray.classifiers.networks import load_classifier
from kr_ray.compute.devices import pick_device
from kr_ray.compute.seeding import derive_seed, seeded_generator
from kr_ray.config import CopiesConfig
from kr_ray.data.checks import DataError
from kr_ray.data.datasets import duplicate_indices
from kr_ray.data.images import class_prior
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.generators.biggan.sampling import Sampler
from kr_ray.generators.interface import checkpoint_file


def measure_copies(run: Path, checkpoint_epoch: int, latent_std: float, config: CopiesConfig, seed: int) -> dict[str, Any]:
    """Compare images of the student's checkpoint, at its latent std, with the real ones; see report.schema.Copies.

    Exact copies among the real images are set aside first: training images count once, and a test image that is also a training
    image is no yardstick. At most `images` of the test images are used. Memory: the features of all sets and a distance block of 4 MB.

    Raises:
        DataError: no test image is left as a yardstick, or the encoder file cannot be used.
    """
    splits, device = load_stored_splits(run / SPLITS_FILE), pick_device()
    train = _without(splits.train.images, duplicate_indices(splits.train.images))
    test = splits.test.images
    test = _without(test, torch.cat([duplicate_indices(test), duplicate_indices(test, train)]))
    test = test[torch.randperm(len(test), generator=seeded_generator(seed, "copies test"))[: config.images]]
    if not len(test):
        raise DataError("the copies stage needs test images that are not copies of training images; use another test split")
    generated = _generate(run, checkpoint_epoch, latent_std, class_prior(splits.train.labels, splits.num_classes), config, seed)
    encoder = (
        file_encoder(config, device)
        if config.encoder
        else teacher_features(load_classifier(run / "teacher" / "weights.safetensors", device))
    )
    sets = [images.to(device) for images in (generated, train, test)]
    fake, real, unseen = (encoder(images) for images in sets)
    in_pixels = copy_figures(*(pixels(images) for images in sets), quantile=config.quantile)
    in_features = copy_figures(fake, real, unseen, quantile=config.quantile)
    return {
        "images": len(generated),
        "train": len(train),
        "test": len(test),
        "quantile": config.quantile,
        "encoder": Path(config.encoder).name if config.encoder else "teacher",
        "exact_copies": len(duplicate_indices(generated, train)),
        "spaces": {"pixels": in_pixels, "features": in_features},
        "fidelity": {
            "generated": fidelity(real, fake, derive_seed(seed, "fidelity")),
            # Real against real: what the same measures say of images that are certainly good.
            "test": fidelity(real, unseen, derive_seed(seed, "fidelity")),
        },
    }


def _without(images: Tensor, index: Tensor) -> Tensor:
    kept = torch.ones(len(images), dtype=torch.bool)
    kept[index] = False
    return images[kept]


def _generate(run: Path, epoch: int, latent_std: float, prior: Tensor, config: CopiesConfig, seed: int) -> Tensor:
    sampler = Sampler.load(run / checkpoint_file(epoch), pick_device())
    sampler.set_latent_std(latent_std, derive_seed(seed, "copies standing"), prior, batches=16, batch_size=128)
    classes = torch.multinomial(prior, config.images, replacement=True, generator=seeded_generator(seed, "copies classes"))
    return sampler.images(classes, seeded_generator(seed, "copies"))
