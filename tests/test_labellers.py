"""Who labels: one teacher, several as one, or a longer one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from test_gan import tiny_images
from torch import Tensor, nn

from kr_ray.classifiers.ensemble import Ensemble
from kr_ray.classifiers.predict import softened
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import Config, ConfigError
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.methods.interface import Site
from kr_ray.methods.knowledge_recycling import KnowledgeRecycling
from kr_ray.methods.labellers import labeller_parts
from kr_ray.plan.work import DataSize, run_work
from kr_ray.runs.results import ClassifierResult
from kr_ray.synthesis.student_set import StudentSpec, compiled_labeller, student_schedule

CPU = torch.device("cpu")


class Says(nn.Module):
    """Answers every image with the same probabilities."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.answer = torch.tensor(probabilities)

    def forward(self, images: Tensor) -> Tensor:
        return self.answer.log().expand(len(images), -1) + 3.0  # whatever the logits' offset


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.0, [0.5, 0.3, 0.2]), (0.5, [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38])],
)
def test_several_answer_with_the_mean_of_their_probabilities(
    temperature: float, expected: list[float]
) -> None:
    """By hand; a temperature of 1/2 squares the mean and divides by the sum."""
    both = Ensemble([Says(0.8, 0.1, 0.1), Says(0.2, 0.5, 0.3)])
    answers = softened(both, torch.zeros(2, 1, 4, 4), temperature)
    torch.testing.assert_close(answers, torch.tensor([expected, expected]))


def test_names_say_who_labels() -> None:
    def names(**keys: object) -> list[str]:
        return tiny_config(synthesis=keys).synthesis.labeller_names()

    assert names() == ["teacher"]
    assert names(labellers=3) == ["teacher", "labeller_1", "labeller_2"]
    assert names(labeller="equal_compute", labellers=2) == ["long_labeller_0", "long_labeller_1"]


def test_labellers_are_made_before_the_tuning_and_not_searched() -> None:
    assert "labellers" not in tiny_config().synthesis.searchable()
    assert tiny_config().synthesis.stamp() == tiny_config(synthesis={"labellers": 1}).synthesis.stamp()
    with pytest.raises(ConfigError, match=r"tuning\.space"):
        tiny_config(tuning={"space": {"labellers": [1, 3]}})


def test_further_labellers_of_a_private_teacher_are_refused() -> None:
    private = {"kind": "dp_sgd", "noise_multiplier": 1.0}
    with pytest.raises(ConfigError, match=r"further labellers are not private, but got labellers=2"):
        tiny_config(teacher=private, synthesis={"labellers": 2})


@pytest.fixture
def site(tmp_path: Path) -> Site:
    train, validation, test = (tiny_images() for _ in range(3))
    save_splits(tmp_path / SPLITS_FILE, Splits("test", ("a", "b"), train, validation, test))
    return at(tmp_path, config())


def config() -> Config:
    keys = {"labeller": "equal_compute", "labellers": 2, "cardinality_scale": 2, "epoch_unit": "synthetic"}
    recipe = {"width": 4, "min_steps": 0, "batch_size": 8}
    return tiny_config(synthesis=keys, classifier=recipe, teacher={"epochs": 2}, student={"epochs": 3})


def at(path: Path, config: Config) -> Site:
    spec = StudentSpec(config.generator, 4, config.synthesis, config.student.epochs, 1)
    return Site(path=path, config=config, seed=5, student=spec)


def trained(site: Site) -> list[ClassifierResult]:
    found = []
    for part in labeller_parts(site, site.config.synthesis):
        made = part.work(site.path / part.name, None, lambda state, row: None)
        assert made is not None
        found.append(made)
    return found


def test_long_labellers_take_the_students_steps_and_label_together(site: Site) -> None:
    first, second = trained(site)
    images = tiny_images()
    schedule = student_schedule(site.config.classifier, site.config.synthesis, 3, len(images))
    assert (first.steps, first.batch_size) == (second.steps, second.batch_size)
    assert (first.steps, first.batch_size) == (schedule.steps, schedule.batch_size)
    assert first.curve != second.curve  # another seed
    together = compiled_labeller(site.path, site.config.synthesis, CPU, 0)
    assert isinstance(together, Ensemble)
    inputs = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(derive_seed("inputs"))) * 2 - 1
    each = [softened(member, inputs, 1.0) for member in together.members]
    torch.testing.assert_close(softened(together, inputs, 1.0), sum(each) / 2)
    assert not any(parameter.requires_grad for parameter in together.parameters())


def test_an_audited_student_brings_its_labellers(tmp_path: Path) -> None:
    names = [part.name for part in KnowledgeRecycling().parts(at(tmp_path, config()))]
    assert names == ["teacher", "long_labeller_0", "long_labeller_1", "generator", "student"]
    plain = KnowledgeRecycling().parts(at(tmp_path, tiny_config()))
    assert [part.name for part in plain] == ["teacher", "generator", "student"]
    further = KnowledgeRecycling({"labellers": 2}).parts(at(tmp_path, tiny_config()), "student_two")
    assert [part.name for part in further] == ["teacher", "labeller_1", "generator", "student_two"]
    assert "labeller_1" in further[-1].after and "labeller_1" not in plain[-1].after


def test_labellers_of_a_teachers_length_are_as_long_and_cost_as_much() -> None:
    size = DataSize(train=160, validation=40, test=40, classes=10, channels=1)
    work = {one.stage: one for one in run_work(tiny_config(synthesis={"labellers": 3}), size)}
    assert work["labeller_2"].trained == work["teacher"].trained
    long = {one.stage: one for one in run_work(tiny_config(synthesis={"labeller": "equal_compute"}), size)}
    assert long["long_labeller_0"].trained == long["student"].trained


def test_labelled_images_are_of_any_number_of_labellers() -> None:
    images = LabelledImages(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    answers = softened(Ensemble([Says(0.5, 0.5)] * 5), images.images.float(), 1.0)
    torch.testing.assert_close(answers, torch.full((3, 2), 0.5))
