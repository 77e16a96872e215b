"""What surrounds a run: what is sent to a cluster, where results go, what the commands refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import REPOSITORY, tiny_config

from kr_ray.config import ConfigError
from kr_ray.pipeline import Pipeline
from kr_ray.report.table import results_table


def test_a_submitted_working_directory_holds_the_code_but_no_data_runs_or_environment() -> None:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    rules = get_excludes_from_ignore_files(REPOSITORY, include_gitignore=True)
    for kept in ("kr_ray/data/images.py", "jobs/run.py", "configs/quickstart.yaml", "pyproject.toml"):
        assert not any(rule(REPOSITORY / kept) for rule in rules), kept
    for left in (".venv", "runs", "data", ".git"):
        assert any(rule(REPOSITORY / left) for rule in rules), left


def test_a_relative_storage_is_refused_when_a_cluster_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="all nodes share"):
        Pipeline(tiny_config(storage="runs"), watcher=None)  # type: ignore[arg-type]
    Pipeline(tiny_config(storage="/shared/runs"), watcher=None)  # type: ignore[arg-type]


def test_a_report_of_a_run_that_has_not_begun_is_an_error(tmp_path: Path) -> None:
    from kr_ray.runs.artifacts import ArtifactError

    with (
        Pipeline(tiny_config(storage=str(tmp_path)), watcher=None) as pipeline,  # type: ignore[arg-type]
        pytest.raises(ArtifactError, match="kr run"),
    ):
        pipeline.report()


def test_the_table_of_no_runs_has_a_head_only(tmp_path: Path) -> None:
    assert len(results_table(tmp_path).splitlines()) == 2
