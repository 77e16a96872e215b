"""One more generator and one more method are one file each: from outside the
package, through a whole run and the worst-case audit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import tiny_settings
from test_pipeline import kr, write_config

from kr_ray.config import ConfigError
from kr_ray.config.file import parse_config
from kr_ray.report.schema import validate_report
from kr_ray.runs.artifacts import read_json

PLUGINS = Path(__file__).parent / "plugins"


@pytest.mark.timeout(600)
def test_a_generator_and_a_method_from_outside_go_through_a_whole_run_and_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{PLUGINS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    raw = tiny_settings(
        plugins=["gaussian_pixels", "nearest_mean"],
        students={"means": {"kind": "nearest_mean", "shrinkage": 0.1}},
        audit={"worst_case": {"arms": ["kr", "means"], "models": 4, "queries": 2}},
    )
    raw["generator"] = {"kind": "gaussian_pixels", "batch_size": 32}
    raw["synthesis"]["sampling"], raw["tuning"]["space"] = {"spread": 0.8}, {"spread": [0.5, 1.5]}
    config, run = write_config(tmp_path, raw), tmp_path / "runs" / "tiny"
    kr("run", config)
    report = read_json(run / "report" / "report.json")
    checked = validate_report(report)
    assert checked.generator is not None and checked.generator.kind == "gaussian_pixels"
    assert [row.epoch for row in checked.checkpoints or []] == [1, 2]
    assert checked.tuning is not None and set(checked.tuning.history[0].params) == {"spread"}
    assert checked.students["means"].test_accuracy > 0.2  # ten classes, an untrained network's features
    assert checked.audit is not None and set(checked.audit.lira) == {"kr", "means"}
    assert checked.audit.lira["means"].title == "Nearest class mean: means"
    page = (run / "report" / "report.html").read_text()
    assert checked.students["means"].title == "Nearest class mean" and checked.students["means"].note
    for shown in (
        "gaussian_pixels",
        "Nearest class mean: means<small>",
        "means and spreads",
        "most_exposed_means.csv",
    ):
        assert shown in page
    again = kr("run", config).stdout
    assert "student_means: done (finished before)" in again


@pytest.mark.parametrize(
    ("module", "said"),
    [("nowhere_at_all", "cannot be"), ("json", "SECTIONS")],
)
def test_modules_that_bring_no_kind_are_refused(module: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(tiny_settings(plugins=[module]))


def test_a_kind_that_nobody_brings_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"generator\.kind: must be one of biggan_deep.*did you mean 'biggan_deep'"
    ):
        parse_config({"name": "a", "data": {"name": "digits"}, "generator": {"kind": "bigan_deep"}})
    with pytest.raises(ConfigError, match=r"students\.mine\.kind: must be one of .*teacher"):
        parse_config(tiny_settings(students={"mine": {"kind": "alchemy"}}))
