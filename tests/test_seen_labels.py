"""The teacher's answers to exactly what the student sees: those of a
plain loop, interrupted or shared out, too."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe, tiny_settings
from test_classifier import images_of_two_classes, weights
from test_parallel import on_workers
from torch import Tensor, nn
from torch.nn import functional

from kr_ray.classifiers.networks import new_classifier
from kr_ray.classifiers.predict import teacher_probabilities
from kr_ray.classifiers.resnet import ResNet14
from kr_ray.classifiers.sets import FixedSet
from kr_ray.classifiers.training import AUGMENTED_AT_ONCE, ClassifierTraining, Schedule
from kr_ray.compute.devices import autocast
from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import BigGanSampling, ClassifierConfig, ConfigError, SynthesisConfig
from kr_ray.config.file import parse_config
from kr_ray.data.augment import crop_and_flip, mixup, to_float, trivial_augment
from kr_ray.synthesis.labelling import seen_labeller

CPU = torch.device("cpu")
SEED = 5
RECIPE = tiny_recipe(min_steps=0, batch_size=16, mixup_alpha=1.0)


def teacher() -> ResNet14:
    frozen = new_classifier(2, 1, RECIPE, 99).requires_grad_(False).eval()
    return frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def student(recipe: ClassifierConfig = RECIPE, temperature: float = 1.0) -> ClassifierTraining:
    images, _ = images_of_two_classes()
    data, schedule = FixedSet(images, torch.empty(len(images), 0)), Schedule.fit(recipe, len(images), 3)
    labeller = seen_labeller(teacher(), temperature, CPU)
    return ClassifierTraining(new_classifier(2, 1, recipe, SEED), data, recipe, schedule, SEED, CPU, labeller)


def taught(training: ClassifierTraining) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of every gradient step."""
    steps: list[tuple[Tensor, Tensor]] = []
    step: Callable[..., None] = training._gradient_step

    def recorded(inputs: Tensor, targets: Tensor) -> None:
        steps.append((inputs.clone(), targets.clone()))
        step(inputs, targets)

    training._gradient_step = recorded  # type: ignore[assignment]
    training.train_until(training.schedule.steps)
    return steps


def plain_steps(
    recipe: ClassifierConfig, schedule: Schedule, temperature: float
) -> list[tuple[Tensor, Tensor]]:
    """As one would write it first: batch by batch augment, mix, ask the teacher."""
    (images, _), asked, size = images_of_two_classes(), teacher(), schedule.batch_size
    at_once, steps = AUGMENTED_AT_ONCE["cpu"] // size * size, []
    for epoch in range(schedule.steps // schedule.steps_per_epoch):
        order = torch.randperm(len(images), generator=seeded_generator(SEED, "order", epoch))
        assert len(order) <= at_once  # so the whole epoch draws its augmentation from one generator
        random = seeded_generator(SEED, "augment", epoch, 0)
        drawn = crop_and_flip(images[order], recipe.crop_padding, recipe.horizontal_flip, random)
        drawn = trivial_augment(drawn, random) if recipe.trivial_augment else drawn
        for position in range(schedule.steps_per_epoch):
            pixels = drawn[position * size : (position + 1) * size].float() / 127.5 - 1
            random = seeded_generator(SEED, "mixup", epoch * schedule.steps_per_epoch + position)
            pixels, _ = mixup(pixels, torch.zeros(size, 2), recipe.mixup_alpha, random)
            with torch.inference_mode(), autocast(CPU, "mixed"):
                logits = asked(pixels.contiguous(memory_format=torch.channels_last)).float()
            steps.append((pixels, functional.softmax(logits / temperature, dim=1)))
    return steps


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_step_is_taught_what_a_plain_loop_would_teach_to_the_last_bit(temperature: float) -> None:
    training = student(temperature=temperature)
    found, expected = taught(training), plain_steps(RECIPE, training.schedule, temperature)
    assert len(found) == len(expected) == training.schedule.steps == 18
    for step, (own, plain) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(own[0], plain[0]), step
        assert torch.equal(own[1], plain[1]), step
    assert max((targets[:, 0] - 0.5).abs().max() for _, targets in found) > 0.01  # the teacher has opinions


def test_without_augmentation_and_mixup_seen_labels_are_the_clean_ones() -> None:
    """The null case: then the student sees the clean image."""
    recipe = RECIPE.model_copy(
        update={"trivial_augment": False, "crop_padding": 0, "horizontal_flip": False, "mixup_alpha": 0.0}
    )
    images, _ = images_of_two_classes()
    clean = teacher_probabilities(teacher(), images)
    for inputs, targets in taught(student(recipe)):
        matches = (to_float(images)[None] == inputs[:, None]).flatten(2).all(2)
        torch.testing.assert_close(targets, clean[matches.int().argmax(1)], rtol=0, atol=1e-6)


def test_mixed_images_are_not_taught_the_mixture_of_the_clean_labels() -> None:
    """What `seen` is for: the answer to a mixture is not the mixture of the answers."""
    (images, _), recipe = (
        images_of_two_classes(),
        RECIPE.model_copy(update={"trivial_augment": False, "crop_padding": 0}),
    )
    clean = teacher_probabilities(teacher(), images[:16])
    random = [seeded_generator("mixture") for _ in range(2)]
    inputs, mixed = mixup(to_float(images[:16]), clean, recipe.mixup_alpha, random[0])
    asked = seen_labeller(teacher(), 1.0, CPU)(inputs)
    assert (asked - mixed).abs().max() > 1e-4
    assert torch.equal(
        asked, seen_labeller(teacher(), 1.0, CPU)(mixup(to_float(images[:16]), clean, 1.0, random[1])[0])
    )


class Fixed(nn.Module):
    """Logits ln 1, ln 4 whatever it is shown."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([1.0, 4.0]).log().expand(len(images), 2)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, [1 / 5, 4 / 5]), (2.0, [1 / 3, 2 / 3]), (0.5, [1 / 17, 16 / 17])]
)
def test_temperature_by_hand(temperature: float, expected: list[float]) -> None:
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    for found in (
        teacher_probabilities(Fixed(), images, temperature),
        seen_labeller(Fixed(), temperature, CPU)(to_float(images)),
    ):
        torch.testing.assert_close(found, torch.tensor([expected] * 3))


@pytest.mark.parametrize("stop", [1, 7])
def test_a_student_of_seen_labels_interrupted_at_any_step_ends_bit_equal(stop: int) -> None:
    undisturbed, broken, resumed = student(), student(), student()
    undisturbed.train_until(undisturbed.schedule.steps)
    broken.train_until(stop)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.train_until(resumed.schedule.steps)
    assert torch.equal(weights(undisturbed.model), weights(resumed.model))


def first_seen_steps() -> list[float]:
    training = student(RECIPE.model_copy(update={"precision": "full", "learning_rate": 0.05}))
    losses = [training.train_until(step + 1) for step in range(4)]
    return [*losses, weights(training.model).norm().item()]


def test_the_teacher_answers_a_slice_as_it_answers_the_batch() -> None:
    inputs = to_float(images_of_two_classes()[0])
    asked = seen_labeller(teacher(), 1.0, CPU)
    parts = torch.cat([asked(part) for part in inputs.tensor_split(7)])
    torch.testing.assert_close(parts, asked(inputs), rtol=0, atol=2e-3)  # bfloat16 where the CPU has it


def test_workers_ask_the_teacher_about_their_slices_and_take_the_steps_of_one(tmp_path: Path) -> None:
    alone, (first, *others) = first_seen_steps(), on_workers(3, tmp_path, first_seen_steps)
    assert all(other == first for other in others)
    assert first == pytest.approx(alone, rel=1e-3)


def test_students_without_mixup_leave_the_teachers_recipe_as_it_is() -> None:
    assert SynthesisConfig().student_recipe(RECIPE) is RECIPE
    without = SynthesisConfig(student_mixup=False).student_recipe(RECIPE)
    assert without.mixup_alpha == 0 and RECIPE.mixup_alpha == 1
    assert without == RECIPE.model_copy(update={"mixup_alpha": 0.0})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"synthesis": {"view": "seen", "labelling": "hard"}}, r"labelling: gkd.*view=seen"),
        ({"synthesis": {"temperature": 2.0, "labelling": "filter"}}, r"labelling: gkd.*temperature=2\.0"),
        ({"synthesis": {"temperature": 0.0}}, r"synthesis\.temperature"),
        (
            {"synthesis": {"view": "seen"}, "student": {"from_parquet": "set"}},
            r"view: clean.*not the teacher itself",
        ),
    ],
)
def test_labels_that_cannot_be_are_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(tiny_settings(**sections))


def test_another_strategy_falls_back_to_what_it_knows() -> None:
    seen = SynthesisConfig(view="seen", temperature=2.0, sampling=BigGanSampling(latent_std=1.3))
    assert seen.labelled_by("gkd") == seen
    assert seen.labelled_by("hard") == SynthesisConfig(
        labelling="hard", sampling=BigGanSampling(latent_std=1.3)
    )
