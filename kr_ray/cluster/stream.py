"""The regenerated, teacher-labelled images as one Ray Data stream per student (sections 3.3 and 3.4).

    (regeneration, part) -> makers: actors with generator and teacher -> uint8
    images and soft labels -> the student's training

The stream starts once per student and holds all regenerations it will need, from the one it has got to. Parts
arrive in order and are seeded by what they are (`SyntheticSet.part`), so the images are those of `on_device`
generation whatever the number of makers. While the student trains on one regeneration the next ones are made,
as far as the stream's share of the object store goes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, Dataset, ExecutionResources
from torch import Tensor

from kr_ray.cluster.runtime import ray_storage
from kr_ray.cluster.tasks import run_tasks
from kr_ray.compute.devices import pick_device
from kr_ray.compute.parallel import worker_count, worker_rank
from kr_ray.config import ClassifierConfig, ClusterConfig, Resources
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.runs.attempts import beside, real_folder, replace_folder
from kr_ray.runs.storage import remove_tree
from kr_ray.synthesis.parquet_set import to_table
from kr_ray.synthesis.stream import CollapsedGenerator, RegeneratedSet, parts_of
from kr_ray.synthesis.student_set import OpenSet, StudentSpec, on_device, set_size, synthetic_set

AHEAD = 2
"""Regenerations that the object store may hold: the one that is being taken over, and the next."""
LEAST_ROOM = 2**29
"""Bytes of the object store: with less Ray Data keeps makers
waiting for room that its own reserves take up."""

Columns = dict[str, NDArray[Any]]


def student_images(cluster: ClusterConfig, name: str) -> OpenSet:
    """Where `cluster.stream` says that students' images are made;
    `name` is the stream's in Ray's dashboard."""
    return on_device if cluster.stream == "on_device" else partial(_streamed, cluster=cluster, name=name)


def _streamed(
    run: Path,
    spec: StudentSpec,
    recipe: ClassifierConfig,
    splits: Splits,
    device: torch.device,
    epochs: int,
    *,
    cluster: ClusterConfig,
    name: str,
) -> RegeneratedSet:
    if spec.synthesis.pool_scale:  # there is nothing left to make
        return on_device(run, spec, recipe, splits, device, epochs)
    regenerations = epochs / spec.synthesis.regeneration_rate
    makers = Makers(run, spec, recipe, set_size(spec, splits), regenerations, cluster)
    return StreamedSet(makers, splits, epochs, device, name)


@dataclass(frozen=True)
class Makers:
    """The actors that generate and label.

    Attributes:
        images: of one regeneration.
        regenerations: about so many are asked for.
        cluster: says how many makers there are, and what each of them gets.
    """

    run: Path
    spec: StudentSpec
    recipe: ClassifierConfig
    images: int
    regenerations: float
    cluster: ClusterConfig

    def stream(
        self, regenerations: range, image_bytes: int, name: str, maker: type[Maker], *arguments: Any
    ) -> Dataset:
        """All parts of `regenerations`, in order, as actors of the class `maker` make them.

        One block per part, there from the start: so no task has to read them,
        which would wait for a CPU that students hold.
        """
        items = [
            {"regeneration": regeneration, "first": part.start, "end": part.stop}
            for regeneration in regenerations
            for part in parts_of(self.images, image_bytes, self.spec.synthesis)
        ]
        resources = self.cluster.maker
        made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            maker,
            fn_constructor_args=(self, *arguments),
            batch_size=1,
            compute=ActorPoolStrategy(size=self.cluster.makers),
            num_cpus=resources.cpu,
            num_gpus=resources.gpu,
        )
        made.set_name(name)
        made.context.enable_progress_bars = False
        made.context.execution_options.preserve_order = True
        return made


def part_of(batch: Columns) -> range:
    return range(int(batch["first"][0]), int(batch["end"][0]))


class Maker:
    """A generator and a teacher that wait for parts to make."""

    def __init__(self, makers: Makers) -> None:
        self._told_s = time.process_time()
        torch.set_num_threads(makers.cluster.maker.threads)
        splits = load_stored_splits(makers.run / SPLITS_FILE)
        self.set = synthetic_set(
            makers.run, makers.spec, makers.recipe, splits, pick_device(), makers.images, makers.regenerations
        )

    def __call__(self, batch: Columns) -> Columns:
        """One part, as rows `regeneration` int64, `image` uint8 [C, H,
        W], `soft_label` float32 [K], `cpu_s` float64.

        `cpu_s` sums up to the CPU seconds that the maker has spent since its last part, or its start. With
        view: seen there is no `soft_label`. There are no rows if a filtering strategy has found no image to
        keep.
        """
        regeneration = int(batch["regeneration"][0])
        try:
            images, targets = self.set.part(regeneration, part_of(batch))
        except CollapsedGenerator:
            return {"regeneration": np.zeros(0, np.int64)}
        rows = {
            "regeneration": np.full(len(images), regeneration),
            "image": images.cpu().numpy(),
            "cpu_s": np.full(len(images), self._cpu_s() / len(images)),
        }
        return rows | ({"soft_label": targets.cpu().numpy()} if targets.shape[1] else {})

    def _cpu_s(self) -> float:
        before, self._told_s = self._told_s, time.process_time()
        return self._told_s - before


class TableMaker(Maker):
    """Makes parts as rows of a Parquet file."""

    def __init__(self, makers: Makers, schema: pa.Schema) -> None:
        super().__init__(makers)
        self.schema = schema

    def __call__(self, batch: Columns) -> pa.Table:
        return to_table(*self.set.part(int(batch["regeneration"][0]), part_of(batch)), self.schema)


def export_parquet(makers: Makers, folder: Path, schema: pa.Schema) -> None:
    """Write the first regeneration to a folder of Parquet files (format:
    kr_ray.synthesis.parquet_set), a file per part.

    A folder that is there is replaced once the new one is whole; what a kill has left of a new one is begun
    anew. It is written from a task, so that what Ray Data and Ray's core say meanwhile is in that worker's
    log.
    """
    run_tasks("export", _export, [(makers, folder, schema)], Resources(cpu=0.0), makers.cluster.max_retries)


def _export(makers: Makers, folder: Path, schema: pa.Schema) -> None:
    folder = real_folder(folder)
    remove_tree(beside(folder))
    made = makers.stream(range(1), math.prod(schema.field("image").type.shape), "export", TableMaker, schema)
    place = ray_storage(beside(folder))
    made.write_parquet(place["storage_path"], filesystem=place.get("storage_filesystem"), schema=schema)
    replace_folder(folder, beside(folder))


class StreamedSet(RegeneratedSet):
    """A regenerated set that makers send. The first worker of a
    training takes it over and hands it on to the others.

    Args:
        splits: the real images; the generated ones have their size, channels and classes.
        epochs: how many the student will ask for, in ascending order.
        device: where the images are wanted.
        name: of the stream.
    """

    def __init__(self, makers: Makers, splits: Splits, epochs: int, device: torch.device, name: str) -> None:
        super().__init__(makers.images, makers.spec.synthesis)
        self._makers, self._device, self._name = makers, device, name
        self._image_shape = splits.train.images.shape[1:]
        self._labels = splits.num_classes if self._config.view == "clean" else 0
        self._last = self.regeneration_of(epochs - 1)
        self._blocks: Iterator[dict[str, Tensor]] = iter(())
        self._next = -1
        self._makers_s = 0.0

    def take_makers_s(self) -> float:
        taken, self._makers_s = self._makers_s, 0.0
        return taken

    def regeneration(self, index: int) -> tuple[Tensor, Tensor]:
        """The set of one regeneration.

        Raises:
            CollapsedGenerator: a filtering strategy has found no image to keep.
        """
        if worker_rank() == 0:
            images, targets = self._receive(index)
        else:
            images = torch.empty(len(self), *self._image_shape, dtype=torch.uint8, device=self._device)
            targets = torch.empty(len(self), self._labels, device=self._device)
        if worker_count() > 1:
            dist.broadcast(images, src=0)
            if self._labels:
                dist.broadcast(targets, src=0)
        return images, targets

    def _receive(self, index: int) -> tuple[Tensor, Tensor]:
        if index != self._next:
            self._start(index)
        images, targets, received = [], [], 0
        while received < len(self):
            block = next(self._blocks, {})
            if not block or block["regeneration"][0] != index:
                raise CollapsedGenerator(f"the makers kept no image of regeneration {index}")
            images.append(block["image"])
            targets.append(block["soft_label"] if self._labels else torch.empty(len(block["image"]), 0))
            received += len(block["image"])
            self._makers_s += float(block["cpu_s"].sum())
        self._next = index + 1
        return torch.cat(images).to(self._device), torch.cat(targets).to(self._device)

    def _start(self, first: int) -> None:
        self.close()
        stream = self._makers.stream(
            range(first, self._last + 1), self._image_shape.numel(), self._name, Maker
        )
        row_bytes = self._image_shape.numel() + 4 * self._labels + 16
        room = max(LEAST_ROOM, AHEAD * len(self) * row_bytes)
        stream.context.execution_options.resource_limits = ExecutionResources(object_store_memory=room)
        self._blocks = iter(stream.iter_torch_batches(batch_size=None))

    def close(self) -> None:
        """End the stream, and its makers with it."""
        self._blocks, self._next = iter(()), -1
