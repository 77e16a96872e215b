"""A pool: generated images drawn once and reused, for generators whose images are dear (a diffusion model's).

Where a GAN's set is drawn anew at every regeneration, a pool is drawn once, in blocks that anybody may
draw, and each regeneration is the next stretch of it. All students of one checkpoint and all trials of a
tuning can share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kr_ray.compute.seeding import seeded_generator
from kr_ray.config import SynthesisConfig
from kr_ray.data.images import LabelledImages
from kr_ray.runs.artifacts import ArtifactError, Json, holding, load_tensors, save_tensors
from kr_ray.synthesis.stream import RegeneratedSet


class DrawsImages(Protocol):
    """A sampler of any kind of generator, ready to draw."""

    device: torch.device

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


def save_pool(path: Path, pool: LabelledImages, fingerprint: str) -> None:
    """Write a pool, or some of its blocks, atomically as safetensors, stamped with what it was drawn from.

    Args:
        fingerprint: of the plan, the sampler's checkpoint and its sampling section.
    """
    save_tensors(path, {"images": pool.images, "classes": pool.labels}, {"fingerprint": fingerprint})


def load_pool(path: Path, fingerprint: str) -> LabelledImages:
    """Read what `save_pool` wrote, on the CPU.

    Raises:
        ArtifactError: the file is missing or broken, or holds images drawn from something else.
    """
    tensors, metadata = load_tensors(path)
    with holding(path, "a pool of images"):
        found = metadata.get("fingerprint")
        if found != fingerprint:
            rule = f"`fingerprint: {fingerprint}` must be in the metadata of {path}"
            raise ArtifactError(f"{rule}, but it says {found!r}; delete the file and draw the pool again")
        return LabelledImages(tensors["images"], tensors["classes"])


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


class PooledSet(RegeneratedSet):
    """A regenerated set whose regenerations are dealt from a pool.

    Args:
        images: the pool's, uint8 [M, C, H, W], on the training's device.
        targets: their target probabilities, float32 [M, K]: the teacher answers each image of the pool once.
        size: of the set.
        seed: of the dealing order.

    Raises:
        ValueError: the pool is empty, or images and targets differ in number.
    """

    def __init__(
        self, images: Tensor, targets: Tensor, size: int, config: SynthesisConfig, seed: int
    ) -> None:
        super().__init__(size, config)
        if not len(images) == len(targets) >= 1:
            raise ValueError(
                "`len(images) == len(targets) >= 1` must hold, but got "
                f"{len(images)} images and {len(targets)} targets; label the whole pool"
            )
        self._images, self._targets, self._seed = images, targets, seed

    def regeneration(self, index: int) -> tuple[Tensor, Tensor]:
        """The whole set of one regeneration: images uint8 [N, C, H, W], targets float32 [N, K]."""
        dealt = positions(index, len(self), len(self._images), self._seed).to(self._images.device)
        return self._images[dealt], self._targets[dealt]

    def made_by(self, index: int) -> dict[str, float]:
        """The regeneration of epoch `index`, and the images generated for all of them: the pool's."""
        return {"regeneration": self.regeneration_of(index), "images_generated": len(self._images)}
