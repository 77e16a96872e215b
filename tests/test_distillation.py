"""Data set distillation: augmentation and the three objectives against their definitions, what the images
start as, resumption bit for bit, and what is left behind."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_settings
from test_canaries import audit, noise_splits
from test_dpdfd import flat
from test_pipeline import write_config
from torch import Tensor, nn
from torch.nn import functional

from kr_ray.audits.copies import measure_distilled_copies
from kr_ray.audits.design import AuditDesign, design_audit
from kr_ray.audits.runs import AuditPlan
from kr_ray.classifiers.convnet import ConvNet3, fresh_convnet
from kr_ray.classifiers.export import export_student
from kr_ray.classifiers.networks import load_classifier, new_classifier, save_classifier
from kr_ray.cli import main
from kr_ray.config import ClassifierConfig, Config, ConfigError
from kr_ray.config.distillation import DistillationSection
from kr_ray.data.checks import DataError
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.methods.distillation.augment import OPERATIONS, Augmentation, draw, operations
from kr_ray.methods.distillation.initial import Initial, first_images, in_channels
from kr_ray.methods.distillation.matching import (
    DistributionMatching,
    GradientMatching,
    Matching,
    Setting,
    distribution_distance,
    gradient_distance,
)
from kr_ray.methods.distillation.sets import PARQUET_FILE, SET_FILE, DistilledSet, RealImages, Units, to_bytes
from kr_ray.methods.distillation.trajectories import (
    TrajectoryMatching,
    train_expert,
    trajectory_distance,
)
from kr_ray.methods.distillation.trajectories import (
    flat as flat_weights,
)
from kr_ray.methods.interface import Part, Site, train_here
from kr_ray.methods.registry import method_of
from kr_ray.methods.taken import load_taken
from kr_ray.runs.artifacts import load_state, save_state
from kr_ray.runs.results import DistillationResult
from kr_ray.synthesis.parquet_set import read_parquet_set
from kr_ray.synthesis.student_set import StudentSpec

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "kind": "distillation",
    "images_per_class": 2,
    "iterations": 40,
    "real_batch": 8,
    "network_width": 4,
    "network_batch": 8,
    "outer_steps": 2,
    "inner_epochs": 1,
    "experts": 2,
    "start_epochs": [0, 1],
    "matched_epochs": 1,
    "student_steps": 2,
    "epochs": 20,
}


def section(**keys: Any) -> DistillationSection:
    found = config(**keys).students["few"]
    assert isinstance(found, DistillationSection)
    return found


def config(**keys: Any) -> Config:
    return tiny_config(
        students={"few": SMALL | keys}, data={"image_size": 16}, classifier={"precision": "full"}
    )


def splits(count: int = 60) -> Splits:
    return Splits("flat", ("dark", "grey", "bright"), flat(count), flat(30, 1), flat(33, 2))


def setting(names: tuple[str, ...] = (), count: int = 60, **keys: Any) -> Setting:
    real = RealImages.of(splits(count).train, 3, CPU)
    return Setting(section=section(**keys), real=real, operations=names, seed=0)


# --- the network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "parameters"), [(3, 320_010), (1, 317_706)])
def test_convnet_has_the_published_number_of_parameters(channels: int, parameters: int) -> None:
    assert sum(p.numel() for p in ConvNet3(10, channels).parameters()) == parameters


@pytest.mark.parametrize("side", [28, 32])
def test_convnet_is_the_authors_layers(side: int) -> None:
    """Convolution with padding 3 where 28 px become 32, instance norm, ReLU, average pooling of 2, three
    times; then a linear layer."""
    network = fresh_convnet(10, 1, 8, seed=3)
    layers: list[nn.Module] = []
    for depth in range(3):
        norm = nn.GroupNorm(8, 8)
        padding = 3 if side == 28 and depth == 0 else 1
        layers += [nn.Conv2d(8 if depth else 1, 8, 3, padding=padding), norm, nn.ReLU(), nn.AvgPool2d(2)]
    naive = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 10))
    naive.load_state_dict(dict(zip(naive.state_dict(), network.state_dict().values(), strict=True)))
    images = torch.randn(4, 1, side, side)
    torch.testing.assert_close(network(images), naive(images), rtol=1e-5, atol=1e-5)


def test_convnet_is_a_classifier_like_any_other_at_any_size(tmp_path: Path) -> None:
    recipe = ClassifierConfig(network="convnet3", width=8)
    network = new_classifier(5, 3, recipe, seed=1)
    assert isinstance(network, ConvNet3) and network.width == 8
    other = new_classifier(5, 3, recipe, seed=2)
    assert not torch.equal(flat_weights(network), flat_weights(other))  # type: ignore[arg-type]
    save_classifier(tmp_path / "weights.safetensors", network)
    loaded = load_classifier(tmp_path / "weights.safetensors", CPU)
    for side in (8, 16, 28, 33, 64):
        images = torch.randn(2, 3, side, side)
        torch.testing.assert_close(loaded(images), network(images))
        assert network.features(images).shape == (2, 128)
        # No image sees another one.
        torch.testing.assert_close(network(images[:1]), network(images)[:1], rtol=1e-4, atol=1e-5)


def test_convnet_travels_as_onnx(tmp_path: Path) -> None:
    save_classifier(tmp_path / "weights.safetensors", fresh_convnet(3, 1, 4, seed=0))
    names = ("dark", "grey", "bright")
    assert export_student(tmp_path / "weights.safetensors", tmp_path / "x.onnx", names, 28) < 1e-4


def test_data_free_distillation_of_a_convnet_cannot_match_batch_norms() -> None:
    with pytest.raises(ConfigError, match=r"without batch norm.*classifier.network=convnet3"):
        tiny_config(students={"free": {"kind": "data_free"}}, classifier={"network": "convnet3"})


# --- augmentation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
def test_augmentation_is_siamese(operation: str) -> None:
    """The same numbers do the same to whatever batch they are applied to."""
    random = torch.Generator().manual_seed(0)
    real, distilled = torch.randn(5, 3, 12, 12), torch.randn(2, 3, 12, 12)
    augment = Augmentation(operation, torch.rand(1, 3, generator=random))
    together = augment(torch.cat([real, distilled]))
    torch.testing.assert_close(together, torch.cat([augment(real), augment(distilled)]))
    each = Augmentation(operation, augment.numbers.expand(5, 3))
    torch.testing.assert_close(each(real), augment(real))
    assert not torch.equal(augment(real), real) or operation == "flip"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_flow_back_into_the_pixels(operation: str) -> None:
    images = torch.randn(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    numbers = torch.tensor([[0.3, 0.6, 0.8]], dtype=torch.float64)
    assert torch.autograd.gradcheck(Augmentation(operation, numbers), (images,))


def test_operations_by_hand() -> None:
    image = torch.arange(64.0).view(1, 1, 8, 8) + 1

    def done(operation: str, *numbers: float) -> Tensor:
        return Augmentation(operation, torch.tensor([numbers]))(image)

    assert torch.equal(done("flip", 0.4, 0, 0), image.flip(3))
    assert torch.equal(done("flip", 0.6, 0, 0), image)
    same = (1 - 1 / 1.2) / (1.2 - 1 / 1.2)
    torch.testing.assert_close(done("scale", same, same, 0), image)
    torch.testing.assert_close(done("rotate", 0.5, 0, 0), image)
    torch.testing.assert_close(done("color", 0.5, 0.5, 0.5), image)
    torch.testing.assert_close(done("color", 0.75, 0.5, 0.5), image + 0.25)
    contrast = done("color", 0.5, 0.5, 0.0)
    torch.testing.assert_close(contrast, (image - image.mean()) * 0.5 + image.mean())
    # An eighth of 8 pixels: shifts of -1, 0, 1.
    shifts = {n: int(n * 3) - 1 for n in (0.1, 0.5, 0.9)}
    for (a, down), (b, right) in itertools.product(shifts.items(), repeat=2):
        wanted = torch.zeros(8, 8)
        for row, column in itertools.product(range(8), repeat=2):
            if 0 <= row + down < 8 and 0 <= column + right < 8:
                wanted[row, column] = image[0, 0, row + down, column + right]
        assert torch.equal(done("crop", a, b, 0)[0, 0], wanted)
    # A square of 4 pixels about every place in the image, at the border cut off.
    sizes = {int((done("cutout", row / 9 + 0.01, 0.5, 0) == 0).sum()) // 4 for row in range(9)}
    assert sizes == {2, 3, 4}


def test_flips_are_left_out_where_the_run_leaves_them_out() -> None:
    assert set(operations(True)) - set(operations(False)) == {"flip"}
    random = torch.Generator().manual_seed(0)
    drawn = {draw(operations(False), random).operation for _ in range(200)}
    assert drawn == {"color", "crop", "cutout", "scale", "rotate"}
    assert draw((), random).operation == ""


# --- distribution matching ----------------------------------------------------------------------------------


def test_the_distribution_distance_is_that_of_mean_features() -> None:
    random = np.random.default_rng(0)
    real, distilled = random.normal(size=(2, 7, 5)), random.normal(size=(2, 3, 5))
    naive = 0.0
    for a, b in zip(real, distilled, strict=True):
        for k in range(5):
            naive += (sum(row[k] for row in a) / 7 - sum(row[k] for row in b) / 3) ** 2
    found = distribution_distance(list(torch.tensor(real)), list(torch.tensor(distilled)))
    assert float(found) == pytest.approx(naive, rel=1e-12)


def of_all_real(kind: type[Matching], names: tuple[str, ...]) -> Matching:
    """Distilled images that are the real ones, all of which are in every batch."""
    given = setting(names, count=12, images_per_class=4, real_batch=4)
    real = given.real
    position = torch.cat(list(real.by_class))
    labels = torch.arange(3).repeat_interleave(4)
    return kind(given, Initial(real.at(position), labels, position))


@pytest.mark.parametrize("names", [(), operations(True)])
@pytest.mark.parametrize("kind", [DistributionMatching, GradientMatching])
def test_nothing_is_left_to_match_where_the_distilled_images_are_the_real_ones(
    kind: type[Matching], names: tuple[str, ...]
) -> None:
    """Also under augmentation, which therefore must be the same on both sides."""
    same, other = of_all_real(kind, names), of_all_real(kind, names)
    with torch.no_grad():
        other.images.add_(torch.randn(other.images.shape, generator=torch.Generator().manual_seed(1)))
    assert same.step(0) < 1e-3 * other.step(0)


def test_the_images_move_along_the_gradient_of_the_distance() -> None:
    """One step without momentum against finite differences of the same iteration's loss."""
    keys: dict[str, Any] = {"image_learning_rate": 0.5, "image_momentum": 0.0, "real_batch": 100}
    given = setting(("scale",), **keys)
    first = first_images(given.section, given.real, (), 0)
    matching = DistributionMatching(given, first)
    matching.step(0)
    moved = (first.images - matching.images.detach()) / 0.5
    strongest = moved.abs().flatten().topk(3).indices
    for index in strongest.tolist():
        losses = []
        for sign in (1, -1):
            images = first.images.clone()
            images.view(-1)[index] += sign * 3e-3
            losses.append(DistributionMatching(given, Initial(images, first.labels, first.position)).step(0))
        assert (losses[0] - losses[1]) / 6e-3 == pytest.approx(float(moved.view(-1)[index]), rel=0.05)


# --- gradient matching --------------------------------------------------------------------------------------


def test_the_gradient_distance_is_one_minus_cosine_by_output() -> None:
    network = fresh_convnet(3, 1, 4, seed=0)
    random = torch.Generator().manual_seed(0)
    a, b = (
        [torch.randn(p.shape, generator=random, dtype=torch.float64) for p in network.parameters()]
        for _ in range(2)
    )
    naive = 0.0
    for first, second in zip(a, b, strict=True):
        if first.ndim == 1:
            continue
        for out in range(len(first)):
            x, y = first[out].flatten().tolist(), second[out].flatten().tolist()
            dot = sum(i * j for i, j in zip(x, y, strict=True))
            lengths = math.sqrt(sum(i * i for i in x)), math.sqrt(sum(j * j for j in y))
            naive += 1 - dot / (lengths[0] * lengths[1] + 1e-6)
    assert float(gradient_distance(a, b)) == pytest.approx(naive, rel=1e-12)
    assert float(gradient_distance(a, a)) < 1e-5
    opposite = [-gradient for gradient in a]
    assert float(gradient_distance(a, opposite)) == pytest.approx(2 * (3 * 4 + 3), rel=1e-5)


# --- trajectory matching ------------------------------------------------------------------------------------


def test_the_trajectory_distance_is_0_at_the_target_and_1_where_nothing_moved() -> None:
    start, target = torch.randn(9), torch.randn(9)
    assert float(trajectory_distance(target, start, target)) == 0
    assert float(trajectory_distance(start, start, target)) == 1
    half = torch.lerp(start, target, 0.5)
    assert float(trajectory_distance(half, start, target)) == pytest.approx(0.25, rel=1e-5)


def trajectories(experts: list[Tensor] | None = None, **keys: Any) -> TrajectoryMatching:
    given = setting(objective="mtt", image_learning_rate=10.0, **keys)
    found = experts or [train_expert(given, number) for number in range(2)]
    return TrajectoryMatching(given, first_images(given.section, given.real, (), 0), found)


def test_the_student_takes_plain_steps_from_the_experts_weights() -> None:
    """Against a network that torch's own optimiser trains on the same images: where its end is the target,
    the loss is 0; where the steps' rate is next to nothing, it is 1."""
    start = flat_weights(fresh_convnet(3, 1, 4, seed=5))
    network = fresh_convnet(3, 1, 4, seed=5)
    keys: dict[str, Any] = {"start_epochs": [0, 0], "network_batch": 6, "student_steps": 3}
    matching = trajectories([torch.stack([start, start + 1])], **keys)
    descent = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(3):  # all six images are in every batch, so their order does not matter
        descent.zero_grad()
        functional.cross_entropy(network(matching.images.detach()), matching.labels).backward()
        descent.step()
    end = flat_weights(network)
    there = trajectories([torch.stack([start, end])], **keys)
    assert there.step(0) < 1e-6
    still = trajectories([torch.stack([start, end])], network_learning_rate=1e-9, **keys)
    assert still.step(0) == pytest.approx(1, abs=1e-4)


def test_trajectory_matching_learns_images_rate_and_labels() -> None:
    matching = trajectories(soft_labels=True, rate_learning_rate=1e-3)
    before = matching.images.detach().clone(), matching.rate.item(), matching.targets()
    losses = [matching.step(iteration) for iteration in range(40)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert not torch.equal(matching.images, before[0]) and matching.rate.item() != before[1]
    assert not torch.equal(matching.targets(), before[2])
    torch.testing.assert_close(matching.targets().sum(1), torch.ones(6))
    assert (before[2].argmax(1) == matching.labels).all()


def test_start_epochs_widen() -> None:
    experts = [torch.randn(8, 5)]
    all_at_once = trajectories(experts, start_epochs=[1, 6])
    assert [all_at_once.last_start(k) for k in (0, 39)] == [6, 6]
    slowly = trajectories(experts, start_epochs=[1, 6], start_widening=0.5)
    found = [slowly.last_start(k) for k in range(40)]
    assert found[0] == 1 and found == sorted(found) and found[19] == found[-1] == 6


# --- what the images start as -------------------------------------------------------------------------------


def test_real_images_are_recorded_and_canaries_forced() -> None:
    given = setting()
    canaries = (3, 6, 9, 1, 5)  # 3, 6, 9 are of class 0, 1 of class 1, 5 of class 2
    for share, wanted in ((0.0, 0), (1.0, 4), (0.4, 2)):
        first = first_images(section(initial_canaries=share), given.real, canaries, 0)
        assert torch.equal(first.images, given.real.at(first.position))
        assert torch.equal(splits().train.labels[first.position], first.labels)
        assert len(set(first.position.tolist())) == 6
        forced = set(first.position.tolist()) & set(canaries)
        assert len(forced) >= wanted  # there is room for two of class 0
    again = first_images(section(), given.real, canaries, 0)
    assert torch.equal(again.position, first_images(section(), given.real, (), 0).position)
    assert not torch.equal(again.position, first_images(section(), given.real, (), 1).position)


def test_noise_and_public_images_are_no_private_ones(shared_data: Path) -> None:
    given = setting()
    public = {"name": "breastmnist", "root": str(shared_data), "download": False}
    found = [
        first_images(section(initialisation="noise"), given.real, (), 0),
        first_images(section(initialisation="ood", ood=public), given.real, (), 0),
    ]
    for first in found:
        assert (first.position == -1).all() and first.images.shape == (6, 1, 8, 8)
        assert first.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert abs(float(found[0].images.mean())) < 0.2
    colour = torch.tensor([[[[10]], [[20]], [[60]]]], dtype=torch.uint8)
    assert (
        in_channels(colour, 1).item() == 30 and in_channels(colour[:, :1], 3).flatten().tolist() == [10] * 3
    )


def test_a_class_of_too_few_images_is_refused() -> None:
    given = setting()
    with pytest.raises(DataError, match=r"images_per_class <= 20.*got 21"):
        first_images(section(images_per_class=21), given.real, (), 0)


def test_canaries_of_a_run_are_where_its_training_split_has_them() -> None:
    whole, keys = noise_splits(), audit()
    design = design_audit(whole, keys, seed=1)
    for run in range(4):
        train = design.splits_of_run(whole, run).train
        found = design.canaries_of_run(run)
        members = design.canaries[design.members_of(run)[: len(design.canaries)]]
        assert len(found) == len(members) > 0
        assert torch.equal(train.images[list(found)], whole.train.images[members])


# --- the whole method ---------------------------------------------------------------------------------------


def site(path: Path, canaries: tuple[int, ...] = (), **keys: Any) -> Site:
    given = config(**keys)
    save_splits(path / SPLITS_FILE, splits())
    spec = StudentSpec(given.generator, 1, given.synthesis, 1.0, 0)
    return Site(path=path, config=given, seed=7, student=spec, canaries=canaries)


def parts(place: Site) -> list[Part[Any]]:
    return list(method_of("few", place.config).parts(place, "student_few"))


class Killed(Exception):
    pass


def killed_after(part: Part[Any], folder: Path, saves: int) -> None:
    """Work that dies right after it has saved its state so often."""
    count = itertools.count(1)

    def save(state: dict[str, Any], row: dict[str, float]) -> None:
        save_state(folder / "state.pt", state)
        assert {"share", "images_seen"} <= row.keys()  # without which no run on Ray can tell how far it is
        if next(count) == saves:
            raise Killed

    with pytest.raises(Killed):
        part.work(folder, load_state(folder / "state.pt"), save)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"objective": "dsa", "iterations": 10},
        {"objective": "mtt", "soft_labels": True, "initialisation": "noise"},
    ],
    ids=["dm", "dsa", "mtt"],
)
def test_a_killed_distillation_goes_on_bit_for_bit(tmp_path: Path, keys: dict[str, Any]) -> None:
    whole, broken = site(tmp_path / "whole", **keys), site(tmp_path / "broken", **keys)
    train_here(whole, parts(whole), "data", lambda _: None)
    for part in parts(broken):
        for saves in (1, 6, 3):
            killed_after(part, broken.path / part.name, saves)
        part.work(broken.path / part.name, load_state(broken.path / part.name / "state.pt"), lambda *_: None)
    for name in (f"distilled_few/{SET_FILE}", "student_few/weights.safetensors"):
        assert (whole.path / name).read_bytes() == (broken.path / name).read_bytes()
    assert not (whole.path / "distilled_few" / "experts").exists()  # they know the private images


def test_what_is_left_behind(tmp_path: Path) -> None:
    place = site(tmp_path, canaries=(0, 1, 2), initial_canaries=1.0, images_per_class=5, epochs=60)
    folder = train_here(place, parts(place), "data", lambda _: None)
    found = DistilledSet.load(tmp_path / "distilled_few" / SET_FILE)
    assert found.images.dtype == torch.float32
    assert found.targets.argmax(1).tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert {0, 1, 2} <= set(found.initial.tolist())
    taken = load_taken(folder)
    assert taken is not None and taken.tolist() == sorted(found.initial.tolist())
    images, targets = read_parquet_set(tmp_path / "distilled_few" / PARQUET_FILE, splits())
    assert torch.equal(images, to_bytes(found.images)) and torch.equal(targets, found.targets)
    # Three flat classes are easily told apart.
    answers = load_classifier(folder / "weights.safetensors", CPU)(splits().test.images.float() / 127.5 - 1)
    assert (answers.argmax(1) == splits().test.labels).double().mean() > 0.9


def _in_the_whole(design: AuditDesign, run: int, positions: Tensor) -> list[int]:
    """Positions in a run's training split as indices into the whole set's, one by one."""
    left = [index for index in range(400) if index not in design.samples[~design.members_of(run)]]
    return [left[position] for position in positions.tolist()]


def test_a_run_of_the_audit_forces_its_own_canaries(tmp_path: Path) -> None:
    """The audit's own training of a run, whose models are kept to look at them."""
    whole = noise_splits()
    save_splits(tmp_path / SPLITS_FILE, whole)
    keys = {"arms": ["few"], "models": 4, "keep_models": True, "queries": 1, "canaries": 8}
    few = SMALL | {"images_per_class": 3, "initial_canaries": 0.5, "iterations": 20, "epochs": 2}
    given = tiny_config(students={"few": few}, audit={"worst_case": keys})
    spec = StudentSpec(given.generator, 1, given.synthesis, 1.0, 0)
    design = design_audit(whole, given.audit.worst_case, seed=1)
    plan = AuditPlan(
        run=tmp_path, folder=tmp_path / "audit", config=given, student=spec, design=design, digest="noise"
    )
    plan.train(0, lambda share, what: None)
    found = DistilledSet.load(tmp_path / "audit" / "runs" / "0" / "distilled_few" / SET_FILE)
    assert len(set(found.initial.tolist())) == 12
    there = set(design.canaries_of_run(0))
    assert len(there & set(found.initial.tolist())) >= round(len(there) / 2) > 0
    train = design.splits_of_run(whole, 0).train
    assert torch.equal(train.labels[found.initial], found.targets.argmax(1))  # under their given labels
    scores = plan.scores(0, "few")  # from which the audit reports those that were there apart
    assert scores is not None and scores.taken is not None
    assert scores.taken.sum() == len(set(design.samples) & set(_in_the_whole(design, 0, found.initial)))
    assert scores.taken[: len(design.canaries)].sum() == len(there & set(found.initial.tolist()))


def test_bytes_are_what_is_handed_on(tmp_path: Path) -> None:
    keys = {"store": "uint8", "student_augmentation": "recipe", "initialisation": "noise"}
    place = site(tmp_path, **keys)
    folder = train_here(place, parts(place), "data", lambda _: None)
    found = DistilledSet.load(tmp_path / "distilled_few" / SET_FILE)
    images, _ = read_parquet_set(tmp_path / "distilled_few" / PARQUET_FILE, splits())
    assert torch.equal(found.images, images)
    assert (found.initial == -1).all() and load_taken(folder) is None


def test_copies_of_a_distilled_set(tmp_path: Path) -> None:
    """Private images that hardly moved are near-copies all; fresh noise is nobody's copy."""
    for name, keys, share in (
        ("still", {"image_learning_rate": 1e-9}, 1.0),
        ("noise", {"initialisation": "noise", "image_learning_rate": 1e-9}, 0.0),
    ):
        place = site(tmp_path / name, iterations=1, **keys)
        (made, _) = parts(place)
        folder = place.path / made.name
        made.work(folder, None, lambda *_: None)
        found = measure_distilled_copies(place.path, folder, seed=0)
        assert found is not None and found.near_copy_share == share


def test_units_are_the_datas_mean_and_spread() -> None:
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    units = Units.of(images)
    standardised = units.from_bytes(images)
    torch.testing.assert_close(standardised.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(standardised.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(units.to_signed(standardised), images.float() / 127.5 - 1, atol=1e-5, rtol=0)
    torch.testing.assert_close(units.from_signed(units.to_signed(standardised)), standardised)
    assert torch.equal(to_bytes(units.to_signed(standardised)), images)


def test_a_headline_says_what_it_began_as() -> None:
    found = DistillationResult(
        objective="dm", initialisation="real", images=20, images_per_class=2, iterations=5,
        initial_private=20, moved_rms=0.1234, losses=[1.0], seconds=1.0, cpu_seconds=1.0,
    )  # fmt: skip
    assert found.headline() == "20 images by dm, 20 of them from private ones, moved by 0.12 sd"


def test_the_authors_values_stand_where_none_are_given() -> None:
    plain = DistillationSection()
    assert (plain.steps, plain.image_rate, plain.loops) == (20_000, 1.0, (10, 50))
    assert DistillationSection(images_per_class=100).image_rate == 10
    dsa = DistillationSection(objective="dsa", images_per_class=50)
    assert (dsa.steps, dsa.image_rate, dsa.loops) == (1_000, 0.1, (50, 10))
    assert DistillationSection(images_per_class=1).loops == (1, 1)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"initialisation": "ood"}, "`ood` must be given exactly with initialisation: ood"),
        ({"ood": {"name": "digits"}}, "`ood` must be given exactly with initialisation: ood"),
        ({"initialisation": "noise", "initial_canaries": 0.5}, "canaries are real images"),
        ({"objective": "mtt", "start_epochs": [5, 2]}, "`0 <= first <= last` must hold"),
        ({"soft_labels": True}, "`objective: mtt` must hold with soft_labels"),
        ({"student_augmentation": "recipe"}, "`store: uint8` must hold"),
        ({"network": "resnet14"}, "students.few.network"),
        ({"images_per_class": 0}, "students.few.images_per_class"),
    ],
)
def test_what_does_not_fit_is_refused(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(**keys)
    assert named in str(refused.value)


def test_a_student_that_is_not_there_cannot_be_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, tiny_settings(students={"few": SMALL}))
    assert main(["export", path, "--student", "many"]) == 2
    assert "`--student` must be one of `students` (few), but got 'many'" in capsys.readouterr().err
