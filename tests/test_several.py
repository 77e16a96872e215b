"""Several generators as one: keys, trainings side by side, and who draws how many images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merged, tiny_settings
from recorder import assert_bit_equal
from test_gan import tiny_images
from torch import Tensor

from kr_ray.compute.seeding import derive_seed
from kr_ray.config import Config, ConfigError, SeveralConfig, SeveralSampling
from kr_ray.config.file import parse_config
from kr_ray.generators.interface import Checkpoint, save_checkpoint
from kr_ray.generators.registry import generator_of
from kr_ray.generators.several import SeveralSampler, SeveralTraining
from kr_ray.plan.work import DataSize, run_work
from kr_ray.synthesis.pool import quotas

CPU = torch.device("cpu")
GAN = {"architecture": "tiny16", "epochs": 4, "batch_size": 8, "checkpoint_every": 2, "d_steps": 1}
EDM = {"kind": "edm", "epochs": 2, "channels": [8, 16], "embedding": 16, "batch_size": 8, "warmup_steps": 5}


def several_settings(*members: dict[str, Any], **sections: Any) -> dict[str, Any]:
    keys = {"kind": "several", "members": list(members or (GAN, EDM))}
    raw = tiny_settings() | {"generator": keys, "synthesis": {"regeneration_rate": 2}}
    raw["tuning"] = {"trials": 2, "epochs": 2, "rungs": 1, "startup_trials": 1}
    return merged(raw, sections)


def several_config(*members: dict[str, Any], **sections: Any) -> Config:
    return parse_config(several_settings(*members, **sections))


def section(*members: dict[str, Any]) -> SeveralConfig:
    found = several_config(*members).generator
    assert isinstance(found, SeveralConfig)
    return found


# --- keys ---------------------------------------------------------------------------------------------------


def test_members_have_their_kinds_keys_and_decide_the_rest() -> None:
    config = several_config()
    generator, sampling = config.generator, config.synthesis.sampling
    assert isinstance(generator, SeveralConfig) and isinstance(sampling, SeveralSampling)
    assert [member.kind for member in generator.members] == ["biggan_deep", "edm"]
    assert (generator.epochs, generator.checkpoint_every, generator.batch_size) == (4, 2, 8)
    assert sampling.shares == (1.0, 1.0) and sampling.calibration_batches() == 16
    assert config.synthesis.pool_scale == 3  # the diffusion model's
    assert config.tuning.space == {
        "share_0": (0.01, 1.0),
        "share_1": (0.01, 1.0),
        "regeneration_rate": (1, 10),
        "cardinality_scale": (1, 3),
    }


def test_the_resolved_keys_load_to_the_same_and_own_shares_are_kept() -> None:
    sampling = {"shares": [1, 3], "members": [{"latent_std": 1.5}, {"steps": 4}]}
    config = several_config(synthesis={"sampling": sampling})
    assert parse_config(config.model_dump(mode="json")) == config
    assert config.synthesis.values(["share_1", "regeneration_rate"]) == {"share_1": 3, "regeneration_rate": 2}
    changed = config.synthesis.with_values({"share_0": 0.25, "regeneration_rate": 5})
    assert isinstance(changed.sampling, SeveralSampling)
    assert (changed.sampling.shares, changed.regeneration_rate) == ((0.25, 3.0), 5)
    assert changed.sampling.members == config.synthesis.sampling.members  # type: ignore[attr-defined]


def test_a_pool_is_drawn_of_each_member_that_draws() -> None:
    """So that other shares are dealt from the same pools."""
    sampling = several_config(EDM, EDM, EDM, synthesis={"sampling": {"shares": [1, 0, 3]}}).synthesis.sampling
    assert isinstance(sampling, SeveralSampling)
    found = [(share, part.stamp()["shares"]) for share, part in sampling.parts()]
    assert found == [(1.0, [1.0, 0.0, 0.0]), (3.0, [0.0, 0.0, 1.0])]
    again = [part.stamp() for _, part in sampling.with_values({"share_0": 5.0}).parts()]
    assert again == [part.stamp() for _, part in sampling.parts()]


def test_another_share_is_another_student_but_not_another_generator() -> None:
    one, two = several_config(), several_config(synthesis={"sampling": {"shares": [1, 2]}})
    assert one.generator.stamp() == two.generator.stamp()
    assert one.synthesis.stamp() != two.synthesis.stamp()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"generator": {"members": []}}, r"generator.members: must list the sections"),
        ({"generator": {"members": [{"kind": "edn"}]}}, r"members.0.kind: .*did you mean 'edm'"),
        ({"generator": {"members": [GAN, EDM | {"stps": 1}]}}, r"members.1.stps: unknown key"),
        ({"generator": {"batch_size": 4}}, r"must be the members' largest, 8, but got 4"),
        ({"generator": {"members": [GAN | {"architecture": "small32"}]}}, r"member 0: `data.image_size =="),
        ({"synthesis": {"sampling": {"shares": [1]}}}, r"each of the 2 members.*got shares=\[1.0\]"),
        ({"synthesis": {"sampling": {"shares": [0, 0]}}}, r"not all of them 0"),
        ({"synthesis": {"sampling": {"shares": [2, -1]}}}, r"number >= 0"),
        ({"synthesis": {"sampling": {"members": [{}]}}}, r"each of the 2 members, but got \[\{\}\]"),
        ({"synthesis": {"sampling": {"members": [{"steps": 3}, {}]}}}, r"members.0.steps: unknown key"),
        ({"tuning": {"space": {"share_2": [0, 1]}}}, r"numeric keys of `synthesis`.*share_1.*'share_2'"),
    ],
)
def test_wrong_keys_are_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        several_config(**sections)


def test_one_of_several_cannot_be_several() -> None:
    with pytest.raises(
        ConfigError, match=r"members.0.kind: must be one of biggan_deep, edm, but got 'several'"
    ):
        several_config({"kind": "several", "members": [EDM]})


def test_a_plan_counts_a_pool_of_every_member() -> None:
    size = DataSize(train=160, validation=40, test=40, classes=10, channels=1)
    one, three = (
        next(work for work in run_work(config, size) if work.stage == "checkpoints")
        for config in (several_config(EDM), several_config(EDM, EDM, EDM))
    )
    assert (one.generated, three.generated) == (3 * 160, 3 * 3 * 160)  # of the only checkpoint


# --- drawing ------------------------------------------------------------------------------------------------


class Marker:
    """Draws images whose first pixel says who drew them and whose second says their class."""

    device = CPU

    def __init__(self, mark: int) -> None:
        self.mark = mark

    def images(self, labels: Tensor, random: torch.Generator) -> Tensor:
        images = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
        images[:, 0, 0, 0], images[:, 0, 0, 1] = self.mark, labels.to(torch.uint8)
        return images


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.5, 0.3, 0.2), (1.0, 9.0)])
def test_each_draws_its_share_of_every_block(shares: tuple[float, ...]) -> None:
    sampler = SeveralSampler([(share, Marker(k)) for k, share in enumerate(shares)])
    labels = torch.arange(100) % 7
    for seed in range(20):
        images = sampler.images(labels, torch.Generator().manual_seed(seed))
        drawn = torch.bincount(images[:, 0, 0, 0].long(), minlength=len(shares)).tolist()
        assert drawn == quotas(shares, 100)  # 100 x each share is whole
        assert torch.equal(images[:, 0, 0, 1].long(), labels)


def test_small_blocks_have_the_shares_on_average_and_no_class_has_its_member() -> None:
    """Blocks of 3 with shares of 3 to 7: 9,000 images, so a share's standard error is below 0.005."""
    sampler = SeveralSampler([(3.0, Marker(0)), (7.0, Marker(1))])
    labels, random = torch.tensor([0, 1, 2]), torch.Generator().manual_seed(0)
    images = torch.cat([sampler.images(labels, random) for _ in range(3000)])
    members, classes = images[:, 0, 0, 0].double(), images[:, 0, 0, 1]
    assert members.mean().item() == pytest.approx(0.7, abs=0.02)
    for label in range(3):
        assert members[classes == label].mean().item() == pytest.approx(0.7, abs=0.035)


def test_equal_seeds_draw_equal_images() -> None:
    sampler = SeveralSampler([(1.0, Marker(0)), (2.0, Marker(1))])
    labels = torch.arange(50)
    one, two = (sampler.images(labels, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


# --- training -----------------------------------------------------------------------------------------------


@dataclass
class Counter:
    """A training that knows how far it is."""

    epoch: int = 0

    def train_epoch(self) -> dict[str, float]:
        self.epoch += 1
        return {"epoch": self.epoch, "loss": 1 / self.epoch, "images_seen": 10 * self.epoch}

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.epoch, {"w": torch.tensor(self.epoch)}, 10 * self.epoch, {"loss": 1.0})

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]


def test_members_of_other_lengths_reach_their_ends_together() -> None:
    counters = [Counter(), Counter(), Counter()]
    members = (GAN | {"epochs": 6}, EDM | {"epochs": 2}, EDM | {"epochs": 4})
    training = SeveralTraining(counters, section(*members))
    reached = []
    for _ in range(6):
        row = training.train_epoch()
        reached.append([counter.epoch for counter in counters])
    assert reached == [[1, 1, 1], [2, 1, 2], [3, 1, 2], [4, 2, 3], [5, 2, 4], [6, 2, 4]]
    assert row["epoch"] == 6 and row["images_seen"] == 10 * (6 + 2 + 4) and row["loss_member_1"] == 0.5
    checkpoint = training.checkpoint()
    assert [int(checkpoint.weights[f"{k}/w"]) for k in range(3)] == [6, 2, 4]
    shorter = section(*members).up_to(4)
    assert [member.epochs for member in shorter.members] == reached[3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a tiny GAN and a tiny diffusion model."""
    generator = generator_of(section())
    training = generator.training(tiny_images(), 2, 7, CPU)
    for _ in range(4):
        training.train_epoch()
    path = tmp_path_factory.mktemp("several") / "checkpoint.safetensors"
    save_checkpoint(path, training.checkpoint(), generator.section, 2, 1)
    return path


def drawn(path: Path, *shares: float, count: int = 12) -> Tensor:
    sampling = several_config(synthesis={"sampling": {"shares": list(shares)}}).synthesis.sampling
    sampler = generator_of(section()).open(
        path, sampling, prior=torch.tensor([0.5, 0.5]), seed=3, device=CPU, batch_size=4
    )
    return sampler.images(torch.arange(count) % 2, torch.Generator().manual_seed(5))


def test_every_member_is_trained_as_it_would_be_alone(trained: Path, tmp_path: Path) -> None:
    """And draws so: with all of the share, its images are those of its own checkpoint."""
    for k, own in enumerate(section().members):
        alone = generator_of(own)
        training = alone.training(tiny_images(), 2, derive_seed(7, "member", k), CPU)
        for _ in range(own.epochs):
            training.train_epoch()
        path = tmp_path / f"{k}.safetensors"
        save_checkpoint(path, training.checkpoint(), own, 2, 1)
        sampler = alone.open(
            path,
            own.default_sampling(),
            prior=torch.tensor([0.5, 0.5]),
            seed=derive_seed(3, "member", k),
            device=CPU,
            batch_size=4,
        )
        images = sampler.images(torch.arange(12) % 2, torch.Generator().manual_seed(5))
        assert torch.equal(drawn(trained, *(float(index == k) for index in range(2))), images)


def test_mixed_images_are_of_both_and_repeat(trained: Path) -> None:
    images = drawn(trained, 1.0, 1.0)
    assert images.shape == (12, 1, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images, drawn(trained, 1.0, 1.0))
    assert not torch.equal(images, drawn(trained, 1.0, 0.0))


def test_a_resumed_training_equals_a_straight_one() -> None:
    generator = generator_of(section())
    straight, first, second = (generator.training(tiny_images(), 2, 7, CPU) for _ in range(3))
    rows = [straight.train_epoch() for _ in range(4)]
    for _ in range(3):
        first.train_epoch()
    second.load_state(first.state())
    row = second.train_epoch()
    assert_bit_equal(second.checkpoint().weights, straight.checkpoint().weights)
    timeless = {key for key in row if not key.endswith(("seconds", "per_second"))}
    assert {key: row[key] for key in timeless} == {key: rows[-1][key] for key in timeless}


def test_a_shorter_training_passes_through_the_same_checkpoint() -> None:
    generator = generator_of(section())
    whole, short = (one.training(tiny_images(), 2, 7, CPU) for one in (generator, generator.up_to(2)))
    for _ in range(2):
        whole.train_epoch()
        short.train_epoch()
    assert_bit_equal(whole.checkpoint().weights, short.checkpoint().weights)


def test_parameters_and_rounds_are_of_all_members() -> None:
    generator = generator_of(section(GAN | {"d_steps": 3}, EDM | {"batch_size": 8}))
    assert generator.round_images() == 24
    assert set(generator.parameters(2, 1)) == {
        "member_0_generator",
        "member_0_discriminator",
        "member_1_denoiser",
    }
    measured = generator.section.measured(16)
    assert isinstance(measured, SeveralConfig)
    assert [(member.epochs, member.batch_size) for member in measured.members] == [
        (10**6, 16),
        (10**6 // 2, 16),
    ]
