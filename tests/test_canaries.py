"""Who is audited and who is in which run: counts, copies, labels, queries.
Constructed sets with known answers; one real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_recipe

from kr_ray.audits.design import design_audit, wrong_labels
from kr_ray.audits.outliers import held_out_halves
from kr_ray.audits.runs import query_images, query_offsets
from kr_ray.config import ConfigError, DataConfig, WorstCaseConfig
from kr_ray.config.file import parse_config
from kr_ray.config.run import OWN_ARMS
from kr_ray.data.checks import DataError
from kr_ray.data.datasets import load_splits
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.methods.registry import method_of


def noise_splits(train: int = 400, test: int = 60, classes: int = 4) -> Splits:
    """Images of noise, no two alike, in `classes` classes of equal size."""
    random = torch.Generator().manual_seed(0)

    def part(count: int) -> LabelledImages:
        images = torch.randint(256, (count, 1, 8, 8), generator=random, dtype=torch.uint8)
        return LabelledImages(images, torch.arange(count) % classes)

    return Splits("noise", tuple("abcdefgh"[:classes]), part(train), part(40), part(test))


def audit(**keys: object) -> WorstCaseConfig:
    return tiny_config(audit={"worst_case": keys}).audit.worst_case


def test_every_sample_is_in_half_of_the_runs_and_in_every_even_number_of_first_runs() -> None:
    design = design_audit(noise_splits(), audit(), seed=1)
    member = design.member(12)
    assert member.shape == (12, 80)
    for models in (2, 4, 8, 12):
        assert (member[:models].sum(axis=0) == models // 2).all()
        assert (member[:models] == design.member(models)).all()
    with pytest.raises(ValueError, match="even"):
        design.member(5)


def test_samples_are_in_or_out_independently_of_each_other() -> None:
    """Within a run, membership is a fair coin per sample: counts and
    agreements of pairs are as binomial as coins'."""
    design = design_audit(noise_splits(train=4000), audit(), seed=2)
    member = design.member(200)[::2]  # one of each pair
    counts = member.sum(axis=1)
    n = member.shape[1]
    assert n == 800
    assert abs(counts.mean() - n / 2) < 4 * np.sqrt(n / 4 / 100)
    assert (
        0.6 < counts.var(ddof=1) / (n / 4) < 1.6
    )  # chi-square with 99 degrees of freedom: 0.6 and 1.6 lie beyond 4 sd
    agree = (member[:, :-1] == member[:, 1:]).mean()
    assert abs(agree - 0.5) < 4 * np.sqrt(0.25 / (100 * (n - 1)))


def test_wrong_labels_are_wrong_and_uniform() -> None:
    labels = np.repeat(np.arange(5), 4000)
    given = wrong_labels(labels, 5, seed=3)
    assert (given != labels).all() and given.min() == 0 and given.max() == 4
    counts = np.array([[np.sum((labels == a) & (given == b)) for b in range(5)] for a in range(5)])
    off = counts[~np.eye(5, dtype=bool)]
    assert abs(off - 1000).max() < 4.5 * np.sqrt(1000 * 0.75)


@pytest.mark.parametrize("kind", ["mislabeled", "random"])
def test_a_run_trains_on_its_members_with_their_given_labels_and_on_all_others(kind: str) -> None:
    splits = noise_splits()
    design = design_audit(splits, audit(canary_kind=kind), seed=4)
    assert len(design.canaries) == len(design.population) == 40  # a tenth of 400
    assert not set(design.canaries) & set(design.population)
    true = splits.train.labels.numpy()
    assert (
        (design.given_labels != true[design.canaries]).all()
        if kind == "mislabeled"
        else (design.given_labels == true[design.canaries]).all()
    )
    given = dict(zip(design.canaries.tolist(), design.given_labels.tolist(), strict=True))
    for run in (0, 1, 5):
        out = set(design.samples[~design.member(6)[run]].tolist())
        expected = [(index, given.get(index, int(true[index]))) for index in range(400) if index not in out]
        trained = design.splits_of_run(splits, run).train
        assert trained.labels.tolist() == [label for _, label in expected]
        assert torch.equal(trained.images, splits.train.images[[index for index, _ in expected]])


def test_copies_are_neither_canaries_nor_population_nor_reference() -> None:
    splits = noise_splits(train=60, test=30)
    images, test = splits.train.images.clone(), splits.test.images.clone()
    images[1], images[7] = images[0], images[0]  # three alike within train
    images[2], images[3] = splits.validation.images[0], test[4]
    test[6] = test[5]
    splits = replace(
        splits,
        train=LabelledImages(images, splits.train.labels),
        test=LabelledImages(test, splits.test.labels),
    )
    seen: set[int] = set()
    for seed in range(40):
        design = design_audit(splits, audit(max_canary_share=0.25, reference=30), seed)
        assert design.excluded == 5
        seen |= set(design.samples.tolist())
        assert set(design.reference.tolist()) == set(range(30)) - {4, 6}
    assert seen == set(range(60)) - {0, 1, 2, 3, 7}


def test_more_canaries_than_fit_are_refused_with_the_number_that_does() -> None:
    splits = noise_splits()
    assert len(design_audit(splits, audit(canaries=40), 0).canaries) == 40
    with pytest.raises(DataError, match=r"audit.worst_case.canaries <= 40.*got 41.*use 40"):
        design_audit(splits, audit(canaries=41), 0)
    with pytest.raises(DataError, match=r"audit.worst_case.population <= 40"):
        design_audit(splits, audit(population=100), 0)
    with pytest.raises(DataError, match="more training images"):
        design_audit(noise_splits(train=16), audit(), 0)
    with pytest.raises(DataError, match=r"audit.worst_case.canaries >= 2"):
        design_audit(splits, audit(canaries=1), 0)


def test_outliers_are_the_highest_losses_but_never_most_of_a_class() -> None:
    splits = noise_splits()
    losses = np.random.default_rng(0).random(400)
    design = design_audit(splits, audit(canary_kind="outlier", canaries=10), 0, losses)
    assert set(design.canaries) == set(np.argsort(losses)[-10:])
    assert (design.given_labels == splits.train.labels.numpy()[design.canaries]).all()
    losses[splits.train.labels.numpy() == 2] += 10
    design = design_audit(
        splits, audit(canary_kind="outlier", canaries=100, max_canary_share=0.25), 0, losses
    )
    assert np.bincount(splits.train.labels.numpy()[design.canaries])[2] == 50
    with pytest.raises(ValueError, match="losses"):
        design_audit(splits, audit(canary_kind="outlier"), 0)


def test_held_out_halves_part_the_training_split() -> None:
    labels = torch.arange(101) % 3
    first, second = held_out_halves(labels, 5)
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(101))
    assert abs(labels[first].bincount() - labels[second].bincount()).max() <= 1


def test_the_queries_are_what_training_augments_by() -> None:
    assert query_offsets(tiny_recipe(horizontal_flip=False, crop_padding=0), 18) == [(False, 0, 0)]
    full = query_offsets(tiny_recipe(horizontal_flip=True, crop_padding=2), 18)
    assert full[:2] == [(False, 0, 0), (True, 0, 0)]
    assert set(full) == {
        (flip, down, right) for flip in (False, True) for down in (-2, 0, 2) for right in (-2, 0, 2)
    }
    assert query_offsets(tiny_recipe(horizontal_flip=True), 5) == full[:5]


def test_a_query_shifts_black_in_and_then_mirrors() -> None:
    images = torch.randint(
        1, 256, (3, 2, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for flip, down, right in [(False, 0, 0), (False, 2, -1), (True, -2, 2), (True, 0, 0)]:
        expected = torch.zeros_like(images)
        for row in range(5):
            for column in range(6):
                if 0 <= row - down < 5 and 0 <= column - right < 6:
                    expected[..., row, column] = images[..., row - down, column - right]
        assert torch.equal(query_images(images, (flip, down, right)), expected.flip(-1) if flip else expected)


def test_config_rules_of_the_audit() -> None:
    with pytest.raises(ConfigError, match="even"):
        audit(models=5)
    with pytest.raises(ConfigError, match="different"):
        audit(arms=["kr", "kr"])
    with pytest.raises(ConfigError, match=r"audit\.worst_case\.arms"):
        audit(arms=["nothing"])
    assert (
        parse_config({"name": "a", "data": {"name": "digits"}, "generator": {}}).audit.worst_case.models == 32
    )  # the paper's


def test_every_arm_that_a_run_has_is_a_method() -> None:
    assert [method_of(arm, tiny_config()).title for arm in OWN_ARMS] == [
        "Teacher",
        "Student",
        "Student, fixed generator",
    ]


def test_pneumoniamnists_copies_are_kept_out(shared_data: Path) -> None:
    """18 training images have an earlier twin and 8 validation images are copies of training images."""
    splits = load_splits(
        DataConfig(name="pneumoniamnist", root=str(shared_data), download=False, image_size=28)
    )
    design = design_audit(splits, audit(), 0)
    assert design.excluded >= 18 + 8
