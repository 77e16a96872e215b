"""A distillation tick by tick: after each its state is kept, and it goes on from there bit for bit."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from kr_ray.compute.devices import pick_device
from kr_ray.compute.parallel import worker_count
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ConfigError
from kr_ray.config.distillation import DistillationSection
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.methods.distillation.augment import operations
from kr_ray.methods.distillation.initial import Initial, first_images
from kr_ray.methods.distillation.matching import DistributionMatching, GradientMatching, Matching, Setting
from kr_ray.methods.distillation.sets import PARQUET_FILE, SET_FILE, DistilledSet, RealImages, to_bytes
from kr_ray.methods.distillation.trajectories import EXPERTS, TrajectoryMatching, trained_experts
from kr_ray.methods.interface import Site
from kr_ray.runs.artifacts import atomic_write
from kr_ray.runs.results import DistillationResult
from kr_ray.runs.stages import Row, Save, State
from kr_ray.runs.storage import remove_tree

TICKS = 20
"""States that a kill can throw back to, of all iterations together."""


def distil(
    site: Site, folder: Path, section: DistillationSection, state: State | None, save: Save
) -> DistillationResult:
    """Make the distilled set of the site's training images.

    Leaves in `folder` synthetic.safetensors (see `DistilledSet`), with the positions of the private images
    that it started as, and the images and labels as Parquet.

    Raises:
        ConfigError: several workers.
        DataError: see `first_images`.
    """
    if worker_count() > 1:
        raise ConfigError(
            f"`workers == 1` must hold for distillation, but got {worker_count()}; set cluster.workers to 1"
        )
    splits = load_stored_splits(site.path / SPLITS_FILE)
    setting = _setting(site, section, splits)
    initial = first_images(section, setting.real, site.canaries, setting.seed)
    history: list[Row] = [] if state is None else list(state["history"])
    matching = _matching(setting, initial, folder, state, save)
    if state is not None and state["matching"] is not None:
        matching.load_state_dict(state["matching"])
    while len(history) < TICKS:
        history.append(_tick(matching, len(history)))
        save({"history": history, "matching": matching.state_dict()}, history[-1])
    found = _distilled(matching, initial)
    _leave(folder, found, splits)
    return _result(matching, initial, history)


def _setting(site: Site, section: DistillationSection, splits: Splits) -> Setting:
    real = RealImages.of(splits.train, splits.num_classes, pick_device())
    flip = site.config.classifier.horizontal_flip
    names = operations(flip) if section.augmentation == "siamese" else ()
    return Setting(section=section, real=real, operations=names, seed=derive_seed(site.seed, "distillation"))


def _matching(setting: Setting, initial: Initial, folder: Path, state: State | None, save: Save) -> Matching:
    match setting.section.objective:
        case "dm":
            return DistributionMatching(setting, initial)
        case "dsa":
            return GradientMatching(setting, initial)
        case "mtt":

            def tell(count: int) -> None:
                # Of the share done nothing is known yet: experts and iterations cost what they cost.
                row = {"share": 0.0, "experts": float(count), "images_seen": 0.0}
                save({"history": [], "matching": None}, row)

            return TrajectoryMatching(setting, initial, trained_experts(setting, folder, tell))


def _tick(matching: Matching, tick: int) -> Row:
    """The next share of the iterations."""
    started, used, steps = time.perf_counter(), time.process_time(), matching.section.steps
    first, last = round(steps * tick / TICKS), round(steps * (tick + 1) / TICKS)
    losses = [matching.step(iteration) for iteration in range(first, last)]
    row: Row = {"tick": tick, "share": (tick + 1) / TICKS, "step": last}
    row["images_seen"] = last * matching.images_per_step
    if losses:  # a tick of very few iterations may hold none
        row["train_loss"] = sum(losses) / len(losses)
    if not bool(matching.images.isfinite().all()):
        raise FloatingPointError(
            f"a distilled image is not finite at iteration {last}; lower the student's image_learning_rate "
            f"(now {matching.section.image_rate:g})"
        )
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    return row | seconds


@torch.no_grad()
def _distilled(matching: Matching, initial: Initial) -> DistilledSet:
    units = matching.setting.real.units
    images = units.to_signed(matching.images.detach())
    stored = to_bytes(images) if matching.section.store == "uint8" else images
    return DistilledSet(stored.cpu(), matching.targets().cpu(), initial.position, units)


def _leave(folder: Path, found: DistilledSet, splits: Splits) -> None:
    """The artefacts; the experts, which know the private images, go."""
    import pyarrow.parquet as pq

    from kr_ray.synthesis.parquet_set import parquet_schema, to_table

    found.save(folder / SET_FILE)
    about = {"class_names": list(splits.class_names), "images": len(found.images)}
    schema = parquet_schema(found.images.shape[1:], splits.num_classes, about)
    with atomic_write(folder / PARQUET_FILE) as temporary:
        pq.write_table(to_table(found.as_bytes(), found.targets, schema), temporary)
    if (folder / EXPERTS).exists():
        remove_tree(folder / EXPERTS)


def _result(matching: Matching, initial: Initial, history: list[Row]) -> DistillationResult:
    section, moved = matching.section, matching.images.detach() - initial.images
    real = int((initial.position >= 0).sum())
    losses = [row["train_loss"] for row in history if "train_loss" in row]
    return DistillationResult(
        objective=section.objective,
        initialisation=section.initialisation,
        images=len(matching.images),
        images_per_class=section.images_per_class,
        iterations=section.steps,
        initial_private=real,
        moved_rms=float(moved.square().mean().sqrt()) if real else None,
        losses=losses,
        seconds=sum(row["seconds"] for row in history),
        cpu_seconds=sum(row["cpu_seconds"] for row in history),
    )
