"""A pool is the same whoever draws it, and is dealt out evenly."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import tiny_config, tiny_settings
from test_synthesis import FakeSampler, GreyTeacher
from torch import Tensor

from kr_ray.config import Config, ConfigError, GeneratorSection, SamplingSection, SynthesisConfig
from kr_ray.config.file import parse_config
from kr_ray.data.images import LabelledImages
from kr_ray.runs.artifacts import ArtifactError, fingerprint
from kr_ray.synthesis.pool import (
    LabelledPool,
    Pool,
    PooledSet,
    PoolPlan,
    draw_pool,
    drop_pools,
    joined,
    load_pool,
    positions,
    quotas,
    save_pool,
)
from kr_ray.synthesis.stream import CollapsedGenerator
from kr_ray.synthesis.student_set import label_pool

CPU = torch.device("cpu")


class Painter:
    """Draws images of ten times their class, plus noise of the generator it is given; counts its calls."""

    device = CPU

    def __init__(self) -> None:
        self.calls = 0

    def images(self, labels: Tensor, random: torch.Generator) -> Tensor:
        self.calls += 1
        noise = torch.randint(0, 10, (len(labels), 1, 8, 8), generator=random)
        return (noise + 10 * labels[:, None, None, None]).to(torch.uint8)


PLAN = PoolPlan(images=50, prior=(0.2, 0.3, 0.5), seed=3, block_size=16)


def test_a_pool_does_not_depend_on_who_draws_which_block_when() -> None:
    alone, makers = draw_pool(Painter(), PLAN), [Painter(), Painter()]
    drawn = {block: PLAN.draw(makers[block % 2], block) for block in (3, 1, 2, 0)}
    shared = joined([drawn[block] for block in range(PLAN.blocks)])
    assert PLAN.blocks == 4 and [maker.calls for maker in makers] == [2, 2]
    assert torch.equal(alone.images, shared.images) and torch.equal(alone.labels, shared.labels)
    assert alone.images.shape == (50, 1, 8, 8)


def test_a_pool_survives_its_file_and_one_of_other_images_is_refused(tmp_path: Path) -> None:
    pool, path = draw_pool(Painter(), PLAN), tmp_path / "pool.safetensors"
    prints = [fingerprint(plan.fingerprint_parts(), "checkpoint") for plan in (PLAN, replace(PLAN, seed=4))]
    save_pool(path, pool, prints[0])
    again = load_pool(path, prints[0])
    assert torch.equal(again.images, pool.images) and torch.equal(again.labels, pool.labels)
    with pytest.raises(ArtifactError, match=rf"{prints[1]}.*but it says '{prints[0]}'; delete the file"):
        load_pool(path, prints[1])


def test_images_are_those_of_their_classes_and_blocks_differ() -> None:
    pool = draw_pool(Painter(), PLAN)
    assert torch.equal(pool.labels, PLAN.classes())
    assert torch.equal(pool.images.flatten(1).min(1).values // 10, pool.labels)
    noise = pool.images.long() - 10 * pool.labels[:, None, None, None]
    assert not torch.equal(noise[:16], noise[16:32])


def test_the_seed_decides_and_the_prior_is_followed() -> None:
    other = PoolPlan(images=50, prior=PLAN.prior, seed=4, block_size=16)
    assert not torch.equal(draw_pool(Painter(), PLAN).images, draw_pool(Painter(), other).images)
    many = PoolPlan(images=20_000, prior=PLAN.prior, seed=0).classes()
    shares = torch.bincount(many, minlength=3) / len(many)
    torch.testing.assert_close(shares, torch.tensor(PLAN.prior), atol=0.015, rtol=0)  # 4 standard errors


def test_regenerations_of_a_pass_are_disjoint_and_the_next_pass_is_reshuffled() -> None:
    stretches = [positions(index, 25, 100, seed=0) for index in range(8)]
    assert all(
        not set(one.tolist()) & set(two.tolist()) for one, two in itertools.combinations(stretches[:4], 2)
    )
    first, second = torch.cat(stretches[:4]), torch.cat(stretches[4:])
    assert torch.equal(first.sort().values, torch.arange(100)) and torch.equal(
        second.sort().values, torch.arange(100)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("size", [7, 30, 45, 100, 250])
def test_every_image_is_dealt_as_often_as_any_other(size: int) -> None:
    """Also where the set is no divisor of the pool, or larger than it."""
    dealt = torch.cat([positions(index, size, 100, seed=1) for index in range(40)])
    counts = torch.bincount(dealt, minlength=100)
    assert counts.max() - counts.min() <= 1
    assert len(dealt) == 40 * size


def pooled(size: int = 20, regeneration_rate: int = 2, seed: int = 0, labelling: str = "gkd") -> PooledSet:
    config = tiny_config(synthesis={"regeneration_rate": regeneration_rate, "labelling": labelling}).synthesis
    pool = draw_pool(Painter(), PLAN)
    labelled = LabelledPool(pool.images, torch.nn.functional.one_hot(pool.labels, 3).float(), cpu_s=2.5)
    return PooledSet([labelled], size, config, seed)


def test_a_pooled_set_changes_with_the_regeneration_and_keeps_images_and_targets_together() -> None:
    data = pooled()
    epochs = [data.epoch(index) for index in range(5)]
    assert torch.equal(epochs[0][0], epochs[1][0]) and not torch.equal(epochs[1][0], epochs[2][0])
    for images, targets in epochs:
        assert images.shape == (20, 1, 8, 8) and targets.shape == (20, 3)
        assert torch.equal(images.flatten(1).min(1).values // 10, targets.argmax(1))
    assert data.figures(4) == {"regeneration": 2, "images_generated": 50, "pool_cpu_seconds": 2.5}


def test_a_resumed_student_sees_what_the_undisturbed_one_does() -> None:
    straight, resumed = pooled(), pooled()
    before = [straight.epoch(index) for index in range(8)]
    for index in (7, 5):  # in any order, without the earlier ones
        assert all(
            torch.equal(one, two) for one, two in zip(resumed.epoch(index), before[index], strict=True)
        )
    assert not torch.equal(pooled(seed=1).epoch(0)[0], before[0][0])


def test_a_strategy_that_never_regenerates_stays_with_one_stretch() -> None:
    data = pooled(labelling="hard")
    assert torch.equal(data.epoch(0)[0], data.epoch(40)[0])


# --- in a run's storage -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PainterGenerator:
    """As much of a generator as a pool asks for; its checkpoint may hold anything."""

    def open(self, *_: Any, **__: Any) -> Painter:
        return Painter()


class PainterSection(GeneratorSection):
    kind: Literal["painter"] = "painter"

    def member(self) -> PainterGenerator:
        return PainterGenerator()


class PainterSampling(SamplingSection):
    wide: bool = False


def stored(folder: Path, images: int = 5000, checkpoint: bytes = b"weights", wide: bool = False) -> Pool:
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint").write_bytes(checkpoint)
    sampling = PainterSampling(wide=wide)
    return Pool(folder / "pools", PainterSection(), folder / "checkpoint", sampling, images, PLAN.prior)


def test_a_pool_drawn_in_parts_by_several_is_the_one_that_a_student_draws_alone(tmp_path: Path) -> None:
    parts, alone = stored(tmp_path / "parts"), stored(tmp_path / "alone")
    assert parts.parts == 3 and parts.plan.parts()[-1] == range(8, 10)
    for part in (2, 0, 1):
        parts.draw_part(part, CPU)
    kept = parts.part_path(1).read_bytes()
    parts.draw_part(1, CPU)  # a maker that is started again
    assert parts.part_path(1).read_bytes() == kept
    parts.join()
    one, two = (pool.take(CPU)[0] for pool in (parts, alone))
    assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
    assert one.images.shape == (5000, 1, 8, 8)
    assert [path.name for path in parts.folder.iterdir()] == [parts.path.name] == [alone.path.name]


def test_whatever_decides_the_images_decides_the_pools_name(tmp_path: Path) -> None:
    """The checkpoint by its bytes, so that one trained anew to the same weights has the same pool."""
    usual = stored(tmp_path / "a")
    others = [
        stored(tmp_path / "b", images=4999),
        stored(tmp_path / "c", checkpoint=b"others"),
        stored(tmp_path / "d", wide=True),
    ]
    assert len({pool.fingerprint for pool in (usual, *others)}) == 4
    assert stored(tmp_path / "e").fingerprint == usual.fingerprint
    assert usual.plan.seed == others[2].plan.seed != others[1].plan.seed


def test_pools_that_are_not_kept_go(tmp_path: Path) -> None:
    one, two = stored(tmp_path, images=100), stored(tmp_path, images=200)
    for pool in (one, two):
        pool.take(CPU)
    drop_pools(tmp_path, [two.path])
    assert not one.path.exists() and two.path.exists()
    drop_pools(tmp_path / "without any", [])


@pytest.mark.parametrize(
    ("shares", "size", "expected"),
    [
        ([1.0], 7, [7]),
        ([1.0, 1.0], 7, [4, 3]),
        ([0.5, 0.3, 0.2], 100, [50, 30, 20]),
        ([2.0, 0.0, 1.0], 10, [7, 0, 3]),
    ],
)
def test_a_set_is_divided_by_largest_remainder(shares: list[float], size: int, expected: list[int]) -> None:
    assert quotas(shares, size) == expected


def test_of_several_pools_each_gives_its_share_to_every_regeneration() -> None:
    def flat(value: int, count: int, share: float) -> LabelledPool:
        images = torch.full((count, 1, 8, 8), value, dtype=torch.uint8)
        return LabelledPool(images, torch.full((count, 3), float(value)), share)

    config = tiny_config(synthesis={"regeneration_rate": 1}).synthesis
    data = PooledSet([flat(1, 50, 0.6), flat(2, 40, 0.0), flat(3, 30, 0.4)], 20, config, 0)
    for epoch in range(6):
        images, targets = data.epoch(epoch)
        assert torch.bincount(images[:, 0, 0, 0].long(), minlength=4).tolist() == [0, 12, 0, 8]
        assert torch.equal(images[:, 0, 0, 0].float(), targets[:, 0])


def labelled(labelling: Any, classes: Tensor, blind: int = -1) -> tuple[Tensor, Tensor]:
    images = FakeSampler().images(classes, torch.Generator().manual_seed(0))
    config = SynthesisConfig(labelling=labelling, batch_size=16)
    return label_pool(
        LabelledImages(images, classes), 4, teacher=GreyTeacher(blind), config=config, smoothing=0.0
    )


def test_the_teacher_answers_every_image_of_a_pool_once() -> None:
    classes = torch.arange(4).repeat(10)
    images, targets = labelled("gkd", classes)
    assert len(images) == 40 and torch.equal(targets.argmax(1), classes)
    torch.testing.assert_close(targets.sum(1), torch.ones(40))


def test_rejected_images_of_a_pool_are_replaced_by_accepted_ones_of_their_class() -> None:
    """Of class 1 half the images show class 2, and of class 3 all show class 0."""
    images = torch.tensor([0] * 10 + [60] * 5 + [120] * 5 + [180] * 10, dtype=torch.uint8)
    pool = LabelledImages(
        images[:, None, None, None].expand(-1, 1, 8, 8), torch.tensor([0] * 10 + [1] * 10 + [3] * 10)
    )
    config = SynthesisConfig(labelling="filter", batch_size=16)
    kept, targets = label_pool(pool, 4, teacher=GreyTeacher(blind=3), config=config, smoothing=0.0)
    assert torch.bincount(targets.argmax(1), minlength=4).tolist() == [10, 10, 0, 0]
    assert torch.equal(kept[:, 0, 0, 0].long() // 60, targets.argmax(1))


def test_images_that_keep_their_class_ask_no_teacher() -> None:
    pool = LabelledImages(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([1, 0, 3]))
    config = SynthesisConfig(labelling="hard")
    _, targets = label_pool(pool, 4, teacher=None, config=config, smoothing=0.0)
    assert torch.equal(targets, torch.eye(4)[pool.labels])


def test_a_pool_without_an_accepted_image_is_named() -> None:
    with pytest.raises(CollapsedGenerator, match=r"none of 8 images of the pool.*'filter'"):
        labelled("filter", torch.full((8,), 3), blind=3)


# --- keys ---------------------------------------------------------------------------------------------------


def edm_config(**synthesis: Any) -> Config:
    raw = tiny_settings() | {"generator": {"kind": "edm"}, "synthesis": synthesis, "tuning": {}}
    return parse_config(raw)


def test_the_generators_kind_says_whether_there_is_a_pool() -> None:
    gan, edm = tiny_config(), edm_config()
    assert (gan.synthesis.pool_scale, edm.synthesis.pool_scale) == (0, 3)
    assert "pool_scale" not in gan.synthesis.stamp() and edm.synthesis.stamp()["pool_scale"] == 3
    assert edm.tuning.space == {"regeneration_rate": (1, 10), "cardinality_scale": (1, 3)}
    streamed = edm_config(pool_scale=0)
    assert streamed.synthesis.pool_scale == 0 and streamed.tuning.space["cardinality_scale"] == (1, 10)
    assert edm_config(pool_scale=2).tuning.space["cardinality_scale"] == (1, 2)
    assert edm_config(regeneration_rate=2).synthesis.pool_scale == 3


def test_a_set_that_its_pool_could_only_repeat_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cardinality_scale <= pool_scale.*got cardinality_scale=4"):
        tiny_config(synthesis={"pool_scale": 3, "cardinality_scale": 4})
    with pytest.raises(ConfigError, match=r"tuning.space.cardinality_scale.*pool_scale=2"):
        tiny_config(synthesis={"pool_scale": 2}, tuning={"space": {"cardinality_scale": [1, 3]}})


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"images >= 1.*got images=0, block_size=512"):
        PoolPlan(images=0, prior=(1.0,), seed=0)
    with pytest.raises(ValueError, match=r"0 <= block < 4.*got block=4"):
        PLAN.draw(Painter(), 4)
    with pytest.raises(ValueError, match=r"got 2 images and 1 targets; label the whole pool"):
        LabelledPool(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.ones(1, 3))
