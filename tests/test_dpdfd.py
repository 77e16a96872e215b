"""DPDFD: losses by their definitions, the bound, the shards, both accountings, and one release per answer."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kr_ray.classifiers.networks import new_classifier, save_classifier
from kr_ray.config import ClassifierConfig, ConfigError
from kr_ray.config.dp import DpdfdSection
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.dp.noise import KEY_FILE, insecure_key
from kr_ray.methods.dpdfd.losses import bounded, generator_loss, output_gradient, teacher_loss
from kr_ray.methods.dpdfd.networks import DataFreeGenerator, to_bytes
from kr_ray.methods.dpdfd.plan import plan_dpdfd, privacy_of
from kr_ray.methods.dpdfd.teachers import check_shards, noisy_answers, shards, teacher_file
from kr_ray.methods.dpdfd.training import train_dpdfd
from kr_ray.privacy.accountants import epsilon_of
from kr_ray.privacy.theorem3 import printed_epsilon
from kr_ray.runs.artifacts import load_state, load_tensors, save_state

RECIPE = ClassifierConfig(
    width=4, batch_size=16, min_steps=0, warmup_epochs=1, precision="full", mixup_alpha=0.0, crop_padding=1
)
SECTION = DpdfdSection(
    noise_multiplier=2.0,
    teachers=3,
    teacher_epochs=1,
    queries=24,
    rounds=3,
    steps=12,
    generator_steps=2,
    batch_size=8,
    latent_dim=8,
)
PAPER = SECTION.model_copy(update={"accounting": "paper", "steps": 40, "noise_multiplier": 100.0})
SHAPE = (1, 8, 8)


def flat(count: int, seed: int = 0, classes: int = 3) -> LabelledImages:
    """Three easy classes: dark, grey, bright; no two images are equal."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count, *SHAPE), generator=random, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    return LabelledImages(images + (90 * labels[:, None, None, None]).to(torch.uint8), labels)


def stored(run: Path, count: int = 90) -> Path:
    save_splits(
        run / SPLITS_FILE, Splits("flat", ("dark", "grey", "bright"), flat(count), flat(30, 1), flat(33, 2))
    )
    return run


def nothing(state: dict[str, Any], row: dict[str, float]) -> None:
    pass


# --- losses
# ------------------------------------------------------------------------------------------------------------


def test_the_teachers_loss_is_decoupled_distillation_by_its_definition() -> None:
    """Zhao et al. 2022, equations 5 to 7, one image at a time; and alpha TCKD + (1 - p) NCKD is plain
    distillation (equation 6)."""
    random = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(5, 4, generator=random, dtype=torch.float64) for _ in range(2))
    found = teacher_loss(student, teacher, 8.0)
    for s_logits, t_logits, loss in zip(student.numpy(), teacher.numpy(), found, strict=True):
        s, t = (np.exp(x / 4) / np.exp(x / 4).sum() for x in (s_logits, t_logits))
        k = t_logits.argmax()
        rest = [i for i in range(4) if i != k]
        of_target = t[k] * math.log(t[k] / s[k]) + (1 - t[k]) * math.log((1 - t[k]) / (1 - s[k]))
        of_others = sum(t[i] / (1 - t[k]) * math.log((t[i] / (1 - t[k])) / (s[i] / (1 - s[k]))) for i in rest)
        assert float(loss) == pytest.approx(16 * (of_target + 8 * of_others), rel=1e-6)
        plain = sum(t[i] * math.log(t[i] / s[i]) for i in range(4))
        assert of_target + (1 - t[k]) * of_others == pytest.approx(plain, rel=1e-9)


def test_outputs_moved_along_the_target_part_name_the_teachers_class_but_along_the_cited_loss_do_not() -> (
    None
):
    teacher = 2 * torch.randn(2000, 10, generator=torch.Generator().manual_seed(0))
    agreeing = []
    for others_weight in (0.0, 8.0):
        moved = -bounded(output_gradient(torch.zeros(2000, 10), teacher, others_weight), 1.0, "normalise")
        agreeing.append(float((moved.argmax(1) == teacher.argmax(1)).double().mean()))
    assert agreeing[0] == 1.0 and agreeing[1] < 0.01
    sound, paper = (
        SECTION.model_copy(update={"accounting": kind}).weight_of_others for kind in ("sound", "paper")
    )
    assert (sound, paper) == (0.0, 8.0) and SECTION.model_copy(
        update={"others_weight": 2.0}
    ).weight_of_others == 2.0


def test_a_student_that_agrees_has_no_gradient_and_stays_bounded() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    gradient = output_gradient(logits, logits, 8.0)
    assert gradient.abs().max() < 1e-5
    assert bounded(torch.zeros(2, 3, dtype=torch.float64), 1.0, "normalise").abs().max() == 0


@pytest.mark.parametrize("bound", ["normalise", "clip"])
def test_no_gradient_exceeds_the_bound_and_only_clipping_keeps_small_ones(bound: Any) -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.03, 0.04], [1e6, 0.0]], dtype=torch.float64)
    found = bounded(gradient, 0.5, bound)
    assert (found.norm(dim=1) <= 0.5).all()
    assert found[0].norm() == pytest.approx(0.5, rel=1e-5) and found[2].norm() == pytest.approx(0.5, rel=1e-5)
    assert found[1].norm() == pytest.approx(0.5 if bound == "normalise" else 0.05, rel=1e-3)
    assert torch.allclose(
        found / found.norm(dim=1, keepdim=True), gradient / gradient.norm(dim=1, keepdim=True)
    )


def test_the_generators_loss_rewards_sure_balanced_and_active_predictions() -> None:
    sure, unsure, one_class = 20 * torch.eye(3), torch.zeros(3, 3), 20 * torch.eye(3)[[0, 0, 0]]
    features = torch.full((3, 4), 2.0)
    assert generator_loss(sure, features, 1, 0, 0) < 1e-6 and generator_loss(
        unsure, features, 1, 0, 0
    ) == pytest.approx(math.log(3))
    assert generator_loss(sure, features, 0, 1, 0) == pytest.approx(-math.log(3), abs=1e-4)
    assert generator_loss(one_class, features, 0, 1, 0) == pytest.approx(0, abs=1e-4)
    assert generator_loss(sure, features, 0, 0, 1) == pytest.approx(-4.0)


# --- accounting
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "answer", "queries", "epsilon"),
    [
        (100, "gradients", 179, 1),
        (100, "gradients", 628, 2),
        (100, "gradients", 10_004, 10),
        (236, "gradients", 1000, 1),
        (167, "votes", 1000, 1),
        (32, "gradients", 1000, 10),
        (22, "votes", 1000, 10),
    ],
)
def test_sound_answers_cost_what_is_known(sigma: float, answer: str, queries: int, epsilon: float) -> None:
    section = SECTION.model_copy(
        update={"noise_multiplier": float(sigma), "answer": answer, "queries": queries, "delta": 1e-5}
    )
    plan = plan_dpdfd(section, 60_000)
    assert epsilon_of([plan.event], 1e-5)[0] == pytest.approx(epsilon, rel=0.03)
    fitted = plan_dpdfd(
        section.model_copy(update={"noise_multiplier": None, "target_epsilon": float(epsilon)}), 60_000
    )
    assert fitted.sigma == pytest.approx(sigma, rel=0.03) and epsilon_of([fitted.event], 1e-5)[0] <= epsilon


@pytest.mark.parametrize(("batch", "steps", "honest"), [(64, 1, 5.84), (64, 1000, 991), (256, 1000, 13_797)])
def test_the_papers_accounting_shows_the_honest_figure(batch: int, steps: int, honest: float) -> None:
    section = PAPER.model_copy(
        update={"batch_size": batch, "steps": steps, "norm_bound": 1e-3, "delta": 1e-5}
    )
    privacy = privacy_of(plan_dpdfd(section, 60_000), section, insecure=False)
    assert privacy.guarantee.epsilon == pytest.approx(honest, rel=1e-3)
    assert privacy.printed["stamp"] == "not a guarantee" and privacy.printed["epsilon"] < 0.04
    assert privacy.guarantee.guarantee is (honest < 50)


def test_the_printed_epsilon_is_the_theorems_and_shrinks_with_the_bound_while_the_honest_one_does_not() -> (
    None
):
    assert printed_epsilon(1e-3, 1, 256, 1000, 100, 1e-5) == pytest.approx(0.031, abs=5e-4)
    orders = 1 + np.geomspace(1e-4, 1e8, 400_001)
    slope = 2 * 0.2**2 * 64 * 100 / 100**2
    grid = slope * orders + np.log((orders - 1) / orders) - (math.log(1e-5) + np.log(orders)) / (orders - 1)
    assert printed_epsilon(0.2, 1, 64, 100, 100, 1e-5) == pytest.approx(grid.min(), rel=1e-5)
    printed, honest = [], []
    for norm_bound in (1.0, 0.1, 0.01):
        section = PAPER.model_copy(update={"norm_bound": norm_bound})
        privacy = privacy_of(plan_dpdfd(section, 60_000), section, insecure=False)
        printed.append(privacy.printed["epsilon"])
        honest.append(privacy.guarantee.epsilon)
    assert printed[0] > 5 * printed[1] > 5 * printed[2] and len(set(honest)) == 1 and honest[0] > printed[0]


def test_one_teacher_changed_moves_an_answer_by_the_sensitivity_at_most(tmp_path: Path) -> None:
    """Same noise, another third teacher: 2 C for gradients, sqrt(2) for votes; reached by votes."""
    images = torch.randint(
        0, 256, (200, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    student = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    for answer, limit in (("gradients", 2 * 0.7), ("votes", math.sqrt(2))):
        section = SECTION.model_copy(update={"answer": answer, "norm_bound": 0.7})
        found = []
        for seeds in ((0, 1, 2), (0, 1, 3)):
            for teacher, seed in enumerate(seeds):
                save_classifier(teacher_file(tmp_path, teacher), new_classifier(3, 1, RECIPE, seed))
            found.append(noisy_answers(tmp_path, student, images, section, 5.0, insecure_key("k"), 0))
        distances = (found[0] - found[1]).norm(dim=1)
        assert 0.3 * limit < distances.max() <= limit + 1e-9
        assert answer == "gradients" or distances.max() == pytest.approx(limit)


@pytest.mark.parametrize("answer", ["gradients", "votes"])
def test_answers_carry_noise_of_the_stated_size(tmp_path: Path, answer: str) -> None:
    section = SECTION.model_copy(update={"answer": answer, "norm_bound": 0.7, "teachers": 1})
    save_classifier(teacher_file(tmp_path, 0), new_classifier(3, 1, RECIPE, 0))
    images, student = torch.zeros(3000, *SHAPE, dtype=torch.uint8), torch.zeros(3000, 3)
    quiet, loud = (
        noisy_answers(tmp_path, student, images, section, s, insecure_key("k"), 0) for s in (0.0, 5.0)
    )
    assert (loud - quiet).std() == pytest.approx(5.0 * (0.7 if answer == "gradients" else 1.0), rel=0.03)


# --- shards
# ------------------------------------------------------------------------------------------------------------


def test_one_image_less_changes_one_shard_alone() -> None:
    images, key = flat(300), insecure_key("k")
    whole = shards(images, 3, 4, key)
    assert torch.equal(torch.cat(whole).sort().values, torch.arange(300))
    kept = torch.arange(300) != 123
    without = shards(images.subset(kept), 3, 4, key)
    original = torch.arange(300)[kept]
    changed = [not torch.equal(part, original[other]) for part, other in zip(whole, without, strict=True)]
    assert sum(changed) == 1
    mixed = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    again = shards(images.subset(mixed), 3, 4, key)
    assert all(
        set(part.tolist()) == set(mixed[other].tolist()) for part, other in zip(whole, again, strict=True)
    )


def test_shards_that_would_lack_a_class_are_refused_before_and_while_dealing() -> None:
    with pytest.raises(
        ConfigError,
        match=r"every teacher must see every class, but got teachers=50 for a class of 100 images; use 5",
    ):
        check_shards(torch.tensor([5000, 100]), 50)
    check_shards(torch.tensor([5000, 5000]), 50)
    check_shards(torch.tensor([1]), 1)
    with pytest.raises(
        ConfigError, match=r"shard \d+ of 10 has no image of class \d; use fewer teachers than 10"
    ):
        shards(flat(12), 3, 10, insecure_key("k"))


# --- the part
# ----------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Ends a training in the place of a kill."""


@pytest.mark.parametrize("answer", ["gradients", "votes"])
def test_a_killed_sound_training_asks_once_and_ends_with_the_same_weights(
    tmp_path: Path, answer: str
) -> None:
    run, secret = stored(tmp_path / "run"), os.urandom(32)
    section = SECTION.model_copy(update={"answer": answer})
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / KEY_FILE).write_bytes(secret)
    whole = train_dpdfd(run, tmp_path / "whole", section, RECIPE, 0, None, nothing)
    folder = tmp_path / "killed"

    def save(state: dict[str, Any], row: dict[str, float]) -> None:
        if row["tick"] == 1:  # the answers of two rounds are there, the state is of the first
            raise Killed
        save_state(folder / "state.pt", state)

    with pytest.raises(Killed):
        train_dpdfd(run, folder, section, RECIPE, 0, None, save)
    recorded = [(folder / f"answers-{index}.safetensors").read_bytes() for index in (0, 1)]
    again = train_dpdfd(run, folder, section, RECIPE, 0, load_state(folder / "state.pt"), nothing)
    assert [(folder / f"answers-{index}.safetensors").read_bytes() for index in (0, 1)] == recorded
    assert not (folder / KEY_FILE).exists()
    for file in ("weights.safetensors", "generator.safetensors", "answers-2.safetensors"):
        one, other = (load_tensors(tmp_path / name / file)[0] for name in ("whole", "killed"))
        assert all(torch.equal(one[name], other[name]) for name in one), file
    assert whole.event == again.event and whole.result.privacy == again.result.privacy
    assert (
        sum(len(load_tensors(folder / f"answers-{i}.safetensors")[0]["answers"]) for i in range(3))
        == section.queries
    )


def test_recorded_answers_need_neither_teachers_nor_key(tmp_path: Path) -> None:
    """All that is learnt is in the answers: without key and teachers the student is trained again to the same
    weights."""
    run, part, again = stored(tmp_path / "run"), tmp_path / "part", tmp_path / "again"
    train_dpdfd(run, part, SECTION, RECIPE, 0, None, nothing)
    shutil.copytree(part, again, ignore=shutil.ignore_patterns("teachers", "weights*"))
    train_dpdfd(run, again, SECTION, RECIPE, 0, None, nothing)
    assert not (again / "teachers").exists() and not (again / KEY_FILE).exists()
    one, other = (load_tensors(folder / "weights.safetensors")[0] for folder in (part, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_paper_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    run, secret, states = stored(tmp_path / "run"), os.urandom(32), []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / KEY_FILE).write_bytes(secret)
    train_dpdfd(run, tmp_path / "whole", PAPER, RECIPE, 0, None, nothing)
    folder = tmp_path / "killed"

    def save(state: dict[str, Any], row: dict[str, float]) -> None:
        save_state(folder / "state.pt", state)
        states.append(row)
        if len(states) == 9:
            raise Killed

    with pytest.raises(Killed):
        train_dpdfd(run, folder, PAPER, RECIPE, 0, None, save)
    released = train_dpdfd(run, folder, PAPER, RECIPE, 0, load_state(folder / "state.pt"), nothing)
    one, other = (load_tensors(tmp_path / name / "weights.safetensors")[0] for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    result = json.loads((folder / "result.json").read_text())
    assert (
        result["privacy"]["printed"]["stamp"] == "not a guarantee"
        and released.result.privacy.model_dump(mode="json") == result["privacy"]
    )


class RealLooking:
    """In the place of a private generator: images of the asked classes."""

    def images(self, labels: Tensor, random: torch.Generator) -> Tensor:
        drawn = torch.randint(0, 60, (len(labels), *SHAPE), generator=random, dtype=torch.uint8)
        return drawn + (90 * labels[:, None, None, None]).to(torch.uint8)


@pytest.mark.parametrize(("answer", "rate"), [("votes", 1.0), ("gradients", 12.0)])
def test_a_student_learns_from_little_noise_and_not_from_much(
    tmp_path: Path, answer: str, rate: float
) -> None:
    """Known images, so that the answers alone decide: far above chance with little noise, chance (1/3) where
    noise drowns them."""
    run, reached = stored(tmp_path / "run", 400), {}
    keys = {
        "answer": answer,
        "answer_rate": rate,
        "queries": 150,
        "steps": 120,
        "teacher_epochs": 20,
        "rounds": 1,
        "teachers": 4,
    }
    for sigma in (0.1, 1e6):
        section = SECTION.model_copy(update=keys | {"noise_multiplier": sigma, "insecure_noise_key": "k"})
        released = train_dpdfd(run, tmp_path / f"{sigma}", section, RECIPE, 0, None, nothing, RealLooking())
        reached[sigma] = released.result.test_accuracy
    assert reached[0.1] > 0.9 and reached[1e6] < 0.67, reached


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"teachers": 6},
            "`images / teachers >= 16` must hold, for a shard is at least one batch, but got 90",
        ),
        ({"rounds": 25}, "`rounds <= queries` must hold, but got rounds=25, queries=24; use"),
        ({"delta": 0.5}, "`delta < 1/N` must hold, but got delta=0.5 for 90 images; use"),
        (
            {"noise_multiplier": None, "target_epsilon": 1e-7},
            "dpdfd: `target_epsilon` must be reachable, but got 1e-07",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_dpdfd(SECTION.model_copy(update=keys), 90)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"accounting": "paper", "answer": "votes", "noise_multiplier": 1.0},
            "must go with `accounting: sound`",
        ),
        ({"accounting": "paper", "target_epsilon": 1.0}, "`noise_multiplier` must be given"),
    ],
)
def test_contradictory_keys_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DpdfdSection.model_validate(keys)


def test_generated_images_are_bytes_of_the_size_asked_for() -> None:
    generator = DataFreeGenerator(SHAPE, 8, 0)
    images = to_bytes(generator.draw(5, torch.Generator().manual_seed(0)).detach())
    assert images.shape == (5, *SHAPE) and images.dtype == torch.uint8 and images.float().std() > 1
    assert torch.equal(
        to_bytes(torch.tensor([-1.0, 0.0, 1.0])), torch.tensor([0, 128, 255], dtype=torch.uint8)
    )
    with pytest.raises(ConfigError, match="multiple of 4 for dpdfd, but got 30; use 32"):
        DataFreeGenerator((1, 30, 30), 8, 0)
