"""Which records are most exposed: known answers, a null, and where the list is kept."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from scipy import stats

from kr_ray.audits.exposed import exposed_images, write_exposed
from kr_ray.audits.runs import RunScores
from kr_ray.cluster import worst_case
from kr_ray.config import DataConfig, SynthesisConfig
from kr_ray.data.datasets import load_splits
from kr_ray.data.store import (
    SOURCES_FILE,
    SPLITS_FILE,
    load_sources,
    load_stored_splits,
    save_sources,
    save_splits,
)
from kr_ray.privacy.copy_evidence import near_copy_p_value, nearer_p_value
from kr_ray.privacy.exposure import exposure, holm_rejections
from kr_ray.privacy.scores import SampleScores, ScoreError
from kr_ray.runs.figures import Exposed
from kr_ray.synthesis.student_set import StudentSpec


def design(models: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Membership as in an audit: runs in pairs, a coin says which of the two gets the sample."""
    coins = rng.random((models // 2, samples)) < 0.5
    return np.stack([side for coin in coins for side in (coin, ~coin)])


def test_a_known_shift_is_ranked_by_its_size_and_measured_in_standard_deviations() -> None:
    rng = np.random.default_rng(0)
    member = design(64, 300, rng)
    shift = np.zeros(300)
    shift[[7, 42, 99]] = 6.0, 4.0, 2.5
    found = exposure(rng.normal(size=member.shape) + shift * member, member)
    assert found.order[:3].tolist() == [7, 42, 99]
    assert found.shift[[7, 42, 99]] == pytest.approx([6.0, 4.0, 2.5], abs=0.8)  # 0.25 is its standard error
    assert set(np.flatnonzero(found.beyond_chance)) == {7, 42, 99}
    assert (found.trained == 32).all() and (found.untrained == 32).all()


def test_p_values_are_those_of_scipys_t_test() -> None:
    rng = np.random.default_rng(1)
    member = design(16, 20, rng)
    answers = rng.normal(size=member.shape)
    found = exposure(answers, member)
    for sample in range(20):
        sides = (answers[member[:, sample], sample], answers[~member[:, sample], sample])
        assert found.p_value[sample] == pytest.approx(stats.ttest_ind(*sides, alternative="greater").pvalue)


@pytest.mark.parametrize("models", [4, 8, 32])
@pytest.mark.parametrize("paired", [True, False])
def test_without_a_leak_hardly_any_audit_marks_a_record(models: int, paired: bool) -> None:
    """300 audits of 200 samples: at most one in twenty marks any sample, within what 300 audits can tell."""
    rng = np.random.default_rng(2)
    marked = 0
    for _ in range(300):
        member = design(models, 200, rng)
        if not paired:  # independent coins; a sample that has not two runs on either side gets its pairs back
            coins = rng.random(member.shape) < 0.5
            enough = (coins.sum(axis=0) >= 2) & ((~coins).sum(axis=0) >= 2)
            member = np.where(enough, coins, member)
        difficulty = rng.normal(scale=3, size=200)  # samples differ far more than runs do
        marked += exposure(difficulty + rng.normal(size=member.shape), member).beyond_chance.any()
    assert marked <= stats.binom.ppf(0.999, 300, 0.05)


def test_answers_that_never_vary_are_no_evidence_and_misfits_are_refused() -> None:
    member = design(8, 5, np.random.default_rng(3))
    found = exposure(np.zeros(member.shape), member)
    assert not found.beyond_chance.any() and (found.shift == 0).all()
    with pytest.raises(ScoreError, match="answers"):
        exposure(np.zeros((4, 5)), member)
    member[:, 0] = True
    with pytest.raises(ScoreError, match=">= 2 models"):
        exposure(np.zeros(member.shape), member)


def test_holm_rejects_what_the_textbook_example_rejects() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 against 0.05 / (4, 3, 2, 1): two pass, the third (0.025) does not.
    assert holm_rejections(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == [True, False, False, True]
    assert holm_rejections(np.array([0.001, 0.002])).all() and not holm_rejections(np.array([0.9])).any()


# --- the list -----------------------------------------------------------------------------------------------


def leaking_groups(leaking: int, models: int = 32) -> dict[str, SampleScores]:
    """Ten canaries, of which the given one is known by heart, and ten ordinary samples."""
    rng = np.random.default_rng(4)
    groups = {}
    for name, samples in (("canary", 10), ("population", 10)):
        member, true = design(models, samples, rng), rng.integers(0, 3, samples)
        given = (true + 1) % 3 if name == "canary" else true
        logits = rng.normal(size=(models, samples, 2, 3)).astype(np.float32)
        if name == "canary":
            logits[:, leaking, :, given[leaking]] += 9 * member[:, leaking, None]
        groups[name] = SampleScores(logits, given, true, member)
    return groups


def test_the_leaking_record_heads_the_list_with_its_file_name(tmp_path: Path) -> None:
    indices = np.arange(100, 120)
    sources = [f"cats/scan_{k}.png" for k in range(200)]
    images = exposed_images(leaking_groups(3), indices, sources, ("cat", "dog", "=owl"))
    first = images[0]
    assert (first.image, first.training_index, first.group) == ("cats/scan_103.png", 103, "canary")
    assert first.beyond_chance and first.shift_sd > 3 and first.given_class != first.true_class
    assert sum(image.beyond_chance for image in images) == 1 and [image.rank for image in images] == list(
        range(1, 21)
    )
    told = write_exposed(tmp_path / "most_exposed_kr.csv", images)
    assert told == Exposed(file="most_exposed_kr.csv", images=20, beyond_chance=1)
    with (tmp_path / "most_exposed_kr.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [image.image for image in images] and rows[0][
        "runs_with"
    ] == "16"


def test_without_file_names_the_training_index_is_given() -> None:
    images = exposed_images(leaking_groups(0), np.arange(20), None, ("a", "b", "c"))
    assert images[0].image == "training image 0"


def test_a_training_image_is_found_again_by_its_source(tmp_path: Path) -> None:
    """Every image of a folder has one grey value, so that it can be told; the split takes images out of the
    middle."""
    for number in range(40):
        file = tmp_path / "set" / f"class_{number % 2}" / f"image {number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 6 * number).save(file)
    splits = load_splits(
        DataConfig(name="folder", path=str(tmp_path / "set"), image_size=8, max_train_images=20)
    )
    save_splits(tmp_path / "run" / "data" / "splits.safetensors", splits)
    save_sources(tmp_path / "run" / SOURCES_FILE, splits)
    sources = load_sources(tmp_path / "run" / SOURCES_FILE)
    stored = load_stored_splits(tmp_path / "run" / "data" / "splits.safetensors")
    assert sources is not None and len(sources) == len(stored.train) == 20
    for source, image in zip(sources, stored.train.images, strict=True):
        folder, _, name = source.partition("/")
        number = int(name.removeprefix("image ").removesuffix(".png"))
        assert folder == f"class_{number % 2}" and torch.equal(
            image, torch.full((1, 8, 8), 6 * number, dtype=torch.uint8)
        )


def test_arrays_give_numbers_and_an_older_run_gives_nothing(tmp_path: Path) -> None:
    splits = load_splits(DataConfig(name="digits", image_size=8, max_train_images=50))
    assert len(splits.train_sources) == 50 and all(source.isdigit() for source in splits.train_sources)
    assert load_sources(tmp_path / SOURCES_FILE) is None


def test_attacking_an_arm_leaves_the_list_beside_its_runs_and_only_counts_in_the_result(
    tmp_path: Path,
) -> None:
    """The stage's own attack on answers made up for eight runs: the third canary is known by heart, nothing
    else leaks. No Ray."""
    config = tiny_config(
        audit={"worst_case": {"arms": ["teacher"], "models": 8, "queries": 1, "max_canary_share": 0.25}}
    )
    splits = load_splits(config.data)
    save_splits(tmp_path / SPLITS_FILE, splits)
    save_sources(tmp_path / SOURCES_FILE, splits)
    spec = StudentSpec(config.generator, 2, SynthesisConfig(), 1, 0)
    plan = worst_case.plan_audit(tmp_path, tmp_path / "worst_case", config, spec, "digest")
    rng, member = np.random.default_rng(6), plan.design.member(8)
    for run in range(8):
        samples = rng.normal(size=(member.shape[1], 1, 10)).astype(np.float32)
        samples[2, 0, plan.design.given_labels[2]] += 25 * member[run, 2]
        reference = rng.normal(size=(len(plan.design.reference), 10)).astype(np.float32)
        scores, path = RunScores(samples, reference, 0.9, 1.0), plan.scores_file(run, "teacher")
        scores.save(path, plan._stamp(run, "teacher"))
    found = worst_case._attack(plan, "teacher", 8)
    images = member.shape[1]
    assert found.exposed == Exposed(file="most_exposed_teacher.csv", images=images, beyond_chance=1)
    with (tmp_path / "worst_case" / "most_exposed_teacher.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    index = int(plan.design.canaries[2])
    assert (rows[0]["training_index"], rows[0]["image"]) == (str(index), splits.train_sources[index])
    assert (
        rows[0]["beyond_chance"] == "True"
        and rows[0]["given_class"] != rows[0]["true_class"]
        and len(rows) == images
    )
    assert found.kind == "teacher" and splits.train_sources[index] not in str(found.exposed)


# --- near-copies --------------------------------------------------------------------------------------------


def test_near_copies_of_an_honest_generator_are_rarely_significant_and_copies_are() -> None:
    rng = np.random.default_rng(5)
    p_values, copied = [], []
    for _ in range(2000):
        test, generated = rng.normal(size=300), rng.normal(size=1000)
        threshold = np.quantile(test, 0.01)
        p_values.append(near_copy_p_value(int((generated <= threshold).sum()), 1000, 0.01, 300))
        copied.append(near_copy_p_value(int((generated <= threshold).sum()) + 60, 1000, 0.01, 300))
    assert np.mean(np.array(p_values) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)
    assert np.mean(np.array(copied) <= 0.05) > 0.95


def test_near_copy_chance_agrees_with_counting_by_hand() -> None:
    # One generated image below the smallest but one of two test images: of 3 places for it, 2 are below.
    assert near_copy_p_value(1, 1, 0.01, 2) == pytest.approx(2 / 3)
    assert near_copy_p_value(0, 10, 0.01, 50) == pytest.approx(1.0)
    assert nearer_p_value(-1.959964) == pytest.approx(0.025, abs=1e-6)
    with pytest.raises(ValueError, match="near=5"):
        near_copy_p_value(5, 4, 0.01, 50)
