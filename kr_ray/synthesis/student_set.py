"""The synthetic set of one student: what makes it, how large it is, where it is made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kr_ray.classifiers.ensemble import Ensemble
from kr_ray.classifiers.networks import load_classifier
from kr_ray.classifiers.predict import teacher_probabilities
from kr_ray.classifiers.sets import smoothed_one_hot
from kr_ray.classifiers.training import Labeller, Schedule
from kr_ray.compute.graphs import Captured, compiled
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig, GeneratorSection, SynthesisConfig
from kr_ray.data.images import LabelledImages, Splits, class_prior
from kr_ray.generators.interface import checkpoint_file, released_prior
from kr_ray.generators.registry import generator_of
from kr_ray.runs.stages import WEIGHTS_FILE
from kr_ray.synthesis.labelling import seen_labeller, strategy_of
from kr_ray.synthesis.pool import POOLS, LabelledPool, Pool, PooledSet
from kr_ray.synthesis.stream import CollapsedGenerator, RegeneratedSet, SyntheticSet

LABELLER_PAYS_FROM = 4e6
"""Images: compiling the teacher took 4 s on an H200 and saved 1 microsecond an image at width 64."""


@dataclass(frozen=True)
class StudentSpec:
    """What makes one student differ from another. Two students of equal spec are equal, bit for bit.

    Attributes:
        generator: the section of the generator whose checkpoint it is.
        epochs: see `student_schedule`.
        trained_in: the stage that trained the generator.
        with_real: whether the real training images are in the set, too.
    """

    generator: GeneratorSection
    checkpoint_epoch: int
    synthesis: SynthesisConfig
    epochs: float
    seed: int
    trained_in: str = "generator"
    with_real: bool = False

    @property
    def checkpoint(self) -> Path:
        """Relative to the run directory."""
        return Path(self.trained_in) / checkpoint_file(self.checkpoint_epoch).relative_to("generator")

    def stamp(self) -> list[Any]:
        """All that decides the student within a run beside the recipe, as JSON values."""
        added = {
            name: value
            for name, default in (("trained_in", "generator"), ("with_real", False))
            if (value := getattr(self, name)) != default
        }
        kept = [self.checkpoint_epoch, self.synthesis.stamp(), self.epochs, self.seed]
        return [*kept, added] if added else kept


def student_schedule(
    recipe: ClassifierConfig,
    synthesis: SynthesisConfig,
    epochs: float,
    real_images: int,
    with_real: bool = False,
) -> Schedule:
    """Budget of a student: with `epoch_unit: synthetic` (the paper) the size of its set (synthetic images,
    and with `with_real` the real ones) multiplies it."""
    scale = synthesis.cardinality_scale + with_real
    return Schedule.fit(
        recipe, real_images * scale, epochs if synthesis.epoch_unit == "synthetic" else epochs / scale
    )


def compiled_labeller(
    run: Path, synthesis: SynthesisConfig, device: torch.device, images: float
) -> nn.Module:
    """The classifier that labels, or several as one, which about so many images will be shown to."""
    members = [load_classifier(run / name / WEIGHTS_FILE, device) for name in synthesis.labeller_names()]
    labeller = members[0] if len(members) == 1 else Ensemble(members).requires_grad_(False).eval()
    return compiled(labeller, device, images, LABELLER_PAYS_FROM)


def student_labeller(
    run: Path, spec: StudentSpec, schedule: Schedule, device: torch.device
) -> Labeller | None:
    """Labels what the student of `spec` sees; None where its images come with labels."""
    if spec.synthesis.view == "clean":
        return None
    teacher = compiled_labeller(run, spec.synthesis, device, schedule.steps * schedule.batch_size)
    return seen_labeller(teacher, spec.synthesis.temperature, device)


def synthetic_set(
    run: Path,
    spec: StudentSpec,
    recipe: ClassifierConfig,
    splits: Splits,
    device: torch.device,
    images: int = 0,
    regenerations: float = 1,
) -> SyntheticSet:
    """The set that the student of `spec` is trained on, made on `device` about so many times.

    `images` other than 0 asks for a set of that size from the same seeds.
    """
    size, seed = images or set_size(spec, splits), derive_seed(spec.seed, "synthetic set")
    prior, synthesis, teacher = set_prior(run, spec, splits), spec.synthesis, None
    if synthesis.asks_the_teacher and synthesis.view == "clean":
        teacher = compiled_labeller(run, synthesis, device, size * regenerations)
    sampler = generator_of(spec.generator).open(
        run / spec.checkpoint,
        synthesis.sampling,
        prior=prior,
        seed=derive_seed(seed, "standing"),
        device=device,
        batch_size=synthesis.batch_size,
        images=size * regenerations,
    )
    return SyntheticSet(
        sampler=sampler,
        teacher=teacher,
        prior=prior,
        images=size,
        config=synthesis,
        label_smoothing=recipe.label_smoothing,
        seed=seed,
    )


def set_prior(run: Path, spec: StudentSpec, splits: Splits) -> Tensor:
    """Class frequencies of the labels that are asked for, float64 [K]. Only `real` looks at the real
    labels."""
    match spec.synthesis.class_prior:
        case "real":
            return class_prior(splits.train.labels, splits.num_classes)
        case "uniform":
            return torch.full((splits.num_classes,), 1 / splits.num_classes, dtype=torch.float64)
        case "released":
            return released_prior(run / spec.checkpoint)


def pools_of(run: Path, spec: StudentSpec, splits: Splits) -> list[tuple[float, Pool]]:
    """The pools that the student of `spec` is shown parts of, each with its share; none with an endless
    stream."""
    size, synthesis = spec.synthesis.pool_scale * len(splits.train), spec.synthesis
    if not size:
        return []
    checkpoint = run / spec.checkpoint
    prior = tuple(set_prior(run, spec, splits).tolist())
    return [
        (share, Pool(run / POOLS, spec.generator, checkpoint, part, size, prior))
        for share, part in synthesis.sampling.parts()
    ]


def pooled_set(
    run: Path, spec: StudentSpec, recipe: ClassifierConfig, splits: Splits, device: torch.device
) -> PooledSet:
    """The set that the student of `spec` is trained on, dealt from pools.

    Raises:
        CollapsedGenerator: a filtering strategy has found no image to keep.
    """
    taken = [(share, *pool.take(device)) for share, pool in pools_of(run, spec, splits)]
    images, teacher = sum(len(pool) for _, pool, _ in taken), None
    if spec.synthesis.asks_the_teacher and spec.synthesis.view == "clean":
        teacher = compiled_labeller(run, spec.synthesis, device, images)
    label = partial(label_pool, teacher=teacher, config=spec.synthesis, smoothing=recipe.label_smoothing)
    pools = [LabelledPool(*label(pool, splits.num_classes), share, cpu_s) for share, pool, cpu_s in taken]
    return PooledSet(pools, set_size(spec, splits), spec.synthesis, derive_seed(spec.seed, "synthetic set"))


def label_pool(
    pool: LabelledImages,
    num_classes: int,
    *,
    teacher: nn.Module | None,
    config: SynthesisConfig,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """A pool's images uint8 [M, C, H, W] and target probabilities float32 [M, K]; [M, 0] where a labeller
    gives them, and no `teacher` is asked.

    Where a filtering strategy rejects an image, an accepted one of its class takes its place, so that
    filtering does not change the class frequencies; a class without any is left out.

    Raises:
        CollapsedGenerator: not one image is accepted.
    """
    if not config.asks_the_teacher:
        return pool.images, smoothed_one_hot(pool.labels, num_classes, smoothing)
    if teacher is None:
        return pool.images, pool.images.new_empty(len(pool), 0, dtype=torch.float32)
    ask = Captured(
        partial(teacher_probabilities, teacher, temperature=config.temperature), pool.images.device
    )
    probabilities = torch.cat([ask(batch) for batch in pool.images.split(config.batch_size)])
    strategy = strategy_of(config.labelling)
    keep, targets = strategy.label(pool.labels, probabilities, config, smoothing)
    if not strategy.filters:
        return pool.images, targets
    index = _accepted(pool.labels, keep)
    if not len(index):
        raise CollapsedGenerator(
            f"none of {len(pool)} images of the pool was accepted by labelling={config.labelling!r}; "
            "the checkpoint has collapsed: use a later one, or labelling gkd"
        )
    return pool.images[index], targets[index]


def _accepted(classes: Tensor, keep: Tensor) -> Tensor:
    """int64 [N]: as many images of each class as `classes` (int64 [N]), all of them kept ones (bool [N])."""
    chosen = []
    for one in classes.unique():
        kept = (keep & (classes == one)).nonzero()[:, 0]
        if len(kept):
            wanted = int((classes == one).sum())
            chosen.append(kept[torch.arange(wanted, device=kept.device) % len(kept)])
    return torch.cat(chosen) if chosen else classes.new_empty(0)


def set_size(spec: StudentSpec, splits: Splits) -> int:
    """Images of the set that the student of `spec` is trained on."""
    return spec.synthesis.cardinality_scale * len(splits.train)


class OpenSet(Protocol):
    """Gives a student its training images, made where it says."""

    def __call__(
        self,
        run: Path,
        spec: StudentSpec,
        recipe: ClassifierConfig,
        splits: Splits,
        device: torch.device,
        epochs: int,
    ) -> RegeneratedSet:
        """The images of the student's epochs 0 to `epochs` - 1, on `device`."""
        ...


def on_device(
    run: Path, spec: StudentSpec, recipe: ClassifierConfig, splits: Splits, device: torch.device, epochs: int
) -> RegeneratedSet:
    """Generated by the training itself, between two epochs, or dealt from a pool."""
    if spec.synthesis.pool_scale:
        return pooled_set(run, spec, recipe, splits, device)
    return synthetic_set(
        run, spec, recipe, splits, device, regenerations=epochs / spec.synthesis.regeneration_rate
    )
