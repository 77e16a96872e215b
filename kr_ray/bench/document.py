"""What `kr bench` leaves: bench.json as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field

from kr_ray.bench.harness import DeviceRates, Figure, Rule, Timing


@dataclass(frozen=True)
class FigureRow:
    """A line of the table: median, least and largest of the rounds; `passed` is None without a target."""

    name: str
    value: float
    low: float
    high: float
    rounds: int
    unit: str
    rule: Rule
    target: float | None
    passed: bool | None

    @classmethod
    def of(cls, figure: Figure) -> FigureRow:
        return cls(
            name=figure.name,
            value=figure.value,
            low=min(figure.values),
            high=max(figure.values),
            rounds=len(figure.values),
            unit=figure.unit,
            rule=figure.rule,
            target=figure.target,
            passed=figure.passed,
        )


@dataclass(frozen=True)
class TimingRow:
    """A timed variant; the shares are of the device's two rates. None: not counted, or no measure of it."""

    name: str
    median_s: float
    low_s: float
    high_s: float
    rounds: int
    images_per_s: float | None
    flops: int | None
    matrix_share: float | None
    copy_share: float | None
    peak_bytes: int | None

    @classmethod
    def of(cls, timing: Timing, rates: DeviceRates) -> TimingRow:
        seconds = timing.median_s
        return cls(
            name=timing.name,
            median_s=seconds,
            low_s=min(timing.seconds),
            high_s=max(timing.seconds),
            rounds=len(timing.seconds),
            images_per_s=timing.images / seconds if timing.images else None,
            flops=timing.flops or None,
            matrix_share=timing.flops / seconds / rates.matrix_flops if timing.flops else None,
            copy_share=timing.bytes_moved / seconds / rates.copy_bytes if timing.bytes_moved else None,
            peak_bytes=timing.peak_bytes,
        )


@dataclass(frozen=True)
class SuiteFound:
    """What a suite found; `skipped` says why it was not run, or failed."""

    seconds: float
    skipped: str | None
    figures: list[FigureRow]
    timings: list[TimingRow]
    notes: list[str]


@dataclass(frozen=True)
class Environment:
    """Where the figures come from."""

    processor: str
    cores: int | None
    amx: bool
    device: str
    threads: int
    mixed_precision: str
    python: str
    system: str
    versions: dict[str, str]


@dataclass(frozen=True)
class RateRow:
    """The yardsticks of the device (see `DeviceRates`)."""

    dtype: str
    matrix_flops_per_s: float
    copy_bytes_per_s: float


@dataclass
class Document:
    """All of it; `dataclasses.asdict` gives bench.json."""

    date: str
    """ISO 8601."""
    seconds: float
    rounds: int
    """Of every comparison."""
    environment: Environment
    rates: RateRow
    suites: dict[str, SuiteFound] = field(default_factory=dict)
