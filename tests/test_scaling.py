"""The scaling curve: which sets its students have, what is summed up, real images among synthetic ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_recipe
from torch import Tensor

from kr_ray.cluster import scaling
from kr_ray.cluster.scaling import measure_scaling, scaled
from kr_ray.config import Config, ConfigError
from kr_ray.data.images import LabelledImages
from kr_ray.report.figures import scaling_figure
from kr_ray.report.schema import Scaling
from kr_ray.runs.figures import ScalingRow
from kr_ray.runs.results import ScalingResult, StudentResult
from kr_ray.synthesis.student_set import StudentSpec, student_schedule
from kr_ray.synthesis.with_real import WithReal


class Counting:
    """A synthetic set of twos, another one every second epoch."""

    def __init__(self, labelled: bool = True) -> None:
        self.sets: dict[int, tuple[Tensor, Tensor]] = {}
        self.columns = 3 if labelled else 0

    def __len__(self) -> int:
        return 4

    def epoch(self, index: int) -> tuple[Tensor, Tensor]:
        made = torch.full((4, 1, 8, 8), 2 + index // 2, dtype=torch.uint8), torch.zeros(4, self.columns)
        return self.sets.setdefault(index // 2, made)

    def figures(self, epoch: int) -> dict[str, float]:
        return {"images_generated": 4.0}

    def take_makers_s(self) -> float:
        return 1.5

    def close(self) -> None:
        self.sets.clear()


REAL = LabelledImages(torch.ones(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([2, 0]))


def test_real_images_stand_before_the_synthetic_ones_of_every_epoch() -> None:
    data = WithReal(Counting(), REAL, num_classes=3, label_smoothing=0.3)
    first, same, later = (data.epoch(index) for index in (0, 1, 2))
    assert len(data) == 6 and first[0].flatten(1)[:, 0].tolist() == [1, 1, 2, 2, 2, 2]
    torch.testing.assert_close(first[1][:2], torch.tensor([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1]]))
    assert first[0] is same[0] and later[0].flatten(1)[:, 0].tolist() == [1, 1, 3, 3, 3, 3]
    assert (data.figures(0), data.take_makers_s()) == ({"images_generated": 4.0}, 1.5)


def test_where_a_labeller_answers_it_answers_the_real_images_too() -> None:
    images, targets = WithReal(Counting(labelled=False), REAL, num_classes=3, label_smoothing=0.3).epoch(0)
    assert len(images) == 6 and targets.shape == (6, 0)


@pytest.mark.parametrize(("unit", "times"), [("real", 1), ("synthetic", 5)])
def test_the_real_images_count_in_the_students_budget(unit: str, times: int) -> None:
    """Four sets of synthetic images and the real ones: the steps of passes of real size, or five times."""
    recipe = tiny_recipe(min_steps=0, batch_size=16)
    synthesis = tiny_config(synthesis={"cardinality_scale": 4, "epoch_unit": unit}).synthesis
    schedule = student_schedule(recipe, synthesis, 10, 160, with_real=True)
    assert schedule.steps_per_epoch == 5 * 160 // 16
    assert schedule.steps == times * 10 * 160 // 16


def test_one_pool_serves_all_sizes_and_a_set_is_drawn_once() -> None:
    pooled = tiny_config(synthesis={"pool_scale": 3}).synthesis
    assert [
        (found.cardinality_scale, found.pool_scale)
        for found in (scaled(pooled, 4, 10), scaled(tiny_config().synthesis, 4, 10))
    ] == [(4, 10), (4, 0)]
    assert scaled(pooled, 4, 10).regeneration_rate > pooled.regeneration_rate


def measured(monkeypatch: pytest.MonkeyPatch, config: Config) -> tuple[list[ScalingRow], list[StudentSpec]]:
    """The curve of students whose accuracy is known, and what they were."""
    specs: list[StudentSpec] = []

    def train(run: Path, folder: Path, spec: StudentSpec, config: Config) -> StudentResult:
        specs.append(spec)
        accuracy = 0.5 + spec.synthesis.cardinality_scale / 100 + 0.1 * spec.with_real
        keys: dict[str, Any] = dict.fromkeys(
            ("steps", "images_seen", "batch_size", "learning_rate", "parameters", "seconds", "test_loss"), 1
        )
        return StudentResult(test_accuracy=accuracy, val_accuracy=0.5, confusion=[], **keys)

    monkeypatch.setattr(scaling, "_trained", train)
    monkeypatch.setattr(scaling, "run_tasks", lambda name, work, tasks, *_: [work(*task) for task in tasks])
    monkeypatch.setattr(scaling, "draw_pools", lambda *_: None)
    spec = StudentSpec(config.generator, 4, config.synthesis, 6, 7)
    return measure_scaling(Path("run"), Path("folder"), spec, config), specs


def test_a_student_of_every_size_and_kind_for_every_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, specs = measured(monkeypatch, tiny_config(scaling={"scales": [1, 4], "seeds": 2}))
    assert [(row.with_real, row.scale, row.seed) for row in rows] == [
        (with_real, scale, seed) for with_real in (False, True) for scale in (1, 4) for seed in (0, 1)
    ]
    assert [round(row.test_accuracy, 2) for row in rows] == [0.51, 0.51, 0.54, 0.54, 0.61, 0.61, 0.64, 0.64]
    assert len({spec.seed for spec in specs}) == 2  # all sizes share them
    assert len({str(spec.stamp()) for spec in specs}) == 8


ROWS = [
    ScalingRow(scale=scale, with_real=real, seed=seed, test_accuracy=accuracy, val_accuracy=0.5, steps=3)
    for scale, real, seed, accuracy in (
        (1, False, 0, 0.6),
        (1, False, 1, 0.8),
        (1, True, 0, 0.9),
        (1, True, 1, 0.9),
        (10, False, 0, 0.7),
        (10, False, 1, 0.8),
        (10, True, 0, 0.95),
        (10, True, 1, 0.95),
    )
]


def test_sizes_are_means_over_seeds() -> None:
    one, ten = Scaling(rows=ROWS).sizes()
    assert (one.scale, ten.scale, one.alone.n) == (1, 10, 2)
    assert one.alone.mean == pytest.approx(0.7) and one.alone.sd == pytest.approx(0.1414214)
    assert ten.with_real.mean == pytest.approx(0.95) and ten.with_real.sd == pytest.approx(0.0)
    assert ScalingResult(rows=ROWS).headline() == "10 x the real images: 0.7500, with the real ones 0.9500"
    single = Scaling(rows=[row for row in ROWS if row.seed == 0]).sizes()[0]
    assert single.alone.sd is None


def test_the_figure_is_drawn_with_and_without_a_teacher() -> None:
    figure = scaling_figure(Scaling(rows=ROWS), None)
    assert figure.startswith("data:image/svg+xml;base64,") and figure == scaling_figure(
        Scaling(rows=ROWS), None
    )


@pytest.mark.parametrize("scales", [[], [4, 1], [0, 1], [1, 1]])
def test_sizes_that_do_not_rise_are_refused(scales: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"scaling"):
        tiny_config(scaling={"scales": scales})
