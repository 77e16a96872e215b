"""Captured and compiled steps give on a GPU what plain calls give; on a CPU they are plain calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_gan import small_gan, tiny_images
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kr_ray.classifiers.networks import new_classifier
from kr_ray.classifiers.resnet import ResNet14
from kr_ray.classifiers.sets import FixedSet, smoothed_one_hot
from kr_ray.classifiers.training import ClassifierTraining, Schedule
from kr_ray.compute import graphs
from kr_ray.compute.graphs import Captured
from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import ClassifierConfig
from kr_ray.data.images import LabelledImages
from kr_ray.generators.biggan.sampling import BigGanSampler
from kr_ray.generators.biggan.training import GanTraining
from kr_ray.synthesis.labelling import seen_labeller

CPU = torch.device("cpu")
PLAIN = {"capture": False, "compile": "never"}
CAPTURED = {"capture": True, "compile": "never"}
COMPILED = {"capture": True, "compile": "always"}


def test_on_a_cpu_a_captured_function_is_the_function() -> None:
    seen: list[Tensor] = []
    captured = Captured(seen.append, CPU)
    value = torch.ones(2)
    for _ in range(6):
        assert captured(value) is None
    assert not captured.active
    assert len(seen) == 6
    assert all(given is value for given in seen)


def test_a_policy_ends_with_its_block() -> None:
    before = graphs._policy
    with pytest.raises(KeyError), graphs.policy(capture=False):
        assert not graphs._policy.capture
        raise KeyError
    assert graphs._policy == before


# --- on a GPU -----------------------------------------------------------------------------------------------


def test_networks_of_one_kind_repay_compiling_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_images_asked_for", {})
    asked = [graphs._repaid(ResNet14, 400.0, 1000.0) for _ in range(4)]
    assert asked == [False, False, True, True]
    assert not graphs._repaid(ResNet14, 400.0, 2000.0)  # another use, at another price
    assert not graphs._repaid(nn.Linear, 999.0, 1000.0)


@pytest.mark.gpu
def test_replays_follow_their_arguments_and_results_are_kept_apart() -> None:
    device = torch.device("cuda")
    total = torch.zeros((), device=device)

    def function(x: Tensor, y: Tensor) -> Tensor:
        total.add_(x.sum())
        return x * y

    captured = Captured(function, device)
    inputs = [torch.full((size,), float(k), device=device) for size in (2, 3) for k in range(8)]
    results = [captured(x, x + 1) for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, x * (x + 1))
    assert total.item() == sum(x.sum().item() for x in inputs)
    with FlopCounterMode(display=False) as counter:
        matrix = Captured(torch.mm, device)
        for _ in range(6):
            matrix(torch.ones(2, 2, device=device), torch.ones(2, 2, device=device))
    assert counter.get_total_flops() == 6 * 16


def trained_classifier(
    keys: dict[str, Any], steps: int, interrupted_at: int | None = None, seen: bool = False
) -> ResNet14:
    """With `seen`, another classifier answers what it sees."""
    device = torch.device("cuda")
    recipe = ClassifierConfig(width=8, batch_size=32, precision="full", learning_rate=0.05)
    pixels = torch.randint(256, (160, 3, 16, 16), generator=seeded_generator("graphs"), dtype=torch.uint8)
    images = LabelledImages(pixels, torch.arange(160) % 4).to(device)

    def new() -> ClassifierTraining:
        data = FixedSet(images.images, smoothed_one_hot(images.labels, 4, 0.1))
        schedule = Schedule.of_steps(recipe, 160, batch=32, steps=steps)
        teacher = new_classifier(4, 3, recipe, 1).requires_grad_(False).eval().to(device)
        labeller = seen_labeller(graphs.compiled(teacher, device, 1, 1), 2.0, device) if seen else None
        return ClassifierTraining(
            new_classifier(4, 3, recipe, 0), data, recipe, schedule, 0, device, labeller
        )

    with graphs.policy(**keys):
        training = new()
        if interrupted_at is not None:
            training.train_until(interrupted_at)
            state = copy.deepcopy(training.state_dict())
            assert isinstance(state["optimizer"]["param_groups"][0]["lr"], float)
            training.train_until(steps)  # what follows a saved state must not reach it
            training = new()
            training.load_state_dict(state)
        training.train_until(steps)
    return training.model


def assert_networks_close(ours: ResNet14, theirs: ResNet14, tolerance: float) -> None:
    for (name, own), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(
            own, other, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.gpu
@pytest.mark.parametrize(("keys", "interrupted_at"), [(CAPTURED, None), (CAPTURED, 7), (COMPILED, None)])
def test_a_classifier_trained_by_replays_is_the_same(
    keys: dict[str, Any], interrupted_at: int | None
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    expected = trained_classifier(PLAIN, 12)
    assert_networks_close(trained_classifier(keys, 12, interrupted_at), expected, 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [CAPTURED, COMPILED])
def test_a_student_whose_teacher_answers_by_replays_is_the_same(keys: dict[str, Any]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    expected = trained_classifier(PLAIN, 12, seen=True)
    assert_networks_close(trained_classifier(keys, 12, seen=True), expected, 2e-3)
    unlike = trained_classifier(PLAIN, 12)
    assert any(
        (own - other).abs().max() > 1e-2
        for own, other in zip(expected.parameters(), unlike.parameters(), strict=True)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [CAPTURED, COMPILED])
def test_a_generator_trained_by_replays_is_the_same(keys: dict[str, Any]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows, averages = [], []
    for policy in (PLAIN, keys):
        with graphs.policy(**policy):
            training = GanTraining(
                tiny_images(), 2, small_gan(precision="full", d_steps=2), 0, torch.device("cuda")
            )
            rows.append([training.train_epoch() for _ in range(4)])
            state = training.state()
            training.load_state(state)
            rows[-1] += [training.train_epoch() for _ in range(4)]
        averages.append(training.average.average)
    for ours, theirs in zip(rows[1], rows[0], strict=True):
        assert ours["loss_d"] == pytest.approx(theirs["loss_d"], rel=5e-3)
        assert ours["loss_g"] == pytest.approx(theirs["loss_g"], rel=5e-3)
    for name, value in averages[0].items():
        torch.testing.assert_close(averages[1][name], value, rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
def test_captured_generation_draws_the_same_images() -> None:
    config, device = small_gan(), torch.device("cuda")
    made = []
    for keys in (PLAIN, CAPTURED):
        with graphs.policy(**keys):
            training = GanTraining(tiny_images(), 2, config, 0, CPU)
            generator = type(training.generator)(config, 2, tiny_images().images.shape[1])
            generator.load_folded_weights(training.generator.folded_weights())
            for latent_std in (1.0, 1.7):
                sampler = BigGanSampler(
                    generator, device, latent_std=latent_std, prior=torch.tensor([0.5, 0.5]), seed=0,
                    batch_size=16,
                    standing_batches=2,
                )  # fmt: skip
                made.append(sampler.images(torch.arange(150) % 2, seeded_generator("images")))
    for plain, captured in zip(made[:2], made[2:], strict=True):
        assert (plain.int() - captured.int()).abs().max() <= 1
