"""The one classifier loop: its schedule, its recipe, and that interruption changes nothing."""

from __future__ import annotations

import io
import math

import pytest
import torch
from conftest import tiny_recipe

from kr_ray.classifiers.networks import new_classifier
from kr_ray.classifiers.predict import accuracy, confusion_matrix, predict_logits
from kr_ray.classifiers.resnet import ResNet14
from kr_ray.classifiers.sets import FixedSet, smoothed_one_hot
from kr_ray.classifiers.training import ClassifierTraining, Schedule
from kr_ray.config import ClassifierConfig

CPU = torch.device("cpu")
PAPER = ClassifierConfig()


def images_of_two_classes(count: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Dark and bright noise, uint8 [count, 1, 16, 16]."""
    random = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 1, 16, 16), generator=random)
    return (noise + 150 * labels[:, None, None, None]).to(torch.uint8), labels


def training(recipe: ClassifierConfig, epochs: float = 4, seed: int = 0) -> ClassifierTraining:
    images, labels = images_of_two_classes()
    data = FixedSet(images, smoothed_one_hot(labels, 2, recipe.label_smoothing))
    model = new_classifier(2, 1, recipe, seed)
    return ClassifierTraining(model, data, recipe, Schedule.fit(recipe, len(images), epochs), seed, CPU)


def weights(model: ResNet14) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def test_the_paper_scale_schedule_is_table_4_unchanged() -> None:
    schedule = Schedule.fit(PAPER, images_per_epoch=40_000, epochs=500)
    assert (schedule.batch_size, schedule.learning_rate, schedule.steps_per_epoch) == (256, 0.5, 156)
    assert schedule.steps == 500 * 156
    assert schedule.warmup_steps == 10 * 156


def test_rate_equals_torchs_warm_up_and_cosine() -> None:
    schedule = Schedule.fit(PAPER, images_per_epoch=2560, epochs=100)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    warm = schedule.warmup_steps
    reference = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-5 / 0.5, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=schedule.steps - warm),
        ],
        milestones=[warm],
    )
    for step in range(schedule.steps):
        assert schedule.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-9)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("images", [54, 235, 546, 1257, 4708])
@pytest.mark.parametrize("epochs", [10, 30, 100])
def test_small_budgets_keep_to_the_stated_rules(images: int, epochs: int) -> None:
    schedule = Schedule.fit(PAPER, images, epochs)
    assert 16 <= schedule.batch_size <= min(256, images)
    assert schedule.learning_rate == pytest.approx(0.5 * schedule.batch_size / 256)
    assert schedule.warmup_steps <= schedule.steps / 10
    halved_enough = schedule.steps >= PAPER.min_steps or schedule.batch_size < 32
    assert halved_enough


def test_training_learns_and_a_second_run_is_identical() -> None:
    recipe = tiny_recipe(trivial_augment=False, mixup_alpha=0.0, precision="full")
    first, second = training(recipe, epochs=8), training(recipe, epochs=8)
    for run in (first, second):
        run.train_until(run.schedule.steps)
    images, labels = images_of_two_classes()
    assert accuracy(predict_logits(first.model, images, CPU), labels) > 0.95
    assert torch.equal(weights(first.model), weights(second.model))


@pytest.mark.parametrize("stop", [1, 5, 7])
@pytest.mark.parametrize("precision", ["mixed", "full"])
def test_a_training_interrupted_at_any_step_ends_bit_equal(stop: int, precision: str) -> None:
    recipe = tiny_recipe(precision=precision, min_steps=0, batch_size=16)
    undisturbed, broken = training(recipe, epochs=2), training(recipe, epochs=2)
    undisturbed.train_until(undisturbed.schedule.steps)
    broken.train_until(stop)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    resumed = training(recipe, epochs=2, seed=0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.train_until(resumed.schedule.steps)
    assert torch.equal(weights(undisturbed.model), weights(resumed.model))


def test_one_plain_step_equals_torch_sgd() -> None:
    """Against the step written with nothing but torch: no augmentation, no mixup, one batch of all images."""
    recipe = tiny_recipe(
        trivial_augment=False,
        mixup_alpha=0.0,
        crop_padding=0,
        precision="full",
        batch_size=96,
        min_steps=0,
        warmup_epochs=0,
    )
    ours = training(recipe, epochs=1)
    images, labels = images_of_two_classes()
    order = torch.randperm(
        96, generator=torch.Generator().manual_seed(0)
    )  # any order: batch statistics do not depend on it
    reference = new_classifier(2, 1, recipe, 0)
    optimizer = torch.optim.SGD(
        reference.parameters(),
        lr=ours.schedule.rate(0),
        momentum=0.9,
        nesterov=True,
        weight_decay=recipe.weight_decay,
    )
    loss = torch.nn.functional.cross_entropy(
        reference(images[order].float() / 127.5 - 1), labels[order], label_smoothing=recipe.label_smoothing
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    optimizer.step()
    assert ours.train_until(1) == pytest.approx(loss.item(), abs=1e-5)
    # Sums in another memory order differ in the last bits, which batch norm of a small network magnifies.
    moved = (weights(reference) - weights(new_classifier(2, 1, recipe, 0))).norm()
    assert (weights(ours.model) - weights(reference)).norm() < 1e-3 * moved


def test_per_parameter_clipping_bounds_every_gradient() -> None:
    run = training(tiny_recipe(clip="per_parameter", clip_norm=1e-3))
    run.train_until(1)
    assert all(p.grad.norm() <= 1e-3 + 1e-6 for p in run.model.parameters() if p.grad is not None)


def test_a_loss_that_is_not_finite_is_an_error_with_a_remedy() -> None:
    run = training(tiny_recipe(precision="full"))
    with torch.no_grad():
        next(run.model.parameters()).fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"lower classifier\.learning_rate"):
        run.train_until(1)


def test_confusion_matrix_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    assert confusion_matrix(logits, torch.tensor([0, 1, 1])) == [[1, 0], [1, 1]]
