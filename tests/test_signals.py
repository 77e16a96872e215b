"""Ctrl-C, SIGTERM and a terminal that hangs up, at every moment of a run: 130, one sentence, a status that
says so, nothing left.

Each moment is waited for on status.json and the stages' progress. The same command then goes on: one run
bears all the blows.
"""

from __future__ import annotations

from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM

import pytest
from conftest import tiny_settings
from nodes import config_file
from signals import Blow, Driver, in_stage, ray_starts

from kr_ray.runs.artifacts import run_status

ONCE = [
    Blow([SIGINT]), Blow([SIGINT], to_group=True), Blow([SIGTERM]), Blow([SIGHUP]),
    Blow([SIGHUP], to_group=True),
    Blow([SIGTERM], to_group=True),
]  # fmt: skip
TWICE = [
    Blow([SIGINT, SIGINT]),
    Blow([SIGINT, SIGINT], to_group=True),
    Blow([SIGTERM, SIGTERM]),
    Blow([SIGHUP, SIGINT]),
]
BLOWS = [*ONCE, *TWICE]

SETTINGS = tiny_settings(
    teacher={"epochs": 60},
    generator={"epochs": 8, "checkpoint_every": 2},
    checkpoints={"epochs": 40},
    tuning={"trials": 4, "epochs": 40},
    student={"epochs": 60},
    audit={"shadow": {"models": 3, "epochs": 60}},
)
"""Stages of some seconds, so that a moment can be met."""

MOMENTS = {
    "the run is opened": lambda driver: (driver.run / "config.yaml").exists(),
    "data": in_stage("data"),
    "Ray's first process starts": ray_starts("gcs_server"),
    "Ray's raylet starts": ray_starts("raylet/raylet"),
    "teacher begins": in_stage("teacher"),
    "teacher's worker starts": lambda driver: in_stage("teacher")(driver) and driver.named("TrainController"),
    "teacher trains": in_stage("teacher", 0.3),
    "generator begins": in_stage("generator"),
    "generator trains": in_stage("generator", 0.3),
    "sweep begins": in_stage("checkpoints"),
    "sweep trains": in_stage("checkpoints", 0.3),
    "tuning begins": in_stage("tuning"),
    "tuning trains": in_stage("tuning", 0.3),
    "student trains": in_stage("student", 0.3),
    "copies": in_stage("copies"),
    "shadow models train": in_stage("shadows"),
    "attack": in_stage("audit"),
    "report": in_stage("report"),
}
"""What has just happened when the signal comes."""


def strike_at(moment: str, blow: Blow, config: str) -> bool:
    """Start `kr run`, hit it at the moment, and look at what it leaves; False if the moment passed too
    quickly to be met."""
    run = Path(config).parent / "runs" / SETTINGS["name"]
    driver = Driver(["run", config], run)
    try:
        if not driver.wait_for(MOMENTS[moment]):
            return False
        driver.strike(blow)
        # Before its first heartbeat a run has no status of its own to change.
        if driver.status().get("pid") == driver.process.pid:
            assert run_status(run).state == "interrupted" and run_status(run).error == ""
    finally:
        driver.end()
    return True


@pytest.mark.slow  # the ten seconds are promised on a machine that nothing else keeps busy
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("moment", "blow"),
    [
        ("Ray's first process starts", Blow([SIGTERM])),
        ("teacher trains", Blow([SIGINT, SIGINT], to_group=True)),
        ("teacher begins", Blow([SIGHUP])),
    ],
)
def test_a_signal_at_a_delicate_moment_ends_the_run_as_promised(
    tmp_path: Path, moment: str, blow: Blow
) -> None:
    config = config_file(tmp_path, SETTINGS)
    assert strike_at(moment, blow, config)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("first", range(len(BLOWS)))
def test_signals_at_every_moment_end_the_run_as_promised_and_the_same_command_goes_on(
    tmp_path: Path, first: int
) -> None:
    """Each repetition gives every moment another kind of blow."""
    config = config_file(tmp_path, SETTINGS)
    met = [
        moment
        for index, moment in enumerate(MOMENTS)
        if strike_at(moment, BLOWS[(first + index) % len(BLOWS)], config)
    ]
    print("met:", ", ".join(met))
    assert len(met) >= 12, met
    driver = Driver(["run", config], Path(config).parent / "runs" / SETTINGS["name"])
    output, _ = driver.process.communicate(timeout=600)
    assert driver.process.returncode == 0, output
    assert run_status(driver.run).state == "finished"
