"""`kr frontier` as a person runs it: killed half-way, looked at as a part, finished, with a method more that
is tuned and does not keep what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, tiny_config, tiny_settings
from test_pipeline import kr, write_config
from test_worst_case_run import Silent, score_files

from kr_ray.audits.design import design_audit
from kr_ray.audits.runs import AuditPlan
from kr_ray.classifiers.networks import new_classifier, save_classifier
from kr_ray.cli import main
from kr_ray.cluster.matching import Matching, main_key_settings
from kr_ray.cluster.worst_case import missing_runs, whole_pairs
from kr_ray.config import Config, ConfigError, MainKey
from kr_ray.config.file import load_config, with_overrides
from kr_ray.data.datasets import load_splits
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.frontier import frontier_settings, make_frontier
from kr_ray.methods.interface import ClassifierPart, Part, Site
from kr_ray.pipeline import Pipeline
from kr_ray.report.schema import Report, validate_report
from kr_ray.runs.artifacts import read_json
from kr_ray.runs.figures import Frontier, FrontierRow, Matched
from kr_ray.runs.results import ClassifierResult
from kr_ray.runs.stages import WEIGHTS_FILE, Save, State
from kr_ray.synthesis.student_set import StudentSpec

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
        driver.kill()
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

    more = ["--methods", "teacher,means,least_squares", "--leak-limit", "0.9"]
    told = kr("frontier", config, *more).stdout
    added = score_files(run)
    assert {name: added[name] for name in after} == after
    assert set(added) - set(after) == {f"worst_case/runs/{k}/scores_least_squares.npz" for k in range(4)}
    report, found, rows = report_in(run)
    broken = rows["least_squares"]
    assert broken.leak and broken.leak.epsilon and broken.leak.epsilon > 0.1
    assert "one of the two is wrong" in broken.alarm and "one of the two is wrong" in told
    assert found.recommended != "least_squares" and "report: " in told

    quick = kr("frontier", config, *more).stdout
    assert "frontier: done (finished before)" in quick and score_files(run) == added
    kr("report", config)  # the file does not know the method: the frontier does
    assert report_in(run)[1] == found


class Killed(Exception):
    """In the middle of the runs."""


class Here:
    """Ray's work done in this process, run by run; killed after so many runs of the audit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.trained = 10**6, list[str]()
        monkeypatch.syspath_prepend(str(PLUGINS))  # type: ignore[no-untyped-call]
        monkeypatch.setattr(Pipeline, "connect", lambda self: None)
        monkeypatch.setattr(Pipeline, "_train", self.train)
        monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
        none = lambda groups, seed: {k: np.zeros(v.member.shape) for k, v in groups.items()}  # noqa: E731
        monkeypatch.setattr("kr_ray.privacy.attacks.matched_shadow_scores", none)  # the slowest attack
        for module in ("worst_case", "matching"):
            monkeypatch.setattr(f"kr_ray.cluster.{module}.run_tasks", self.run_tasks)

    def train(self, part: Part[Any], folder: Path) -> Any:
        self.trained.append(part.name)
        return part.work(folder, None, lambda state, row: None)

    def run_tasks(self, name: str, function: Callable[..., Any], arguments: Any, *_: Any) -> list[Any]:
        results = []
        for values in arguments:
            self.left -= name == "audit run"
            if self.left < 0:
                raise Killed
            results.append(function(*values))
        return results


@pytest.mark.timeout(600)
def test_the_whole_frontier_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed half-way, seen as a part, finished, with a method more that is tuned and breaks its promise."""
    here = Here(monkeypatch)
    file, run = write_config(tmp_path, tiny_settings(**SETTINGS)), tmp_path / "runs" / "tiny"
    notices: list[str] = []

    class Listens(Silent):
        def notice(self, text: str) -> None:
            notices.append(text)

    def frontier(*asked: str, so_far: bool = False) -> tuple[Report, Frontier, dict[str, FrontierRow]]:
        config = load_config(file, asked)
        settings = [*asked, *frontier_settings(config)]
        with Pipeline(with_overrides(config, settings[len(asked) :]), Listens()) as pipeline:
            make_frontier(pipeline, settings, budget_hours=None, so_far=so_far)
        return report_in(run)

    here.left = 2
    with pytest.raises(Killed):
        frontier("frontier.methods=[teacher, means]")
    before = score_files(run)
    assert len(before) == 4 and here.trained == ["teacher", "student_means"]
    _, found, rows = frontier("frontier.methods=[teacher, means]", so_far=True)
    assert found.partial and all(row.missing == [2, 3] and row.accuracy for row in rows.values())
    assert all(row.leak is None for row in rows.values())  # two runs are no audit

    here.left = 2
    _, found, rows = frontier("frontier.methods=[teacher, means]")
    after = score_files(run)
    assert {name: after[name] for name in before} == before and len(after) == 8 and here.left == 0
    assert here.trained == ["teacher", "student_means"]  # no classifier was trained again
    assert any("worst-case audit: 4 runs of teacher, means take about" in text for text in notices)
    assert not found.partial and found.false_positive_rate == 0.01
    assert all(row.leak and row.leak.pairs == 200 for row in rows.values())

    here.left = 10**6
    more = ("frontier.methods=[teacher, means, least_squares]", "frontier.leak_limit=0.999")
    report, found, rows = frontier(*more)
    added = score_files(run)
    assert {name: added[name] for name in after} == after
    assert set(added) - set(after) == {f"worst_case/runs/{k}/scores_least_squares.npz" for k in range(4)}
    assert here.trained == ["teacher", "student_means", "student_least_squares"]
    broken = rows["least_squares"]
    assert broken.leak and broken.leak.epsilon and broken.leak.epsilon > 1 and broken.leak.share > 0.5
    assert "one of the two is wrong" in broken.alarm and found.recommended != "least_squares"
    assert any("one of the two is wrong" in text for text in notices)
    page = (run / "report" / "report.html").read_text()
    assert "guarantee contradicted" in page and (run / "report" / "frontier.png").stat().st_size > 10_000

    more = (*more, "frontier.match_method=means")
    report, found, rows = frontier(*more)
    tuned, others = rows["least_squares"].matched, score_files(run)
    assert {name: others[name] for name in after} == after  # only the tuned method has new scores
    assert tuned and tuned.target == report.students["means"].val_accuracy and tuned.value > 1e-6
    assert tuned.reached and abs(tuned.accuracy - tuned.target) <= tuned.error
    assert rows["means"].unmatched and rows["teacher"].unmatched
    assert report.config["students"]["least_squares"]["ridge"] == tuned.value
    assert rows["least_squares"].leak and rows["least_squares"].leak.share < broken.leak.share

    added, trained = score_files(run), len(here.trained)
    _, again, _ = frontier(*more)
    assert again == found and score_files(run) == added and len(here.trained) == trained
    with Pipeline(load_config(file), Silent()) as pipeline:  # a file that knows none of it
        pipeline.report()
    assert report_in(run)[1] == found


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


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_overriding_nothing_changes_no_configuration(path: Path) -> None:
    config = load_config(path)
    assert with_overrides(config, []) == config


def test_kinds_say_which_key_trades_accuracy() -> None:
    kinds = {"coreset": {}, "distillation": {}, "data_free": {}, "dp_sgd": {"noise_multiplier": 2.0}}
    config = tiny_config(students={kind: {"kind": kind} | keys for kind, keys in kinds.items()})
    keys = {name: section.main_key() for name, section in config.students.items()}
    assert {name: (key.name, key.start, key.rising) for name, key in keys.items() if key} == {
        "coreset": ("fraction", 0.5, True), "distillation": ("images_per_class", 10, True),
        "data_free": ("rounds", 240, True), "dp_sgd": ("noise_multiplier", 2.0, False),
    }  # fmt: skip
    for name, key in keys.items():
        assert key is not None and 0 < key.low < key.high
        for value in (key.low, key.high):
            with_overrides(config, main_key_settings(name, key, value))


def test_a_private_run_is_not_tuned_by_scores_without_noise() -> None:
    base = load_config(REPOSITORY / "configs" / "fashionmnist_private.yaml")
    assert base.privacy is not None and frontier_settings(base)
    with pytest.raises(ConfigError, match="`--match-accuracy` must be left out of a run with `privacy`"):
        frontier_settings(with_overrides(base, ["frontier.match_accuracy=0.5"]))


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


def test_a_part_is_reported_found_again_and_gone_when_its_inputs_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the data is there: no run, no classifier."""
    monkeypatch.setattr(Pipeline, "connect", lambda self: None)
    file, run = write_config(tmp_path, tiny_settings()), tmp_path / "runs" / "tiny"
    base = load_config(file)
    asked = with_overrides(base, ["frontier.methods=[teacher, knowledge_recycling]"])
    settings = ["frontier.methods=[teacher, knowledge_recycling]", *frontier_settings(asked)]
    with Pipeline(with_overrides(base, settings), Silent()) as pipeline:
        make_frontier(pipeline, settings, budget_hours=None, so_far=True)
    _, found, rows = report_in(run)
    assert found.partial and not found.recommended and set(rows) == {"teacher", "knowledge_recycling"}
    assert all(row.missing == list(range(32)) and row.accuracy is None for row in rows.values())
    with Pipeline(base, Silent()) as pipeline:  # whose file does not know the method that the frontier added
        pipeline.report()
        assert pipeline.config.audit.worst_case.arms == ("teacher", "knowledge_recycling")
    assert report_in(run)[1] == found
    with Pipeline(with_overrides(base, ["teacher.epochs=2"]), Silent()) as pipeline:
        pipeline.report()
    assert validate_report(read_json(run / "report" / "report.json")).frontier is None


class Shares:
    """A method of a shared part, and a part of its own; both leave an untrained classifier."""

    title = note = "shares"
    takes_over = ()

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def parts(self, site: Site, name: str) -> list[ClassifierPart]:
        def train(folder: Path, state: State | None, save: Save) -> ClassifierResult:
            self.calls.append(folder.name)
            save_classifier(folder / WEIGHTS_FILE, new_classifier(10, 1, site.config.classifier, 0))
            return ClassifierResult(
                test_accuracy=0.1, test_loss=0.0, val_accuracy=0.1, confusion=[], steps=0, images_seen=0,
                batch_size=1, learning_rate=0.0, parameters=0, seconds=0.0,
            )  # fmt: skip

        own = Part(name=name, inputs=[name], after=("data", "shared"), result=ClassifierResult, work=train)
        return [Part(name="shared", inputs=["the same"], result=ClassifierResult, work=train), own]


def test_a_part_that_several_methods_share_is_trained_once_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {name: {"kind": "teacher"} for name in ("a", "b", "c")}
    worst = {"arms": ["a", "b"], "models": 4, "queries": 1, "max_canary_share": 0.1}
    config = tiny_config(students=kinds, audit={"worst_case": worst})
    splits, calls = load_splits(config.data), list[str]()
    save_splits(tmp_path / SPLITS_FILE, splits)
    spec = StudentSpec(config.generator, 1, config.synthesis, 1, 0)

    def plan(made: Config) -> AuditPlan:
        design = design_audit(splits, made.audit.worst_case, 0)
        return AuditPlan(
            run=tmp_path, folder=tmp_path, config=made, student=spec, design=design, digest="digits"
        )

    monkeypatch.setattr("kr_ray.audits.runs.method_of", lambda name, config: Shares(calls))
    plan(config).train(0, lambda share, what: None)
    assert calls == ["shared", "student_a", "student_b"]
    plan(config).train(0, lambda share, what: None)
    assert len(calls) == 3 and missing_runs(plan(config)) == {"a": [1, 2, 3], "b": [1, 2, 3]}
    more = with_overrides(config, ["audit.worst_case.arms=[a, b, c]"])
    plan(more).train(0, lambda share, what: None)  # what it builds on was not kept, so that is made again
    assert calls[3:] == ["shared", "student_c"]
    kept = with_overrides(more, ["audit.worst_case.keep_models=true", "audit.worst_case.arms=[a, c]"])
    plan(kept).train(2, lambda share, what: None)
    plan(with_overrides(kept, ["audit.worst_case.arms=[a, b, c]"])).train(2, lambda share, what: None)
    assert calls[5:] == ["shared", "student_a", "student_c", "student_b"]


def test_a_search_trains_real_methods_and_repeats_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(PLUGINS))  # type: ignore[no-untyped-call]
    import least_squares  # type: ignore[import-not-found]

    fitted: list[float] = []
    fit = least_squares.LeastSquares.fit

    def counted(self: Any, site: Site, folder: Path) -> Any:
        fitted.append(self.section.ridge)
        return fit(self, site, folder)

    monkeypatch.setattr(least_squares.LeastSquares, "fit", counted)
    config = tiny_config(
        classifier={"width": 16}, plugins=["least_squares"], students={"mine": {"kind": "least_squares"}}
    )
    splits = load_splits(config.data)
    save_splits(tmp_path / SPLITS_FILE, splits)
    spec = StudentSpec(config.generator, 1, config.synthesis, 1, 0)

    def search(target: float) -> Matched:
        matching = Matching(
            run=tmp_path, folder=tmp_path / "matching", config=config, student=spec, target=target, digest="x"
        )
        key = config.students["mine"].main_key()
        assert key is not None
        return matching.search("mine", key)

    first = search(0.6)
    assert first.reached and abs(first.accuracy - 0.6) <= first.error and first.value > 1e-6
    assert fitted == [one.value for one in first.tried] and first.tried[0].accuracy > 0.65
    assert {path.name for path in (tmp_path / "matching" / "mine").iterdir()} == {"tried.json"}
    assert search(0.6) == first and len(fitted) == len(first.tried)
    second = search(0.5)  # what was tried for another aim is known
    assert len(fitted) < len(first.tried) + len(second.tried)


def test_whole_pairs_before_the_first_missing_run_are_attacked() -> None:
    assert whole_pairs([], 16) == 16
    assert whole_pairs([15], 16) == 14 and whole_pairs([8, 12], 16) == 8 and whole_pairs([9], 16) == 8
    assert whole_pairs([3], 16) == 0 and whole_pairs([0], 16) == 0
