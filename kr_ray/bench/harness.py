"""Measuring side by side: variants take turns, the order is flipped each
round, and a ratio is the median of the rounds' ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

FEWEST_ROUNDS = 5
"""Of a default run; a median of fewer says little."""

Rule = Literal["at most", "at least"]


@dataclass(frozen=True)
class Variant:
    """One way of doing a piece of work.

    Attributes:
        run: does the work once, every time the same amount.
        images: that one call handles; 0 where that is no measure of the work.
        bytes_moved: least bytes that one call reads and writes; 0 = not stated.
        counted: whether the matrix products of a call are counted.
        counts: does the same without compiled code, whose products can't be counted; None: `run`.
        warm_ups: calls before the first timed one; a GPU's graph is captured at a function's fourth call.
        times_itself: `run` works in other processes, which are warm or meant to
            be cold, and returns the seconds it took.
    """

    name: str
    run: Callable[[], Any]
    images: int = 0
    bytes_moved: int = 0
    counted: bool = True
    counts: Callable[[], Any] | None = None
    warm_ups: int = 1
    times_itself: bool = False


@dataclass(frozen=True)
class Timing:
    """What the rounds measured of one variant.

    Attributes:
        seconds: one value per round.
        flops: 2 x multiply-adds of the matrix products and convolutions of one call; 0 = not counted.
        peak_bytes: most device memory allocated during a call; None on a CPU.
    """

    name: str
    seconds: tuple[float, ...]
    images: int = 0
    bytes_moved: int = 0
    flops: int = 0
    peak_bytes: int | None = None

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Figure:
    """One line of the table: a value per round and, where there is one, the target it is held against."""

    name: str
    values: tuple[float, ...]
    unit: str
    rule: Rule = "at most"
    target: float | None = None

    @property
    def value(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.values)

    @property
    def passed(self) -> bool | None:
        """None without a target."""
        if self.target is None:
            return None
        return self.value <= self.target if self.rule == "at most" else self.value >= self.target


class Meter:
    """Times calls on a device; on CUDA by events, with the device idle before and after."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock

    def time(self, run: Callable[[], object]) -> tuple[float, int | None]:
        """Seconds of one call and, on CUDA, its peak of allocated memory in bytes."""
        if self.device.type != "cuda":
            started = self.clock()
            run()
            return self.clock() - started, None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        torch.cuda.synchronize(self.device)
        return first.elapsed_time(last) / 1e3, torch.cuda.max_memory_allocated(self.device)

    def count(self, run: Callable[[], object]) -> int:
        """Floating-point operations of one call's matrix products and
        convolutions, forwards and backwards."""
        with FlopCounterMode(display=False) as counter:
            run()
        return int(counter.get_total_flops())


def measure(variants: Sequence[Variant], rounds: int, meter: Meter) -> dict[str, Timing]:
    """Warm every variant of this process up, then time all of them in
    every round, in turn forwards and backwards."""
    flops = {variant.name: _warm_up(variant, meter) for variant in variants}
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    peaks: dict[str, list[int]] = {variant.name: [] for variant in variants}
    for index in range(rounds):
        for variant in variants if index % 2 == 0 else reversed(variants):
            taken, peak = meter.time(variant.run) if not variant.times_itself else (variant.run(), None)
            seconds[variant.name].append(taken)
            peaks[variant.name] += [] if peak is None else [peak]
    return {
        variant.name: Timing(
            variant.name,
            tuple(seconds[variant.name]),
            variant.images,
            variant.bytes_moved,
            flops[variant.name],
            max(peaks[variant.name], default=None),
        )
        for variant in variants
    }


def _warm_up(variant: Variant, meter: Meter) -> int:
    if variant.times_itself:
        return 0
    flops = meter.count(variant.counts or variant.run) if variant.counted else 0
    for _ in range(variant.warm_ups - (variant.counted and meter.device.type == "cpu")):
        variant.run()
    return flops


def ratio(
    name: str,
    above: Sequence[Timing],
    below: Sequence[Timing],
    rule: Rule = "at most",
    target: float | None = None,
) -> Figure:
    """Round by round, the time of `above` over the time of `below` (sums, where they are several)."""
    pairs = zip(_sums(above), _sums(below), strict=True)
    return Figure(name, tuple(a / b for a, b in pairs), "x", rule, target)


def speed_ratio(name: str, fast: Timing, slow: Timing, target: float | None = None) -> Figure:
    """Round by round, images per second of `fast` over those of `slow`;
    calls may differ in their number of images."""
    pairs = zip(fast.seconds, slow.seconds, strict=True)
    return Figure(
        name,
        tuple(fast.images / own / (slow.images / other) for own, other in pairs),
        "x",
        "at least",
        target,
    )


def absolute(name: str, timing: Timing, rule: Rule = "at most", target: float | None = None) -> Figure:
    """Seconds of one call."""
    return Figure(name, timing.seconds, "s", rule, target)


def throughput(name: str, timing: Timing, target: float | None = None) -> Figure:
    """Images per second."""
    return Figure(
        name, tuple(timing.images / seconds for seconds in timing.seconds), "images/s", "at least", target
    )


def _sums(timings: Sequence[Timing]) -> list[float]:
    return [sum(parts) for parts in zip(*(timing.seconds for timing in timings), strict=True)]


# --- what the device can do ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceRates:
    """The best of a few tries on this device in this process, as the yardstick of the suites.

    Attributes:
        matrix_flops: operations per second of a square matrix product in `dtype`.
        copy_bytes: bytes read plus written per second by a copy within the device's memory.
    """

    dtype: str
    matrix_flops: float
    copy_bytes: float


def device_rates(
    meter: Meter, dtype: torch.dtype, *, matrix_side: int, copied_bytes: int, tries: int = 5
) -> DeviceRates:
    """Measure both rates."""
    left = torch.randn(matrix_side, matrix_side, device=meter.device).to(dtype)
    source = torch.zeros(copied_bytes, dtype=torch.uint8, device=meter.device)
    target = torch.zeros_like(source)
    product = min(meter.time(lambda: left @ left)[0] for _ in range(tries))
    copy = min(meter.time(lambda: target.copy_(source))[0] for _ in range(tries))
    return DeviceRates(
        str(dtype).removeprefix("torch."), 2 * matrix_side**3 / product, 2 * copied_bytes / copy
    )
