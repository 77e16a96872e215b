"""Several generators as one: each is trained by itself, and of every set each draws its share (the outlook of
arXiv 2407.15526, section 5)."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from kr_ray.compute.seeding import derive_seed
from kr_ray.config import SamplingSection, SeveralConfig, SeveralSampling
from kr_ray.data.images import LabelledImages
from kr_ray.generators.interface import Checkpoint, Generator, GeneratorTraining, Sampler
from kr_ray.runs.artifacts import Json, holding, load_tensors, save_tensors
from kr_ray.runs.stages import State

T = TypeVar("T")


@dataclass(frozen=True)
class Several:
    """See kr_ray.generators.interface.Generator.

    Attributes:
        members: in the order of `section.members`.
    """

    section: SeveralConfig
    members: tuple[Generator, ...]

    def training(
        self, images: LabelledImages, num_classes: int, seed: int, device: torch.device
    ) -> SeveralTraining:
        trainings = [
            member.training(images, num_classes, derive_seed(seed, "member", k), device)
            for k, member in enumerate(self.members)
        ]
        return SeveralTraining(trainings, self.section)

    def parameters(self, num_classes: int, channels: int) -> dict[str, int]:
        return {
            f"member_{k}_{name}": count
            for k, member in enumerate(self.members)
            for name, count in member.parameters(num_classes, channels).items()
        }

    def round_images(self) -> int:
        return math.lcm(*(member.round_images() for member in self.members))

    def up_to(self, epoch: int) -> Several:
        """Every member up to where it is in the checkpoint of `epoch`."""
        ends = [self.section.trained_to(k, epoch) for k in range(len(self.members))]
        members = tuple(member.up_to(end) for member, end in zip(self.members, ends, strict=True))
        return Several(self.section.up_to(epoch), members)

    def open(
        self,
        checkpoint: Path,
        sampling: SamplingSection,
        *,
        prior: Tensor,
        seed: int,
        device: torch.device,
        batch_size: int = 128,
        calibration_images: int | None = None,
        images: float = 0,
    ) -> SeveralSampler:
        """Only members that draw are opened."""
        if not isinstance(sampling, SeveralSampling):
            raise TypeError(
                f"`sampling` must be that of several, but got {type(sampling).__name__}; use SeveralSampling"
            )
        tensors, metadata = load_tensors(checkpoint)
        opened = []
        with tempfile.TemporaryDirectory() as folder, holding(checkpoint, "several generators"):
            for k, share in enumerate(sampling.shares):
                if not share:
                    continue
                own = Path(folder) / f"{k}.safetensors"
                save_tensors(own, _of_member(tensors, k), self._metadata(metadata, k))
                sampler = self.members[k].open(
                    own,
                    sampling.members[k],
                    prior=prior,
                    seed=derive_seed(seed, "member", k),
                    device=device,
                    batch_size=batch_size,
                    calibration_images=calibration_images,
                    images=images * share / sum(sampling.shares),
                )
                opened.append((share, sampler))
        return SeveralSampler(opened)

    def _metadata(self, metadata: Json, k: int) -> Json:
        """As `save_checkpoint` would have written it for the member alone."""
        shared = {name: metadata[name] for name in ("num_classes", "channels")}
        config = self.section.members[k].model_dump(mode="json")
        return shared | {"config": config} | _of_member(metadata, k)


class SeveralTraining:
    """Trainings that advance side by side, each as many of its epochs as bring all to their ends together."""

    def __init__(self, trainings: Sequence[GeneratorTraining], section: SeveralConfig) -> None:
        self.trainings, self.section, self.epoch = trainings, section, 0
        self.rows: list[dict[str, float]] = [{} for _ in trainings]

    def train_epoch(self) -> dict[str, float]:
        """Every member up to where it is to be after one more epoch; losses are its own (`loss_member_0`)."""
        started, before = time.perf_counter(), self.images_seen
        self.epoch += 1
        for k, training in enumerate(self.trainings):
            while training.epoch < self.section.trained_to(k, self.epoch):
                self.rows[k] = training.train_epoch()
        seconds = time.perf_counter() - started
        losses = {
            f"{name}_member_{k}": value
            for k, row in enumerate(self.rows)
            for name, value in row.items()
            if name.startswith("loss")
        }
        return losses | {
            "epoch": self.epoch,
            "images_seen": self.images_seen,
            "seconds": seconds,
            "images_per_second": (self.images_seen - before) / seconds,
        }

    @property
    def images_seen(self) -> int:
        """Real images, of all members together."""
        return sum(int(row.get("images_seen", 0)) for row in self.rows)

    def checkpoint(self) -> Checkpoint:
        """All members as they are now, in one file."""
        found = [training.checkpoint() for training in self.trainings]
        figures: dict[str, float] = {}
        for k, one in enumerate(found):
            own = one.figures | {"epoch": one.epoch, "images_seen": one.images_seen}
            figures |= {f"{k}/{name}": value for name, value in own.items()}
        weights = {
            f"{k}/{name}": tensor for k, one in enumerate(found) for name, tensor in one.weights.items()
        }
        return Checkpoint(self.epoch, weights, self.images_seen, figures)

    def state(self) -> State:
        members = {str(k): training.state() for k, training in enumerate(self.trainings)}
        rows = {str(k): row for k, row in enumerate(self.rows)}
        return {"epoch": self.epoch, "members": members, "rows": rows}

    def load_state(self, state: State) -> None:
        self.epoch = state["epoch"]
        for k, training in enumerate(self.trainings):
            training.load_state(state["members"][str(k)])
            self.rows[k] = dict(state["rows"][str(k)])


class SeveralSampler:
    """Draws each image of a block from one of several samplers.

    Of a block of N images each draws its share of N, up to one; which of them, chance decides (systematic
    sampling: Madow 1949), so that labels and members are independent.

    Args:
        samplers: with their shares > 0, on one device.
    """

    def __init__(self, samplers: Sequence[tuple[float, Sampler]]) -> None:
        self._samplers = [sampler for _, sampler in samplers]
        shares = torch.tensor([share for share, _ in samplers], dtype=torch.float64)
        self._ends = (shares / shares.sum()).cumsum(0)

    @property
    def device(self) -> torch.device:
        return self._samplers[0].device

    def images(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """One image per label: int64 [N], on any device -> uint8 [N, C, S, S] on the samplers' device."""
        if len(self._samplers) == 1:
            return self._samplers[0].images(labels, random)
        order, start = (
            made(size, generator=random, device=random.device)
            for made, size in ((torch.randperm, len(labels)), (torch.rand, 1))
        )
        points = (torch.arange(len(labels), dtype=torch.float64) + start.cpu()) / max(1, len(labels))
        chosen = torch.searchsorted(self._ends, points, right=True).clamp(max=len(self._samplers) - 1)
        chosen = chosen[order.cpu()]
        drawn, places = [], []
        for k, sampler in enumerate(self._samplers):
            own = (chosen == k).nonzero()[:, 0]
            if len(own):
                drawn.append(sampler.images(labels[own.to(labels.device)], random))
                places.append(own)
        if not drawn:
            return self._samplers[0].images(labels, random)
        back = torch.cat(places).argsort().to(self.device)
        return torch.cat(drawn)[back]


def _of_member(entries: Mapping[str, T], k: int) -> dict[str, T]:
    prefix = f"{k}/"
    return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
