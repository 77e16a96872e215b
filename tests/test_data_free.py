"""Data-free distillation: losses by their definitions, a teacher that stays as it is, no real image after
it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_settings
from test_coreset import CPU, Killed, config, site, train
from test_dpdfd import flat
from torch import Tensor, nn
from torch.nn import functional as F

from kr_ray.classifiers.networks import load_classifier, new_classifier
from kr_ray.compute.parallel import BatchNorm2d
from kr_ray.config import ConfigError
from kr_ray.config.data_free import PRESETS, DataFreeSection
from kr_ray.config.file import parse_config
from kr_ray.data.augment import to_float
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.store import SPLITS_FILE, load_stored_splits, save_splits
from kr_ray.methods.data_free.losses import (
    BatchStatistics,
    adversarial,
    distillation,
    image_loss,
    negative_entropy,
)
from kr_ray.methods.data_free.training import Bank, DataFreeTraining, train_data_free
from kr_ray.methods.interface import Site
from kr_ray.runs.artifacts import load_tensors, read_json

SMALL: dict[str, Any] = {
    "kind": "data_free", "rounds": 6, "warmup_rounds": 2, "synthesis_steps": 2, "synthesis_batch": 8,
    "kd_steps": 2, "batch_size": 8, "latent_dim": 8, "channels": [8, 4],
}  # fmt: skip


def section(**keys: Any) -> DataFreeSection:
    return DataFreeSection.model_validate(SMALL | keys)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- losses -------------------------------------------------------------------------------------------------


def watched(images: Tensor, momentum: float = 0.0) -> tuple[nn.Sequential, BatchStatistics]:
    """Two batch norms, the project's own and torch's, whose running statistics are those of `images`."""
    network = nn.Sequential(BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        entering = images
        for layer in network:
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean = entering.mean((0, 2, 3))
                layer.running_var = entering.var((0, 2, 3), unbiased=False)
            entering = layer(entering)
    return network, BatchStatistics(network, momentum)


def test_the_statistics_loss_is_exactly_zero_where_the_statistics_match() -> None:
    images = noise(6, 3, 8, 8)
    network, statistics = watched(images)
    with statistics:
        network(images)
        assert float(statistics.loss().detach()) == 0.0
        statistics.begin()
        network(images + 1.0)
        assert (
            float(statistics.loss().detach()) > math.sqrt(3) - 1e-5
        )  # three means moved by one in the first layer
    network(images)  # nobody looks any more
    assert len(statistics._now) == 2


def test_the_statistics_loss_is_a_sum_of_distances_and_its_gradient_reaches_the_images() -> None:
    network, statistics = watched(noise(6, 3, 8, 8))
    network, images = network.double(), noise(4, 3, 5, 5, seed=1).double().requires_grad_()

    def loss(images: Tensor) -> Tensor:
        statistics.begin()
        network(images)
        return statistics.loss()

    by_hand, entering = 0.0, images.detach()
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            values = entering.transpose(0, 1).flatten(1)
            for found, stored in (
                (values.mean(1), layer.running_mean),
                (values.var(1, correction=0), layer.running_var),
            ):
                by_hand += float((found - stored).square().sum().sqrt())
        entering = layer(entering).detach()
    with statistics:
        assert float(loss(images).detach()) == pytest.approx(by_hand, rel=1e-9)
        assert torch.autograd.gradcheck(loss, (images,))


def test_earlier_batches_count_with_the_momentum() -> None:
    images = noise(6, 3, 8, 8)
    network, statistics = watched(images, 0.9)
    with statistics:
        network(images)
        statistics.keep()
        assert (
            float(statistics.loss().detach()) < 1e-5
        )  # the first batch has no earlier one; it is now its own
        statistics.begin()
        network(images + 1.0)
        mixed = float(statistics.loss().detach())
        statistics.earlier = []
        alone = float(statistics.loss().detach())
    assert 0 < mixed < alone


def test_the_adversarial_term_counts_where_both_name_the_same_class() -> None:
    teacher = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    student = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    p, q = teacher[0].softmax(0), student[0].softmax(0)
    assert float(adversarial(student, teacher)) == pytest.approx(-float((p * (p / q).log()).sum()) / 2)
    assert float(adversarial(teacher, teacher)) == pytest.approx(0, abs=1e-7)


def test_the_balance_is_best_where_all_classes_are_as_frequent() -> None:
    assert float(negative_entropy(50 * torch.eye(4))) == pytest.approx(-math.log(4), abs=1e-5)
    assert float(negative_entropy(50 * torch.eye(4)[[1, 1]])) == pytest.approx(0, abs=1e-5)


def test_distillation_is_zero_for_equal_answers_and_keeps_its_scale_at_any_temperature() -> None:
    teacher, student = noise(5, 4), noise(5, 4, seed=1)
    assert float(distillation(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-6)
    by_hand = sum(
        float((p * (p / q).log()).sum())
        for p, q in zip((teacher / 2).softmax(1), (student / 2).softmax(1), strict=True)
    )
    assert float(distillation(student, teacher, 2.0)) == pytest.approx(4 * by_hand / 5, rel=1e-5)
    # High temperature: squared difference of centred logits over 2 K (Hinton et al. 2015, section 2.1).
    centred = (teacher - teacher.mean(1, keepdim=True)) - (student - student.mean(1, keepdim=True))
    expected = float(centred.square().sum(1).mean()) / 8
    assert float(distillation(student.double(), teacher.double(), 1e4)) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("bn_weight", 3 * 7.0),
        ("onehot_weight", 3 * math.log(3)),
        ("balance_weight", -3 * math.log(3)),
        ("activation_weight", -3 * 2.0),
        ("adversarial_weight", 0.0),
    ],
)
def test_each_term_has_its_weight_and_no_other(weight: str, expected: float) -> None:
    """Answers that know nothing, features of plus and minus two, a statistics' distance of seven."""
    off = {name: 0.0 for name in PRESETS["dafl"] if name.endswith("_weight")}
    keys = section(**(off | {weight: 3.0}))
    logits, features = torch.zeros(4, 3), torch.tensor([[2.0, -2.0]]).repeat(4, 1)
    found = image_loss(
        keys,
        teacher=logits,
        features=features,
        labels=torch.arange(4) % 3,
        statistics=torch.tensor(7.0) if weight == "bn_weight" else None,
        student=logits if weight == "adversarial_weight" else None,
    )
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_labels_are_drawn_or_the_teachers_own() -> None:
    teacher = 5 * torch.eye(3)
    labels = torch.tensor([1, 2, 0])
    arguments: dict[str, Any] = {"teacher": teacher, "features": teacher, "labels": labels}
    arguments |= {"statistics": None, "student": None}
    only = {name: 0.0 for name in PRESETS["dafl"] if name.endswith("_weight")} | {"onehot_weight": 1.0}
    drawn = image_loss(section(**only, onehot_labels="drawn"), **arguments)
    answered = image_loss(section(**only, onehot_labels="answered"), **arguments)
    assert float(drawn) == pytest.approx(float(F.cross_entropy(teacher, labels)))
    assert float(answered) == pytest.approx(float(F.cross_entropy(teacher, torch.arange(3))))


# --- the loop -----------------------------------------------------------------------------------------------


def training(**keys: Any) -> DataFreeTraining:
    recipe = config().classifier.model_copy(update={"norm": keys.pop("norm", "batch")})
    teacher = new_classifier(3, 1, recipe, 5).requires_grad_(False)
    for _ in range(40):
        teacher(to_float(flat(60).images))  # its batch norms learn what enters them
    teacher.eval()
    return DataFreeTraining(teacher, (1, 8, 8), recipe, section(**keys), 0, CPU)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_teacher_stays_bit_for_bit_and_the_bank_fills_by_one_batch_a_round(preset: str) -> None:
    one = training(preset=preset)
    before = {name: value.clone() for name, value in one.teacher.state_dict().items()}
    start = [value.clone() for value in one.student.parameters()]
    for done in range(1, 7):
        loss = one.advance()
        assert one.bank.filled == 8 * done and math.isnan(loss) == (done <= 2)
        same = [torch.equal(a, b) for a, b in zip(start, one.student.parameters(), strict=True)]
        assert all(same) == (done <= 2)
    after = one.teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and not one.teacher.training
    assert one.step == one.steps == 8 and one.teacher_queries == 6 * 2 * 8 + 8 * 8
    assert len(one.bank.images.flatten(1).unique(dim=0)) > 40
    assert not one.teacher._modules["norm"]._forward_pre_hooks  # type: ignore[union-attr]


def test_the_statistics_loss_falls_as_images_are_made() -> None:
    """Sixty steps on one batch: what enters the teacher's batch norms comes near to what is stored there."""
    found = []
    for steps in (1, 60):
        one = training(preset="ae", synthesis_steps=steps, rounds=3, bn_momentum=0.0)
        one.advance()
        with one.statistics:
            one.statistics.earlier = []
            one.statistics.begin()
            one.teacher(to_float(one.bank.images[:8]))
            found.append(float(one.statistics.loss()))
    assert found[1] < 0.7 * found[0]


def test_a_teacher_without_batch_norm_is_served_by_dafls_losses() -> None:
    one = training(preset="dafl", norm="group")
    assert one.statistics.layers == 0
    one.advance()
    assert one.bank.filled == 8 and one.bank.images[:8].float().std() > 1
    with pytest.raises(ConfigError, match=r"`bn_weight: 0` must hold .* use preset: dafl"):
        training(norm="group")


def test_a_bank_goes_on_from_its_state() -> None:
    bank = Bank(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64))
    bank.add(torch.ones(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([4, 5]))
    other = Bank(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64))
    other.load_state_dict(bank.state_dict())
    other.add(torch.full((2, 1, 2, 2), 7, dtype=torch.uint8), torch.tensor([1, 2]))
    assert other.filled == 4 and other.labels.tolist() == [4, 5, 1, 2, 0, 0]


# --- the part -----------------------------------------------------------------------------------------------


def poisoned(splits: Splits) -> Splits:
    """Other bytes and labels everywhere; bytes know no NaN."""

    def other(part: LabelledImages) -> LabelledImages:
        return LabelledImages(255 - part.images.flip(0), (part.labels + 1) % 3)

    parts = [other(part) for part in (splits.train, splits.validation, splits.test)]
    return Splits(splits.name, splits.class_names, *parts)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_tensors(folder / "weights.safetensors")[0]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def place_of(path: Path, seed: int = 0) -> Site:
    return site(path, config(free=SMALL), seed)


def test_no_real_image_is_seen_after_the_teacher(tmp_path: Path) -> None:
    """All images and labels are others once the teacher is there, fewer even: the student is the same."""
    clean, told = place_of(tmp_path / "clean"), list[str]()
    folder = train(clean, "free", told)
    assert {text.split()[0] for text in told} == {"teacher", "student_free"}
    shutil.copytree(tmp_path / "clean", tmp_path / "dirty")
    shutil.rmtree(tmp_path / "dirty" / "student_free")
    dirty = tmp_path / "dirty"
    splits = poisoned(load_stored_splits(dirty / SPLITS_FILE))
    save_splits(dirty / SPLITS_FILE, Splits("flat", splits.class_names, splits.train.subset(torch.arange(40)),
                                            splits.validation, splits.test))  # fmt: skip
    again = train(Site(path=dirty, config=clean.config, seed=0, student=clean.student), "free", told)
    assert again == dirty / "student_free"
    assert equal(weights(folder), weights(again))
    banks = [load_tensors(path / "bank.safetensors")[0] for path in (folder, again)]
    assert (
        equal(*banks)
        and banks[0]["images"].shape == (48, 1, 8, 8)
        and banks[0]["images"].dtype == torch.uint8
    )
    other = train(place_of(tmp_path / "other", seed=1), "free", told)
    assert not equal(weights(folder), weights(other))


def test_the_result_tells_what_was_made_and_asked(tmp_path: Path) -> None:
    folder = train(place_of(tmp_path), "free", [])
    found = read_json(folder / "done.json")["result"]
    assert (found["bank"], sum(found["bank_by_class"]), found["steps"]) == (48, 48, 8)
    assert found["work"]["images_generated"] == 48 and found["work"]["teacher_queries"] == 160
    assert 0 <= found["bank_agreement"] <= 1 and len(found["curve"]) == 6
    bank = load_tensors(folder / "bank.safetensors")[0]
    agreement = (bank["logits"].argmax(1) == bank["labels"]).double().mean()
    assert found["bank_agreement"] == pytest.approx(float(agreement))
    assert load_classifier(folder / "weights.safetensors", CPU).num_classes == 3


@pytest.mark.parametrize("at", [1, 4])
def test_a_killed_student_goes_on_to_the_same_weights(tmp_path: Path, at: int) -> None:
    """In the warm-up and after it."""
    place = place_of(tmp_path)
    whole = train(place, "free", [])
    teacher, rows = tmp_path / "teacher" / "weights.safetensors", list[dict[str, float]]()
    arguments = teacher, section(), place.config.classifier, 0
    (tmp_path / "killed").mkdir()

    def keep(state: dict[str, Any], row: dict[str, float]) -> None:
        torch.save(state, tmp_path / "state.pt")
        rows.append(row)
        if len(rows) == at:
            raise Killed

    with pytest.raises(Killed):
        train_data_free(tmp_path, tmp_path / "killed", *arguments, None, keep)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    train_data_free(tmp_path, tmp_path / "killed", *arguments, state, lambda state, row: None)
    assert equal(weights(whole), weights(tmp_path / "killed"))
    assert (whole / "bank.safetensors").read_bytes() == (
        tmp_path / "killed" / "bank.safetensors"
    ).read_bytes()


# --- keys ---------------------------------------------------------------------------------------------------


def test_presets_fill_what_is_not_said() -> None:
    assert (DataFreeSection().bn_weight, DataFreeSection().synthesis_steps) == (10.0, 10)
    ae = DataFreeSection(preset="ae")
    assert (ae.onehot_weight, ae.adversarial_weight, ae.bn_weight, ae.synthesis_steps) == (0.0, 0.0, 1.0, 2)
    assert DataFreeSection(preset="ae", onehot_weight=0.3).onehot_weight == 0.3
    assert DataFreeSection(preset="dafl").onehot_labels == "answered"


@pytest.mark.parametrize(
    ("keys", "sections", "said"),
    [
        ({"preset": "slow"}, {}, "fast"),
        ({"rounds": 20}, {}, "`warmup_rounds < rounds` must hold"),
        ({"preset": "ae", "bn_weight": 0.0}, {}, "at least one of `bn_weight`, .* must be > 0"),
        ({"channels": [0, 4]}, {}, "`channels >= 1`"),
        ({"kd_steps": 10**7}, {}, "`kd_steps <= 1,000,000`"),
        ({"bn_weight": 1e9}, {}, "`bn_weight <= 1,000,000`"),
        (
            {},
            {"classifier": {"norm": "group"}},
            r"students\.free: `bn_weight: 0` must hold .*use preset: dafl",
        ),
        ({}, {"data": {"image_size": 18}}, r"students\.free: `data\.image_size` must be a multiple of 4"),
    ],
)
def test_wrong_keys_are_refused_before_any_work(keys: Any, sections: Any, said: str) -> None:
    students = {"free": {"kind": "data_free"} | keys}
    generator = {"kind": "edm", "channels": [8], "unshuffle": 1, "epochs": 4, "checkpoint_every": 2}
    settings = tiny_settings(students=students, **sections)
    if sections.get("data"):
        settings |= {"generator": generator, "synthesis": {}, "tuning": {}}
    with pytest.raises(ConfigError, match=said):
        parse_config(settings)


def test_dafl_goes_with_group_norm_and_statistics_with_batch_norm() -> None:
    free = {"kind": "data_free", "preset": "dafl"}
    assert (
        tiny_config(classifier={"norm": "group"}, students={"free": free}).students["free"].kind
        == "data_free"
    )
