"""Hours per stage from work and rates, what changes would save, memory and storage."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from kr_ray.config import Config, ConfigError, Resources
from kr_ray.config.privacy import selects
from kr_ray.plan.speeds import Costs, Rates
from kr_ray.plan.work import DataSize, StageWork

PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX6000Ada": 364.0,
    "RTX6000": 130.5,
    "V100": 125.0,
    "L4": 121.0,
    "T4": 65.0,
}
"""Dense half-precision tensor rates of the vendors' data sheets (SXM where there
are two); RTX6000 is the Turing card of the paper."""
MOST_DEVICES = 100_000
SIDE_BY_SIDE = 0.9
"""What a core gives when the others work too (`kr bench`: two students at 1.81 times the rate of one)."""
RAY_S = 4.0
START_S = {"train": 11.0, "trial": 5.0, "task": 1.0}
"""Start-up on two cores, of Ray itself and of a stage on Ray Train, on Ray
Tune, or of plain tasks (`kr bench`: start-up)."""
UNIT_S = {"train": 0.0, "trial": 1.0, "task": 0.2}
"""What each trial or task adds before its first step."""


@dataclass(frozen=True)
class Devices:
    """`count` devices of one kind; `kind` is a key of PEAK_TFLOPS, or
    `here`: this machine's GPUs, or its cores."""

    count: int
    kind: str

    @classmethod
    def parse(cls, text: str) -> Devices:
        """From `4xRTX6000`; `here` is this machine.

        Raises:
            ConfigError: no such device.
        """
        if text == "here":
            import torch

            return cls(torch.cuda.device_count() or os.cpu_count() or 1, "here")
        match = re.fullmatch(r"(\d+)x(\w+)", text)
        names = {name.lower(): name for name in PEAK_TFLOPS}
        if not match or match[2].lower() not in names or not 1 <= int(match[1][:9]) <= MOST_DEVICES:
            raise ConfigError(
                f"`--devices` must be here or NxKIND with N from 1 to {MOST_DEVICES} and KIND one of "
                f"{', '.join(PEAK_TFLOPS)}, but got {text[:60]!r}; try 4xRTX6000"
            )
        return cls(int(match[1]), names[match[2].lower()])

    def are_cores(self) -> bool:
        import torch

        return self.kind == "here" and not torch.cuda.is_available()


@dataclass(frozen=True)
class StageEstimate:
    """Attributes: flops of the stage's networks; device_s, seconds on one device;
    wall_s, on all that it can use, start-up included."""

    stage: str
    flops: float
    device_s: float
    wall_s: float


def estimate(
    work: list[StageWork], costs: Costs, rates: Rates, config: Config, devices: Devices
) -> list[StageEstimate]:
    """One line per stage."""
    return [_estimate(stage, costs, rates, config, devices) for stage in work]


def _estimate(work: StageWork, costs: Costs, rates: Rates, config: Config, devices: Devices) -> StageEstimate:
    flops = (
        work.trained * costs.training
        + work.looked_at * costs.prediction
        + work.generated * costs.generation
        + work.gan_images * costs.gan
    )
    seconds = 0.0
    for images, rate in (
        (work.trained, lambda: rates.training(work.batch)),
        (work.looked_at, rates.prediction),
        (work.generated, rates.generation),
        (work.gan_images, rates.gan),
    ):
        seconds += images / rate() if images else 0.0
    if work.attack_rows:
        seconds += work.units * rates.attack_s(work.attack_rows)
    side_by_side, share = _slots(work, config, devices)
    start = START_S[work.where] + UNIT_S[work.where] * work.units / side_by_side
    wall_s = start + seconds * _idle_factor(work, side_by_side) / (side_by_side * share)
    return StageEstimate(work.stage, flops, seconds, wall_s)


def _idle_factor(work: StageWork, slots: int) -> float:
    """Time over that of slots that are always busy; the last units of every round leave some empty."""
    rounds = work.rounds or ((work.units, 1.0),)
    held = sum(math.ceil(units / slots) * slots * each for units, each in rounds)
    return held / sum(units * each for units, each in rounds)


def _slots(work: StageWork, config: Config, devices: Devices) -> tuple[int, float]:
    """How many units run side by side, and each one's share of a device's rate."""
    cluster = config.cluster
    if work.where == "train":
        return 1, float(min(cluster.workers, devices.count))
    if devices.are_cores():
        slots = min(work.units, max(1, int(devices.count / max(cluster.trial.cpu, 1))))
        return slots, 1.0 if slots == 1 else SIDE_BY_SIDE
    packed = max(1, int(1 / cluster.trial.gpu)) if 0 < cluster.trial.gpu <= 1 else 1
    slots = min(work.units, devices.count * packed)
    return slots, min(1.0, devices.count / slots)  # students that share a device share its rate


def total_s(stages: list[StageEstimate]) -> float:
    return RAY_S + sum(stage.wall_s for stage in stages)


def what_if(config: Config) -> dict[str, Config]:
    """The same run in other ways; what is not among the config's keys now."""
    c = config
    if not selects(c):
        return {}
    other = {
        "halving over checkpoints": _with(c, "checkpoints", search="halving"),
        "exhaustive over checkpoints": _with(c, "checkpoints", search="exhaustive"),
        "no pruning (rungs: 1)": _with(c, "tuning", rungs=1),
        "one trial per device": _with(
            c, "cluster", trial=Resources(cpu=c.cluster.trial.cpu, gpu=math.ceil(c.cluster.trial.gpu))
        ),
    }
    return {name: changed for name, changed in other.items() if changed != c}


def _with(config: Config, section: str, **keys: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=keys)})


def memory_bytes(config: Config, size: DataSize, costs: Costs) -> dict[str, int]:
    """Lower bounds of a device's memory: weights, gradients and optimiser
    states in float32, and the images that lie there.

    Returns:
        Bytes of generator training (weights, gradients, two moments; the average) and of the largest student
        (weights, gradients, momentum; a generator and a teacher; the largest synthetic set).
    """
    classifier, trained, sampled = costs.classifier, costs.generator_trained, costs.generator_sampled
    image = size.channels * config.data.image_size**2
    scale = round(
        max(
            config.synthesis.cardinality_scale, config.tuning.bounds("cardinality_scale", config.synthesis)[1]
        )
    )
    pools = config.synthesis.pool_scale * len(config.synthesis.sampling.parts())
    return {
        "generator": 4 * (4 * trained + sampled) + size.train * image,
        "student": 4 * (3 * classifier + classifier + sampled)
        + (scale + pools) * size.train * (image + 4 * size.classes),
    }


def storage_bytes(config: Config, size: DataSize, costs: Costs) -> int:
    """Of a run's folder: checkpoints, training states, students' states, images."""
    classifier, trained, sampled = costs.classifier, costs.generator_trained, costs.generator_sampled
    c, image = config, size.channels * config.data.image_size**2
    checkpoints = c.generator.epochs // c.generator.checkpoint_every
    students = checkpoints + c.tuning.trials + 3
    images = (size.train + size.validation + size.test) * image
    pools = c.synthesis.pool_scale * len(c.synthesis.sampling.parts())
    images += checkpoints * pools * size.train * image  # until the best checkpoint is known
    return 4 * (checkpoints * sampled + 4 * trained + sampled + 2 * students * classifier) + images
