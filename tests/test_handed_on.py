"""Attacks on images that are handed on: distances by hand, planted copies found, sets that know nothing
not accused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_generator
from scipy import special
from test_further_students import further
from test_report import constructed_arm, fake_report
from torch import Tensor

from kr_ray.audits.handed_on import KERNEL, SMALLEST, SetScores, nearness, set_scores
from kr_ray.config import EdmConfig
from kr_ray.config.coreset import CoresetSection
from kr_ray.config.distillation import DistillationSection
from kr_ray.data.datasets import load_splits
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.generators.interface import Judge, save_checkpoint
from kr_ray.generators.registry import generator_of
from kr_ray.methods.coreset.member import Coreset
from kr_ray.methods.distillation.member import Distillation
from kr_ray.methods.distillation.sets import SET_FILE, DistilledSet, Units
from kr_ray.methods.interface import HandedOn, HandsOnGenerator, HandsOnImages, Site
from kr_ray.methods.knowledge_recycling import KnowledgeRecycling
from kr_ray.methods.taken import save_taken
from kr_ray.methods.teacher import Teacher
from kr_ray.privacy.attacks import statistic_figures
from kr_ray.report.artefacts import artefacts, markdown
from kr_ray.report.schema import validate_report
from kr_ray.synthesis.student_set import StudentSpec


def images(seed: int, count: int, side: int = 8) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, side, side), generator=random, dtype=torch.uint8)


def test_nearness_is_that_of_plain_loops() -> None:
    asked, among = images(0, 300), images(1, 40)
    labels, theirs = torch.arange(300) % 4, torch.arange(40) % 3  # no image of class 3: then all count
    found = nearness(asked, labels, among, theirs)
    distances = []
    for image, label in zip(asked, labels, strict=True):
        same = among[theirs == label] if (theirs == label).any() else among
        difference = (same.double() - image.double()) / 255
        distances.append((difference**2).flatten(1).mean(1).sqrt().numpy())
    least = np.array([each.min() for each in distances])
    assert found[0] == pytest.approx(-np.log(least), rel=1e-4)
    width = KERNEL * np.sort(least)[(len(least) - 1) // 2]
    naive = [special.logsumexp(-(each**2) / (2 * width**2)) - np.log(len(each)) for each in distances]
    assert found[1] == pytest.approx(naive, rel=1e-4)


def test_an_exact_copy_is_as_near_as_can_be() -> None:
    among = images(1, 40)
    found = nearness(among[:5], torch.zeros(5, dtype=torch.int64), among, torch.zeros(40, dtype=torch.int64))
    assert found[0] == pytest.approx(-np.log(SMALLEST)) and np.isfinite(found).all()


def audited(copied: bool, runs: int = 8, samples: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Statistics [runs, 2, samples] of sets with, or without, near-copies of a third of what they are made
    of."""
    random, pool = np.random.default_rng(0), images(2, samples)
    labels = torch.zeros(samples, dtype=torch.int64)
    half = random.random((runs // 2, samples)) < 0.5
    member = np.stack([side for coins in half for side in (coins, ~coins)])
    values = []
    for run in range(runs):
        made = images(100 + run, 150)
        chosen = np.flatnonzero(member[run])[::3]
        if copied:
            noise = torch.from_numpy(random.integers(0, 3, (len(chosen), 1, 8, 8)).astype(np.uint8))
            made[: len(chosen)] = pool[chosen] // 2 * 2 + noise // 2
        handed = HandedOn(images=made, labels=torch.zeros(150, dtype=torch.int64), set_size=150)
        values.append(set_scores(handed, pool, labels).statistics[0])
    return np.stack(values), member


def test_copies_in_a_set_are_found_and_a_set_without_is_not_accused() -> None:
    for statistic in (0, 1):
        values, member = audited(copied=True)
        found = statistic_figures(values[:, statistic], member, 0)
        # A third of the members are in it, and the compared runs rarely hold the same third.
        assert (
            (found.tpr_at_1 or 0) > 0.2 and found.auc_low > 0.5 and (found.epsilon.clopper_pearson or 0) > 0
        )
        values, member = audited(copied=False)
        nothing = statistic_figures(values[:, statistic], member, 0)
        assert nothing.auc_low < 0.5 < nothing.auc_high and nothing.epsilon.clopper_pearson == 0


def test_scores_are_kept_with_their_inputs(tmp_path: Path) -> None:
    handed = HandedOn(images=images(1, 40), labels=torch.zeros(40, dtype=torch.int64), set_size=10)
    scores = set_scores(handed, images(0, 7), torch.zeros(7, dtype=torch.int64))
    assert scores.statistics.shape == (2, 2, 7) and scores.images.tolist() == [10, 40]
    assert (scores.statistics[1, 0] >= scores.statistics[0, 0]).all()  # more samples lie nearer
    file = tmp_path / "set_kr.npz"
    assert SetScores.load(file, "a") is None
    scores.save(file, "a")
    again = SetScores.load(file, "a")
    assert again is not None and np.array_equal(again.statistics, scores.statistics)
    assert SetScores.load(file, "b") is None
    file.write_bytes(b"damaged")
    assert SetScores.load(file, "a") is None


def test_a_diffusion_model_knows_by_its_denoising_loss_and_says_it_again(tmp_path: Path) -> None:
    section = EdmConfig.model_validate(
        {"channels": [8, 16], "embedding": 16, "batch_size": 8, "warmup_steps": 5, "epochs": 40}
    )
    generator = generator_of(section)
    assert isinstance(generator, Judge) and not isinstance(generator_of(tiny_generator()), Judge)
    some, others = images(3, 16, 16), images(4, 16, 16)
    labels = torch.arange(16) % 2
    training = generator.training(LabelledImages(some, labels), 2, 0, torch.device("cpu"))
    for _ in range(40):
        training.train_epoch()
    file = tmp_path / "40.safetensors"
    save_checkpoint(file, training.checkpoint(), section, 2, 1)
    known, unknown = (generator.knows(file, part, labels, torch.device("cpu")) for part in (some, others))
    assert known.dtype == torch.float64 and known.shape == (16,) and known.isfinite().all()
    assert torch.equal(known, generator.knows(file, some, labels, torch.device("cpu")))
    assert known.mean() > unknown.mean()  # noise that it was trained on, against noise that it was not


def test_methods_say_whether_they_hand_on_images() -> None:
    assert isinstance(KnowledgeRecycling(), HandsOnImages) and not isinstance(Teacher(), HandsOnImages)
    assert isinstance(Coreset(CoresetSection()), HandsOnImages)
    assert isinstance(Distillation(DistillationSection()), HandsOnImages)
    assert not isinstance(Coreset(CoresetSection()), HandsOnGenerator)


def site_of(folder: Path, splits: Splits) -> Site:
    config = tiny_config()
    save_splits(folder / SPLITS_FILE, splits)
    spec = StudentSpec(config.generator, 1, config.synthesis, 1, 0)
    return Site(path=folder, config=config, seed=0, student=spec)


def test_a_coreset_hands_on_its_images_and_whoever_is_in_them_is_found(tmp_path: Path) -> None:
    splits = load_splits(tiny_config().data)
    site, taken = site_of(tmp_path, splits), torch.arange(0, 100, 2)
    save_taken(tmp_path / "student_part", taken)
    handed = Coreset(CoresetSection()).handed_on(site, "student_part")
    assert torch.equal(handed.images, splits.train.images[taken]) and handed.set_size == 50
    asked = splits.train.subset(torch.arange(100))
    near = set_scores(handed, asked.images, asked.labels).statistics[0, 0]
    assert (near[::2] == near.max()).all() and (near[1::2] < near.max()).all()


def test_a_distilled_set_is_handed_on_as_it_is_exported(tmp_path: Path) -> None:
    splits = load_splits(tiny_config().data)
    site, (n, k) = site_of(tmp_path, splits), (20, splits.num_classes)
    signed = torch.linspace(-1.2, 1.2, n * 256).reshape(n, 1, 16, 16)
    targets = torch.eye(k)[torch.arange(n) % k]
    made = DistilledSet(signed, targets, torch.full((n,), -1), Units(torch.zeros(1), torch.ones(1)))
    made.save(tmp_path / "distilled_dm" / SET_FILE)
    handed = Distillation(DistillationSection()).handed_on(site, "student_dm")
    assert torch.equal(handed.images, made.as_bytes()) and torch.equal(handed.labels, torch.arange(n) % k)


# --- in the report ------------------------------------------------------------------------------------------


def with_sets(
    arm: dict[str, Any], leak: bool, artefacts: tuple[str, ...] = ("set", "generator")
) -> dict[str, Any]:
    values, member = audited(copied=leak)
    sets = [
        {"artefact": which, "attack": name, "images": 150, "canary": found, "population": found}
        for which in artefacts
        for k, name in enumerate(("nearest", "density"))
        for found in [statistic_figures(values[:, k], member, 0).model_dump(mode="json", by_alias=True)]
    ]
    return arm | {"sets": sets}


@pytest.fixture(scope="module")
def quiet() -> dict[str, Any]:
    return constructed_arm(0.0, samples=40, models=8)


@pytest.mark.parametrize("leak", [True, False])
def test_set_and_generator_are_attacked_and_the_table_says_so(quiet: dict[str, Any], leak: bool) -> None:
    raw = fake_report()
    raw["audit"]["lira"] = {"kr": with_sets(quiet, leak)}
    rows = {row.name: row for row in artefacts(validate_report(raw))}
    for name in ("Synthetic set", "Generator"):
        row = rows[name]
        attacks = [test.attack for test in row.tests]
        assert attacks[0].startswith("Search for copies") and attacks[1].startswith(
            "Membership by nearest image"
        )
        assert row.state == ("found" if leak else "nothing")
        assert "infer membership from the set" not in row.open and "many samples" not in row.open
    untouched = {row.name: row for row in artefacts(validate_report(fake_report()))}
    assert "infer membership from the set" in untouched["Synthetic set"].open
    assert "or many samples" in untouched["Generator"].open


def test_the_set_of_a_further_method_is_an_artefact_of_its_own(quiet: dict[str, Any]) -> None:
    raw = fake_report() | {"students": {"part": further(kind="coreset", title="Coreset")}}
    raw["audit"]["lira"] = {
        "part": with_sets(quiet | {"kind": "coreset", "title": "Coreset: part"}, True, ("set",))
    }
    report = validate_report(raw)
    row = next(row for row in artefacts(report) if row.name == "Set of Coreset: part")
    assert row.state == "found" and len(row.tests) == 2
    text = markdown(report)
    lines = text.splitlines()
    assert len(lines) == 2 + len(artefacts(report)) and all(line.count("|") == 5 for line in lines)
    assert "Set of Coreset: part | leak found | Membership by nearest image, 150 images" in text.replace(
        "\u00a0", " "
    )
