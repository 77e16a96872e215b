"""A finished run in MLflow: parameters, curves, results and the report, for those who compare runs there."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from kr_ray.config import Config, ConfigError
from kr_ray.masking import masked
from kr_ray.runs.artifacts import ArtifactError, Json
from kr_ray.runs.results import AUDIT, CHECKPOINTS, TUNING, ClassifierResult, Results
from kr_ray.silence import stay_silent

EXPERIMENT = "kr_ray"
PARAMS_AT_ONCE, METRICS_AT_ONCE = 100, 1000  # MLflow's limits for one request

Point = tuple[str, float, int]
"""Name, value, step."""


def require_mlflow() -> None:
    """Raises ConfigError without the package, before any work."""
    if find_spec("mlflow") is None:
        raise ConfigError(
            "`tracking.mlflow` needs the package mlflow; pip install 'kr_ray[mlflow]', or remove the key"
        )


def log_run(config: Config, results: Results, files: list[Path]) -> str:
    """Log the run as a new one of MLflow's experiment `kr_ray`; returns its id.

    Raises:
        ArtifactError: MLflow refuses or does not answer. Nothing of the run itself is lost.
    """
    stay_silent()
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException

    now = int(time.time() * 1000)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        client = MlflowClient(tracking_uri=config.tracking.mlflow)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        identifier = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
        run = client.create_run(identifier, run_name=config.name).info.run_id
        params = [Param(key, value) for key, value in _params(config.model_dump(mode="json"))]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            client.log_batch(run, params=params[first : first + PARAMS_AT_ONCE])
        metrics = [Metric(name, value, now, step) for name, value, step in _points(results)]
        for first in range(0, len(metrics), METRICS_AT_ONCE):
            client.log_batch(run, metrics=metrics[first : first + METRICS_AT_ONCE])
        for file in files:
            client.log_artifact(run, str(file))
        client.set_terminated(run)
    except (MlflowException, OSError) as error:
        raise ArtifactError(
            f"the report is written, but MLflow at {config.tracking.mlflow} must take it, and said: "
            f"{masked(str(error))}; run the same command again when it does, or remove `tracking.mlflow`"
        ) from error
    return str(run)


def _params(section: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _params(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _points(results: Results) -> Iterator[Point]:
    """Every figure and curve of the stages; a curve's step is images seen,
    of checkpoints the epoch, of trials the number."""
    for stage, result in results.items():
        yield f"{stage}/wall_s", result.wall_s, 0
        if isinstance(result, ClassifierResult):
            yield f"{stage}/{'test_cas' if stage == 'student' else 'test_accuracy'}", result.test_accuracy, 0
            yield f"{stage}/test_loss", result.test_loss, 0
        for row in getattr(result, "curve", []):
            figures = row.model_dump(exclude_none=True)
            yield from (
                (f"{stage}/curve/{key}", value, int(figures["images_seen"])) for key, value in figures.items()
            )
    if sweep := results.get(CHECKPOINTS):
        yield from (("checkpoints/val_cas", row.val_cas, row.epoch) for row in sweep.checkpoints)
    if tuning := results.get(TUNING):
        yield from (
            ("tuning/val_cas", row.val_cas, row.trial) for row in tuning.history if row.val_cas is not None
        )
    if audit := results.get(AUDIT):
        for model, attacked in (("teacher", audit.kr.teacher), ("student", audit.kr.student)):
            if attacked:
                yield f"audit/{model}/auc", attacked.auc, 0
                yield f"audit/{model}/aop", attacked.aop, 0
