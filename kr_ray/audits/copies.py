"""The copies stage: does the generator reproduce its training
images, and how well does it cover the real ones?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
from kr_ray.data.images import Splits, all_but, class_prior
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.generators.interface import Sampler, checkpoint_file
from kr_ray.generators.registry import generator_of
from kr_ray.methods.distillation.sets import SET_FILE, DistilledSet
from kr_ray.runs.artifacts import atomic_write
from kr_ray.runs.figures import CopySpace
from kr_ray.runs.results import CopiesResult
from kr_ray.runs.stages import SAMPLES_FILE, WEIGHTS_FILE
from kr_ray.synthesis.student_set import StudentSpec

SAMPLES_PER_CLASS, SHOWN_CLASSES = 8, 20


def measure_copies(
    run: Path, folder: Path, spec: StudentSpec, config: CopiesConfig, seed: int
) -> CopiesResult:
    """Compare images of the student's checkpoint, drawn as for the student,
    with the real ones; leaves samples in `folder`.

    Exact copies among the real images are set aside first: training images count once, and a test image that
    is also a training image is no yardstick. At most `images` of the test images are used. Memory: the
    features of all sets and a distance block of 4 MB.

    Raises:
        DataError: no test image is left as a yardstick, or the encoder file cannot be used.
    """
    splits, device = load_stored_splits(run / SPLITS_FILE), pick_device()
    train, test = _distinct(splits, config.images, seed)
    if not len(test):
        raise DataError(
            "the copies stage needs test images that are not copies of "
            "training images; use another test split"
        )
    prior = class_prior(splits.train.labels, splits.num_classes)
    generated = _generate(run, spec, prior, config.images, seed)
    _keep_samples(folder, _samples(run, spec, prior))
    encoder = (
        file_encoder(config, device)
        if config.encoder
        else teacher_features(load_classifier(run / "teacher" / WEIGHTS_FILE, device))
    )
    sets = [images.to(device) for images in (generated, train, test)]
    fake, real, unseen = (encoder(images) for images in sets)
    in_pixels = copy_figures(*(pixels(images) for images in sets), quantile=config.quantile)
    in_features = copy_figures(fake, real, unseen, quantile=config.quantile)
    return CopiesResult(
        images=len(generated),
        train=len(train),
        test=len(test),
        quantile=config.quantile,
        encoder=Path(config.encoder).name if config.encoder else "teacher",
        exact_copies=len(duplicate_indices(generated, train)),
        spaces={"pixels": in_pixels, "features": in_features},
        fidelity={
            "generated": fidelity(real, fake, derive_seed(seed, "fidelity")),
            # Real against real: what the same measures say of images that are certainly good.
            "test": fidelity(real, unseen, derive_seed(seed, "fidelity")),
        },
    )


def measure_distilled_copies(run: Path, folder: Path, seed: int) -> CopySpace | None:
    """Compare the distilled set in `folder` with the real images, by pixels, as by default generated ones
    are; None where no test image is left as a yardstick."""
    config, device = CopiesConfig(), pick_device()
    train, test = _distinct(load_stored_splits(run / SPLITS_FILE), config.images, seed)
    if not len(test):
        return None
    distilled = DistilledSet.load(folder / SET_FILE).as_bytes()
    spaces = (pixels(images.to(device)) for images in (distilled, train, test))
    return copy_figures(*spaces, quantile=config.quantile)


def _distinct(splits: Splits, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Training images without exact copies, and at most so many test images that are nobody's copies."""
    train = splits.train.without(duplicate_indices(splits.train.images)).images
    test = splits.test.images
    test = test[all_but(len(test), torch.cat([duplicate_indices(test), duplicate_indices(test, train)]))]
    order = torch.randperm(len(test), generator=seeded_generator(seed, "copies test"))
    return train, test[order[:most]]


def _generate(run: Path, spec: StudentSpec, prior: Tensor, count: int, seed: int) -> Tensor:
    sampler = _sampler(run, spec, prior, derive_seed(seed, "copies standing"), calibration_images=2048)
    classes = torch.multinomial(
        prior, count, replacement=True, generator=seeded_generator(seed, "copies classes")
    )
    return sampler.images(classes, seeded_generator(seed, "copies"))


def _samples(run: Path, spec: StudentSpec, prior: Tensor) -> Tensor:
    sampler = _sampler(run, spec, prior, derive_seed("report"), calibration_images=1024)
    classes = torch.arange(min(len(prior), SHOWN_CLASSES))
    images = sampler.images(
        classes.repeat_interleave(SAMPLES_PER_CLASS), seeded_generator("report samples")
    ).cpu()
    return images.unflatten(0, (len(classes), SAMPLES_PER_CLASS))


def _sampler(run: Path, spec: StudentSpec, prior: Tensor, seed: int, calibration_images: int) -> Sampler:
    return generator_of(spec.generator).open(
        run / checkpoint_file(spec.checkpoint_epoch),
        spec.synthesis.sampling,
        prior=prior,
        seed=seed,
        device=pick_device(),
        batch_size=128,
        calibration_images=calibration_images,
    )


def _keep_samples(folder: Path, samples: Tensor) -> None:
    with atomic_write(folder / SAMPLES_FILE) as temporary, temporary.open("wb") as file:
        np.save(file, samples.numpy(), allow_pickle=False)
