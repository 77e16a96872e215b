"""From the stages' results to the report's schema."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kr_ray.compute.devices import mixed_dtype, pick_device
from kr_ray.compute.seeding import derive_seed, seeded_generator
from kr_ray.config import Config
from kr_ray.generators.biggan.sampling import Sampler
from kr_ray.generators.interface import checkpoint_file
from kr_ray.report.build import ReportData, write_report
from kr_ray.report.importance import parameter_importance
from kr_ray.report.schema import SCHEMA_VERSION

PACKAGES = ("kr_ray", "torch", "torchvision", "ray", "optuna", "hyperopt", "scikit-learn", "pyarrow", "medmnist", "numpy")
SAMPLES_PER_CLASS = 8
SHOWN_CLASSES = 20

Results = Mapping[str, dict[str, Any]]


def write_run_report(run: Path, folder: Path, config: Config, results: Results, skipped: Mapping[str, bool]) -> Path:
    """Write report.json and report.html into `folder`; returns the page."""
    report = collect_report(config, results, skipped)
    return write_report(report, ReportData(samples=_generated_samples(run, results)), folder)


def collect_report(config: Config, results: Results, skipped: Mapping[str, bool]) -> dict[str, Any]:
    """The dict that `report.schema.Report` describes; sections of stages without a result are left out."""
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run": config.name,
        "seed": config.seed,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"commit": _commit(), "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "config": config.model_dump(mode="json"),
        "data": {key: value for key, value in results["data"].items() if key != "wall_s"},
        "device": _device(),
        "stages": {name: _stage(result, skipped.get(name, False)) for name, result in results.items()},
    }
    if teacher := results.get("teacher"):
        report["teacher"] = _pick(teacher, "test_accuracy", "val_accuracy", "steps", "test_loss", "curve", "confusion")
        if equal := results.get("equal_compute_teacher"):
            report["teacher"]["equal_compute"] = _pick(equal, "test_accuracy", "steps")
    if generator := results.get("generator"):
        figures = _pick(generator, "parameters_g", "parameters_d", "curve", "collapse")
        report["generator"] = figures | {"architecture": config.generator.architecture, "epochs": config.generator.epochs}
    if sweep := results.get("checkpoints"):
        report["checkpoints"] = sweep["checkpoints"]
    if tuning := results.get("tuning"):
        report["tuning"] = {key: value for key, value in tuning.items() if key != "wall_s"}
        report["tuning"]["importance"] = parameter_importance(tuning["history"])
    if student := results.get("student"):
        figures = _pick(student, "steps", "images_seen", "parameters", "curve", "confusion")
        cas = {"test_cas": student["test_accuracy"], "val_cas": student["val_accuracy"]}
        origin = {
            "checkpoint_epoch": results.get("checkpoints", {}).get("best_epoch"),
            "images_from": student.get("images_from"),
        }
        report["student"] = figures | cas | origin
    if audit := results.get("audit"):
        report["audit"] = {"kr": audit["kr"]}
    if copies := results.get("copies"):
        report["audit"] = report.get("audit", {}) | {"copies": {key: value for key, value in copies.items() if key != "wall_s"}}
    if worst := results.get("worst_case"):
        report["audit"] = report.get("audit", {}) | {"lira": worst["lira"]}
    return report


def _commit() -> str:
    """Of the checkout the program runs from; "-dirty" if it was edited, "release" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "release"


def _pick(result: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: result[key] for key in keys}


def _stage(result: Mapping[str, Any], skipped: bool) -> dict[str, Any]:
    stage = {"wall_s": result["wall_s"], "skipped": skipped}
    if result.get("seconds") and result.get("images_seen"):
        stage["images_per_s"] = result["images_seen"] / result["seconds"]
    return stage


def _device() -> str:
    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    dtype = mixed_dtype(device)
    return f"{name}, mixed precision {'off' if dtype is None else str(dtype).removeprefix('torch.')}"


def _generated_samples(run: Path, results: Results) -> NDArray[np.uint8] | None:
    """Images of the best checkpoint at the tuned latent std: uint8 [classes, n, C, H, W]; None before there is one."""
    if "tuning" not in results:
        return None
    data, device = results["data"], pick_device()
    prior = torch.tensor(data["class_counts"], dtype=torch.float64) / data["train"]
    sampler = Sampler.load(run / checkpoint_file(results["checkpoints"]["best_epoch"]), device)
    latent_std = results["tuning"]["chosen"]["latent_std"]
    sampler.set_latent_std(latent_std, derive_seed("report"), prior, batches=8, batch_size=128)
    classes = torch.arange(min(data["num_classes"], SHOWN_CLASSES))
    images = sampler.images(classes.repeat_interleave(SAMPLES_PER_CLASS), seeded_generator("report samples")).cpu()
    return images.unflatten(0, (len(classes), SAMPLES_PER_CLASS)).numpy()
