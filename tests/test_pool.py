"""A pool is the same whoever draws it, and is dealt out evenly."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch import Tensor

from kr_ray.runs.artifacts import ArtifactError, fingerprint
from kr_ray.synthesis.pool import PooledSet, PoolPlan, draw_pool, joined, load_pool, positions, save_pool

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
    return PooledSet(pool.images, torch.nn.functional.one_hot(pool.labels, 3).float(), size, config, seed)


def test_a_pooled_set_changes_with_the_regeneration_and_keeps_images_and_targets_together() -> None:
    data = pooled()
    epochs = [data.epoch(index) for index in range(5)]
    assert torch.equal(epochs[0][0], epochs[1][0]) and not torch.equal(epochs[1][0], epochs[2][0])
    for images, targets in epochs:
        assert images.shape == (20, 1, 8, 8) and targets.shape == (20, 3)
        assert torch.equal(images.flatten(1).min(1).values // 10, targets.argmax(1))
    assert data.made_by(4) == {"regeneration": 2, "images_generated": 50}


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


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"images >= 1.*got images=0, block_size=512"):
        PoolPlan(images=0, prior=(1.0,), seed=0)
    with pytest.raises(ValueError, match=r"0 <= block < 4.*got block=4"):
        PLAN.draw(Painter(), 4)
    config = tiny_config().synthesis
    with pytest.raises(ValueError, match=r"got 2 images and 1 targets; label the whole pool"):
        PooledSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.ones(1, 3), 2, config, 0)
