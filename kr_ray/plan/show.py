"""The plan as a person reads it."""

from __future__ import annotations

import torch

from kr_ray.config import Config
from kr_ray.display import Grid, plain_console
from kr_ray.plan.estimate import (
    PEAK_TFLOPS,
    Devices,
    StageEstimate,
    estimate,
    memory_bytes,
    storage_bytes,
    total_s,
    what_if,
)
from kr_ray.plan.speeds import MeasuredHere, Rates, ScaledFromH200, count_costs
from kr_ray.plan.work import data_size, run_work
from kr_ray.runs.artifacts import RunDirectory
from kr_ray.runs.storage import storage_path


def print_plan(config: Config, devices_text: str) -> None:
    """Work, rates and estimates of `config` on such devices, beside what a finished run of that name took.

    Raises:
        ConfigError: unknown devices.
        DataError: a set whose size is not published cannot be read.
    """
    devices = Devices.parse(devices_text)
    size = data_size(config.data)
    torch.set_num_threads(1)
    costs = count_costs(config, size)
    here = MeasuredHere(config, size)
    rates: Rates = here if devices.kind == "here" else ScaledFromH200(PEAK_TFLOPS[devices.kind], costs, here)
    work = run_work(config, size)
    stages = estimate(work, costs, rates, config, devices)
    measured = {
        stage.stage: seconds for stage in stages if (seconds := _measured_s(config, stage.stage)) is not None
    }
    console = plain_console()
    _table(config, devices, stages, measured).print(console)
    for name, count in memory_bytes(config, size, costs).items():
        console.print(f"memory of the {name}'s device: at least {_size(count)}, activations apart")
    console.print(f"storage of the run: about {_size(storage_bytes(config, size, costs))}")
    for name, changed in what_if(config).items():
        other = total_s(estimate(run_work(changed, size), costs, rates, changed, devices))
        console.print(f"with {name}: {_hours(other)} instead of {_hours(total_s(stages))}")
    console.print(_origin(devices), soft_wrap=True)


def _table(config: Config, devices: Devices, stages: list[StageEstimate], measured: dict[str, float]) -> Grid:
    headings = ["stage", "TFLOP", "device", "estimated", *(["measured"] if measured else [])]
    table = Grid(f"{config.name} on {devices.count} x {_kind(devices)}", headings)
    for stage in stages:
        row = [stage.stage, f"{stage.flops / 1e12:,.1f}", _hours(stage.device_s), _hours(stage.wall_s)]
        table.add(*row, *([_beside(measured.get(stage.stage), stage.wall_s)] if measured else []))
    total = [
        "all",
        f"{sum(stage.flops for stage in stages) / 1e12:,.1f}",
        _hours(sum(stage.device_s for stage in stages)),
    ]
    sums = _beside(
        sum(measured.values()) or None, sum(stage.wall_s for stage in stages if stage.stage in measured)
    )
    table.add(*total, _hours(total_s(stages)), *([sums] if measured else []))
    return table


def _beside(measured_s: float | None, estimated_s: float) -> str:
    return "" if measured_s is None else f"{_hours(measured_s)} ({estimated_s / measured_s - 1:+.0%})"


def _measured_s(config: Config, stage: str) -> float | None:
    found = RunDirectory(storage_path(config.storage) / config.name).latest(stage)
    return found.get("wall_s") if found else None


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _kind(devices: Devices) -> str:
    if devices.kind != "here":
        return devices.kind
    return "core" if devices.are_cores() else torch.cuda.get_device_name()


def _origin(devices: Devices) -> str:
    if devices.kind == "here":
        return "Rates measured just now on this machine, one thread a process; keep it idle meanwhile."
    return (
        "Rates scaled from kr bench on an H200 by the vendors' peak rates, attack models "
        f"measured on this machine's CPU; {'never' if devices.kind != 'H200' else 'not'} "
        f"checked against a whole run on a {devices.kind}."
    )


def _hours(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
