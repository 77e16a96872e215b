"""A pool: generated images drawn once and reused, for generators whose images are dear (a diffusion model's).

Where a GAN's set is drawn anew at every regeneration, a pool is drawn once, in blocks that anybody may
draw, and each regeneration is the next stretch of it. All students of one checkpoint and all trials of a
tuning share it.

    <run>/pools/<fingerprint>.safetensors              a whole pool: `images`, `classes`
    <run>/pools/<fingerprint>.part0003.safetensors     some of its blocks, while it is being drawn
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kr_ray.compute.seeding import derive_seed, seeded_generator
from kr_ray.config import GeneratorSection, SamplingSection, SynthesisConfig
from kr_ray.data.images import LabelledImages
from kr_ray.generators.registry import generator_of
from kr_ray.runs.artifacts import ArtifactError, Json, fingerprint, holding, load_tensors, save_tensors
from kr_ray.runs.storage import list_files, sha256_of
from kr_ray.synthesis.stream import RegeneratedSet

BLOCKS_PER_PART, MOST_PARTS = 4, 16
"""A part is at least so many blocks (a task opens the generator first), and a pool at most so many parts."""
POOLS = "pools"
"""The folder of a run."""


class DrawsImages(Protocol):
    """A sampler of any kind of generator, ready to draw."""

    @property
    def device(self) -> torch.device: ...

    def images(self, labels: Tensor, random: torch.Generator, /) -> Tensor:
        """One image per label (int64 [N]): uint8 [N, C, S, S], from `random` alone."""
        ...


@dataclass(frozen=True)
class PoolPlan:
    """Which images a pool holds. Equal plans and samplers give equal pools, however the blocks are shared out
    among makers.

    Attributes:
        images: size of the pool, > 0.
        prior: relative frequency of each class.
        seed: of classes and noise.
        block_size: images of a block, which is drawn as one, > 0.
    """

    images: int
    prior: tuple[float, ...]
    seed: int
    block_size: int = 512

    def __post_init__(self) -> None:
        if self.images < 1 or self.block_size < 1:
            raise ValueError(
                f"`images >= 1` and `block_size >= 1` must hold, but got images={self.images}, "
                f"block_size={self.block_size}; a pool of 2 to 3 times the real images is enough"
            )

    @property
    def blocks(self) -> int:
        """Independent pieces of work."""
        return -(-self.images // self.block_size)

    def parts(self) -> list[range]:
        """The blocks in the portions in which they are drawn and kept; no maker decides them."""
        step = max(BLOCKS_PER_PART, -(-self.blocks // MOST_PARTS))
        return [range(first, min(first + step, self.blocks)) for first in range(0, self.blocks, step)]

    def classes(self) -> Tensor:
        """The class of every image: int64 [images] on the CPU."""
        random = seeded_generator(self.seed, "pool classes")
        prior = torch.tensor(self.prior, dtype=torch.float64)
        return torch.multinomial(prior, self.images, replacement=True, generator=random)

    def draw(self, sampler: DrawsImages, block: int) -> LabelledImages:
        """Block `block` (from 0) with the classes asked for, on the sampler's device.

        Raises:
            ValueError: there is no such block.
        """
        if not 0 <= block < self.blocks:
            rule = f"`0 <= block < {self.blocks}` must hold"
            raise ValueError(f"{rule}, but got block={block}; see PoolPlan.blocks")
        classes = self.classes()[block * self.block_size : (block + 1) * self.block_size]
        images = sampler.images(classes, seeded_generator(self.seed, "pool block", block))
        return LabelledImages(images, classes.to(images.device))

    def fingerprint_parts(self) -> Json:
        """What, beside the sampler, decides the images; for `kr_ray.runs.artifacts.fingerprint`."""
        return asdict(self) | {"prior": list(self.prior)}


def joined(blocks: Sequence[LabelledImages]) -> LabelledImages:
    """Blocks in the order of their numbers as one set."""
    images, labels = [block.images for block in blocks], [block.labels for block in blocks]
    return LabelledImages(torch.cat(images), torch.cat(labels))


def draw_pool(sampler: DrawsImages, plan: PoolPlan) -> LabelledImages:
    """The whole pool, drawn by one."""
    return joined([plan.draw(sampler, block) for block in range(plan.blocks)])


# --- on disk ------------------------------------------------------------------------------------------------


def save_pool(path: Path, pool: LabelledImages, fingerprint: str, cpu_s: float = 0.0) -> None:
    """Write a pool, or some of its blocks, atomically as safetensors, stamped with what it was drawn from.

    Args:
        fingerprint: of the plan, the sampler's checkpoint and its sampling section.
        cpu_s: CPU seconds that drawing them took.
    """
    described = {"fingerprint": fingerprint, "cpu_s": cpu_s}
    save_tensors(path, {"images": pool.images, "classes": pool.labels}, described)


def load_pool(path: Path, fingerprint: str) -> LabelledImages:
    """Read what `save_pool` wrote, on the CPU.

    Raises:
        ArtifactError: the file is missing or broken, or holds images drawn from something else.
    """
    return _load(path, fingerprint)[0]


def _load(path: Path, fingerprint: str) -> tuple[LabelledImages, float]:
    """The pool, and the CPU seconds that it took."""
    tensors, metadata = load_tensors(path)
    with holding(path, "a pool of images"):
        found = metadata.get("fingerprint")
        if found != fingerprint:
            rule = f"`fingerprint: {fingerprint}` must be in the metadata of {path}"
            raise ArtifactError(f"{rule}, but it says {found!r}; delete the file and draw the pool again")
        return LabelledImages(tensors["images"], tensors["classes"]), float(metadata.get("cpu_s", 0.0))


@dataclass(frozen=True)
class Pool:
    """A pool of a checkpoint in a run's storage, drawn or not. Its seed follows from the checkpoint's bytes.

    Attributes:
        folder: of all the run's pools.
        checkpoint: a file that `save_checkpoint` wrote.
        images: size of the pool.
        prior: frequency of each class.
    """

    folder: Path
    generator: GeneratorSection
    checkpoint: Path
    sampling: SamplingSection
    images: int
    prior: tuple[float, ...]

    @cached_property
    def _checkpoint_print(self) -> str:
        return sha256_of(self.checkpoint)

    @cached_property
    def plan(self) -> PoolPlan:
        return PoolPlan(self.images, self.prior, derive_seed(self._checkpoint_print, "pool"))

    @cached_property
    def fingerprint(self) -> str:
        parts = self.plan.fingerprint_parts()
        return fingerprint("pool", self._checkpoint_print, self.generator.kind, self.sampling.stamp(), parts)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.fingerprint[:20]}.safetensors"

    @property
    def parts(self) -> int:
        return len(self.plan.parts())

    def part_path(self, part: int) -> Path:
        return self.folder / f"{self.fingerprint[:20]}.part{part:04d}.safetensors"

    def draw_part(self, part: int, device: torch.device) -> None:
        """Draw a part, unless it is there."""
        path = self.part_path(part)
        if path.exists():
            return
        started = time.process_time()
        drawn = self._draw(self.plan.parts()[part], device)
        save_pool(path, drawn, self.fingerprint, time.process_time() - started)

    def _draw(self, blocks: range, device: torch.device) -> LabelledImages:
        sampler = generator_of(self.generator).open(
            self.checkpoint,
            self.sampling,
            prior=torch.tensor(self.prior, dtype=torch.float64),
            seed=derive_seed(self.plan.seed, "standing"),
            device=device,
            images=len(blocks) * self.plan.block_size,
        )
        return joined([self.plan.draw(sampler, block) for block in blocks])

    def join(self) -> None:
        """Make the whole pool of its parts, which go."""
        paths = [self.part_path(part) for part in range(self.parts)]
        parts = [_load(path, self.fingerprint) for path in paths]
        save_pool(
            self.path,
            joined([images for images, _ in parts]),
            self.fingerprint,
            sum(cpu_s for _, cpu_s in parts),
        )
        for path in paths:
            path.unlink(missing_ok=True)

    def take(self, device: torch.device) -> tuple[LabelledImages, float]:
        """The pool on `device`, and the CPU seconds that it took; drawn here if nobody has drawn it yet.

        Raises:
            ArtifactError: its file is damaged.
        """
        if not self.path.exists():  # several workers may be here at a time
            started = time.process_time()
            drawn = self._draw(range(self.plan.blocks), device)
            save_pool(self.path, drawn, self.fingerprint, time.process_time() - started)
        pool, cpu_s = _load(self.path, self.fingerprint)
        return pool.to(device), cpu_s


def drop_pools(run: Path, keep: Collection[Path]) -> None:
    """Remove the run's pools but those at `keep`: at the paper's scale one takes half a gigabyte."""
    names = {path.name for path in keep}
    for entry in list_files(run / POOLS):
        if entry.path.name not in names:
            entry.path.unlink(missing_ok=True)


# --- what a student sees ------------------------------------------------------------------------------------


def positions(regeneration: int, size: int, pool_size: int, seed: int) -> Tensor:
    """Which images of a pool make up a regeneration: int64 [size].

    The pool is dealt like cards, reshuffled after each pass: regeneration r takes the r-th stretch of
    `size` cards. So within a pass regenerations are disjoint, every image is shown as often as any other
    (within one), and a regeneration may be asked for without those before it. One larger than the pool
    repeats images.
    """
    first, last = regeneration * size, (regeneration + 1) * size
    passes = range(first // pool_size, -(-last // pool_size))
    orders = [seeded_generator(seed, "pool order", index) for index in passes]
    dealt = torch.cat([torch.randperm(pool_size, generator=order) for order in orders])
    offset = passes.start * pool_size
    return dealt[first - offset : last - offset]


def quotas(shares: Sequence[float], size: int) -> list[int]:
    """`size` divided in proportion to `shares` (>= 0, not all 0), by largest remainder."""
    exact = [share * size / sum(shares) for share in shares]
    floors = [int(value) for value in exact]
    by_rest = sorted(range(len(shares)), key=lambda k: (floors[k] - exact[k], k))
    for k in by_rest[: size - sum(floors)]:
        floors[k] += 1
    return floors


@dataclass(frozen=True)
class LabelledPool:
    """Images of a pool with the teacher's answers.

    Attributes:
        images: uint8 [M, C, H, W], on the training's device.
        targets: float32 [M, K], their target probabilities: the teacher answers each image of the pool once;
            [M, 0] where a labeller gives them.
        share: of this pool in every regeneration, relative to the others'.
        cpu_s: CPU seconds that drawing it took.

    Raises:
        ValueError: the pool is empty, or images and targets differ in number.
    """

    images: Tensor
    targets: Tensor
    share: float = 1.0
    cpu_s: float = 0.0

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.targets) >= 1:
            raise ValueError(
                "`len(images) == len(targets) >= 1` must hold, but got "
                f"{len(self.images)} images and {len(self.targets)} targets; label the whole pool"
            )


class PooledSet(RegeneratedSet):
    """A regenerated set whose regenerations are dealt from pools, of each its share.

    Args:
        size: of the set.
        seed: of the dealing order.
    """

    def __init__(self, pools: Sequence[LabelledPool], size: int, config: SynthesisConfig, seed: int) -> None:
        super().__init__(size, config)
        self._pools, self._seed = pools, seed
        self._quotas = quotas([pool.share for pool in pools], size)

    def regeneration(self, index: int) -> tuple[Tensor, Tensor]:
        """The whole set of one regeneration: images uint8 [N, C, H, W], targets float32 [N, K]."""
        dealt = [self._deal(k, index) for k, quota in enumerate(self._quotas) if quota]
        return torch.cat([images for images, _ in dealt]), torch.cat([targets for _, targets in dealt])

    def _deal(self, k: int, index: int) -> tuple[Tensor, Tensor]:
        pool, seed = self._pools[k], derive_seed(self._seed, "pool", k)
        dealt = positions(index, self._quotas[k], len(pool.images), seed).to(pool.images.device)
        return pool.images[dealt], pool.targets[dealt]

    def figures(self, index: int) -> dict[str, float]:
        """The regeneration of epoch `index`, the images generated for all of them (the pools'), and what they
        took; all students share it."""
        return {
            "regeneration": self.regeneration_of(index),
            "images_generated": sum(len(pool.images) for pool in self._pools),
            "pool_cpu_seconds": sum(pool.cpu_s for pool in self._pools),
        }
