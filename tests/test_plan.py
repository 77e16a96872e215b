"""Plans: the work counted from a config, hours from given rates, devices by name."""

from __future__ import annotations

import pytest
from conftest import tiny_config

from kr_ray.classifiers.resnet import ResNet14
from kr_ray.config import Config, ConfigError
from kr_ray.plan.estimate import (
    RAY_S,
    SIDE_BY_SIDE,
    START_S,
    UNIT_S,
    Devices,
    estimate,
    memory_bytes,
    storage_bytes,
    total_s,
    what_if,
)
from kr_ray.plan.speeds import Costs, MeasuredHere, ScaledFromH200, count_costs
from kr_ray.plan.work import DataSize, StageWork, data_size, run_work

SIZE = DataSize(train=160, validation=40, test=40, classes=10, channels=1)
COSTS = Costs(
    training=300.0,
    prediction=100.0,
    generation=400.0,
    gan=1000.0,
    classifier=10,
    generator_trained=50,
    generator_sampled=20,
)


class Constant:
    """One image takes a second, one class's attack two."""

    def training(self, batch: int) -> float:
        return 1.0

    def prediction(self) -> float:
        return 1.0

    def generation(self) -> float:
        return 1.0

    def gan(self) -> float:
        return 1.0

    def attack_s(self, rows: int) -> float:
        return 2.0


def of(config: Config, stage: str) -> StageWork:
    return next(work for work in run_work(config, SIZE) if work.stage == stage)


def paper(**sections: object) -> Config:
    return tiny_config(classifier={"min_steps": 0, "batch_size": 16, "width": 4}, **sections)


def test_seen_labels_cost_a_query_per_image_trained_on() -> None:
    for stage in ("checkpoints", "tuning", "student"):
        clean, seen = (
            of(paper(synthesis={"view": view, "regeneration_rate": 4}), stage) for view in ("clean", "seen")
        )
        assert seen.looked_at - clean.looked_at == clean.trained == seen.trained > 0
    assert of(paper(synthesis={"view": "seen"}), "equal_compute_teacher") == of(
        paper(), "equal_compute_teacher"
    )


def test_pools_are_drawn_once_by_the_sweep_unless_trials_draw_otherwise() -> None:
    """Two checkpoints, four trials; every student asks the teacher about the whole pool."""

    def searched(name: str, **synthesis: object) -> Config:
        config = paper(synthesis=synthesis | {"batch_size": 16})
        return config.model_copy(
            update={"tuning": config.tuning.model_copy(update={"space": {name: (1, 2)}})}
        )

    shared = searched("regeneration_rate", pool_scale=3)
    own = searched("latent_std", pool_scale=3)
    pool = 3 * 160 + 2 * 16  # two standing batches
    stages = ("checkpoints", "tuning", "student")
    assert [of(shared, stage).generated for stage in stages] == [2 * pool, 0, 0]
    assert [of(own, stage).generated for stage in stages] == [2 * pool, 4 * pool, 0]
    streamed = searched("regeneration_rate")
    asked = [of(shared, stage).looked_at - of(streamed, stage).looked_at for stage in stages]
    assert asked == [2 * 480, 4 * 480, 480]
    assert of(shared, "equal_compute_teacher") == of(streamed, "equal_compute_teacher")
    stored = [storage_bytes(config, SIZE, COSTS) for config in (shared, streamed)]
    assert stored[0] - stored[1] == 2 * 3 * 160 * 16 * 16


def test_confirming_trains_the_finalists_and_the_defaults_for_every_seed() -> None:
    plain, confirmed = (of(paper(tuning={"confirm": seeds, "finalists": 2}), "tuning") for seeds in (0, 3))
    assert confirmed.units - plain.units == 9
    one = of(paper(tuning={"trials": 1, "rungs": 1}), "tuning").trained
    assert confirmed.trained - plain.trained == 9 * one


def test_an_exhaustive_sweep_is_a_student_per_checkpoint() -> None:
    config = paper(
        generator={"epochs": 12, "checkpoint_every": 3},
        checkpoints={"epochs": 10},
        synthesis={"regeneration_rate": 4},
    )
    work = of(config, "checkpoints")
    assert (work.units, work.rounds, work.batch) == (4, ((4, 10.0),), 16)
    assert work.trained == 4 * 10 * 160
    standing = config.synthesis.sampling.standing_batches * config.synthesis.batch_size
    assert work.generated == 4 * (3 * 160 + standing)


def test_halving_and_hyperband_do_what_they_leave() -> None:
    keys = {"generator": {"epochs": 27, "checkpoint_every": 1}}
    work = of(paper(checkpoints={"epochs": 9, "search": "halving"}, **keys), "checkpoints")
    assert work.units == 27 + 6
    assert work.trained == 160 * (27 * 1 + 6 * 9)
    config = paper(tuning={"trials": 17, "epochs": 9, "rungs": 9, "reduction_factor": 3})
    # Li et al. 2018: 9 -> 3 -> 1 at 1, 3, 9; 5 -> 1 at 3, 9; 3 at 9 units.
    units = (9 * 1 + 3 * 2 + 1 * 6) + (5 * 3 + 1 * 6) + 3 * 9
    assert of(config, "tuning").trained == 160 * units
    assert of(paper(tuning={"trials": 17, "epochs": 9, "rungs": 1}), "tuning").trained == 160 * 17 * 9


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("bloodmnist", (11_959, 1712, 3421, 8, 3)),
        ("cifar100", (40_000, 10_000, 10_000, 100, 3)),
        ("fashionmnist", (50_000, 10_000, 10_000, 10, 1)),
    ],
)
def test_published_sizes_need_no_data(name: str, sizes: tuple[int, ...]) -> None:
    """Table 5."""
    data = tiny_config(
        data={"name": name, "image_size": 16, "root": "/nowhere", "max_train_images": 0, "max_test_images": 0}
    ).data
    assert data_size(data) == DataSize(*sizes)


def test_hours_follow_from_work_rates_and_devices() -> None:
    config = tiny_config(cluster={"trial": {"cpu": 1.0}})
    work = [
        StageWork("teacher", "train", trained=100, batch=16, looked_at=20),
        StageWork("checkpoints", "trial", units=5, trained=50, batch=16, generated=10),
        StageWork("audit", "task", units=3, attack_rows=7),
    ]
    teacher, sweep, audit = estimate(work, COSTS, Constant(), config, Devices(2, "A100"))
    assert teacher.flops == 100 * 300 + 20 * 100
    assert (teacher.device_s, teacher.wall_s) == (120, START_S["train"] + 120)
    # Five equal units on two devices take as long as six.
    assert sweep.wall_s == pytest.approx(START_S["trial"] + UNIT_S["trial"] * 5 / 2 + 60 * 6 / 5 / 2)
    assert audit.device_s == 6
    assert total_s([teacher, sweep]) == RAY_S + teacher.wall_s + sweep.wall_s
    packed = tiny_config(cluster={"trial": {"cpu": 1.0, "gpu": 0.25}})
    (shared,) = estimate(work[1:2], COSTS, Constant(), packed, Devices(1, "A100"))
    assert shared.wall_s == pytest.approx(
        START_S["trial"] + UNIT_S["trial"] * 5 / 4 + 60 * 8 / 5
    )  # four share one device's rate


def test_cores_slow_each_other_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Devices, "are_cores", lambda self: True)
    work = [StageWork("shadows", "task", units=4, trained=40, batch=16)]
    (shadows,) = estimate(work, COSTS, Constant(), tiny_config(), Devices(2, "here"))
    assert shadows.wall_s == pytest.approx(START_S["task"] + 2 * UNIT_S["task"] + 40 / 2 / SIDE_BY_SIDE)


def test_rounds_that_wait_leave_slots_empty() -> None:
    """Li et al. 2018, table 1's bracket 9 -> 3 -> 1 with rungs at 1, 3, 9 on
    two devices: 5 x 1 + 2 x 2 + 1 x 6 units of time."""
    work = [StageWork("tuning", "trial", 9, ((9, 1.0), (3, 2.0), (1, 6.0)), trained=21, batch=16)]
    (tuning,) = estimate(work, COSTS, Constant(), tiny_config(), Devices(2, "A100"))
    assert tuning.wall_s == pytest.approx(
        START_S["trial"] + UNIT_S["trial"] * 9 / 2 + 15 * tuning.device_s / 21
    )


def test_devices_by_name() -> None:
    assert Devices.parse("4xrtx6000") == Devices(4, "RTX6000")
    for text in ("4xABC", "H200", "0xH200", "x"):
        with pytest.raises(ConfigError, match="try 4xRTX6000"):
            Devices.parse(text)


def test_costs_are_those_of_the_networks() -> None:
    config = paper()
    costs = count_costs(config, SIZE)
    network = ResNet14(SIZE.classes, SIZE.channels, 4)
    assert costs.classifier == sum(parameter.numel() for parameter in network.parameters())
    assert 2.5 * costs.prediction < costs.training < 3 * costs.prediction
    assert costs.generation > costs.prediction
    rarely = count_costs(paper(generator={"d_steps": 8}), SIZE)
    assert rarely.gan < costs.gan  # fewer G steps per real image
    h200 = ScaledFromH200(989.0, costs, MeasuredHere(config, SIZE))
    half = ScaledFromH200(989.0 / 2, costs, MeasuredHere(config, SIZE))
    assert half.training(256) == pytest.approx(h200.training(256) / 2)
    assert h200.training(16) < h200.training(256)


def test_other_ways_memory_and_storage() -> None:
    config = tiny_config(cluster={"trial": {"cpu": 1.0, "gpu": 0.5}})
    assert set(what_if(config)) == {
        "halving over checkpoints",
        "no pruning (rungs: 1)",
        "one trial per device",
    }
    image = config.data.image_size**2
    assert memory_bytes(config, SIZE, COSTS)["generator"] == 4 * (4 * 50 + 20) + 160 * image
    assert storage_bytes(config, SIZE, COSTS) > 240 * image
