"""What a running job publishes: Prometheus metrics through Ray, and TensorBoard curves beside the results.

Ray exposes the metrics, with `ray_` before their names, on the metrics port of the node where the work runs.
Both are views of the rows that a training reports anyway; nothing reads them back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from ray.util.metrics import Counter, Gauge
from tensorboardX import SummaryWriter

from kr_ray.runs.attempts import stage_name
from kr_ray.runs.storage import RemotePath, upload

TAGS = ("run", "stage", "trial")

GAUGES = {
    "kr_share": ("share", "Share of the work that is done, 0 to 1"),
    "kr_epoch": ("epoch", "Epochs trained"),
    "kr_loss": ("train_loss", "Mean training loss of a classifier since the last report"),
    "kr_loss_d": ("loss_d", "Mean loss of the discriminator in the last epoch"),
    "kr_loss_g": ("loss_g", "Mean loss of the generator in the last epoch"),
    "kr_validation_accuracy": (
        "val_accuracy",
        "Accuracy on the real validation images, of a student: validation CAS",
    ),
    "kr_regeneration": ("regeneration", "Index of the synthetic set that the student is trained on"),
    "kr_collapse_alarms": ("collapse_alarms", "Checkpoints of the generator that raised the collapse alarm"),
}
"""Metric name to the key of a row and a description."""

COUNTERS = {
    "kr_images_trained": ("images_seen", "Images that gradient steps were made on"),
    "kr_images_generated": ("images_generated", "Synthetic images that were generated for training"),
}
"""The same for what only grows. A row holds totals since the training's
start, a counter what this process has added."""

STAGE_GAUGE = "kr_stage_running"


class Publisher:
    """Publishes the rows of one training.

    Args:
        folder: of the stage, `<storage>/<run>/<stage>`; curves are appended in `tensorboard/`
            below it (of a store: uploaded at every report).
        trial: name of the student where a stage trains several.
        done: the last row before this process took over, if there is one.
    """

    def __init__(self, folder: Path, trial: str = "", done: Mapping[str, float] | None = None) -> None:
        tags = {"run": folder.parent.name, "stage": stage_name(folder), "trial": trial}
        self._gauges = {
            name: Gauge(name, text, TAGS).set_default_tags(tags) for name, (_, text) in GAUGES.items()
        }
        self._counters = {
            name: Counter(name, text, TAGS).set_default_tags(tags) for name, (_, text) in COUNTERS.items()
        }
        self._totals = {key: float((done or {}).get(key, 0.0)) for key, _ in COUNTERS.values()}
        curves = folder / "tensorboard" / trial
        self._uploads_to = curves if isinstance(curves, RemotePath) else None
        self._temporary = tempfile.TemporaryDirectory(prefix="kr_ray-curves-") if self._uploads_to else None
        self._folder = Path(self._temporary.name) if self._temporary else curves
        self._writer = SummaryWriter(str(self._folder), write_to_disk=True)

    def publish(self, row: Mapping[str, float]) -> None:
        """Publish one report: every number of `row` as a curve over the
        images seen, and those with a metric as such."""
        for name, (key, _) in GAUGES.items():
            if key in row:
                self._gauges[name].set(row[key])
        for name, (key, _) in COUNTERS.items():
            added = row.get(key, 0.0) - self._totals[key]
            if added > 0:
                self._counters[name].inc(added)
                self._totals[key] = row[key]
        for key, value in row.items():
            self._writer.add_scalar(key, value, global_step=int(row["images_seen"]))
        self._writer.flush()
        if self._uploads_to:
            for file in self._folder.iterdir():
                upload(file, self._uploads_to / file.name)

    def close(self) -> None:
        self._writer.close()
        if self._temporary:
            self._temporary.cleanup()


def announce_stage(run: str, stage: str, running: bool) -> None:
    """Say on the driver's node whether `stage` is being worked on."""
    Gauge(STAGE_GAUGE, "1 while the stage is being worked on", ("run", "stage")).set(
        running, {"run": run, "stage": stage}
    )
