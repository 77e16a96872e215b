"""Labelling strategies, the regenerated set and the collapse alarm, on makers whose answers are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kr_ray.config import CollapseConfig, SynthesisConfig
from kr_ray.generators.collapse import measure_collapse
from kr_ray.synthesis.labelling import strategy_of
from kr_ray.synthesis.stream import CollapsedGenerator, SyntheticSet

CLASSES = 4


class FakeSampler:
    """Images of one grey level: 60 x the class, plus noise that depends on the given generator alone."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def images(self, labels: Tensor, random: torch.Generator) -> Tensor:
        self.blocks.append(len(labels))
        noise = torch.randint(0, 20, (len(labels), 1, 1, 1), generator=random)
        return (60 * labels[:, None, None, None] + noise).to(torch.uint8).expand(-1, 1, 8, 8).contiguous()


class GreyTeacher(nn.Module):
    """Takes class round(grey / 60), except that everything of class `blind` looks like class 0."""

    def __init__(self, blind: int = -1, sharpness: float = 20.0) -> None:
        super().__init__()
        self.blind, self.sharpness = blind, sharpness

    def features(self, images: Tensor) -> Tensor:
        return (images.mean((1, 2, 3), keepdim=False)[:, None] + 1) * 127.5 + 0.1

    def forward(self, images: Tensor) -> Tensor:
        level = self.features(images) // 60
        level = torch.where(level == self.blind, torch.zeros_like(level), level)
        return -self.sharpness * (level - torch.arange(CLASSES)).abs()


PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def synthetic_set(
    teacher: nn.Module | None = None, seed: int = 0, prior: Tensor = PRIOR, **keys: Any
) -> SyntheticSet:
    config = SynthesisConfig(batch_size=16, **keys)
    size = 100 * config.cardinality_scale
    return SyntheticSet(FakeSampler(), teacher or GreyTeacher(), prior, size, config, 0.1, seed)


def classes_of(images: Tensor) -> Tensor:
    return images[:, 0, 0, 0].long() // 60


def test_gkd_keeps_all_and_labels_with_the_teachers_probabilities() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    keep, targets = strategy_of("gkd").label(torch.tensor([1, 2]), probabilities, SynthesisConfig(), 0.1)
    assert keep.all()
    assert torch.equal(targets, probabilities)  # no label smoothing on soft labels


@pytest.mark.parametrize(
    ("labelling", "kept"), [("hard", [1, 1, 1]), ("filter", [0, 1, 1]), ("gap_filler", [0, 0, 1])]
)
def test_hard_strategies_by_hand(labelling: Any, kept: list[int]) -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.02, 0.03, 0.95]])
    config = SynthesisConfig(labelling=labelling, confidence_threshold=0.9)
    keep, targets = strategy_of(labelling).label(torch.tensor([1, 1, 2]), probabilities, config, 0.3)
    assert keep.int().tolist() == kept
    assert torch.allclose(targets[2], torch.tensor([0.1, 0.1, 0.8]))


@pytest.mark.parametrize(
    ("labelling", "changes"), [("gkd", True), ("gap_filler", True), ("hard", False), ("filter", False)]
)
def test_what_is_regenerated_and_when(labelling: Any, changes: bool) -> None:
    data = synthetic_set(labelling=labelling, regeneration_rate=3)
    first, same, next_one = data.epoch(0)[0], data.epoch(2)[0], data.epoch(3)[0]
    assert torch.equal(first, same)
    assert torch.equal(first, next_one) != changes


def test_a_regeneration_does_not_depend_on_what_was_made_before() -> None:
    history, direct = synthetic_set(regeneration_rate=1), synthetic_set(regeneration_rate=1)
    for epoch in range(3):
        history.epoch(epoch)
    for left, right in zip(history.epoch(7), direct.epoch(7), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(synthetic_set(seed=1).epoch(0)[0], synthetic_set(seed=2).epoch(0)[0])


def test_cardinality_and_class_prior() -> None:
    data = synthetic_set(cardinality_scale=30)
    images, targets = data.epoch(0)
    assert len(data) == len(images) == len(targets) == 3000
    shares = classes_of(images).bincount(minlength=CLASSES) / 3000
    assert torch.allclose(shares, torch.tensor([0.4, 0.3, 0.2, 0.1]), atol=0.04)
    uniform = synthetic_set(cardinality_scale=30, prior=torch.full((4,), 0.25, dtype=torch.float64)).epoch(0)[
        0
    ]
    assert torch.allclose(
        classes_of(uniform).bincount(minlength=CLASSES) / 3000, torch.full((4,), 0.25), atol=0.04
    )


def test_filtering_drops_what_the_teacher_calls_another_class_and_keeps_the_size() -> None:
    data = synthetic_set(GreyTeacher(blind=2), labelling="filter", max_draws=3)
    images, targets = data.epoch(0)
    assert len(images) == 100
    assert 2 not in classes_of(images).tolist()
    assert torch.equal(targets.argmax(1), classes_of(images))


def test_a_collapsed_generator_is_named() -> None:
    class Blind(GreyTeacher):
        def forward(self, images: Tensor) -> Tensor:
            return torch.zeros(len(images), CLASSES)

    with pytest.raises(CollapsedGenerator, match="use a later one"):
        synthetic_set(Blind(), labelling="gap_filler", max_draws=2).epoch(0)


def test_the_alarm_sees_both_kinds_of_collapse() -> None:
    teacher: Any = GreyTeacher()
    classes = torch.arange(CLASSES).repeat(8)
    spread = torch.arange(32)[:, None, None, None] % 8
    good = (60 * classes[:, None, None, None] + spread).to(torch.uint8).expand(-1, 1, 8, 8)
    alike = (60 * classes[:, None, None, None]).to(torch.uint8).expand(-1, 1, 8, 8)
    wrong = good.flip(0)
    config = CollapseConfig()
    fine = measure_collapse(teacher, good, classes, real_spread=2.0, config=config)
    assert fine.agreement == 1.0 and fine.diversity > 0.5 and not fine.alarm
    same = measure_collapse(teacher, alike, classes, real_spread=2.0, config=config)
    assert same.agreement == 1.0 and same.diversity < 0.01 and same.alarm
    assert measure_collapse(teacher, wrong, classes, real_spread=2.0, config=config).alarm
