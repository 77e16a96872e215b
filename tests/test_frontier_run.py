"""`kr frontier` as a person runs it: killed half-way, looked at as a part, finished, with a method more that
is tuned and does not keep what it promises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, tiny_settings
from test_pipeline import kr, write_config
from test_worst_case_run import score_files

from kr_ray.cli import main
from kr_ray.cluster.matching import main_key_settings
from kr_ray.cluster.worst_case import whole_pairs
from kr_ray.config import ConfigError, MainKey
from kr_ray.config.file import with_overrides
from kr_ray.frontier import frontier_settings
from kr_ray.report.schema import Report, validate_report
from kr_ray.runs.artifacts import read_json
from kr_ray.runs.figures import Frontier, FrontierRow

PLUGINS = Path(__file__).parent / "plugins"
SETTINGS: dict[str, Any] = {
    "data": {"max_train_images": 400},
    "classifier": {"width": 32, "min_steps": 4},
    "teacher": {"epochs": 1},
    "plugins": ["nearest_mean", "least_squares"],
    "students": {"means": {"kind": "nearest_mean"}},
    "audit": {"worst_case": {"models": 4, "queries": 1, "max_canary_share": 0.25}},
}
"""100 canaries in 4 runs: 200 pairs of either kind, enough for 1 % FPR."""


def report_in(run: Path) -> tuple[Report, Frontier, dict[str, FrontierRow]]:
    report = validate_report(read_json(run / "report" / "report.json"))
    assert report.frontier is not None
    return report, report.frontier, {row.name: row for row in report.frontier.rows}


def kill_after(config: str, run: Path, scores: int, *arguments: str) -> dict[str, tuple[int, int]]:
    """Kill -9 the driver as soon as so many score files are there; those that are."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "kr_ray.cli", "frontier", config, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while len(score_files(run)) < scores:
            assert driver.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    return score_files(run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_looked_at_finished_extended_and_a_broken_promise_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{PLUGINS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    config, run = write_config(tmp_path, tiny_settings(**SETTINGS)), tmp_path / "runs" / "tiny"

    before = kill_after(config, run, 3, "--methods", "teacher,means")
    assert 3 <= len(before) < 8
    part = kr("frontier", config, "--methods", "teacher,means", "--so-far").stdout
    _, found, rows = report_in(run)
    assert found.partial and sum(len(row.missing) for row in rows.values()) == 8 - len(score_files(run))
    assert "Partial." in (run / "report" / "report.html").read_text() and " runs (" in part

    whole = kr("frontier", config, "--methods", "teacher,means").stdout
    assert "worst-case audit: 4 runs of teacher, means take about" in whole
    after = score_files(run)
    assert {name: after[name] for name in before} == before and len(after) == 8
    report, found, rows = report_in(run)
    assert not found.partial and found.false_positive_rate == 0.01 and not found.recommended
    assert all(row.leak and row.leak.pairs == 200 and row.accuracy for row in rows.values())
    assert report.audit and set(report.audit.lira) == {"teacher", "means"}
    assert {path.name for path in (run / "report").glob("frontier.*")} == {"frontier.svg", "frontier.png"}

    more = ["--methods", "teacher,means,least_squares", "--match-accuracy", "means", "--leak-limit", "0.9"]
    told = kr("frontier", config, *more).stdout
    added = score_files(run)
    assert {name: added[name] for name in after} == after
    assert set(added) - set(after) == {f"worst_case/runs/{k}/scores_least_squares.npz" for k in range(4)}
    report, found, rows = report_in(run)
    broken, means = rows["least_squares"], rows["means"]
    assert broken.matched and broken.matched.key == "ridge" and len(broken.matched.tried) >= 2
    assert means.unmatched and rows["teacher"].unmatched
    if broken.matched.reached:
        assert abs(broken.matched.accuracy - broken.matched.target) <= broken.matched.error
    assert broken.leak and broken.leak.epsilon and broken.leak.epsilon > 0.1
    assert "one of the two is wrong" in broken.alarm and "one of the two is wrong" in told
    assert found.recommended != "least_squares" and "report: " in told
    assert report.config["students"]["least_squares"]["ridge"] == broken.matched.value

    quick = kr("frontier", config, *more).stdout
    assert "frontier: done (finished before)" in quick and score_files(run) == added
    kr("report", config)  # the file knows neither the method nor its tuned key: the frontier does
    assert report_in(run)[1] == found
    kept = {path.name for path in (run / "matching" / "least_squares").iterdir()}
    assert kept == {"tried.json"}  # no real image and no model stays


# --- no Ray -------------------------------------------------------------------------------------------------


def test_methods_are_arms_students_or_kinds_whose_defaults_do() -> None:
    base = tiny_config(students={"mine": {"kind": "dp_sgd", "noise_multiplier": 1.0}})
    assert frontier_settings(base)[-1] == "frontier.methods=[teacher, kr, mine]"
    asked = with_overrides(base, ["frontier.methods=[teacher, mine, knowledge_recycling]"])
    settings = frontier_settings(asked)
    assert settings[0] == "students.knowledge_recycling.kind=knowledge_recycling"
    made = with_overrides(asked, settings)
    assert made.audit.worst_case.arms == ("teacher", "mine", "knowledge_recycling")
    assert frontier_settings(made)[0].startswith("audit.")  # nothing more to add
    with pytest.raises(ConfigError, match=r"`--methods` must be among .*dp_sgd.*but got alchemy"):
        frontier_settings(with_overrides(base, ["frontier.methods=[alchemy]"]))
    with pytest.raises(ConfigError, match="`--match-accuracy` must be a number or one of the methods"):
        frontier_settings(with_overrides(base, ["frontier.match_method=other"]))


def test_a_kind_without_usable_defaults_is_refused_with_what_it_lacks() -> None:
    base = with_overrides(tiny_config(), ["frontier.methods=[dp_sgd]"])
    with pytest.raises(ConfigError, match=r"students\.dp_sgd: exactly one of `noise_multiplier`"):
        with_overrides(base, frontier_settings(base))


def test_overriding_nothing_changes_nothing() -> None:
    config = tiny_config(students={"mine": {"kind": "dp_sgd", "target_epsilon": 3.0}})
    assert with_overrides(config, []) == config
    tuned = with_overrides(
        config, ["students.mine.noise_multiplier=0.5", "students.mine.target_epsilon=null"]
    )
    assert tuned.students["mine"].model_dump()["noise_multiplier"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "teacher,alchemy"), "alchemy"),
        (("--methods", "teacher,teacher"), "must be different"),
        (("--models", "5"), "even"),
        (("--budget", "0"), "--budget > 0"),
        (("--leak-limit", "2"), "leak_limit"),
        (("--match-accuracy", "95"), "match_accuracy"),
        (("--match-accuracy", "dp"), "--match-accuracy"),
        (("--methods", "dp_sgd"), "exactly one of"),
    ],
)
def test_wrong_input_is_refused_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    config = write_config(tmp_path, tiny_settings())
    assert main(["frontier", config, *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_whole_key_is_set_to_a_whole_number() -> None:
    key = MainKey(name="expected_batch_size", low=1, high=100, rising=True, whole=True, excludes=("delta",))
    settings = main_key_settings("mine", key, 7.0)
    assert settings == ["students.mine.expected_batch_size=7", "students.mine.delta=null"]
    config = tiny_config(students={"mine": {"kind": "dp_sgd", "target_epsilon": 3.0}})
    assert with_overrides(config, settings).students["mine"].model_dump()["expected_batch_size"] == 7


def test_whole_pairs_before_the_first_missing_run_are_attacked() -> None:
    assert whole_pairs([], 16) == 16
    assert whole_pairs([15], 16) == 14 and whole_pairs([8, 12], 16) == 8 and whole_pairs([9], 16) == 8
    assert whole_pairs([3], 16) == 0 and whole_pairs([0], 16) == 0
