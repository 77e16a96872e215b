"""The adversarial loop: losses by hand, exact resume, the average, and that it learns something."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from recorder import Recorder, assert_bit_equal
from test_models import generator_config
from torch import Tensor
from torch.nn import functional

from kr_ray.classifiers.training import Schedule
from kr_ray.config import BigGanConfig
from kr_ray.data.datasets import load_splits
from kr_ray.data.images import LabelledImages
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.generators.biggan.training import GanTraining, discriminator_loss, generator_loss
from kr_ray.generators.checkpoints import train_generator
from kr_ray.generators.ema import ExponentialAverage, half_life_in_images
from kr_ray.generators.registry import generator_of
from kr_ray.methods.teacher import train_teacher

CPU = torch.device("cpu")


def small_gan(**keys: Any) -> BigGanConfig:
    defaults = {
        "architecture": "tiny16",
        "channels": 4,
        "epochs": 4,
        "batch_size": 8,
        "d_steps": 2,
        "checkpoint_every": 1,
    }
    return generator_config(**(defaults | keys))


def tiny_images(count: int = 29) -> LabelledImages:
    """Class 0 is dark, class 1 bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 1, 16, 16), generator=generator)
    return LabelledImages((noise + 180 * labels[:, None, None, None]).to(torch.uint8), labels)


def run(
    config: BigGanConfig,
    resume: dict[str, Any] | None = None,
    states_every: int | None = None,
    stop_at: int = 0,
) -> Recorder:
    return Recorder(stop_at).finish(
        GanTraining(tiny_images(), 2, config, 7, CPU), config, resume, states_every
    )


# --- resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["ours", "vanilla"])
def test_resumed_training_equals_a_straight_one(preset: str) -> None:
    # 29 images in batches of 8 are 3 D steps per epoch: 2 per G step leaves a remainder that crosses epochs.
    config = small_gan(preset=preset, d_steps=2, horizontal_flip=True)
    straight = run(config)
    resumed = run(config, resume=straight.whole_state(2))
    assert [c.epoch for c in straight.checkpoints] == [1, 2, 3, 4]
    assert [c.epoch for c in resumed.checkpoints] == [3, 4]
    assert_bit_equal(straight.state(4), resumed.state(4))
    assert_bit_equal(straight.checkpoints[3].weights, resumed.checkpoints[1].weights)


def test_state_of_an_epoch_differs_from_the_next() -> None:
    states = run(small_gan(epochs=2))
    assert not torch.equal(
        states.state(1)["generator"]["linear.weight"], states.state(2)["generator"]["linear.weight"]
    )
    assert states.state(2)["optimizer_d"][0]["step"].item() == 6


def test_the_seed_decides() -> None:
    runs = [GanTraining(tiny_images(), 2, small_gan(), seed, CPU) for seed in (1, 1, 2)]
    losses = [run.train_epoch()["loss_d"] for run in runs]
    assert losses[0] == losses[1] != losses[2]


# --- schedule -----------------------------------------------------------------------------------------------


def test_g_steps_follow_d_steps_across_epochs() -> None:
    recorder = run(small_gan(d_steps=4, epochs=4))
    steps = [
        state["optimizer_g"][0]["step"].item() if state["optimizer_g"] else 0
        for state in map(recorder.state, range(1, 5))
    ]
    assert steps == [0, 1, 2, 3]  # after 3, 6, 9, 12 D steps
    assert [row["images_seen"] for row in recorder.rows] == [24, 48, 72, 96]


def test_callbacks_keep_their_rhythm() -> None:
    recorder = run(small_gan(checkpoint_every=2, epochs=5), states_every=3)
    assert [c.epoch for c in recorder.checkpoints] == [2, 4]
    assert list(recorder.states) == [3, 5]
    assert [row["epoch"] for row in recorder.rows] == [1, 2, 3, 4, 5]


def test_a_checkpoint_callback_can_stop_the_training() -> None:
    recorder = run(small_gan(epochs=9), states_every=9, stop_at=2)
    assert len(recorder.rows) == 2
    assert list(recorder.states) == [2]


def test_fewer_images_than_a_batch() -> None:
    training = GanTraining(tiny_images(5), 2, small_gan(batch_size=64), 0, CPU)
    assert training.train_epoch()["images_seen"] == 5


# --- mistakes -----------------------------------------------------------------------------------------------


def test_wrong_image_size_is_refused() -> None:
    images = LabelledImages(torch.zeros(8, 1, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must be 16 px .* got \[32, 32\]"):
        GanTraining(images, 2, small_gan(), 0, CPU)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    training = GanTraining(tiny_images(), 2, small_gan(), 0, CPU)
    torch.nn.init.constant_(training.discriminator.linear.bias, math.nan)
    with pytest.raises(FloatingPointError, match=r"loss_d=nan.*learning_rate_g"):
        training.train_epoch()


# --- losses -------------------------------------------------------------------------------------------------

REAL, FAKE = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([-3.0, 0.5, 1.5])


def test_logistic_losses_are_cross_entropies() -> None:
    config = small_gan()
    target = torch.full_like(REAL, 0.9)
    expected = functional.binary_cross_entropy_with_logits(REAL, target)
    expected = expected + functional.binary_cross_entropy_with_logits(FAKE, torch.zeros(3))
    torch.testing.assert_close(discriminator_loss(REAL, FAKE, config), expected)
    expected = functional.binary_cross_entropy_with_logits(FAKE, torch.ones(3))
    torch.testing.assert_close(generator_loss(FAKE, config), expected)


def test_hinge_losses_by_hand() -> None:
    config = small_gan(preset="vanilla")
    assert discriminator_loss(REAL, FAKE, config).item() == pytest.approx(
        (0 + 2 + 0.7) / 3 + (0 + 1.5 + 2.5) / 3
    )
    assert generator_loss(FAKE, config).item() == pytest.approx(-(-3 + 0.5 + 1.5) / 3)


def test_d_step_leaves_g_alone_and_the_other_way_round() -> None:
    training = GanTraining(tiny_images(), 2, small_gan(), 0, CPU)
    random = torch.Generator().manual_seed(0)

    def weights(network: torch.nn.Module) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}

    g, d = weights(training.generator), weights(training.discriminator)
    training.images_seen = 8
    training._d_step(torch.arange(8), random)
    assert_bit_equal(g, weights(training.generator))
    assert all(not torch.equal(d[name], value) for name, value in weights(training.discriminator).items())
    d = weights(training.discriminator)
    training._g_step(random)
    assert_bit_equal(d, weights(training.discriminator))
    assert not torch.equal(g["linear.weight"], training.generator.linear.weight)
    assert all(parameter.requires_grad for parameter in training.discriminator.parameters())


# --- average ------------------------------------------------------------------------------------------------


def test_half_life_gives_the_papers_decay_at_its_batch() -> None:
    average = ExponentialAverage({}, half_life_in_images(0.9999, d_steps=4), rampup=1.0)
    assert average.half_life == pytest.approx(1.7744e6, rel=1e-4)
    assert average.decay(64 * 4, images_seen=10**9) == pytest.approx(0.9999, abs=1e-12)


def test_average_halves_the_distance_in_one_half_life() -> None:
    average = ExponentialAverage({"w": torch.zeros(3)}, half_life=100, rampup=1.0)
    for step in range(10):
        weight = 1 - average.decay(images=10, images_seen=10_000 + 10 * step)
        average.update({"w": torch.ones(3)}, torch.tensor(weight, dtype=torch.float64))
    torch.testing.assert_close(average.average["w"], torch.full((3,), 0.5))


def test_rampup_caps_the_half_life() -> None:
    average = ExponentialAverage({}, half_life=1e6, rampup=0.05)
    assert average.decay(50, images_seen=1000) == pytest.approx(0.5)
    assert average.decay(50, images_seen=100) == pytest.approx(0.5**10)


def test_checkpoint_holds_the_average_of_the_normalised_weights() -> None:
    config = small_gan(ema_rampup=1e-6)  # a half-life of nothing: the average is the last value
    training = GanTraining(tiny_images(), 2, config, 0, CPU)
    for _ in range(2):
        training.train_epoch()
    weights, folded = training.checkpoint().weights, training.generator.folded_weights()
    assert weights.keys() == folded.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, folded[name])


# --- learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["ours", pytest.param("vanilla", marks=pytest.mark.slow)])
def test_it_learns_the_brightness_of_two_classes(preset: str) -> None:
    config = small_gan(
        preset=preset,
        epochs=50,
        checkpoint_every=50,
        d_steps=1,
        learning_rate_g=1e-3,
        learning_rate_d=1e-3,
        precision="full",
    )
    training = GanTraining(tiny_images(32), 2, config, 3, CPU)
    for _ in range(config.epochs):
        training.train_epoch()
    labels = torch.arange(64) % 2
    latents = torch.randn(64, config.latent_dim, generator=torch.Generator().manual_seed(1))
    images = training.generator(latents, labels).detach()
    contrast = (images[labels == 1].mean() - images[labels == 0].mean()).item()
    real_contrast = 180 / 255 * (1 if preset == "ours" else 2)
    assert contrast > 0.4 * real_contrast


@pytest.mark.gpu
def test_mixed_precision_trains_on_a_gpu() -> None:
    training = GanTraining(tiny_images(), 2, small_gan(), 0, torch.device("cuda"))
    rows = [training.train_epoch() for _ in range(3)]
    assert all(math.isfinite(row["loss_d"]) for row in rows)
    state = training.state()
    training.load_state(state)
    assert_bit_equal(state, training.state())


def test_the_collapse_alarm_ends_the_training_after_its_patience(tmp_path: Path) -> None:
    """A threshold that nothing can meet raises the alarm at every checkpoint;
    `stop` ends after two, also on a resumed run."""
    config = tiny_config(
        generator={
            "epochs": 6,
            "checkpoint_every": 1,
            "collapse": {"images": 16, "min_agreement": 1.0, "action": "stop", "patience": 2},
        }
    )
    save_splits(tmp_path / SPLITS_FILE, load_splits(config.data))
    schedule = Schedule.fit(config.classifier, 160, 1)
    train_teacher(
        tmp_path,
        tmp_path / "teacher",
        config.classifier,
        schedule,
        seed=0,
        state=None,
        save=lambda state, row: None,
    )
    states: list[Any] = []
    for resumed in (False, True):
        state = states[-1] if resumed else None
        result = train_generator(
            tmp_path, tmp_path / "generator", generator_of(config.generator), seed=0, state=state,
            save=lambda state, row: states.append(state),
        )  # fmt: skip
        assert result is not None and result.checkpoints == [1, 2]
        assert all(row.alarm for row in result.collapse)
