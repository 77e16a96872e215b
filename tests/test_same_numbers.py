"""What makes training fast changes no result: on digits, same seed, the
numbers of the loops as one would write them first.

The plain loops share the product's random draws (order, augmentation, latents) and nothing that makes it
fast: contiguous memory, optimisers and averages that loop over tensors, the loss read at every step, torch's
spectral norm at every evaluation, two passes of D, both networks differentiated. Both sides compute in
float64, for training magnifies the last bit: in float32 the losses of two orders of summation differ by 2e-7
after one step of this teacher, by 1e-3 after ten and by 0.1 after sixty, while the curves stay the same to
the eye.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import REPOSITORY
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from kr_ray.bench.plain_gan import PlainConditionalNorm, PlainGanSteps
from kr_ray.classifiers.networks import new_classifier
from kr_ray.classifiers.sets import FixedSet, smoothed_one_hot
from kr_ray.classifiers.training import AUGMENTED_AT_ONCE, ClassifierTraining, Schedule
from kr_ray.compute.seeding import seeded_generator
from kr_ray.config.file import load_config
from kr_ray.data.augment import crop_and_flip, mixup, to_float, trivial_augment
from kr_ray.data.datasets import load_splits
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.generators.biggan.spectral_norm import SpectralLayer
from kr_ray.generators.biggan.training import GanTraining
from kr_ray.synthesis.labelling import seen_labeller

CPU = torch.device("cpu")
CONFIG = load_config(REPOSITORY / "configs" / "quickstart.yaml", ["classifier.precision=full"])
SEED = 0
TEMPERATURE = 0.1


@pytest.fixture(scope="module")
def digits() -> Splits:
    return load_splits(CONFIG.data)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- classifier ---------------------------------------------------------------------------------------------


def double_classifier(splits: Splits) -> nn.Module:
    model = new_classifier(splits.num_classes, 1, CONFIG.classifier, SEED)
    model.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return model


def plain_losses(
    model: nn.Module, data: FixedSet, schedule: Schedule, epochs: int, asked: nn.Module | None = None
) -> list[float]:
    """Train `model` and return its mean loss per epoch; its targets are the
    answers of `asked` to what it sees, if given."""
    recipe, size = CONFIG.classifier, schedule.batch_size
    optimizer = torch.optim.SGD(
        model.parameters(),
        1.0,
        recipe.momentum,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        foreach=False,
        fused=False,
    )
    batches_per_draw = AUGMENTED_AT_ONCE["cpu"] // size
    losses = []
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=seeded_generator(SEED, "order", epoch))[
            : schedule.steps_per_epoch * size
        ]
        total = 0.0
        for position, index in enumerate(order.split(size)):
            if position % batches_per_draw == 0:
                random = seeded_generator(SEED, "augment", epoch, position)
                drawn = data.images[order[position * size : (position + batches_per_draw) * size]]
                augmented = trivial_augment(
                    crop_and_flip(drawn, recipe.crop_padding, recipe.horizontal_flip, random), random
                )
            step, first = epoch * schedule.steps_per_epoch + position, position % batches_per_draw * size
            pixels = augmented[first : first + size].float() / 127.5 - 1
            pixels, targets = mixup(
                pixels, data.targets[index], recipe.mixup_alpha, seeded_generator(SEED, "mixup", step)
            )
            if asked is not None:
                targets = (asked(pixels).float() / TEMPERATURE).softmax(1).detach()
            loss = functional.cross_entropy(model(pixels).float(), targets)
            optimizer.param_groups[0]["lr"] = schedule.rate(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm, foreach=False)
            optimizer.step()
            total += loss.item()
        losses.append(total / schedule.steps_per_epoch)
    return losses


def test_a_teacher_has_the_plain_loops_losses(digits: Splits) -> None:
    """Two epochs of 67 steps with the whole recipe; measured: equal to 9e-9."""
    recipe = CONFIG.classifier
    assert all(
        (
            recipe.trivial_augment,
            recipe.mixup_alpha,
            recipe.crop_padding,
            recipe.weight_decay,
            recipe.clip == "global",
        )
    )
    data = FixedSet(
        digits.train.images, smoothed_one_hot(digits.train.labels, digits.num_classes, recipe.label_smoothing)
    )
    schedule = Schedule.fit(recipe, len(data), 10)
    product = ClassifierTraining(double_classifier(digits), data, recipe, schedule, SEED, CPU)
    found = [product.train_until(epoch * schedule.steps_per_epoch) for epoch in (1, 2)]
    assert found == pytest.approx(plain_losses(double_classifier(digits), data, schedule, 2), abs=1e-5)
    assert found[1] < found[0] - 0.1


def test_a_student_of_seen_labels_has_the_plain_loops_losses(digits: Splits) -> None:
    """A teacher of half an epoch, sharpened, answers what its student sees for a whole one."""
    data = FixedSet(digits.train.images, smoothed_one_hot(digits.train.labels, digits.num_classes, 0.1))
    schedule = Schedule.fit(CONFIG.classifier, len(data), 10)
    asked = double_classifier(digits)
    taught = ClassifierTraining(asked, data, CONFIG.classifier, schedule, SEED + 1, CPU)
    taught.train_until(schedule.steps_per_epoch // 2)
    asked.eval().requires_grad_(False)
    unlabelled = FixedSet(data.images, torch.empty(len(data), 0))
    labeller = seen_labeller(asked, TEMPERATURE, CPU)
    assert labeller(to_float(data.images[:100])).max(1).values.mean() > 0.3  # it has opinions
    product = ClassifierTraining(
        double_classifier(digits), unlabelled, CONFIG.classifier, schedule, SEED, CPU, labeller
    )
    found = [product.train_until(schedule.steps_per_epoch)]
    assert found == pytest.approx(plain_losses(double_classifier(digits), data, schedule, 1, asked), abs=1e-5)


# --- generator ----------------------------------------------------------------------------------------------


class PlainGan(PlainGanSteps):
    """Iterates its spectral norms when the product does, once per update, and
    keeps the product's average of normalised weights."""

    def __init__(self, product: GanTraining) -> None:
        random = seeded_generator(product.seed, "generator", 0)
        super().__init__(product.generator, product.discriminator, product.images, product.config, random)
        self.decay = product.average.decay
        self.names = [
            name for name, layer in product.generator.named_modules() if isinstance(layer, SpectralLayer)
        ]
        for network in (self.generator, self.discriminator):
            for module in network.modules():
                if isinstance(module, _SpectralNorm):
                    module.eval()
        self.ramped, self.images_seen, self.images_averaged = self.normalised_weights(), 0, 0

    def _d_step(self, index: Tensor) -> None:
        self.iterate(self.discriminator)
        super()._d_step(index)
        self.images_seen += len(index)

    def _g_step(self) -> None:
        self.iterate(self.discriminator)
        super()._g_step()
        self.iterate(self.generator)
        decay = self.decay(self.images_seen - self.images_averaged, self.images_seen)
        self.images_averaged = self.images_seen
        for name, weight in self.normalised_weights().items():
            self.ramped[name] = decay * self.ramped[name] + (1 - decay) * weight

    @torch.no_grad()
    def iterate(self, network: nn.Module) -> None:
        """Miyato et al. 2018, algorithm 1, matrix by matrix."""
        for layer in network.modules():
            if parametrize.is_parametrized(layer, "weight"):
                weight = layer.parametrizations.weight
                matrix = weight[0]._reshape_weight_to_matrix(weight.original)
                weight[0]._v.copy_(functional.normalize(matrix.T @ weight[0]._u, dim=0))
                weight[0]._u.copy_(functional.normalize(matrix @ weight[0]._v, dim=0))

    def normalised_weights(self) -> dict[str, Tensor]:
        """Under the names of the product's checkpoint."""
        found = {}
        for name in self.names:
            layer = self.generator.get_submodule(name)
            parts = (layer.gain, layer.bias) if isinstance(layer, PlainConditionalNorm) else (layer,)
            found[f"{name}.weight"] = torch.cat([part.weight.detach() for part in parts])
        return found


def test_a_gan_has_the_plain_loops_average(digits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of 32 D and 16 G steps; measured: equal to 3e-14, where the average moves by 0.01 to 0.1."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the networks' last layers mean "not in bfloat16"
    images = LabelledImages(digits.train.images[:1024], digits.train.labels[:1024])  # whole batches
    product = GanTraining(images, digits.num_classes, CONFIG.generator, SEED, CPU)
    plain = PlainGan(product)
    start = dict(plain.ramped)
    product.train_epoch()
    plain.run()
    found = product.checkpoint().weights
    for name, expected in plain.ramped.items():
        torch.testing.assert_close(
            found[name], expected, rtol=0, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert (expected - start[name]).abs().max() > 1e-3, name
    assert len(plain.ramped) > 15
