"""Suite of private training: what a DP-SGD step costs beside a plain one of the same network."""

from __future__ import annotations

from kr_ray.bench.harness import Variant, measure, ratio
from kr_ray.bench.materials import CHANNELS, NUM_CLASSES, PLAIN, Bench, Found, random_images, recipe
from kr_ray.bench.training import ProductSteps
from kr_ray.classifiers.networks import new_classifier
from kr_ray.config import ClassifierConfig
from kr_ray.config.dp import DpSgdSection
from kr_ray.data.images import LabelledImages
from kr_ray.dp.noise import insecure_key
from kr_ray.methods.dp_sgd import DpSgdPlan, DpSgdTraining

MODES = ("hooks", "ghost")
"""Of Opacus' ways to per-image gradients, the default and that which spares memory."""


class PrivateSteps:
    """So many noisy steps per call, without an end; batches are Poisson samples of about `batch_size`."""

    def __init__(self, images: LabelledImages, keys: ClassifierConfig, mode: str, steps: int) -> None:
        section = DpSgdSection.model_validate(
            {"noise_multiplier": 1.0, "expected_batch_size": keys.batch_size, "grad_sample_mode": mode}
        )
        plan = DpSgdPlan(len(images), keys.batch_size / len(images), 10**9, 1.0, 1e-5)
        model = new_classifier(NUM_CLASSES, CHANNELS, keys, seed=0)
        device = images.images.device
        self.training = DpSgdTraining(model, images, keys, section, plan, insecure_key("bench"), 0, device)
        self.steps = steps

    def run(self) -> None:
        self.training.train_until(self.training.step + self.steps)


def dp_sgd_step(bench: Bench) -> Found:
    """Forward, per-image gradients, clip, noise and update, against the product's plain steps."""
    width, batch, steps = bench.sizes.steps[0]
    keys = recipe(width=width, batch_size=batch, norm="group", **PLAIN)
    images = random_images(batch * steps, bench.sizes.image_size, bench.device)
    plain = Variant(
        f"plain steps of width {width}, batch {batch}", ProductSteps(images, keys).run, len(images)
    )
    private = [
        Variant(
            f"DP-SGD steps of width {width}, batch {batch}, {mode}",
            PrivateSteps(images, keys, mode, steps).run,
            len(images),
            counted=False,
        )
        for mode in MODES
    ]
    timings = measure([plain, *private], bench.rounds, bench.meter)
    plainly, *privately = timings.values()
    return Found(
        [
            ratio(f"DP-SGD step ({mode}): time over the plain one's", [timing], [plainly], "at most", 4)
            for mode, timing in zip(MODES, privately, strict=True)
        ],
        list(timings.values()),
        ("plain and private steps are of a network with group norm",),
    )
