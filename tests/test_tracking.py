"""MLflow: what a real store holds afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, tiny_settings
from heads import free_ports

from kr_ray.config import ConfigError
from kr_ray.config.file import parse_config
from kr_ray.report.tracking import EXPERIMENT, log_run
from kr_ray.runs.artifacts import ArtifactError

RESULTS: dict[str, Any] = {
    "teacher": {
        "test_accuracy": 0.9,
        "wall_s": 3.0,
        "curve": [
            {"images_seen": 100 * k, "train_loss": 2.0 / k, "val_accuracy": 0.1 * k} for k in range(1, 1201)
        ],
    },
    "checkpoints": {"checkpoints": [{"epoch": 2, "val_cas": 0.5}, {"epoch": 4, "val_cas": 0.75}]},
    "tuning": {"history": [{"trial": 0, "val_cas": 0.7}, {"trial": 1, "val_cas": None}]},
    "student": {"test_accuracy": 0.875},
    "audit": {"kr": {"teacher": {"auc": 0.625, "aop": 0.576}, "student": {"auc": 0.5, "aop": 0.875}}},
}


def test_params_metrics_curves_and_report_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is an optional dependency (kr_ray[mlflow])")
    monkeypatch.chdir(tmp_path)  # MLflow keeps the files of a database store below the current directory
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    report = tmp_path / "report.json"
    report.write_text("{}")
    run = log_run(tiny_config(tracking={"mlflow": uri}), RESULTS, [report])

    client = mlflow.MlflowClient(tracking_uri=uri)
    kept = client.get_run(run)
    assert client.get_experiment(kept.info.experiment_id).name == EXPERIMENT
    assert (kept.info.run_name, kept.info.status) == ("tiny", "FINISHED")
    assert (
        kept.data.params["teacher.epochs"] == "4"
        and kept.data.params["tuning.space.cardinality_scale"] == "[1, 2]"
    )
    assert len(kept.data.params) > 100  # more than one request takes
    assert kept.data.metrics["student/test_cas"] == 0.875 and kept.data.metrics["audit/teacher/auc"] == 0.625
    sweep = client.get_metric_history(run, "checkpoints/val_cas")
    assert [(point.step, point.value) for point in sweep] == [(2, 0.5), (4, 0.75)]
    assert [point.step for point in client.get_metric_history(run, "tuning/val_cas")] == [0]
    loss = client.get_metric_history(run, "teacher/curve/train_loss")
    assert [(point.step, point.value) for point in loss] == [(100 * k, 2.0 / k) for k in range(1, 1201)]
    assert [file.path for file in client.list_artifacts(run)] == ["report.json"]


def test_a_tracker_that_does_not_answer_is_named_and_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is an optional dependency (kr_ray[mlflow])")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    [port] = free_ports(1)
    with pytest.raises(ArtifactError, match="the report is written") as caught:
        log_run(tiny_config(tracking={"mlflow": f"http://127.0.0.1:{port}"}), RESULTS, [])
    assert "tracking.mlflow" in str(caught.value)


def test_credentials_in_the_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME") as caught:
        parse_config(tiny_settings(tracking={"mlflow": "https://me:hunter2@mlflow.example.org"}))
    assert "hunter2" not in str(caught.value)
