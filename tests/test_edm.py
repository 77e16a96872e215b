"""The diffusion generator: keys, training, checkpoint, sampler. (Equations and solvers: test_edm_solvers.)"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from recorder import Recorder, assert_bit_equal
from test_gan import tiny_images
from test_parallel import on_workers
from torch import Tensor

from kr_ray.compute import graphs
from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import ConfigError, EdmConfig, EdmSampling
from kr_ray.config.file import parse_config
from kr_ray.data.datasets import load_splits
from kr_ray.data.images import LabelledImages
from kr_ray.generators.edm import sampling as edm_sampling
from kr_ray.generators.edm.checkpoint import EdmCheckpoint
from kr_ray.generators.edm.networks import UNet
from kr_ray.generators.edm.sampling import EdmSampler
from kr_ray.generators.edm.training import EdmTraining
from kr_ray.runs.artifacts import ArtifactError, save_tensors

CPU = torch.device("cpu")


def small_edm(**keys: Any) -> EdmConfig:
    size = {
        "channels": [8, 16],
        "embedding": 16,
        "batch_size": 8,
        "epochs": 4,
        "checkpoint_every": 1,
        "warmup_steps": 5,
    }
    return EdmConfig.model_validate(size | keys)


def trained(
    epochs: int = 1, images: LabelledImages | None = None, device: torch.device = CPU, **keys: Any
) -> EdmTraining:
    training = EdmTraining(tiny_images() if images is None else images, 2, small_edm(**keys), 7, device)
    for _ in range(epochs):
        training.train_epoch()
    return training


@pytest.fixture(scope="module")
def checkpoint() -> EdmCheckpoint:
    """Of a network with random weights, none of them zero, whose answers depend on noise level and class."""
    whole, random = trained(1).checkpoint(), seeded_generator("weights")
    weights = {
        name: torch.randn(value.shape, generator=random)
        * (value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
        for name, value in whole.weights.items()
    }
    return replace(whole, weights=weights)


def sampler(checkpoint: EdmCheckpoint, device: torch.device = CPU, **keys: Any) -> EdmSampler:
    return EdmSampler(checkpoint, EdmSampling.model_validate({"precision": "full"} | keys), device)


# --- keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "side", "millions"),
    [("edm16", 16, 0.50), ("edm32", 32, 1.98), ("edm32-large", 32, 12.5), ("edm64", 64, 12.5)],
)
def test_presets_have_the_parameters_that_they_state(preset: str, side: int, millions: float) -> None:
    config = EdmConfig.model_validate_json(f'{{"preset": "{preset}"}}')
    assert side % config.side_multiple == 0
    with torch.device("meta"):
        network = UNet(config, 10, 3)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(
        millions * 1e6, rel=0.015
    )


def test_own_keys_win_over_the_preset_and_all_survive_a_file() -> None:
    config = EdmConfig.model_validate_json('{"preset": "edm64", "channels": [8, 8, 16]}')
    assert (config.unshuffle, config.channels, config.side_multiple) == (4, (8, 8, 16), 16)
    assert EdmConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ('{"preset": "edm8"}', "edm64"),
        ('{"channels": [12]}', r"multiples of 8, but got channels=\[12\]; round them up"),
        ('{"channels": ["8"]}', "valid integer"),
        ('{"epoch": 3}', "Extra inputs"),
    ],
)
def test_wrong_keys_are_refused(raw: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EdmConfig.model_validate_json(raw)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"sigma_min": 30.0}, r"sigma_min < sigma_max.*sigma_min=30.0, sigma_max=20.0; use 0.01"),
        ({"solver": "unipc"}, "heun"),
        ({"guidance": 1.5}, r"null_share > 0.*null_share=0.0, guidance=1.5; set guidance: 1"),
    ],
)
def test_wrong_ways_of_drawing_are_refused(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(
            {
                "name": "a",
                "data": {"name": "digits", "image_size": 16},
                "generator": {"kind": "edm", "null_share": 0.0},
                "synthesis": {"sampling": sampling},
                "tuning": {"space": {"regeneration_rate": [1, 2]}},
            }
        )


def test_the_keys_need_neither_torch_nor_ray() -> None:
    """So that a wrong key is refused within a fraction of a second."""
    program = "import sys, kr_ray.config.edm; print(*({'torch', 'ray'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


# --- resume -------------------------------------------------------------------------------------------------


def run(
    config: EdmConfig, resume: dict[str, Any] | None = None, states_every: int | None = None, stop_at: int = 0
) -> Recorder:
    return Recorder(stop_at).finish(
        EdmTraining(tiny_images(), 2, config, 7, CPU), config, resume, states_every
    )


def test_resumed_training_equals_a_straight_one() -> None:
    # The warm-up of 5 steps ends in the second epoch of 3 steps.
    config = small_edm(horizontal_flip=True)
    straight = run(config)
    for epoch in (1, 3):
        resumed = run(config, resume=straight.whole_state(epoch))
        assert [one.epoch for one in resumed.checkpoints] == list(range(epoch + 1, 5))
        assert_bit_equal(straight.state(4), resumed.state(4))
        assert_bit_equal(straight.checkpoints[3].weights, resumed.checkpoints[-1].weights)
        assert straight.rows[3]["loss"] == resumed.rows[-1]["loss"]
    assert straight.state(2)["optimizer"][0]["step"].item() == straight.state(2)["step"] == 6
    assert not torch.equal(straight.state(1)["network"]["out.bias"], straight.state(2)["network"]["out.bias"])


def test_callbacks_keep_their_rhythm_and_a_checkpoint_can_end_the_training() -> None:
    recorder = run(small_edm(checkpoint_every=2, epochs=5), states_every=3)
    assert [one.epoch for one in recorder.checkpoints] == [2, 4]
    assert list(recorder.states) == [3, 5]
    assert [row["images_seen"] for row in recorder.rows] == [24, 48, 72, 96, 120]
    stopped = run(small_edm(epochs=9), states_every=9, stop_at=2)
    assert len(stopped.rows) == 2 and list(stopped.states) == [2]


def test_the_seed_decides() -> None:
    losses = [
        EdmTraining(tiny_images(), 2, small_edm(), seed, CPU).train_epoch()["loss"] for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_flips_and_the_hidden_class_change_what_is_learnt_from() -> None:
    losses = {trained(2, **keys).loss for keys in ({}, {"horizontal_flip": True}, {"null_share": 0.0})}
    assert len(losses) == 3
    training = EdmTraining(tiny_images(1000), 2, small_edm(), 0, CPU)
    _, classes = training._batch(torch.arange(1000), seeded_generator("batch"))
    assert (classes == 2).double().mean().item() == pytest.approx(0.1, abs=0.03)  # 3 standard errors
    shown = classes != 2
    assert torch.equal(classes[shown], training.images.labels[shown])


def test_colour_images_of_another_size_are_learnt_and_drawn() -> None:
    pixels = torch.randint(256, (16, 3, 32, 32), generator=seeded_generator("colour"), dtype=torch.uint8)
    training = trained(1, LabelledImages(pixels, torch.arange(16) % 2), unshuffle=4)
    images = sampler(training.checkpoint(), guidance=1.2).images(torch.arange(5) % 2, seeded_generator(0))
    assert images.shape == (5, 3, 32, 32)


def test_fewer_images_than_a_batch() -> None:
    assert trained(1, tiny_images(5), batch_size=64).images_seen == 5


# --- several workers ----------------------------------------------------------------------------------------


def first_epochs() -> list[float]:
    training = trained(0, horizontal_flip=True, precision="full")
    losses = [training.train_epoch()["loss"] for _ in range(3)]
    weights = training.checkpoint().weights
    return [*losses, *(value.double().norm().item() for value in weights.values())]


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_take_the_steps_of_one(tmp_path: Path, workers: int) -> None:
    """Three share a batch of 8 unevenly."""
    alone, (first, *others) = first_epochs(), on_workers(workers, tmp_path, first_epochs)
    assert all(other == first for other in others)  # the workers stay in step, bit for bit
    assert first == pytest.approx(alone, rel=1e-3, abs=1e-4)


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 1, 18, 18), (8, 1, 16, 20)])
def test_sides_that_do_not_suit_the_network_are_refused(shape: tuple[int, ...]) -> None:
    images = LabelledImages(torch.zeros(shape, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"multiple of 4, for unshuffle=2 and 2 levels, but got \[1.*data.image_size"
    ):
        EdmTraining(images, 2, small_edm(), 0, CPU)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    training = trained(0)
    torch.nn.init.constant_(training.network.out.weight, math.nan)
    with pytest.raises(FloatingPointError, match=r"epoch 1 it is nan; lower generator.learning_rate=0.002"):
        training.train_epoch()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "gan.safetensors", {"w": torch.zeros(1)}, {"epoch": 1})
    with pytest.raises(ArtifactError, match=r"`kind: edm` must be in.*but it says 'unknown'; open it"):
        EdmSampler.open(tmp_path / "gan.safetensors", EdmSampling(), CPU)
    with pytest.raises(ArtifactError, match="does not exist"):
        EdmSampler.open(tmp_path / "none.safetensors", EdmSampling(), CPU)


# --- average and checkpoint ---------------------------------------------------------------------------------


def test_the_checkpoint_holds_the_average_of_the_weights() -> None:
    at_once = trained(2, ema_rampup=1e-6)  # a half-life of nothing: the average is the last value
    for name, value in at_once.checkpoint().weights.items():
        torch.testing.assert_close(value, at_once.network.get_parameter(name).detach())
    slow = trained(2, ema_rampup=1.0)
    assert not torch.allclose(
        slow.checkpoint().weights["out.bias"], slow.network.get_parameter("out.bias").detach(), rtol=1e-3
    )


def test_a_checkpoint_survives_its_file(tmp_path: Path, checkpoint: EdmCheckpoint) -> None:
    checkpoint.save(tmp_path / "epoch_0001.safetensors")
    again = EdmCheckpoint.load(tmp_path / "epoch_0001.safetensors")
    assert_bit_equal(again.weights, checkpoint.weights)
    assert again.config == checkpoint.config and again.sigma_data == checkpoint.sigma_data
    assert (again.epoch, again.images_seen, again.num_classes, again.image_size) == (1, 24, 2, 16)
    opened = EdmSampler.open(tmp_path / "epoch_0001.safetensors", EdmSampling(precision="full"), CPU)
    assert opened.device == CPU and opened.epoch == 1
    labels = torch.arange(4) % 2
    assert torch.equal(
        opened.images(labels, seeded_generator(1)), sampler(checkpoint).images(labels, seeded_generator(1))
    )


# --- sampling -----------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_images_and_others_others(checkpoint: EdmCheckpoint) -> None:
    labels = torch.arange(6) % 2
    images = [sampler(checkpoint).images(labels, seeded_generator(seed)) for seed in (0, 0, 1)]
    assert images[0].shape == (6, 1, 16, 16) and images[0].dtype == torch.uint8
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert sampler(checkpoint).images(labels[:0], seeded_generator(0)).shape == (0, 1, 16, 16)


@pytest.mark.parametrize("keys", [{}, {"churn": 4.0}, {"guidance": 1.5}])
def test_an_image_is_independent_of_its_neighbours_in_the_batch(checkpoint: EdmCheckpoint, keys: Any) -> None:
    """Its noise is held fixed; neighbours' classes and number change, and into how many batches they fall."""
    ours = sampler(checkpoint, **keys)
    noise = ours._noise(40, seeded_generator("noise"))
    alone = ours._trajectory(noise[:, :4], torch.tensor([0, 1, 1, 0]))
    among = ours._trajectory(
        noise, torch.cat([torch.tensor([0, 1, 1, 0]), torch.ones(36, dtype=torch.int64)])
    )
    other = ours._trajectory(noise[:, :4].flip(1), torch.tensor([0, 1, 1, 0])).flip(0)
    assert (alone.int() - among[:4].int()).abs().max() <= 1  # kernels for other batch sizes round differently
    assert (alone.int() - other.int()).abs().max() <= 1  # the flipped classes read the same backwards
    assert (among[:4].int() - among[4:8].int()).abs().max() > 20


def test_the_batches_of_a_block_do_not_matter(
    checkpoint: EdmCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.arange(13) % 2
    whole = sampler(checkpoint).images(labels, seeded_generator(0))
    monkeypatch.setitem(edm_sampling.PIXELS_AT_ONCE, "cpu", 5 * 16**2)
    assert (sampler(checkpoint).images(labels, seeded_generator(0)).int() - whole.int()).abs().max() <= 1


def test_half_precision_draws_nearly_the_same_images(
    checkpoint: EdmCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured: 0.03 grey levels on average. Every CPU can compute in bf16, if slowly."""
    monkeypatch.setattr(edm_sampling, "half_precision", lambda device: torch.bfloat16)
    labels = torch.arange(32) % 2
    full, mixed = (
        sampler(checkpoint, precision=precision).images(labels, seeded_generator(0)).float()
        for precision in ("full", "mixed")
    )
    assert 0 < (full - mixed).abs().mean() < 0.3


def test_guidance_goes_through_the_answers_with_and_without_class(checkpoint: EdmCheckpoint) -> None:
    noisy, sigma, classes = torch.randn(4, 1, 16, 16), torch.full((4,), 2.0), torch.tensor([0, 1, 0, 1])
    with torch.inference_mode():
        without, plain, guided = (
            sampler(checkpoint, guidance=guidance)._guided(noisy, sigma, classes)
            for guidance in (0.0, 1.0, 1.5)
        )
        nearly = sampler(checkpoint, guidance=1.0 + 1e-7)._guided(noisy, sigma, classes)
        hidden = sampler(checkpoint)._denoise(noisy, sigma, torch.full((4,), 2))
    torch.testing.assert_close(nearly, plain, rtol=1e-4, atol=1e-4)  # guidance at 1 is no guidance
    torch.testing.assert_close(without, hidden)
    torch.testing.assert_close(guided, without + 1.5 * (plain - without), rtol=1e-4, atol=1e-4)
    assert (plain - without).abs().max() > 0.002


def test_guidance_without_a_trained_none_class_is_refused(checkpoint: EdmCheckpoint) -> None:
    untrained = replace(checkpoint, config=small_edm(null_share=0.0))
    assert sampler(untrained).images(torch.tensor([0]), seeded_generator(0)).shape == (1, 1, 16, 16)
    with pytest.raises(ValueError, match="null_share > 0"):
        sampler(untrained, guidance=1.5)


# --- learning -----------------------------------------------------------------------------------------------


def test_a_few_epochs_on_digits_beat_noise() -> None:
    """Generated digits look like their class: of the classes' mean images, that one is the nearest.

    Measured after 6 epochs, seeds 0 to 2: 0.56, 0.65, 0.50 of 200 (0.89 of the real images); untrained, 0.095
    each time, for 0.1 is chance.
    """
    real = load_splits(tiny_config(data={"max_train_images": 0}).data).train
    config = EdmConfig.model_validate({"channels": [16, 32], "embedding": 64, "batch_size": 16, "epochs": 6})
    training = EdmTraining(real, 10, config, 0, CPU)
    untrained = training.checkpoint()
    for _ in range(config.epochs):
        training.train_epoch()
    means = torch.stack([real.images[real.labels == label].float().mean(0) for label in range(10)])

    def agreement(of: EdmCheckpoint) -> float:
        labels = torch.arange(200) % 10
        images = EdmSampler(of, EdmSampling(), CPU).images(labels, seeded_generator("digits")).float()
        distances = torch.cdist(images.flatten(1), means.flatten(1))
        return (distances.argmin(1) == labels).double().mean().item()

    assert agreement(untrained) < 0.2
    assert agreement(training.checkpoint()) > 0.4


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["never", "always"])
def test_a_network_trained_by_replays_is_the_same(compile: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    averages: list[dict[str, Tensor]] = []
    for keys in ({"capture": False, "compile": "never"}, {"capture": True, "compile": compile}):
        with graphs.policy(**keys):
            training = trained(4, device=torch.device("cuda"), precision="full")
            training.load_state(training.state())
            for _ in range(4):
                training.train_epoch()
        averages.append(training.average.average)
    for name, value in averages[0].items():
        torch.testing.assert_close(averages[1][name], value, rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
def test_mixed_precision_trains_and_captured_sampling_draws_the_same_images() -> None:
    device = torch.device("cuda")
    training = trained(6, device=device)
    assert math.isfinite(training.loss)
    labels, made = torch.arange(50) % 2, []
    for keys in ({"capture": False, "compile": "never"}, {"capture": True, "compile": "never"}):
        with graphs.policy(**keys):
            ours = sampler(training.checkpoint(), device)
            made.append([ours.images(labels, seeded_generator(index)).int() for index in range(5)])
    for plain, captured in zip(*made, strict=True):
        assert (plain - captured).abs().max() <= 2
