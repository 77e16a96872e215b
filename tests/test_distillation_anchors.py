"""Distillation on real Fashion-MNIST beside what was published; prints its figures (`-m slow -s`)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_DATA, tiny_settings

from kr_ray.config import Config
from kr_ray.config.file import parse_config
from kr_ray.data.datasets import load_splits
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.methods.interface import Site, train_here
from kr_ray.methods.registry import method_of
from kr_ray.runs.artifacts import read_json
from kr_ray.synthesis.student_set import StudentSpec

PUBLISHED = {"dsa": 0.846, "dc": 0.823}
"""Fashion-MNIST, 10 images per class, ConvNet-3 of width 128 (Zhao & Bilen 2021, table 1)."""
FASHION: dict[str, Any] = {
    "name": "fashionmnist",
    "root": str(SHARED_DATA),
    "download": False,
    "image_size": 28,
    "max_train_images": 0,
    "max_validation_images": 500,
    "max_test_images": 0,
}
CLASSIFIER: dict[str, Any] = {
    "network": "convnet3",
    "width": 64,
    "batch_size": 100,
    "learning_rate": 0.01,
    "warmup_epochs": 0,
    "min_steps": 0,
    "clip_norm": 1000.0,
    "label_smoothing": 0.0,
    "mixup_alpha": 0.0,
    "horizontal_flip": True,
}
SMALLER: dict[str, Any] = {
    "kind": "distillation",
    "network_width": 64,
    "real_batch": 32,
    "network_batch": 100,
    "epochs": 200,
}
STUDENTS: dict[str, dict[str, Any]] = {
    "undistilled": {"iterations": 1, "image_learning_rate": 1e-9},
    "dm": {"iterations": 300},
    "dsa": {"objective": "dsa", "iterations": 12, "inner_epochs": 1},
}
"""`undistilled`: the same ten private images per class, as they are."""


@dataclass(frozen=True)
class Anchor:
    accuracy: float
    headline: str
    cpu_seconds: float


def anchors_config() -> Config:
    students = {name: SMALLER | keys for name, keys in STUDENTS.items()}
    settings = tiny_settings(data=FASHION, classifier=CLASSIFIER, students=students)
    unused = {"kind": "edm"}  # every run has a generator, and BigGAN knows no 28 px
    return parse_config(
        {name: settings[name] for name in ("name", "data", "classifier", "students")} | {"generator": unused}
    )


def anchor(folder: Path, config: Config, name: str) -> Anchor:
    """Train one of `STUDENTS`; goes on where it was killed."""
    if not (folder / SPLITS_FILE).exists():
        save_splits(folder / SPLITS_FILE, load_splits(config.data))
    spec = StudentSpec(config.generator, 1, config.synthesis, 1.0, 0)
    site = Site(path=folder, config=config, seed=0, student=spec)
    started = time.process_time()
    parts = method_of(name, config).parts(site, f"student_{name}")
    train_here(
        site, parts, "fashionmnist", lambda said: print(f"{said} {time.process_time() - started:.0f} s")
    )
    made = read_json(folder / f"distilled_{name}" / "done.json")["result"]
    learnt = read_json(folder / f"student_{name}" / "done.json")["result"]
    headline = parts[0].result.model_validate(made).headline()
    return Anchor(learnt["test_accuracy"], headline, made["cpu_seconds"] + learnt["work"]["cpu_seconds"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_distilled_fashion_beats_as_many_private_images(shared_data: Path, tmp_path: Path) -> None:
    config = anchors_config()
    found = {name: anchor(tmp_path, config, name) for name in STUDENTS}
    for name, one in found.items():
        print(f"{name}: test accuracy {one.accuracy:.4f}, {one.headline}; {one.cpu_seconds:.0f} CPU s")
    print(f"published (width 128, 60,000 images, 1,000 iterations): {PUBLISHED}")
    for name in ("dm", "dsa"):
        assert found[name].accuracy > found["undistilled"].accuracy + 0.01
